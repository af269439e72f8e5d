"""One model of one runtime in a process of its own, in that runtime's environment.

    python worker.py build MODULE JOB    writes the model
    python worker.py serve MODULE JOB    loads it, and measures what it is asked for

`serve` answers every line of standard input with a line of standard output, all of them JSON
objects. The first line that it writes describes the model. Then:

    {"do": "decode", "context": 512, "batch": 1, "tokens": 32, "seed": 3}  ->  {"seconds": ...}
    {"do": "prefill", "length": 512, "seed": 3}                            ->  {"seconds": ...}

The seconds of a decode are those of one step.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from dataclasses import asdict
from typing import IO, Any, cast

from peer import Job, Peer, PeerModule, random_prompt

# Of a long prompt, this many tokens are enough for a decode that only warms up.
WARM_UP = 16


def main() -> None:
    """Do what the command line says."""
    # Libraries print what they like: standard output is for answers alone.
    answers = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)
    action, module_name, text = sys.argv[1:]
    module = cast(PeerModule, importlib.import_module(module_name))
    job = Job.from_json(text)
    if action == "build":
        module.build(job)
    else:
        serve(module.load(job), job.shape.vocabulary, answers)


def serve(peer: Peer, vocabulary: int, answers: IO[str]) -> None:
    """Answer requests until there are no more."""
    print(json.dumps(asdict(peer.about())), file=answers)
    for line in sys.stdin:
        seconds = measure(peer, vocabulary, json.loads(line))
        print(json.dumps({"seconds": seconds}), file=answers)


def measure(peer: Peer, vocabulary: int, request: dict[str, Any]) -> float:
    """Carry out one request."""
    seed = request["seed"]
    if request["do"] == "decode":
        prompts = [
            random_prompt(request["context"], 100 * seed + row, vocabulary)
            for row in range(request["batch"])
        ]
        peer.decode([prompt[:WARM_UP] for prompt in prompts], request["tokens"])
        return peer.decode(prompts, request["tokens"])
    prompt = random_prompt(request["length"], seed, vocabulary)
    peer.prefill(prompt)
    return peer.prefill(prompt)


if __name__ == "__main__":
    main()
