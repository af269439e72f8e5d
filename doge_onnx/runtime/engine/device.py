"""Devices: which one runs a bundle, and what is missing where CUDA cannot.

Knows which parts of CUDA ONNX Runtime needs and how to find a missing one without a session: ONNX
Runtime itself would run on the CPU and mention it only in its log. Does not know how the memory of
a device is used (`cuda.device_memory`).
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import platform
import re
from collections.abc import Sequence
from typing import Any

import onnxruntime as ort

from doge_onnx.bundle import Manifest
from doge_onnx.errors import DeviceError, InputError

AUTO, CPU, CUDA = "auto", "cpu", "cuda"
DEVICES = (AUTO, CPU, CUDA)
CUDA_PROVIDER = "CUDAExecutionProvider"
_CPU_PROVIDER = "CPUExecutionProvider"
# TF32 would round the inputs of the float32 products that compute the gates to 11 bits.
_CUDA_OPTIONS = {"use_tf32": "0"}
_GRAPH_ID = "gpu_graph_id"
# How ONNX Runtime reports a failed call of CUDA or its libraries; what follows names its sources.
_CUDA_FAILURE = re.compile(r"CU\w+ failure \d+: [^;]*[^; ]")
# The CUDA version that onnxruntime-gpu is built for, and the libraries that it needs to load.
_CUDA_MAJOR = 13
_LIBRARIES = ("libcudart.so.13", "libcublasLt.so.13", "libcublas.so.13", "libcurand.so.10")
# onnxruntime and onnxruntime-gpu own the same files: both must go before one is installed again.
_INSTALL = (
    "pip install 'doge-onnx[cuda]' && pip uninstall --yes onnxruntime onnxruntime-gpu && "
    "pip install --no-deps onnxruntime-gpu"
)
# Operators that may run on the CPU: arithmetic on lengths and shapes, a few numbers each. The CUDA
# provider has kernels for all of them, but places them on the CPU if their inputs are there.
_SHAPE_OPERATORS = {
    *("Add", "Sub", "Mul", "Div", "Mod", "Neg", "Min", "Max", "Equal", "Where", "Range"),
    *("Cast", "Concat", "ConstantOfShape", "Gather", "Reshape", "Shape", "Size", "Slice"),
    *("Expand", "Squeeze", "Unsqueeze"),
}


def choose_device(asked: str, manifest: Manifest) -> str:
    """The device that will run a bundle, "cpu" or "cuda".

    Args:
        asked: "auto", "cpu" or "cuda". "auto" takes CUDA if it is installed and can run the bundle,
            and else the CPU.
        manifest: The bundle's.

    Raises:
        InputError: There is no device of that name.
        DeviceError: The bundle cannot run on the device, or the device lacks a driver or a library.
    """
    if asked not in DEVICES:
        raise InputError(f"device {asked!r} is not known; choose from: {', '.join(DEVICES)}")
    unfit = {device: _why_unfit(device, manifest) for device in (CPU, CUDA)}
    if asked == AUTO:
        if unfit[CUDA] is not None:
            return CPU
        missing = missing_for_cuda()
        if missing is None:
            return CUDA
        if unfit[CPU] is None:
            return CPU
        raise DeviceError(f"{unfit[CPU]}; and {missing}")
    reason = unfit[asked]
    if reason is None and asked == CUDA:
        reason = missing_for_cuda()
    if reason is not None:
        raise DeviceError(reason)
    return asked


def reason_for_cpu(manifest: Manifest) -> str | None:
    """Why "auto" takes the CPU for a bundle; None if a user would not expect CUDA.

    A user would expect it if the bundle is made for CUDA, or if onnxruntime-gpu is installed.
    """
    if manifest.device == CPU and CUDA_PROVIDER not in ort.get_available_providers():
        return None
    return why_not_cuda(manifest)


def why_not_cuda(manifest: Manifest) -> str | None:
    """Why CUDA cannot run a bundle, and what to do or install; None if it can."""
    return _why_unfit(CUDA, manifest) or missing_for_cuda()


def runs_on_cpu(manifest: Manifest) -> bool:
    """Whether the CPU can run a bundle."""
    return _why_unfit(CPU, manifest) is None


def providers(device: str, capture: bool = False) -> list[Any]:
    """The execution providers for a device; `capture` lets CUDA capture each `captured_run`."""
    if device == CUDA:
        options = _CUDA_OPTIONS | {"enable_cuda_graph": str(int(capture))}
        return [(CUDA_PROVIDER, options), _CPU_PROVIDER]
    return [_CPU_PROVIDER]


def captured_run(graph: int) -> ort.RunOptions:
    """Options of a run that replays the CUDA graph of that number, or captures it first."""
    options = ort.RunOptions()
    options.add_run_config_entry(_GRAPH_ID, str(graph))
    return options


# A session that may capture would capture every run, unless the run has this number.
ORDINARY_RUN = captured_run(-1)


def cuda_failure(error: Exception) -> str | None:
    """The failed call of CUDA that an exception of ONNX Runtime reports; None if there is none."""
    failure = _CUDA_FAILURE.search(" ".join(str(error).split()))
    return None if failure is None else failure[0]


def check_placement(session: ort.InferenceSession) -> None:
    """Check that CUDA runs all nodes of a graph, except arithmetic on shapes.

    Raises:
        DeviceError: CUDA did not start, or the CPU runs another node.
    """
    if CUDA_PROVIDER not in session.get_providers():
        raise DeviceError(
            "ONNX Runtime could not start CUDA and would have used the CPU; the option verbose "
            "shows what it says"
        )
    elsewhere = {
        operator for provider, operator in node_placements(session) if provider != CUDA_PROVIDER
    }
    left = ", ".join(sorted(elsewhere - _SHAPE_OPERATORS))
    if left:
        raise DeviceError(
            f"onnxruntime {ort.__version__} has no CUDA kernel for {left} as used by this bundle; "
            "export it again for the device cuda, or run it on the device cpu"
        )


def node_placements(session: ort.InferenceSession) -> Sequence[tuple[str, str]]:
    """Execution provider and operator of each node of a graph.

    The session must have been opened with `session.record_ep_graph_assignment_info`.
    """
    return [
        (part.ep_name, node.op_type)
        for part in session.get_provider_graph_assignment_info()
        for node in part.get_nodes()
    ]


def _why_unfit(device: str, manifest: Manifest) -> str | None:
    """Why a device cannot run a bundle, whatever is installed; None if it can."""
    if device == CPU and manifest.activations == "bfloat16":
        return (
            "this bundle computes in bf16, for which ONNX Runtime has no kernels on the CPU: it "
            "needs CUDA, or an export in fp16 or fp32"
        )
    if device == CUDA and manifest.target == "ort" and manifest.activations == "float32":
        return (
            "this bundle computes in fp32 with operators for the CPU; CUDA has attention in "
            "half precision only; export it again for the device cuda, or run it on the device cpu"
        )
    return None


def missing_for_cuda() -> str | None:
    """What CUDA lacks on this machine, and what to install; None if it lacks nothing."""
    if CUDA_PROVIDER not in ort.get_available_providers():
        return (
            f"the installed onnxruntime {ort.__version__} is built without CUDA; install the one "
            f"with it, which takes its place: {_INSTALL}"
        )
    return _driver_problem() or _library_problem()


def _driver_problem() -> str | None:
    """What is wrong with the NVIDIA driver and its GPUs; None if nothing is."""
    name = "nvcuda.dll" if platform.system() == "Windows" else "libcuda.so.1"
    update = f"install an NVIDIA driver for CUDA {_CUDA_MAJOR}, 580 or newer"
    driver = _library(name)
    if driver is None:
        return f"there is no NVIDIA driver here ({name} cannot be loaded); {update}"
    error = driver.cuInit(0)
    if error:
        return f"the NVIDIA driver found no GPU that it can use (cuInit: error {error}); {update}"
    number = ctypes.c_int()
    driver.cuDriverGetVersion(ctypes.byref(number))
    if number.value < 1000 * _CUDA_MAJOR:
        major, minor = number.value // 1000, number.value % 1000 // 10
        return f"the NVIDIA driver is for CUDA {major}.{minor}, which is too old; {update}"
    driver.cuDeviceGetCount(ctypes.byref(number))
    if number.value < 1:
        return "the NVIDIA driver shows no GPU; see whether CUDA_VISIBLE_DEVICES hides them all"
    return None


def _library_problem() -> str | None:
    """Which of CUDA's libraries cannot be loaded, and how to get them; None if all can."""
    if platform.system() != "Linux":
        return None
    # Loads the libraries that pip installed, and prints the names of those that it does not find.
    with contextlib.redirect_stdout(io.StringIO()):
        ort.preload_dlls()
    missing = [name for name in _LIBRARIES if _library(name) is None]
    if not missing:
        return None
    return (
        f"CUDA {_CUDA_MAJOR} is incomplete here ({', '.join(missing)} cannot be loaded); install "
        "it, or: pip install 'doge-onnx[cuda]'"
    )


def _library(name: str) -> Any:
    """A shared library, or None if it cannot be loaded."""
    try:
        return ctypes.CDLL(name)
    except OSError:
        return None
