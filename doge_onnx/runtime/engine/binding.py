"""Binds the inputs and outputs of a graph to arrays in memory.

Knows how to tell ONNX Runtime where the state, the inputs and the logits of a step are, and binds
again only what has changed since the last step. Does not know which state the arrays belong to.
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
from doge_onnx.runtime.engine.state import Buffer, T

_DEVICE = ("cpu", 0)


class Binding(Protocol):
    """The graph, bound to the state of some sequences: `InPlaceBinding` or `CudaBinding`.

    Attributes:
        capacity: Rows of the state's tensors.
    """

    capacity: int

    def put(self, name: str, array: NDArray[np.int64]) -> None:
        """Set an input for the next runs to a copy of `array`."""

    def run(self, keep: int) -> NDArray[np.float32]:
        """Run the graph.

        Args:
            keep: Number of last positions to compute logits for; 0 for all.

        Returns:
            Float32 logits `[B, keep or S, V]`, in an array that belongs to the caller.
        """


class InPlaceBinding:
    """The graph, bound to NumPy arrays, each of which is both a past and a present tensor.

    Binding one tensor takes some microseconds, and a model has a hundred of them. So the state is
    bound once, and every other tensor only when its shape changes. Not safe for concurrent runs.

    Attributes:
        capacity: Rows of the state's arrays.
    """

    def __init__(
        self,
        session: ort.InferenceSession,
        names: Sequence[tuple[str, str]],
        tensors: Sequence[NDArray[Any]],
        vocab_size: int,
    ) -> None:
        """Bind the arrays of a state, which must outlive the binding.

        Args:
            session: Runs the graph.
            names: Name of the input and of the output for each array.
            tensors: The state, each `[B, heads, capacity, row_size]` and C-contiguous.
            vocab_size: V, the size of the last axis of the logits.
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
        """Bind an input to `array`, C-contiguous: each run reads what it holds at that time."""
        self._binding.bind_input(name, *_DEVICE, np.int64, array.shape, array.ctypes.data)
        self._inputs[name] = array

    def put(self, name: str, array: NDArray[np.int64]) -> None:
        """Set an input for the next runs to a copy of `array`."""
        bound = self._inputs.get(name)
        if bound is not None and bound.shape == array.shape:
            bound[...] = array
        else:
            self.bind(name, array.copy())

    def bind_logits(self, logits: NDArray[np.float32]) -> None:
        """Bind the output for logits to an array `[B, S, V]`, S being the positions they are of."""
        self._binding.bind_output(LOGITS, *_DEVICE, np.float32, logits.shape, logits.ctypes.data)
        self._logits = logits

    def run(self, keep: int) -> NDArray[np.float32]:
        """Run the graph for the bound tokens `[B, S]`; see `Binding.run`."""
        batch, positions = self._inputs[INPUT_IDS].shape
        if self._keep is not None:
            self._keep[0] = keep
            positions = keep or positions
        logits = np.empty((batch, positions, self._vocab_size), np.float32)
        self.bind_logits(logits)
        self.run_as_bound()
        return last_positions(logits, keep)

    def run_as_bound(self) -> None:
        """Run the graph; the logits go to the array that `bind_logits` bound last."""
        self._session.run_with_iobinding(self._binding)


class BindingCache:
    """Keeps one binding for each buffer, as long as the buffer lives.

    Binding the state takes longer than all else that Python does in a step.
    """

    def __init__(self) -> None:
        self._of_buffer = weakref.WeakKeyDictionary[Buffer[Any], Binding]()

    def get(self, buffer: Buffer[T], new: Callable[[Sequence[T]], Binding]) -> Binding:
        """The binding of a buffer's tensors; `new` makes it if there is none yet."""
        binding = self._of_buffer.get(buffer)
        if binding is None:
            binding = self._of_buffer[buffer] = new(buffer.tensors)
        return binding


def last_positions(logits: NDArray[np.float32], keep: int) -> NDArray[np.float32]:
    """Logits of the last `keep` positions, or all for 0, copied so that others can be freed."""
    return logits if keep in (0, logits.shape[1]) else logits[:, -keep:].copy()
