"""Runs graphs of standard operators, which return the whole state as new tensors.

Knows how to pass the past to such a graph and how to take the present from it. Does not know how a
batch is padded or cut into chunks (`padded_runner`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from doge_onnx.bundle import Manifest
from doge_onnx.runtime.engine.binding import last_positions
from doge_onnx.runtime.engine.io_names import ATTENTION_MASK, INPUT_IDS, LOGITS
from doge_onnx.runtime.engine.padded_runner import PaddedRunner, PaddedState
from doge_onnx.runtime.engine.runner import DEFAULT_CHUNK
from doge_onnx.runtime.engine.state import Buffer, State


class MaskedState(PaddedState):
    """A state that keeps the mask of its columns, because the graph takes the whole mask.

    Attributes:
        mask: int64 `[batch_size, columns]`, 1 for a token, 0 for padding.
    """

    def __init__(
        self, tensors: Sequence[ort.OrtValue], mask: NDArray[np.int64], owner: object
    ) -> None:
        lengths, columns = mask.sum(axis=1), mask.shape[1]
        super().__init__(Buffer(tensors, columns, lengths), lengths, owner, columns)
        self.mask = mask


class CopyingRunner(PaddedRunner):
    """Runs graphs whose present is a copy of the past with the new rows appended."""

    def __init__(
        self, session: ort.InferenceSession, manifest: Manifest, chunk: int = DEFAULT_CHUNK
    ) -> None:
        super().__init__(session, manifest, chunk)
        self._past, present = zip(*self._names, strict=True)
        self._outputs = [LOGITS, *present]

    def _run(
        self,
        input_ids: NDArray[np.int64],
        mask: NDArray[np.int64],
        state: PaddedState | None,
        last_only: bool,
        consume: bool,
        capacity: int,
    ) -> tuple[NDArray[np.float32], PaddedState]:
        assert state is None or isinstance(state, MaskedState)
        if state is None:
            past: Sequence[ort.OrtValue] = [self._empty(len(input_ids))] * len(self._past)
        else:
            past = state.buffer.tensors
            mask = np.concatenate([state.mask, mask], axis=1)
        logits, present = self._run_graph({INPUT_IDS: input_ids, ATTENTION_MASK: mask}, past)
        return last_positions(logits, int(last_only)), MaskedState(present, mask, self)

    def _empty(self, batch: int) -> ort.OrtValue:
        """A state tensor without rows."""
        heads, row_size = self._row_shape
        return ort.OrtValue.ortvalue_from_numpy(np.zeros((batch, heads, 0, row_size), self._dtype))

    def _run_graph(
        self, feeds: dict[str, NDArray[np.int64]], past: Sequence[ort.OrtValue]
    ) -> tuple[NDArray[np.float32], Sequence[ort.OrtValue]]:
        """Run the graph once; returns float32 logits `[B, S, V]` and the tensors of the present."""
        values = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in feeds.items()}
        # The state stays in ONNX Runtime's own memory: NumPy arrays would be copied twice.
        logits, *present = self._session.run_with_ort_values(
            self._outputs, values | dict(zip(self._past, past, strict=True))
        )
        return logits.numpy(), present

    def rewind(self, state: State, length: int) -> State | None:
        """A copy of the first rows; see `Runner.rewind`."""
        assert isinstance(state, MaskedState)
        tensors = [
            ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(tensor.numpy()[:, :, :length]))
            for tensor in state.buffer.tensors
        ]
        return MaskedState(tensors, state.mask[:, :length], self)
