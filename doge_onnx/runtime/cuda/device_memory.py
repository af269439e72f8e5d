"""Memory of a device: tensors that ONNX Runtime keeps there, and work on them.

Knows how to make, fill, extend and read them. Does not know what they hold. For the CPU it does
the same in ordinary memory, which is how it is tested where there is nothing else.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from doge_onnx.runtime.cuda import helper_graphs
from doge_onnx.runtime.cuda.helper_graphs import ELEMENT_TYPES
from doge_onnx.runtime.engine import device as devices

_ERROR = 3


@dataclass(frozen=True)
class Tensor:
    """A tensor on a device, or a part of one that is in one piece.

    Attributes:
        value: What owns the memory.
        dtype: Name of the element type, see `ELEMENT_TYPES`.
        shape: Of the part.
        address: Of its first element.
    """

    value: ort.OrtValue
    dtype: str
    shape: tuple[int, ...]
    address: int

    def __getitem__(self, rows: slice) -> Tensor:
        """Some of the first axis."""
        first, end, _ = rows.indices(self.shape[0])
        size = (self.value.tensor_size_in_bytes() // max(self.value.shape()[0], 1)) * first
        return Tensor(self.value, self.dtype, (end - first, *self.shape[1:]), self.address + size)

    def reshaped(self, *shape: int) -> Tensor:
        """The first elements, in another shape."""
        return Tensor(self.value, self.dtype, shape, self.address)


class DeviceMemory:
    """The memory of one device.

    Args:
        device: "cpu" or "cuda".
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self._sessions: dict[bytes, ort.InferenceSession] = {}
        self._lock = threading.Lock()

    def empty(self, shape: tuple[int, ...], dtype: str) -> Tensor:
        """A tensor that holds anything."""
        value = ort.OrtValue.ortvalue_from_shape_and_type(
            shape, ELEMENT_TYPES[dtype], self.device, 0
        )
        return Tensor(value, dtype, shape, value.data_ptr())

    def ones(self, size: int) -> Tensor:
        """An int64 vector of ones."""
        tensor = self.empty((size,), "int64")
        tensor.value.update_inplace(np.ones(size, np.int64))
        return tensor

    def read(self, tensor: Tensor) -> NDArray[Any]:
        """The whole tensor that `tensor` is or is a part of, in host memory of its own."""
        array: NDArray[Any] = tensor.value.numpy()
        return array.copy() if self.device == devices.CPU else array

    def extended(self, past: Tensor, row: NDArray[Any], rows: int) -> Tensor:
        """A copy of a state tensor with equal rows behind its own.

        Args:
            past: `[B, H, P, row]`.
            row: `[row]`, as float32; must be exact in the type of the state.
            rows: How many are added.
        """
        batch, heads, length, width = past.shape
        result = self.empty((batch, heads, length + rows, width), past.dtype)
        self.extension(past, row, result)()
        return result

    def extension(self, past: Tensor, row: NDArray[Any], present: Tensor) -> Callable[[], None]:
        """What writes `past`, and equal rows behind its own, into all of `present`.

        All is bound already, so that a call is little more than the copy.
        """
        batch, heads, length, width = present.shape
        added = np.array([batch, heads, length - past.shape[2], width], np.int64)
        session = self._session(helper_graphs.extension(past.dtype))
        binding = session.io_binding()
        self.bind_input(binding, "past", past)
        # From bits, since NumPy lacks one of the types.
        binding.bind_ortvalue_input("row", _row(row, past.dtype))
        binding.bind_cpu_input("shape", added)
        self.bind_output(binding, "present", present)
        return lambda: session.run_with_iobinding(binding)

    def bind_input(self, binding: ort.IOBinding, name: str, tensor: Tensor) -> None:
        """Let a graph read a tensor."""
        where = (ELEMENT_TYPES[tensor.dtype], tensor.shape, tensor.address)
        binding.bind_input(name, self.device, 0, *where)

    def bind_output(self, binding: ort.IOBinding, name: str, tensor: Tensor) -> None:
        """Let a graph write a tensor."""
        where = (ELEMENT_TYPES[tensor.dtype], tensor.shape, tensor.address)
        binding.bind_output(name, self.device, 0, *where)

    def bind_in_place(
        self,
        binding: ort.IOBinding,
        names: Sequence[tuple[str, str]],
        tensors: Sequence[Tensor],
    ) -> None:
        """Let each of some tensors be both an input and an output of a graph; they must outlive it.

        Args:
            binding: Of the graph.
            names: Input and output of each tensor.
            tensors: What they are.
        """
        for (past, present), tensor in zip(names, tensors, strict=True):
            self.bind_input(binding, past, tensor)
            self.bind_output(binding, present, tensor)

    def top(self, logits: Tensor, count: int, ids: Tensor | None = None) -> TopFinder:
        """What finds the `count` largest logits; made once, for as many runs as wanted.

        Args:
            logits: float32 `[B, 1, V]`.
            count: How many are wanted.
            ids: int64 `[B, count]`, where the ids go; None for a tensor of their own.
        """
        return TopFinder(self, self._session(helper_graphs.top()), logits, count, ids)

    def _session(self, graph: bytes) -> ort.InferenceSession:
        with self._lock:
            session = self._sessions.get(graph)
            if session is None:
                options = ort.SessionOptions()
                options.log_severity_level = _ERROR
                options.intra_op_num_threads = 1
                providers = devices.providers(self.device)
                session = ort.InferenceSession(graph, options, providers=providers)
                self._sessions[graph] = session
        return session


class TopFinder:
    """Finds the largest logits of each sequence on the device; see `DeviceMemory.top`."""

    def __init__(
        self,
        memory: DeviceMemory,
        session: ort.InferenceSession,
        logits: Tensor,
        count: int,
        ids: Tensor | None,
    ) -> None:
        batch = logits.shape[0]
        self._session, self._binding = session, session.io_binding()
        self._memory, self._logits = memory, logits
        self._ids = memory.empty((batch, count), "int64") if ids is None else ids
        self._values = memory.empty((batch, 1, count), "float32")
        memory.bind_input(self._binding, "logits", logits)
        self._count = np.array([count], np.int64)
        self._binding.bind_cpu_input("count", self._count)
        memory.bind_output(self._binding, "values", self._values)
        memory.bind_output(self._binding, "ids", self._ids.reshaped(batch, 1, count))

    def run(self) -> None:
        """Look at the logits as they are now."""
        self._session.run_with_iobinding(self._binding)

    def read(self) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Ids and logits, `[B, count]`, largest first; they cross to the host."""
        return self.read_ids(), self._memory.read(self._values)[:, 0]

    def read_ids(self) -> NDArray[np.int64]:
        """The ids alone."""
        return self._memory.read(self._ids)


def _row(row: NDArray[Any], dtype: str) -> ort.OrtValue:
    """`[1, 1, 1, row]` of a type, in host memory."""
    row = np.ascontiguousarray(row.reshape(1, 1, 1, -1))
    if dtype == "bfloat16":
        # The upper half of a float32.
        bits = (row.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, ELEMENT_TYPES[dtype])
    return ort.OrtValue.ortvalue_from_numpy(row.astype(dtype))
