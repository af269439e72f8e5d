"""Steps of graphs whose state has as many rows as the model's window has keys, and no more.

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
from doge_onnx.runtime.engine.binding import Bindings, InPlaceBinding
from doge_onnx.runtime.engine.runner import DEFAULT_CHUNK, Runner
from doge_onnx.runtime.engine.session import ATTENTION_MASK, INPUT_IDS, POSITION_IDS
from doge_onnx.runtime.engine.state import Buffer, State

_MAX_TOKENS = 2**24


class WindowRunner(Runner):
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
        self._bindings: Bindings[Any] = Bindings(self._bind)

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
        seen = np.zeros(batch, np.int64) if state is None else state.num_tokens
        if mask is None:
            mask = np.ones_like(input_ids)
        counts = seen[:, None] + mask.cumsum(axis=1)
        if counts.max() >= _MAX_TOKENS:
            raise InputError(
                f"a text of more than {_MAX_TOKENS} tokens is too long for this state: it tells "
                "tokens apart by their positions, in float32"
            )
        buffer = self._buffer(state, batch, past + new, consume, capacity)
        binding = self._bindings.of(buffer)
        binding.put(INPUT_IDS, input_ids)
        binding.put(ATTENTION_MASK, mask)
        binding.put(POSITION_IDS, np.maximum(counts - 1, 0))
        return binding.run(last_only), State(buffer, past + new, self, counts[:, -1])

    def _buffer(
        self, state: State | None, batch: int, total: int, consume: bool, capacity: int
    ) -> Buffer:
        """A buffer that holds `state`, is the caller's, and has the rows that `total` tokens need.

        A step overwrites rows, so unless the state may be consumed it gets a copy.
        """
        rows: int = 0 if state is None else state.buffer.tensors[0].shape[2]
        needed = min(total, self._window)
        if state is not None and consume and needed <= rows:
            return state.buffer
        if needed > rows:
            needed = min(self._window, capacity)
        tensors = self._allocate(state, batch, rows, max(rows, needed))
        return Buffer(tensors, np.empty((batch, 0), np.int64))

    def _allocate(self, state: State | None, batch: int, rows: int, capacity: int) -> list[Any]:
        """Tensors of `capacity` rows: those of `state`, and free ones."""
        heads, row_size = self._row_shape
        tensors = [np.zeros((batch, heads, capacity, row_size), self._dtype) for _ in self._names]
        for key in tensors[::2]:
            key[:, :, rows:, self._closing.channels] = self._closing.value
        if state is not None:
            for target, source in zip(tensors, state.buffer.tensors, strict=True):
                target[:, :, :rows] = source
        return tensors
