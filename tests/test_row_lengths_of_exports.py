"""Batches of unequal lengths with exported bundles, against the oracle or each sequence alone."""

from __future__ import annotations

import numpy as np
import older_checkpoints
import oracle
import pytest
from checkpoints import assert_close
from feeding import feed_at_random
from runners import on_device
from stepping import fresh_text

from doge_onnx.bundle import Bundle
from doge_onnx.runtime.cuda.executor import PROCESS_LOCK
from doge_onnx.runtime.cuda.runner import CudaWindowRunner
from doge_onnx.runtime.engine import state as states
from doge_onnx.runtime.engine.kernels import choose_kernels
from doge_onnx.runtime.loader import open_runner

VOCABULARY = older_checkpoints.SMALL["vocab_size"]
CONTEXT = 120
WINDOW = {"keep_window_size": 20}
MIXTURE = {"is_moe": True, "num_experts": 16, "num_experts_per_tok": 5}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}

# Nine gates in a step of one token: kernels that compute four at once have a rest.
HEADS = {"layout": "native", "num_hidden_layers": 1, "num_key_value_heads": 3}
CHECKPOINTS = {
    "dense": HEADS,
    "narrow": HEADS | WINDOW,
    "narrow mixture": HEADS | WINDOW | MIXTURE,
}


def on_cpu(path, chunk):
    return open_runner(Bundle.open(path), "cpu", chunk=chunk)


def on_window_device(path, chunk):
    return on_device(path, CudaWindowRunner, chunk)


def with_static_steps(path, chunk):
    runner = on_device(path, chunk=chunk)
    with PROCESS_LOCK:
        assert runner.use_static_steps(capture=False) is None
    return runner


# Checkpoint, options of the export, what runs it, and by how much logits may differ: they are
# about 5. An int8 row may be rounded to its other neighbour.
KINDS = {
    "in place": ("dense", {}, on_cpu, 1e-3),
    "int8 state": ("dense", {"kv_cache": "int8"}, on_cpu, 0.1),
    "past the window": ("narrow", {}, on_cpu, 1e-3),
    "portable": ("dense", {"target": "portable"}, on_cpu, 1e-3),
    "window": ("narrow", {"state": "window"}, on_cpu, 1e-3),
    "portable window": ("narrow", {"state": "window", "target": "portable"}, on_cpu, 1e-3),
    "window on a device": ("narrow", {"state": "window"}, on_window_device, 1e-3),
    "fp16": ("dense", {"device": "cuda"}, on_cpu, 0.05),
    "fp16 on a device": ("dense", {"device": "cuda"}, on_device, 0.05),
    "fp16, static steps": ("dense", {"device": "cuda"}, with_static_steps, 0.05),
    "fp16, past the window": ("narrow", {"device": "cuda"}, on_device, 0.05),
}


@pytest.fixture(scope="module")
def bundle(make_bundle, tmp_path_factory):
    """The path of an exported bundle, by its checkpoint and options."""
    made = {}

    def get(name, options):
        if name not in made:
            made[name] = tmp_path_factory.mktemp("checkpoint")
            older_checkpoints.make(made[name], seed=3, **CHECKPOINTS[name])
        return make_bundle(made[name], verify=False, context_length=CONTEXT, **options).path

    return get


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", KINDS)
def test_each_sequence_gets_what_it_gets_alone(kind, seed, bundle, monkeypatch):
    monkeypatch.setattr(states, "FIRST_CAPACITY", 8)
    name, options, new, tolerance = KINDS[kind]
    path = bundle(name, options)
    alone = on_cpu(path, chunk=CONTEXT)

    def truth(ids):
        return alone.forward([np.array(ids)], None, last_only=False)[0][0]

    feed_at_random(new(path, chunk=16), truth, VOCABULARY, CONTEXT, tolerance, seed)


# Checkpoint and options, and by which part of the largest logit a sequence may differ from alone:
# by none, unless kernels treat one row in another way than several. ONNX Runtime's for 4-bit
# products do so on every processor; in half precision for GPUs, Softplus does on a CPU.
PRECISIONS = {
    "fp32": ("dense", {}, 0),
    "fp32, int8 state": ("dense", {"kv_cache": "int8"}, 0),
    "fp32, past the window": ("narrow", {}, 0),
    "int8": ("dense", {"precision": "int8"}, 0),
    "int8, int8 state": ("dense", {"precision": "int8", "kv_cache": "int8"}, 0),
    "int8, mixture past the window": ("narrow mixture", {"precision": "int8"}, 0),
    "int4": ("dense", {"precision": "int4"}, 0.03),
    "int4, int8 state": ("dense", {"precision": "int4", "kv_cache": "int8"}, 0.03),
    "fp16": ("dense", {"device": "cuda"}, 0.005),
}


@pytest.fixture(scope="module", params=PRECISIONS)
def precise(request, bundle):
    """A bundle in each precision, and how near its rows are to what they are alone."""
    name, options, tolerance = PRECISIONS[request.param]
    if "precision" in options:
        options = {"rounding": "nearest", **options}
    path = bundle(name, options)
    if choose_kernels(Bundle.open(path).manifest).instructions:
        tolerance = 0
    return path, tolerance


def test_a_sequence_of_a_batch_gets_its_own_bits(precise):
    path, tolerance = precise
    runner, rng = on_cpu(path, chunk=CONTEXT), np.random.default_rng(2)
    # Some can share a run and are not equally long, some cannot.
    prompts = [rng.integers(0, VOCABULARY, count) for count in (1, 1, 7, 9, 12, 12, 60)]
    following = rng.integers(0, VOCABULARY, (4, len(prompts)))

    def logits_of(numbers):
        """Logits after the prompts and after each token behind them, `[1 + steps, V]` of each."""
        rows, state = runner.forward([prompts[n] for n in numbers], None, last_only=True)
        every = [[row[-1]] for row in rows]
        session = runner.decode(state)
        for tokens in following:
            scores = session.step([tokens[numbers[row]] for row in session.rows])
            for row, score in zip(session.rows, scores, strict=True):
                every[row].append(score.copy())
        return every

    together = logits_of(range(len(prompts)))
    for number, got in enumerate(together):
        (alone,) = logits_of([number])
        assert_near(got, alone, tolerance)


def test_logits_do_not_depend_on_the_size_of_chunks(precise):
    path, tolerance = precise
    text = np.random.default_rng(3).integers(0, VOCABULARY, 61)
    whole = on_cpu(path, CONTEXT).forward([text], None, last_only=False)[0]
    # With five, a single token would remain. For single tokens, attention sums in another order.
    for chunk, allowed in ((5, tolerance), (16, tolerance), (1, 0.03), (2, 0.03)):
        in_chunks = on_cpu(path, chunk).forward([text], None, last_only=False)[0]
        assert_near(in_chunks, whole, allowed)


def assert_near(got, alone, tolerance):
    """Compare logits; the difference is measured against the largest of them."""
    difference = np.abs(np.array(got) - np.array(alone)).max()
    assert difference <= tolerance * np.abs(alone).max()


MODELS = {
    "native mixture": {"layout": "native", **MIXTURE},
    "intermediate mixture": {"layout": "intermediate", "norm_topk_prob": True, **MIXTURE},
    "older, everything": {
        "layout": "older",
        "max_position_embeddings": 32,
        "rope_parameters": DYNAMIC,
        "attention_bias": True,
        "mlp_bias": True,
        "router_bias": True,
        **WINDOW,
        **MIXTURE,
    },
}


@pytest.mark.parametrize("name", MODELS)
def test_unequal_batches_are_the_oracles(name, make_bundle, tmp_path):
    model = older_checkpoints.make(tmp_path / "checkpoint", seed=8, **MODELS[name])
    path = make_bundle(model.directory, verify=False, context_length=CONTEXT).path
    runner = on_cpu(path, chunk=16)
    texts = [fresh_text(length, VOCABULARY, seed=length) for length in (48, 10, 33, 34)]
    truths = [oracle.logits(model.config, model.tensors, text) for text in texts]
    # A prompt, another turn of unequal lengths, and then a token at a time.
    first, second = (20, 1, 5, 6), (33, 7, 5, 30)
    rows, state = runner.forward(_cut(texts, (0,) * 4, first), None, last_only=False)
    more, state = runner.forward(_cut(texts, first, second), state, last_only=False)
    got = [np.concatenate(pair) for pair in zip(rows, more, strict=True)]
    lengths = list(second)
    session = runner.decode(state)
    while lengths != [len(text) for text in texts]:
        if ended := [row for row in session.rows if lengths[row] == len(texts[row])]:
            session.remove(ended)
        scores = session.step([texts[row][lengths[row]] for row in session.rows])
        for row, logits in zip(session.rows, scores, strict=True):
            got[row] = np.concatenate([got[row], logits[np.newaxis]])
            lengths[row] += 1
    for ours, truth in zip(got, truths, strict=True):
        assert_close(ours, truth)


def _cut(texts, starts, ends):
    pairs = zip(texts, starts, ends, strict=True)
    return [np.array(text[start:end], np.int64) for text, start, end in pairs]
