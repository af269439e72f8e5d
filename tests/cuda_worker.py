"""What onnxruntime-gpu does with some bundles; runs in an environment of its own.

    python cuda_worker.py BUNDLE=what ...

`what` is "place" to look at where the nodes are, "run" to generate as well, or "capture" to do that
with captured steps, too. Prints one JSON object. With the stand-in for CUDA the texts are nonsense,
but as long as real ones.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from pathlib import Path
from unittest import mock

import numpy as np

from doge_onnx.bundle import Bundle
from doge_onnx.runtime.cuda.graph_replay import StaticStepPool
from doge_onnx.runtime.engine.device import CUDA, CUDA_PROVIDER, node_placements
from doge_onnx.runtime.engine.runner import Runner
from doge_onnx.runtime.engine.session import open_session
from doge_onnx.runtime.generation.defaults import Defaults
from doge_onnx.runtime.loader import open_runner
from doge_onnx.runtime.model import Model

STEPS = 10
# What happened while steps were captured.
recorded: set[str] = set()


def events(
    runner: Runner, prompts: list[list[int]], top: int | None, ended: int | None = None
) -> dict[str, int]:
    """What a decode step does: for each kind of it, the most that a step had.

    Args:
        runner: Runs the model.
        prompts: What comes before the steps.
        top: How many of the largest logits are looked at.
        ended: Which of the sequences leaves early.
    """
    log = Path(os.environ["CUDA_STAND_IN_LOG"])
    _, state = runner.forward([np.array(ids) for ids in prompts], None, last_only=True)
    session = runner.decode(state)
    seen: list[Counter[str]] = []
    for number in range(STEPS + 8):
        if number == 2 and ended is not None:
            session.remove([ended])
        log.write_text("")
        session.step([3] * len(session.rows), top)
        seen.append(Counter(log.read_text().splitlines()))
        recorded.update(line for line in seen[-1] if line.startswith(("captured", "forbidden")))
    # The first ones fill the memory of those that come.
    last = seen[-STEPS:]
    return {copy: max(step[copy] for step in last) for copy in sum(last, Counter())}


def look(path: str, what: str) -> dict[str, object]:
    """Where the nodes of a bundle are, and what it copies, as it is and with captured steps."""
    result = {}
    for way, cuda_graph in {"as it is": False, "captured": True}.items():
        if what == "capture" or not cuda_graph:
            result[way] = look_at(Bundle.open(path), what, cuda_graph)
    return result


def look_at(bundle: Bundle, what: str, cuda_graph: bool) -> dict[str, object]:
    """The same in one of the two ways."""
    recorded.clear()
    nodes = node_placements(open_session(bundle, CUDA, capture=cuda_graph))
    # There are no results to compare.
    with mock.patch.object(StaticStepPool, "find_problem", return_value=None):
        runner = open_runner(bundle, CUDA, cuda_graph=cuda_graph)
    result: dict[str, object] = {
        "device": runner.device,
        "cuda_graph": runner.captures,
        "on the CPU": Counter(kind for provider, kind in nodes if provider != CUDA_PROVIDER),
        "on CUDA": Counter(kind for provider, kind in nodes if provider == CUDA_PROVIDER),
    }
    if what != "place":
        even = [[3, 4, 5], [6, 7, 8]]
        uneven = [[3, 4, 5], [6]]
        result["greedy"] = events(runner, even, top=1)
        result["greedy, unequal"] = events(runner, uneven, top=1)
        result["greedy, one ended"] = events(runner, even, top=1, ended=1)
        result["top-k"] = events(runner, even, top=5)
        result["all"] = events(runner, even, top=None)
        # Past the first capacity of a buffer, and with a state that is continued twice.
        model = Model(bundle, runner, Defaults.read(bundle), None)
        text = model.generate([3, 4, 5], max_new_tokens=300, ignore_eos=True)
        result["tokens"] = len(text.token_ids)
        result["recorded"] = sorted(recorded)
        _, state = model.forward(even)
        for _ in range(2):
            logits, _ = model.forward(even, state, logits="all")
        result["shape"] = logits.shape
    return result


if __name__ == "__main__":
    pairs = (argument.rsplit("=", 1) for argument in sys.argv[1:])
    sys.stdout.write(json.dumps({bundle: look(bundle, what) for bundle, what in pairs}))
