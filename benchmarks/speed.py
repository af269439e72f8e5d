"""Decode and prefill speed against transformers, on one machine and in one run.

    python benchmarks/speed.py [--shapes 20M 160M] [--contexts 16 512 1900] [--rounds 5]

Prints a table and, as the last line, one JSON object. Both models have the same random weights in
float32; transformers runs its default attention through `generate`. Rounds alternate between the
two and medians are compared, because a machine's speed changes with time. MBU (memory-bandwidth
utilisation) is the bytes that one decode step must read, weights and state, divided by its time
and by the machine's read bandwidth, which is measured in the same run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Before the import of onnxruntime, which otherwise leaves files in the home directory.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
import numpy as np
import onnxruntime
import torch
import transformers
from checkpoints import SHAPES, random_checkpoint
from rich.console import Console
from rich.table import Table

import doge_onnx
from doge_onnx.measure.bandwidth import default_threads, read_bandwidth

PREFILL = 512
DECODED = 32


def main() -> None:
    """Measure, and print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", default=["20M", "160M"], choices=SHAPES)
    parser.add_argument("--contexts", nargs="+", type=int, default=[16, 512, 1900])
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

    bandwidth = read_bandwidth(default_threads())
    watch_onnxruntime()
    rows = []
    for shape in arguments.shapes:
        with tempfile.TemporaryDirectory() as scratch:
            checkpoint = random_checkpoint(Path(scratch), shape)
            doge_onnx.export(checkpoint, Path(scratch) / "bundle", verify=False)
            ours = Ours(Path(scratch) / "bundle")
            theirs = Theirs(checkpoint)
            for context in arguments.contexts:
                rows.append(compare_decode(shape, context, ours, theirs, arguments, bandwidth))
            rows.append(compare_prefill(shape, ours, theirs, arguments))

    table = Table(
        "shape", "what", "transformers tok/s", "doge-onnx tok/s", "ratio", "MBU", "Python µs"
    )
    for row in rows:
        what = f"decode at {row['context']}" if "context" in row else f"prefill of {PREFILL}"
        mbu = f"{row['mbu']:.0%}" if "mbu" in row else ""
        python = f"{row['python_us']:.0f}" if "python_us" in row else ""
        speeds = (f"{row[name]:.1f}" for name in ("transformers", "doge_onnx", "ratio"))
        table.add_row(row["shape"], what, *speeds, mbu, python)
    Console(width=100).print(table)
    machine = {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "read_gb_per_s": round(bandwidth / 1e9, 1),
        "onnxruntime": onnxruntime.__version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
    }
    print(json.dumps({"machine": machine, "rows": rows}))


class Ours:
    """The exported bundle."""

    # Seconds inside ONNX Runtime; the rest of a step's time is Python's.
    inside = 0.0

    def __init__(self, bundle: Path) -> None:
        self.model = doge_onnx.load(bundle)
        self.weight_bytes = 4 * self.model.manifest.parameters
        state = self.model.manifest.state
        self.row_bytes = 8 * state.num_layers * state.num_heads * state.row_size

    def prefill(self, ids: list[int]) -> None:
        """Read a prompt."""
        self.model.forward([ids])

    def generate(self, ids: list[int], count: int) -> None:
        """Generate greedily."""
        self.model.generate(ids, max_new_tokens=count)


class Theirs:
    """The same checkpoint in transformers."""

    def __init__(self, checkpoint: Path) -> None:
        model: Any = transformers.DogeForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
        self.model = model.eval()

    @torch.no_grad()
    def prefill(self, ids: list[int]) -> None:
        """Read a prompt, and compute only the last logits."""
        self.model(torch.tensor([ids]), logits_to_keep=1)

    @torch.no_grad()
    def generate(self, ids: list[int], count: int) -> None:
        """Generate greedily."""
        self.model.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
            max_new_tokens=count,
            do_sample=False,
        )


def watch_onnxruntime() -> None:
    """Add the time of each run of a graph to `Ours.inside`."""
    run = onnxruntime.InferenceSession.run_with_iobinding

    def timed(*arguments: Any) -> None:
        started = time.perf_counter()
        run(*arguments)
        Ours.inside += time.perf_counter() - started

    onnxruntime.InferenceSession.run_with_iobinding = timed


def compare_decode(
    shape: str,
    context: int,
    ours: Ours,
    theirs: Theirs,
    arguments: argparse.Namespace,
    bandwidth: float,
) -> dict[str, Any]:
    """Compare the time per generated token after a prompt of `context` tokens."""
    ids = prompt(context)
    their_times, our_times, python_times = [], [], []
    for _ in range(arguments.rounds):
        their_times.append(per_token(lambda count: theirs.generate(ids, count)))
        inside: list[float] = []

        def run(count: int, inside: list[float] = inside) -> None:
            Ours.inside = 0.0
            ours.generate(ids, count)
            inside.append(Ours.inside)

        our_times.append(per_token(run))
        python_times.append(our_times[-1] - (inside[-1] - inside[-2]) / DECODED)
    theirs_s, ours_s = statistics.median(their_times), statistics.median(our_times)
    read = ours.weight_bytes + ours.row_bytes * (context + DECODED / 2)
    return {
        "shape": shape,
        "context": context,
        "transformers": 1 / theirs_s,
        "doge_onnx": 1 / ours_s,
        "ratio": theirs_s / ours_s,
        "mbu": read / ours_s / bandwidth,
        "python_us": 1e6 * statistics.median(python_times),
    }


def compare_prefill(
    shape: str, ours: Ours, theirs: Theirs, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Compare the time to read a prompt of `PREFILL` tokens."""
    ids = prompt(PREFILL)
    times: dict[str, list[float]] = {"transformers": [], "doge_onnx": []}
    for _ in range(arguments.rounds):
        times["transformers"].append(seconds(lambda: theirs.prefill(ids)))
        times["doge_onnx"].append(seconds(lambda: ours.prefill(ids)))
    speeds = {name: PREFILL / statistics.median(values) for name, values in times.items()}
    return {"shape": shape, **speeds, "ratio": speeds["doge_onnx"] / speeds["transformers"]}


def per_token(generate: Callable[[int], None]) -> float:
    """Seconds of one decode step: a long run minus a run of one token, so without prefill."""
    short = seconds(lambda: generate(1))
    return (seconds(lambda: generate(1 + DECODED)) - short) / DECODED


def seconds(function: Callable[[], object]) -> float:
    """Wall time of one call."""
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def prompt(length: int) -> list[int]:
    """Random token ids."""
    ids: list[int] = np.random.default_rng(length).integers(0, 32768, length).tolist()
    return ids


if __name__ == "__main__":
    main()
