"""Measures the speed of a bundle on this machine: prefill and decode, and a report of all figures.

Knows what is measured, in which order, and how many bytes a decode step must read. Does not know
how to measure a fresh process (`start_up`) or bandwidth (`bandwidth`), or how figures are printed
(`cli_output`). Uses the timings that `generate` reports for greedy texts that no token ends;
turning tokens into text is not counted.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime as ort

import doge_onnx
from doge_onnx.bundle import Bundle
from doge_onnx.errors import InputError
from doge_onnx.manifest import Manifest
from doge_onnx.measure.bandwidth import copy_bandwidth, default_threads, read_bandwidth
from doge_onnx.measure.start_up import StartReport, measure_start, summarise_start
from doge_onnx.measure.workload import Cell, Spread, generate_plain, random_prompts
from doge_onnx.runtime.cuda.device_memory import DeviceMemory
from doge_onnx.runtime.engine.device import CPU
from doge_onnx.runtime.engine.external_data import external_files
from doge_onnx.runtime.engine.kernels import Kernels
from doge_onnx.runtime.generation.output import Timings
from doge_onnx.runtime.model import Model, load

DEFAULT_CONTEXTS = (16, 512, 1900)
DEFAULT_BATCHES = (1, 8)
DEFAULT_TOKENS = 16
DEFAULT_REPETITIONS = 3
# Tokens of the prompt in a fresh process, unless the context is shorter.
_START_CONTEXT = 512

Generate = Callable[[list[list[int]], int], Timings]


@dataclass(frozen=True)
class LeftOut:
    """A length of prompts that was not measured, and the reason."""

    context: int
    reason: str


@dataclass(frozen=True)
class CellReport:
    """Speed of one batch of prompts of equal length.

    Attributes:
        context: Tokens of each prompt.
        batch: Number of sequences.
        first_token_seconds: Time from the prompts to the first token of each.
        prefill_tokens_per_second: Prompt tokens of all sequences per second.
        step_seconds: Time of one decode step: the mean over the steps of a repetition.
        decode_tokens_per_second: Generated tokens of all sequences per second.
        bytes_per_step: Bytes that a decode step must read: each weight once (of tables in which
            tokens look up rows, only those rows) and all rows of the state.
        bytes_per_token: `bytes_per_step` divided by the batch.
        mbu: Memory-bandwidth utilisation: `bytes_per_step`, divided by the median time of a step
            and by the read bandwidth. Above 1 if caches hold part of what is read.
    """

    context: int
    batch: int
    first_token_seconds: Spread
    prefill_tokens_per_second: Spread
    step_seconds: Spread
    decode_tokens_per_second: Spread
    bytes_per_step: int
    bytes_per_token: float
    mbu: float


@dataclass(frozen=True)
class BenchReport:
    """All figures of a measurement.

    Attributes:
        bundle: Directory of the bundle, or its id on the Hub.
        precision: Precision of its weights.
        state: Kind and element type of its state.
        file_bytes: Bytes of graph and weights on the disk.
        machine: Processor, cores, system, and versions of the libraries.
        device: Where the model ran, "cpu" or "cuda".
        cuda_graph: Whether CUDA may have replayed decode steps; see `load`.
        kernels: Which kernels ran the model.
        threads: The number asked for, or else the default of `load`; the bandwidth is measured
            with the same number.
        read_bytes_per_second: Bytes per second that this many threads read from memory, at best; on
            a GPU, the bytes that a copy in its memory reads and writes.
        tokens: Decode steps of each repetition.
        repetitions: How often each figure was measured.
        start: Start-up time and memory of fresh processes.
        cells: Speed for each context and batch.
        left_out: Contexts that could not be measured.
    """

    bundle: str
    precision: str
    state: str
    file_bytes: int
    machine: dict[str, Any]
    device: str
    cuda_graph: bool
    kernels: Kernels
    threads: int
    read_bytes_per_second: float
    tokens: int
    repetitions: int
    start: StartReport
    cells: tuple[CellReport, ...]
    left_out: tuple[LeftOut, ...]

    def as_dict(self) -> dict[str, Any]:
        """The report as a dict that can be written as JSON."""
        return asdict(self)


class Samples(NamedTuple):
    """Times of each repetition of a cell, in seconds: to the first token, and of one step."""

    prefill: list[float]
    step: list[float]


def bench(
    bundle: str | Path | Bundle,
    *,
    contexts: Sequence[int] | None = None,
    batches: Sequence[int] | None = None,
    tokens: int | None = None,
    repetitions: int | None = None,
    threads: int | None = None,
    device: str = "auto",
    cuda_graph: bool | None = None,
    native: bool = True,
    progress: Callable[[str], None] | None = None,
) -> BenchReport:
    """Measure a bundle on this machine. See `doge_onnx.bench`."""
    report = progress or (lambda _: None)
    contexts = _counts("contexts", DEFAULT_CONTEXTS if contexts is None else contexts)
    batches = _counts("batches", DEFAULT_BATCHES if batches is None else batches)
    (tokens,) = _counts("tokens", [DEFAULT_TOKENS if tokens is None else tokens])
    (repetitions,) = _counts(
        "repetitions", [DEFAULT_REPETITIONS if repetitions is None else repetitions]
    )
    opened = Bundle.open(bundle)
    manifest = opened.manifest
    cells, left_out = choose_cells(manifest, contexts, batches, tokens)
    if not cells:
        raise InputError(
            f"no context fits into the {manifest.context_length} tokens of {opened.name} together "
            f"with the {tokens + 1} that are generated"
        )
    # Before the fresh processes, so that this process holds no model while they run.
    report("loading and warming up")
    model = load(opened, device, threads, cuda_graph=cuda_graph, native=native)
    ran_on, captured, kernels = model.device, model.cuda_graph, model.kernels
    samples, bandwidth = _measure_model(
        model, cells, tokens, repetitions, threads or default_threads(), report
    )
    del model
    start_context = _START_CONTEXT
    if manifest.state.kind != "window":
        start_context = min(start_context, manifest.context_length - tokens - 1)
    starts = []
    for number in range(repetitions):
        report(f"starting a fresh process, {number + 1} of {repetitions}")
        starts.append(
            measure_start(opened.path, threads, start_context, tokens, ran_on, cuda_graph, native)
        )
    graph = opened.graph
    files = {graph} | {graph.parent / name for name in external_files(graph)}
    file_bytes = sum(path.stat().st_size for path in files)
    return BenchReport(
        bundle=opened.name,
        precision=manifest.precision,
        state=f"{manifest.state.kind}, {manifest.state.dtype}",
        file_bytes=file_bytes,
        machine=_machine(),
        device=ran_on,
        cuda_graph=captured,
        kernels=kernels,
        threads=threads or default_threads(),
        read_bytes_per_second=bandwidth,
        tokens=tokens,
        repetitions=repetitions,
        start=summarise_start(starts, start_context, file_bytes),
        cells=tuple(
            summarise_cell(cell, samples[cell], step_bytes(manifest, cell, tokens), bandwidth)
            for cell in cells
        ),
        left_out=tuple(left_out),
    )


def choose_cells(
    manifest: Manifest, contexts: Sequence[int], batches: Sequence[int], tokens: int
) -> tuple[list[Cell], list[LeftOut]]:
    """The cells that can be measured, shortest context first, and the contexts that cannot.

    A prompt, the tokens of `tokens` decode steps and the token that the last step chooses must fit
    into the context length.
    """
    cells, left_out = [], []
    longest = manifest.context_length - tokens - 1
    for context in sorted(set(contexts)):
        if manifest.state.kind == "window" or context <= longest:
            cells += [Cell(context, batch) for batch in sorted(set(batches))]
        else:
            left_out.append(
                LeftOut(
                    context,
                    f"{tokens + 1} tokens are generated, so a prompt of at most {max(longest, 0)} "
                    f"fits into the context length of {manifest.context_length}",
                )
            )
    return cells, left_out


def measure_cells(
    generate: Generate,
    cells: Sequence[Cell],
    vocab_size: int,
    tokens: int,
    repetitions: int,
    begin: Callable[[int, Cell], None],
    warm_up_all: bool = False,
) -> dict[Cell, Samples]:
    """Run each cell `repetitions` times.

    Each repetition runs all cells one after another, so that a machine that slows down affects all
    of them. Each batch size is warmed up with its shortest prompts, which is not counted.

    Args:
        generate: Continues prompts by a number of tokens and returns the timings.
        cells: The cells to run.
        vocab_size: Prompts are random token ids below it.
        tokens: Decode steps of each run. The prefill gives one more token before them.
        repetitions: Number of samples of each cell.
        begin: Called with the number of the repetition, from 0, and each cell that it begins.
        warm_up_all: Warm up with all prompts, because a captured step is for some lengths only.
    """
    samples = {cell: Samples([], []) for cell in cells}
    shortest = {cell.batch: cell for cell in sorted(cells, reverse=True)}
    for cell in cells if warm_up_all else shortest.values():
        generate(random_prompts(cell, vocab_size), tokens + 1)
    for repetition in range(repetitions):
        for cell in cells:
            begin(repetition, cell)
            timings = generate(random_prompts(cell, vocab_size), tokens + 1)
            samples[cell].prefill.append(timings.prefill_seconds)
            samples[cell].step.append(timings.decode_seconds / tokens)
    return samples


def step_bytes(manifest: Manifest, cell: Cell, tokens: int) -> int:
    """Bytes that a decode step must read: the average over `tokens` steps after the prompts."""
    state = manifest.state
    rows = [cell.context + step for step in range(tokens)]
    if state.kind == "window" and state.keep_window_size is not None:
        rows = [min(count, state.keep_window_size) for count in rows]
    state_bytes = cell.batch * state.token_bytes * sum(rows) / tokens
    return manifest.weights_read.step_bytes(cell.batch) + round(state_bytes)


def summarise_cell(cell: Cell, samples: Samples, read: int, bandwidth: float) -> CellReport:
    """The figures of a cell.

    Args:
        cell: The cell.
        samples: Times of its repetitions.
        read: Bytes that each of its decode steps reads.
        bandwidth: Bytes per second that the machine reads.
    """
    step = Spread.of(samples.step)
    prompt_tokens = cell.context * cell.batch
    return CellReport(
        context=cell.context,
        batch=cell.batch,
        first_token_seconds=Spread.of(samples.prefill),
        prefill_tokens_per_second=Spread.of([prompt_tokens / s for s in samples.prefill]),
        step_seconds=step,
        decode_tokens_per_second=Spread.of([cell.batch / s for s in samples.step]),
        bytes_per_step=read,
        bytes_per_token=read / cell.batch,
        mbu=read / step.median / bandwidth,
    )


def _measure_model(
    model: Model,
    cells: Sequence[Cell],
    tokens: int,
    repetitions: int,
    threads: int,
    report: Callable[[str], None],
) -> tuple[dict[Cell, Samples], float]:
    """Samples of all cells, and the highest read bandwidth of all repetitions, in bytes/second."""
    bandwidths = []

    def generate(prompts: list[list[int]], count: int) -> Timings:
        return generate_plain(model, prompts, count)[0].timings

    def begin(repetition: int, cell: Cell) -> None:
        if cell == cells[0]:
            if model.device == CPU:
                bandwidths.append(read_bandwidth(threads))
            else:
                bandwidths.append(copy_bandwidth(DeviceMemory(model.device)))
        report(
            f"repetition {repetition + 1} of {repetitions}: context {cell.context}, "
            f"batch {cell.batch}"
        )

    vocab_size = model.manifest.vocab_size
    samples = measure_cells(
        generate, cells, vocab_size, tokens, repetitions, begin, warm_up_all=model.cuda_graph
    )
    return samples, max(bandwidths)


def _machine() -> dict[str, Any]:
    return {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "system": platform.system(),
        "doge_onnx": doge_onnx.__version__,
        "onnxruntime": ort.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


def _counts(name: str, values: Any) -> list[int]:
    """Check that `values` is a list of at least one positive whole number.

    Raises:
        InputError: It is something else.
    """
    if isinstance(values, str) or not isinstance(values, Sequence) or not values:
        raise InputError(f"{name} must be a list of positive whole numbers, not {values!r}")
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InputError(f"{name} must be positive and whole, not {value!r}")
    return list(values)
