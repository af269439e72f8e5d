"""The recurrent state between two steps, in buffers with room to grow.

Knows how states share a buffer, when one may extend it in place and when it must copy.
Does not know ONNX Runtime or what the rows mean: who runs the graph claims the rows,
has them written, and wraps the result into a new `State`.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Small enough to cost little, large enough that short replies never grow their buffer.
_FIRST_CAPACITY = 256


class Buffer:
    """Storage of one or more states: rows of every cache tensor, and their mask.

    States share a buffer because a state is a prefix of the one that follows it. Rows
    below `rows` belong to some state and are never written again; a state that ends
    exactly there is the newest and may claim the rows that follow.

    Attributes:
        tensors: Keys and values in the order of the graph's inputs, each with space for
            `capacity` rows: `[batch, heads, capacity, row_size]`. What they are (NumPy
            arrays, values of ONNX Runtime) is the business of who runs the graph.
        mask: int64 `[batch, capacity]`, 1 where a row is a token and 0 where it is padding.
        rows: Number of rows that are written or claimed.
    """

    def __init__(self, tensors: Sequence[Any], mask: NDArray[np.int64], rows: int = 0) -> None:
        self.tensors = tensors
        self.mask = mask
        self.rows = rows
        self._lock = threading.Lock()

    @property
    def capacity(self) -> int:
        """Number of rows that fit."""
        return int(self.mask.shape[1])

    def claim(self, start: int, end: int) -> bool:
        """Take the rows from `start` to `end` for one writer; False if that cannot be.

        It cannot be if they do not fit, or if another state was continued from `start`
        before. A writer that fails must `release` the rows.
        """
        with self._lock:
            if self.rows != start or end > self.capacity:
                return False
            self.rows = end
            return True

    def release(self, start: int) -> None:
        """Undo a claim: the rows from `start` on were not written after all."""
        self.rows = start


class State:
    """All that the model remembers of a batch of sequences after a step.

    Has value semantics: a step never changes the state it starts from, so any state may
    be kept and continued again later, as often as wanted.
    """

    def __init__(
        self,
        buffer: Buffer,
        length: int,
        owner: object,
        num_tokens: NDArray[np.int64] | None = None,
    ) -> None:
        self.buffer = buffer
        self._length = length
        self._owner = owner
        self._num_tokens = num_tokens

    @property
    def batch_size(self) -> int:
        """Number of sequences."""
        return int(self.buffer.mask.shape[0])

    @property
    def length(self) -> int:
        """Number of tokens that each sequence was fed, padding included."""
        return self._length

    @property
    def mask(self) -> NDArray[np.int64]:
        """1 for a token, 0 for padding: int64 `[batch_size, length]`.

        A state of constant size does not remember it.
        """
        return self.buffer.mask[:, : self._length]

    @property
    def num_tokens(self) -> NDArray[np.int64]:
        """Tokens of each sequence, padding not counted: int64 `[batch_size]`."""
        if self._num_tokens is not None:
            return self._num_tokens
        tokens: NDArray[np.int64] = self.mask.sum(axis=1)
        return tokens

    def belongs_to(self, owner: object) -> bool:
        """Whether `owner` is what made this state."""
        return self._owner is owner

    def __repr__(self) -> str:
        return f"State(batch_size={self.batch_size}, length={self.length})"


def max_rows(context_length: int) -> int:
    """Most rows a sequence may take, padding included.

    Left padding makes a batch longer than any of its sequences: a short one may reach
    the context length after the padding that the longest prompt, itself no longer than
    that, forced on it.
    """
    return 2 * context_length


def grown_capacity(rows: int, context_length: int, follow: int | None = None) -> int:
    """Capacity of a new buffer for at least `rows` rows.

    Doubles, so that copying costs O(1) per row over a whole run, but reserves no more
    than the context length before padding makes that necessary.

    Args:
        rows: Rows that must fit.
        context_length: Most tokens of a sequence.
        follow: Most rows that will follow those, if that is known.
    """
    if follow is not None:
        return min(rows + follow, grown_capacity(rows + 1, context_length))
    capacity = _FIRST_CAPACITY
    while capacity < rows:
        capacity *= 2
    limit = context_length if rows <= context_length else max_rows(context_length)
    return max(rows, min(capacity, limit))
