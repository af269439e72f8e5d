"""`export`: from a checkpoint to a bundle, or to nothing at all.

Knows the order of the steps and which files a bundle holds; each step is a module of its
own. Whatever fails on the way leaves the destination as it was.
"""

from __future__ import annotations

import importlib.metadata
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir as ir

from doge_onnx import bundle
from doge_onnx.bundle import Manifest, StateLayout
from doge_onnx.config import DogeConfig
from doge_onnx.errors import BundleError, DogeOnnxError
from doge_onnx.export import checkpoint as checkpoints
from doge_onnx.export import sidecar
from doge_onnx.export.checkpoint import Checkpoint
from doge_onnx.export.graph import trace
from doge_onnx.export.lowering import Target
from doge_onnx.export.lowering import target as find_target
from doge_onnx.export.state import GrowingState, WindowState
from doge_onnx.export.step import RecurrentStep, State
from doge_onnx.export.verify import ParityReport, compare

PRECISIONS = ("fp32",)
STATES = ("growing", "window")
# Larger graphs keep their weights in a file of their own: a protobuf file ends at 2 GB, and
# a separate one can be mapped into memory.
MAX_EMBEDDED_BYTES = 100 * 2**20
# The graph holds the rotation of every position up to the context length.
MAX_CONTEXT_LENGTH = 2**20
# What one bundle needs on the disk beside its weights: graph, tokenizer, tables.
_SMALL_FILES_BYTES = 32 * 2**20


@dataclass(frozen=True)
class ExportReport:
    """What an export did.

    Attributes:
        path: The bundle.
        manifest: Its manifest.
        parity: Result of the comparison with the reference, or None if not asked for.
        size: Bytes of all files of the bundle.
        seconds: Wall time of the whole export.
    """

    path: Path
    manifest: Manifest
    parity: ParityReport | None
    size: int
    seconds: float


def export(
    model: str | Path,
    out: str | Path,
    *,
    precision: str = "fp32",
    context_length: int | None = None,
    target: str = "ort",
    state: str = "growing",
    verify: bool = True,
    revision: str | None = None,
    force: bool = False,
    progress: Callable[[str], None] | None = None,
) -> ExportReport:
    """Export a Doge checkpoint to a bundle.

    Args:
        model: A directory, or the id of a model on the Hub.
        out: Where the bundle goes; must not exist unless `force`.
        precision: Of the weights; "fp32".
        context_length: Most tokens that a sequence may have; None for the length that the
            model was trained for.
        target: "ort" for ONNX Runtime's fused kernels, "portable" for standard ONNX.
        state: "growing" for a state with a row for every token, "window" for one that has as
            many rows as the model's window has keys, however long the text gets.
        verify: Compare the result with transformers before it is put in place.
        revision: Branch, tag or commit of a model on the Hub.
        force: Replace a bundle that stands at `out`.
        progress: Called with a few words whenever a step begins.

    Raises:
        DogeOnnxError: One of its children for whatever is wrong with the arguments, the
            checkpoint, the destination, or the result; nothing is left behind.
    """
    started = time.perf_counter()
    # Absolute, so that "." and "x/.." have a name and a parent.
    out = Path(os.path.abspath(out))
    report = progress or (lambda _: None)
    chosen = find_target(target)
    if precision not in PRECISIONS:
        raise DogeOnnxError(
            f"precision {precision!r} is not known; choose from {', '.join(PRECISIONS)}"
        )
    bundle.check_destination(out, force)
    source = checkpoints.find(model, revision)
    sidecar.check(source, report)
    checkpoint = checkpoints.read(source.directory, report)
    length = _context_length(context_length, checkpoint.config)
    built = _build_state(state, checkpoint, length, chosen)
    size = 4 * (checkpoint.parameters + built.table_size)
    bundle.check_free_space(out.parent, size + _SMALL_FILES_BYTES)
    manifest = Manifest(
        target=target,
        precision=precision,
        context_length=length,
        vocab_size=checkpoint.config.vocab_size,
        parameters=checkpoint.parameters,
        state=_state_layout(built, checkpoint.config, chosen),
        source={"model": source.model, "revision": source.revision},
        versions=_versions(),
    )
    parity = None
    with bundle.writing(out, force) as directory:
        _write_graph(checkpoint, built, chosen, directory, size <= MAX_EMBEDDED_BYTES, report)
        sidecar.write(source, checkpoint.config, manifest, directory)
        manifest = bundle.seal(directory, manifest)
        if verify:
            parity = compare(directory, source.directory, progress=report)
            parity.require(str(out))
            compared = {"checkpoint": source.model, "revision": source.revision}
            bundle.write_parity(directory, parity.as_dict() | compared)
            manifest = bundle.read_manifest(directory)
        size = sum(path.stat().st_size for path in directory.iterdir())
    return ExportReport(out, manifest, parity, size, time.perf_counter() - started)


def _context_length(asked: int | None, config: DogeConfig) -> int:
    length = config.max_position_embeddings if asked is None else asked
    if isinstance(length, bool) or not isinstance(length, int) or length < 1:
        raise DogeOnnxError(f"context length {length!r} is not a positive whole number")
    if length > MAX_CONTEXT_LENGTH:
        raise DogeOnnxError(
            f"context length {length} is more than {MAX_CONTEXT_LENGTH}; a window state has no end"
        )
    return length


def _build_state(name: str, checkpoint: Checkpoint, length: int, target: Target) -> State:
    if name == "growing":
        return GrowingState(checkpoint, length, target.operators)
    if name != "window":
        raise DogeOnnxError(f"state {name!r} is not known; choose from {', '.join(STATES)}")
    if checkpoint.config.keep_window_size is None:
        raise DogeOnnxError("this model has no window (keep_window_size): its state has to grow")
    return WindowState(checkpoint)


def _state_layout(state: State, config: DogeConfig, target: Target) -> StateLayout:
    return StateLayout(
        kind="growing" if isinstance(state, GrowingState) else "window",
        num_layers=config.num_hidden_layers,
        num_heads=state.heads.num_keys,
        row_size=state.heads.row,
        head_dim=state.heads.dim,
        dtype="float32",
        keep_window_size=config.keep_window_size,
        # A window only overwrites rows, which standard operators do in place as well.
        in_place=target.in_place or isinstance(state, WindowState),
    )


def _write_graph(
    checkpoint: Checkpoint,
    state: State,
    target: Target,
    directory: Path,
    embedded: bool,
    report: Callable[[str], None],
) -> None:
    report("building the recurrent step")
    step = RecurrentStep(checkpoint, state, target.operators)
    report("tracing the graph")
    model = trace(step, target)
    model.producer_name = "doge-onnx"
    model.producer_version = importlib.metadata.version("doge-onnx")
    report("writing the graph")
    path = directory / bundle.GRAPH_NAME
    ir.save(model, path, external_data=None if embedded else bundle.WEIGHTS_NAME)
    report("checking the graph")
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise BundleError(f"the exported graph is not valid ONNX: {error}") from error


def _versions() -> dict[str, str]:
    names = ("doge-onnx", "torch", "transformers", "onnx", "onnxscript", "onnxruntime")
    return {name: importlib.metadata.version(name) for name in names}
