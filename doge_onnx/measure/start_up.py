"""Measures a fresh process: time to its first token, and peak memory.

Knows how to start such a process and what it reports. Does not know the speed of decode steps
(`bench`).
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from doge_onnx.errors import BundleError
from doge_onnx.measure.memory import peak_memory
from doge_onnx.measure.workload import Cell, Spread, generate_plain, random_prompts
from doge_onnx.runtime.model import load

# The program of a fresh process: imports what `doge_onnx.load` imports, then measures the rest.
_FRESH = """
import time
started = time.perf_counter()
import doge_onnx.runtime.model
seconds = time.perf_counter() - started
from doge_onnx.measure.start_up import print_start
print_start(seconds)
"""


@dataclass(frozen=True)
class StartReport:
    """Start-up time and memory of fresh processes, with all files in the system's cache.

    Attributes:
        import_seconds: Time to import the modules that `doge_onnx.load` needs.
        load_seconds: Time of `doge_onnx.load`, which checks every file, without the imports.
        first_token_seconds: Time from the first import to the first token of a prompt of one token:
            imports, load and the first step together.
        context: Tokens of the prompt that the process then continued.
        peak_memory_bytes: Peak resident memory; None if the system does not report it.
        peak_to_file: Median of the peak memory, divided by the bytes of graph and weights on the
            disk.
    """

    import_seconds: Spread
    load_seconds: Spread
    first_token_seconds: Spread
    context: int
    peak_memory_bytes: Spread | None
    peak_to_file: float | None


def measure_start(
    path: Path,
    threads: int | None,
    context: int,
    tokens: int,
    device: str = "auto",
    cuda_graph: bool | None = None,
    native: bool = True,
) -> dict[str, Any]:
    """Load a bundle and generate with it in a fresh process.

    Args:
        path: Directory of the bundle.
        threads: See `doge_onnx.load`.
        context: Tokens of the prompt.
        tokens: Decode steps after the prompt.
        device: See `doge_onnx.load`.
        cuda_graph: See `doge_onnx.load`.
        native: See `doge_onnx.load`.

    Returns:
        The figures that the process printed; see `print_start`.

    Raises:
        BundleError: The process failed.
    """
    arguments = json.dumps([str(path), threads, context, tokens, device, cuda_graph, native])
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
    """Run as the fresh process of `measure_start`: measure, and print the figures as JSON.

    Args:
        import_seconds: Time that the imports took.
    """
    bundle, threads, context, tokens, device, cuda_graph, native = json.loads(sys.argv[1])
    started = time.perf_counter()
    model = load(bundle, device, threads, cuda_graph=cuda_graph, native=native)
    loaded = time.perf_counter()
    vocab_size = model.manifest.vocab_size
    generate_plain(model, random_prompts(Cell(1, 1), vocab_size), 1)
    first = time.perf_counter()
    generate_plain(model, random_prompts(Cell(context, 1), vocab_size), tokens + 1)
    measured = {
        "import_seconds": import_seconds,
        "load_seconds": loaded - started,
        "first_token_seconds": import_seconds + first - started,
        "peak_memory_bytes": peak_memory(),
    }
    sys.stdout.write(json.dumps(measured))


def summarise_start(starts: Sequence[dict[str, Any]], context: int, file_bytes: int) -> StartReport:
    """Summarise the figures of several fresh processes.

    Args:
        starts: Figures of each process; see `measure_start`.
        context: Tokens of the prompt that each process continued.
        file_bytes: Bytes of graph and weights on the disk.
    """
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
