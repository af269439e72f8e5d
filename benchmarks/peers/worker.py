"""One model of one runtime in a process of its own, in that runtime's environment.

    python worker.py build MODULE JOB    writes the model
    python worker.py serve MODULE JOB    loads it, and measures what it is asked for

`serve` answers every line of standard input with a line of standard output, all of them JSON
objects. The first line that it writes describes the model. Then:

    {"do": "decode", "context": 512, "tokens": 32, "seed": 3}  ->  {"seconds": ...}, per token
    {"do": "prefill", "length": 512, "seed": 3}                ->  {"seconds": ...}
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
        serve(module.load(job), answers)


def serve(peer: Peer, answers: IO[str]) -> None:
    """Answer requests until there are no more."""
    print(json.dumps(asdict(peer.about())), file=answers)
    for line in sys.stdin:
        print(json.dumps({"seconds": measure(peer, json.loads(line))}), file=answers)


def measure(peer: Peer, request: dict[str, Any]) -> float:
    """Carry out one request."""
    if request["do"] == "decode":
        prompt = random_prompt(request["context"], request["seed"])
        peer.decode(prompt[:WARM_UP], request["tokens"])
        return peer.decode(prompt, request["tokens"])
    prompt = random_prompt(request["length"], request["seed"])
    peer.prefill(prompt)
    return peer.prefill(prompt)


if __name__ == "__main__":
    main()
