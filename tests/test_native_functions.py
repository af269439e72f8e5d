"""The operators of docs/native.md in exported graphs: which there are, and what goes into them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import checkpoints
import numpy as np
import older_checkpoints
import onnx
import onnxruntime
import pytest
from checkpoints import random_ids
from onnx import helper, inliner
from safetensors.torch import load_file, save_file

from doge_onnx.bundle import GRAPH_NAME
from doge_onnx.export.exporter import export

DOMAIN = "doge_onnx"
_FIRST = "q k v past_key past_value"
_LAST = "x output output_scales output_bias residual norm"
# From docs/native.md.
INPUTS = {
    "Positions": "attention_mask input_ids past_lengths numbers rest_table",
    "Embed": "input_ids table scales norm",
    "ProjectHeads": "h weight scales bias gate_weight gate_bias A qk_norm rest positions cos sin "
    "gate_limit gate_per_step gate_step",
    "Attention": f"{_FIRST} columns lengths total_length {_LAST}",
    "Int8Attention": f"{_FIRST} lengths total_length key_scale value_scale {_LAST}",
    "WindowAttention": f"{_FIRST} positions lift {_LAST}",
    "Experts": "h router router_bias down down_scales up up_scales",
    "FeedForward": "h x gate_up gate_up_scales gate_up_bias down down_scales down_bias routed "
    "residual norm",
    "ProjectToVocabulary": "h logits_to_keep weight scales bias",
}
NEAREST = {"rounding": "nearest", "verify": False}
CASES = {
    "plain": ({}, {}),
    "int4": ({}, {"precision": "int4", **NEAREST}),
    "int8 state": ({}, {"kv_cache": "int8", "verify": False}),
    "bf16, untied": ({"tie_word_embeddings": False}, {"precision": "bf16"}),
    "mixture": ({"is_moe": True, "num_experts": 16, "num_experts_per_tok": 3}, {}),
    "past the window": ({"keep_window_size": 12}, {}),
    "window": ({"keep_window_size": 12}, {"state": "window"}),
}


@pytest.fixture(scope="module", params=CASES)
def made(request, tmp_path_factory):
    """A bundle, whose export has compared it where nothing is quantized."""
    config, options = CASES[request.param]
    directory = tmp_path_factory.mktemp("functions")
    checkpoint = checkpoints.make(directory / "checkpoint", num_hidden_layers=3, **config)
    return request.param, export(checkpoint, directory / "bundle", **options).path


def operators(path: Path) -> Counter[str]:
    nodes = onnx.load(path / GRAPH_NAME).graph.node
    return Counter(node.op_type for node in nodes if node.domain == DOMAIN)


@pytest.mark.slow
def test_a_layer_is_three_nodes_and_each_operator_one_function(made):
    name, path = made
    attention = {"int8 state": "Int8Attention", "window": "WindowAttention"}.get(name, "Attention")
    expected = {"Embed": 1, "ProjectHeads": 3, attention: 3, "FeedForward": 3}
    expected["ProjectToVocabulary"] = 1
    if name != "window":
        expected["Positions"] = 1
    if name == "mixture":
        expected["Experts"] = 3
    assert operators(path) == expected
    functions = onnx.load(path / GRAPH_NAME).functions
    assert sorted(function.name for function in functions) == sorted(expected)


@pytest.mark.slow
def test_functions_have_the_inputs_of_the_contract_in_their_order(made):
    for function in onnx.load(made[1] / GRAPH_NAME).functions:
        assert " ".join(function.input) == INPUTS[function.name]


@pytest.mark.slow
def test_nodes_give_every_attribute_of_their_function(made):
    model = onnx.load(made[1] / GRAPH_NAME)
    functions = {function.name: set(function.attribute) for function in model.functions}
    for node in model.graph.node:
        if node.domain == DOMAIN:
            assert {attribute.name for attribute in node.attribute} == functions[node.op_type]


@pytest.mark.slow
def test_attributes_describe_the_matrices(made):
    model = onnx.load(made[1] / GRAPH_NAME)
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    names = {function.name: list(function.input) for function in model.functions}
    for node in model.graph.node:
        if node.op_type not in ("ProjectHeads", "FeedForward", "Embed"):
            continue
        inputs = dict(zip(names[node.op_type], node.input, strict=False))
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        for matrix in {"weight", "table", "gate_up", "down"} & inputs.keys():
            prefix = "" if matrix in ("weight", "table") else f"{matrix}_"
            bits, block = attributes[f"{prefix}bits"], attributes[f"{prefix}block_size"]
            weight = weights[inputs[matrix]]
            if weight.data_type == onnx.TensorProto.UINT8:
                assert weight.dims[2] * 8 == bits * block
                assert list(weights[inputs[f"{prefix}scales"]].dims) == list(weight.dims[:2])
            else:
                assert (bits, block, inputs[f"{prefix}scales"]) == (0, 0, "")
                assert len(weight.dims) == 2


def run(model: onnx.ModelProto) -> list[np.ndarray]:
    """All outputs of a graph for a prompt."""
    session = onnxruntime.InferenceSession(model.SerializeToString())
    ids = np.array([random_ids(9)])
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    types = {"tensor(float)": np.float32, "tensor(int8)": np.int8}
    window = any(entry.name == "position_ids" for entry in session.get_inputs())
    for entry in session.get_inputs():
        if entry.name == "position_ids":
            feeds[entry.name] = np.arange(9)[np.newaxis]
        elif entry.name.startswith("past_key_values"):
            _, heads, _, row = entry.shape
            # Rows without a key have a gate that is closed; here, all channels are.
            feeds[entry.name] = np.full(
                (1, heads, 12 * window, row), -1e30 * entry.name.endswith("key"), types[entry.type]
            )
    return session.run(None, feeds)


@pytest.mark.slow
def test_functions_compute_what_their_bodies_do_in_the_graph(made):
    """Whatever inlines the functions gets the same bits."""
    model = onnx.load(made[1] / GRAPH_NAME)
    bodies = inliner.inline_local_functions(model)
    assert {node.domain for node in bodies.graph.node} <= {"", "com.microsoft"}
    for ours, expected in zip(run(model), run(bodies), strict=True):
        np.testing.assert_array_equal(ours, expected)


@pytest.mark.slow
def test_layers_keep_their_own_weights_where_those_of_the_first_are_equal(tmp_path):
    # A tracer makes one tensor of equal ones, and the function of all layers would have it.
    checkpoint = checkpoints.make(tmp_path / "checkpoint", num_hidden_layers=2)
    path = checkpoint / "model.safetensors"
    tensors = load_file(path)
    for name, tensor in tensors.items():
        if "layers.0" in name and tensor.dim() == 1:
            tensor.fill_(1.0)
    save_file(tensors, path, metadata={"format": "pt"})
    assert export(checkpoint, tmp_path / "bundle").parity.passed


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"target": "portable"}, {"device": "cuda"}], ids=str)
def test_other_targets_and_devices_have_no_functions(options, tmp_path):
    older_checkpoints.make(tmp_path / "checkpoint", "older", num_hidden_layers=2)
    path = export(tmp_path / "checkpoint", tmp_path / "out", verify=False, **options).path
    model = onnx.load(path / GRAPH_NAME)
    assert not model.functions
    assert DOMAIN not in {entry.domain for entry in model.opset_import}
