"""A session of ONNX Runtime whose failed runs are errors of this package.

Knows the exceptions of ONNX Runtime, and what each means for a user. Does not know how a session is
set up (`session`) or what is fed to it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as bindings

from doge_onnx.errors import BundleError, DeviceError, NotEnoughMemoryError
from doge_onnx.runtime.engine.device import captured_run, cuda_failure
from doge_onnx.runtime.engine.kernels import Kernels, library

# A class for each of its status codes, without a base class of their own, and what its C++ code
# throws besides. TypeError is not among them: that is a call that this package gets wrong.
ORT_ERRORS: tuple[type[Exception], ...] = (
    RuntimeError,
    MemoryError,
    *(
        entry
        for entry in vars(bindings).values()
        if isinstance(entry, type) and issubclass(entry, Exception)
    ),
)
_ERROR, _FATAL = 3, 4
_NO_MEMORY = re.compile(
    r"allocat\w+ (?:memory|failed|of size)|bad.?alloc|out of memory|(?:MEMORY|BFC)_?ALLOC|"
    r"available memory",
    re.IGNORECASE,
)


class GraphSession(ort.InferenceSession):  # type: ignore[misc]  # it has no types
    """A session with the graph of a file, whose failed runs raise a `DogeOnnxError`.

    Attributes:
        graph: The file.
        kernels: Which kernels run its fused operators.

    Args:
        graph: The file.
        options: See `onnxruntime.InferenceSession`.
        kernels: See `kernels.choose_kernels`.
        arguments: See `onnxruntime.InferenceSession`.
    """

    def __init__(
        self,
        graph: Path,
        options: ort.SessionOptions,
        kernels: Kernels,
        **arguments: Any,
    ) -> None:
        self.graph = graph
        self.kernels = kernels
        # 0 is the default. Without a number, ONNX Runtime raises and catches an error in each run,
        # which takes 40 µs.
        self._run_options = captured_run(0)
        # ONNX Runtime also prints what it raises, unless told not to.
        quiet = options.log_severity_level >= _ERROR
        self._run_options.log_severity_level = _FATAL if quiet else options.log_severity_level
        if kernels.instructions is not None and (found := library()) is not None:
            options.register_custom_ops_library(native_path(found))
        super().__init__(native_path(graph), options, **arguments)

    def run_with_iobinding(
        self, binding: ort.IOBinding, run_options: ort.RunOptions | None = None
    ) -> None:
        """Run the graph; see `onnxruntime.InferenceSession.run_with_iobinding`."""
        try:
            super().run_with_iobinding(binding, run_options or self._run_options)
        except ORT_ERRORS as error:
            raise run_error(f"run {self.graph}", error) from error

    def run_with_ort_values(
        self, outputs: Sequence[str], inputs: Mapping[str, ort.OrtValue]
    ) -> Sequence[ort.OrtValue]:
        """Run the graph; see `onnxruntime.InferenceSession.run_with_ort_values`."""
        try:
            values: Sequence[ort.OrtValue] = super().run_with_ort_values(
                outputs, inputs, self._run_options
            )
            return values
        except ORT_ERRORS as error:
            raise run_error(f"run {self.graph}", error) from error


def run_error(task: str, error: Exception) -> BundleError | DeviceError | NotEnoughMemoryError:
    """The error of this package for an exception of ONNX Runtime.

    Args:
        task: What could not be done, such as "run model.onnx".
        error: One of `ORT_ERRORS`.
    """
    reason = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, MemoryError) or _NO_MEMORY.search(reason):
        return NotEnoughMemoryError(
            f"there is not enough memory to {task}; use fewer or shorter sequences, or feed the "
            f"prompt in smaller chunks ({reason})"
        )
    if failure := cuda_failure(error):
        return DeviceError(f"CUDA cannot {task}: {failure}")
    return BundleError(
        f"ONNX Runtime cannot {task}: {reason}; if that happens again, the bundle is damaged, or "
        f"onnxruntime {ort.__version__} cannot run it: export it again, or use another onnxruntime"
    )


def native_path(path: Path) -> str:
    """A path for ONNX Runtime, which takes names in UTF-8, whatever the encoding of the locale.

    Raises:
        BundleError: The name is not UTF-8.
    """
    try:
        return os.fsencode(path).decode("utf-8")
    except UnicodeDecodeError:
        raise BundleError(
            f"ONNX Runtime opens no file whose name is not UTF-8, and {str(path)!r} is none; "
            "rename it"
        ) from None
