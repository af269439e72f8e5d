"""The oracle against transformers, which is fed one token at a time.

So that it can stand in for transformers where that cannot run a checkpoint, or gives no answer
of its own, as it does for equal gates at the border of the window.
"""

from __future__ import annotations

import checkpoints
import numpy as np
import oracle
import pytest
from checkpoints import SHAPES, assert_close, reference_logits, rope
from stepping import fresh_text, random_text

EXPERTS = {
    "one expert": {"num_experts": 1, "num_experts_per_tok": 1},
    "few of many": {"num_experts": 49, "num_experts_per_tok": 3},
    "more per token than rows": {"num_experts": 16, "num_experts_per_tok": 9},
    "all of them": {"num_experts": 9, "num_experts_per_tok": 9, "norm_topk_prob": True},
    "biases, gelu": {
        "num_experts": 25,
        "num_experts_per_tok": 5,
        "mlp_bias": True,
        "hidden_act": "gelu",
    },
}

ROPES = {
    "default": rope("default", theta=5e5),
    "linear": rope("linear", 2.5, theta=300.0),
    "dynamic": rope("dynamic", 4.0),
    "dynamic, other base": rope("dynamic", 1.5, theta=777.0),
}


def compare(directory, ids):
    config, tensors = oracle.read_native(directory)
    assert_close(oracle.logits(config, tensors, ids), reference_logits(directory, ids), 1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_dense(shape, tmp_path):
    compare(checkpoints.make(tmp_path, **SHAPES[shape]), random_text(24, 97))


@pytest.mark.parametrize("experts", EXPERTS)
def test_mixture_of_experts(experts, tmp_path):
    directory = checkpoints.make(tmp_path, num_hidden_layers=2, is_moe=True, **EXPERTS[experts])
    compare(directory, random_text(24, 97))


@pytest.mark.parametrize("kind", ROPES)
def test_rope_past_the_trained_context(kind, tmp_path):
    directory = checkpoints.make(
        tmp_path, num_hidden_layers=2, max_position_embeddings=16, **ROPES[kind]
    )
    compare(directory, random_text(48, 97))


@pytest.mark.parametrize("window", [1, 5, 16])
def test_beyond_the_window(window, tmp_path):
    # No token twice: equal ones have equal gates in the first layer.
    directory = checkpoints.make(
        tmp_path,
        vocab_size=131,
        num_hidden_layers=2,
        keep_window_size=window,
        max_position_embeddings=32,
        **rope("dynamic", 2.0),
    )
    compare(directory, fresh_text(100, 131))


def test_a_window_of_experts_and_biases(tmp_path):
    directory = checkpoints.make(
        tmp_path,
        vocab_size=131,
        num_hidden_layers=2,
        keep_window_size=12,
        attention_bias=True,
        tie_word_embeddings=False,
        is_moe=True,
        num_experts=16,
        num_experts_per_tok=5,
    )
    compare(directory, fresh_text(60, 131))


def kept(gates, window):
    # With softplus(1) as the unit, the gates are e to the power of these.
    head = oracle.Gate.stack([oracle.Gate(np.array([gate]), np.ones(1)) for gate in gates])
    reader = oracle.Oracle.__new__(oracle.Oracle)
    reader.config, reader.margin = {"keep_window_size": window}, np.inf
    return sorted(reader.window(head, 0)[0].tolist()), reader.margin


def test_of_equal_gates_the_latest_stay():
    # The one thing that transformers cannot confirm.
    assert kept([0.5, 0.1, 0.5, 0.9, 0.5], 3)[0] == [2, 3, 4]
    assert kept([0.0, 0.0, 0.0, 0.0], 2) == ([2, 3], np.inf)
    # Different, but all of them 0 in float32.
    assert kept([-500.0, -1.0, -300.0, -900.0], 2) == ([1, 3], np.inf)


def test_a_decision_too_close_for_float32_is_refused(tmp_path):
    assert kept([0.5, 0.7, 0.5000001], 2)[1] < 1e-6
    # Neither 0 nor of full precision.
    assert kept([-70.0, -71.0, -72.0], 2)[1] == 0
    assert kept([0.5, 0.7, 0.6], 2)[1] > 1e-3
    config, tensors = oracle.read_native(
        checkpoints.make(tmp_path, num_hidden_layers=1, keep_window_size=2)
    )
    table = tensors["embed_tokens.weight"]
    table[3] = table[4] * (1 + 1e-9)
    texts = [[3, 4, third] for third in range(5, 20)]
    # In some of these the third token is kept, and it is either the first or the second that is
    # dropped.
    with pytest.raises(AssertionError, match="another seed"):
        [oracle.logits(config, tensors, text) for text in texts]
