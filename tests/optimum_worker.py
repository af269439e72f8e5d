"""Runs in the environment of tests/requirements/optimum.txt: what Optimum makes of bundles.

Reads a JSON object with the paths of bundles and checkpoints from its first argument, prints one
with what was generated. One process for all, since the imports alone take seconds.
"""

import contextlib
import io
import json
import sys
from pathlib import Path

import torch
from optimum.onnxruntime import ORTModelForCausalLM
from transformers import (
    AutoConfig,
    AutoTokenizer,
    DogeForCausalLM,
    GPT2Config,
    TextStreamer,
    pipeline,
)

from doge_onnx import DogeOnnxError
from doge_onnx.optimum import ORTDogeForCausalLM
from optimum.commands import optimum_cli

torch.set_num_threads(1)
GREEDY = {"do_sample": False}


def padded(prompts):
    """A batch of token ids, padded on the left."""
    width = max(map(len, prompts))
    return {
        "input_ids": torch.tensor([[2] * (width - len(ids)) + ids for ids in prompts]),
        "attention_mask": torch.tensor(
            [[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts]
        ),
    }


def continued(model, prompts, **options):
    """What a model generates after each prompt of one batch."""
    batch = padded(prompts)
    return model.generate(**batch, **options)[:, batch["input_ids"].shape[1] :].tolist()


def error(call):
    """What the package says of a call that cannot work."""
    try:
        call()
    except DogeOnnxError as raised:
        return f"{type(raised).__name__}: {raised}"
    return None


def greedy(path, prompts, count):
    """The greedy continuations of a bundle, each alone, all at once, and without a state."""
    model = ORTDogeForCausalLM.from_pretrained(path)
    stateless = ORTDogeForCausalLM.from_pretrained(path, use_cache=False)
    return {
        "alone": [continued(model, [ids], max_new_tokens=count, **GREEDY)[0] for ids in prompts],
        "batch": continued(model, prompts, max_new_tokens=count, **GREEDY),
        "stateless": continued(stateless, prompts, max_new_tokens=8, **GREEDY),
    }


def transformers_itself(path, checkpoint, prompts):
    """Searching and sampling, by a bundle and by the checkpoint in PyTorch."""
    results = {}
    for name, model in (
        ("onnx", ORTDogeForCausalLM.from_pretrained(path)),
        # Its default, sdpa, attends to future tokens.
        ("torch", DogeForCausalLM.from_pretrained(checkpoint, attn_implementation="eager")),
    ):
        torch.manual_seed(5)
        results[name] = {
            "sampled": continued(model, prompts, max_new_tokens=12, do_sample=True, top_p=0.9),
            "beams": continued(model, prompts, max_new_tokens=12, num_beams=3, **GREEDY),
        }
    return results


def texts(path, prompt):
    """The greedy text of a bundle through a streamer, a pipeline and Optimum's own class."""
    model = ORTDogeForCausalLM.from_pretrained(path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    inputs = tokenizer(prompt, return_tensors="pt")
    options = {"max_new_tokens": 20, **GREEDY}
    with contextlib.redirect_stdout(io.StringIO()) as streamed:
        model.generate(**inputs, streamer=TextStreamer(tokenizer, skip_prompt=True), **options)
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
    # What docs/optimum.md says of a machine without this package.
    config = AutoConfig.from_pretrained(path)
    config.num_attention_heads, row = model.num_key_value_heads, model.embed_size_per_head
    config.hidden_size = config.num_attention_heads * row
    plain = ORTModelForCausalLM.from_pretrained(path, config=config)
    bound = ORTDogeForCausalLM.from_pretrained(path, use_io_binding=True)
    begin = inputs["input_ids"].shape[1]
    return {
        "streamed": streamed.getvalue(),
        "pipeline": pipe(prompt, return_full_text=False, **options)[0]["generated_text"],
        "plain": tokenizer.decode(plain.generate(**inputs, **options)[0, begin:]),
        "bound": tokenizer.decode(bound.generate(**inputs, **options)[0, begin:]),
    }


def errors(path, window, asked):
    """What is said where something does not fit."""
    model = ORTDogeForCausalLM.from_pretrained(path)
    ids, long = torch.tensor([[5, 6, 7]]), torch.zeros(1, 3000, dtype=torch.int64)
    state = ORTDogeForCausalLM.from_pretrained(window)
    past = state(ids).past_key_values
    bound = ORTDogeForCausalLM.from_pretrained(window, use_io_binding=True)
    return {
        "mask": error(lambda: model(ids, attention_mask=torch.ones(1, 2, dtype=torch.int64))),
        "long": error(lambda: model(long)),
        "type": error(lambda: ORTDogeForCausalLM.from_pretrained(path, config=GPT2Config())),
        "graph": error(lambda: ORTDogeForCausalLM.from_pretrained(asked["other"])),
        "format": error(lambda: ORTDogeForCausalLM.from_pretrained(asked["format"])),
        "window mask": error(lambda: state(ids, past_key_values=past)),
        "window binding": error(lambda: bound(ids)),
    }


def saved(path, directory, prompts):
    """The greedy continuation after `save_pretrained`."""
    ORTDogeForCausalLM.from_pretrained(path).save_pretrained(directory)
    model = ORTDogeForCausalLM.from_pretrained(directory)
    return continued(model, prompts, max_new_tokens=8, **GREEDY)


def exported(checkpoint, prompts):
    """What a checkpoint becomes that is exported as it is loaded."""
    model = ORTDogeForCausalLM.from_pretrained(checkpoint, export=True, context_length=40)
    manifest = json.loads((Path(model.path).parent / "doge_onnx.json").read_text())
    # More than the context has room for.
    texts = model.generate(**padded(prompts), max_new_tokens=100, **GREEDY)
    return {"parity": manifest["parity"], "longest": texts.shape[1]}


def command_line(arguments):
    """Exit code and last line of what `optimum-cli` says where it fails."""
    sys.argv = ["optimum-cli", *arguments]
    with contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            optimum_cli.main()
        except SystemExit as end:
            return end.code, said.getvalue().splitlines()[-1]
        # What Optimum itself has no words for is a traceback.
        except Exception as raised:
            return 1, f"{type(raised).__name__}: {raised}"
    return 0, said.getvalue()


def main():
    """Do what the first argument asks for."""
    asked = json.loads(sys.argv[1])
    bundles, ids = asked["bundles"], asked["ids"]
    tiny, window = bundles["fp32"], bundles["window"]
    results = {
        "greedy": {name: greedy(bundles[name], ids[name], asked["count"]) for name in bundles},
        "transformers": transformers_itself(tiny, asked["checkpoint"], ids["fp32"]),
        "texts": texts(tiny, asked["prompt"]),
        "errors": errors(tiny, window, asked),
        "saved": saved(tiny, asked["directory"], ids["fp32"]),
        "commands": [command_line(arguments) for arguments in asked["commands"]],
        "exported": {name: exported(asked[name], ids["window"]) for name in ("experts", "linear")},
    }
    sys.stdout.write(json.dumps(results) + "\n")


if __name__ == "__main__":
    main()
