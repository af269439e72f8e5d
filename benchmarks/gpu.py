"""Decode and prefill on an NVIDIA GPU against transformers on the same GPU, in one run.

    python benchmarks/gpu.py [--shapes 20M 160M] [--contexts 16 512 1900] [--batches 1 8 64]

Needs onnxruntime-gpu and a PyTorch with CUDA. First compares 64 greedy tokens of
examples/doge-tiny in fp16 on the GPU with the CPU's, and prints near-ties with the gap between
the two best tokens. Then measures random weights of the released shapes in fp16: this package
with captured steps and, as "launches", without; transformers with its `sdpa` attention through
`generate`; and transformers compiled by `torch.compile` with a static cache. Each row is printed
to standard error as soon as it is measured; at the end come a table and, as the last line, one
JSON object. If CUDA cannot capture a step, the benchmark says why and goes on without captured
steps.

Each cell is timed `--rounds` times with all competitors in turn, and medians are compared. MBU
(memory-bandwidth utilisation) is the bytes that a decode step must read, weights and state,
divided by its time and by the bytes that a copy on the same GPU reads and writes per second.

The name is not cuda.py, because PyTorch imports a package named `cuda`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
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
from doge_onnx.errors import DogeOnnxError
from doge_onnx.measure.bandwidth import copy_bandwidth
from doge_onnx.measure.bench import step_bytes
from doge_onnx.measure.workload import Cell, random_prompts
from doge_onnx.runtime.cuda.device_memory import DeviceMemory
from doge_onnx.runtime.engine.device import CUDA, missing_for_cuda
from doge_onnx.runtime.model import Model

TINY = Path(__file__).parent.parent / "examples" / "doge-tiny"
DECODED = 32
GREEDY_TOKENS = 64
PROMPT = "It was a dark and stormy night"


def main() -> None:
    """Check, measure, and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", default=["20M", "160M"], choices=SHAPES)
    parser.add_argument("--contexts", nargs="+", type=int, default=[16, 512, 1900])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 64])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    arguments = parser.parse_args()
    missing = missing_for_cuda()
    if missing is None and not torch.cuda.is_available():
        missing = f"torch {torch.__version__} finds no CUDA; install one that is built with it"
    if missing is not None:
        sys.exit(f"error: {missing}")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        result = measure(arguments)
    except DogeOnnxError as error:
        sys.exit(f"error: {error}")
    show(result)
    print(json.dumps(result))


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure everything, as the JSON object that is printed."""
    with tempfile.TemporaryDirectory() as scratch:
        greedy = compare_greedy(Path(scratch))
        bandwidth = copy_bandwidth(DeviceMemory(CUDA))
        rows = []
        for shape in arguments.shapes:
            checkpoint = random_checkpoint(Path(scratch), shape)
            bundle = Path(scratch) / f"{shape}-bundle"
            doge_onnx.export(checkpoint, bundle, device=CUDA, verify=False)
            rows += measure_shape(shape, checkpoint, bundle, arguments, bandwidth)
    machine = {
        "gpu": torch.cuda.get_device_name(),
        "copy_gb_per_s": round(bandwidth / 1e9, 1),
        "onnxruntime": onnxruntime.__version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
    }
    return {"machine": machine, "greedy": greedy, "rows": rows}


def compare_greedy(scratch: Path, device: str = CUDA) -> dict[str, Any]:
    """Generate on a device, and find the tokens that fp32 on the CPU would not have chosen."""
    exact = doge_onnx.export(TINY, scratch / "tiny-fp32", verify=False).path
    half = doge_onnx.export(TINY, scratch / "tiny-fp16", device=CUDA, verify=False).path
    cpu, gpu = doge_onnx.load(exact, device="cpu"), doge_onnx.load(half, device=device)
    prompt = cpu.tokenizer.encode(PROMPT)
    ids = gpu.generate(prompt, max_new_tokens=GREEDY_TOKENS).token_ids
    truth = cpu.forward([prompt + ids[:-1]], logits="all")[0][0, len(prompt) - 1 :]
    ties = []
    for position, (row, token) in enumerate(zip(truth, ids, strict=True)):
        if int(row.argmax()) != token:
            second, first = np.sort(row)[-2:]
            ties.append({"position": position, "top2_gap": float(first - second)})
    return {
        "tokens": len(ids),
        "equal": len(ids) - len(ties),
        "near_ties": ties,
        "cuda_graph": gpu.cuda_graph,
    }


def measure_shape(
    shape: str, checkpoint: Path, bundle: Path, arguments: argparse.Namespace, bandwidth: float
) -> list[dict[str, Any]]:
    """All cells of one shape."""
    model, problem = load_replaying(bundle)
    competitors: dict[str, Any] = {"doge-onnx": Ours(model), "sdpa": Theirs(checkpoint)}
    if problem is None:
        competitors["launches"] = Ours(doge_onnx.load(bundle, device=CUDA, cuda_graph=False))
    else:
        print(f"{shape}: {problem}", file=sys.stderr)
    if not arguments.no_compile:
        competitors["compile"] = Theirs(checkpoint, compiled=True)
    rows = []
    for context in arguments.contexts:
        for batch in arguments.batches:
            cell = Cell(context, batch)
            prompts = random_prompts(cell, model.manifest.vocab_size)
            # torch.compile stops compiling after a number of shapes.
            torch.compiler.reset()
            prefill, decode, failed = time_cell(competitors, prompts, arguments.rounds)
            read = step_bytes(model.manifest, cell, DECODED)
            rows.append(
                {
                    "shape": shape,
                    "context": context,
                    "batch": batch,
                    "prefill_tokens_per_s": {n: context * batch / s for n, s in prefill.items()},
                    "decode_tokens_per_s": {n: batch / s for n, s in decode.items()},
                    "cuda_graph": model.cuda_graph,
                    "mbu": read / decode["doge-onnx"] / bandwidth,
                    "failed": failed,
                }
            )
            # If the benchmark is stopped, the rows so far are not lost.
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return rows


def load_replaying(bundle: Path) -> tuple[Model, str | None]:
    """A model with captured steps, or else one without, and the reason."""
    try:
        return doge_onnx.load(bundle, device=CUDA, cuda_graph=True), None
    except DogeOnnxError as error:
        return doge_onnx.load(bundle, device=CUDA, cuda_graph=False), str(error)


class Ours:
    """The exported bundle."""

    def __init__(self, model: Model) -> None:
        self._model = model

    def run(self, prompts: list[list[int]], count: int) -> None:
        """Generate greedily; nothing ends a text."""
        self._model.generate_batch(prompts, ignore_eos=True, temperature=0, max_new_tokens=count)


class Theirs:
    """The same checkpoint in transformers, in fp16 on the same GPU."""

    def __init__(self, checkpoint: Path, compiled: bool = False) -> None:
        model: Any = transformers.DogeForCausalLM.from_pretrained(
            checkpoint, dtype=torch.float16, attn_implementation="sdpa"
        )
        self._model = model.to(CUDA).eval()
        # With a static cache, `generate` compiles the forward of its decode steps.
        self._options: dict[str, Any] = {"cache_implementation": "static"} if compiled else {}

    @torch.no_grad()
    def run(self, prompts: list[list[int]], count: int) -> None:
        """Generate greedily; nothing ends a text."""
        ids = torch.tensor(prompts, device=CUDA)
        self._model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
            **self._options,
        )


def time_cell(
    competitors: dict[str, Any], prompts: list[list[int]], rounds: int
) -> tuple[dict[str, float], dict[str, float], dict[str, str]]:
    """Seconds of a prefill and of a decode step by competitor, and the reasons of failed ones."""
    failed = {}
    for name, competitor in competitors.items():
        try:
            competitor.run(prompts, 1 + DECODED)
        # Out of memory, or a shape that cannot be compiled: the others are still measured.
        except Exception as error:
            if name == "doge-onnx":
                raise
            failed[name] = " ".join(str(error).split())[:200]
            torch.cuda.empty_cache()
    able = {name: competitor for name, competitor in competitors.items() if name not in failed}
    prefill: dict[str, list[float]] = {name: [] for name in able}
    decode: dict[str, list[float]] = {name: [] for name in able}
    for _ in range(rounds):
        for name, competitor in able.items():
            short = seconds(lambda c=competitor: c.run(prompts, 1))  # type: ignore[misc]
            long = seconds(lambda c=competitor: c.run(prompts, 1 + DECODED))  # type: ignore[misc]
            prefill[name].append(short)
            decode[name].append((long - short) / DECODED)
    medians = ({n: statistics.median(v) for n, v in times.items()} for times in (prefill, decode))
    first, second = medians
    return first, second, failed


def seconds(function: Callable[[], object]) -> float:
    """Seconds of one call, until the GPU has finished its work."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    function()
    torch.cuda.synchronize()
    return time.perf_counter() - started


def show(result: dict[str, Any]) -> None:
    """Print the figures as tables."""
    greedy = result["greedy"]
    print(
        f"{result['machine']['gpu']}, greedy: {greedy['equal']} of {greedy['tokens']} tokens equal"
    )
    for tie in greedy["near_ties"]:
        print(f"  position {tie['position']}: the two best are {tie['top2_gap']:.4f} apart")
    names = sorted({name for row in result["rows"] for name in row["decode_tokens_per_s"]})
    columns = [f"{what} {name}" for what in ("decode", "prefill") for name in names]
    table = Table("shape", "context", "batch", *columns, "times sdpa", "MBU")
    for row in result["rows"]:
        decode, prefill = row["decode_tokens_per_s"], row["prefill_tokens_per_s"]
        speeds = (
            f"{times[name]:.0f}" if name in times else "failed"
            for times in (decode, prefill)
            for name in names
        )
        ratio = f"{decode['doge-onnx'] / decode['sdpa']:.1f}" if "sdpa" in decode else ""
        size = (row["shape"], str(row["context"]), str(row["batch"]))
        table.add_row(*size, *speeds, ratio, f"{row['mbu']:.0%}")
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
