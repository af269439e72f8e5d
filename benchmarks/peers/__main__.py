"""Decode and prefill speed against other runtimes, on one machine and in one run.

    python benchmarks/peers [--shapes 20M 160M] [--precisions fp32 int8] [--rounds 5]

doge-onnx and transformers run a Doge with random weights, llama.cpp and onnxruntime-genai,
which do not know Doge, a Qwen3 of the same shape. Prints a table, its averages and, as the last
line, one JSON object. All models run greedily and with the same prompts. --batches adds cells in
which several sequences are decoded at once.

Each model runs in a process of its own, in the environment of its runtime; environments
are made under build/peers once. All models of a shape are loaded together, and each round
measures all of them, because a machine's speed changes with time. Medians are compared; a warm-up
round before the first is not counted. A model that fails is missing from the table, and the
reason is on standard error.

MBU is memory-bandwidth utilisation, as in benchmarks/speed.py; it exceeds 100 % on a processor
whose cache holds all weights. The default run takes about an hour and needs an idle machine: if
the notes name a wide spread, the figures mean little.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from peer import CONTEXT_LENGTH, Job, Shape
from process import Worker, WorkerError
from report import Row, markdown, summarise

# Python puts only this directory there.
sys.path += [str(Path(__file__).parent.parent), str(Path(__file__).parents[2] / "tools")]

from checkpoints import SHAPES, random_checkpoint, vocabulary
from environments import environment

from doge_onnx.measure.bandwidth import read_bandwidth

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
OURS = "doge-onnx"
BUILD = ROOT / "build" / "peers"
PREFILL = 512


@dataclass(frozen=True)
class Runtime:
    """One column of the table.

    Attributes:
        module: Its `peer_*` module.
        requirements: What its environment has; None for the project's own.
        variants: Names of precisions, and the options for the module that make them.
    """

    module: str
    requirements: str | None
    variants: dict[str, dict[str, Any]]


RUNTIMES = {
    # The options are keywords of `doge_onnx.export`. Others are compared by "precision". Which
    # codes stand for random weights does not change the speed, and nearest is quicker to find.
    OURS: Runtime(
        "peer_doge_onnx",
        None,
        {
            "fp32": {"precision": "fp32"},
            "fp32-window": {"precision": "fp32", "state": "window"},
            "bf16": {"precision": "bf16"},
            "int8": {"precision": "int8", "rounding": "nearest"},
            "int4": {"precision": "int4", "rounding": "nearest"},
            "int8-kv8": {"precision": "int8", "kv_cache": "int8", "rounding": "nearest"},
            "int4-kv8": {"precision": "int4", "kv_cache": "int8", "rounding": "nearest"},
        },
    ),
    "llama.cpp": Runtime(
        "peer_llama_cpp",
        "llama_cpp.txt",
        {
            "fp32": {"type": "F32"},
            "bf16": {"type": "BF16"},
            "int8": {"type": "Q8_0"},
            "int4": {"type": "Q4_0"},
        },
    ),
    "genai": Runtime(
        "peer_genai",
        "genai.txt",
        {precision: {"precision": precision} for precision in ("fp32", "int8", "int4")},
    ),
    "transformers": Runtime("peer_transformers", None, {"fp32": {}}),
}

Key = tuple[str, str]


def main() -> None:
    """Measure, and print what was measured."""
    arguments = parse()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(arguments.threads)

    pythons = interpreters(arguments.peers)
    bandwidth = 0.0
    rows: list[Row] = []
    versions: dict[str, str] = {}
    notes: dict[tuple[str, str], dict[str, None]] = {}
    for shape in arguments.shapes:
        bandwidth = max(bandwidth, read_bandwidth(arguments.threads))
        with tempfile.TemporaryDirectory(dir=BUILD) as scratch:
            workers = start(shape, Path(scratch), pythons, arguments)
            for (name, variant), worker in workers.items():
                versions |= worker.about.versions
                notes.setdefault((name, worker.about.note), {})[variant] = None
            try:
                rows += measure(shape, workers, bandwidth, arguments)
            finally:
                for worker in workers.values():
                    worker.stop()

    summary = summarise(rows)
    machine = {
        "processor": cpuinfo("model name") or os.uname().machine,
        "instruction_sets": instruction_sets(),
        "cores": os.cpu_count(),
        "threads": arguments.threads,
        "read_gb_per_s": round(bandwidth / 1e9, 1),
        "rounds": arguments.rounds,
        "decoded_tokens": arguments.tokens,
        "python": sys.version.split()[0],
        **versions,
    }
    others = [name for name in RUNTIMES if name in arguments.peers and name != OURS]
    facts = ", ".join(f"{name} {value}" for name, value in machine.items())
    remarks = [f"{n} {', '.join(variants)}: {note}" for (n, note), variants in notes.items()]
    spread = max((spread for row in rows for spread in row.spreads.values()), default=0.0)
    remarks.append(f"slowest less fastest round of a figure: at most {spread:.0%} of its median")
    text = markdown(rows, summary, OURS, others, [facts, *remarks])
    text += "\n\n" + json.dumps(
        {"machine": machine, "rows": [asdict(row) for row in rows], "summary": summary}
    )
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n", encoding="utf-8")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    dense = [shape for shape, sizes in SHAPES.items() if not sizes[5]]
    ours = list(RUNTIMES[OURS].variants)
    parser.add_argument("--shapes", nargs="+", default=["20M", "160M"], choices=dense)
    parser.add_argument("--precisions", nargs="+", default=ours, choices=ours)
    parser.add_argument("--contexts", nargs="+", type=int, default=[16, 512, 1900])
    parser.add_argument("--batches", nargs="+", type=int, default=[1])
    parser.add_argument("--peers", nargs="+", default=list(RUNTIMES), choices=RUNTIMES)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=32, help="to decode in one measurement")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="a file to write the output to, as well")
    arguments = parser.parse_args()
    if max(arguments.contexts) + 1 + arguments.tokens > CONTEXT_LENGTH:
        parser.error(f"context and tokens do not fit into {CONTEXT_LENGTH}")
    return arguments


def interpreters(names: list[str]) -> dict[str, Path]:
    """The interpreter that each runtime has; those that could not be installed are missing."""
    BUILD.mkdir(parents=True, exist_ok=True)
    pythons = {}
    for name in names:
        requirements = RUNTIMES[name].requirements
        try:
            pythons[name] = (
                Path(sys.executable)
                if requirements is None
                else environment(HERE / requirements, BUILD)
            )
        except subprocess.CalledProcessError as error:
            failed(name, str(error))
    return pythons


def start(
    shape: str, scratch: Path, pythons: dict[str, Path], arguments: argparse.Namespace
) -> dict[Key, Worker]:
    """Build and load every model of a shape; those that fail are missing."""
    checkpoint = random_checkpoint(scratch, shape)
    wanted = [base(variant) for variant in arguments.precisions]
    workers = {}
    for name, python in pythons.items():
        runtime = RUNTIMES[name]
        if name == OURS:
            variants = list(arguments.precisions)
        else:
            variants = list(dict.fromkeys(counterpart(name, precision) for precision in wanted))
        for variant in variants:
            print(f"{shape}: building {name} {variant}", file=sys.stderr)
            job = Job(
                name=f"{name}-{variant}",
                shape=Shape(*SHAPES[shape][:5], vocabulary(shape)),
                checkpoint=checkpoint,
                directory=scratch,
                options=runtime.variants[variant],
                threads=arguments.threads,
                batch=max(arguments.batches),
            )
            log = BUILD / f"{shape}-{job.name}.log"
            try:
                workers[name, variant] = Worker(python, runtime.module, job, log)
            except WorkerError as error:
                failed(f"{shape} {job.name}", str(error))
    return workers


def base(variant: str) -> str:
    """The precision of a variant of ours, which others are compared by."""
    return str(RUNTIMES[OURS].variants[variant]["precision"])


def counterpart(name: str, precision: str) -> str:
    """What a runtime has to set against a precision: the same one, or else fp32."""
    return precision if precision in RUNTIMES[name].variants else "fp32"


def measure(
    shape: str, workers: dict[Key, Worker], bandwidth: float, arguments: argparse.Namespace
) -> list[Row]:
    """All rows of one shape."""
    cells: list[tuple[str, int, int]] = [
        ("decode", context, batch) for batch in arguments.batches for context in arguments.contexts
    ]
    cells.append(("prefill", PREFILL, 1))
    rows = []
    for what, tokens, batch in cells:
        print(f"{shape}: {what} @ {tokens}, batch {batch}", file=sys.stderr)
        request: dict[str, Any] = {"do": "prefill", "length": tokens}
        if what == "decode":
            request = {
                "do": "decode",
                "context": tokens,
                "batch": batch,
                "tokens": arguments.tokens,
            }
        times = alternate(workers, request, arguments.rounds)
        # The time of a decode step is that of one token of each sequence.
        count = tokens if what == "prefill" else batch
        per_second = {key: count / seconds for key, (seconds, _) in times.items()}
        for variant in arguments.precisions:
            row = Row(shape, variant, what, tokens, batch, {}, {})
            for name in arguments.peers:
                key = name, variant if name == OURS else counterpart(name, base(variant))
                if key in per_second:
                    row.speeds[name] = per_second[key]
                    row.spreads[name] = times[key][1]
            if OURS in row.speeds:
                speed = row.speeds[OURS]
                row.ratios = {n: speed / other for n, other in row.speeds.items() if n != OURS}
                about = workers[OURS, variant].about
                if what == "decode" and batch == 1 and about.weight_bytes is not None:
                    cache = (about.row_bytes or 0) * (tokens + arguments.tokens / 2)
                    row.mbu = (about.weight_bytes + cache) * speed / bandwidth
            rows.append(row)
    # Those of one variant together.
    return sorted(rows, key=lambda row: arguments.precisions.index(row.variant))


def alternate(
    workers: dict[Key, Worker], request: dict[str, Any], rounds: int
) -> dict[Key, tuple[float, float]]:
    """Median of the seconds and their spread, by worker; one that fails is dropped for good."""
    times: dict[Key, list[float]] = {key: [] for key in workers}
    for seed in range(1 + rounds):
        for key, worker in list(workers.items()):
            try:
                times[key].append(worker.ask(**request, seed=seed))
            except WorkerError as error:
                failed(worker.job.name, str(error))
                del workers[key], times[key]
    return {
        key: (median := statistics.median(values[1:]), (max(values[1:]) - min(values[1:])) / median)
        for key, values in times.items()
    }


def failed(what: str, reason: str) -> None:
    """Say what is missing in the table, and why."""
    print(f"{what} failed: {reason}", file=sys.stderr)


def instruction_sets() -> str:
    """What the processor has of those that matter here; not every build uses all of them."""
    known = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "amx_int8", "asimddp", "i8mm", "sve")
    flags = (cpuinfo("flags") or cpuinfo("Features")).split()
    return " ".join(name for name in known if name in flags)


def cpuinfo(key: str) -> str:
    """A fact about the first processor, or nothing."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    fields = (line.partition(":") for line in lines)
    return next((value.strip() for name, _, value in fields if name.strip() == key), "")


if __name__ == "__main__":
    main()
