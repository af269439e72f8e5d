"""A graph bound to the memory that it reads and writes.

Knows how to tell ONNX Runtime where the state, the tokens and the logits of a step are,
and does as little as it can of that at each step. Does not know who owns the memory.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from doge_onnx.runtime.engine.session import (
    ATTENTION_MASK,
    INPUT_IDS,
    LOGITS,
    LOGITS_TO_KEEP,
    has_logits_to_keep,
)
from doge_onnx.runtime.engine.state import Buffer

_DEVICE = ("cpu", 0)
# To make a mask's value costs 35 µs right after a step, and 3 µs if several are made in a row.
_MASKS_AT_ONCE = 32
_Binding = TypeVar("_Binding")


class InPlaceBinding:
    """One set of state tensors, each of which is both past and present of the graph.

    A bind costs some microseconds, and a model has a hundred tensors: the state is bound
    once, and so is everything else as long as its shape stays. Not for two runs at a time.
    """

    def __init__(
        self,
        session: ort.InferenceSession,
        names: Sequence[tuple[str, str]],
        tensors: Sequence[NDArray[Any]],
        mask: NDArray[np.int64],
        vocab_size: int,
    ) -> None:
        """Bind `tensors`, which must outlive this, to pairs of input and output names.

        Args:
            session: What runs the graph.
            names: Input and output of each tensor.
            tensors: The state.
            mask: `[B, capacity]`, for `bind_mask`; must outlive this, too.
            vocab_size: Size of the last axis of the logits.
        """
        self._session = session
        self._vocab_size = vocab_size
        self._binding = session.io_binding()
        for (past, present), tensor in zip(names, tensors, strict=True):
            where = (*_DEVICE, tensor.dtype.type, tensor.shape, tensor.ctypes.data)
            self._binding.bind_input(past, *where)
            self._binding.bind_output(present, *where)
        self._mask = mask
        # Of one sequence each length is a view; of several, the rows must lie side by side.
        self._mask_rows = mask[0] if len(mask) == 1 else np.empty(mask.size, np.int64)
        self._masks: dict[int, ort.OrtValue] = {}
        self._inputs: dict[str, NDArray[np.int64]] = {}
        self._logits = np.empty((0, 0, 0), np.float32)
        self._keep: NDArray[np.int64] | None = None
        if has_logits_to_keep(session):
            self._keep = np.zeros(1, np.int64)
            self.bind_input(LOGITS_TO_KEEP, self._keep)

    def bind_input(self, name: str, array: NDArray[np.int64]) -> None:
        """Let an input be whatever `array`, C-contiguous, holds at each run."""
        self._binding.bind_input(name, *_DEVICE, np.int64, array.shape, array.ctypes.data)
        self._inputs[name] = array

    def put(self, name: str, array: NDArray[np.int64]) -> None:
        """Give an input a value; `array` itself is only read now."""
        bound = self._inputs.get(name)
        if bound is not None and bound.shape == array.shape:
            bound[...] = array
        else:
            self.bind_input(name, array.copy())

    def bind_mask(self, length: int) -> None:
        """Give the graph the mask of the first `length` tokens."""
        batch = len(self._mask)
        if batch > 1:
            rows = self._mask_rows[: batch * length].reshape(batch, length)
            rows[...] = self._mask[:, :length]
        value = self._masks.get(length)
        if value is None:
            end = min(length + _MASKS_AT_ONCE, self._mask.shape[1] + 1)
            self._masks = {
                size: ort.OrtValue.ortvalue_from_numpy(
                    self._mask_rows[: batch * size].reshape(batch, size)
                )
                for size in range(length, end)
            }
            value = self._masks[length]
        self._binding.bind_ortvalue_input(ATTENTION_MASK, value)

    def bind_logits(self, logits: NDArray[np.float32]) -> None:
        """Let the next runs write their logits `[B, 1, V]` or `[B, S, V]` there."""
        self._binding.bind_output(LOGITS, *_DEVICE, np.float32, logits.shape, logits.ctypes.data)
        self._logits = logits

    def run(self, last_only: bool) -> NDArray[np.float32]:
        """Run the graph for the tokens `[B, S]` that are bound.

        Args:
            last_only: Compute logits for the last position only.

        Returns:
            Logits `[B, 1, V]` or `[B, S, V]`, not used again by anybody else.
        """
        batch, positions = self._inputs[INPUT_IDS].shape
        if self._keep is not None:
            self._keep[0] = 1 if last_only else 0
            positions = 1 if last_only else positions
        shape = (batch, positions, self._vocab_size)
        # Memory of this size comes from the system and goes back to it, which costs more than
        # all else here. It is used again if nobody else has it: its references are then this
        # attribute and the argument of getrefcount.
        if self._logits.shape != shape or sys.getrefcount(self._logits) > 2:
            self.bind_logits(np.empty(shape, np.float32))
        self.run_as_bound()
        logits = self._logits
        return last_position(logits) if last_only else logits

    def run_as_bound(self) -> None:
        """Run the graph; its logits go where they were bound last, and must fit there."""
        self._session.run_with_iobinding(self._binding)


class Bindings(Generic[_Binding]):
    """One binding for each buffer, for as long as the buffer lives.

    Binding the state costs more than all else that Python does in a step.

    Attributes:
        new: Binds tensors and their mask, which need not be those of a buffer.
    """

    def __init__(self, new: Callable[[Sequence[Any], NDArray[np.int64]], _Binding]) -> None:
        self.new = new
        self._of_buffer: weakref.WeakKeyDictionary[Buffer, _Binding] = weakref.WeakKeyDictionary()

    def of(self, buffer: Buffer) -> _Binding:
        """The binding of a buffer's tensors."""
        binding = self._of_buffer.get(buffer)
        if binding is None:
            binding = self._of_buffer[buffer] = self.new(buffer.tensors, buffer.mask)
        return binding


def last_position(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Logits `[B, 1, V]` of the last position; a copy, so that the others can be freed."""
    return logits if logits.shape[1] == 1 else logits[:, -1:].copy()
