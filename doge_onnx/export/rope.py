"""Rotary position embeddings: the angle of every position, for each supported type.

Knows positions only. `step` knows what is rotated, and where positions come from.
"""

from __future__ import annotations

import torch
from torch import Tensor

from doge_onnx.export.model_config import DogeConfig


def rotary_tables(config: DogeConfig, length: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotation of each position.

    The reference is transformers fed one token at a time: the token at position p is then
    rotated as in a sequence of p + 1 tokens, and stays so in the cache. The base of "dynamic"
    depends on the sequence length, so each position past the trained context has its own
    wavelengths. All arithmetic is float32 in the reference's order, because at large positions
    rounding a wavelength visibly changes the angle.

    Args:
        config: The model's.
        length: Number of positions, from 0.

    Returns:
        Two float32 tensors `[length, head_dim / 2]`.
    """
    positions = torch.arange(length)
    angles = positions.unsqueeze(-1).float() * inverse_wavelengths(config, positions)
    return angles.cos(), angles.sin()


def inverse_wavelengths(config: DogeConfig, positions: Tensor) -> Tensor:
    """Radians per position of each channel pair.

    Args:
        config: The model's.
        positions: int64 `[...]`.

    Returns:
        float32 `[..., head_dim / 2]`, or `[head_dim / 2]` where it is the same everywhere.
    """
    rope, dim = config.rope, config.head_dim
    exponents = torch.arange(0, dim, 2, dtype=torch.float) / dim
    if rope.kind != "dynamic":
        frequencies = 1.0 / (rope.theta**exponents)
        return frequencies / rope.factor if rope.kind == "linear" else frequencies
    trained = config.max_position_embeddings
    length = positions + 1
    stretch = (rope.factor * length / trained) - (rope.factor - 1)
    stretch = torch.where(length > trained, stretch, 1.0)
    base = rope.theta * stretch ** (dim / (dim - 2))
    return 1.0 / (base.unsqueeze(-1) ** exponents)
