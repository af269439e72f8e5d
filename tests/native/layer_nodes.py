"""Inputs and attributes for single operators of a layer, of any sizes."""

from __future__ import annotations

import numpy as np
from single_node import FLOAT, INT8, INT32, INT64, floats

EPSILON = 1e-6
CLOSED = -1e30
POSITIONS = {
    "positions": INT64,
    "rest": FLOAT,
    "columns": INT64,
    "lengths": INT32,
    "total_length": INT32,
}
STREAMS = {"h": FLOAT, "x": FLOAT}
HEADS = {"q": FLOAT, "k": FLOAT, "v": FLOAT}


def outputs_of_attention(kind):
    """Outputs of Attention, for the element type of its state."""
    return STREAMS | {"present_key": kind, "present_value": kind}


def feed_forward(
    rng,
    rows=(1, 1),
    hidden=24,
    inner=40,
    activation="silu",
    biases=False,
    routed=False,
):
    """Inputs and attributes of FeedForward."""
    batch, length = rows
    inputs = {
        "h": floats(rng, batch, length, hidden),
        "x": floats(rng, batch, length, hidden),
        "gate_up": floats(rng, hidden, 2 * inner),
        "gate_up_scales": None,
        "gate_up_bias": floats(rng, 2 * inner) if biases else None,
        "down": floats(rng, inner, hidden),
        "down_scales": None,
        "down_bias": floats(rng, hidden) if biases else None,
        "routed": floats(rng, batch, length, hidden) if routed else None,
        "residual": floats(rng, hidden),
        "norm": floats(rng, hidden),
    }
    matrices = ("gate_up", "down")
    attributes = {"activation": activation, "epsilon": EPSILON}
    attributes |= {f"{name}_{what}": 0 for name in matrices for what in ("bits", "block_size")}
    return inputs, attributes


def project_heads(
    rng,
    rows=(1, 1),
    hidden=24,
    heads=2,
    keys=1,
    dim=8,
    gates=1,
    norms=True,
    biases=False,
    exp_gates=True,
    limits=False,
    steps=False,
    table=50,
):
    """Inputs and attributes of ProjectHeads."""
    batch, length = rows
    rotated, channels = heads + keys, 2 * gates if steps else gates
    row = -(-(dim + channels + 1) // 8) * 8
    width = rotated * dim + keys * row
    step = np.full((rotated, gates), 0.25, np.float32)
    inputs = {
        "h": floats(rng, batch, length, hidden),
        "weight": floats(rng, hidden, width),
        "scales": None,
        "bias": floats(rng, width) if biases else None,
        "gate_weight": floats(rng, hidden, 2 * rotated * gates) / 8,
        "gate_bias": floats(rng, 2 * rotated * gates) if biases else None,
        "A": floats(rng, rotated, gates),
        "qk_norm": floats(rng, rotated, dim) if norms else None,
        "rest": floats(rng, batch, length, rotated, row - dim - channels),
        "positions": rng.integers(0, table, (batch, length)),
        "cos": floats(rng, table, dim // 2),
        "sin": floats(rng, table, dim // 2),
        "gate_limit": floats(rng, batch, length, rotated, gates) if limits else None,
        "gate_per_step": 1 / step if steps else None,
        "gate_step": step if steps else None,
    }
    attributes = {
        "heads": heads,
        "kv_heads": keys,
        "head_dim": dim,
        "gates": gates,
        "row": row,
        "exp_gates": int(exp_gates),
        "epsilon": EPSILON,
        "bits": 0,
        "block_size": 0,
    }
    return inputs, attributes


def attention(
    rng,
    past=(0,),
    new=1,
    spare=0,
    hidden=24,
    heads=2,
    keys=1,
    dim=8,
    gates=1,
    window=0,
    bias=False,
    quantized=False,
    row=None,
):
    """Inputs and attributes of Attention, or of Int8Attention if `quantized`.

    Args:
        rng: Source of the numbers.
        past: Rows of each sequence before this step.
        new: New tokens of each sequence.
        spare: Rows of the past that no sequence has filled.
        hidden: H.
        heads: Hq.
        keys: Hkv.
        dim: D.
        gates: G.
        window: W.
        bias: Whether the output product has a bias.
        quantized: Whether the state is int8.
        row: Channels of a row; None for the least multiple of 8.
    """
    batch, multiple = len(past), 16 if quantized else 8
    row = row or -(-(dim + gates + 1) // multiple) * multiple
    rows = max(past) + spare
    state = (batch, keys, rows, row)
    scales = [np.abs(floats(rng, 1, keys, 1, row)) / 8 + 0.01 for _ in range(2)]
    # Equal gates, too; the last channel of them is that which closes a key.
    new_key, old_key = floats(rng, batch, new, keys, row), floats(rng, *state)
    for x in (new_key, old_key):
        x[..., dim : dim + gates] = np.round(2 * x[..., dim : dim + gates]) / 2
        x[..., dim + gates] = np.where(rng.random(x.shape[:-1]) < 0.1, CLOSED, 0)
    if quantized:
        old_key, old_value = (rng.integers(-128, 128, state).astype(np.int8) for _ in range(2))
    else:
        old_value = floats(rng, *state)
    inputs = {
        "q": floats(rng, batch, new, heads * row),
        "k": new_key.reshape(batch, new, keys * row),
        "v": floats(rng, batch, new, keys * row),
        "past_key": old_key,
        "past_value": old_value,
    }
    lengths = np.array(past, np.int32) + new - 1
    if not quantized:
        inputs["columns"] = lengths[:, None].astype(np.int64) + np.arange(1 - new, 1)
    inputs |= {"lengths": lengths, "total_length": np.array(max(past) + new, np.int32)}
    if quantized:
        inputs |= {"key_scale": scales[0], "value_scale": scales[1]}
    inputs |= {
        "x": floats(rng, batch, new, hidden),
        "output": floats(rng, heads * row, hidden),
        "output_scales": None,
        "output_bias": floats(rng, hidden) if bias else None,
        "residual": floats(rng, hidden),
        "norm": floats(rng, hidden),
    }
    return inputs, attention_attributes(heads, keys, dim, gates, window)


def attention_attributes(heads, keys, dim, gates, window):
    """Attributes of all operators of attention."""
    return {
        "heads": heads,
        "kv_heads": keys,
        "head_dim": dim,
        "gates": gates,
        "window": window,
        "closed": CLOSED,
        "output_bits": 0,
        "output_block_size": 0,
        "epsilon": EPSILON,
    }


def kind_of_state(inputs):
    """The element type of the outputs that hold the state."""
    return INT8 if inputs["past_key"].dtype == np.int8 else FLOAT


def window_attention(
    rng, rows=8, used=None, new=1, batch=1, padding=0, hidden=24, heads=2, keys=1, dim=8, window=8
):
    """Inputs and attributes of WindowAttention.

    Args:
        rng: Source of the numbers.
        rows: R.
        used: Rows that hold a key; None for all.
        new: New tokens of each sequence.
        batch: B.
        padding: New tokens on the left of the last sequence that are padding.
        hidden: H.
        heads: Hq.
        keys: Hkv.
        dim: D.
        window: W.
    """
    row = -(-(dim + 2) // 8) * 8
    used = rows if used is None else used
    past_key, past_value = (floats(rng, batch, keys, rows, row) for _ in range(2))
    # As many positions as rows were used, and some that have lost their row.
    first = 0 if used == 0 else used + 5
    for key in past_key.reshape(-1, rows, row):
        order = rng.permutation(rows)
        key[:, dim] = np.round(2 * key[:, dim]) / 2
        key[order, dim + 1] = np.where(np.arange(rows) < used, 1 + np.arange(rows), 0)
        key[order[used:], dim] = CLOSED
    new_key = floats(rng, batch, new, keys, row)
    tokens = np.ones((batch, new), np.int64)
    tokens[-1, :padding] = 0
    positions = first + np.cumsum(tokens, axis=1) - tokens
    new_key[..., dim] = np.where(tokens[..., None], np.round(2 * new_key[..., dim]) / 2, CLOSED)
    new_key[..., dim + 1] = positions[..., None] + 1
    queries = floats(rng, batch, new, heads, row)
    queries[..., dim:] = np.arange(row - dim) == 0
    inputs = {
        "q": queries.reshape(batch, new, heads * row),
        "k": new_key.reshape(batch, new, keys * row),
        "v": floats(rng, batch, new, keys * row),
        "past_key": past_key,
        "past_value": past_value,
        "positions": positions,
        "lift": np.array(2.0**160),
        "x": floats(rng, batch, new, hidden),
        "output": floats(rng, heads * row, hidden),
        "output_scales": None,
        "output_bias": None,
        "residual": floats(rng, hidden),
        "norm": floats(rng, hidden),
    }
    return inputs, attention_attributes(heads, keys, dim, 1, window)
