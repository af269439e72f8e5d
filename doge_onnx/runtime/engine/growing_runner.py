"""Runs graphs that extend their state in place: a row for every token of every sequence.

Knows where the rows of each sequence are, which sequences go through the graph together, and how
one leaves a batch. Every sequence has its own length, so nothing in the state is padding. Does not
know in whose memory the rows are: on a GPU, `cuda.runner` takes over.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Iterator, Sequence
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from doge_onnx.bundle import Manifest
from doge_onnx.runtime.engine.binding import Binding, Bindings, InPlaceBinding
from doge_onnx.runtime.engine.io_names import ATTENTION_MASK, INPUT_IDS, PAST_LENGTHS
from doge_onnx.runtime.engine.runner import DEFAULT_CHUNK, DecodeSession, Runner, Scores
from doge_onnx.runtime.engine.state import Buffer, State, grown_capacity

# Masks have so many columns or a multiple: whatever is bound again at each step costs time.
_MASK_COLUMNS = 256
# One more run of the graph takes as long as about this many more tokens in a run.
_RUN_COST = 16


class RowTensor(Protocol):
    """A tensor of a state, `[batch, heads, capacity, row_size]`: of NumPy, or of a device."""

    def __getitem__(self, sequences: slice, /) -> Any:
        """The part of some neighbouring sequences, in the same memory."""


Row = TypeVar("Row", bound=RowTensor)


class InPlaceRunner(Runner, Generic[Row]):
    """For graphs whose past and present are one buffer, wherever it is."""

    def __init__(
        self, session: ort.InferenceSession, manifest: Manifest, chunk: int = DEFAULT_CHUNK
    ) -> None:
        super().__init__(session, manifest, chunk)
        self._bindings = Bindings()

    @abstractmethod
    def bind(self, tensors: Sequence[Row]) -> Binding:
        """What runs the graph on the tensors of a state."""

    @abstractmethod
    def _new_tensors(
        self, past: Sequence[Row], batch: int, length: int, capacity: int
    ) -> Sequence[Row]:
        """Tensors of `capacity` rows for `batch` sequences, the first `length` as in the past."""

    def _feed(
        self,
        tokens: Sequence[NDArray[np.int64]],
        state: State | None,
        last_only: bool,
        consume: bool,
        most_tokens: int | None,
    ) -> tuple[list[NDArray[np.float32]], State]:
        """Feed each sequence of a batch its new tokens; see `Runner.feed`."""
        lengths = np.zeros(len(tokens), np.int64) if state is None else state.lengths
        ends = lengths + np.array([len(ids) for ids in tokens])
        buffer = self.claim(state, len(tokens), int(ends.max()), most_tokens)
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
        """A buffer that holds the rows of `state` and is the caller's up to the row `end`.

        Args:
            state: None at the start of the sequences.
            batch: Number of sequences.
            end: Rows that the caller may write, and those of `state`.
            most: See `grown_capacity`.
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
        """Rows of a new buffer; see `grown_capacity`."""
        return grown_capacity(rows, self._context_length, most)

    def rewind(self, state: State, length: int) -> State | None:
        """The first rows of the same buffer; see `Runner.rewind`."""
        state.buffer.share()
        return State(state.buffer, np.full_like(state.lengths, length), self)

    def claim_all(self, state: State) -> Buffer[Row]:
        """A buffer that holds the rows of `state`, has room for another, and is the caller's."""
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
        """Write the rows of new tokens, behind the `lengths` that are there; their logits."""
        logits: list[NDArray[np.float32]] = []
        for rows in self._groups(tokens, lengths):
            group, past = tokens[rows], lengths[rows]
            if len(group) == len(tokens):
                binding = self._bindings.of(buffer, self.bind)
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
        """Neighbours in a batch that go through the graph together.

        The kernel takes several sequences with one new token each, whatever is before it, or
        with several at their start: shorter ones are filled up then. That pays as long as it
        costs less than a run of their own.
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
                if size > self._chunk or size - more > _RUN_COST * added or counts[end] == 0:
                    break
                longest, total, end = wider, more, end + 1
            yield slice(start, end)
            start = end

    def _one(
        self, binding: Binding, ids: NDArray[np.int64], past: int, last_only: bool
    ) -> NDArray[np.float32]:
        """Logits of one sequence, chunk by chunk."""
        parts = [np.empty((0, self.vocab_size), np.float32)]
        for start in range(0, len(ids), self._chunk):
            chunk = ids[np.newaxis, start : start + self._chunk]
            lengths = np.array([past + start])
            parts.append(self._run(binding, chunk, lengths, last_only)[0])
        return parts[-1] if last_only or len(parts) < 3 else np.concatenate(parts)

    def _several(
        self,
        binding: Binding,
        group: Sequence[NDArray[np.int64]],
        past: NDArray[np.int64],
        last_only: bool,
    ) -> list[NDArray[np.float32]]:
        """Logits of several sequences in one run, or two."""
        counts = np.array([len(ids) for ids in group])
        if (counts == counts[0]).all():
            return list(self._run(binding, np.stack(group), past, last_only))
        # What fills a row up stands behind its tokens, where nothing reads it, until the tokens
        # that follow take its place.
        ids = np.zeros((len(group), counts.max()), np.int64)
        for row, new in zip(ids, group, strict=True):
            row[: len(new)] = new
        if not last_only:
            logits = self._run(binding, ids, past, last_only=False)
            return [rows[:count].copy() for rows, count in zip(logits, counts, strict=True)]
        # The last tokens are in different columns, and all logits of all rows would be too many.
        self._run(binding, np.ascontiguousarray(ids[:, :-1]), past, last_only=True)
        last = np.array([new[-1:] for new in group])
        return list(self._run(binding, last, past + counts - 1, last_only=True))

    def _run(
        self,
        binding: Binding,
        ids: NDArray[np.int64],
        lengths: NDArray[np.int64],
        last_only: bool,
    ) -> NDArray[np.float32]:
        """Feed ids `[B, S]` behind `lengths` `[B]` rows."""
        batch, new = ids.shape
        columns = int(lengths.max()) + new
        # At the start, the kernel must see from the mask that nothing is before the new tokens.
        if lengths.any():
            columns = mask_columns(columns, binding.capacity)
        binding.put(INPUT_IDS, ids)
        binding.put(PAST_LENGTHS, lengths)
        binding.put(ATTENTION_MASK, np.ones((batch, columns), np.int64))
        return binding.run(last_only)

    def grow(self, buffer: Buffer[Row], batch: int) -> Buffer[Row]:
        """A larger buffer with the first sequences of a full one, and the caller's."""
        capacity = self._capacity(buffer.capacity + 1, None)
        return self._new_buffer(buffer.tensors, batch, buffer.capacity, capacity, capacity)

    def copy(self, buffer: Buffer[Row], lengths: NDArray[np.int64]) -> Buffer[Row]:
        """A buffer with so many rows of each of the first sequences of another, the caller's."""
        capacity = buffer.capacity
        return self._new_buffer(
            buffer.tensors, len(lengths), int(lengths.max()), capacity, capacity
        )


def mask_columns(length: int, capacity: int) -> int:
    """Columns of a mask for so many tokens: a graph takes more than that, up to its buffer's."""
    return min(-(-length // _MASK_COLUMNS) * _MASK_COLUMNS, capacity)


class GrowingRunner(InPlaceRunner[NDArray[Any]]):
    """For such graphs on the CPU: the state is NumPy arrays."""

    def decode(self, state: State) -> DecodeSession:
        """Go on from `state`, which nobody will use again, one token at a time."""
        return _GrowingSession(self, state)

    def bind(self, tensors: Sequence[NDArray[Any]]) -> InPlaceBinding:
        """What runs the graph on NumPy arrays."""
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
    """Has all rows of a buffer for itself, and a length for each sequence."""

    def __init__(self, runner: InPlace, state: State) -> None:
        self.rows = list(range(state.batch_size))
        self._runner = runner
        self._state = state
        self._lengths = state.lengths.copy()
        self._longest = int(self._lengths.max())
        # None before the first step, which may never come.
        self._buffer: Buffer[Any] | None = None

    def _make_room(self) -> Buffer[Any]:
        """The buffer, with room for one more row of each sequence."""
        if self._buffer is None:
            self._buffer = self._runner.claim_all(self._state)
        elif self._longest == self._buffer.capacity:
            self._buffer = self._runner.grow(self._buffer, len(self._lengths))
        return self._buffer

    def end(self) -> State:
        """The state after all that was fed; see `DecodeSession.end`."""
        if self._buffer is None:
            return self._state
        # So that whoever goes on from here finds the rest of the buffer free.
        self._buffer.release(self._lengths)
        return State(self._buffer, self._lengths, self._runner)


class _GrowingSession(InPlaceSession[GrowingRunner]):
    """Reads and writes the same NumPy arrays at each step.

    What Python does between two steps finds its code and data swept out of the caches, and takes
    five times as long as it does alone: at most steps, nothing is bound.
    """

    def __init__(self, runner: GrowingRunner, state: State) -> None:
        super().__init__(runner, state)
        self._ids = np.zeros((state.batch_size, 1), np.int64)
        self._logits = np.empty((state.batch_size, 1, runner.vocab_size), np.float32)
        self._scores: list[NDArray[np.float32]] = []
        self._binding: InPlaceBinding | None = None
        # Tokens of a sequence that fit into the mask which is bound.
        self._columns = 0

    def step(self, token_ids: Sequence[int], top: int | None = None) -> Sequence[Scores]:
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
        """Let sequences leave; others, from the end, take their places.

        That copies those rows, which costs about as much as one step reads of them.
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
        """Bind what has changed: the buffer, the number of sequences, or the size of the mask."""
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
