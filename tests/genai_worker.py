"""Runs onnxruntime-genai for tests, in an environment of its own: requests in, replies out.

Each line of standard input is a JSON object: the path of a bundle, the name of one of the functions
below, and its arguments. Each line of standard output is what it returned, or the error.
"""

from __future__ import annotations

import functools
import json
import sys

import numpy as np
import onnxruntime_genai as og


@functools.cache
def load(bundle):
    model = og.Model(bundle)
    return model, og.Tokenizer(model)


def begin(bundle, max_length=None, **search):
    model, _ = load(bundle)
    params = og.GeneratorParams(model)
    if max_length is not None:
        search["max_length"] = max_length
    params.set_search_options(**search)
    return og.Generator(model, params)


def search_options(bundle):
    model, tokenizer = load(bundle)
    return {
        **og.GeneratorParams(model).get_search_options(),
        "bos": int(tokenizer.bos_token_id),
        "eos": [int(i) for i in tokenizer.eos_token_ids],
        "pad": int(tokenizer.pad_token_id),
    }


def encode(bundle, texts, add_special_tokens):
    _, tokenizer = load(bundle)
    tokenizer.update_options(add_special_tokens="true" if add_special_tokens else "false")
    return [tokenizer.encode(text).tolist() for text in texts]


def encode_batch(bundle, texts):
    _, tokenizer = load(bundle)
    tokenizer.update_options(add_special_tokens="true")
    return tokenizer.encode_batch(texts).as_numpy().tolist()


def decode(bundle, ids):
    """The text at once, and in pieces."""
    _, tokenizer = load(bundle)
    stream = tokenizer.create_stream()
    return tokenizer.decode(np.array(ids, np.int32)), [stream.decode(i) for i in ids]


def template(bundle, messages, add_generation_prompt=True):
    _, tokenizer = load(bundle)
    return tokenizer.apply_chat_template(
        json.dumps(messages), add_generation_prompt=add_generation_prompt
    )


def generate(bundle, prompts, **search):
    """What follows each of the prompts, which are equally long."""
    generator = begin(bundle, batch_size=len(prompts), **search)
    generator.append_tokens(np.array(prompts, np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    length = len(prompts[0])
    return [generator.get_sequence(row).tolist()[length:] for row in range(len(prompts))]


def stream(bundle, prompt, **search):
    """The loop of its documentation: text to tokens to text, piece by piece."""
    _, tokenizer = load(bundle)
    tokenizer.update_options(add_special_tokens="true")
    ids = tokenizer.encode(prompt)
    generator = begin(bundle, **search)
    generator.append_tokens(ids)
    pieces = []
    decoder = tokenizer.create_stream()
    while not generator.is_done():
        generator.generate_next_token()
        pieces.append(decoder.decode(generator.get_next_tokens()[0]))
    return pieces


def script(bundle, actions, **search):
    """One generator that is told several things; what each `generate` made."""
    generator = begin(bundle, **search)
    made = []
    for name, value in actions:
        if name == "append":
            generator.append_tokens(np.array([value], np.int32))
        elif name == "rewind":
            generator.rewind_to(value)
        else:
            tokens = []
            for _ in range(value):
                generator.generate_next_token()
                tokens.append(int(generator.get_next_tokens()[0]))
            made.append(tokens)
    return made


def in_turn(bundle, prompts, count, **search):
    """A generator for each of the prompts; they take turns."""
    generators = [begin(bundle, **search) for _ in prompts]
    for generator, prompt in zip(generators, prompts, strict=True):
        generator.append_tokens(np.array([prompt], np.int32))
    rows = [[] for _ in prompts]
    for _ in range(count):
        for generator, row in zip(generators, rows, strict=True):
            generator.generate_next_token()
            row.append(int(generator.get_next_tokens()[0]))
    return rows


def main():
    calls = {f.__name__: f for f in (
        search_options, encode, encode_batch, decode, template, generate, stream, script, in_turn
    )}  # fmt: skip
    for line in sys.stdin:
        request = json.loads(line)
        try:
            reply = {"result": calls[request.pop("call")](**request)}
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {error}"}
        sys.stdout.write(json.dumps(reply) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
