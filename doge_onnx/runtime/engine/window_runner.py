"""Runs graphs whose state has at most as many rows as the model's window has keys.

Knows how many rows a state needs, what a free row holds, and that the graph overwrites rows in
place. Does not know which rows the graph overwrites.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from doge_onnx.bundle import Manifest
from doge_onnx.errors import InputError
from doge_onnx.runtime.engine.binding import Binding, BindingCache, InPlaceBinding
from doge_onnx.runtime.engine.io_names import ATTENTION_MASK, INPUT_IDS, POSITION_IDS
from doge_onnx.runtime.engine.padded_runner import PaddedRunner, PaddedState
from doge_onnx.runtime.engine.runner import DEFAULT_CHUNK
from doge_onnx.runtime.engine.state import Buffer

_MAX_TOKENS = 2**24


class WindowRunner(PaddedRunner):
    """Runs graphs with a state of bounded size.

    The graph needs one row for each new token: a free row, or one that it may overwrite. So a state
    starts small, grows until it has as many rows as the window has keys, and then keeps its size.
    """

    def __init__(
        self, session: ort.InferenceSession, manifest: Manifest, chunk: int = DEFAULT_CHUNK
    ) -> None:
        window = manifest.state.keep_window_size
        assert window is not None
        super().__init__(session, manifest, min(chunk, window))
        self._window = self._most_rows = window
        self._closing = manifest.state.closing
        self._bindings = BindingCache()

    def bind(self, tensors: Sequence[Any]) -> Binding:
        """Bind the graph to the tensors of a state."""
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
        binding = self._bindings.get(buffer, self.bind)
        binding.put(INPUT_IDS, input_ids)
        binding.put(ATTENTION_MASK, mask)
        binding.put(POSITION_IDS, np.maximum(counts - 1, 0))
        return binding.run(int(last_only)), PaddedState(buffer, counts[:, -1], self, columns)

    def _writable(
        self, state: PaddedState | None, batch: int, columns: int, consume: bool, capacity: int
    ) -> Buffer[Any]:
        """A buffer that the caller may overwrite: the rows of `state`, and enough for `columns`.

        This is the state's own buffer if the state may be consumed and the buffer is large enough,
        and else a copy, because a step overwrites rows.
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
        """New tensors `[batch, heads, capacity, row_size]`: the rows of `state`, then free rows."""
        heads, row_size = self._row_shape
        rows = 0 if state is None else state.buffer.capacity
        tensors = [np.zeros((batch, heads, capacity, row_size), self._dtype) for _ in self._names]
        for key in tensors[::2]:
            key[:, :, rows:, self._closing.channels] = self._closing.value
        if state is not None:
            for target, source in zip(tensors, state.buffer.tensors, strict=True):
                target[:, :, :rows] = source
        return tensors
