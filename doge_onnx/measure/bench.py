"""Speed of a bundle on this machine: prefill and decode, start, memory, bandwidth.

Knows what is measured, in which order, and what a decode step must read. Does not know how the
figures are printed. Measures what `generate` reports of itself, greedily and without an end
of the text; turning tokens into text is not counted.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime as ort

import doge_onnx
from doge_onnx.bundle import Bundle, Manifest
from doge_onnx.errors import BundleError, InputError
from doge_onnx.runtime.cuda.device_memory import DeviceMemory
from doge_onnx.runtime.cuda.lock import EXCLUSIVE
from doge_onnx.runtime.engine.device import CPU
from doge_onnx.runtime.engine.external_data import external_files
from doge_onnx.runtime.engine.threads import usable_cores
from doge_onnx.runtime.engine.weights import Weights, read_weights
from doge_onnx.runtime.generation.config import GenerationConfig
from doge_onnx.runtime.generation.output import Timings
from doge_onnx.runtime.model import Model, load

DEFAULT_CONTEXTS = (16, 512, 1900)
DEFAULT_BATCHES = (1, 8)
DEFAULT_TOKENS = 16
DEFAULT_REPETITIONS = 3
# Tokens of the prompt of a fresh process, if they fit.
_START_CONTEXT = 512
# More than the caches of most processors, and not so much that it hurts.
_MAX_ARRAY_BYTES = 512 * 2**20
_MIN_ARRAY_BYTES = 16 * 2**20
_READS = 5
# What a fresh process runs: first what `doge_onnx.load` imports, then what measures it.
_FRESH = """
import time
started = time.perf_counter()
import doge_onnx.runtime.model
seconds = time.perf_counter() - started
from doge_onnx.measure.bench import print_start
print_start(seconds)
"""

Generate = Callable[[list[list[int]], int], Timings]
# Greedy whatever the bundle recommends, and no token ends a text: each run has as many steps as it
# was asked for.
_PLAIN = GenerationConfig(
    temperature=0,
    min_new_tokens=0,
    repetition_penalty=1,
    no_repeat_ngram_size=0,
    ignore_eos=True,
)


@dataclass(frozen=True)
class Spread:
    """One figure, measured several times."""

    median: float
    min: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of at least one value."""
        return cls(float(np.median(values)), float(min(values)), float(max(values)))


class Cell(NamedTuple):
    """A prompt of `context` tokens in each of `batch` sequences."""

    context: int
    batch: int


@dataclass(frozen=True)
class LeftOut:
    """A context that was not measured, and why."""

    context: int
    reason: str


@dataclass(frozen=True)
class CellReport:
    """Speed after prompts of one length, in one batch.

    Attributes:
        context: Tokens of each prompt.
        batch: Sequences.
        first_token_seconds: From the prompts to the first token of each.
        prefill_tokens_per_second: Of all sequences together.
        step_seconds: Of one decode step, the mean of a repetition's steps.
        decode_tokens_per_second: Of all sequences together.
        bytes_per_step: What a decode step must read: each weight once (of tables in which rows
            are looked up only those rows) and all rows of the state.
        bytes_per_token: The same divided by the batch.
        mbu: Memory-bandwidth utilisation: `bytes_per_step`, divided by the median time of a
            step and by the read bandwidth. Above 1 where caches hold what is read.
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
class StartReport:
    """What a fresh process needs to get going, its files in the system's cache already.

    Attributes:
        import_seconds: For importing what `doge_onnx.load` needs.
        load_seconds: For `doge_onnx.load` alone, which checks every file; no imports.
        first_token_seconds: From the beginning of the imports to the first token of a prompt
            of one token: imports, load and the first step together.
        context: Tokens of the prompt that the process then continued.
        peak_memory_bytes: The most resident memory that it had; None if the system does not
            tell.
        peak_to_file: Its median, divided by the bytes of graph and weights on the disk.
    """

    import_seconds: Spread
    load_seconds: Spread
    first_token_seconds: Spread
    context: int
    peak_memory_bytes: Spread | None
    peak_to_file: float | None


@dataclass(frozen=True)
class BenchReport:
    """All that was measured.

    Attributes:
        bundle: Its directory.
        precision: Of its weights.
        state: Kind and element type of its state.
        file_bytes: Of graph and weights on the disk.
        machine: Processor, cores, system, and versions of the libraries.
        device: Where the model ran, "cpu" or "cuda".
        cuda_graph: Whether CUDA may have replayed its decode steps; see `load`.
        threads: Asked for, or else one for each core that may be used; bandwidth is measured
            with as many.
        read_bytes_per_second: The best that this many threads read from memory; on a device
            with a memory of its own, the best that a copy there reads and writes.
        tokens: Decode steps of each repetition.
        repetitions: How often each figure was measured.
        start: Of fresh processes.
        cells: One for each context and batch.
        left_out: Those that could not be measured.
    """

    bundle: str
    precision: str
    state: str
    file_bytes: int
    machine: dict[str, Any]
    device: str
    cuda_graph: bool
    threads: int
    read_bytes_per_second: float
    tokens: int
    repetitions: int
    start: StartReport
    cells: tuple[CellReport, ...]
    left_out: tuple[LeftOut, ...]

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON can hold it."""
        return asdict(self)


class Samples(NamedTuple):
    """What each repetition of a cell took: seconds to the first token, and of one step."""

    prefill: list[float]
    step: list[float]


def bench(
    bundle: str | Path,
    *,
    contexts: Sequence[int] | None = None,
    batches: Sequence[int] | None = None,
    tokens: int | None = None,
    repetitions: int | None = None,
    threads: int | None = None,
    device: str = "auto",
    cuda_graph: bool | None = None,
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
            f"no context fits into the {manifest.context_length} tokens of {bundle} together "
            f"with the {tokens + 1} that are generated"
        )
    # Before the fresh processes, so that this one holds no model while they are measured.
    report("loading and warming up")
    model = load(opened.path, device, threads, cuda_graph=cuda_graph)
    ran_on, captured = model.device, model.cuda_graph
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
            measure_start(opened.path, threads, start_context, tokens, ran_on, cuda_graph)
        )
    graph = opened.graph
    files = {graph} | {graph.parent / name for name in external_files(graph)}
    file_bytes = sum(path.stat().st_size for path in files)
    weights, config = read_weights(graph), opened.read_json("config.json")
    return BenchReport(
        bundle=str(bundle),
        precision=manifest.precision,
        state=f"{manifest.state.kind}, {manifest.state.dtype}",
        file_bytes=file_bytes,
        machine=_machine(),
        device=ran_on,
        cuda_graph=captured,
        threads=threads or default_threads(),
        read_bytes_per_second=bandwidth,
        tokens=tokens,
        repetitions=repetitions,
        start=summarise_start(starts, start_context, file_bytes),
        cells=tuple(
            summarise_cell(
                cell, samples[cell], step_bytes(weights, manifest, config, cell, tokens), bandwidth
            )
            for cell in cells
        ),
        left_out=tuple(left_out),
    )


def choose_cells(
    manifest: Manifest, contexts: Sequence[int], batches: Sequence[int], tokens: int
) -> tuple[list[Cell], list[LeftOut]]:
    """What can be measured, shortest context first, and the contexts that cannot.

    A prompt, `tokens` decode steps and the token that the last one chooses must fit into the
    context length.
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

    A repetition runs all cells one after another, so that a machine that becomes slower does so
    for all of them. Each batch is warmed up with its shortest prompts; that is not counted.

    Args:
        generate: Continues prompts by a number of tokens, and says how long that took.
        cells: What to run.
        vocab_size: The prompts are random token ids below it.
        tokens: Decode steps of one run; the token before them comes out of the prefill.
        repetitions: How many samples each cell gets.
        begin: Called with the number of the repetition, from 0, as it begins a cell.
        warm_up_all: Warm up with all prompts, since what is captured is for some lengths only.
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


def random_prompts(cell: Cell, vocab_size: int) -> list[list[int]]:
    """Token ids `[batch, context]`, always the same ones for a cell."""
    ids: list[list[int]] = np.random.default_rng(cell).integers(0, vocab_size, cell[::-1]).tolist()
    return ids


def step_bytes(
    weights: Weights, manifest: Manifest, config: dict[str, Any], cell: Cell, tokens: int
) -> int:
    """Bytes that a decode step must read, on average over `tokens` steps after a prompt.

    Args:
        weights: Of the graph.
        manifest: Of the bundle.
        config: The content of the bundle's config.json.
        cell: Length of the prompts, and their number.
        tokens: How many steps follow.
    """
    state = manifest.state
    experts = _number(config, "num_experts") if config.get("is_moe") is True else 0
    per_token = _number(config, "num_experts_per_tok")
    row = 2 * state.num_layers * state.num_heads * state.row_size * state.item_size
    rows = [cell.context + step for step in range(tokens)]
    if state.kind == "window" and state.keep_window_size is not None:
        rows = [min(count, state.keep_window_size) for count in rows]
    state_bytes = cell.batch * row * sum(rows) / tokens
    return weights.step_bytes(cell.batch, experts, per_token) + round(state_bytes)


def summarise_cell(cell: Cell, samples: Samples, read: int, bandwidth: float) -> CellReport:
    """The figures of a cell, of which each step reads `read` bytes, at bytes per second."""
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


def measure_start(
    path: Path,
    threads: int | None,
    context: int,
    tokens: int,
    device: str = "auto",
    cuda_graph: bool | None = None,
) -> dict[str, Any]:
    """Load a bundle and generate with it in a fresh process; what that one printed.

    Raises:
        BundleError: The process failed.
    """
    arguments = json.dumps([str(path), threads, context, tokens, device, cuda_graph])
    done = subprocess.run(
        [sys.executable, "-c", _FRESH, arguments], capture_output=True, check=False
    )
    if done.returncode != 0:
        lines = done.stderr.decode(errors="replace").split("\n")
        reason = next((line for line in reversed(lines) if line.strip()), "it said nothing")
        raise BundleError(
            f"a fresh process with {path} ended with exit code {done.returncode}: {reason}"
        )
    measured: dict[str, Any] = json.loads(done.stdout)
    return measured


def print_start(import_seconds: float) -> None:
    """Be the fresh process of `measure_start`, whose imports took `import_seconds`."""
    bundle, threads, context, tokens, device, cuda_graph = json.loads(sys.argv[1])
    started = time.perf_counter()
    model = load(bundle, device, threads, cuda_graph=cuda_graph)
    loaded = time.perf_counter()
    vocab_size = model.manifest.vocab_size
    _run(model, random_prompts(Cell(1, 1), vocab_size), 1)
    first = time.perf_counter()
    _run(model, random_prompts(Cell(context, 1), vocab_size), tokens + 1)
    measured = {
        "import_seconds": import_seconds,
        "load_seconds": loaded - started,
        "first_token_seconds": import_seconds + first - started,
        "peak_memory_bytes": peak_memory(),
    }
    sys.stdout.write(json.dumps(measured))


def summarise_start(starts: Sequence[dict[str, Any]], context: int, file_bytes: int) -> StartReport:
    """The figures of several fresh processes, of which each took a prompt of `context`."""
    peaks = [start["peak_memory_bytes"] for start in starts]
    peak = None if None in peaks else Spread.of(peaks)
    return StartReport(
        import_seconds=Spread.of([start["import_seconds"] for start in starts]),
        load_seconds=Spread.of([start["load_seconds"] for start in starts]),
        first_token_seconds=Spread.of([start["first_token_seconds"] for start in starts]),
        context=context,
        peak_memory_bytes=peak,
        peak_to_file=None if peak is None else peak.median / file_bytes,
    )


def peak_memory() -> int | None:
    """The most resident memory that this process had, in bytes; None where nobody tells."""
    # Not getrusage, where there is another way: on Linux that counts the parent's memory, too.
    if (kilobytes := _proc_kilobytes("/proc/self/status", "VmHWM:")) is not None:
        return 1024 * kilobytes
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def read_bandwidth(threads: int) -> float:
    """Bytes per second that `threads` threads together read from memory; the best of several."""
    data = np.ones(_array_bytes() // 8, np.int64)
    parts = np.array_split(data, threads)
    with ThreadPoolExecutor(threads) as pool:
        best = float("inf")
        for _ in range(_READS):
            started = time.perf_counter()
            list(pool.map(np.max, parts))
            best = min(best, time.perf_counter() - started)
    return data.nbytes / best


def copy_bandwidth(memory: DeviceMemory) -> float:
    """Bytes per second that a copy on a device reads and writes; the best of several."""
    rows = _MAX_ARRAY_BYTES // 256
    with EXCLUSIVE:
        source, target = (memory.empty((1, 1, size, 64), "float32") for size in (rows, rows + 1))
        # Not `extended`: on a GPU, memory takes longer to get than to fill.
        copy = memory.extension(source, np.zeros(64, np.float32), target)
        best = float("inf")
        for _ in range(_READS):
            started = time.perf_counter()
            copy()
            best = min(best, time.perf_counter() - started)
    return 2 * 256 * rows / best


def default_threads() -> int:
    """As many threads as a model takes that is not told."""
    return usable_cores() or os.cpu_count() or 1


def _array_bytes() -> int:
    available = _proc_kilobytes("/proc/meminfo", "MemAvailable:")
    if available is None:
        return _MAX_ARRAY_BYTES
    return max(_MIN_ARRAY_BYTES, min(_MAX_ARRAY_BYTES, 1024 * available // 4))


def _proc_kilobytes(path: str, name: str) -> int | None:
    """The number on one line of a file of Linux; None on other systems."""
    try:
        lines = Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith(name)), None)


def _measure_model(
    model: Model,
    cells: Sequence[Cell],
    tokens: int,
    repetitions: int,
    threads: int,
    report: Callable[[str], None],
) -> tuple[dict[Cell, Samples], float]:
    """Samples of all cells, and the best read bandwidth of all repetitions."""
    bandwidths = []

    def generate(prompts: list[list[int]], count: int) -> Timings:
        return _run(model, prompts, count)

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


def _run(model: Model, prompts: list[list[int]], count: int) -> Timings:
    return model.generate_batch(prompts, _PLAIN, max_new_tokens=count)[0].timings


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
    """Positive whole numbers, at least one.

    Raises:
        InputError: They are something else.
    """
    if isinstance(values, str) or not isinstance(values, Sequence) or not values:
        raise InputError(f"{name} must be a list of positive whole numbers, not {values!r}")
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InputError(f"{name} must be positive and whole, not {value!r}")
    return list(values)


def _number(config: dict[str, Any], name: str) -> int:
    value = config.get(name)
    return value if isinstance(value, int) else 0
