"""Size, memory and speed of each released shape on small machines: the table in docs/edge.md.

    python benchmarks/edge.py [--shapes 20M 60M 160M 320M] [--write]

Weights are random: size, memory and speed do not depend on their values. Quality is measured by
benchmarks/precisions.py. Peak memory and the time to the first token are those of fresh
processes. All shapes take about eleven minutes on two quiet cores, and 5 GB of disk. --write
replaces the table. The last line of the output is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from checkpoints import SHAPES, random_checkpoint
from rich.console import Console
from rich.progress import Progress
from tables import replace_table

import doge_onnx
from doge_onnx.bundle import WEIGHTS_NAME, read_manifest, seal
from doge_onnx.export import exporter, ort_format, rounding

DOCUMENT = Path(__file__).parent.parent / "docs" / "edge.md"
RELEASED = ("20M", "60M", "160M", "320M")
# Weights, state, format.
CHOICES = [
    ("fp32", "fp32", "onnx"),
    ("int8", "fp32", "onnx"),
    ("int8", "fp32", "ort"),
    ("int8", "int8", "onnx"),
    ("int4", "fp32", "onnx"),
    ("int4", "int8", "onnx"),
]
CONTEXTS = (16, 512)
TOKENS = 1000


def main() -> None:
    """Measure, and print or write what was measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", default=RELEASED, choices=SHAPES)
    parser.add_argument("--repetitions", type=int, default=2)
    parser.add_argument("--write", action="store_true", help="replace the table")
    arguments = parser.parse_args()
    transformers.logging.disable_progress_bar()
    # Saves time: random weights need neither a text that the model writes, for the steps of an int8
    # state, nor the search for good scales. Speed does not depend on them.
    exporter.calibration_text = lambda *_: torch.arange(16).unsqueeze(0)
    rounding.TRIED_SCALES = dict.fromkeys(rounding.TRIED_SCALES, torch.ones(1))

    rows = []
    with Progress() as progress:
        task = progress.add_task("", total=len(arguments.shapes) * len(CHOICES))
        for shape in arguments.shapes:
            with tempfile.TemporaryDirectory() as scratch:
                checkpoint = random_checkpoint(Path(scratch), shape)
                for choice in CHOICES:
                    progress.update(task, description=" ".join((shape, *choice)))
                    rows.append(measure(checkpoint, shape, choice, arguments.repetitions))
                    progress.advance(task)
    lines = list(table(rows))
    Console(width=160, highlight=False, markup=False).print("\n".join(lines))
    if arguments.write:
        replace_table(DOCUMENT, "edge", lines)
    print(json.dumps({"rows": rows}))


def measure(
    checkpoint: Path, shape: str, choice: tuple[str, str, str], repetitions: int
) -> dict[str, Any]:
    """One row of the table."""
    weights, kv_cache, graph_format = choice
    bundle = checkpoint.parent / "bundle"
    # The row before has exported the same weights; only the format differs.
    if graph_format == "ort":
        convert(bundle)
    else:
        options: dict[str, Any] = {"precision": weights, "kv_cache": kv_cache, "verify": False}
        if weights != "fp32":
            options["rounding"] = "nearest"
        doge_onnx.export(checkpoint, bundle, force=True, **options)
    report = doge_onnx.bench(bundle, contexts=CONTEXTS, batches=[1], repetitions=repetitions)
    cells = {cell.context: cell for cell in report.cells}
    short, long = (cells[context] for context in CONTEXTS)
    peak = report.start.peak_memory_bytes
    return {
        "shape": shape,
        "weights": weights,
        "state": kv_cache,
        "format": graph_format,
        "file_bytes": report.file_bytes,
        "peak_memory_bytes": None if peak is None else peak.median,
        "state_bytes": read_manifest(bundle).state.token_bytes * TOKENS,
        "decode": {cell.context: cell.decode_tokens_per_second.median for cell in (short, long)},
        "prefill": long.prefill_tokens_per_second.median,
        "read_bytes_per_token": long.bytes_per_token,
        "first_token_seconds": report.start.first_token_seconds.median,
        "read_bytes_per_second": report.read_bytes_per_second,
        "machine": report.machine,
    }


def convert(bundle: Path) -> None:
    """Convert a bundle to the ORT format, as an export does."""
    manifest = read_manifest(bundle)
    graph = ort_format.convert(bundle / manifest.graph)
    (bundle / WEIGHTS_NAME).unlink(missing_ok=True)
    seal(bundle, replace(manifest, graph=graph.name))


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """The rows as Markdown, and the machine that they were measured on."""
    short, long = CONTEXTS
    yield ""
    yield (
        f"| shape | weights | state | format | file | peak memory | state of {TOKENS:,} tokens "
        f"| decode at {short} | at {long} | prefill of {long} | read per token | first token |"
    )
    yield "|---|---|---|---|" + "---:|" * 8
    for row in rows:
        peak = row["peak_memory_bytes"]
        yield (
            f"| {row['shape']} | {row['weights']} | {row['state']} | {row['format']} "
            f"| {megabytes(row['file_bytes'])} | {'-' if peak is None else megabytes(peak)} "
            f"| {row['state_bytes'] / 1e6:.1f} MB | {row['decode'][short]:.0f} tok/s "
            f"| {row['decode'][long]:.0f} tok/s | {row['prefill']:.0f} tok/s "
            f"| {megabytes(row['read_bytes_per_token'])} | {row['first_token_seconds']:.2f} s |"
        )
    machine = rows[-1]["machine"]
    bandwidth = max(row["read_bytes_per_second"] for row in rows)
    yield ""
    yield (
        f"Measured on {machine['system']}, {machine['processor']}, {machine['cores']} cores, which "
        f"read {bandwidth / 1e9:.0f} GB/s together; onnxruntime {machine['onnxruntime']}."
    )
    yield ""


def megabytes(count: float) -> str:
    """A number of bytes for a person."""
    return f"{count / 1e6:,.0f} MB"


if __name__ == "__main__":
    main()
