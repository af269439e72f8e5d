"""The state of a batch of sequences between two steps, in buffers with room to grow.

Knows how states share a buffer, when one may extend it in place and when it must copy.
Does not know ONNX Runtime or what the rows mean: who runs the graph claims the rows,
has them written, and wraps the result into a new `State`.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

# Small enough to cost little, large enough that short replies never grow their buffer.
FIRST_CAPACITY = 256


# A tensor of a state: of NumPy, of ONNX Runtime, or of a device.
T = TypeVar("T")


class Buffer(Generic[T]):
    """Storage of one or more states: rows of every key and value tensor.

    States share a buffer because a state is a prefix of the one that follows it. In each
    sequence, rows below `lengths` belong to some state and are never written again; a state that
    ends exactly there is the newest and may claim the rows that follow.

    Attributes:
        tensors: Keys and values in the order of the graph's inputs, each with space for
            `capacity` rows: `[batch, heads, capacity, row_size]`. What they are (NumPy
            arrays, tensors of a device) is the business of who runs the graph.
        capacity: Number of rows that fit, for each sequence.
        lengths: int64 `[batch]`, number of rows that are written or claimed.
        shared: Whether there may be states before the newest one that somebody still uses, so that
            their rows must stay where they are.
    """

    def __init__(self, tensors: Sequence[T], capacity: int, lengths: NDArray[np.int64]) -> None:
        self.tensors = tensors
        self.capacity = capacity
        self.lengths = lengths
        self.shared = False
        self._lock = threading.Lock()

    def claim(self, starts: NDArray[np.int64], end: int) -> bool:
        """Take the rows of each sequence from `starts` to `end` for one writer.

        Returns:
            False if that cannot be, because they do not fit, or because another state was
            continued from `starts` before. A writer must `release` the rows that it did not
            write.
        """
        with self._lock:
            if end > self.capacity or not np.array_equal(self.lengths, starts):
                return False
            self.lengths = np.full_like(starts, end)
            return True

    def share(self) -> None:
        """Note that older states are still in use, so that no row may be moved."""
        self.shared = True

    def release(self, lengths: NDArray[np.int64]) -> None:
        """Give back what was claimed, but for the first `lengths` rows of each sequence."""
        self.lengths = lengths


class State:
    """All that the model remembers of a batch of sequences after a step.

    Has value semantics: a step never changes the state it starts from, so any state may
    be kept and continued again later, as often as wanted.

    Attributes:
        lengths: Number of tokens that each sequence was fed, int64 `[batch_size]`, read-only;
            padding does not count.
    """

    def __init__(self, buffer: Buffer[Any], lengths: NDArray[np.int64], owner: object) -> None:
        self.buffer = buffer
        # A copy that cannot be changed: it says which rows of the buffer are this state's.
        self.lengths = lengths.copy()
        self.lengths.flags.writeable = False
        self._owner = owner

    @property
    def batch_size(self) -> int:
        """Number of sequences."""
        return len(self.lengths)

    def belongs_to(self, owner: object) -> bool:
        """Whether `owner` is what made this state."""
        return self._owner is owner

    def __repr__(self) -> str:
        return f"State(batch_size={self.batch_size}, lengths={self.lengths.tolist()})"


def grown_capacity(rows: int, limit: int, most: int | None = None) -> int:
    """Capacity of a new buffer for at least `rows` rows.

    Doubles, so that copying costs O(1) per row over a whole run, but reserves no more
    than the limit, unless more are there already.

    Args:
        rows: Rows that must fit.
        limit: Most rows that a sequence can have.
        most: Most rows that it will have, if that is known.
    """
    if most is not None:
        return max(rows, min(most, grown_capacity(rows + 1, limit)))
    capacity = FIRST_CAPACITY
    while capacity < rows:
        capacity *= 2
    return max(rows, min(capacity, limit))
