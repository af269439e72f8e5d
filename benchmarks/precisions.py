"""Size, speed and loss of each precision: the table in the README and the plot in docs/.

    python benchmarks/precisions.py [--shape 20M] [--text FILE] [--write]

The loss is that of examples/doge-tiny against its own fp32, on a text that the model writes or on
a text from a file. Size and speed are measured with random weights of the shape, since the speed
does not depend on the codes. --write replaces the table and docs/precisions.svg. The last line of
the output is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import transformers
from checkpoints import SHAPES, random_checkpoint
from rich.console import Console
from rich.progress import track
from tables import replace_table

import doge_onnx

ROOT = Path(__file__).parent.parent
TINY = ROOT / "examples" / "doge-tiny"
PAGE = ROOT / "README.md"
PLOT = ROOT / "docs" / "precisions.svg"
# Weights, state.
PRECISIONS = [
    ("fp32", "fp32"),
    ("fp32", "int8"),
    ("int8", "fp32"),
    ("int8", "int8"),
    ("int4", "fp32"),
    ("int4", "int8"),
]
CONTEXTS = (16, 512)
BATCH = 8
EVALUATED = 12_288


def main() -> None:
    """Measure, and print or write what was measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="20M", choices=SHAPES)
    parser.add_argument("--text", type=Path, help="UTF-8 text to measure the quality on")
    parser.add_argument("--repetitions", type=int, default=2)
    parser.add_argument("--write", action="store_true", help="replace table and plot")
    arguments = parser.parse_args()
    transformers.logging.disable_progress_bar()

    with tempfile.TemporaryDirectory() as scratch:
        rows = list(measure(Path(scratch), arguments))
    lines = list(table(rows, arguments.shape))
    Console(width=140, highlight=False, markup=False).print("\n".join(lines))
    if arguments.write:
        replace_table(PAGE, "precisions", lines)
        PLOT.parent.mkdir(exist_ok=True)
        plot(rows, arguments.shape)
    print(json.dumps({"shape": arguments.shape, "rows": rows}))


def measure(scratch: Path, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row for each combination of weights and state."""
    checkpoint = random_checkpoint(scratch, arguments.shape)
    reference = scratch / "reference"
    doge_onnx.export(TINY, reference, verify=False)
    for weights, state in track(PRECISIONS, description="measuring"):
        options: dict[str, Any] = {"precision": weights, "kv_cache": state, "verify": False}
        tiny = scratch / f"tiny-{weights}-{state}"
        doge_onnx.export(TINY, tiny, **options)
        lost = doge_onnx.evaluate(tiny, reference, arguments.text, max_tokens=EVALUATED)
        if weights != "fp32":
            options["rounding"] = "nearest"
        bundle = scratch / "bundle"
        made = doge_onnx.export(checkpoint, bundle, force=True, **options)
        speed = doge_onnx.bench(
            bundle, contexts=CONTEXTS, batches=(1, BATCH), repetitions=arguments.repetitions
        )
        decode = {(c.context, c.batch): c.decode_tokens_per_second.median for c in speed.cells}
        assert lost.reference_perplexity is not None
        yield {
            "weights": weights,
            "state": state,
            "megabytes": speed.file_bytes / 1e6,
            "bytes_per_weight": speed.file_bytes / made.manifest.parameters,
            "mean_kl": lost.mean_kl,
            "perplexity": lost.perplexity / lost.reference_perplexity - 1,
            "top1_agreement": lost.top1_agreement,
            **{f"decode_at_{context}": decode[context, 1] for context in CONTEXTS},
            f"batch_{BATCH}_at_16": decode[16, BATCH],
            "first_token_seconds": speed.start.first_token_seconds.median,
            "load_seconds": speed.start.load_seconds.median,
            "peak_to_file": speed.start.peak_to_file,
            "mbu_at_16": next(c.mbu for c in speed.cells if (c.context, c.batch) == (16, 1)),
        }


def table(rows: list[dict[str, Any]], shape: str) -> Iterator[str]:
    """The rows as Markdown."""
    yield ""
    yield (
        f"| weights | state | {shape}: size | bytes per weight | decode at 16 | at 512 "
        f"| {BATCH} texts at 16 | MBU | doge-tiny: KL, nats | perplexity | top-1 |"
    )
    yield "|---|---|" + "---:|" * 9
    for row in rows:
        exact = row["weights"] == row["state"] == "fp32"
        quality = (
            "0 | 0 | 100 %"
            if exact
            else f"{row['mean_kl']:.5f} | {row['perplexity']:+.2%} | {row['top1_agreement']:.1%}"
        )
        yield (
            f"| {row['weights']} | {row['state']} | {row['megabytes']:.0f} MB "
            f"| {row['bytes_per_weight']:.2f} | {row['decode_at_16']:.0f} tok/s "
            f"| {row['decode_at_512']:.0f} tok/s | {row[f'batch_{BATCH}_at_16']:.0f} tok/s "
            f"| {row['mbu_at_16']:.0%} | {quality} |"
        )
    yield ""


def plot(rows: list[dict[str, Any]], shape: str) -> None:
    """Plot loss against speed, with the size of each bundle as the area of its dot."""
    import matplotlib

    matplotlib.use("svg")
    # Without a fixed salt, the same figures would give a different file each time.
    matplotlib.rcParams["svg.hashsalt"] = "precisions"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for state, marker in (("fp32", "o"), ("int8", "D")):
        shown = [row for row in rows if row["state"] == state and row["mean_kl"] > 1e-9]
        axes.scatter(
            [row["decode_at_512"] for row in shown],
            [row["mean_kl"] for row in shown],
            [2 * row["megabytes"] for row in shown],
            marker=marker,
            alpha=0.6,
            label=f"{state} state",
        )
        for row in shown:
            axes.annotate(
                f"{row['weights']}, {row['megabytes']:.0f} MB",
                (row["decode_at_512"], row["mean_kl"]),
                xytext=(0, 14),
                textcoords="offset points",
                ha="center",
                fontsize=8,
            )
    exact = next(row for row in rows if row["weights"] == row["state"] == "fp32")
    axes.axvline(exact["decode_at_512"], color="grey", linestyle=":")
    axes.text(exact["decode_at_512"], 2e-5, " fp32: no loss", color="grey", fontsize=8)
    axes.set(
        xlabel=f"decode at 512 tokens, {shape}, tokens per second",
        ylabel="KL divergence on doge-tiny, nats per token",
        yscale="log",
        ylim=(1e-5, 3e-2),
    )
    axes.legend(loc="lower right")
    figure.savefig(PLOT, metadata={"Date": None})


if __name__ == "__main__":
    main()
