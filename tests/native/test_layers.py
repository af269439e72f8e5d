"""The native operators of a layer against references in float64."""

from __future__ import annotations

import layer_nodes
import numpy as np
import pytest
import references
from layer_nodes import HEADS, POSITIONS, STREAMS
from single_node import FLOAT, Node, instruction_set

SETS = ("scalar", "avx2", "avx512_vnni")
# Batch and new tokens: one row, few, and many, with and without a remainder.
ROWS = [(1, 1), (1, 2), (3, 1), (2, 4), (1, 9), (1, 17)]


@pytest.fixture(params=SETS, autouse=True)
def kernels(request):
    with instruction_set(request.param):
        yield


@pytest.fixture
def rng():
    return np.random.default_rng(7)


def assert_close(actual, expected, tolerance=2e-5):
    for name, value in expected.items():
        scale = max(1.0, float(np.nanmax(np.abs(value)))) if value.size else 1.0
        np.testing.assert_allclose(
            actual[name], value, rtol=0, atol=tolerance * scale, err_msg=name
        )


ACTIVATIONS = ["silu", "relu", "gelu", "gelu_tanh", "silu", "gelu"]
FEED_FORWARDS = [
    {"rows": rows, "activation": activation}
    for rows, activation in zip(
        ROWS, ["silu", "relu", "gelu", "gelu_tanh", "silu", "gelu"], strict=True
    )
] + [
    {"hidden": 1, "inner": 1},
    {"hidden": 33, "inner": 64},
    {"hidden": 7, "inner": 96, "rows": (2, 9)},
    {"hidden": 24, "inner": 40, "biases": True, "routed": True, "rows": (1, 3)},
    {"hidden": 24, "inner": 32, "biases": True, "routed": True, "rows": (1, 13)},
]


@pytest.mark.parametrize("sizes", FEED_FORWARDS, ids=str)
def test_feed_forward(native_library, rng, sizes):
    inputs, attributes = layer_nodes.feed_forward(rng, **sizes)
    result = Node(native_library, "FeedForward", inputs, attributes, STREAMS).run()
    assert_close(result, references.feed_forward(inputs, attributes))


PROJECTIONS = [{"rows": rows} for rows in ROWS] + [
    {"heads": 1, "keys": 1, "dim": 2, "hidden": 5},
    {"heads": 6, "keys": 3, "dim": 10, "hidden": 33, "norms": False},
    {"heads": 4, "keys": 2, "gates": 2, "biases": True, "rows": (2, 3)},
    {"heads": 9, "keys": 3, "gates": 3, "steps": True, "rows": (1, 11)},
    {"limits": True, "exp_gates": False, "rows": (2, 2)},
    {"dim": 24, "steps": True, "limits": True},
]


@pytest.mark.parametrize("sizes", PROJECTIONS, ids=str)
def test_project_heads(native_library, rng, sizes):
    inputs, attributes = layer_nodes.project_heads(rng, **sizes)
    result = Node(native_library, "ProjectHeads", inputs, attributes, HEADS).run()
    assert_close(result, references.project_heads(inputs, attributes))


ATTENTIONS = [
    {"past": (0,)},
    {"past": (5,), "spare": 3},
    {"past": (127,), "bias": True},
    {"past": (128,), "spare": 1},
    {"past": (300,), "heads": 6, "keys": 3, "dim": 12},
    {"past": (20,), "heads": 3, "keys": 1, "gates": 3},
    {"past": (4,), "heads": 1, "keys": 1, "dim": 6, "hidden": 5},
    {"past": (3, 150, 0), "spare": 2, "new": 1},
    {"past": (3, 150, 0), "new": 2},
    {"past": (0,), "new": 17},
    {"past": (140,), "new": 9, "spare": 9},
    {"past": (10, 0, 131), "new": 11, "spare": 4, "heads": 4, "keys": 2, "dim": 40},
    {"past": (200,), "new": 150, "spare": 150},
]
WINDOWS = [
    {"past": (30,), "window": 7},
    {"past": (3, 300, 0), "window": 40, "heads": 4, "keys": 2, "gates": 2, "spare": 1},
    {"past": (9, 0), "window": 12, "new": 6, "heads": 2, "keys": 2},
    {"past": (140,), "window": 50, "new": 17, "spare": 20, "heads": 4, "keys": 1, "gates": 4},
]


@pytest.mark.parametrize("in_place", [False, True], ids=["copied", "in place"])
@pytest.mark.parametrize("sizes", ATTENTIONS + WINDOWS, ids=str)
def test_attention(native_library, rng, sizes, in_place):
    check_attention(native_library, "Attention", *layer_nodes.attention(rng, **sizes), in_place)


@pytest.mark.parametrize("in_place", [False, True], ids=["copied", "in place"])
@pytest.mark.parametrize("sizes", ATTENTIONS, ids=str)
def test_int8_attention(native_library, rng, sizes, in_place):
    inputs, attributes = layer_nodes.attention(rng, quantized=True, **sizes)
    check_attention(native_library, "Int8Attention", inputs, attributes, in_place)


def check_attention(library, op, inputs, attributes, in_place):
    outputs = layer_nodes.outputs_of_attention(layer_nodes.kind_of_state(inputs))
    expected = references.attention(inputs, attributes)
    node = Node(library, op, inputs, attributes, outputs)
    if in_place and inputs["total_length"] <= inputs["past_key"].shape[2]:
        result = node.run_in_place(present_key="past_key", present_value="past_value")
    else:
        result = node.run()
    for b, last in enumerate(inputs["lengths"]):
        for name in ("present_key", "present_value"):
            rows = slice(0, last + 1)
            np.testing.assert_array_equal(result[name][b, :, rows], expected[name][b, :, rows])
    assert result["present_key"].shape == expected["present_key"].shape
    assert_close(result, {name: expected[name] for name in STREAMS})


WINDOW_STATES = [
    {"used": 0},
    {"used": 3},
    {},
    {"rows": 200, "window": 200, "heads": 6, "keys": 3, "dim": 12},
    {"rows": 9, "used": 9, "window": 20, "new": 3, "batch": 2},
    {"rows": 8, "new": 8, "batch": 3, "padding": 5, "window": 8},
    {"rows": 40, "used": 0, "new": 17, "window": 40, "heads": 1},
    {"rows": 40, "used": 30, "new": 17, "batch": 2, "padding": 9, "window": 40},
    {"rows": 20, "new": 20, "window": 20, "batch": 2, "padding": 20, "used": 0},
    {"rows": 300, "used": 290, "new": 150, "window": 300, "heads": 4, "keys": 2, "dim": 40},
    {"rows": 16, "new": 11, "window": 13, "batch": 2},
]


@pytest.mark.parametrize("in_place", [False, True], ids=["copied", "in place"])
@pytest.mark.parametrize("sizes", WINDOW_STATES, ids=str)
def test_window_attention(native_library, rng, sizes, in_place):
    inputs, attributes = layer_nodes.window_attention(rng, **sizes)
    expected = references.window_attention(inputs, attributes)
    outputs = layer_nodes.outputs_of_attention(FLOAT)
    node = Node(native_library, "WindowAttention", inputs, attributes, outputs)
    if in_place:
        result = node.run_in_place(present_key="past_key", present_value="past_value")
    else:
        result = node.run()
    for name in ("present_key", "present_value"):
        np.testing.assert_array_equal(result[name], expected[name], err_msg=name)
    assert_close(result, {name: expected[name] for name in STREAMS})


@pytest.mark.parametrize("past", [[0, 3, 40], [2**40], [5]], ids=str)
def test_positions(native_library, rng, past):
    mask = rng.integers(0, 2, (3, 45))
    inputs = {
        "attention_mask": mask,
        "input_ids": np.zeros((3, 4), np.int64),
        "past_lengths": np.array(past),
        "numbers": np.arange(100),
        "rest_table": rng.standard_normal((2, 5, 7)).astype(np.float32),
    }
    result = Node(native_library, "Positions", inputs, {}, POSITIONS).run()
    for name, value in references.positions(inputs).items():
        np.testing.assert_array_equal(result[name], value, err_msg=name)
