"""Cross Domain Mixtures of Experts: each token is routed by itself, however it is fed."""

from __future__ import annotations

import numpy as np
import older_checkpoints
import pytest
import torch
from checkpoints import assert_close
from loaded import assert_batch_close, in_pieces
from stepping import Growing, Window, each, fresh_text, pad, random_text, row

import doge_onnx
from doge_onnx.export import step as step_module

pytestmark = pytest.mark.slow

VOCABULARY = older_checkpoints.SMALL["vocab_size"]

# Number of experts and how many of them each token gets.
EXPERTS = {
    "one expert": (1, 1),
    "one of four": (4, 1),
    "all of nine": (9, 9),
    "more per token than rows": (16, 11),
    "as many per token as rows": (25, 5),
    "few of many": (225, 4),
    "Doge-20M-MoE": (1024, 16),
    "Doge-120M-MoE": (4096, 32),
}


def make(directory, experts, per_token, **overrides):
    return older_checkpoints.make(
        directory, "native", is_moe=True, num_experts=experts, num_experts_per_tok=per_token,
        **overrides,
    )  # fmt: skip


@pytest.mark.parametrize("experts", EXPERTS)
def test_logits_are_those_of_the_oracle(experts, tmp_path):
    model = make(tmp_path, *EXPERTS[experts])
    ids = random_text(40, VOCABULARY)
    truth = model.logits(ids)
    step = Growing(tmp_path)
    for cuts in ([], [1, 2, 9, 30], each(40)):
        assert_close(step.run(row(ids), cuts=cuts)[0], truth)


@pytest.mark.parametrize(
    "overrides",
    [
        {"norm_topk_prob": True},
        {"hidden_act": "gelu"},
        {"mlp_bias": True, "attention_bias": True},
        {"tie_word_embeddings": False, "num_hidden_layers": 1},
    ],
    ids=repr,
)
@pytest.mark.parametrize("operators", ["fused", "standard"])
def test_options(overrides, operators, tmp_path):
    model = make(tmp_path, 36, 8, **overrides)
    ids = random_text(30, VOCABULARY, seed=5)
    logits = Growing(tmp_path, operators).run(row(ids), cuts=[3, 4, 20])
    assert_close(logits[0], model.logits(ids))


def test_a_batch_gives_each_row_what_it_gives_alone(tmp_path):
    model = make(tmp_path, 49, 6)
    texts = [random_text(length, VOCABULARY, seed=length) for length in (25, 3, 14)]
    ids, mask = pad(texts)
    logits = Growing(tmp_path).run(ids, mask, cuts=[4, 24])
    for got, text in zip(logits, texts, strict=True):
        assert_close(got[-len(text) :], model.logits(text))


def test_beyond_the_window(tmp_path):
    model = make(tmp_path, 25, 7, keep_window_size=20, seed=2)
    ids = fresh_text(61, VOCABULARY, seed=1)
    truth = model.logits(ids)
    assert_close(Growing(tmp_path).run(row(ids), cuts=[5, 27, 28])[0], truth)
    assert_close(Window(tmp_path).run(row(ids), cuts=[5, 27, 28])[0], truth)


def test_only_the_best_rows_and_columns_are_combined(tmp_path, monkeypatch):
    # 64 experts, 3 per token: the second choice is among 9 sums, not among 64.
    make(tmp_path, 64, 3)
    sizes = []
    topk = torch.Tensor.topk

    def counting(scores, *args, **options):
        sizes.append(scores.shape[-1])
        return topk(scores, *args, **options)

    monkeypatch.setattr(step_module.Tensor, "topk", counting)
    Growing(tmp_path).run(row([1, 2]))
    assert sizes == [8, 8, 9] * older_checkpoints.SMALL["num_hidden_layers"]


def test_the_experts_matter(tmp_path):
    # Otherwise most of this file would pass with the shared MLP alone.
    model = make(tmp_path, 16, 11)
    ids = random_text(40, VOCABULARY)
    truth = model.logits(ids)
    for name, tensor in model.tensors.items():
        if name.endswith("up_embed.weight"):
            tensor[:] = 0
    assert np.abs(model.logits(ids) - truth).max() > 0.1 * np.abs(truth).max()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("mixture")
    return make(directory, 16, 6, keep_window_size=24, seed=4, norm_topk_prob=True)


@pytest.fixture(
    scope="module",
    params=[("ort", "growing"), ("ort", "window"), ("portable", "growing")],
    ids="-".join,
)
def bundle(request, model, tmp_path_factory):
    target, state = request.param
    out = tmp_path_factory.mktemp("bundle") / "out"
    doge_onnx.export(
        model.directory, out, target=target, state=state, context_length=100, verify=False
    )
    return doge_onnx.load(out)


def test_the_bundle_computes_the_same(model, bundle):
    ids = fresh_text(60, VOCABULARY, seed=6)
    assert_close(in_pieces(bundle, ids, [1, 18, 19, 37, 38, 39]), model.logits(ids))


def test_the_bundle_takes_a_batch(model, bundle):
    assert_batch_close(bundle, model.logits, VOCABULARY)
