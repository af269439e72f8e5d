"""Exports a checkpoint to a bundle. If any step fails, the destination stays as it was.

Knows the order of the steps and which files a bundle holds. Does not know how a step is carried
out; each is in a module of its own.
"""

from __future__ import annotations

import importlib.metadata
import math
import os
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path

import onnx
import onnx_ir as ir
import torch

from doge_onnx import bundle
from doge_onnx.bundle import Bundle
from doge_onnx.errors import BundleError, ConfigError, DeviceError, DogeOnnxError
from doge_onnx.export import card, half, metadata, ort_format, quality, sidecar
from doge_onnx.export import checkpoint as checkpoints
from doge_onnx.export.attention import State
from doge_onnx.export.checkpoint import Checkpoint
from doge_onnx.export.eager import EagerModel
from doge_onnx.export.graph import trace
from doge_onnx.export.growing_state import GrowingState
from doge_onnx.export.lowering import Target, find_target, for_web, require_kernels
from doge_onnx.export.model_config import CONFIG_NAME, DogeConfig
from doge_onnx.export.quantize import RECIPES, Recipe, check_choices, quantize, recipe_for
from doge_onnx.export.step import RecurrentStep
from doge_onnx.export.step_bytes import weights_read
from doge_onnx.export.torch_threads import thread_limit
from doge_onnx.export.verify import ParityReport, compare, parity_figures
from doge_onnx.export.window_state import WindowState
from doge_onnx.manifest import Manifest, StateLayout, WeightsRead
from doge_onnx.measure.evaluate import QualityReport
from doge_onnx.runtime.engine.device import missing_for_cuda

STATES = ("growing", "window")
# Choices of `kv_cache` and their element types; with None the state has that of the activations.
KV_CACHES = {"fp32": "float32", "int8": "int8"}
FORMATS = ("onnx", "ort")
# Larger graphs keep their weights in a separate file: a protobuf file has at most 2 GB, and a
# separate file can be mapped into memory.
MAX_EMBEDDED_BYTES = 100 * 2**20
# The graph has rotary tables with a row for each position up to the context length.
MAX_CONTEXT_LENGTH = 2**20
_CACHE_LINE = 64
# Disk space of a bundle beside its weights: graph, tokenizer, tables.
_SMALL_FILES_BYTES = 32 * 2**20
# Seed and length of the texts that the model writes for its calibration; not the seed of the
# evaluation.
_CALIBRATION_SEED = 8
_CALIBRATION_LENGTH = 256
# Number of texts for small and for large models: more texts change little and would take longer
# than the rest of the export.
_CALIBRATION_ROWS = (64, 32)
_LARGE = 100_000_000
# Fewer texts are enough to find the largest activations only.
_RANGE_ROWS = 8


@dataclass(frozen=True)
class ExportReport:
    """The result of an export.

    Attributes:
        path: Directory of the bundle.
        manifest: Its manifest.
        parity: Result of the comparison with the reference; None if verification was off, if
            weights or state are quantized, or if this machine cannot run the bundle.
        quality: How much quality quantization lost; None if verification was off, if nothing is
            quantized, or if this machine cannot run the bundle.
        size: Bytes of all files of the bundle.
        seconds: Wall time of the whole export.
        unchecked: Why this machine cannot run the bundle, so that it was not compared; else None.

    What the export had to say about the checkpoint's files is in the manifest's `notes`.
    """

    path: Path
    manifest: Manifest
    parity: ParityReport | None
    quality: QualityReport | None
    size: int
    seconds: float
    unchecked: str | None = None


@thread_limit()
def export(
    model: str | Path,
    out: str | Path,
    *,
    precision: str | None = None,
    kv_cache: str | None = None,
    context_length: int | None = None,
    target: str = "ort",
    device: str = "cpu",
    state: str = "growing",
    layout: str = "flat",
    format: str = "onnx",
    block_size: int | None = None,
    rounding: str | None = None,
    verify: bool = True,
    max_kl: float | None = None,
    revision: str | None = None,
    adapter: str | Path | None = None,
    ignore_config_fields: Collection[str] = (),
    force: bool = False,
    progress: Callable[[str], None] | None = None,
) -> ExportReport:
    """Export a Doge checkpoint to a bundle.

    Args:
        model: A directory, or the id of a model on the Hub.
        out: Directory of the bundle; must not exist unless `force`.
        precision: Precision of the weights: "fp32", "fp16", "bf16", "int8" or "int4". None for
            "fp32", or for "fp16" if the device is "cuda".
        kv_cache: Precision of the state: "fp32" or "int8". None for that of the activations.
        context_length: Most tokens that a sequence may have; None for the length that the model was
            trained for.
        target: "ort" for ONNX Runtime's fused kernels, "portable" for standard ONNX.
        device: The device that the graph is made for, "cpu" or "cuda". Activations are float32 on
            the CPU, where "fp16" and "bf16" are the precision of the weights alone; with the layout
            "hub" or the target "portable", they are that of the activations, too. On CUDA,
            activations are float16, or bfloat16 with that precision.
        state: "growing" for a state with one row for each token, "window" for a state with at most
            as many rows as the model's window has keys, however long the text is.
        layout: "flat" for a graph next to the other files, "hub" for the place where
            transformers.js looks for it.
        format: Format of the graph's file: "onnx", or "ort" for ONNX Runtime's own format, which
            its builds for phones and small boards read.
        block_size: How many quantized weights share a scale; None for the recipe's choice.
        rounding: Rounding of quantized weights, "gptq" or "nearest"; None for the recipe's choice.
        verify: Check the result before it is moved to `out`: compare it with transformers, or, if
            something is quantized, measure how much quality is lost.
        max_kl: Most that quantization may lose, in nats per token; None for no limit.
        revision: Branch, tag or commit of a model on the Hub.
        adapter: A LoRA adapter in the format of PEFT, which is merged into the checkpoint: a
            directory, or the id of one on the Hub.
        ignore_config_fields: Fields of config.json to do without: those that are not understood,
            and that the caller knows not to matter.
        force: Replace a bundle that exists at `out`.
        progress: Called with a few words when a step begins.

    Raises:
        DogeOnnxError: A subclass, if the arguments, the checkpoint, the destination or the result
            are wrong. The export then leaves no files behind.
    """
    started = time.perf_counter()
    # Absolute, so that "." and "x/.." have a name and a parent.
    out = Path(os.path.abspath(out))
    report = progress or (lambda _: None)
    chosen = for_web(find_target(target)) if layout == "hub" else find_target(target)
    default = half.default_precision(device)
    precision = default if precision is None else precision
    activations = half.activation_type(precision, device, target, layout)
    weights = half.weight_type(precision, activations)
    quantized = precision in RECIPES or kv_cache == "int8"
    check_choices(precision, block_size, rounding)
    _check_combination(chosen, state, layout, format, kv_cache, quantized, verify, max_kl)
    _check_activations(activations, device, target, state, kv_cache)
    if format == "ort" and precision in half.HALVES:
        raise DogeOnnxError(
            "the ORT format would hold 16-bit weights in float32; choose another precision, or the "
            "format onnx"
        )
    if max_kl is not None and activations == "bfloat16" and (missing := missing_for_cuda()):
        raise DeviceError(f"a loss in bf16 can be measured on CUDA only, and {missing}")
    graph = bundle.graph_name(layout, precision)
    bundle.check_destination(out, force)
    source = checkpoints.find(model, revision, adapter)
    side_files = sidecar.read(source, ignore_config_fields)
    notes = list(side_files.notes)
    taken_over = metadata.inherited(source, notes.append)
    checkpoint = checkpoints.read_source(source, report, ignore_config_fields)
    _check_ignored(ignore_config_fields, checkpoint.config)
    if "float16" in (activations, half.HALVES.get(precision)):
        half.check_weights(checkpoint)
    length = _context_length(context_length, checkpoint.config)
    if quantized and verify and length < 2:
        raise DogeOnnxError(
            "with a context length of 1 there is no loss to measure: choose more, or turn "
            "verification off"
        )
    recipe = recipe_for(precision, block_size, rounding, checkpoint.config)
    built = _build_state(state, kv_cache, activations, checkpoint, length, chosen)
    size = round(_bytes_per_weight(recipe, precision) * checkpoint.parameters)
    size += 4 * built.table_size
    if format == "ort":
        ort_format.check_size(size)
    # The conversion needs the graph in both formats at once.
    copies = 2 if format == "ort" else 1
    parity, lost, unchecked = None, None, None
    parameters = checkpoint.parameters
    with bundle.writing(out, force) as directory:
        bundle.check_free_space(directory.parent, copies * size + _SMALL_FILES_BYTES)
        # The step moves the tensors, so that memory never holds a large model twice. But a
        # quantized model is compared with its checkpoint, which then has to stay.
        own = checkpoint.shared() if quantized else checkpoint
        calibrates = kv_cache == "int8" or (recipe is not None and recipe.rounding == "gptq")
        text = None
        if calibrates or activations == "float16":
            rows = _CALIBRATION_ROWS[parameters >= _LARGE]
            rows = rows if calibrates else _RANGE_ROWS
            text = calibration_text(checkpoint, length, rows, report)
        if text is not None and activations == "float16":
            half.check_activations(checkpoint, text, report)
        report("building the recurrent step")
        if weights is not None:
            half.round_weights(own, weights)
        step = RecurrentStep(own, built, chosen.operators)
        if quantized:
            quantize(step, recipe, text if calibrates else None, report)
        if weights is not None:
            step.shorten(weights)
        if activations != "float32":
            step.halve()
        path = directory / graph
        read = _write_graph(step, chosen, path, size <= MAX_EMBEDDED_BYTES, report)
        # Frees memory that the next steps need.
        del step
        if format == "ort":
            report("writing the ORT format")
            path = ort_format.convert(path)
            (directory / bundle.WEIGHTS_NAME).unlink(missing_ok=True)
        manifest = Manifest(
            target=target,
            device=half.made_for(activations, device),
            precision=precision,
            activations=activations,
            context_length=length,
            vocab_size=checkpoint.config.vocab_size,
            parameters=parameters,
            weights_read=read,
            state=_state_layout(built, checkpoint.config, chosen),
            graph=path.relative_to(directory).as_posix(),
            source=_origin(source),
            versions=_versions(),
            # ONNX Runtime's own format has no functions: their bodies take their places.
            native_operators=chosen.functions and activations == "float32" and format != "ort",
            ignored_fields=checkpoint.config.ignored,
            notes=tuple(notes),
        )
        sidecar.write(side_files, source, checkpoint.config, manifest, directory)
        draft = Bundle.draft(directory, manifest)
        try:
            if verify and quantized:
                lost = quality.measure(draft, checkpoint, progress=report)
            elif verify:
                parity = compare(draft, source, report)
        except DeviceError as error:
            if max_kl is not None:
                raise
            unchecked = str(error)
        if lost is not None:
            # Even without a limit, the loss must be a number.
            lost.require(math.inf if max_kl is None else max_kl, str(out))
            manifest = replace(manifest, quality=lost.as_dict())
        if parity is not None:
            parity.require(str(out))
            manifest = replace(manifest, parity=parity_figures(parity, source))
        card.write(source, checkpoint.config, taken_over, Bundle.draft(directory, manifest))
        manifest = bundle.seal(directory, manifest)
        size = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
    seconds = time.perf_counter() - started
    return ExportReport(out, manifest, parity, lost, size, seconds, unchecked)


def _check_combination(
    target: Target,
    state: str,
    layout: str,
    format: str,
    kv_cache: str | None,
    quantized: bool,
    verify: bool,
    max_kl: float | None,
) -> None:
    """Check the arguments that do not depend on the model.

    Raises:
        DogeOnnxError: An argument is unknown, or two of them exclude each other.
    """
    if state not in STATES:
        raise DogeOnnxError(f"state {state!r} is not known; choose from {', '.join(STATES)}")
    if kv_cache is not None and kv_cache not in KV_CACHES:
        raise DogeOnnxError(
            f"KV cache {kv_cache!r} is not known; choose from {', '.join(KV_CACHES)}"
        )
    if format not in FORMATS:
        raise DogeOnnxError(f"format {format!r} is not known; choose from {', '.join(FORMATS)}")
    if format == "ort" and layout != "flat":
        raise DogeOnnxError("transformers.js reads no ORT format; choose the layout flat with it")
    if format == "ort" and target is not find_target("ort"):
        raise DogeOnnxError("only ONNX Runtime reads the ORT format; choose the target ort with it")
    if state == "window" and kv_cache == "int8":
        raise DogeOnnxError("a window state is fp32: what drops out of it is decided by its gates")
    if quantized and not target.quantized:
        raise DogeOnnxError(
            "standard ONNX has no fast operators for quantized weights or states; choose the "
            "target ort, or fp32 for both"
        )
    if max_kl is not None and not quantized:
        raise DogeOnnxError("a limit of the loss is for quantized bundles; nothing is quantized")
    if max_kl is not None and not verify:
        raise DogeOnnxError("the loss is not measured when verification is off: drop one of both")
    if max_kl is not None and not (isinstance(max_kl, int | float) and max_kl >= 0):
        raise DogeOnnxError(f"the limit of the loss must be 0 or more nats, not {max_kl!r}")
    if quantized:
        require_kernels("MatMulNBits", "GatherBlockQuantized", "GroupQueryAttention")


def _check_ignored(wanted: Collection[str], config: DogeConfig) -> None:
    """Check that the fields that are to be ignored are there.

    Raises:
        ConfigError: One of them is not; it may be misspelt.
    """
    missing = [name for name in wanted if name not in config.ignored]
    if missing:
        raise ConfigError(f"{CONFIG_NAME} has no field {missing[0]}, which was to be ignored")


def _check_activations(
    activations: str, device: str, target: str, state: str, kv_cache: str | None
) -> None:
    """Check that the type of the activations suits the device, the target and the state.

    Raises:
        DogeOnnxError: It does not.
    """
    if activations == "float32":
        if device == "cuda" and target == "ort":
            raise DogeOnnxError(
                "ONNX Runtime's attention on CUDA takes fp16 and bf16, not fp32: choose one of "
                "them, or the target portable"
            )
        return
    if state == "window":
        raise DogeOnnxError(
            "a window state is fp32, since it tells tokens apart by their positions: choose the "
            "precision fp32, or a growing state"
        )
    if kv_cache == "fp32":
        raise DogeOnnxError(
            f"with activations in {activations}, a state is {activations}, too, or int8: leave "
            "the choice of fp32 out"
        )


def _bytes_per_weight(recipe: Recipe | None, precision: str) -> float:
    """Approximate bytes of a weight in the file, with its share of the scales."""
    if recipe is None:
        return 2.0 if precision in half.HALVES else 4.0
    return max(recipe.body.bits / 8 + 4 / recipe.body.block_size, 1.0)


def calibration_text(
    checkpoint: Checkpoint, context_length: int, rows: int, report: Callable[[str], None]
) -> torch.Tensor:
    """Texts that the model writes itself, to calibrate with: they are like what it sees in use.

    Args:
        checkpoint: The model's; keeps its tensors.
        context_length: Most tokens of a sequence.
        rows: Number of sequences.
        report: Called with a few words.

    Returns:
        Token ids, int64 `[rows, S]`.
    """
    report("writing a text for calibration")
    length = min(_CALIBRATION_LENGTH, context_length)
    return torch.from_numpy(EagerModel(checkpoint, length).sample(_CALIBRATION_SEED, rows, length))


def _context_length(asked: int | None, config: DogeConfig) -> int:
    length = config.max_position_embeddings if asked is None else asked
    if isinstance(length, bool) or not isinstance(length, int) or length < 1:
        raise DogeOnnxError(f"context length {length!r} is not a positive whole number")
    if length > MAX_CONTEXT_LENGTH:
        raise DogeOnnxError(
            f"context length {length} is more than {MAX_CONTEXT_LENGTH}; a window state has no end"
        )
    return length


def _build_state(
    name: str,
    kv_cache: str | None,
    activations: str,
    checkpoint: Checkpoint,
    length: int,
    target: Target,
) -> State:
    if name == "growing":
        dtype = activations if kv_cache is None else KV_CACHES[kv_cache]
        state = GrowingState(checkpoint, length, target.operators, dtype, activations)
        if kv_cache == "int8" and state.window is not None:
            raise DogeOnnxError(
                f"past the window of {state.window} keys an int8 state cannot tell which gates "
                f"are largest; choose a context length of at most {state.window}, or fp32"
            )
        return state
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
        dtype=state.dtype if isinstance(state, GrowingState) else "float32",
        keep_window_size=config.keep_window_size,
        # A window state only has rows overwritten, which standard operators can do in place, too.
        in_place=target.in_place or isinstance(state, WindowState),
        closing=state.closing,
    )


def _write_graph(
    step: RecurrentStep,
    target: Target,
    path: Path,
    embedded: bool,
    report: Callable[[str], None],
) -> WeightsRead:
    """Trace a step, write the graph and check it; returns the bytes of weights that a step reads.

    Raises:
        BundleError: The graph is not valid ONNX.
    """
    report("tracing the graph")
    model = trace(step, target)
    read = weights_read(model)
    model.producer_name = "doge-onnx"
    model.producer_version = importlib.metadata.version("doge-onnx")
    report("writing the graph")
    path.parent.mkdir(exist_ok=True)
    weights = path.name + bundle.WEIGHTS_SUFFIX
    _align_weights(model.graph)
    ir.save(model, path, external_data=None if embedded else weights)
    report("checking the graph")
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise BundleError(f"the exported graph is not valid ONNX: {error}") from error
    return read


def _align_weights(graph: ir.Graph) -> None:
    """Order weights so that each begins at a multiple of 64 bytes in a file, if its size is one.

    Loads of kernels then stay in one cache line. Sizes of smaller powers of 2 come behind, the
    largest first, so that no element is cut by its alignment either.
    """

    def alignment(value: ir.Value) -> int:
        size = 0 if value.const_value is None else value.const_value.nbytes
        return min(size & -size, _CACHE_LINE)

    ordered = sorted(graph.initializers.values(), key=alignment, reverse=True)
    graph.initializers.clear()
    for value in ordered:
        graph.initializers.add(value)


def _origin(source: checkpoints.Source) -> dict[str, str | None]:
    """What a manifest says of the checkpoint that a bundle was made from."""
    origin = {"model": source.model, "revision": source.revision}
    if source.adapter is not None:
        origin |= {"adapter": source.adapter.model, "adapter_revision": source.adapter.revision}
    return origin


def _versions() -> dict[str, str]:
    names = ("doge-onnx", "torch", "transformers", "onnx", "onnxscript", "onnxruntime")
    return {name: importlib.metadata.version(name) for name in names}
