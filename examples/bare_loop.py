"""The greedy loop with onnxruntime, numpy and tokenizers alone: a template for ports.

    python examples/bare_loop.py BUNDLE PROMPT

Everything that the model remembers is the state: a key and a value tensor per layer, float32 or
int8 [batch, heads, tokens so far, channels]. A step takes new tokens and the state, and returns
logits and the state with rows added. Prefill is a step with the whole prompt and no rows yet.

`doge_onnx` is faster: it lets the graph add rows in place. This works with both targets.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

# Without this, ONNX Runtime leaves files in your home directory.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
import numpy as np
import onnxruntime as ort
from tokenizers import Tokenizer

MAX_NEW_TOKENS = 60
DTYPES = {"tensor(float)": np.float32, "tensor(int8)": np.int8}


def empty_state(session: ort.InferenceSession) -> dict[str, Any]:
    """A state of no tokens, for one sequence; the graph's inputs say how large a row is."""
    return {
        entry.name: np.zeros((1, entry.shape[1], 0, entry.shape[3]), DTYPES[entry.type])
        for entry in session.get_inputs()
        if entry.name.startswith("past_key_values.")
    }


def step(session: ort.InferenceSession, tokens: list[int], state: dict[str, Any]) -> Any:
    """Feed new tokens; return the logits of the last one, and the next state."""
    past = next(iter(state.values())).shape[2]
    feeds = {
        "input_ids": np.array([tokens], np.int64),
        # One for every token, past and new; a zero would mark padding, which one sequence lacks.
        "attention_mask": np.ones((1, past + len(tokens)), np.int64),
    }
    names = [entry.name for entry in session.get_outputs()]
    outputs = dict(zip(names, session.run(names, feeds | state), strict=True))
    # present.3.key of this step is past_key_values.3.key of the next one.
    next_state = {name: outputs[name.replace("past_key_values", "present")] for name in state}
    return outputs["logits"][0, -1], next_state


def main() -> None:
    """Load a bundle and continue a prompt."""
    if len(sys.argv) != 3:
        sys.exit("usage: bare_loop.py BUNDLE PROMPT")
    bundle, prompt = Path(sys.argv[1]), sys.argv[2]
    config: dict[str, Any] = {}
    for name in ("doge_onnx.json", "config.json", "generation_config.json"):
        if (bundle / name).exists():
            config |= json.loads((bundle / name).read_text(encoding="utf-8"))
    if config["state"]["kind"] != "growing":
        sys.exit("this loop is for the state that grows with the text")
    tokenizer = Tokenizer.from_file(str(bundle / "tokenizer.json"))
    options = ort.SessionOptions()
    # Keeps quiet about `logits_to_keep`, an optional input that has a default.
    options.log_severity_level = 3
    session = ort.InferenceSession(bundle / config["graph"], options)
    eos = config.get("eos_token_id")
    ends = eos if isinstance(eos, list) else [eos]

    ids = tokenizer.encode(prompt).ids
    limit = min(config["context_length"], len(ids) + MAX_NEW_TOKENS)
    generated: list[int] = []
    logits, state = step(session, ids, empty_state(session))
    while len(ids) + len(generated) < limit and (token := int(logits.argmax())) not in ends:
        generated.append(token)
        logits, state = step(session, [token], state)
    print(tokenizer.decode(generated))


if __name__ == "__main__":
    main()
