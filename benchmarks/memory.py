"""Peak memory and time of a long prompt, in one piece and in chunks.

    python benchmarks/memory.py [--shape 160M] [--tokens 2000] [--chunks 2000 512 256 128]

Each row is measured in a process of its own, which loads the bundle, notes its memory, and reads
the prompt. The last line of the output is one JSON object. Runs on Linux only, because it reads
the memory from /proc.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import doge_onnx

ROUNDS = 3


def main() -> None:
    """Measure, and print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="160M")
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--chunks", nargs="+", type=int, default=[2000, 512, 256, 128, 64])
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(*arguments.measure)))
        return

    import transformers
    from checkpoints import random_checkpoint

    transformers.logging.disable_progress_bar()
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        bundle = Path(scratch) / "bundle"
        checkpoint = random_checkpoint(Path(scratch), arguments.shape)
        doge_onnx.export(checkpoint, bundle, verify=False)
        for chunk in arguments.chunks:
            command = [sys.executable, __file__, "--measure"]
            command += [str(bundle), str(chunk), str(arguments.tokens)]
            rows.append(json.loads(subprocess.check_output(command)))
    table = Table("chunk", "tokens/s", "loaded, MB", "prefill adds, MB")
    for row in rows:
        table.add_row(
            str(row["chunk"]),
            f"{row['tokens_per_s']:.0f}",
            f"{row['loaded_mb']:.0f}",
            f"{row['added_mb']:.0f}",
        )
    Console(width=100).print(table)
    print(json.dumps({"shape": arguments.shape, "tokens": arguments.tokens, "rows": rows}))


def measure(bundle: str, chunk: str, tokens: str) -> dict[str, Any]:
    """Read a prompt of `tokens` tokens in this process."""
    model = doge_onnx.load(bundle, prefill_chunk=int(chunk))
    prompt = list(range(1, int(tokens) + 1))
    model.forward([prompt[:1]])
    # Reset the peak: loading needs more memory than stays in use afterwards.
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    loaded = peak_mb()
    model.forward([prompt])
    added = peak_mb() - loaded
    times = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        model.forward([prompt])
        times.append(time.perf_counter() - started)
    return {
        "chunk": int(chunk),
        "tokens_per_s": int(tokens) / statistics.median(times),
        "loaded_mb": loaded,
        "added_mb": added,
    }


def peak_mb() -> float:
    """The most memory that this process used since the peak was last reset, in MiB."""
    status = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    line = next(line for line in status if line.startswith("VmHWM:"))
    return int(line.split()[1]) / 1024


if __name__ == "__main__":
    main()
