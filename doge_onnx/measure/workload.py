"""What a measurement runs: prompts of given lengths, and a model that goes on to the last step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from doge_onnx.runtime.generation.config import Defaults
from doge_onnx.runtime.model import Model, load


@dataclass(frozen=True)
class Spread:
    """One figure, measured several times."""

    median: float
    min: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of at least one value."""
        return cls(float(np.median(values)), float(min(values)), float(max(values)))


class Cell(NamedTuple):
    """A prompt of `context` tokens in each of `batch` sequences."""

    context: int
    batch: int


def random_prompts(cell: Cell, vocab_size: int) -> list[list[int]]:
    """Token ids `[batch, context]`, always the same ones for a cell."""
    ids: list[list[int]] = np.random.default_rng(cell).integers(0, vocab_size, cell[::-1]).tolist()
    return ids


def load_without_end(
    path: str | Path, threads: int | None, device: str = "auto", cuda_graph: bool | None = None
) -> Model:
    """A bundle that generates greedily whatever it recommends, and whose texts have no end.

    So each run has as many steps as it was asked for. The arguments are those of `load`.
    """
    model = load(path, device, threads=threads, cuda_graph=cuda_graph)
    model._defaults = Defaults(frozenset(), sample=False, values={})
    return model
