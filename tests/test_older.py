"""Older checkpoints: the remote-code layout and the mixtures on the way to the native one.

transformers cannot run them, so the truth is the oracle, which `test_oracle` compares with
transformers on native ones.
"""

from __future__ import annotations

import json

import numpy as np
import older_checkpoints
import pytest
from checkpoints import assert_close
from loaded import assert_batch_close, in_pieces
from older_checkpoints import LAYOUTS, Layout
from safetensors.numpy import load_file, save_file
from stepping import Growing, Window, each, fresh_text, pad, random_text, row

import doge_onnx
from doge_onnx.errors import ConfigError, DogeOnnxError
from doge_onnx.export import checkpoint as checkpoint_reader

pytestmark = pytest.mark.slow

VOCABULARY = older_checkpoints.SMALL["vocab_size"]

VARIANTS = {
    "dense": {},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "untied": {"tie_word_embeddings": False},
    "mixture": {"is_moe": True, "num_experts": 25, "num_experts_per_tok": 7},
    "mixture, router bias": {
        "is_moe": True,
        "num_experts": 16,
        "num_experts_per_tok": 3,
        "router_bias": True,
    },
    "one KV head": {"num_key_value_heads": 1},
    "every head a KV head": {"num_key_value_heads": 6},
    "linear RoPE": {
        "max_position_embeddings": 16,
        "rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 500.0},
    },
    "dynamic RoPE": {
        "max_position_embeddings": 16,
        "rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4},
    },
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "native"])
def test_logits_are_those_of_the_oracle(layout, variant, tmp_path):
    model = older_checkpoints.make(tmp_path, layout, **VARIANTS[variant])
    ids = random_text(40, VOCABULARY)
    truth = model.logits(ids)
    step = Growing(tmp_path)
    for cuts in ([], [1, 2, 9, 30]):
        assert_close(step.run(row(ids), cuts=cuts)[0], truth)
    assert_close(Growing(tmp_path, "standard").run(row(ids), cuts=[11])[0], truth)


def test_the_reader_says_what_the_tensors_are(tmp_path):
    for name, layout in LAYOUTS.items():
        older_checkpoints.make(tmp_path / name, layout)
        read = checkpoint_reader.read(tmp_path / name)
        assert read.qk_norm == layout.qk_norm
        assert read.gate_heads == (6 if layout.query_gates else 2)
        assert read.is_native == (name == "native")


def test_names_do_not_decide(tmp_path):
    # Remote-code names for the native model: nobody published one, and still it is that model.
    renamed = Layout(remote_names=True, qk_norm=True, query_gates=False)
    model = older_checkpoints.make(tmp_path, renamed)
    ids = random_text(20, VOCABULARY)
    assert_close(Growing(tmp_path).run(row(ids))[0], model.logits(ids))


def test_gates_of_query_heads_differ_within_a_group(tmp_path):
    # Otherwise a model that takes one gate for the whole group would pass as well.
    model = older_checkpoints.make(tmp_path)
    ids = random_text(40, VOCABULARY)
    truth = model.logits(ids)
    for name, tensor in model.tensors.items():
        if name.endswith(".A") or ".dt_proj." in name:
            tensor[:] = np.repeat(tensor[::3], 3, axis=0)
    assert np.abs(model.logits(ids) - truth).max() > 0.05 * np.abs(truth).max()


def test_a_batch_gives_each_row_what_it_gives_alone(tmp_path):
    model = older_checkpoints.make(tmp_path)
    texts = [random_text(length, VOCABULARY, seed=length) for length in (25, 3, 14)]
    ids, mask = pad(texts)
    logits = Growing(tmp_path).run(ids, mask, cuts=[4, 24])
    for got, text in zip(logits, texts, strict=True):
        assert_close(got[-len(text) :], model.logits(text))


@pytest.mark.parametrize("kind", [Growing, Window])
@pytest.mark.parametrize("groups", [1, 2, 6])
def test_each_query_head_has_a_window_of_its_own(groups, kind, tmp_path):
    model = older_checkpoints.make(
        tmp_path,
        "intermediate",
        seed=3,
        keep_window_size=16,
        num_key_value_heads=groups,
        vocab_size=307,
    )
    ids = fresh_text(300, 307)
    truth = model.logits(ids)
    step = kind(tmp_path)
    for cuts in ([], [3, 15, 16, 17, 40, 41, 42, 200]):
        assert_close(step.run(row(ids), cuts=cuts)[0], truth)


def test_the_first_checkpoints_have_no_window(tmp_path):
    # They have dynamic_mask_ratio instead, and with 0 drop nothing, however long the text.
    model = older_checkpoints.make(tmp_path, extra_config={"dynamic_mask_ratio": 0.0}, seed=3)
    model.config["keep_window_size"] = None
    assert checkpoint_reader.read(tmp_path).config.keep_window_size is None
    ids = random_text(80, VOCABULARY)
    assert_close(Growing(tmp_path).run(row(ids), cuts=[30])[0], model.logits(ids))
    with pytest.raises(DogeOnnxError, match="no window"):
        doge_onnx.export(tmp_path, tmp_path / "out", state="window")
    assert not (tmp_path / "out").exists()


def test_no_code_of_a_checkpoint_is_executed(tmp_path):
    model = older_checkpoints.make(tmp_path / "checkpoint", num_hidden_layers=1)
    code = (model.directory / "modeling_doge.py").read_text()
    # The trap works: this is what running it would leave.
    exec(compile(code, "modeling_doge.py", "exec"), {})
    assert model.marker.exists()
    model.marker.unlink()
    doge_onnx.export(model.directory, tmp_path / "bundle")
    doge_onnx.load(tmp_path / "bundle").forward([[1, 2]])
    assert not model.marker.exists()
    assert not [path for path in (tmp_path / "bundle").iterdir() if path.suffix == ".py"]


def test_dynamic_mask_ratio_is_refused_by_name(tmp_path):
    older_checkpoints.make(tmp_path, extra_config={"dynamic_mask_ratio": 0.25})
    with pytest.raises(ConfigError, match=r"dynamic_mask_ratio is 0\.25.*not supported"):
        checkpoint_reader.read(tmp_path)


# The config fields and the tensors of the two forms that mixtures had before router_gate, and one
# whose config does not give it away.
RETRIEVAL = {
    "heads": (
        {
            "num_cdmoe_experts": 16,
            "num_cdmoe_heads": 2,
            "num_cdmoe_experts_per_head": 3,
            "expert_retrieval_size": 8,
        },
        {"queries.weight": (16, 40), "keys": (2, 4, 2, 4)},
    ),
    "one head": (
        {"num_experts": 16, "num_experts_per_tok": 3, "expert_retrieval_size": 8},
        {"queries_proj.weight": (8, 40), "keys": (2, 4, 4)},
    ),
    "tensors only": (
        {"num_experts": 16, "num_experts_per_tok": 3},
        {"queries_proj.weight": (8, 40), "keys": (2, 4, 4)},
    ),
}


@pytest.mark.parametrize("form", RETRIEVAL)
def test_the_first_mixtures_are_refused_by_name(form, tmp_path):
    fields, shapes = RETRIEVAL[form]
    older_checkpoints.make(tmp_path, num_hidden_layers=1)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "is_moe": True, **fields}))
    tensors = load_file(tmp_path / "model.safetensors")
    shapes = {**shapes, "down_embed.weight": (16, 40), "up_embed.weight": (16, 40)}
    for name, shape in shapes.items():
        tensors[f"model.layers.0.feed_forward.{name}"] = np.ones(shape, np.float32)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(DogeOnnxError, match="retrieval-style mixture of experts"):
        checkpoint_reader.read(tmp_path)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    # Of everything something: per-query-head gates with a window, biases, experts, a router
    # bias that must be dropped, and RoPE that changes past the trained context.
    return older_checkpoints.make(
        tmp_path_factory.mktemp("older"),
        "older",
        seed=8,
        keep_window_size=20,
        max_position_embeddings=32,
        rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
        attention_bias=True,
        mlp_bias=True,
        is_moe=True,
        num_experts=16,
        num_experts_per_tok=5,
        router_bias=True,
    )


@pytest.fixture(
    scope="module",
    params=[("ort", "growing"), ("ort", "window"), ("portable", "window")],
    ids="-".join,
)
def bundle(request, model, tmp_path_factory):
    target, state = request.param
    out = tmp_path_factory.mktemp("bundle") / "out"
    report = doge_onnx.export(
        model.directory, out, target=target, state=state, context_length=100
    )  # fmt: skip
    assert report.parity is not None
    assert report.parity.passed
    return doge_onnx.load(out)


def test_the_bundle_computes_the_same(model, bundle):
    ids = fresh_text(60, VOCABULARY, seed=6)
    truth = model.logits(ids)
    for cuts in ([1, 18, 19, 37, 38, 39], each(60)):
        assert_close(in_pieces(bundle, ids, cuts), truth)


def test_the_bundle_takes_a_batch(model, bundle):
    assert_batch_close(bundle, model.logits, VOCABULARY)
