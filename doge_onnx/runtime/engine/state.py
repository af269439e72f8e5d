"""The state of a batch of sequences between two steps, in a buffer with room to grow.

Knows how several states share a buffer, and when a step may extend the buffer in place or must copy
it. Does not know ONNX Runtime or what the rows mean: a runner claims rows, lets the graph write
them, and makes the new `State`.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

# Rows of the smallest buffer: cheap, but enough that short answers need no larger one.
FIRST_CAPACITY = 256


# A tensor of a state: of NumPy, of ONNX Runtime, or of a device.
T = TypeVar("T")


class Buffer(Generic[T]):
    """Storage of one or more states: the rows of every key and value tensor.

    States can share a buffer, because each state is a prefix of the next one. The rows of each
    sequence below `lengths` belong to some state and are never written again. A state that ends at
    `lengths` is the newest one and may claim the rows after it.

    Attributes:
        tensors: Keys and values in the order of the graph's inputs, each
            `[batch, heads, capacity, row_size]`. NumPy arrays, or tensors on a device: only the
            runner needs to know.
        capacity: Number of rows that fit, for each sequence.
        lengths: int64 `[batch]`, number of rows of each sequence that are written or claimed.
        shared: Whether states before the newest one may still be in use, so that their rows must
            not move.
    """

    def __init__(self, tensors: Sequence[T], capacity: int, lengths: NDArray[np.int64]) -> None:
        self.tensors = tensors
        self.capacity = capacity
        self.lengths = lengths
        self.shared = False
        self._lock = threading.Lock()

    def claim(self, starts: NDArray[np.int64], end: int) -> bool:
        """Claim the rows of each sequence from `starts` to `end`, for one writer.

        The writer must `release` the rows that it did not write.

        Args:
            starts: int64 `[batch]`, where the state ends that is to be continued.
            end: End of the claimed rows, the same for all sequences.

        Returns:
            False if the rows do not fit, or if a state was continued from `starts` before.
        """
        with self._lock:
            if end > self.capacity or not np.array_equal(self.lengths, starts):
                return False
            self.lengths = np.full_like(starts, end)
            return True

    def share(self) -> None:
        """Note that older states are still in use, so that their rows must not move."""
        self.shared = True

    def release(self, lengths: NDArray[np.int64]) -> None:
        """Give claimed rows back: those after the first `lengths`, int64 `[batch]`."""
        self.lengths = lengths


class State:
    """Everything that the model remembers of a batch of sequences after a step.

    Has value semantics: a step never changes the state that it starts from, so any state may be
    kept and continued later, several times.

    Attributes:
        lengths: Number of tokens that each sequence was fed, without padding, int64 `[batch_size]`;
            read-only.
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
        """Whether the runner `owner` made this state."""
        return self._owner is owner

    def __repr__(self) -> str:
        return f"State(batch_size={self.batch_size}, lengths={self.lengths.tolist()})"


def buffer_capacity(rows: int, limit: int, most: int | None = None) -> int:
    """Capacity of a new buffer for at least `rows` rows.

    Doubles, so that copying costs O(1) per row on average, but never exceeds `limit` unless `rows`
    does.

    Args:
        rows: Rows that must fit.
        limit: Most rows that a sequence can have.
        most: Most rows that any sequence will have, if the caller knows; else None.
    """
    if most is not None:
        return max(rows, min(most, buffer_capacity(rows + 1, limit)))
    capacity = FIRST_CAPACITY
    while capacity < rows:
        capacity *= 2
    return max(rows, min(capacity, limit))
