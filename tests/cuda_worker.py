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

from doge_onnx.runtime.cuda.graph_replay import FixedSteps
from doge_onnx.runtime.cuda.runner import _CudaSession
from doge_onnx.runtime.engine.device import CUDA_PROVIDER, placed
from doge_onnx.runtime.model import Model, load

STEPS = 10
# What happened while steps were captured.
recorded: set[str] = set()


def events(model: Model, prompts: list[list[int]], **options) -> dict[str, int]:
    """What a decode step does: for each kind of it, the most that a step had."""
    log = Path(os.environ["CUDA_STAND_IN_LOG"])
    seen: list[Counter[str]] = []
    step = _CudaSession.step

    def watched(decoder, *args):
        log.write_text("")
        result = step(decoder, *args)
        seen.append(Counter(log.read_text().splitlines()))
        recorded.update(line for line in seen[-1] if line.startswith(("captured", "forbidden")))
        return result

    _CudaSession.step = watched
    try:
        # Nothing ends a text.
        model.generate_batch(prompts, max_new_tokens=STEPS + 8, ignore_eos=True, **options)
    finally:
        _CudaSession.step = step
    # The first ones fill the memory of those that come.
    last = seen[-STEPS:]
    return {copy: max(step[copy] for step in last) for copy in sum(last, Counter())}


def look(bundle: str, what: str) -> dict[str, object]:
    """Where the nodes of a bundle are, and what it copies, as it is and with captured steps."""
    result = {}
    for way, cuda_graph in {"as it is": False, "captured": True}.items():
        if what == "capture" or not cuda_graph:
            # There are no results to compare.
            with mock.patch.object(FixedSteps, "problem", return_value=None):
                model = load(bundle, device="cuda", cuda_graph=cuda_graph)
            result[way] = look_at(model, what)
    return result


def look_at(model: Model, what: str) -> dict[str, object]:
    """The same of a model that is loaded."""
    recorded.clear()
    nodes = placed(model._runner._session)
    result: dict[str, object] = {
        "device": model.device,
        "cuda_graph": model.cuda_graph,
        "on the CPU": Counter(kind for provider, kind in nodes if provider != CUDA_PROVIDER),
        "on CUDA": Counter(kind for provider, kind in nodes if provider == CUDA_PROVIDER),
    }
    if what != "place":
        even = [[3, 4, 5], [6, 7, 8]]
        uneven = [[3, 4, 5], [6]]
        result["greedy"] = events(model, even)
        result["greedy, padded"] = events(model, uneven)
        result["top-k"] = events(model, even, temperature=1.0, top_k=5, seed=0)
        result["all"] = events(model, even, temperature=1.0, seed=0)
        # Past the first capacity of a buffer, and with a state that is continued twice.
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
