"""The recurrent step, readable top to bottom: (new tokens, state) to (logits, next state).

Plain PyTorch, so that it runs, and can be compared with transformers, without any ONNX.
Dynamic Mask Attention is computed as ordinary attention on slightly longer heads: what it
adds to the score of a key, the key's *gate*, is stored as one more channel of that key,
and the matching channel of every query is 1 (see `Attention`). Does not know how its
operators become ONNX (`lowering`), nor where weights come from (`checkpoint`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from doge_onnx.config import DogeConfig
from doge_onnx.export.checkpoint import Checkpoint
from doge_onnx.export.operators import Operators
from doge_onnx.export.rope import rotary_tables

# The gate of a key that must never be attended to: exp() of it is 0 beside any real score.
# Finite, because a row whose keys are all closed (padding) would otherwise be NaN.
CLOSED_GATE = -1e9
OPEN = torch.finfo(torch.float32).max
# The attention kernel takes head sizes that are multiples of this.
ROW_MULTIPLE = 8


class Tokens(NamedTuple):
    """What every layer needs to know of the step's tokens.

    Attributes:
        positions: int64 `[B, S]`, the number of real tokens before each one.
        gate_limit: `[B, S, heads * gate channels]`, upper bound of the gates: closed for
            the keys of padding.
        zeros: `[B, S, heads, rest]`, the unused channels of queries and keys.
        lengths: int32 `[B]`, P + S - 1.
        total_length: int32 scalar, P + S.
    """

    positions: Tensor
    gate_limit: Tensor
    zeros: Tensor
    lengths: Tensor
    total_length: Tensor


def row_size(config: DogeConfig, gate_heads: int) -> int:
    """Channels of one key or value of the state: head_dim, the gates, and zeros."""
    gates = gate_heads // config.num_key_value_heads
    return -(-(config.head_dim + gates) // ROW_MULTIPLE) * ROW_MULTIPLE


class RecurrentStep(nn.Module):
    """One step of a Doge model.

    Args:
        checkpoint: Config and weights. Its tensors are moved into this module, so that
            there are never two copies of a large model.
        context_length: Number of positions that the rotary tables cover.
        operators: Implementation of the operators, `FUSED` or `STANDARD`.
    """

    def __init__(self, checkpoint: Checkpoint, context_length: int, operators: Operators) -> None:
        super().__init__()
        config, weights = checkpoint.config, checkpoint.tensors
        self.ops = operators
        self.eps = config.rms_norm_eps
        self.embedding = _weight(weights.pop("embed_tokens.weight"))
        self.layers = nn.ModuleList(
            Layer(checkpoint, f"layers.{index}.", operators)
            for index in range(config.num_hidden_layers)
        )
        self.norm = _weight(weights.pop("norm.weight"))
        # A tied head is the embedding itself: one tensor here, and one in the graph.
        self.head = None if config.tie_word_embeddings else _linear(weights, "lm_head")

        cos, sin = rotary_tables(config, context_length)
        self.cos, self.sin = _weight(cos), _weight(sin)
        gates = checkpoint.gate_heads // config.num_key_value_heads
        heads = config.num_attention_heads + config.num_key_value_heads
        self.heads = heads
        self.unused_channels = row_size(config, checkpoint.gate_heads) - config.head_dim - gates
        # Only keys have gates; the same channels of the queries are constants.
        is_key = torch.arange(heads) >= config.num_attention_heads
        self.is_key = nn.Buffer(is_key.repeat_interleave(gates))

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        past: list[tuple[Tensor, Tensor]],
        logits_to_keep: Tensor | None = None,
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Take S >= 1 new tokens.

        Args:
            input_ids: int64 `[B, S]`.
            attention_mask: int64 `[B, P + S]`, 0 for padding, of the past and the new tokens.
            past: Key and value `[B, Hkv, P, row_size]` of each layer.
            logits_to_keep: int64 `[1]`, for how many of the last positions logits are
                computed; None or 0 for all.

        Returns:
            Logits `[B, S, V]`, and the present key and value `[B, Hkv, P + S, row_size]` of
            each layer.
        """
        tokens = self.tokens(input_ids, attention_mask)
        x = F.embedding(input_ids, self.embedding)
        update = None
        present = []
        for layer, (past_key, past_value) in zip(self.layers, past, strict=True):
            x, update, key, value = layer(
                x, update, tokens, self.cos, self.sin, past_key, past_value
            )
            present.append((key, value))
        h, _ = self.ops.skip_rms_norm(update, x, self.norm, self.eps)
        if logits_to_keep is not None:
            h = self.ops.keep_last(h, logits_to_keep)
        if self.head is None:
            return self.ops.project_to_vocabulary(h, self.embedding), present
        return self.head(h), present

    def tokens(self, input_ids: Tensor, attention_mask: Tensor) -> Tokens:
        """Positions, padding and lengths of a step's tokens."""
        batch, length = input_ids.shape
        total = attention_mask.shape[1]
        # Counting real tokens, not slots: padding, wherever it is, does not move a token's
        # rotation, which past the trained context depends on its absolute position.
        counts = attention_mask.cumsum(dim=1)
        columns = (torch.arange(length) + (total - length)).expand(batch, length)
        positions = torch.clamp(counts.gather(1, columns) - 1, min=0)
        padded = (attention_mask.gather(1, columns) == 0).unsqueeze(-1)
        total_length = torch.full((), total, dtype=torch.int32)
        return Tokens(
            positions=positions,
            gate_limit=torch.where(padded & self.is_key, CLOSED_GATE, OPEN),
            zeros=torch.zeros(batch, length, self.heads, self.unused_channels),
            lengths=(total_length - 1).expand(batch),
            total_length=total_length,
        )


class Layer(nn.Module):
    """One decoder layer.

    The sum of each residual connection is taken together with the norm that follows it,
    so a layer starts with the two streams that the one before it left to be added.
    """

    def __init__(self, checkpoint: Checkpoint, prefix: str, operators: Operators) -> None:
        super().__init__()
        weights = checkpoint.tensors
        self.ops = operators
        self.eps = checkpoint.config.rms_norm_eps
        self.input_norm = _weight(weights.pop(prefix + "input_layernorm.weight"))
        self.input_residual = _weight(weights.pop(prefix + "input_residual"))
        self.attention = Attention(checkpoint, prefix + "self_attn.", operators)
        self.post_norm = _weight(weights.pop(prefix + "post_attention_layernorm.weight"))
        self.post_residual = _weight(weights.pop(prefix + "post_attention_residual"))
        self.mlp = MLP(checkpoint, prefix + "mlp.")

    def forward(
        self,
        x: Tensor,
        update: Tensor | None,
        tokens: Tokens,
        cos: Tensor,
        sin: Tensor,
        past_key: Tensor,
        past_value: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Two streams `[B, S, H]` in (the second None at first), two out, and the state."""
        if update is None:
            h = self.ops.rms_norm(x, self.input_norm, self.eps)
        else:
            h, x = self.ops.skip_rms_norm(update, x, self.input_norm, self.eps)
        update, key, value = self.attention(h, tokens, cos, sin, past_key, past_value)
        x = self.input_residual * x
        h, x = self.ops.skip_rms_norm(update, x, self.post_norm, self.eps)
        return self.post_residual * x, self.mlp(h), key, value


class Attention(nn.Module):
    """Dynamic Mask Attention with the gate folded into the key.

    Per key and gate head, g = exp(A · softplus(W_dt v)). The key becomes [k, g, 0…], the
    query [q / √D, 1, 0…], so their product is q·k/√D + g. Where gates belong to query heads
    (older checkpoints), a key has one channel for each query head of its group, and the
    query a one in its own and zeros in the others.

    Queries and keys pass through norm, gate channels and rotation together, as one tensor
    of Hq + Hkv heads: half as many nodes, and a small model's step is mostly nodes. The
    queries' constants come out of the gate's own formula: their columns of W_dt are zero, so
    exp(A · softplus(0)) is 1 for A = 0, and 0 for A far below.
    """

    def __init__(self, checkpoint: Checkpoint, prefix: str, operators: Operators) -> None:
        super().__init__()
        config, weights = checkpoint.config, checkpoint.tensors
        self.ops = operators
        self.eps = config.rms_norm_eps
        self.num_heads, self.num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.dim = config.head_dim
        self.row = row_size(config, checkpoint.gate_heads)
        self.gates = checkpoint.gate_heads // config.num_key_value_heads

        self.gate, self.A = self._gate_projection(checkpoint, prefix)
        scale = self.dim**-0.5
        query = _take_linear(weights, prefix + "q_proj")
        key = _take_linear(weights, prefix + "k_proj")
        value = _take_linear(weights, prefix + "v_proj")
        self.qk_norm = None
        if checkpoint.qk_norm:
            norms = [
                (weights.pop(prefix + "q_norm.weight") * scale).expand(self.num_heads, -1),
                weights.pop(prefix + "k_norm.weight").expand(self.num_kv_heads, -1),
            ]
            self.qk_norm = _weight(torch.cat(norms))
        else:
            query = _map_linear(query, lambda tensor: tensor * scale)
        # The kernel wants values as wide as keys. Zero columns of W_v cost less than a node.
        self.qkv = _concat_linears([query, key, _map_linear(value, self._widen_value)])
        self.output = _linear(weights, prefix + "o_proj")

    def forward(
        self,
        h: Tensor,
        tokens: Tokens,
        cos: Tensor,
        sin: Tensor,
        past_key: Tensor,
        past_value: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Attend from `h` `[B, S, H]`; returns `[B, S, H]` and the present key and value."""
        batch, length, _ = h.shape
        heads = self.num_heads + self.num_kv_heads
        qk, v = self.qkv(h).split([heads * self.dim, self.num_kv_heads * self.row], dim=-1)
        qk = qk.view(batch, length, heads, self.dim)
        if self.qk_norm is not None:
            qk = self.ops.rms_norm(qk, self.qk_norm, self.eps)
        gates = torch.exp(self.A * F.softplus(self.gate(h)))
        gates = torch.minimum(gates, tokens.gate_limit).view(batch, length, heads, self.gates)
        qk = torch.cat([qk, gates, tokens.zeros], dim=-1).view(batch, length, heads * self.row)
        qk = self.ops.rotary_embedding(qk, tokens.positions, cos, sin, heads)
        q, k = qk.split([self.num_heads * self.row, self.num_kv_heads * self.row], dim=-1)
        out, present_key, present_value = self.ops.causal_attention(
            q,
            k,
            v,
            past_key,
            past_value,
            tokens.lengths,
            tokens.total_length,
            self.num_heads,
            self.num_kv_heads,
        )
        out = out.view(batch, length, self.num_heads, self.row)[..., : self.dim]
        return self.output(out.reshape(batch, length, -1)), present_key, present_value

    def _gate_projection(self, checkpoint: Checkpoint, prefix: str) -> tuple[Linear, nn.Parameter]:
        """W_dt W_v as one map from `h`, and A, for all query and key heads.

        The product is taken in float64: it is rounded once, like a weight of its own.
        """
        weights = checkpoint.tensors
        step_weight, step_bias = _take_linear(weights, prefix + "dt_proj")
        value_weight = weights[prefix + "v_proj.weight"].T.double()
        weight = value_weight @ step_weight.double()
        bias = step_bias
        if step_bias is not None:
            value_bias = weights[prefix + "v_proj.bias"].double()
            bias = (value_bias @ step_weight.double() + step_bias.double()).float()
        query_channels = self.num_heads * self.gates
        weight = F.pad(weight.float(), (query_channels, 0))
        bias = None if bias is None else F.pad(bias, (query_channels, 0))
        # exp(-200 · softplus(0)) is 0 in float32.
        own_channel = torch.arange(self.num_heads).unsqueeze(-1) % self.gates
        constants = torch.where(torch.arange(self.gates) == own_channel, 0.0, -200.0)
        decay = torch.cat([constants.flatten(), weights.pop(prefix + "A")])
        return Linear(weight, bias), _weight(decay)

    def _widen_value(self, tensor: Tensor) -> Tensor:
        heads = tensor.unflatten(-1, (self.num_kv_heads, self.dim))
        return F.pad(heads, (0, self.row - self.dim)).flatten(-2)


class MLP(nn.Module):
    """W_down(act(W_gate h) ⊙ W_up h), the first two as one product."""

    def __init__(self, checkpoint: Checkpoint, prefix: str) -> None:
        super().__init__()
        weights = checkpoint.tensors
        self.activation = checkpoint.config.hidden_act
        gate, up = (_take_linear(weights, prefix + name) for name in ("gate_proj", "up_proj"))
        self.gate_up = _concat_linears([gate, up])
        self.down = _linear(weights, prefix + "down_proj")

    def forward(self, h: Tensor) -> Tensor:
        """`[B, S, H]` to `[B, S, H]`."""
        gate, up = self.gate_up(h).chunk(2, dim=-1)
        return self.down(activate(self.activation, gate) * up)


def activate(name: str, x: Tensor) -> Tensor:
    """The activation function that the config names."""
    if name == "silu":
        return F.silu(x)
    if name == "relu":
        return F.relu(x)
    return F.gelu(x, approximate="tanh" if name == "gelu_tanh" else "none")


class Linear(nn.Module):
    """x W + b with W as `[inputs, outputs]`: one MatMul, without a transpose before it."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = _weight(weight)
        self.bias = None if bias is None else _weight(bias)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., inputs]` to `[..., outputs]`."""
        product = x @ self.weight
        return product if self.bias is None else product + self.bias


# Weight `[inputs, outputs]` and bias `[outputs]`.
_LinearWeights = tuple[Tensor, Tensor | None]


def _weight(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.contiguous(), requires_grad=False)


def _take_linear(weights: dict[str, Tensor], name: str) -> _LinearWeights:
    return weights.pop(name + ".weight").T, weights.pop(name + ".bias", None)


def _linear(weights: dict[str, Tensor], name: str) -> Linear:
    return Linear(*_take_linear(weights, name))


def _map_linear(linear: _LinearWeights, function: Callable[[Tensor], Tensor]) -> _LinearWeights:
    """Change the outputs of a linear map: `function` acts on the last axis of both tensors."""
    weight, bias = linear
    return function(weight), None if bias is None else function(bias)


def _concat_linears(linears: list[_LinearWeights]) -> Linear:
    """Several linear maps of the same input as one."""
    biases = [bias for _, bias in linears if bias is not None]
    weight = torch.cat([weight for weight, _ in linears], dim=-1)
    return Linear(weight, torch.cat(biases) if biases else None)
