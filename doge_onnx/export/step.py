"""The recurrent step, readable top to bottom: (new tokens, state) to (logits, next state).

Plain PyTorch: it runs without ONNX, and tests compare it with transformers. Dynamic Mask
Attention is computed as ordinary attention on slightly longer heads: the key's *gate*, which is
added to the score of the key, is stored as one more channel of that key, and the matching
channel of every query is 1 (see `Attention`). Does not know how its operators become ONNX
(`lowering`), or where weights come from (`checkpoint`).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from doge_onnx.export.checkpoint import Checkpoint
from doge_onnx.export.growing_state import GrowingState
from doge_onnx.export.matrices import (
    Embedding,
    Linear,
    QuantizedEmbedding,
    QuantizedRows,
    Rows,
)
from doge_onnx.export.operators import Operators, wider
from doge_onnx.export.state_rows import HalfRows, Int8Rows, Tokens
from doge_onnx.export.window_state import WindowState

State = GrowingState | WindowState


class RecurrentStep(nn.Module):
    """One step of a Doge model.

    Args:
        checkpoint: Config and weights. Its tensors are moved into this module, so that
            there are never two copies of a large model.
        state: The layout of the state, and how attention reads it.
        operators: Implementation of the operators, `FUSED` or `STANDARD`.
    """

    def __init__(self, checkpoint: Checkpoint, state: State, operators: Operators) -> None:
        super().__init__()
        config, weights = checkpoint.config, checkpoint.tensors
        self.ops = operators
        self.eps = config.rms_norm_eps
        self.state = state
        self.embedding: Embedding | QuantizedEmbedding = Embedding(
            weights.pop("embed_tokens.weight"), operators
        )
        self.layers = nn.ModuleList(
            Layer(checkpoint, f"layers.{index}.", state, operators)
            for index in range(config.num_hidden_layers)
        )
        self.norm = _weight(weights.pop("norm.weight"))
        # A tied head is the embedding itself: one tensor here, and one in the graph.
        self.head: nn.Module | None = None
        if not config.tie_word_embeddings:
            self.head = _linear(weights, "lm_head")

    def forward(
        self,
        inputs: tuple[Tensor, ...],
        past: list[tuple[Tensor, Tensor]],
        logits_to_keep: Tensor | None = None,
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Take S >= 1 new tokens.

        Args:
            inputs: The tokens, int64 `[B, S]`, and the other arguments of `state.tokens`.
            past: Key and value of each layer, in the shape of the state.
            logits_to_keep: int64 `[1]`, for how many of the last positions logits are
                computed; None or 0 for all.

        Returns:
            Logits `[B, S, V]`, and the present key and value of each layer.
        """
        tokens = self.state.tokens(*inputs)
        x = self.embedding(inputs[0])
        update: Tensor | None = None
        present: list[tuple[Tensor, Tensor]] = []
        for layer, (past_key, past_value) in zip(self.layers, past, strict=True):
            x, update, key, value = layer(x, update, tokens, past_key, past_value)
            present.append((key, value))
        assert update is not None, "a config has at least one layer"
        h, _ = self.ops.skip_rms_norm(update, x, self.norm, self.eps)
        if logits_to_keep is not None:
            h = self.ops.keep_last(h, logits_to_keep)
        logits = self.embedding.project(h) if self.head is None else self.head(h)
        return logits.to(wider(logits.dtype)), present

    def halve(self) -> RecurrentStep:
        """Convert weights and activations to the state's type, float16 or bfloat16.

        Gates from W_dt on, routers, and how rows are split or scaled stay float32: they cost
        little, and a rounded gate or router would pick another key or expert.
        """
        assert isinstance(self.state, GrowingState)
        dtype = getattr(torch, self.state.activations)
        for path, module in self.named_modules():
            if isinstance(module, HalfRows | Int8Rows) or path.endswith((".gate", ".router")):
                continue
            tensors = [
                *module.named_parameters(recurse=False),
                *module.named_buffers(recurse=False),
            ]
            for name, tensor in tensors:
                if tensor.is_floating_point() and name not in ("A", "limits"):
                    tensor.data = tensor.data.to(dtype)
        return self


class Layer(nn.Module):
    """One decoder layer.

    One operator adds a residual connection and computes the norm that follows it. So a layer
    takes the two streams that the layer before it has not added yet.
    """

    def __init__(
        self, checkpoint: Checkpoint, prefix: str, state: State, operators: Operators
    ) -> None:
        super().__init__()
        weights = checkpoint.tensors
        self.ops = operators
        self.eps = checkpoint.config.rms_norm_eps
        self.input_norm = _weight(weights.pop(prefix + "input_layernorm.weight"))
        self.input_residual = _weight(weights.pop(prefix + "input_residual"))
        self.attention = Attention(checkpoint, prefix + "self_attn.", state, operators)
        self.post_norm = _weight(weights.pop(prefix + "post_attention_layernorm.weight"))
        self.post_residual = _weight(weights.pop(prefix + "post_attention_residual"))
        mlp = CDMoE if checkpoint.config.is_moe else MLP
        self.mlp = mlp(checkpoint, prefix + "mlp.")

    def forward(
        self,
        x: Tensor,
        update: Tensor | None,
        tokens: Tokens,
        past_key: Tensor,
        past_value: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Two streams `[B, S, H]` in (the second None at first), two out, and the state."""
        if update is None:
            h = self.ops.rms_norm(x, self.input_norm, self.eps)
        else:
            h, x = self.ops.skip_rms_norm(update, x, self.input_norm, self.eps)
        update, key, value = self.attention(h, tokens, past_key, past_value)
        x = self.input_residual * x
        h, x = self.ops.skip_rms_norm(update, x, self.post_norm, self.eps)
        return self.post_residual * x, self.mlp(h), key, value


class Attention(nn.Module):
    """Dynamic Mask Attention with the gate folded into the key.

    Per key and gate head, g = exp(A · softplus(W_dt v)). The key becomes [k, g, 0…], the
    query [q / √D, 1, 0…], so their product is q·k/√D + g. Where gates belong to query heads
    (older checkpoints) and keys do not, a key has a channel for each query head of its group,
    and the query a one in its own and zeros in the others.

    Queries and keys pass through norm, gate channels and rotation together, as one tensor
    of Hq + Hkv heads. That halves the number of nodes, and nodes are most of a small
    model's step. The queries' constants come from the gate's own formula: their columns of W_dt
    are zero, so exp(A · softplus(0)) is 2^A, and that is 0 for a very negative A.

    Values and the output are as wide as rows of the state: zero columns of W_v and zero rows
    of W_o cost less than nodes that pad and cut.
    """

    def __init__(
        self, checkpoint: Checkpoint, prefix: str, state: State, operators: Operators
    ) -> None:
        super().__init__()
        config, weights = checkpoint.config, checkpoint.tensors
        self.ops = operators
        self.eps = config.rms_norm_eps
        self.heads = state.heads
        # Not a submodule: it is shared by all layers, and its tables belong to the step.
        self.attend = state.attend
        # The last bit of a gate matters only if keys compete for places in a window.
        self.softplus = F.softplus if state.window is None else steady_softplus
        self.int8_rows: Int8Rows | None = None
        self.half_rows: HalfRows | None = None
        if isinstance(state, GrowingState) and state.dtype == "int8":
            self.int8_rows = Int8Rows(self.heads, state.closed)
        elif isinstance(state, GrowingState) and state.dtype != "float32":
            self.half_rows = HalfRows(self.heads)
        # A state whose heads are the query heads holds a copy of the keys for each of them.
        self.copies = self.heads.num_keys // config.num_key_value_heads

        gate, self.A = self._gate_projection(checkpoint, prefix)
        query = _take_linear(weights, prefix + "q_proj")
        key = _map_linear(_take_linear(weights, prefix + "k_proj"), self._copy_heads)
        value = _map_linear(_take_linear(weights, prefix + "v_proj"), self._copy_heads)
        scale = self.heads.dim**-0.5
        self.qk_norm = None
        if checkpoint.qk_norm:
            norms = [
                (weights.pop(prefix + "q_norm.weight") * scale).expand(self.heads.num_queries, -1),
                weights.pop(prefix + "k_norm.weight").expand(self.heads.num_keys, -1),
            ]
            self.qk_norm = _weight(torch.cat(norms))
        else:
            query = _map_linear(query, lambda tensor: tensor * scale)
        self.qkv = _concat_linears([query, key, _map_linear(value, self._widen_heads)])
        self.gate = Linear(*gate)
        weight, bias = _take_linear(weights, prefix + "o_proj")
        self.output = Linear(self._widen_heads(weight.T).T, bias)

    def forward(
        self, h: Tensor, tokens: Tokens, past_key: Tensor, past_value: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Attend from `h` `[B, S, H]`; returns `[B, S, H]` and the present key and value."""
        batch, length, _ = h.shape
        queries, keys, rotated = (
            self.heads.num_queries,
            self.heads.num_keys,
            self.heads.num_rotated,
        )
        dim, row = self.heads.dim, self.heads.row
        qk, v = self.qkv(h).split([rotated * dim, keys * row], dim=-1)
        qk = qk.view(batch, length, rotated, dim)
        if self.qk_norm is not None:
            qk = self.ops.rms_norm(qk, self.qk_norm, self.eps)
        gates = torch.exp(self.A * self.softplus(self.gate(h.to(self.A.dtype))))
        if tokens.gate_limit is not None:
            gates = torch.minimum(gates, tokens.gate_limit)
        gates = gates.view(batch, length, rotated, self.heads.gates)
        rows = self.int8_rows or self.half_rows
        parts = [gates] if rows is None else rows.split(gates, qk.dtype)
        qk = torch.cat([qk, *parts, tokens.rest], dim=-1).view(batch, length, rotated * row)
        qk = self.ops.rotary_embedding(qk, tokens.rows, tokens.cos, tokens.sin, rotated)
        q, k = qk.split([queries * row, keys * row], dim=-1)
        out, key, value = self.attend(q, k, v, tokens, past_key, past_value, self.int8_rows)
        return self.output(out), key, value

    def _gate_projection(
        self, checkpoint: Checkpoint, prefix: str
    ) -> tuple[_LinearWeights, nn.Parameter]:
        """W_dt W_v as one map from `h`, and A, for all query and key heads.

        The product is taken in float64: it is rounded once, like a weight of its own.
        """
        weights = checkpoint.tensors
        gate_weight, gate_bias = _take_linear(weights, prefix + "dt_proj")
        value_weight = weights[prefix + "v_proj.weight"].T
        weight = value_weight.double() @ gate_weight.double()
        if gate_bias is not None:
            value_bias = weights[prefix + "v_proj.bias"]
            gate_bias = value_bias.double() @ gate_weight.double() + gate_bias.double()
            gate_bias = gate_bias.float()
        query_channels = self.heads.num_queries * self.heads.gates
        projection = _map_linear(
            (weight.float(), gate_bias), lambda tensor: F.pad(tensor, (query_channels, 0))
        )
        # A query reads one gate channel of its group; exp(-200 · softplus(0)) is 0 in float32.
        own = torch.arange(self.heads.num_queries).unsqueeze(-1) % self.heads.gates
        # With two channels per gate, 2^1 = 2 splits into a one for each of them.
        read = 0.0 if self.int8_rows is None and self.half_rows is None else 1.0
        constants = torch.where(torch.arange(self.heads.gates) == own, read, -200.0)
        return projection, _weight(torch.cat([constants.flatten(), weights.pop(prefix + "A")]))

    def _copy_heads(self, tensor: Tensor) -> Tensor:
        heads: Tensor = tensor.unflatten(-1, (-1, self.heads.dim))
        return heads.repeat_interleave(self.copies, dim=-2).flatten(-2)

    def _widen_heads(self, tensor: Tensor) -> Tensor:
        heads = tensor.unflatten(-1, (-1, self.heads.dim))
        return F.pad(heads, (0, self.heads.row - self.heads.dim)).flatten(-2)


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
        product: Tensor = self.down(activate(self.activation, gate) * up)
        return product


class CDMoE(nn.Module):
    """Cross Domain Mixture of Experts: an MLP for all tokens, and single-neuron experts.

    Of n² experts, expert (a, b) has the score row_a + column_b. The k best of all sums lie
    among the sums of the min(k, n) best rows and columns, so n² sums are never formed. Each
    token is routed by itself; transformers mixes the tokens of a step, and agrees only when
    it is fed one at a time.
    """

    def __init__(self, checkpoint: Checkpoint, prefix: str) -> None:
        super().__init__()
        config, weights = checkpoint.config, checkpoint.tensors
        self.activation = config.hidden_act
        self.normalize = config.norm_topk_prob
        self.per_token = config.num_experts_per_tok
        self.side = math.isqrt(config.num_experts)
        self.candidates = min(self.per_token, self.side)
        self.shared = MLP(checkpoint, prefix)
        self.router = _linear(weights, prefix + "router_gate")
        self.down: Rows | QuantizedRows = Rows(weights.pop(prefix + "down_embed.weight"))
        self.up: Rows | QuantizedRows = Rows(weights.pop(prefix + "up_embed.weight"))

    def forward(self, h: Tensor) -> Tensor:
        """`[B, S, H]` to `[B, S, H]`."""
        rows, columns = self.router(h.to(self.router.weight.dtype)).chunk(2, dim=-1)
        row_scores, row_indices = rows.topk(self.candidates)
        column_scores, column_indices = columns.topk(self.candidates)
        scores = (row_scores.unsqueeze(-1) + column_scores.unsqueeze(-2)).flatten(-2)
        experts = (row_indices.unsqueeze(-1) * self.side + column_indices.unsqueeze(-2)).flatten(-2)
        scores, best = scores.topk(self.per_token)
        experts = experts.gather(-1, best)
        weights = torch.softmax(scores, dim=-1)
        if self.normalize:
            weights = weights / weights.sum(-1, keepdim=True)
        # [B, S, k, H] @ [B, S, H, 1], and back.
        neurons = (self.down(experts) @ h.unsqueeze(-1)).squeeze(-1)
        neurons = activate(self.activation, neurons) * weights.to(h.dtype)
        routed = (neurons.unsqueeze(-2) @ self.up(experts)).squeeze(-2)
        output: Tensor = self.shared(h) + routed
        return output


def steady_softplus(x: Tensor) -> Tensor:
    """log(1 + e^x), the same to the last bit wherever in a tensor x stands.

    ONNX Runtime's Softplus and Log compute four elements at once, and the rest at the end by
    another formula. Equal tokens would get unequal gates, and the wrong one would fall out of
    the window. A row of LogSoftmax depends on no other row.
    """
    pair = torch.stack([torch.zeros_like(x), x], dim=-1)
    return -torch.log_softmax(pair, dim=-1)[..., 0]


def activate(name: str, x: Tensor) -> Tensor:
    """The activation function that the config names."""
    if name == "silu":
        return F.silu(x)
    if name == "relu":
        return F.relu(x)
    return F.gelu(x, approximate="tanh" if name == "gelu_tanh" else "none")


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
