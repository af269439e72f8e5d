"""What onnxruntime-gpu does with some bundles; runs in an environment of its own.

    python cuda_worker.py BUNDLE=what ...

`what` is "place" to look at where the nodes are, or "run" to generate as well. Prints one JSON
object. With the stand-in for CUDA the texts are nonsense, but as long as real ones.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from pathlib import Path

from doge_onnx.runtime.device import CUDA_PROVIDER, placed
from doge_onnx.runtime.model import Model, load
from doge_onnx.runtime.options import Defaults
from doge_onnx.runtime.resident import _ResidentDecoder

STEPS = 10


def copies(model: Model, prompts: list[list[int]], **options) -> dict[str, int]:
    """Copies of a decode step: for each kind and size, the most of them that a step had."""
    log = Path(os.environ["CUDA_STAND_IN_LOG"])
    seen: list[Counter[str]] = []
    step = _ResidentDecoder.step

    def watched(decoder, *args):
        log.write_text("")
        result = step(decoder, *args)
        seen.append(Counter(log.read_text().splitlines()))
        return result

    _ResidentDecoder.step = watched
    try:
        model.generate(prompts, max_new_tokens=STEPS + 4, **options)
    finally:
        _ResidentDecoder.step = step
    # The first ones fill the memory of those that come.
    last = seen[-STEPS:]
    return {copy: max(step[copy] for step in last) for copy in sum(last, Counter())}


def look(bundle: str, what: str) -> dict[str, object]:
    """Where the nodes of a bundle are, and what it copies."""
    model = load(bundle, device="cuda")
    # Nothing ends a text.
    model._defaults = Defaults(frozenset(), sample=False, values={})
    nodes = placed(model._stepper._session)
    result: dict[str, object] = {
        "device": model.device,
        "on the CPU": Counter(kind for provider, kind in nodes if provider != CUDA_PROVIDER),
        "on CUDA": Counter(kind for provider, kind in nodes if provider == CUDA_PROVIDER),
    }
    if what == "run":
        even = [[3, 4, 5], [6, 7, 8]]
        uneven = [[3, 4, 5], [6]]
        result["greedy"] = copies(model, even)
        result["greedy, padded"] = copies(model, uneven)
        result["top-k"] = copies(model, even, temperature=1.0, top_k=5, seed=0)
        result["all"] = copies(model, even, temperature=1.0, seed=0)
        # Past the first capacity of a buffer, and with a state that is continued twice.
        text = model.generate([3, 4, 5], max_new_tokens=300)
        result["tokens"] = len(text.token_ids)
        _, state = model.forward(even)
        for _ in range(2):
            logits, _ = model.forward(even, state, logits="all")
        result["shape"] = logits.shape
    return result


if __name__ == "__main__":
    pairs = (argument.rsplit("=", 1) for argument in sys.argv[1:])
    sys.stdout.write(json.dumps({bundle: look(bundle, what) for bundle, what in pairs}))
