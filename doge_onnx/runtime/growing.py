"""Steps of graphs whose state has a row for every token.

Knows where the graph finds the past and leaves the present: in one buffer that it extends, or,
for graphs of standard operators, in new tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from doge_onnx.bundle import Manifest
from doge_onnx.runtime.binding import Bindings, last_position
from doge_onnx.runtime.session import (
    ATTENTION_MASK,
    INPUT_IDS,
    LOGITS,
)
from doge_onnx.runtime.state import Buffer, State, grown_capacity
from doge_onnx.runtime.step import DEFAULT_CHUNK, Stepper


class InPlaceStepper(Stepper):
    """For graphs whose past and present are one buffer: only the new rows are written."""

    def __init__(
        self, session: ort.InferenceSession, manifest: Manifest, chunk: int = DEFAULT_CHUNK
    ) -> None:
        super().__init__(session, manifest, chunk)
        self._context_length = manifest.context_length
        self._bindings = Bindings(session, self._names, self._vocab_size)

    def _run(
        self,
        input_ids: NDArray[np.int64],
        mask: NDArray[np.int64] | None,
        state: State | None,
        last_only: bool,
        consume: bool,
    ) -> tuple[NDArray[np.float32], State]:
        batch, new = input_ids.shape
        past = 0 if state is None else state.length
        total = past + new
        buffer = self._claim(state, batch, total)
        try:
            buffer.mask[:, past:total] = 1 if mask is None else mask
            if batch > 1 and new > 1 and past > 0:
                # The kernel takes several new tokens after a past for one sequence only.
                rows = [
                    self._bindings.new([tensor[b : b + 1] for tensor in buffer.tensors]).run(
                        input_ids[b : b + 1], buffer.mask[b : b + 1, :total], last_only
                    )
                    for b in range(batch)
                ]
                logits = np.concatenate(rows)
            else:
                binding = self._bindings.of(buffer)
                logits = binding.run(input_ids, buffer.mask[:, :total], last_only)
        except BaseException:
            buffer.release(past)
            raise
        return logits, State(buffer, total, self)

    def _claim(self, state: State | None, batch: int, total: int) -> Buffer:
        """A buffer that holds the rows of `state` and is the caller's to extend to `total`."""
        past = 0 if state is None else state.length
        if state is not None and state.buffer.claim(past, total):
            return state.buffer
        capacity = grown_capacity(total, self._context_length)
        heads, row_size = self._row_shape
        buffer = Buffer(
            [np.zeros((batch, heads, capacity, row_size), self._dtype) for _ in self._names],
            np.zeros((batch, capacity), np.int64),
            rows=total,
        )
        if state is not None:
            for target, source in zip(buffer.tensors, state.buffer.tensors, strict=True):
                target[:, :, :past] = source[:, :, :past]
            buffer.mask[:, :past] = state.mask
        return buffer


class CopyingStepper(Stepper):
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
    ) -> tuple[NDArray[np.float32], State]:
        batch = input_ids.shape[0]
        mask = np.ones_like(input_ids) if mask is None else mask
        if state is None:
            heads, row_size = self._row_shape
            empty = ort.OrtValue.ortvalue_from_numpy(
                np.zeros((batch, heads, 0, row_size), self._dtype)
            )
            past: Sequence[Any] = [empty] * len(self._past)
        else:
            past = state.buffer.tensors
            mask = np.concatenate([state.mask, mask], axis=1)
        feeds = {INPUT_IDS: input_ids, ATTENTION_MASK: np.ascontiguousarray(mask)}
        values = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in feeds.items()}
        # The state stays in ONNX Runtime's own memory: as NumPy arrays it would be copied twice.
        logits, *present = self._session.run_with_ort_values(
            self._outputs, values | dict(zip(self._past, past, strict=True))
        )
        array = logits.numpy()
        length = mask.shape[1]
        return last_position(array) if last_only else array, State(
            Buffer(present, mask, rows=length), length, self
        )
