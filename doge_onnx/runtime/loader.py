"""Opens the runner of a bundle: chooses the device, and whether CUDA replays decode steps.

Knows which devices and modes to try, and in which order. Does not know what a session needs
(`session`), how to find out what a device lacks (`device`) or how a graph is run (`runner`).
"""

from __future__ import annotations

from doge_onnx.bundle import Bundle
from doge_onnx.errors import CaptureError, DeviceError, InputError
from doge_onnx.runtime.cuda.device_memory import DeviceMemory
from doge_onnx.runtime.cuda.executor import PROCESS_LOCK
from doge_onnx.runtime.cuda.runner import (
    CUDA_CHUNK,
    CudaCopyingRunner,
    CudaGrowingRunner,
    CudaWindowRunner,
)
from doge_onnx.runtime.engine import device as devices
from doge_onnx.runtime.engine.copying_runner import CopyingRunner
from doge_onnx.runtime.engine.growing_runner import GrowingRunner
from doge_onnx.runtime.engine.runner import DEFAULT_CHUNK, Runner
from doge_onnx.runtime.engine.session import has_logits_to_keep, open_session
from doge_onnx.runtime.engine.window_runner import WindowRunner


def open_runner(
    bundle: Bundle,
    device: str = devices.AUTO,
    threads: int | None = None,
    chunk: int | None = None,
    verbose: bool = False,
    cuda_graph: bool | None = None,
    native: bool = True,
) -> Runner:
    """Load the graph of a bundle on a device.

    Args:
        bundle: An opened bundle.
        device: "auto", "cpu" or "cuda"; see `choose_device`.
        threads: See `open_session`.
        chunk: Most tokens of a sequence in one run of the graph; None for the device's default.
        verbose: See `open_session`.
        cuda_graph: Whether to capture decode steps and replay them; None for yes where it works.
        native: See `choose_kernels`.

    Raises:
        InputError: There is no device of that name, or a number is out of its range; or see
            `choose_kernels`.
        DeviceError: The device is missing or cannot run the bundle, or `cuda_graph` is True and
            its steps cannot be captured.
        BundleError: See `open_session`.
    """
    if chunk is not None and (isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1):
        raise InputError(f"prefill_chunk must be a positive whole number, not {chunk!r}")
    if cuda_graph is not None and not isinstance(cuda_graph, bool):
        raise InputError(f"cuda_graph must be True, False or None, not {cuda_graph!r}")
    chosen = devices.choose_device(device, bundle.manifest)
    if chosen == devices.CUDA:
        try:
            with PROCESS_LOCK:
                return _open_on_cuda(bundle, threads, chunk, verbose, cuda_graph)
        except DeviceError as error:
            # "auto" may fall back to the CPU, but not from what the caller asked for by name.
            if cuda_graph or device != devices.AUTO or not devices.runs_on_cpu(bundle.manifest):
                raise
            reason: str | None = str(error)
    else:
        if cuda_graph:
            missing = devices.why_not_cuda(bundle.manifest) or "the device is to be the CPU"
            raise DeviceError(f"CUDA graphs need CUDA: {missing}")
        reason = devices.reason_for_cpu(bundle.manifest) if device == devices.AUTO else None
    runner = _open_on_cpu(bundle, threads, chunk, verbose, native)
    runner.reason_for_cpu = reason
    return runner


def _open_on_cpu(
    bundle: Bundle, threads: int | None, chunk: int | None, verbose: bool, native: bool
) -> Runner:
    session = open_session(bundle, devices.CPU, threads, verbose, native=native)
    layout, chunk = bundle.manifest.state, chunk or DEFAULT_CHUNK
    if layout.kind == "window":
        return WindowRunner(session, bundle.manifest, chunk)
    kind = GrowingRunner if layout.in_place else CopyingRunner
    return kind(session, bundle.manifest, chunk)


def _open_on_cuda(
    bundle: Bundle,
    threads: int | None,
    chunk: int | None,
    verbose: bool,
    cuda_graph: bool | None,
) -> Runner:
    problem = _why_shapes_change(bundle)
    if problem is None and cuda_graph is not False:
        runner = _open_capturing(bundle, threads, chunk, verbose)
        if isinstance(runner, Runner):
            return runner
        problem = runner
    if cuda_graph:
        raise DeviceError(
            f"the steps of this bundle cannot be captured in a CUDA graph: {problem}; or run it "
            "without"
        )
    # A new session: one that failed to capture is not used again.
    return _open_cuda_runner(bundle, threads, chunk, verbose, capture=False)


def _open_capturing(
    bundle: Bundle, threads: int | None, chunk: int | None, verbose: bool
) -> Runner | str:
    """A runner that captures decode steps on CUDA, or the reason why there is none."""
    try:
        runner = _open_cuda_runner(bundle, threads, chunk, verbose, capture=True)
    except CaptureError as error:
        return str(error)
    assert isinstance(runner, CudaGrowingRunner)
    try:
        return runner.use_static_steps(capture=True) or runner
    # A failed capture shows only in a run, and ONNX Runtime has no exception class for it. Any
    # other error will come up again without a capture.
    except Exception as error:
        return devices.cuda_failure(error) or " ".join(str(error).split())


def _why_shapes_change(bundle: Bundle) -> str | None:
    """Why decode steps of a bundle have changing shapes; None if their shapes are fixed."""
    manifest = bundle.manifest
    state = manifest.state
    if state.kind != "growing" or not state.in_place or manifest.activations == "float32":
        return "its shapes change at each step; export it again for the device cuda"
    window = state.keep_window_size
    if window is not None and manifest.context_length > window:
        return "it sorts the gates of all keys, of which each step has more"
    return None


def _open_cuda_runner(
    bundle: Bundle, threads: int | None, chunk: int | None, verbose: bool, capture: bool
) -> Runner:
    """Open the runner of a bundle on CUDA; it does not capture steps yet."""
    session = open_session(bundle, devices.CUDA, threads, verbose, capture)
    manifest, memory = bundle.manifest, DeviceMemory(devices.CUDA)
    # A graph that always computes all logits would need too much memory for a larger chunk.
    chunk = chunk or (CUDA_CHUNK if has_logits_to_keep(session) else DEFAULT_CHUNK)
    if manifest.state.kind == "window":
        return CudaWindowRunner(session, manifest, memory, chunk)
    if not manifest.state.in_place:
        return CudaCopyingRunner(session, manifest, memory, chunk)
    runner = CudaGrowingRunner(session, manifest, memory, chunk, capture)
    if not capture and _why_shapes_change(bundle) is None:
        # If they are not right here, the runner goes on with masks that grow.
        runner.use_static_steps(capture=False)
    return runner
