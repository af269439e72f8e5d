"""A graph bound to the memory that it reads and writes.

Knows how to tell ONNX Runtime where the state, the tokens and the logits of a step are,
and does as little as it can of that at each step. Does not know who owns the memory.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from doge_onnx.runtime.session import (
    ATTENTION_MASK,
    INPUT_IDS,
    LOGITS,
    LOGITS_TO_KEEP,
    POSITION_IDS,
    has_logits_to_keep,
)
from doge_onnx.runtime.state import Buffer

_DEVICE = ("cpu", 0)


class InPlaceBinding:
    """One set of state tensors, each of which is both past and present of the graph.

    A bind costs some microseconds, and a model has a hundred tensors: the state is bound
    once, and so are the tokens as long as their shape stays. Not for two runs at a time.
    """

    def __init__(
        self,
        session: ort.InferenceSession,
        names: Sequence[tuple[str, str]],
        tensors: Sequence[NDArray[Any]],
        vocab_size: int,
    ) -> None:
        """Bind `tensors`, which must outlive this, to pairs of input and output names."""
        self._session = session
        self._vocab_size = vocab_size
        self._binding = session.io_binding()
        for (past, present), tensor in zip(names, tensors, strict=True):
            where = (*_DEVICE, tensor.dtype.type, tensor.shape, tensor.ctypes.data)
            self._binding.bind_input(past, *where)
            self._binding.bind_output(present, *where)
        self._input_ids = np.empty((0, 0), np.int64)
        self._logits = np.empty((0, 0, 0), np.float32)
        self._keep: NDArray[np.int64] | None = None
        if has_logits_to_keep(session):
            self._keep = np.zeros(1, np.int64)
            self._bind_input(LOGITS_TO_KEEP, self._keep)

    def run(
        self,
        input_ids: NDArray[np.int64],
        mask: NDArray[np.int64],
        last_only: bool,
        position_ids: NDArray[np.int64] | None = None,
    ) -> NDArray[np.float32]:
        """Run the graph for new tokens `[B, S]`.

        Args:
            input_ids: The tokens.
            mask: Of all tokens, `[B, T]`; for a window state of the new ones.
            last_only: Compute logits for the last position only.
            position_ids: `[B, S]`, for graphs that take it.

        Returns:
            Logits `[B, 1, V]` or `[B, S, V]`.
        """
        if input_ids.shape == self._input_ids.shape:
            self._input_ids[...] = input_ids
        else:
            self._input_ids = input_ids.copy()
            self._bind_input(INPUT_IDS, self._input_ids)
        # Of one sequence this is a view; of several, the rows must lie side by side.
        mask = np.ascontiguousarray(mask)
        self._bind_input(ATTENTION_MASK, mask)
        if position_ids is not None:
            self._bind_input(POSITION_IDS, position_ids)
        batch, positions = input_ids.shape
        if self._keep is not None:
            self._keep[0] = 1 if last_only else 0
            positions = 1 if last_only else positions
        shape = (batch, positions, self._vocab_size)
        # Memory of this size comes from the system and goes back to it, which costs more than
        # all else here. It is used again if nobody else has it: its references are then this
        # attribute and the argument of getrefcount.
        if self._logits.shape != shape or sys.getrefcount(self._logits) > 2:
            self._logits = np.empty(shape, np.float32)
            where = (*_DEVICE, np.float32, shape, self._logits.ctypes.data)
            self._binding.bind_output(LOGITS, *where)
        self._session.run_with_iobinding(self._binding)
        logits = self._logits
        return last_position(logits) if last_only else logits

    def _bind_input(self, name: str, array: NDArray[np.int64]) -> None:
        self._binding.bind_input(name, *_DEVICE, np.int64, array.shape, array.ctypes.data)


class Bindings:
    """One binding for each buffer, for as long as the buffer lives.

    Binding the state costs more than all else that Python does in a step.
    """

    def __init__(
        self, session: ort.InferenceSession, names: Sequence[tuple[str, str]], vocab_size: int
    ) -> None:
        self._session = session
        self._names = names
        self._vocab_size = vocab_size
        self._of_buffer: weakref.WeakKeyDictionary[Buffer, InPlaceBinding] = (
            weakref.WeakKeyDictionary()
        )

    def of(self, buffer: Buffer) -> InPlaceBinding:
        """The binding of a buffer's tensors."""
        binding = self._of_buffer.get(buffer)
        if binding is None:
            binding = self._of_buffer[buffer] = self.new(buffer.tensors)
        return binding

    def new(self, tensors: Sequence[NDArray[Any]]) -> InPlaceBinding:
        """A binding of tensors that are no buffer of their own."""
        return InPlaceBinding(self._session, self._names, tensors, self._vocab_size)


def last_position(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Logits `[B, 1, V]` of the last position; a copy, so that the others can be freed."""
    return logits if logits.shape[1] == 1 else logits[:, -1:].copy()
