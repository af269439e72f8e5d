"""Runs graphs whose state has as many rows as the model's window has keys, and no more.

Knows how many rows a state needs, what a free row looks like, and that the graph overwrites
rows in place. Which rows it overwrites is the graph's own business.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from doge_onnx.bundle import Manifest
from doge_onnx.errors import InputError
from doge_onnx.runtime.engine.binding import Binding, Bindings, InPlaceBinding
from doge_onnx.runtime.engine.io_names import ATTENTION_MASK, INPUT_IDS, POSITION_IDS
from doge_onnx.runtime.engine.padded_runner import PaddedRunner, PaddedState
from doge_onnx.runtime.engine.runner import DEFAULT_CHUNK
from doge_onnx.runtime.engine.state import Buffer

_MAX_TOKENS = 2**24


class WindowRunner(PaddedRunner):
    """For graphs with a state of constant size.

    The graph wants a row for each new token that is free or may be overwritten. So a state
    starts small and grows like any other until it has all its rows; from then on it stays.
    """

    def __init__(
        self, session: ort.InferenceSession, manifest: Manifest, chunk: int = DEFAULT_CHUNK
    ) -> None:
        window = manifest.state.keep_window_size
        assert window is not None
        super().__init__(session, manifest, min(chunk, window))
        self._window = self._most_rows = window
        self._closing = manifest.state.closing
        self._bindings = Bindings()

    def bind(self, tensors: Sequence[Any]) -> Binding:
        """What runs the graph on the tensors of a state."""
        return InPlaceBinding(self._session, self._names, tensors, self.vocab_size)

    def _run(
        self,
        input_ids: NDArray[np.int64],
        mask: NDArray[np.int64],
        state: PaddedState | None,
        last_only: bool,
        consume: bool,
        capacity: int,
    ) -> tuple[NDArray[np.float32], PaddedState]:
        batch, new = input_ids.shape
        before = np.zeros(batch, np.int64) if state is None else state.lengths
        counts = before[:, np.newaxis] + mask.cumsum(axis=1)
        if counts.max() >= _MAX_TOKENS:
            raise InputError(
                f"a text of more than {_MAX_TOKENS} tokens is too long for this state: it tells "
                "tokens apart by their positions, in float32"
            )
        columns = new if state is None else state.columns + new
        buffer = self._writable(state, batch, columns, consume, capacity)
        binding = self._bindings.of(buffer, self.bind)
        binding.put(INPUT_IDS, input_ids)
        binding.put(ATTENTION_MASK, mask)
        binding.put(POSITION_IDS, np.maximum(counts - 1, 0))
        return binding.run(last_only), PaddedState(buffer, counts[:, -1], self, columns)

    def _writable(
        self, state: PaddedState | None, batch: int, columns: int, consume: bool, capacity: int
    ) -> Buffer:
        """A buffer that holds `state`, is the caller's, and has the rows that all columns need.

        A step overwrites rows, so unless the state may be consumed it gets a copy.
        """
        rows = 0 if state is None else state.buffer.capacity
        needed = min(columns, self._window)
        if state is not None and consume and needed <= rows:
            return state.buffer
        if needed > rows:
            rows = min(self._window, capacity)
        tensors = self._new_tensors(state, batch, rows)
        return Buffer(tensors, rows, np.zeros(batch, np.int64))

    def _new_tensors(self, state: PaddedState | None, batch: int, capacity: int) -> list[Any]:
        """Tensors of `capacity` rows: those of `state`, and free ones."""
        heads, row_size = self._row_shape
        rows = 0 if state is None else state.buffer.capacity
        tensors = [np.zeros((batch, heads, capacity, row_size), self._dtype) for _ in self._names]
        for key in tensors[::2]:
            key[:, :, rows:, self._closing.channels] = self._closing.value
        if state is not None:
            for target, source in zip(tensors, state.buffer.tensors, strict=True):
                target[:, :, :rows] = source
        return tensors
