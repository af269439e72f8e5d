"""Checkpoints of the released shapes with random weights, for measuring speed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

# Shapes of the released models: hidden size, MLP size, layers, query heads, key/value heads,
# experts, experts per token.
SHAPES = {
    "20M": (256, 512, 8, 2, 1, 0, 0),
    "60M": (512, 1024, 16, 4, 2, 0, 0),
    "160M": (768, 1536, 24, 6, 3, 0, 0),
    "320M": (1024, 2048, 32, 8, 4, 0, 0),
    "20M-MoE": (256, 512, 8, 2, 1, 1024, 16),
    "120M-MoE": (512, 1024, 16, 4, 2, 4096, 32),
    "20M-128k": (256, 512, 8, 2, 1, 0, 0),
    "60M-128k": (512, 1024, 16, 4, 2, 0, 0),
}


def vocabulary(shape: str) -> int:
    """Tokens of a shape: as in the released models, or as in those with the largest tokenizers."""
    return 128256 if shape.endswith("-128k") else 32768


def random_checkpoint(directory: Path, shape: str, **overrides: Any) -> Path:
    """Write a checkpoint of one of `SHAPES` into `directory` and return its path.

    Gates are random: with the initial A = 0 they would all be equal. They stay within float16.
    """
    hidden, middle, layers, heads, kv_heads, experts, per_token = SHAPES[shape]
    settings: dict[str, Any] = {
        "vocab_size": vocabulary(shape),
        "hidden_size": hidden,
        "intermediate_size": middle,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "tie_word_embeddings": True,
        "max_position_embeddings": 2048,
        "rope_scaling": {"rope_type": "dynamic", "factor": 4.0},
    }
    if experts:
        settings |= {"is_moe": True, "num_experts": experts, "num_experts_per_tok": per_token}
    torch.manual_seed(0)
    model = transformers.DogeForCausalLM(transformers.DogeConfig(**{**settings, **overrides}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".A"):
                parameter.normal_()
            elif ".dt_proj." in name:
                parameter.normal_(std=0.05)
    path = directory / shape
    model.save_pretrained(path)
    return path
