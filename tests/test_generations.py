"""Doge2 and the Doges with `window_size`, which transformers does not know.

The truth is the oracle, written from the equations and compared with transformers on the generation
that both have.
"""

from __future__ import annotations

import numpy as np
import older_checkpoints
import pytest
import torch
from checkpoints import assert_close
from loaded import assert_batch_close, in_pieces
from stepping import Growing, Window, each, fresh_text, random_text, row

import doge_onnx
from doge_onnx.errors import CheckpointError, ConfigError
from doge_onnx.export import checkpoint as checkpoint_reader
from doge_onnx.export.eager import EagerModel

pytestmark = pytest.mark.slow

VOCABULARY = 131
WINDOW = 20
EXPERTS = {"is_moe": True, "num_experts": 16, "num_experts_per_tok": 5}
# The window is shorter than the trained context, as in the recipe of Doge2.
SHAPES = {
    "doge2": {"model_type": "doge2", "keep_window_size": WINDOW},
    "doge2, mixture": {"model_type": "doge2", "keep_window_size": WINDOW, **EXPERTS},
    "doge2, attention bias": {
        "model_type": "doge2",
        "keep_window_size": WINDOW,
        "attention_bias": True,
        "extra_config": {"dynamic_mask_ratio": 0.0},
    },
    "window_size": {"window_size": WINDOW},
    "window_size, mixture": {"window_size": WINDOW, **EXPERTS},
    "window_size, one KV head, biases": {
        "window_size": WINDOW,
        "num_key_value_heads": 1,
        "attention_bias": True,
        "mlp_bias": True,
    },
}


def make(directory, shape, seed=1, **overrides):
    fields = {"vocab_size": VOCABULARY, **SHAPES[shape], **overrides}
    return older_checkpoints.make(directory, "native", seed=seed, **fields)


@pytest.mark.parametrize("kind", [Growing, Window])
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_are_those_of_the_oracle(shape, kind, tmp_path):
    model = make(tmp_path, shape)
    # No token twice: above the first layer, equality of gates is an accident of rounding.
    ids = fresh_text(90, VOCABULARY)
    truth = model.logits(ids)
    step = kind(tmp_path)
    for cuts in ([], [3, 19, 20, 21, 40, 41, 70]):
        assert_close(step.run(row(ids), cuts=cuts)[0], truth)


def test_the_gates_without_exp_are_of_both_signs_and_matter(tmp_path):
    model = make(tmp_path, "window_size")
    signs = {bool(value > 0) for n, t in model.tensors.items() if n.endswith(".A") for value in t}
    assert signs == {True, False}
    ids = fresh_text(40, VOCABULARY)
    truth = model.logits(ids)
    model.config["keep_window_size"] = model.config.pop("window_size")
    assert np.abs(model.logits(ids) - truth).max() > 0.05 * np.abs(truth).max()


@pytest.mark.parametrize("kind", [Growing, Window])
@pytest.mark.parametrize("A", [-1.5, 0.0, 1.5])
def test_of_equal_gates_without_exp_the_latest_stay(A, kind, tmp_path):
    model = make(tmp_path, "window_size", A=A, num_hidden_layers=1)
    ids = random_text(80, 9)
    step = kind(tmp_path)
    truth = model.logits(ids)
    for cuts in ([], each(80)):
        assert_close(step.run(row(ids), cuts=cuts)[0], truth)


@pytest.mark.parametrize("shape", ["doge2, mixture", "window_size, mixture"])
@pytest.mark.parametrize(("target", "state"), [("ort", "growing"), ("portable", "window")])
def test_the_bundle_computes_the_same(shape, target, state, tmp_path):
    model = make(tmp_path / "checkpoint", shape)
    report = doge_onnx.export(
        tmp_path / "checkpoint", tmp_path / "bundle", target=target, state=state
    )
    assert report.parity is not None
    assert "transformers cannot run this checkpoint" in report.parity.reference
    bundle = doge_onnx.load(tmp_path / "bundle")
    ids = fresh_text(60, VOCABULARY, seed=6)
    for cuts in ([1, 18, 19, 37, 38, 39], each(60)):
        assert_close(in_pieces(bundle, ids, cuts), model.logits(ids))
    assert_batch_close(bundle, model.logits, VOCABULARY)


def test_gates_without_exp_in_int8(tmp_path):
    # A gate below the range of its channels would close its key, or be a larger one.
    model = make(tmp_path / "checkpoint", "window_size", window_size=64, A=-3.0)
    doge_onnx.export(
        tmp_path / "checkpoint", tmp_path / "bundle", kv_cache="int8", precision="int8"
    )
    ids = fresh_text(40, VOCABULARY)
    truth = model.logits(ids)
    assert_close(in_pieces(doge_onnx.load(tmp_path / "bundle"), ids, [30]), truth, 0.05)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gates_without_exp_in_half_precision(dtype, tmp_path):
    model = make(tmp_path, "window_size")
    ids = fresh_text(60, VOCABULARY)
    step = EagerModel(checkpoint_reader.read(tmp_path), 64, dtype)
    assert_close(step.logits(ids), model.logits(ids), 0.1 if dtype == torch.bfloat16 else 0.02)


def test_a_window_of_the_older_layout_is_not_guessed_at(tmp_path):
    older_checkpoints.make(tmp_path, "older", window_size=16)
    with pytest.raises(CheckpointError, match="tensors of older Doges"):
        checkpoint_reader.read(tmp_path)


def test_of_two_windows_the_caller_says_which_counts(tmp_path):
    model = make(tmp_path / "both", "window_size", extra_config={"keep_window_size": 2048})
    with pytest.raises(ConfigError, match="window_size and keep_window_size"):
        checkpoint_reader.read(tmp_path / "both")
    read = checkpoint_reader.read(tmp_path / "both", ignore=["keep_window_size"])
    assert read.config.keep_window_size == WINDOW
    assert not read.is_native
    ids = fresh_text(30, VOCABULARY)
    assert_close(EagerModel(read, 64).logits(ids), model.logits(ids))
    assert checkpoint_reader.read(tmp_path / "both", ignore=["window_size"]).is_native
