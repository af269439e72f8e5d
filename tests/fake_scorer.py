"""A model for evaluations whose probabilities a test chooses, and texts for it."""

from __future__ import annotations

import numpy as np

from doge_onnx.measure import evaluate as evaluator
from doge_onnx.measure.evaluate import Text


class Fake:
    """A model whose logits depend on the last token alone: row t of a table."""

    description = "fake"
    kernels = None
    context_length = None

    def __init__(self, table):
        self.table = np.asarray(table, np.float32)
        self.vocab_size = self.table.shape[1]

    def logits(self, ids):
        return self.table[ids]

    def sample(self, seed, rows, length, first_row=0):
        numbers = range(first_row, first_row + rows)
        step = lambda tokens, _: (self.table[tokens], None)  # noqa: E731
        return evaluator.sample_text(step, 0, (), self.vocab_size, seed, numbers, length)


def probabilities(*rows):
    return Fake(np.log(rows))


def text(*windows):
    return Text(windows, max(map(len, windows)), "by hand")
