"""Batches of unequal prompts: what short sequences pay for a long one beside them.

    python benchmarks/batches.py [--shape 20M] [--precision int8] [--long 1500]

Decodes 8 prompts of 8 tokens beside a long one, and 9 prompts of 8 tokens, in turn, with a random
checkpoint of the shape. Prints the median time of a step of both and their ratio, which counts
the attention of the long sequence too. The last line of the output is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path

import numpy as np
import transformers
from checkpoints import SHAPES, random_checkpoint
from rich.console import Console

import doge_onnx

ROUNDS = 5
SHORT = 8
STEPS = 32


def main() -> None:
    """Measure, and print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="20M", choices=SHAPES)
    parser.add_argument("--precision", default="int8")
    parser.add_argument("--kv-cache", default=None)
    parser.add_argument("--long", type=int, default=1500)
    arguments = parser.parse_args()
    transformers.logging.disable_progress_bar()

    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = random_checkpoint(Path(scratch), arguments.shape)
        bundle = Path(scratch) / "bundle"
        doge_onnx.export(
            checkpoint,
            bundle,
            precision=arguments.precision,
            kv_cache=arguments.kv_cache,
            rounding=None if arguments.precision == "fp32" else "nearest",
            verify=False,
        )
        model = doge_onnx.load(bundle)
    lengths = {"short": [SHORT] * 9, "unequal": [SHORT] * 8 + [arguments.long]}
    steps: dict[str, list[float]] = {name: [] for name in lengths}
    for _ in range(1 + ROUNDS):
        for name, prompts in lengths.items():
            steps[name].append(step_seconds(model, prompts))
    short, unequal = (statistics.median(steps[name][1:]) for name in ("short", "unequal"))
    console = Console()
    console.print(f"{arguments.shape} {arguments.precision}, medians of {ROUNDS} rounds")
    console.print(f"9 sequences of {SHORT} tokens: {1e3 * short:.2f} ms a step")
    console.print(
        f"8 of {SHORT} beside one of {arguments.long}: {1e3 * unequal:.2f} ms a step, "
        f"{unequal / short:.2f} times as long"
    )
    print(
        json.dumps(
            {
                "shape": arguments.shape,
                "precision": arguments.precision,
                "short_ms": 1e3 * short,
                "unequal_ms": 1e3 * unequal,
                "ratio": unequal / short,
            }
        )
    )


def step_seconds(model: doge_onnx.Model, lengths: list[int]) -> float:
    """Seconds of a decode step after random prompts of those lengths."""
    rng = np.random.default_rng(0)
    vocab_size = model.manifest.vocab_size
    prompts = [rng.integers(0, vocab_size, length).tolist() for length in lengths]
    first, *_ = model.generate_batch(
        prompts, max_new_tokens=1 + STEPS, temperature=0, ignore_eos=True
    )
    return first.timings.decode_seconds / STEPS


if __name__ == "__main__":
    main()
