"""What the operators of a layer compute, in float64: docs/native.md in NumPy.

WindowAttention is what the exporter's own body computes.
"""

from __future__ import annotations

import math
from unittest import mock

import numpy as np
import torch

from doge_onnx.export.window_attention import attend_to_window


def rms_norm(x, weight, epsilon):
    """Root mean square norm over the last axis."""
    return weight * x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon)


def activate(name, x):
    """The activation function of that name."""
    with np.errstate(over="ignore"):
        if name == "silu":
            return x / (1 + np.exp(-x))
        if name == "relu":
            return np.where(x < 0, 0, x)
        if name == "gelu":
            return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def wide(inputs):
    """The inputs, with floats in float64."""
    return {
        name: value.astype(np.float64) if getattr(value, "dtype", None) == np.float32 else value
        for name, value in inputs.items()
    }


def end_of_half(x, update, inputs, epsilon):
    """The streams h and x after an attention or MLP."""
    total = inputs["residual"] * x + update
    return {"h": rms_norm(total, inputs["norm"], epsilon), "x": total}


def product(x, inputs, name, bias):
    """Rows times an unquantized matrix."""
    result = x @ inputs[name]
    return result if inputs.get(bias) is None else result + inputs[bias]


def feed_forward(inputs, attributes):
    """FeedForward."""
    inputs = wide(inputs)
    both = product(inputs["h"], inputs, "gate_up", "gate_up_bias")
    gate, up = np.split(both, 2, axis=-1)
    update = product(activate(attributes["activation"], gate) * up, inputs, "down", "down_bias")
    if inputs["routed"] is not None:
        update = update + inputs["routed"]
    return end_of_half(inputs["x"], update, inputs, attributes["epsilon"])


def project_heads(inputs, attributes):
    """ProjectHeads."""
    steps = inputs["positions"]
    inputs = wide(inputs)
    heads, keys, dim = (attributes[name] for name in ("heads", "kv_heads", "head_dim"))
    gates, row, rotated = attributes["gates"], attributes["row"], heads + keys
    h = inputs["h"]
    batch, length, _ = h.shape
    qkv = product(h, inputs, "weight", "bias")
    qk = qkv[..., : rotated * dim].reshape(batch, length, rotated, dim)
    if inputs["qk_norm"] is not None:
        qk = rms_norm(qk, inputs["qk_norm"], attributes["epsilon"])
    pairs = product(h, inputs, "gate_weight", "gate_bias")
    pairs = pairs.reshape(batch, length, rotated, gates, 2)
    gate = inputs["A"] * np.logaddexp(pairs[..., 0], pairs[..., 1])
    if attributes["exp_gates"]:
        gate = np.exp(gate)
    if inputs["gate_limit"] is not None:
        gate = np.minimum(gate, inputs["gate_limit"])
    parts = [gate]
    if inputs["gate_step"] is not None:
        coarse = np.round(gate * inputs["gate_per_step"]) * inputs["gate_step"]
        parts = [coarse, gate - coarse]
    half = dim // 2
    cos, sin = (inputs[name][steps][:, :, None] for name in ("cos", "sin"))
    left, right = qk[..., :half], qk[..., half : 2 * half]
    turned = [left * cos - right * sin, right * cos + left * sin, qk[..., 2 * half :]]
    rows = np.concatenate([*turned, *parts, inputs["rest"]], axis=-1)
    return {
        "q": rows[:, :, :heads].reshape(batch, length, heads * row),
        "k": rows[:, :, heads:].reshape(batch, length, keys * row),
        "v": qkv[..., rotated * dim :],
    }


def softmax(scores):
    """Softmax over the last axis."""
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def attention(inputs, attributes):
    """Attention and Int8Attention. Rows of the present that have no meaning are NaN or 0."""
    heads, keys, dim = (attributes[name] for name in ("heads", "kv_heads", "head_dim"))
    gates, window, group = attributes["gates"], attributes["window"], heads // keys
    quantized = inputs["past_key"].dtype == np.int8
    batch, _, past, row = inputs["past_key"].shape
    length, total = inputs["q"].shape[1], int(inputs["total_length"])
    present = {}
    for name, new in (("key", "k"), ("value", "v")):
        old = inputs[f"past_{name}"]
        rows = np.zeros((batch, keys, max(past, total), row), old.dtype)
        if not quantized:
            rows[:] = np.nan
        for b in range(batch):
            before = inputs["lengths"][b] + 1 - length
            rows[b, :, :before] = old[b, :, :before]
            added = inputs[new][b].reshape(length, keys, row).transpose(1, 0, 2)
            if quantized:
                added = np.clip(np.round(added / inputs[f"{name}_scale"][0]), -128, 127)
            rows[b, :, before : before + length] = added
        present[name] = rows
    inputs = wide(inputs)
    scales = [inputs.get(f"{name}_scale", np.ones(1)) for name in ("key", "value")]
    every_key = present["key"].astype(np.float64) * scales[0]
    every_value = present["value"].astype(np.float64) * scales[1]
    queries = inputs["q"].reshape(batch, length, heads, row)
    out = np.zeros((batch, length, heads, row))
    for b in range(batch):
        for s in range(length):
            seen = inputs["lengths"][b] + 1 - length + s + 1
            for head in range(heads):
                key, value = (x[b, head // group, :seen] for x in (every_key, every_value))
                scores = key @ queries[b, s, head]
                if window:
                    gate = key[:, dim + head % group * gates // group] + key[:, dim + gates]
                    # Of equal gates the later is kept.
                    order = np.argsort(-gate[::-1], kind="stable")
                    kept = np.zeros(seen, bool)
                    kept[seen - 1 - order[:window]] = True
                    scores = scores + np.where(kept, 0, attributes["closed"])
                out[b, s, head] = softmax(scores) @ value
    update = product(out.reshape(batch, length, -1), inputs, "output", "output_bias")
    streams = end_of_half(inputs["x"], update, inputs, attributes["epsilon"])
    return streams | {"present_key": present["key"], "present_value": present["value"]}


def stable_topk(x, count, largest=True):
    """TopK as ONNX defines it: of equal values, that with the lower index comes first."""
    order = torch.argsort(x, dim=-1, descending=largest, stable=True)[..., :count]
    return x.gather(-1, order), order


def window_attention(inputs, attributes):
    """WindowAttention."""
    names = ("q", "k", "v", "past_key", "past_value", "positions", "lift")
    inputs = wide(inputs)
    sizes = [attributes[name] for name in ("heads", "kv_heads", "head_dim", "window")]
    tensors = [torch.from_numpy(inputs[name]) for name in names]
    # In float32, what closes a key is the same number wherever it stands.
    closed = mock.patch("doge_onnx.export.window_attention.CLOSED_GATE", float(np.float32(-1e30)))
    with mock.patch("torch.topk", stable_topk), closed:
        out, key, value = (x.numpy() for x in attend_to_window(*tensors, *sizes))
    update = product(out, inputs, "output", "output_bias")
    streams = end_of_half(inputs["x"], update, inputs, attributes["epsilon"])
    return streams | {"present_key": key, "present_value": value}


def positions(inputs):
    """Positions."""
    mask, (batch, length) = inputs["attention_mask"], inputs["input_ids"].shape
    total = mask.shape[1]
    first = np.minimum(total - length, np.broadcast_to(inputs["past_lengths"], (batch,)))
    columns = first[:, None] + np.arange(length)
    before = np.cumsum(mask, axis=1) - mask
    here = np.take_along_axis(mask, columns, axis=1)
    return {
        "positions": np.take_along_axis(before, columns, axis=1),
        "rest": inputs["rest_table"][here],
        "columns": columns,
        "lengths": columns[:, -1].astype(np.int32),
        "total_length": np.array(total, np.int32),
    }
