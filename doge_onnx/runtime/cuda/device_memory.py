"""Tensors in the memory of a device, which ONNX Runtime allocates, and operations on them.

Knows how to allocate, fill, extend and read such tensors. Does not know what they hold. With the
device "cpu" it works in ordinary memory, so that tests run without a GPU.
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
class DeviceTensor:
    """A tensor on a device, or a contiguous part of one.

    Attributes:
        value: ONNX Runtime's tensor, which owns the memory.
        dtype: Name of the element type, a key of `ELEMENT_TYPES`.
        shape: Shape of the part.
        address: Address of the first element of the part.
    """

    value: ort.OrtValue
    dtype: str
    shape: tuple[int, ...]
    address: int

    def __getitem__(self, rows: slice) -> DeviceTensor:
        """A part of the first axis: `tensor[start:end]`."""
        first, end, _ = rows.indices(self.shape[0])
        size = (self.value.tensor_size_in_bytes() // max(self.value.shape()[0], 1)) * first
        return DeviceTensor(
            self.value, self.dtype, (end - first, *self.shape[1:]), self.address + size
        )

    def reshaped(self, *shape: int) -> DeviceTensor:
        """The first elements, viewed in another shape."""
        return DeviceTensor(self.value, self.dtype, shape, self.address)


class DeviceMemory:
    """Allocates tensors on one device and runs helper graphs on them.

    Args:
        device: "cpu" or "cuda".
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self._sessions: dict[bytes, ort.InferenceSession] = {}
        self._lock = threading.Lock()

    def empty(self, shape: tuple[int, ...], dtype: str) -> DeviceTensor:
        """A tensor that is not initialized; `dtype` is a key of `ELEMENT_TYPES`."""
        value = ort.OrtValue.ortvalue_from_shape_and_type(
            shape, ELEMENT_TYPES[dtype], self.device, 0
        )
        return DeviceTensor(value, dtype, shape, value.data_ptr())

    def ones(self, size: int) -> DeviceTensor:
        """An int64 vector of ones."""
        tensor = self.empty((size,), "int64")
        tensor.value.update_inplace(np.ones(size, np.int64))
        return tensor

    def read(self, tensor: DeviceTensor) -> NDArray[Any]:
        """Copy a tensor to host memory; of a part, the whole tensor that it is a part of."""
        array: NDArray[Any] = tensor.value.numpy()
        return array.copy() if self.device == devices.CPU else array

    def extended(self, past: DeviceTensor, row: NDArray[Any], rows: int) -> DeviceTensor:
        """A copy of a state tensor with equal rows appended.

        Args:
            past: `[B, H, P, row]`.
            row: The row to append, float32 `[row]`. The type of the state must represent its
                values exactly.
            rows: Number of rows to append.

        Returns:
            `[B, H, P + rows, row]`.
        """
        batch, heads, length, width = past.shape
        result = self.empty((batch, heads, length + rows, width), past.dtype)
        self.extension(past, row, result)()
        return result

    def extension(
        self, past: DeviceTensor, row: NDArray[Any], present: DeviceTensor
    ) -> Callable[[], None]:
        """A function that copies `past` into `present` and fills the rows after it with `row`.

        The graph is bound here, once, so that a call costs little more than the copy.

        Args:
            past: `[B, H, P, row]`.
            row: See `extended`.
            present: `[B, H, C, row]`, C >= P.
        """
        batch, heads, length, width = present.shape
        added = np.array([batch, heads, length - past.shape[2], width], np.int64)
        session = self._session(helper_graphs.extension(past.dtype))
        binding = session.io_binding()
        self.bind_input(binding, "past", past)
        # Not as a NumPy array: NumPy has no bfloat16.
        binding.bind_ortvalue_input("row", _row(row, past.dtype))
        binding.bind_cpu_input("shape", added)
        self.bind_output(binding, "present", present)
        return lambda: session.run_with_iobinding(binding)

    def bind_input(self, binding: ort.IOBinding, name: str, tensor: DeviceTensor) -> None:
        """Bind an input of a graph to a tensor."""
        where = (ELEMENT_TYPES[tensor.dtype], tensor.shape, tensor.address)
        binding.bind_input(name, self.device, 0, *where)

    def bind_output(self, binding: ort.IOBinding, name: str, tensor: DeviceTensor) -> None:
        """Bind an output of a graph to a tensor."""
        where = (ELEMENT_TYPES[tensor.dtype], tensor.shape, tensor.address)
        binding.bind_output(name, self.device, 0, *where)

    def bind_in_place(
        self,
        binding: ort.IOBinding,
        names: Sequence[tuple[str, str]],
        tensors: Sequence[DeviceTensor],
    ) -> None:
        """Bind each tensor to both an input and an output of a graph.

        Args:
            binding: The graph's.
            names: Name of the input and of the output for each tensor.
            tensors: The tensors, which must outlive the binding.
        """
        for (past, present), tensor in zip(names, tensors, strict=True):
            self.bind_input(binding, past, tensor)
            self.bind_output(binding, present, tensor)

    def top_k(
        self, logits: DeviceTensor, count: int, ids: DeviceTensor | None = None
    ) -> DeviceTopK:
        """An object that finds the `count` largest logits, as often as its `run` is called.

        Args:
            logits: float32 `[B, 1, V]`.
            count: How many logits to find for each sequence.
            ids: int64 `[B, count]`, the tensor to write the token ids to; None for a new one.
        """
        return DeviceTopK(self, self._session(helper_graphs.top_k()), logits, count, ids)

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


class DeviceTopK:
    """Finds the largest logits of each sequence on the device; see `DeviceMemory.top_k`."""

    def __init__(
        self,
        memory: DeviceMemory,
        session: ort.InferenceSession,
        logits: DeviceTensor,
        count: int,
        ids: DeviceTensor | None,
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
        """Find the largest of the logits that the tensor holds now."""
        self._session.run_with_iobinding(self._binding)

    def read(self) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Copy ids (int64) and logits (float32) to the host: `[B, count]`, largest first."""
        return self.read_ids(), self._memory.read(self._values)[:, 0]

    def read_ids(self) -> NDArray[np.int64]:
        """Copy only the ids to the host: int64 `[B, count]`, largest logit first."""
        return self._memory.read(self._ids)


def _row(row: NDArray[Any], dtype: str) -> ort.OrtValue:
    """A row `[row]` as a tensor `[1, 1, 1, row]` of a type, in host memory."""
    row = np.ascontiguousarray(row.reshape(1, 1, 1, -1))
    if dtype == "bfloat16":
        # A bfloat16 is the upper half of a float32.
        bits = (row.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, ELEMENT_TYPES[dtype])
    return ort.OrtValue.ortvalue_from_numpy(row.astype(dtype))
