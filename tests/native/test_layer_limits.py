"""Operators of a layer with damaged inputs, with NaN and infinity, and beside other sequences."""

from __future__ import annotations

import layer_nodes
import numpy as np
import onnxruntime
import pytest
import references
from layer_nodes import HEADS, POSITIONS, STREAMS
from single_node import FLOAT, Node, instruction_set

SETS = ("scalar", "avx2", "avx512_vnni")
PROMPT = 20


@pytest.fixture
def rng():
    return np.random.default_rng(11)


def make(library, op, rng, **sizes):
    """A node of this operator, and its inputs and attributes."""
    kinds = {"FeedForward": STREAMS, "ProjectHeads": HEADS}
    if op in kinds:
        inputs, attributes = getattr(
            layer_nodes, {"FeedForward": "feed_forward", "ProjectHeads": "project_heads"}[op]
        )(rng, **sizes)
        return Node(library, op, inputs, attributes, kinds[op]), inputs, attributes
    if op == "WindowAttention":
        inputs, attributes = layer_nodes.window_attention(rng, **sizes)
    else:
        quantized = op == "Int8Attention"
        inputs, attributes = layer_nodes.attention(rng, quantized=quantized, **sizes)
    outputs = layer_nodes.outputs_of_attention(layer_nodes.kind_of_state(inputs))
    return Node(library, op, inputs, attributes, outputs), inputs, attributes


def assert_refused(run, *words):
    with pytest.raises(onnxruntime.capi.onnxruntime_pybind11_state.InvalidArgument) as caught:
        run()
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("op", ["Attention", "Int8Attention"])
@pytest.mark.parametrize("new", [1, PROMPT])
def test_impossible_lengths_are_refused(native_library, rng, op, new):
    node, inputs, _ = make(native_library, op, rng, past=(4, 2), new=new, spare=3)
    for length in (-1, new - 2, 7 + new, 2**31 - 1, -(2**31)):
        lengths = np.array([4 + new - 1, length], np.int32)
        assert_refused(lambda: node.run(lengths=lengths), op, "length")  # noqa: B023
    for total in (-1, 0, new - 1, 8 + new, 2**31 - 1):
        total_length = np.array(total, np.int32)
        assert_refused(lambda: node.run(total_length=total_length), op, "total length")  # noqa: B023
    assert node.run()["present_key"].shape[2] == max(7, inputs["total_length"])


@pytest.mark.parametrize("position", [-1, 50, 2**62])
def test_positions_outside_of_the_rotary_tables_are_refused(native_library, rng, position):
    node, inputs, _ = make(native_library, "ProjectHeads", rng, rows=(1, 3))
    positions = inputs["positions"].copy()
    positions[0, 1] = position
    assert_refused(lambda: node.run(positions=positions), "ProjectHeads", str(position))


# Every input, one element longer or shorter in each axis.
@pytest.mark.parametrize(
    ("op", "sizes"),
    [
        ("FeedForward", {"rows": (2, 3), "biases": True, "routed": True}),
        ("ProjectHeads", {"rows": (2, 3), "biases": True, "limits": True, "steps": True}),
        ("Attention", {"past": (4, 5), "new": 2, "bias": True}),
        ("Int8Attention", {"past": (4, 5), "new": 2, "bias": True}),
        ("WindowAttention", {"rows": 9, "new": 2, "batch": 2}),
    ],
)
def test_sizes_that_do_not_fit_are_refused(native_library, rng, op, sizes):
    node, inputs, _ = make(native_library, op, rng, **sizes)
    free = {("cos", 0), ("sin", 0), ("past_key", 2), ("past_value", 2)}
    for name, value in inputs.items():
        if value is None:
            continue
        for axis in range(value.ndim):
            # An axis of a table or a state may have any size, if another input agrees.
            if (name, axis) in free:
                continue
            for size in (value.shape[axis] + 1, value.shape[axis] - 1):
                changed = np.resize(value, (*value.shape[:axis], size, *value.shape[axis + 1 :]))
                assert_refused(lambda: node.run(**{name: changed}), op)  # noqa: B023


def test_a_window_state_needs_a_row_for_each_new_token(native_library, rng):
    node, inputs, _ = make(native_library, "WindowAttention", rng, rows=4, new=3)
    short = {name: inputs[name][:, :, :2] for name in ("past_key", "past_value")}
    assert_refused(lambda: node.run(**short), "2 rows for 3 new tokens")


@pytest.mark.parametrize(
    ("op", "sizes", "wrong"),
    [
        ("FeedForward", {}, {"activation": "tanh"}),
        ("Attention", {}, {"kv_heads": 0}),
        ("Attention", {"heads": 3, "keys": 1}, {"gates": 2}),
        ("Int8Attention", {}, {"window": 4}),
        ("WindowAttention", {}, {"gates": 2}),
        ("WindowAttention", {}, {"window": 0}),
        ("ProjectHeads", {}, {"row": 24}),
        ("ProjectHeads", {}, {"gates": 2}),
    ],
)
def test_attributes_that_do_not_fit_are_refused(native_library, rng, op, sizes, wrong):
    node, inputs, attributes = make(native_library, op, rng, **sizes)
    with pytest.raises(Exception, match=r"(?s)heads|gates|window|activation|kv_heads|shape"):
        Node(native_library, op, inputs, attributes | wrong, node.outputs).run()


@pytest.mark.parametrize(
    "changed",
    [
        {"past_lengths": np.array([-1])},
        {"past_lengths": np.zeros(3, np.int64)},
        {"attention_mask": np.full((2, 9), 2)},
        {"attention_mask": np.full((2, 9), -1)},
        {"attention_mask": np.ones((2, 3), np.int64)},
        {"attention_mask": np.ones((3, 9), np.int64)},
        {"input_ids": np.zeros((2, 0), np.int64)},
        {"rest_table": np.zeros((3, 2, 2), np.float32)},
    ],
    ids=str,
)
def test_damaged_masks_are_refused(native_library, changed):
    inputs = {
        "attention_mask": np.ones((2, 9), np.int64),
        "input_ids": np.zeros((2, 4), np.int64),
        "past_lengths": np.array([2]),
        "numbers": np.arange(20),
        "rest_table": np.zeros((2, 2, 2), np.float32),
    }
    node = Node(native_library, "Positions", inputs, {}, POSITIONS)
    node.run()
    assert_refused(lambda: node.run(**changed), "Positions")


def one_row(inputs, b):
    """The inputs of sequence b alone."""
    shared = {"weight", "norm", "residual", "output", "output_bias", "gate_up", "gate_up_bias"}
    shared |= {
        "down",
        "down_bias",
        "bias",
        "gate_weight",
        "gate_bias",
        "A",
        "qk_norm",
        "cos",
        "sin",
    }
    shared |= {"gate_per_step", "gate_step", "key_scale", "value_scale", "lift", "total_length"}
    return {
        name: value if value is None or name in shared else value[b : b + 1]
        for name, value in inputs.items()
    }


@pytest.mark.parametrize("kernels", SETS)
@pytest.mark.parametrize(
    ("op", "sizes"),
    [
        ("FeedForward", {"rows": (4, 2), "inner": 64, "hidden": 70}),
        ("ProjectHeads", {"rows": (4, 2), "heads": 4, "keys": 2, "hidden": 70}),
        ("Attention", {"past": (200, 0, 7, 130), "new": 2, "heads": 6, "keys": 2}),
        ("Attention", {"past": (200, 0, 7, 130), "new": 2, "window": 60}),
        ("Int8Attention", {"past": (200, 0, 7, 130), "new": 2, "heads": 6, "keys": 2}),
        ("WindowAttention", {"rows": 200, "window": 200, "batch": 5}),
        ("WindowAttention", {"rows": 200, "window": 200, "batch": 4, "new": 2}),
    ],
)
def test_a_sequence_has_the_same_bits_alone(native_library, rng, kernels, op, sizes):
    with instruction_set(kernels):
        node, inputs, _ = make(native_library, op, rng, **sizes)
    together = node.run()
    for b in range(len(inputs["x"] if "x" in inputs else inputs["h"])):
        alone = node.run(**{n: v for n, v in one_row(inputs, b).items() if v is not None})
        for name, value in alone.items():
            rows = slice(None)
            if name.startswith("present") and "lengths" in inputs:
                rows = slice(0, inputs["lengths"][b] + 1)
                value = value[:, :, rows]
                np.testing.assert_array_equal(value, together[name][b : b + 1, :, rows])
            else:
                np.testing.assert_array_equal(value, together[name][b : b + 1], err_msg=name)


@pytest.mark.parametrize("kernels", SETS)
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("new", [1, PROMPT])
def test_the_number_of_threads_changes_nothing(native_library, rng, kernels, threads, new):
    inputs, attributes = layer_nodes.attention(rng, past=(300, 5), new=new, heads=4, keys=2)
    outputs = layer_nodes.outputs_of_attention(FLOAT)
    results = []
    for count in (2, threads):
        with instruction_set(kernels):
            node = Node(native_library, "Attention", inputs, attributes, outputs, count)
        results.append(node.run())
    for name in STREAMS:
        np.testing.assert_array_equal(results[0][name], results[1][name])


@pytest.mark.parametrize("kernels", SETS)
@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("activation", ["silu", "relu", "gelu", "gelu_tanh"])
def test_activations_keep_nan_and_infinity(native_library, rng, kernels, activation, number):
    inputs, attributes = layer_nodes.feed_forward(rng, activation=activation, biases=True)
    inputs["gate_up_bias"][3] = number
    with instruction_set(kernels):
        result = Node(native_library, "FeedForward", inputs, attributes, STREAMS).run()
    with np.errstate(invalid="ignore", over="ignore"):
        expected = references.feed_forward(inputs, attributes)["x"]
    np.testing.assert_array_equal(np.isfinite(result["x"]), np.isfinite(expected))
    if np.isfinite(expected).all():
        np.testing.assert_allclose(result["x"], expected, atol=1e-3)


@pytest.mark.parametrize("kernels", SETS)
@pytest.mark.parametrize("new", [1, PROMPT])
@pytest.mark.parametrize("op", ["Attention", "Int8Attention", "WindowAttention"])
def test_closed_keys_give_no_nan_and_open_ones_pass_it_on(native_library, rng, kernels, op, new):
    sizes = {"rows": 40, "new": new} if op == "WindowAttention" else {"past": (9,), "new": new}
    with instruction_set(kernels):
        node, inputs, attributes = make(native_library, op, rng, **sizes)
    dim, channel = attributes["head_dim"], attributes["head_dim"] + (op != "WindowAttention")
    changed = {name: inputs[name].copy() for name in ("q", "k", "past_key")}
    row = changed["past_key"].shape[-1]
    changed["q"].reshape(1, new, -1, row)[..., dim : channel + 1] = 1
    quantized = op == "Int8Attention"
    if quantized:
        changed["key_scale"] = inputs["key_scale"].copy()
        changed["key_scale"][..., channel] = 1e30 / 127
    changed["k"].reshape(1, new, -1, row)[..., channel] = layer_nodes.CLOSED
    changed["past_key"][..., channel] = -127 if quantized else layer_nodes.CLOSED
    assert np.isfinite(node.run(**changed)["x"]).all()
    changed["q"][0, new // 2, 0] = np.nan
    broken = np.isnan(node.run(**changed)["x"]).all(axis=-1)
    np.testing.assert_array_equal(broken[0], np.arange(new) == new // 2)
