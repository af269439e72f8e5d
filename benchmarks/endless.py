"""A long run on a state of constant size: memory and time per token must stay flat.

    python benchmarks/endless.py [--tokens 20000] [--window 256] [--shape 20M]

Generates the tokens with a random checkpoint of the shape. For each tenth of the run, prints the
median time per token and the process's peak memory. The last line of the output is one JSON
object.
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import statistics
import tempfile
import time
from pathlib import Path

import transformers
from checkpoints import SHAPES, random_checkpoint
from rich.console import Console
from rich.table import Table

import doge_onnx

PARTS = 10


def main() -> None:
    """Measure, and print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="20M", choices=SHAPES)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=20_000)
    arguments = parser.parse_args()
    transformers.logging.disable_progress_bar()

    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = random_checkpoint(
            Path(scratch), arguments.shape, keep_window_size=arguments.window
        )
        bundle = Path(scratch) / "bundle"
        doge_onnx.export(checkpoint, bundle, state="window", verify=False)
        model = doge_onnx.load(bundle)
    pieces = model.stream([1, 2, 3], max_new_tokens=arguments.tokens, temperature=1.0, seed=7)
    rows = []
    for part in range(PARTS):
        times = []
        started = time.perf_counter()
        for _ in itertools.islice(pieces, arguments.tokens // PARTS):
            now = time.perf_counter()
            times.append(now - started)
            started = now
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        rows.append(
            {
                "tokens": (part + 1) * arguments.tokens // PARTS,
                "ms_per_token": 1e3 * statistics.median(times),
                "peak_mb": memory,
            }
        )
    table = Table("tokens so far", "ms per token", "peak memory, MB")
    for row in rows:
        table.add_row(f"{row['tokens']:,}", f"{row['ms_per_token']:.3f}", f"{row['peak_mb']:,.0f}")
    Console(width=100).print(table)
    print(json.dumps({"shape": arguments.shape, "window": arguments.window, "rows": rows}))


if __name__ == "__main__":
    main()
