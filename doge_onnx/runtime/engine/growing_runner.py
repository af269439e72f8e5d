"""Runs graphs that extend their state in place, with one row for each token of each sequence.

Each sequence has its own length, so the state holds no padding. Knows where the rows of each
sequence are, which sequences share a run of the graph, and how a sequence leaves a batch. Knows
rows in host memory only; `cuda.runner` has the runner for a GPU.
"""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections.abc import Collection, Iterator, Sequence
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from doge_onnx.bundle import Manifest
from doge_onnx.runtime.engine.binding import Binding, BindingCache, InPlaceBinding
from doge_onnx.runtime.engine.io_names import ATTENTION_MASK, INPUT_IDS, PAST_LENGTHS
from doge_onnx.runtime.engine.runner import DEFAULT_CHUNK, DecodeSession, PositionLogits, Runner
from doge_onnx.runtime.engine.state import Buffer, State, buffer_capacity

# The number of columns of a mask is a multiple of this, so that few steps need a new mask: binding
# one takes time.
_MASK_COLUMNS = 256
# A run of the graph costs about as much as this many tokens more in another run.
_RUN_COST = 16
# Most that the lengths of sequences may differ which share a run.
_SPREAD = 16


class RowTensor(Protocol):
    """A tensor of a state, `[batch, heads, capacity, row_size]`, of NumPy or of a device."""

    def __getitem__(self, sequences: slice, /) -> Any:
        """The part of some neighbouring sequences, in the same memory."""


Row = TypeVar("Row", bound=RowTensor)


class InPlaceRunner(Runner, Generic[Row]):
    """Runs graphs whose past and present are one buffer, in host memory or on a device."""

    def __init__(
        self, session: ort.InferenceSession, manifest: Manifest, chunk: int = DEFAULT_CHUNK
    ) -> None:
        super().__init__(session, manifest, chunk)
        self._bindings = BindingCache()

    @abstractmethod
    def bind(self, tensors: Sequence[Row]) -> Binding:
        """Bind the graph to the tensors of a state."""

    @abstractmethod
    def _new_tensors(
        self, past: Sequence[Row], batch: int, length: int, capacity: int
    ) -> Sequence[Row]:
        """New tensors `[batch, heads, capacity, row_size]`; the first `length` rows are copied.

        Args:
            past: The tensors to copy from, or empty for none. They may have more sequences.
            batch: Number of sequences.
            length: Number of rows to copy.
            capacity: Number of rows.
        """

    def _forward(
        self,
        tokens: Sequence[NDArray[np.int64]],
        state: State | None,
        last_only: bool,
        consume: bool,
        max_tokens: int | None,
    ) -> tuple[list[NDArray[np.float32]], State]:
        """Feed each sequence of a batch its new tokens; see `Runner.forward`."""
        lengths = np.zeros(len(tokens), np.int64) if state is None else state.lengths
        ends = lengths + np.array([len(ids) for ids in tokens])
        buffer = self.claim(state, len(tokens), int(ends.max()), max_tokens)
        if state is not None and buffer is state.buffer and not consume:
            buffer.share()
        try:
            logits = self._fill(buffer, tokens, lengths, last_only)
        except BaseException:
            buffer.release(lengths)
            raise
        buffer.release(ends)
        return logits, State(buffer, ends, self)

    def claim(
        self, state: State | None, batch: int, end: int, most: int | None = None
    ) -> Buffer[Row]:
        """A buffer with the rows of `state`, in which the caller may write the rows up to `end`.

        This is the state's own buffer, or a copy if that is full or continued already.

        Args:
            state: None at the start of the sequences.
            batch: Number of sequences.
            end: End of the rows that the caller may write, which begin after those of `state`.
            most: See `buffer_capacity`.
        """
        if state is not None and state.buffer.claim(state.lengths, end):
            return state.buffer
        capacity = self._capacity(end, most)
        past = [] if state is None else state.buffer.tensors
        length = 0 if state is None else int(state.lengths.max())
        return self._new_buffer(past, batch, length, capacity, end)

    def _new_buffer(
        self, past: Sequence[Row], batch: int, length: int, capacity: int, end: int
    ) -> Buffer[Row]:
        tensors = self._new_tensors(past, batch, length, capacity)
        return Buffer(tensors, capacity, np.full(batch, end, np.int64))

    def _capacity(self, rows: int, most: int | None) -> int:
        """Rows of a new buffer; see `buffer_capacity`."""
        return buffer_capacity(rows, self._context_length, most)

    def rewind(self, state: State, length: int) -> State | None:
        """A state of the first `length` rows of the same buffer; see `Runner.rewind`."""
        state.buffer.share()
        return State(state.buffer, np.full_like(state.lengths, length), self)

    def claim_for_decode(self, state: State) -> Buffer[Row]:
        """A buffer with the rows of `state` and free rows, all of which the caller may write."""
        longest = int(state.lengths.max())
        capacity = state.buffer.capacity
        if capacity == longest:
            capacity = self._capacity(capacity + 1, None)
        return self.claim(state, state.batch_size, capacity)

    def _fill(
        self,
        buffer: Buffer[Row],
        tokens: Sequence[NDArray[np.int64]],
        lengths: NDArray[np.int64],
        last_only: bool,
    ) -> list[NDArray[np.float32]]:
        """Feed new tokens, whose rows go after the first `lengths` rows of each sequence.

        Returns:
            Float32 logits of each sequence; see `Runner.forward`.
        """
        logits: list[NDArray[np.float32]] = []
        for rows in self._groups(tokens, lengths):
            group, past = tokens[rows], lengths[rows]
            if len(group) == len(tokens):
                binding = self._bindings.get(buffer, self.bind)
            else:
                binding = self.bind([tensor[rows] for tensor in buffer.tensors])
            if len(group) == 1:
                logits.append(self._one(binding, group[0], int(past[0]), last_only))
            else:
                logits += self._several(binding, group, past, last_only)
        return logits

    def _groups(
        self, tokens: Sequence[NDArray[np.int64]], lengths: NDArray[np.int64]
    ) -> Iterator[slice]:
        """Divide a batch into groups of neighbours that share a run of the graph.

        The attention kernel can run several sequences with one new token each, after pasts of any
        lengths, or several sequences with more new tokens at their start, in which shorter ones are
        padded on the right. A sequence joins a group if its padding costs less than another run,
        and if their lengths are so near that few logits are computed in vain. One of a single token
        does not join longer ones: attention sums up in another order then, and each sequence gets
        what it gets alone, to the last bit.
        """
        counts = [len(ids) for ids in tokens]
        if max(counts) == min(counts) == 1:
            yield slice(0, len(counts))
            return
        start = 0
        while start < len(counts):
            end = start + 1
            longest = total = counts[start]
            while end < len(counts) and not lengths[start : end + 1].any() and longest > 0:
                wider, more = max(longest, counts[end]), total + counts[end]
                size, added = wider * (end + 1 - start), end - start
                if size > self._chunk or size - more > _RUN_COST * added:
                    break
                shortest = min(counts[start : end + 1])
                if shortest < min(wider, 2) or wider - shortest > _SPREAD:
                    break
                longest, total, end = wider, more, end + 1
            yield slice(start, end)
            start = end

    def _one(
        self, binding: Binding, ids: NDArray[np.int64], past: int, last_only: bool
    ) -> NDArray[np.float32]:
        """Feed one sequence, chunk by chunk; returns logits `[1, V]` or `[S, V]`."""
        parts = [np.empty((0, self.vocab_size), np.float32)]
        starts = list(range(0, len(ids), self._chunk))
        if self._chunk > 1 and len(starts) > 1 and len(ids) - starts[-1] == 1:
            # For a single token, attention sums up in another order than for several.
            starts[-1] -= 1
        for start, end in itertools.pairwise([*starts, len(ids)]):
            lengths = np.array([past + start])
            parts.append(self._run(binding, ids[np.newaxis, start:end], lengths, int(last_only))[0])
        return parts[-1] if last_only or len(parts) < 3 else np.concatenate(parts)

    def _several(
        self,
        binding: Binding,
        group: Sequence[NDArray[np.int64]],
        past: NDArray[np.int64],
        last_only: bool,
    ) -> list[NDArray[np.float32]]:
        """Feed several sequences in one run; returns the logits of each sequence."""
        counts = np.array([len(ids) for ids in group])
        longest = counts.max()
        # Shorter sequences are padded on the right. No token reads the rows of padding, and the
        # rows of later tokens overwrite them.
        ids = np.zeros((len(group), longest), np.int64)
        for row, new in zip(ids, group, strict=True):
            row[: len(new)] = new
        if not last_only:
            logits = self._run(binding, ids, past, keep=0)
            return [rows[:count].copy() for rows, count in zip(logits, counts, strict=True)]
        # The columns in which the sequences end.
        keep = int(longest - counts.min()) + 1
        logits = self._run(binding, ids, past, keep)
        if keep == 1:
            return list(logits)
        ends = counts - longest + keep
        return [rows[end - 1 : end].copy() for rows, end in zip(logits, ends, strict=True)]

    def _run(
        self,
        binding: Binding,
        ids: NDArray[np.int64],
        lengths: NDArray[np.int64],
        keep: int,
    ) -> NDArray[np.float32]:
        """Run the graph once: feed `ids` `[B, S]` after the first `lengths` `[B]` rows.

        Returns:
            Logits of the last `keep` positions, or of all for 0; see `Binding.run`.
        """
        batch, new = ids.shape
        columns = int(lengths.max()) + new
        # At the start, a mask with as many columns as new tokens tells the kernel that there is no
        # past.
        if lengths.any():
            columns = mask_columns(columns, binding.capacity)
        binding.put(INPUT_IDS, ids)
        binding.put(PAST_LENGTHS, lengths)
        binding.put(ATTENTION_MASK, np.ones((batch, columns), np.int64))
        return binding.run(keep)

    def grow(self, buffer: Buffer[Row], batch: int) -> Buffer[Row]:
        """A larger buffer with the first `batch` sequences of a full one, all for the caller."""
        capacity = self._capacity(buffer.capacity + 1, None)
        return self._new_buffer(buffer.tensors, batch, buffer.capacity, capacity, capacity)

    def copy(self, buffer: Buffer[Row], lengths: NDArray[np.int64]) -> Buffer[Row]:
        """A copy of a buffer for the caller, with the first sequences, of `lengths` rows each."""
        capacity = buffer.capacity
        return self._new_buffer(
            buffer.tensors, len(lengths), int(lengths.max()), capacity, capacity
        )


def mask_columns(length: int, capacity: int) -> int:
    """Columns of a mask for `length` tokens, rounded up, but no more than the buffer has rows."""
    return min(-(-length // _MASK_COLUMNS) * _MASK_COLUMNS, capacity)


class GrowingRunner(InPlaceRunner[NDArray[Any]]):
    """Runs such graphs on the CPU, with a state of NumPy arrays."""

    def decode(self, state: State) -> DecodeSession:
        """Start a decode session; see `Runner.decode`."""
        return _GrowingSession(self, state)

    def bind(self, tensors: Sequence[NDArray[Any]]) -> InPlaceBinding:
        """Bind the graph to NumPy arrays."""
        return InPlaceBinding(self._session, self._names, tensors, self.vocab_size)

    def _new_tensors(
        self, past: Sequence[NDArray[Any]], batch: int, length: int, capacity: int
    ) -> Sequence[NDArray[Any]]:
        heads, row_size = self._row_shape
        tensors = [np.zeros((batch, heads, capacity, row_size), self._dtype) for _ in self._names]
        for target, source in zip(tensors, past, strict=False):
            target[:, :, :length] = source[:batch, :, :length]
        return tensors


InPlace = TypeVar("InPlace", bound=InPlaceRunner[Any])


class InPlaceSession(DecodeSession, Generic[InPlace]):
    """A decode session that owns a whole buffer, with a length for each sequence."""

    def __init__(self, runner: InPlace, state: State) -> None:
        self.rows = list(range(state.batch_size))
        self._runner = runner
        self._state = state
        self._lengths = state.lengths.copy()
        self._longest = int(self._lengths.max())
        # None before the first step: a session without steps needs no buffer.
        self._buffer: Buffer[Any] | None = None

    def _make_room(self) -> Buffer[Any]:
        """The session's buffer; made or replaced if it has no room for one more row."""
        if self._buffer is None:
            self._buffer = self._runner.claim_for_decode(self._state)
        elif self._longest == self._buffer.capacity:
            self._buffer = self._runner.grow(self._buffer, len(self._lengths))
        return self._buffer

    def end(self) -> State:
        """End the session; see `DecodeSession.end`."""
        if self._buffer is None:
            return self._state
        # Frees the rest of the buffer, so that a later step can continue in place.
        self._buffer.release(self._lengths)
        return State(self._buffer, self._lengths, self._runner)


class _GrowingSession(InPlaceSession[GrowingRunner]):
    """A decode session that reads and writes the same NumPy arrays in each step.

    A step evicts Python's code and data from the caches, so that Python's work between two steps
    takes five times as long as alone. So most steps bind nothing.
    """

    def __init__(self, runner: GrowingRunner, state: State) -> None:
        super().__init__(runner, state)
        self._ids = np.zeros((state.batch_size, 1), np.int64)
        self._logits = np.empty((state.batch_size, 1, runner.vocab_size), np.float32)
        self._scores: list[NDArray[np.float32]] = []
        self._binding: InPlaceBinding | None = None
        # Columns of the bound mask.
        self._columns = 0

    def step(self, token_ids: Sequence[int], top: int | None = None) -> Sequence[PositionLogits]:
        """Feed the next token of each sequence; see `DecodeSession.step`."""
        binding = self._binding
        if binding is None or self._longest == self._columns:
            binding = self._bind()
        self._ids[: len(self.rows), 0] = token_ids
        binding.run_as_bound()
        self._lengths += 1
        self._longest += 1
        return self._scores

    def remove(self, rows: Collection[int]) -> None:
        """Remove sequences; sequences from the end of the batch take their places.

        Their rows are copied, which takes about as long as one step takes to read them.
        """
        buffer = self._make_room()
        if buffer.shared:
            buffer = self._buffer = self._runner.copy(buffer, self._lengths)
        for row in rows:
            place, last = self.rows.index(row), len(self.rows) - 1
            length = self._lengths[last]
            if place != last:
                self.rows[place], self._lengths[place] = self.rows[last], length
                for tensor in buffer.tensors:
                    tensor[place, :, :length] = tensor[last, :, :length]
            self.rows.pop()
            self._lengths = self._lengths[:last]
        self._longest = int(self._lengths.max())
        self._binding = None

    def _bind(self) -> InPlaceBinding:
        """Bind what has changed: the buffer, the number of sequences or the size of the mask."""
        before, buffer, count = self._buffer, self._make_room(), len(self.rows)
        binding = self._binding
        if binding is None or buffer is not before:
            binding = self._runner.bind([tensor[:count] for tensor in buffer.tensors])
            binding.bind(INPUT_IDS, self._ids[:count])
            binding.bind(PAST_LENGTHS, self._lengths)
            binding.bind_logits(self._logits[:count])
            self._scores = list(self._logits[:count, 0])
            self._binding = binding
        self._columns = mask_columns(self._longest + 1, buffer.capacity)
        binding.bind(ATTENTION_MASK, np.ones((count, self._columns), np.int64))
        return binding
