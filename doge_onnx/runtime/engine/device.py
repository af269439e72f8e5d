"""Devices: which of them a bundle runs on, and what is missing where it cannot.

Knows the CUDA that ONNX Runtime needs and how to find out, without a session, that a part of it
is not there: ONNX Runtime itself would go on with the CPU and say so in its log only. Does not
know how memory of a device is used (`memory`).
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
# TF32 would round the inputs of float32 products, those of the gates, to 11 bits.
_CUDA_OPTIONS = {"use_tf32": "0"}
_GRAPH_ID = "gpu_graph_id"
# How a failed call of CUDA or its libraries begins; the rest is about ONNX Runtime's sources.
_CUDA_FAILURE = re.compile(r"CU\w+ failure \d+: [^;]*[^; ]")
# Of the CUDA that onnxruntime-gpu is built for, and what it cannot be loaded without.
_CUDA_MAJOR = 13
_LIBRARIES = ("libcudart.so.13", "libcublasLt.so.13", "libcublas.so.13", "libcurand.so.10")
# Both packages own the same files, so neither may be left when the one is installed.
_INSTALL = (
    "pip install 'doge-onnx[cuda]' && pip uninstall --yes onnxruntime onnxruntime-gpu && "
    "pip install --no-deps onnxruntime-gpu"
)
# What a graph may leave to the CPU: arithmetic on lengths and shapes, of a few numbers each. The
# CUDA provider has kernels for them all and leaves them there because their inputs are there.
_SHAPE_OPERATORS = {
    *("Add", "Sub", "Mul", "Div", "Mod", "Neg", "Min", "Max", "Equal", "Where", "Range"),
    *("Cast", "Concat", "ConstantOfShape", "Gather", "Reshape", "Shape", "Size", "Slice"),
    *("Expand", "Squeeze", "Unsqueeze"),
}


def choose_device(asked: str, manifest: Manifest) -> str:
    """The device that a bundle will run on, "cpu" or "cuda".

    Args:
        asked: "auto" takes CUDA where it is and the bundle is made for it; the others insist.
        manifest: Of the bundle.

    Raises:
        InputError: There is no device of that name.
        DeviceError: The bundle cannot run on the device, or something is not installed.
    """
    if asked not in DEVICES:
        raise InputError(f"device {asked!r} is not known; choose from: {', '.join(DEVICES)}")
    unfit = {device: _unfit(device, manifest) for device in (CPU, CUDA)}
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
    """Why "auto" takes the CPU for a bundle, or None if nobody would expect anything else.

    One would where the bundle is made for CUDA, or where onnxruntime-gpu is installed.
    """
    if manifest.device == CPU and CUDA_PROVIDER not in ort.get_available_providers():
        return None
    return why_not_cuda(manifest)


def why_not_cuda(manifest: Manifest) -> str | None:
    """Why a bundle cannot run there, and what to do or install; None if it can."""
    return _unfit(CUDA, manifest) or missing_for_cuda()


def runs_on_cpu(manifest: Manifest) -> bool:
    """Whether a bundle can run there."""
    return _unfit(CPU, manifest) is None


def providers(device: str, capture: bool = False) -> list[Any]:
    """What ONNX Runtime is to run a graph with; `capture` lets CUDA capture `captured_run`s."""
    if device == CUDA:
        options = _CUDA_OPTIONS | {"enable_cuda_graph": str(int(capture))}
        return [(CUDA_PROVIDER, options), _CPU_PROVIDER]
    return [_CPU_PROVIDER]


def captured_run(graph: int) -> ort.RunOptions:
    """Options of a run that replays the graph of that number, or captures it if there is none."""
    options = ort.RunOptions()
    options.add_run_config_entry(_GRAPH_ID, str(graph))
    return options


# Where it can capture, ONNX Runtime would capture any run that does not say otherwise.
ORDINARY_RUN = captured_run(-1)


def cuda_failure(error: Exception) -> str | None:
    """What an exception of ONNX Runtime says of a call of CUDA that failed; None if nothing."""
    failure = _CUDA_FAILURE.search(" ".join(str(error).split()))
    return None if failure is None else failure[0]


def check_placement(session: ort.InferenceSession) -> None:
    """Check that CUDA runs all of a graph but arithmetic on shapes.

    Raises:
        DeviceError: It does not.
    """
    if CUDA_PROVIDER not in session.get_providers():
        raise DeviceError(
            "ONNX Runtime could not start CUDA and would have used the CPU; the option verbose "
            "shows what it says"
        )
    elsewhere = {operator for provider, operator in placed(session) if provider != CUDA_PROVIDER}
    left = ", ".join(sorted(elsewhere - _SHAPE_OPERATORS))
    if left:
        raise DeviceError(
            f"onnxruntime {ort.__version__} has no CUDA kernel for {left} as used by this bundle; "
            "export it again for the device cuda, or run it on the device cpu"
        )


def placed(session: ort.InferenceSession) -> Sequence[tuple[str, str]]:
    """Provider and operator of each node of a graph whose session was told to record them."""
    return [
        (part.ep_name, node.op_type)
        for part in session.get_provider_graph_assignment_info()
        for node in part.get_nodes()
    ]


def _unfit(device: str, manifest: Manifest) -> str | None:
    """Why a bundle cannot run on a device, or None if it can."""
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
    """What keeps CUDA from being used here, and what to install; None if nothing does."""
    if CUDA_PROVIDER not in ort.get_available_providers():
        return (
            f"the installed onnxruntime {ort.__version__} is built without CUDA; install the one "
            f"with it, which takes its place: {_INSTALL}"
        )
    return _driver_problem() or _library_problem()


def _driver_problem() -> str | None:
    """What is wrong with the driver and the devices that it has, or None if nothing is."""
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
    """Which of CUDA's libraries are missing, or None if none is."""
    if platform.system() != "Linux":
        return None
    # It finds those that pip installed, and prints what it does not find.
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
