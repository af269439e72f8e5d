"""Opens ONNX Runtime sessions: device, threads, logging, and a check of graph against manifest.

Knows how to open a session whose inputs and outputs are those of the state contract
(docs/state.md). Does not know how a step is run (`runner`).
"""

from __future__ import annotations

from typing import Any

import onnxruntime as ort

from doge_onnx.bundle import MANIFEST_NAME, Bundle, Manifest
from doge_onnx.errors import BundleError, CaptureError, DeviceError, DogeOnnxError, InputError
from doge_onnx.runtime.engine import device as devices
from doge_onnx.runtime.engine.external_data import external_files
from doge_onnx.runtime.engine.graph_session import GraphSession
from doge_onnx.runtime.engine.io_names import (
    ATTENTION_MASK,
    INPUT_IDS,
    LOGITS,
    LOGITS_TO_KEEP,
    PAST_LENGTHS,
    POSITION_IDS,
    past_names,
    present_names,
)
from doge_onnx.runtime.engine.kernels import choose_kernels
from doge_onnx.runtime.engine.threads import MOST_THREADS, attention_by_heads, preferred_threads

_WARNING, _ERROR, _FATAL = 2, 3, 4
# Messages of ONNX Runtime for an operator that it does not know or has no kernel for.
_LACKING = (
    "Could not find an implementation",
    "is not a registered function/op",
    "No Op registered for",
)
# Kinds of state that this version knows, and element types: name in the manifest, and name in
# ONNX Runtime.
_KINDS = ("growing", "window")
_DTYPES = {
    "float32": "tensor(float)",
    "float16": "tensor(float16)",
    "bfloat16": "tensor(bfloat16)",
    "int8": "tensor(int8)",
}

# Element type and shape of an input or output; None stands for any size.
_Signature = tuple[str, tuple[int | None, ...]]

ort.disable_telemetry_events()


def open_session(
    bundle: Bundle,
    device: str = "cpu",
    threads: int | None = None,
    verbose: bool = False,
    capture: bool = False,
    native: bool = True,
) -> ort.InferenceSession:
    """Load a bundle's graph into ONNX Runtime.

    Args:
        bundle: An opened bundle.
        device: "cpu" or "cuda"; see `choose_device`.
        threads: Threads that one operator may use; None for `preferred_threads`.
        verbose: Show the warnings of ONNX Runtime.
        capture: Let CUDA capture runs that ask for it.
        native: See `choose_kernels`.

    Raises:
        InputError: `threads` is not a whole number from 1 to `MOST_THREADS`; or see
            `choose_kernels`.
        DeviceError: CUDA does not start, or lacks kernels for the graph.
        CaptureError: CUDA cannot capture the graph.
        BundleError: This version does not know the kind or element type of the state; or the graph
            keeps weights in files that are not part of the bundle, cannot be loaded, or has other
            inputs and outputs than the manifest implies.
    """
    if threads is not None and (
        isinstance(threads, bool)
        or not isinstance(threads, int)
        or not 1 <= threads <= MOST_THREADS
    ):
        raise InputError(
            f"threads must be a positive whole number, at most {MOST_THREADS}, not {threads!r}"
        )
    state = bundle.manifest.state
    for name, value, known in (("kind", state.kind, _KINDS), ("dtype", state.dtype, _DTYPES)):
        if value not in known:
            raise BundleError(
                f"{bundle.path}: this doge-onnx does not know the state {name} {value!r} "
                f"(only {', '.join(known)}); upgrade doge-onnx"
            )
    if state.kind == "window" and state.dtype != "float32":
        raise BundleError(
            f"{bundle.path}: a window state has rows of float32, not of {state.dtype}; export again"
        )
    kernels = choose_kernels(bundle.manifest, device, native)
    graph = bundle.graph
    # ONNX Runtime itself refuses paths that leave the directory, newer versions more reliably than
    # older ones. But only files in the manifest had their checksums compared.
    for name in sorted(external_files(graph)):
        if bundle.weights(name) is None:
            raise BundleError(
                f"{graph} keeps weights in {name!r}, which is not one of the files in its "
                f"{MANIFEST_NAME}; do not use this bundle, export again"
            )
    options = ort.SessionOptions()
    options.log_severity_level = _WARNING if verbose else _ERROR
    if capture and not verbose:
        # A graph that cannot be captured is run without a capture: no error for the user to see.
        options.log_severity_level = _FATAL
    if threads is None:
        threads = preferred_threads()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    if bundle.manifest.ort_format:
        # Without these, ONNX Runtime reads the whole file and copies it: peak memory is two and a
        # half times the file's size.
        options.add_session_config_entry("session.use_memory_mapped_ort_model", "1")
        options.add_session_config_entry("session.use_ort_model_bytes_for_initializers", "1")
    if device == devices.CUDA:
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    heads = bundle.read_json("config.json").get("num_attention_heads")
    # Head by head, more threads than heads would leave some threads idle.
    by_heads = state.dtype == "float32" and isinstance(heads, int) and 0 < threads <= heads
    try:
        with attention_by_heads(by_heads):
            session = GraphSession(
                graph,
                options,
                kernels,
                providers=devices.providers(device, capture),
                # With the fallback, ONNX Runtime would print to standard output and use the CPU.
                enable_fallback=False,
            )
    except (MemoryError, DogeOnnxError):
        raise
    # ONNX Runtime's exceptions have no other base class in common.
    except Exception as error:
        reason = " ".join(str(error).split())
        if capture and "graph capture" in reason:
            raise CaptureError("the host takes part in its steps; export it again") from error
        if device == devices.CUDA and (failure := devices.cuda_failure(error)):
            raise DeviceError(f"CUDA does not start here: {failure}") from error
        if any(words in reason for words in _LACKING):
            quantized = bundle.manifest.quantized
            instead = "weights and state in fp32" if quantized else "the target portable"
            reason = (
                f"onnxruntime {ort.__version__} lacks a kernel that it needs; upgrade onnxruntime, "
                f"or export with {instead} ({reason})"
            )
        raise BundleError(f"ONNX Runtime cannot load {graph}: {reason}") from error
    _check_signature(session, bundle.manifest, str(graph))
    if device == devices.CUDA:
        devices.check_placement(session)
    return session


def has_logits_to_keep(session: ort.InferenceSession) -> bool:
    """Whether the graph can compute the logits of the last positions only."""
    return LOGITS_TO_KEEP in _optional_inputs(session)


def _optional_inputs(session: ort.InferenceSession) -> set[str]:
    """Names of the inputs that have a default."""
    return {entry.name for entry in session.get_overridable_initializers()}


def _check_signature(session: ort.InferenceSession, manifest: Manifest, graph: str) -> None:
    """Check that the graph has the inputs and outputs that the manifest implies.

    Raises:
        BundleError: It has not.
    """
    state = manifest.state
    if 2 * state.num_layers > len(session.get_inputs()):
        raise BundleError(f"{graph} has fewer than the {state.num_layers} layers of its manifest")
    cache: _Signature = (_DTYPES[state.dtype], (None, state.num_heads, None, state.row_size))
    ids: _Signature = ("tensor(int64)", (None, None))
    logits: _Signature = ("tensor(float)", (None, None, manifest.vocab_size))
    inputs = {INPUT_IDS: ids, ATTENTION_MASK: ids}
    if state.kind == "window":
        inputs[POSITION_IDS] = ids
    inputs |= dict.fromkeys(past_names(state.num_layers), cache)
    outputs = {LOGITS: logits} | dict.fromkeys(present_names(state.num_layers), cache)
    if state.kind == "growing" and state.in_place and PAST_LENGTHS not in _optional_inputs(session):
        raise BundleError(f"{graph} lacks the input {PAST_LENGTHS!r} that its manifest implies")
    for what, expected, entries in (
        ("input", inputs, session.get_inputs()),
        ("output", outputs, session.get_outputs()),
    ):
        actual = {entry.name: entry for entry in entries}
        if missing := sorted(expected.keys() - actual.keys()):
            raise BundleError(f"{graph} lacks the {what} {missing[0]!r} that its manifest implies")
        if unknown := sorted(actual.keys() - expected.keys()):
            raise BundleError(f"{graph} has the {what} {unknown[0]!r}, which its manifest lacks")
        for name, (element_type, shape) in expected.items():
            entry = actual[name]
            if entry.type != element_type or not _compatible(entry.shape, shape):
                raise BundleError(
                    f"{graph}: {what} {name!r} is {entry.type} {entry.shape}, which "
                    f"does not fit its manifest ({element_type} {list(shape)}, None is any size)"
                )


def _compatible(actual: list[Any], expected: tuple[int | None, ...]) -> bool:
    """Whether a graph's shape fits `expected`: a name or None, on either side, fits any size."""
    return len(actual) == len(expected) and all(
        have == want
        for have, want in zip(actual, expected, strict=True)
        if isinstance(have, int) and want is not None
    )
