"""The recurrent step of a model: new tokens and a state in, logits and the next state out.

Plain PyTorch, which runs without ONNX, so that tests can compare it with transformers. Dynamic Mask
Attention is computed as ordinary attention with slightly longer heads: the *gate* of a key, which
is added to the key's score, is stored as one more channel of the key, and the same channel of every
query is 1 (see `Attention`). Knows the layers of a model. Does not know how its operators become
ONNX (`lowering`) or where weights come from (`checkpoint`).
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
        checkpoint: Config and weights. Its tensors are moved into this module, so that memory never
            holds a large model twice.
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
        """Feed S >= 1 new tokens to each sequence.

        Args:
            inputs: The arguments of `state.tokens`, of which the first are the token ids, int64
                `[B, S]`.
            past: Key and value of each layer, in the shape of the state.
            logits_to_keep: int64 `[1]`, the number of last positions to compute logits for; None
                or 0 for all.

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
        """Convert weights and activations to half precision: `state.activations`.

        Gates from W_dt on, routers, and the splitting and scaling of rows stay float32. They cost
        little, and a rounded gate or router would choose another key or expert.
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

    One operator adds a residual connection and computes the norm after it. So a layer takes the two
    streams that the previous layer has not added yet.
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
        """Run the layer.

        Args:
            x: The first stream, `[B, S, H]`.
            update: The second stream, `[B, S, H]`; None in the first layer.
            tokens: The tokens of this step.
            past_key: Keys of the layer, in the shape of the state.
            past_value: Values of the layer, in the shape of the state.

        Returns:
            The two streams for the next layer, and the present key and value.
        """
        if update is None:
            h = self.ops.rms_norm(x, self.input_norm, self.eps)
        else:
            h, x = self.ops.skip_rms_norm(update, x, self.input_norm, self.eps)
        update, key, value = self.attention(h, tokens, past_key, past_value)
        x = self.input_residual * x
        h, x = self.ops.skip_rms_norm(update, x, self.post_norm, self.eps)
        return self.post_residual * x, self.mlp(h), key, value


class Attention(nn.Module):
    """Dynamic Mask Attention, with the gate as a channel of the key.

    For each key and gate head, g = exp(A · softplus(W_dt v)), or without the exp in the generation
    that has window_size. The key becomes [k, g, 0…] and the
    query [q / √D, 1, 0…], so that their product is q·k/√D + g. In older checkpoints, gates belong
    to query heads and keys do not. Then a key has a channel for each query head of its group, and a
    query has a one in its own channel and zeros in the others.

    Queries and keys pass through norm, gate channels and rotation together, as one tensor of
    Hq + Hkv heads. That halves the number of nodes, which take most of the time of a small model's
    step. The constants of queries come from the same formula as the gates: their columns of W_dt
    are zero, so exp(A · softplus(0)) is 2^A, which is 0 for a very negative A. Without the exp it
    is A · ln 2.

    Values and the output are as wide as rows of the state: zero columns of W_v and zero rows of W_o
    cost less than nodes that pad and cut.
    """

    def __init__(
        self, checkpoint: Checkpoint, prefix: str, state: State, operators: Operators
    ) -> None:
        super().__init__()
        config, weights = checkpoint.config, checkpoint.tensors
        self.ops = operators
        self.eps = config.rms_norm_eps
        self.exp_gates = config.generation.exp_gates
        self.heads = state.heads
        # A method and not a submodule: all layers share the state, and its tables are the step's.
        self.attend = state.attend
        self.int8_rows: Int8Rows | None = None
        self.half_rows: HalfRows | None = None
        if isinstance(state, GrowingState) and state.dtype == "int8":
            self.int8_rows = Int8Rows(self.heads, state.closed)
        elif isinstance(state, GrowingState) and state.dtype != "float32":
            self.half_rows = HalfRows(self.heads)
        # Half precision is for CUDA, where Softplus treats all elements alike.
        self.pairs = not isinstance(state, GrowingState) or state.activations == "float32"
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
        """Attend to the past and the new tokens.

        Args:
            h: Hidden states, `[B, S, H]`.
            tokens: The tokens of this step.
            past_key: Keys of the layer, in the shape of the state.
            past_value: Values of the layer, in the shape of the state.

        Returns:
            The output `[B, S, H]`, and the present key and value.
        """
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
        shape = (batch, length, rotated, self.heads.gates)
        steps = self.gate(h.to(self.A.dtype))
        if self.pairs:
            steps = self.ops.log_sum_exp(steps.view(*shape, 2))
        else:
            steps = F.softplus(steps.view(shape))
        gates = self.A * steps
        if self.exp_gates:
            gates = torch.exp(gates)
        if tokens.gate_limit is not None:
            gates = torch.minimum(gates, tokens.gate_limit)
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
        """W_dt W_v as one linear map from `h`, and A, for all query and key heads.

        The product is computed in float64 and rounded once, like any weight. With `pairs`, each
        output has a 0 before it: log(e^0 + e^x) is softplus(x).
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
        if self.pairs:
            projection = _map_linear(
                projection, lambda x: torch.stack([torch.zeros_like(x), x], dim=-1).flatten(-2)
            )
        # A query reads one gate channel of its group: exp(-200 · softplus(0)) is 0 in float32.
        own = torch.arange(self.heads.num_queries).unsqueeze(-1) % self.heads.gates
        # With two channels per gate, a 2 is split into a one for each of them.
        read = 1.0 if self.int8_rows is None and self.half_rows is None else 2.0
        read, none = (math.log2(read), -200.0) if self.exp_gates else (read / math.log(2), 0.0)
        constants = torch.where(torch.arange(self.heads.gates) == own, read, none)
        A = torch.cat([constants.flatten(), weights.pop(prefix + "A")])
        return projection, _weight(A.view(self.heads.num_rotated, self.heads.gates))

    def _copy_heads(self, tensor: Tensor) -> Tensor:
        heads: Tensor = tensor.unflatten(-1, (-1, self.heads.dim))
        return heads.repeat_interleave(self.copies, dim=-2).flatten(-2)

    def _widen_heads(self, tensor: Tensor) -> Tensor:
        heads = tensor.unflatten(-1, (-1, self.heads.dim))
        return F.pad(heads, (0, self.heads.row - self.heads.dim)).flatten(-2)


class MLP(nn.Module):
    """W_down(act(W_gate h) ⊙ W_up h), with W_gate and W_up as one matrix."""

    def __init__(self, checkpoint: Checkpoint, prefix: str) -> None:
        super().__init__()
        weights = checkpoint.tensors
        self.activation = checkpoint.config.hidden_act
        gate, up = (_take_linear(weights, prefix + name) for name in ("gate_proj", "up_proj"))
        self.gate_up = _concat_linears([gate, up])
        self.down = _linear(weights, prefix + "down_proj")

    def forward(self, h: Tensor) -> Tensor:
        """Map hidden states `[B, S, H]` to `[B, S, H]`."""
        gate, up = self.gate_up(h).chunk(2, dim=-1)
        product: Tensor = self.down(activate(self.activation, gate) * up)
        return product


class CDMoE(nn.Module):
    """Cross Domain Mixture of Experts: an MLP for all tokens, and experts of one neuron each.

    Of n² experts, expert (a, b) has the score row_a + column_b. The k largest sums are among those
    of the min(k, n) best rows and columns, so the n² sums are never computed. Each token is routed
    by itself. transformers mixes the tokens of a step, so it gives the same result only if it is
    fed one token at a time.
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
        """Map hidden states `[B, S, H]` to `[B, S, H]`."""
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


def activate(name: str, x: Tensor) -> Tensor:
    """Apply the activation function of that name, as in `DogeConfig.hidden_act`."""
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
    """Change the outputs of a linear map: apply `function` to the last axis of both tensors."""
    weight, bias = linear
    return function(weight), None if bias is None else function(bias)


def _concat_linears(linears: list[_LinearWeights]) -> Linear:
    """Join several linear maps of the same input to one."""
    biases = [bias for _, bias in linears if bias is not None]
    weight = torch.cat([weight for weight, _ in linears], dim=-1)
    return Linear(weight, torch.cat(biases) if biases else None)
