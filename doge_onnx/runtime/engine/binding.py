"""A graph bound to the memory that it reads and writes.

Knows how to tell ONNX Runtime where the state, the inputs and the logits of a step are,
and does as little as it can of that at each step. Does not know who owns the memory.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from doge_onnx.runtime.engine.io_names import INPUT_IDS, LOGITS, LOGITS_TO_KEEP
from doge_onnx.runtime.engine.session import has_logits_to_keep
from doge_onnx.runtime.engine.state import Buffer

_DEVICE = ("cpu", 0)


class Binding(Protocol):
    """What runs the graph on some sequences of a buffer: `InPlaceBinding`, or that of a GPU.

    Attributes:
        capacity: Rows of the state's tensors.
    """

    capacity: int

    def put(self, name: str, array: NDArray[np.int64]) -> None:
        """Give an input a value."""

    def run(self, last_only: bool) -> NDArray[np.float32]:
        """Run the graph; logits `[B, 1, V]` or `[B, S, V]`, not used again by anybody else."""


class InPlaceBinding:
    """One set of state tensors, each of which is both past and present of the graph.

    A bind costs some microseconds, and a model has a hundred tensors: the state is bound
    once, and so is everything else as long as its shape stays. Not for two runs at a time.

    Attributes:
        capacity: Rows of the tensors.
    """

    def __init__(
        self,
        session: ort.InferenceSession,
        names: Sequence[tuple[str, str]],
        tensors: Sequence[NDArray[Any]],
        vocab_size: int,
    ) -> None:
        """Bind `tensors`, which must outlive this, to pairs of input and output names.

        Args:
            session: What runs the graph.
            names: Input and output of each tensor.
            tensors: The state, each C-contiguous.
            vocab_size: Size of the last axis of the logits.
        """
        self._session = session
        self._vocab_size = vocab_size
        self.capacity: int = tensors[0].shape[2]
        self._binding = session.io_binding()
        for (past, present), tensor in zip(names, tensors, strict=True):
            where = (*_DEVICE, tensor.dtype.type, tensor.shape, tensor.ctypes.data)
            self._binding.bind_input(past, *where)
            self._binding.bind_output(present, *where)
        self._inputs: dict[str, NDArray[np.int64]] = {}
        self._logits: NDArray[np.float32] | None = None
        self._keep: NDArray[np.int64] | None = None
        if has_logits_to_keep(session):
            self._keep = np.ones(1, np.int64)
            self.bind(LOGITS_TO_KEEP, self._keep)

    def bind(self, name: str, array: NDArray[np.int64]) -> None:
        """Let an input be whatever `array`, C-contiguous, holds at each run."""
        self._binding.bind_input(name, *_DEVICE, np.int64, array.shape, array.ctypes.data)
        self._inputs[name] = array

    def put(self, name: str, array: NDArray[np.int64]) -> None:
        """Give an input a value; `array` itself is only read now."""
        bound = self._inputs.get(name)
        if bound is not None and bound.shape == array.shape:
            bound[...] = array
        else:
            self.bind(name, array.copy())

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
        logits = np.empty((batch, positions, self._vocab_size), np.float32)
        self.bind_logits(logits)
        self.run_as_bound()
        return last_position(logits) if last_only else logits

    def run_as_bound(self) -> None:
        """Run the graph; its logits go where they were bound last, and must fit there."""
        self._session.run_with_iobinding(self._binding)


class Bindings:
    """One binding for each buffer, for as long as the buffer lives.

    Binding the state costs more than all else that Python does in a step.
    """

    def __init__(self) -> None:
        self._of_buffer: weakref.WeakKeyDictionary[Buffer, Binding] = weakref.WeakKeyDictionary()

    def of(self, buffer: Buffer, new: Callable[[Sequence[Any]], Binding]) -> Binding:
        """The binding of a buffer's tensors; `new` makes one."""
        binding = self._of_buffer.get(buffer)
        if binding is None:
            binding = self._of_buffer[buffer] = new(buffer.tensors)
        return binding


def last_position(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Logits `[B, 1, V]` of the last position; a copy, so that the others can be freed."""
    return logits if logits.shape[1] == 1 else logits[:, -1:].copy()
