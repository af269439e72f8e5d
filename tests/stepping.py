"""Feed the eager step in pieces, with either kind of state."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from doge_onnx.export import checkpoint as checkpoint_reader
from doge_onnx.export.attention import State
from doge_onnx.export.checkpoint import Checkpoint
from doge_onnx.export.growing_state import GrowingState
from doge_onnx.export.operators import FUSED, STANDARD
from doge_onnx.export.step import RecurrentStep
from doge_onnx.export.window_state import WindowState

OPERATORS = {"fused": FUSED, "standard": STANDARD}


class RowByRow(nn.Module):
    """A linear map, applied to one token after the other.

    How PyTorch rounds a row of a matrix product depends on how many rows there are, so equal
    tokens would get gates that differ in the last bit, and the wrong one would fall out of the
    window. ONNX Runtime's product does not do that.
    """

    def __init__(self, linear: nn.Module):
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        rows = [self.linear(row) for row in x.flatten(0, 1).split(1)]
        return torch.cat(rows).unflatten(0, x.shape[:2])


def build(checkpoint: Checkpoint, state: State, operators: str) -> RecurrentStep:
    """The step, with gates that do not depend on the length of a piece."""
    step = RecurrentStep(checkpoint, state, OPERATORS[operators]).eval()
    for layer in step.layers:
        layer.project.gate = RowByRow(layer.project.gate)
    return step


class Growing:
    """The step with a row for every token."""

    def __init__(self, directory: Path, operators: str = "fused", context_length: int = 512):
        checkpoint = checkpoint_reader.read(directory)
        self.layers = checkpoint.config.num_hidden_layers
        self.state = GrowingState(checkpoint, context_length, OPERATORS[operators])
        self.step = build(checkpoint, self.state, operators)

    @torch.no_grad()
    def run(self, ids: Tensor, mask: Tensor | None = None, cuts: Iterable[int] = ()) -> Tensor:
        """Logits `[B, S, V]` of `ids`, fed in pieces that end at `cuts`."""
        mask = torch.ones_like(ids) if mask is None else mask
        heads = self.state.heads
        empty = torch.zeros(len(ids), heads.num_keys, 0, heads.row)
        state = [(empty, empty)] * self.layers
        pieces = []
        for start, end in spans(ids.shape[1], cuts):
            logits, state = self.step((ids[:, start:end], mask[:, :end]), state)
            pieces.append(logits)
        return torch.cat(pieces, dim=1)


class Window:
    """The step with a row for every key of the window.

    Args:
        directory: A checkpoint.
        operators: "fused" or "standard".
        first_rows: Rows to begin with, if less than the window; others are added when the
            tokens need them.
    """

    def __init__(self, directory: Path, operators: str = "fused", first_rows: int | None = None):
        checkpoint = checkpoint_reader.read(directory)
        self.layers = checkpoint.config.num_hidden_layers
        self.state = WindowState(checkpoint)
        self.rows = self.state.window if first_rows is None else first_rows
        self.step = build(checkpoint, self.state, operators)

    @torch.no_grad()
    def run(self, ids: Tensor, mask: Tensor | None = None, cuts: Iterable[int] = ()) -> Tensor:
        """Logits `[B, S, V]` of `ids`, fed in pieces that end at `cuts` or are of W tokens."""
        mask = torch.ones_like(ids) if mask is None else mask
        positions = torch.clamp(mask.cumsum(dim=1) - 1, min=0)
        state = self.free_rows(len(ids), self.rows)
        pieces = []
        for start, end in spans(ids.shape[1], cuts, longest=self.state.window):
            missing = min(end, self.state.window) - state[0][0].shape[2]
            if missing > 0:
                free = self.free_rows(len(ids), missing)
                state = [
                    tuple(torch.cat(parts, dim=2) for parts in zip(*pairs, strict=True))
                    for pairs in zip(state, free, strict=True)
                ]
            piece = slice(start, end)
            logits, state = self.step((ids[:, piece], mask[:, piece], positions[:, piece]), state)
            assert state[0][0].shape[2] <= self.state.window
            pieces.append(logits)
        return torch.cat(pieces, dim=1)

    def free_rows(self, batch: int, rows: int) -> list[tuple[Tensor, ...]]:
        heads = self.state.heads
        key = torch.zeros(batch, heads.num_keys, rows, heads.row)
        value = torch.zeros_like(key)
        closing = self.state.closing
        key[..., closing.channels] = closing.value
        return [(key, value)] * self.layers


def spans(
    length: int, cuts: Iterable[int], longest: int | None = None
) -> Iterable[tuple[int, int]]:
    """Pieces of a text as (start, end)."""
    start = 0
    for end in [*cuts, length]:
        while longest is not None and end - start > longest:
            yield start, start + longest
            start += longest
        yield start, end
        start = end


def each(length: int) -> range:
    """The cuts that leave pieces of one token."""
    return range(1, length)


def row(ids: Sequence[int] | NDArray[Any]) -> Tensor:
    """A batch of one text."""
    return torch.tensor(np.asarray(ids)).unsqueeze(0)


def random_text(length: int, vocab_size: int, seed: int = 0) -> list[int]:
    """Token ids, most of them several times."""
    return np.random.default_rng(seed).integers(0, vocab_size, length).tolist()


def fresh_text(length: int, vocab_size: int, seed: int = 0) -> list[int]:
    """Token ids, none of them twice."""
    return np.random.default_rng(seed).permutation(vocab_size)[:length].tolist()


def pad(
    texts: Sequence[Sequence[int]], gaps: Sequence[Sequence[int]] | None = None
) -> tuple[Tensor, Tensor]:
    """A batch of unequal texts, padded on the left.

    Args:
        texts: Token ids.
        gaps: For each text, where else padding stands: indices of the padded row.

    Returns:
        ids and mask, `[B, S]`. What stands in the padding differs from row to row.
    """
    gaps = gaps or [()] * len(texts)
    width = max(len(text) + len(gap) for text, gap in zip(texts, gaps, strict=True))
    ids = torch.arange(len(texts)).unsqueeze(1).expand(-1, width).clone()
    mask = torch.zeros_like(ids)
    for index, (text, gap) in enumerate(zip(texts, gaps, strict=True)):
        room = [column for column in range(width) if column not in gap]
        columns = room[len(room) - len(text) :]
        ids[index, columns] = torch.tensor(text)
        mask[index, columns] = 1
    return ids, mask
