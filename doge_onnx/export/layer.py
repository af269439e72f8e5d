"""A decoder layer, as three or four pieces.

Dynamic Mask Attention is computed as ordinary attention with slightly longer heads: the *gate* of a
key, which is added to the key's score, is stored as one more channel of the key, and the same
channel of every query is 1 (see `ProjectHeads`). Knows what a layer computes beside its attention
(`attention`). Does not know how its operators become ONNX (`lowering`) or where weights come from
(`checkpoint`).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from doge_onnx.export.attention import AnyAttention, State, attention_of
from doge_onnx.export.checkpoint import Checkpoint
from doge_onnx.export.growing_state import GrowingState
from doge_onnx.export.matrices import Linear, QuantizedLinear, QuantizedRows, Rows
from doge_onnx.export.operators import Operators
from doge_onnx.export.piece import Parts, Piece
from doge_onnx.export.state_rows import HalfRows, Int8Rows, Tokens


class Layer(nn.Module):
    """One decoder layer.

    One operator adds a residual connection and computes the norm after it. So a layer takes the
    normed stream beside the stream itself, and returns both as the next layer needs them.

    Args:
        checkpoint: Its tensors are moved into this module.
        number: Of the layer.
        state: The layout of the state.
        operators: Implementation of the operators.
    """

    def __init__(
        self, checkpoint: Checkpoint, number: int, state: State, operators: Operators
    ) -> None:
        super().__init__()
        config = checkpoint.config
        prefix, following = f"layers.{number}.", f"layers.{number + 1}.input_layernorm.weight"
        if number + 1 == config.num_hidden_layers:
            following = "norm.weight"
        self.ops = operators
        self.int8_rows: Int8Rows | None = None
        if isinstance(state, GrowingState) and state.dtype == "int8":
            self.int8_rows = Int8Rows(state.heads, state.closed)
        attention = prefix + "self_attn."
        self.project = ProjectHeads(checkpoint, attention, state, operators, self.int8_rows)
        output, bias = take_linear(checkpoint.tensors, attention + "o_proj")
        output = widen_heads(output.T, state.heads.dim, state.heads.row).T
        self.attention: AnyAttention = attention_of(state, self.int8_rows)(
            state,
            Linear(output, bias),
            constant(checkpoint.tensors.pop(prefix + "input_residual")),
            constant(checkpoint.tensors.pop(prefix + "post_attention_layernorm.weight")),
            config.rms_norm_eps,
            operators,
        )
        if self.int8_rows is not None:
            self.attention.int8_rows = self.int8_rows
        self.experts = Experts(checkpoint, prefix + "mlp.") if config.is_moe else None
        self.feed_forward = FeedForward(checkpoint, prefix, following, operators)

    def forward(
        self, h: Tensor, x: Tensor, tokens: Tokens, past_key: Tensor, past_value: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Run the layer.

        Args:
            h: The normed stream, `[B, S, H]`.
            x: The stream, `[B, S, H]`.
            tokens: The tokens of this step.
            past_key: Keys of the layer, in the shape of the state.
            past_value: Values of the layer, in the shape of the state.

        Returns:
            The two streams for the next layer, and the present key and value.
        """
        q, k, v = self.project(
            h, tokens.rest, tokens.rows, tokens.cos, tokens.sin, tokens.gate_limit
        )
        h, x, key, value = self.attention.attend(q, k, v, past_key, past_value, tokens, x)
        routed = None if self.experts is None else self.experts(h)
        h, x = self.feed_forward(h, x, routed)
        return h, x, key, value


class ProjectHeads(Piece):
    """Queries, keys and values of Dynamic Mask Attention, with the gate as a channel of the key.

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

    Args:
        checkpoint: Its tensors are moved into this module.
        prefix: What the names of the tensors begin with.
        state: The layout of the state.
        operators: Implementation of the operators.
        int8_rows: Splits the gates of an int8 state; else None.
    """

    operator = "ProjectHeads"
    inputs = (
        "h",
        "weight",
        "scales",
        "bias",
        "gate_weight",
        "gate_bias",
        "A",
        "qk_norm",
        "rest",
        "positions",
        "cos",
        "sin",
        "gate_limit",
        "gate_per_step",
        "gate_step",
    )
    outputs = ("q", "k", "v")

    def __init__(
        self,
        checkpoint: Checkpoint,
        prefix: str,
        state: State,
        operators: Operators,
        int8_rows: Int8Rows | None,
    ) -> None:
        super().__init__()
        config, weights = checkpoint.config, checkpoint.tensors
        self.ops = operators
        self.eps = config.rms_norm_eps
        self.exp_gates = config.generation.exp_gates
        self.heads = state.heads
        self.rows: Int8Rows | HalfRows | None = int8_rows
        if isinstance(state, GrowingState) and state.dtype not in ("float32", "int8"):
            self.rows = HalfRows(self.heads)
        # Half precision is for CUDA, where Softplus treats all elements alike.
        self.pairs = not isinstance(state, GrowingState) or state.activations == "float32"
        # A state whose heads are the query heads holds a copy of the keys for each of them.
        self.copies = self.heads.num_keys // config.num_key_value_heads

        gate, self.A = self._gate_projection(checkpoint, prefix)
        query = take_linear(weights, prefix + "q_proj")
        key = _map_linear(take_linear(weights, prefix + "k_proj"), self._copy_heads)
        value = _map_linear(take_linear(weights, prefix + "v_proj"), self._copy_heads)
        scale = self.heads.dim**-0.5
        self.qk_norm = None
        if checkpoint.qk_norm:
            norms = [
                (weights.pop(prefix + "q_norm.weight") * scale).expand(self.heads.num_queries, -1),
                weights.pop(prefix + "k_norm.weight").expand(self.heads.num_keys, -1),
            ]
            self.qk_norm = constant(torch.cat(norms))
        else:
            query = _map_linear(query, lambda tensor: tensor * scale)
        value = _map_linear(value, lambda x: widen_heads(x, self.heads.dim, self.heads.row))
        self.qkv: Linear | QuantizedLinear = _concat_linears([query, key, value])
        self.gate = Linear(*gate)

    def forward(
        self,
        h: Tensor,
        rest: Tensor,
        positions: Tensor,
        cos: Tensor,
        sin: Tensor,
        gate_limit: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute queries, keys and values.

        Args:
            h: Hidden states, `[B, S, H]`.
            rest: `[B, S, num_rotated, rest]`, the channels of queries and keys after the gates.
            positions: int64 `[B, S]`, each token's row of `cos` and `sin`.
            cos: Rotary table, `[P, dim / 2]`.
            sin: Rotary table, `[P, dim / 2]`.
            gate_limit: `[B, S, num_rotated, gates]`, upper bound of the gates; None for no limit.

        Returns:
            `[B, S, num_queries * row]`, and twice `[B, S, num_keys * row]`.
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
        if gate_limit is not None:
            gates = torch.minimum(gates, gate_limit)
        parts = [gates] if self.rows is None else self.rows.split(gates, qk.dtype)
        qk = torch.cat([qk, *parts, rest], dim=-1).view(batch, length, rotated * row)
        qk = self.ops.rotary_embedding(qk, positions, cos, sin, rotated)
        q, k = qk.split([queries * row, keys * row], dim=-1)
        return q, k, v

    def parts(self) -> Parts:
        """See `Piece`."""
        rows = self.rows if isinstance(self.rows, Int8Rows) else None
        return Parts(
            products={"weight": self.qkv},
            tables={},
            plain={
                "gate_weight": self.gate.weight,
                "gate_bias": self.gate.bias,
                "A": self.A,
                "qk_norm": self.qk_norm,
                "gate_per_step": None if rows is None else rows.per_step,
                "gate_step": None if rows is None else rows.step,
                # Not in docs/native.md: half precision has no kernels there.
                "gate_share": self.rows.share if isinstance(self.rows, HalfRows) else None,
            },
            attributes={
                "heads": self.heads.num_queries,
                "kv_heads": self.heads.num_keys,
                "head_dim": self.heads.dim,
                "gates": self.heads.gates,
                "row": self.heads.row,
                "exp_gates": int(self.exp_gates),
                "epsilon": self.eps,
            },
        )

    def _gate_projection(
        self, checkpoint: Checkpoint, prefix: str
    ) -> tuple[LinearWeights, nn.Parameter]:
        """W_dt W_v as one linear map from `h`, and A, for all query and key heads.

        The product is computed in float64 and rounded once, like any weight. With `pairs`, each
        output has a 0 before it: log(e^0 + e^x) is softplus(x).
        """
        weights = checkpoint.tensors
        gate_weight, gate_bias = take_linear(weights, prefix + "dt_proj")
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
        read = 1.0 if self.rows is None else 2.0
        read, none = (math.log2(read), -200.0) if self.exp_gates else (read / math.log(2), 0.0)
        constants = torch.where(torch.arange(self.heads.gates) == own, read, none)
        A = torch.cat([constants.flatten(), weights.pop(prefix + "A")])
        return projection, constant(A.view(self.heads.num_rotated, self.heads.gates))

    def _copy_heads(self, tensor: Tensor) -> Tensor:
        heads: Tensor = tensor.unflatten(-1, (-1, self.heads.dim))
        return heads.repeat_interleave(self.copies, dim=-2).flatten(-2)


class FeedForward(Piece):
    """W_down(act(W_gate h) ⊙ W_up h), then the residual connection and the next norm.

    W_gate and W_up are one matrix.

    Args:
        checkpoint: Its tensors are moved into this module.
        prefix: What the names of the layer's tensors begin with.
        following: Name of the norm that follows.
        operators: Implementation of the operators.
    """

    operator = "FeedForward"
    inputs = (
        "h",
        "x",
        "gate_up",
        "gate_up_scales",
        "gate_up_bias",
        "down",
        "down_scales",
        "down_bias",
        "routed",
        "residual",
        "norm",
    )
    outputs = ("h", "x")

    def __init__(
        self, checkpoint: Checkpoint, prefix: str, following: str, operators: Operators
    ) -> None:
        super().__init__()
        weights = checkpoint.tensors
        self.ops = operators
        self.eps = checkpoint.config.rms_norm_eps
        self.activation = checkpoint.config.hidden_act
        gate, up = (
            take_linear(weights, prefix + name) for name in ("mlp.gate_proj", "mlp.up_proj")
        )
        self.gate_up: Linear | QuantizedLinear = _concat_linears([gate, up])
        down = Linear(*take_linear(weights, prefix + "mlp.down_proj"))
        self.down: Linear | QuantizedLinear = down
        self.residual = constant(weights.pop(prefix + "post_attention_residual"))
        self.norm = constant(weights.pop(following))

    def forward(self, h: Tensor, x: Tensor, routed: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Run the MLP and end the layer.

        Args:
            h: The normed stream, `[B, S, H]`.
            x: The stream, `[B, S, H]`.
            routed: What the experts add, `[B, S, H]`; None for a layer without experts.

        Returns:
            The two streams of the next layer.
        """
        gate, up = self.gate_up(h).chunk(2, dim=-1)
        update = self.down(activate(self.activation, gate) * up)
        if routed is not None:
            update = update + routed
        return self.ops.skip_rms_norm(update, self.residual * x, self.norm, self.eps)

    def parts(self) -> Parts:
        """See `Piece`."""
        return Parts(
            products={"gate_up": self.gate_up, "down": self.down},
            tables={},
            plain={"residual": self.residual, "norm": self.norm},
            attributes={"activation": self.activation, "epsilon": self.eps},
        )


class Experts(Piece):
    """Cross Domain Mixture of Experts: experts of one neuron each, beside an MLP for all tokens.

    Of n² experts, expert (a, b) has the score row_a + column_b. The k largest sums are among those
    of the min(k, n) best rows and columns, so the n² sums are never computed. Each token is routed
    by itself. transformers mixes the tokens of a step, so it gives the same result only if it is
    fed one token at a time.

    Args:
        checkpoint: Its tensors are moved into this module.
        prefix: What the names of the tensors begin with.
    """

    operator = "Experts"
    inputs = ("h", "router", "router_bias", "down", "down_scales", "up", "up_scales")
    outputs = ("routed",)

    def __init__(self, checkpoint: Checkpoint, prefix: str) -> None:
        super().__init__()
        config, weights = checkpoint.config, checkpoint.tensors
        self.activation = config.hidden_act
        self.normalize = config.norm_topk_prob
        self.per_token = config.num_experts_per_tok
        self.side = math.isqrt(config.num_experts)
        self.candidates = min(self.per_token, self.side)
        self.router = Linear(*take_linear(weights, prefix + "router_gate"))
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
        neurons = (self.down(experts).to(h.dtype) @ h.unsqueeze(-1)).squeeze(-1)
        neurons = activate(self.activation, neurons) * weights.to(h.dtype)
        routed: Tensor = (neurons.unsqueeze(-2) @ self.up(experts).to(h.dtype)).squeeze(-2)
        return routed

    def parts(self) -> Parts:
        """See `Piece`."""
        return Parts(
            products={},
            tables={"down": self.down, "up": self.up},
            plain={"router": self.router.weight, "router_bias": self.router.bias},
            attributes={
                "activation": self.activation,
                "experts_per_token": self.per_token,
                "normalize": int(self.normalize),
            },
        )


def activate(name: str, x: Tensor) -> Tensor:
    """Apply the activation function of that name, as in `DogeConfig.hidden_act`."""
    if name == "silu":
        return F.silu(x)
    if name == "relu":
        return F.relu(x)
    return F.gelu(x, approximate="tanh" if name == "gelu_tanh" else "none")


# Weight `[inputs, outputs]` and bias `[outputs]`.
LinearWeights = tuple[Tensor, Tensor | None]


def constant(tensor: Tensor) -> nn.Parameter:
    """A weight, contiguous in memory."""
    return nn.Parameter(tensor.contiguous(), requires_grad=False)


def take_linear(weights: dict[str, Tensor], name: str) -> LinearWeights:
    """Take a linear map out of the weights; there, its matrix is `[outputs, inputs]`."""
    return weights.pop(name + ".weight").T, weights.pop(name + ".bias", None)


def widen_heads(tensor: Tensor, dim: int, row: int) -> Tensor:
    """Fill each head of `dim` channels in the last axis with zeros, to `row` channels."""
    heads = tensor.unflatten(-1, (-1, dim))
    return F.pad(heads, (0, row - dim)).flatten(-2)


def _map_linear(linear: LinearWeights, function: Callable[[Tensor], Tensor]) -> LinearWeights:
    """Change the outputs of a linear map: apply `function` to the last axis of both tensors."""
    weight, bias = linear
    return function(weight), None if bias is None else function(bias)


def _concat_linears(linears: list[LinearWeights]) -> Linear:
    """Join several linear maps of the same input to one."""
    biases = [bias for _, bias in linears if bias is not None]
    weight = torch.cat([weight for weight, _ in linears], dim=-1)
    return Linear(weight, torch.cat(biases) if biases else None)
