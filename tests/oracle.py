"""The Doge model in float64 and NumPy, one token at a time: what every test can compare with.

Written from the equations, to be checked against them by reading. It knows nothing of the
package under test, and it is fed nothing but numbers: a config with the field names of
transformers and the tensors by their transformers-native names without "model.". What a
checkpoint does not have (a q/k norm, biases) is simply not among the tensors, and to how many
heads the gates belong is the length of `A`. A config with `window_size` in place of
`keep_window_size` is of the generation whose gates have no exp.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open

Array = NDArray[np.float64]

# Below this, exp() is 0 in float32, and above the other a normal number of full precision.
_LOG_ZERO, _LOG_NORMAL = -104.5, -87.0


class Oracle:
    """A model and all the keys and values that it has seen.

    Attributes:
        margin: How close the closest decision was, between a key kept in the window and one
            dropped, or between an expert chosen and one left out. A choice of less than about
            1e-6 can fall the other way in float32, and the comparison means nothing. Decisions
            between exact equals do not count: those have a rule.
    """

    def __init__(self, config: Mapping[str, Any], tensors: Mapping[str, Array]) -> None:
        self.config = config
        self.tensors = tensors
        self.heads = config["num_attention_heads"]
        self.kv_heads = config["num_key_value_heads"]
        self.head_dim = config.get("head_dim") or config["hidden_size"] // self.heads
        self.position = 0
        self.margin = math.inf
        layers = range(config["num_hidden_layers"])
        self.keys: list[list[Array]] = [[] for _ in layers]
        self.values: list[list[Array]] = [[] for _ in layers]
        self.gates: list[list[Gate]] = [[] for _ in layers]

    def step(self, token: int) -> Array:
        """Logits `[V]` after one more token."""
        x = self.tensors["embed_tokens.weight"][token]
        for layer in range(self.config["num_hidden_layers"]):
            name = f"layers.{layer}."
            h = self.rms_norm(x, name + "input_layernorm")
            x = self.tensors[name + "input_residual"] * x + self.attention(h, layer)
            h = self.rms_norm(x, name + "post_attention_layernorm")
            x = self.tensors[name + "post_attention_residual"] * x + self.mlp(h, name + "mlp.")
        self.position += 1
        h = self.rms_norm(x, "norm")
        tied = self.config["tie_word_embeddings"]
        return self.tensors["embed_tokens.weight" if tied else "lm_head.weight"] @ h

    def attention(self, h: Array, layer: int) -> Array:
        name = f"layers.{layer}.self_attn."
        q = self.linear(h, name + "q_proj").reshape(self.heads, self.head_dim)
        k = self.linear(h, name + "k_proj").reshape(self.kv_heads, self.head_dim)
        v = self.linear(h, name + "v_proj").reshape(self.kv_heads, self.head_dim)
        if name + "q_norm.weight" in self.tensors:
            q, k = self.rms_norm(q, name + "q_norm"), self.rms_norm(k, name + "k_norm")
        self.keys[layer].append(self.rotate(k))
        self.values[layer].append(v)
        dt = self.linear(v.reshape(-1), name + "dt_proj")
        has_exp = self.config.get("window_size") is None
        self.gates[layer].append(Gate(self.tensors[name + "A"], dt, has_exp))

        q = self.rotate(q)
        keys, values = np.array(self.keys[layer]), np.array(self.values[layer])
        gates = Gate.stack(self.gates[layer])
        kept = self.window(gates, layer)
        out = np.empty_like(q)
        for head in range(self.heads):
            kv = head // (self.heads // self.kv_heads)
            own = head // (self.heads // gates.value.shape[1])
            rows = kept[own]
            scores = keys[rows, kv] @ q[head] / math.sqrt(self.head_dim) + gates.value[rows, own]
            out[head] = softmax(scores) @ values[rows, kv]
        return self.linear(out.reshape(-1), name + "o_proj")

    def window(self, gates: Gate, layer: int) -> list[NDArray[np.intp]]:
        """Of each gate head, the keys that take part: the W largest, of equals the latest."""
        total, heads = gates.value.shape
        size = self.config.get("window_size") or self.config.get("keep_window_size")
        if size is None or total <= size:
            return [np.arange(total)] * heads
        # Ascending and stable: equals are in order of their position, and the last ones stay.
        orders = np.argsort(gates.value, axis=0, kind="stable").T
        # In the first layer a gate depends on the token alone; in others, equality of gates that
        # are neither 0 nor 1 is an accident of rounding.
        equal = layer == 0
        for head, order in enumerate(orders):
            gap = gates.gap(order[-size], order[: total - size], head, equal)
            self.margin = min(self.margin, gap)
        return [order[-size:] for order in orders]

    def rotate(self, heads: Array) -> Array:
        """RoPE, channel i paired with channel i + D/2, as in a text that ends with this token."""
        rope, dim = self.config["rope_parameters"], self.head_dim
        base, position = rope["rope_theta"], float(self.position)
        if rope["rope_type"] == "linear":
            position /= rope["factor"]
        length, trained = self.position + 1, self.config["max_position_embeddings"]
        if rope["rope_type"] == "dynamic" and length > trained:
            stretch = rope["factor"] * length / trained - (rope["factor"] - 1)
            base *= stretch ** (dim / (dim - 2))
        angle = position / base ** (np.arange(dim // 2) * 2 / dim)
        left, right = heads[:, : dim // 2], heads[:, dim // 2 :]
        cos, sin = np.cos(angle), np.sin(angle)
        return np.concatenate([left * cos - right * sin, right * cos + left * sin], axis=1)

    def mlp(self, h: Array, name: str) -> Array:
        gate, up = self.linear(h, name + "gate_proj"), self.linear(h, name + "up_proj")
        shared = self.linear(self.activation(gate) * up, name + "down_proj")
        return shared + self.experts(h, name) if self.config.get("is_moe") else shared

    def experts(self, h: Array, name: str) -> Array:
        """Cross Domain Mixture of Experts: expert a · n + b scores row_a + column_b."""
        router = self.linear(h, name + "router_gate")
        side = len(router) // 2
        scores = (router[:side, np.newaxis] + router[np.newaxis, side:]).reshape(-1)
        order = np.argsort(-scores)
        count = self.config["num_experts_per_tok"]
        if count < len(scores):
            self.margin = min(self.margin, scores[order[count - 1]] - scores[order[count]])
        best = order[:count]
        weights = softmax(scores[best])
        if self.config.get("norm_topk_prob"):
            weights = weights / weights.sum()
        out = np.zeros_like(h)
        for expert, weight in zip(best, weights, strict=True):
            neuron = self.activation(self.tensors[name + "down_embed.weight"][expert] @ h)
            out += weight * neuron * self.tensors[name + "up_embed.weight"][expert]
        return out

    def activation(self, x: Array | np.float64) -> Array:
        name = self.config["hidden_act"]
        if name == "silu":
            return x / (1 + np.exp(-x))
        if name == "relu":
            return np.maximum(x, 0)
        if name == "gelu_pytorch_tanh":
            return x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
        assert name == "gelu"
        return x / 2 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))

    def rms_norm(self, x: Array, name: str) -> Array:
        mean_square = np.mean(x**2, axis=-1, keepdims=True)
        scale = np.sqrt(mean_square + self.config["rms_norm_eps"])
        return self.tensors[name + ".weight"] * x / scale

    def linear(self, x: Array, name: str) -> Array:
        return self.tensors[name + ".weight"] @ x + self.tensors.get(name + ".bias", 0.0)


class Gate:
    """Gates, and what it takes to tell how far apart they are.

    A gate's value is rounded to float32, so that what is 0 there is 0 here: equals are the same
    ones.

    Attributes:
        log: A · softplus(dt); `[G]` for one key, `[T, G]` for several.
        value: exp(log), or log itself in the generation without exp.
        slope: The derivative of log by dt.
        has_exp: Which of the two it is.
    """

    def __init__(self, A: Array, dt: Array, has_exp: bool = True) -> None:
        self.has_exp = has_exp
        self.log = A * np.logaddexp(0, dt)
        value = np.exp(self.log) if has_exp else self.log
        self.value = value.astype(np.float32).astype(np.float64)
        self.slope = np.abs(A) / (1 + np.exp(-dt))

    @classmethod
    def stack(cls, gates: Sequence[Gate]) -> Gate:
        """One for several keys."""
        every = cls.__new__(cls)
        every.has_exp = gates[0].has_exp
        every.log, every.value, every.slope = (
            np.array([getattr(gate, name) for gate in gates]) for name in ("log", "value", "slope")
        )
        return every

    def gap(self, kept: int, dropped: NDArray[np.intp], head: int, equal: bool) -> float:
        """By how much dt must be wrong before another key than `kept` is the smallest kept.

        Args:
            kept: The smallest that is kept.
            dropped: Those that are not.
            head: Of which head.
            equal: Whether those with the same value are equals whatever it is.
        """
        log, slope = self.log[:, head], self.slope[:, head]
        same = (log[dropped] == log[kept]) & (equal or log[kept] == 0)
        if self.has_exp:
            same |= np.maximum(log[dropped], log[kept]) < _LOG_ZERO
        others = dropped[~same]
        if not len(others):
            return math.inf
        closest = others[np.argmax(log[others])]
        tiny = any(_LOG_ZERO <= value <= _LOG_NORMAL for value in (log[kept], log[closest]))
        if self.has_exp and tiny:
            return 0.0
        # Where dt is off by 1e-6 because of float32, a gate is besides off by a tenth of that.
        moves = max(slope[kept], slope[closest]) + 0.1 * (1 + abs(log[kept]))
        return float((log[kept] - log[closest]) / moves)


def softmax(x: Array) -> Array:
    powers = np.exp(x - x.max())
    return powers / powers.sum()


def logits(config: Mapping[str, Any], tensors: Mapping[str, Array], ids: Sequence[int]) -> Array:
    """Logits `[S, V]` of every position.

    Raises:
        AssertionError: Some decision is too close to compare anything in float32 with this;
            another seed will do.
    """
    oracle = Oracle(config, tensors)
    rows = np.array([oracle.step(token) for token in ids])
    assert oracle.margin > 3e-6, f"a decision was as close as {oracle.margin:.1e}: another seed"
    return rows


def read_native(directory: Path) -> tuple[dict[str, Any], dict[str, Array]]:
    """Config and tensors of a transformers-native checkpoint in one float32 file."""
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    with safe_open(directory / "model.safetensors", framework="np") as file:
        names = file.keys()
        tensors = {n.removeprefix("model."): file.get_tensor(n).astype(np.float64) for n in names}
    return config, tensors
