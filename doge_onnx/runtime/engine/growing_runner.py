"""Steps of graphs whose state has a row for every token.

Knows where the graph finds the past and leaves the present: in one buffer that it extends, or,
for graphs of standard operators, in new tensors.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from doge_onnx.bundle import Manifest
from doge_onnx.runtime.engine.binding import Bindings, InPlaceBinding, last_position
from doge_onnx.runtime.engine.runner import DEFAULT_CHUNK, DecodeSession, Runner
from doge_onnx.runtime.engine.session import ATTENTION_MASK, INPUT_IDS, LOGITS
from doge_onnx.runtime.engine.state import Buffer, State, grown_capacity


class GrowingRunner(Runner):
    """For graphs whose past and present are one buffer: only the new rows are written."""

    def __init__(
        self, session: ort.InferenceSession, manifest: Manifest, chunk: int = DEFAULT_CHUNK
    ) -> None:
        super().__init__(session, manifest, chunk)
        self._bindings: Bindings[Any] = Bindings(self._bind)

    def decoder(self, state: State) -> DecodeSession:
        """Go on from `state`, which nobody will use again, one token at a time."""
        return _GrowingSession(self, state)

    def claim(self, state: State | None, batch: int, end: int, capacity: int) -> Buffer:
        """A buffer that holds the rows of `state` and is the caller's to extend to `end`.

        Args:
            state: None at the start of the sequences.
            batch: Number of sequences.
            end: Rows that the caller will write, and those of `state`.
            capacity: Rows of the buffer, if a new one must be made.
        """
        past = 0 if state is None else state.length
        if state is not None and state.buffer.claim(past, end):
            return state.buffer
        mask = np.zeros((batch, capacity), np.int64)
        if state is not None:
            mask[:, :past] = state.mask
        return self._new_buffer(state, mask, end)

    def _new_buffer(self, state: State | None, mask: NDArray[np.int64], rows: int) -> Buffer:
        """A buffer for all columns of a mask that begins with the rows of `state`."""
        heads, row_size = self._row_shape
        batch, capacity = mask.shape
        tensors = [np.zeros((batch, heads, capacity, row_size), self._dtype) for _ in self._names]
        if state is not None:
            past = state.length
            for target, source in zip(tensors, state.buffer.tensors, strict=True):
                target[:, :, :past] = source[:, :, :past]
        return Buffer(tensors, mask, rows)

    def claim_all(self, state: State) -> Buffer:
        """A buffer that holds the rows of `state`, with room for others, and is the caller's."""
        capacity = state.buffer.capacity
        if capacity == state.length:
            capacity = grown_capacity(capacity + 1, self._most_rows)
        return self.claim(state, state.batch_size, capacity, capacity)

    def rewind(self, state: State, length: int) -> State | None:
        """The first rows of the same buffer; see `Runner.rewind`."""
        return State(state.buffer, length, self)

    def bind(self, buffer: Buffer) -> Any:
        """What runs the graph on a buffer."""
        return self._bindings.of(buffer)

    def _bind(self, tensors: Sequence[Any], mask: NDArray[np.int64]) -> Any:
        return InPlaceBinding(self._session, self._names, tensors, mask, self.vocab_size)

    def _run(
        self,
        input_ids: NDArray[np.int64],
        mask: NDArray[np.int64] | None,
        state: State | None,
        last_only: bool,
        consume: bool,
        capacity: int,
    ) -> tuple[NDArray[np.float32], State]:
        batch, new = input_ids.shape
        past = 0 if state is None else state.length
        total = past + new
        buffer = self.claim(state, batch, total, capacity)
        try:
            buffer.mask[:, past:total] = 1 if mask is None else mask
            if batch > 1 and new > 1 and past > 0:
                # The kernel takes several new tokens after a past for one sequence only.
                rows = [
                    _run_to(
                        self._bindings.new(
                            [tensor[b : b + 1] for tensor in buffer.tensors], buffer.mask[b : b + 1]
                        ),
                        total,
                        input_ids[b : b + 1],
                        last_only,
                    )
                    for b in range(batch)
                ]
                logits = np.concatenate(rows)
            else:
                logits = _run_to(self.bind(buffer), total, input_ids, last_only)
        except BaseException:
            buffer.release(past)
            raise
        return logits, State(buffer, total, self)


def _run_to(
    binding: Any, total: int, input_ids: NDArray[np.int64], last_only: bool
) -> NDArray[np.float32]:
    """Feed the tokens after which there are `total` of them."""
    binding.put(INPUT_IDS, input_ids)
    binding.bind_mask(total)
    logits: NDArray[np.float32] = binding.run(last_only)
    return logits


class BufferSession(DecodeSession):
    """Has all rows of a buffer for itself: nothing is new at a step but the length of the mask.

    What Python does between two steps finds its code and data swept out of the caches, and takes
    five times as long as it does alone.
    """

    def __init__(self, runner: GrowingRunner, state: State) -> None:
        super().__init__(runner, state)
        self._in_place = runner
        self._length = self._capacity = state.length
        self._binding: Any
        self._mask: NDArray[np.int64]

    def _advance(self, mask: NDArray[np.int64] | None) -> None:
        """Make room for a row, and bind the mask that ends with it."""
        if self._length == self._capacity:
            self._take_buffer()
        self._length += 1
        if mask is not None:
            self._mask[:, self._length - 1 : self._length] = mask
        self._binding.bind_mask(self._length)

    def end(self) -> State:
        """The state after all that was fed; see `DecodeSession.end`."""
        if self._length == self._state.length:
            return self._state
        buffer = self._state.buffer
        # So that whoever goes on from here finds the rest of the buffer free.
        buffer.release(self._length)
        return State(buffer, self._length, self._in_place)

    def _take_buffer(self) -> None:
        buffer = self._in_place.claim_all(self._state)
        self._mask = buffer.mask
        self._mask[:, self._length :] = 1
        self._bind(buffer)
        self._capacity = buffer.capacity
        # The state when this buffer is full, which is when it is needed again.
        self._state = State(buffer, self._capacity, self._in_place)

    @abstractmethod
    def _bind(self, buffer: Buffer) -> None:
        """Make `_binding` that of a buffer."""


class _GrowingSession(BufferSession):
    """Reads and writes the same NumPy arrays at each step."""

    def __init__(self, runner: GrowingRunner, state: State) -> None:
        super().__init__(runner, state)
        self._logits = np.empty((state.batch_size, 1, runner.vocab_size), np.float32)
        self._rows = list(self._logits[:, 0])

    def step(
        self, mask: NDArray[np.int64] | None, best: int | None = None
    ) -> Sequence[NDArray[np.float32]]:
        """Feed `tokens`; see `DecodeSession.step`."""
        self._advance(mask)
        self._binding.run_as_bound()
        return self._rows

    def _bind(self, buffer: Buffer) -> None:
        self._binding = self._in_place.bind(buffer)
        self._binding.bind_input(INPUT_IDS, self.tokens)
        self._binding.bind_logits(self._logits)


class CopyingRunner(Runner):
    """For graphs of standard operators: they return the whole state as new tensors."""

    def __init__(
        self, session: ort.InferenceSession, manifest: Manifest, chunk: int = DEFAULT_CHUNK
    ) -> None:
        super().__init__(session, manifest, chunk)
        self._past, present = zip(*self._names, strict=True)
        self._outputs = [LOGITS, *present]

    def _run(
        self,
        input_ids: NDArray[np.int64],
        mask: NDArray[np.int64] | None,
        state: State | None,
        last_only: bool,
        consume: bool,
        capacity: int,
    ) -> tuple[NDArray[np.float32], State]:
        batch = input_ids.shape[0]
        mask = np.ones_like(input_ids) if mask is None else mask
        if state is None:
            past: Sequence[ort.OrtValue] = [self._empty(batch)] * len(self._past)
        else:
            past = state.buffer.tensors
            mask = np.concatenate([state.mask, mask], axis=1)
        feeds = {INPUT_IDS: input_ids, ATTENTION_MASK: np.ascontiguousarray(mask)}
        array, present = self._feed(feeds, past)
        length = mask.shape[1]
        return last_position(array) if last_only else array, State(
            Buffer(present, mask, rows=length), length, self
        )

    def _empty(self, batch: int) -> ort.OrtValue:
        """A state tensor without rows."""
        heads, row_size = self._row_shape
        return ort.OrtValue.ortvalue_from_numpy(np.zeros((batch, heads, 0, row_size), self._dtype))

    def _feed(
        self, feeds: dict[str, NDArray[np.int64]], past: Sequence[ort.OrtValue]
    ) -> tuple[NDArray[np.float32], Sequence[ort.OrtValue]]:
        """Run the graph; returns logits and the new state."""
        values = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in feeds.items()}
        # The state stays in ONNX Runtime's own memory: as NumPy arrays it would be copied twice.
        logits, *present = self._session.run_with_ort_values(
            self._outputs, values | dict(zip(self._past, past, strict=True))
        )
        return logits.numpy(), present

    def rewind(self, state: State, length: int) -> State | None:
        """A copy of the first rows; see `Runner.rewind`."""
        tensors = [
            ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(tensor.numpy()[:, :, :length]))
            for tensor in state.buffer.tensors
        ]
        return State(Buffer(tensors, state.mask[:, :length], rows=length), length, self)
