"""From a bundle to what runs it: which device, and whether CUDA replays decode steps there.

Knows in which order to try. Does not know what a session needs (`session`), what a device lacks
(`device`) or how a graph is run (`runner` and its children).
"""

from __future__ import annotations

from doge_onnx.bundle import Bundle
from doge_onnx.errors import CaptureError, DeviceError, InputError
from doge_onnx.runtime.cuda.device_memory import DeviceMemory
from doge_onnx.runtime.cuda.lock import EXCLUSIVE
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
) -> Runner:
    """Load the graph of a bundle on a device.

    Args:
        bundle: An opened bundle.
        device: "auto", "cpu" or "cuda"; see `choose_device`.
        threads: See `open_session`.
        chunk: Most tokens of a sequence that go through the graph at once; None is as many as
            suit the device.
        verbose: See `open_session`.
        cuda_graph: Whether decode steps are captured and replayed; None is where that works.

    Raises:
        InputError: A device that nobody knows, or numbers out of their range.
        DeviceError: The device is not there or cannot run the bundle, or cannot capture its steps
            though it should.
        BundleError: See `open_session`.
    """
    if chunk is not None and (isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1):
        raise InputError(f"prefill_chunk must be a positive whole number, not {chunk!r}")
    if cuda_graph is not None and not isinstance(cuda_graph, bool):
        raise InputError(f"cuda_graph must be True, False or None, not {cuda_graph!r}")
    chosen = devices.choose_device(device, bundle.manifest)
    if chosen == devices.CUDA:
        try:
            with EXCLUSIVE:
                return _on_cuda(bundle, threads, chunk, verbose, cuda_graph)
        except DeviceError as error:
            # What somebody insists on is not left out.
            if cuda_graph or device != devices.AUTO or not devices.runs_on_cpu(bundle.manifest):
                raise
            reason: str | None = str(error)
    else:
        if cuda_graph:
            missing = devices.why_not_cuda(bundle.manifest) or "the device is to be the CPU"
            raise DeviceError(f"CUDA graphs need CUDA: {missing}")
        reason = devices.reason_for_cpu(bundle.manifest) if device == devices.AUTO else None
    runner = _on_cpu(bundle, threads, chunk, verbose)
    runner.reason_for_cpu = reason
    return runner


def _on_cpu(bundle: Bundle, threads: int | None, chunk: int | None, verbose: bool) -> Runner:
    session = open_session(bundle, devices.CPU, threads, verbose)
    layout, chunk = bundle.manifest.state, chunk or DEFAULT_CHUNK
    if layout.kind == "window":
        return WindowRunner(session, bundle.manifest, chunk)
    kind = GrowingRunner if layout.in_place else CopyingRunner
    return kind(session, bundle.manifest, chunk)


def _on_cuda(
    bundle: Bundle,
    threads: int | None,
    chunk: int | None,
    verbose: bool,
    cuda_graph: bool | None,
) -> Runner:
    problem = _changing_shapes(bundle)
    if problem is None and cuda_graph is not False:
        runner = _capturing(bundle, threads, chunk, verbose)
        if isinstance(runner, Runner):
            return runner
        problem = runner
    if cuda_graph:
        raise DeviceError(
            f"the steps of this bundle cannot be captured in a CUDA graph: {problem}; or run it "
            "without"
        )
    # A session that failed to capture once is not used again.
    return _runner(bundle, threads, chunk, verbose, capture=False)


def _capturing(
    bundle: Bundle, threads: int | None, chunk: int | None, verbose: bool
) -> Runner | str:
    """What runs a bundle on CUDA and captures its steps, or why that does not work."""
    try:
        runner = _runner(bundle, threads, chunk, verbose, capture=True)
    except CaptureError as error:
        return str(error)
    assert isinstance(runner, CudaGrowingRunner)
    try:
        return runner.use_fixed_steps(capture=True) or runner
    # A capture that fails says so when the graph is run, and in no class of its own. If it is
    # something else, it will be seen again without a capture.
    except Exception as error:
        return devices.cuda_failure(error) or " ".join(str(error).split())


def _changing_shapes(bundle: Bundle) -> str | None:
    """Why the shapes of decode steps change, so that none can be captured; None if they do not."""
    manifest = bundle.manifest
    state = manifest.state
    if state.kind != "growing" or not state.in_place or manifest.activations == "float32":
        return "its shapes change at each step; export it again for the device cuda"
    window = state.keep_window_size
    if window is not None and manifest.context_length > window:
        return "it sorts the gates of all keys, of which each step has more"
    return None


def _runner(
    bundle: Bundle, threads: int | None, chunk: int | None, verbose: bool, capture: bool
) -> Runner:
    """What runs a bundle on CUDA."""
    session = open_session(bundle, devices.CUDA, threads, verbose, capture)
    manifest, memory = bundle.manifest, DeviceMemory(devices.CUDA)
    # Graphs that cannot leave logits out would need memory for those of all positions.
    chunk = chunk or (CUDA_CHUNK if has_logits_to_keep(session) else DEFAULT_CHUNK)
    if manifest.state.kind == "window":
        return CudaWindowRunner(session, manifest, memory, chunk)
    if not manifest.state.in_place:
        return CudaCopyingRunner(session, manifest, memory, chunk)
    runner = CudaGrowingRunner(session, manifest, memory, chunk, capture)
    if not capture and _changing_shapes(bundle) is None:
        # What is wrong with them is left out, and masks grow instead.
        runner.use_fixed_steps(capture=False)
    return runner
