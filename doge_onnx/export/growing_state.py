"""The growing state: one row for each token, and how attention reads and extends it.

Knows the positions of tokens and which keys a query attends to. Does not know how queries, keys and
values are computed (`step`) or what the channels of a row hold (`state_rows`).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from doge_onnx.export.checkpoint import Checkpoint
from doge_onnx.export.operators import Operators, wider
from doge_onnx.export.rope import inverse_wavelengths, rotary_tables
from doge_onnx.export.state_rows import CLOSED_GATE, GATE_RANGES, Heads, Int8Rows, Tokens
from doge_onnx.manifest import ClosedRow


class GrowingState(nn.Module):
    """One row for each token: keys and values `[B, Hkv, P, row]`, extended by S rows in each step.

    If gates belong to query heads, a key has a gate channel for each query head of its group. The
    channel after the gates closes the keys of padding.

    Args:
        checkpoint: The model's checkpoint.
        context_length: Number of positions that the rotary tables cover. The graph selects the keys
            of the window only if the context is longer than the window.
        operators: Implementation of the operators.
        dtype: Element type of the rows: that of the activations, or "int8" for the rows of
            `Int8Rows`.
        activations: Element type of the activations: "float32", "float16" or "bfloat16".
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        context_length: int,
        operators: Operators,
        dtype: str = "float32",
        activations: str = "float32",
    ) -> None:
        super().__init__()
        config = checkpoint.config
        self.ops = operators
        self.dtype, self.activations = dtype, activations
        gates = checkpoint.gate_heads // config.num_key_value_heads
        self.heads = Heads.of(config, config.num_key_value_heads, gates, dtype)
        # One position more than a text has tokens, for padding after a text of full length.
        cos, sin = rotary_tables(config, context_length + 1)
        # Radians per position of each channel pair; None if they depend on the position.
        self.frequencies: Tensor | None = None
        if config.rope.kind != "dynamic" or context_length <= config.max_position_embeddings:
            self.frequencies = inverse_wavelengths(config, torch.zeros(()))
        self.cos, self.sin = nn.Buffer(cos), nn.Buffer(sin)
        # The channels after the gates: first for padding, then for tokens.
        rest = torch.zeros(2, self.heads.num_rotated, self.heads.rest)
        rest[:, : self.heads.num_queries, 0] = 1.0
        # In half precision, a closing summand plus a large gate would not close a key. So the gate
        # itself is replaced.
        self.limits: Tensor | None
        self.register_buffer("limits", None)
        self.closed = CLOSED_GATE
        if activations in GATE_RANGES:
            half = GATE_RANGES[activations]
            self.closed = half.closed
            limits = torch.full((2, self.heads.num_rotated, self.heads.gates), half.most)
            limits[0, self.heads.is_key()] = half.closed
            self.limits = nn.Buffer(limits)
        if dtype in ("float32", "int8"):
            rest[0, self.heads.num_queries :, 0] = self.closed
        self.rest = nn.Buffer(rest)
        window = config.keep_window_size
        self.window = window if window is not None and context_length > window else None
        # Most columns of a mask: with padding on the left, a batch is longer than its sequences.
        self.numbers = nn.Buffer(torch.arange(2 * context_length))

    @property
    def table_size(self) -> int:
        """Number of values in the rotary tables, which the graph holds beside the weights."""
        return self.cos.numel() + self.sin.numel()

    @property
    def closing(self) -> ClosedRow:
        """The values that close a row."""
        gates = self.heads.dim + self.heads.gate_channels
        if self.dtype == "int8":
            return ClosedRow((gates,), Int8Rows.closed_code)
        if self.dtype == "float32":
            return ClosedRow((gates,), self.closed)
        # The first channel of each gate; whatever the second can hold, the key stays closed.
        first = range(self.heads.dim, self.heads.dim + self.heads.gates)
        return ClosedRow(tuple(first), self.closed)

    def tokens(
        self, input_ids: Tensor, attention_mask: Tensor, past_lengths: Tensor | None = None
    ) -> Tokens:
        """Positions, padding and lengths of a step's tokens.

        Args:
            input_ids: int64 `[B, S]`.
            attention_mask: int64 `[B, P + S]`, or longer with `past_lengths`.
            past_lengths: int64 `[B]`, number of rows of the state that each sequence has; its new
                rows go after them. None if all sequences have P rows. For its default in a graph
                see `operators.new_columns`.
        """
        # Positions count tokens and not columns, so padding does not change a token's rotation.
        # Past the trained context, the rotation depends on the absolute position.
        positions, is_token, columns, lengths, total_length = self.ops.new_columns(
            attention_mask,
            input_ids,
            past_lengths,
            None if past_lengths is None else self.numbers,
            # Half precision is for CUDA.
            self.activations != "float32",
        )
        return Tokens(
            rows=positions,
            cos=self.cos,
            sin=self.sin,
            rest=self.rest[is_token],
            positions=positions,
            gate_limit=None if self.limits is None else self.limits[is_token],
            columns=None if past_lengths is None else columns,
            lengths=lengths,
            total_length=total_length,
            total=attention_mask.shape[1],
        )

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        tokens: Tokens,
        past_key: Tensor,
        past_value: Tensor,
        int8_rows: Int8Rows | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Attend to the past and the new tokens.

        Args:
            q: Queries, `[B, S, Hq * row]`.
            k: New keys, `[B, S, Hkv * row]`.
            v: New values, `[B, S, Hkv * row]`.
            tokens: The tokens of this step.
            past_key: `[B, Hkv, P, row]`.
            past_value: `[B, Hkv, P, row]`.
            int8_rows: The scales of the layer if its rows are int8; else None.

        Returns:
            The attention output `[B, S, Hq * row]`, and the present key and value
            `[B, Hkv, P + S, row]`.
        """
        heads = self.heads
        bias = None
        if self.window is not None:
            assert tokens.total_length is not None
            # The gates and the closing channel, or in half precision both channels of each gate.
            count = heads.gates + 1 if self.limits is None else heads.gate_channels
            channels = self.ops.all_gates(
                past_key, k, tokens.columns, tokens.total_length, tokens.total, heads.dim, count
            )
            channels = channels.unflatten(1, (heads.num_keys, count)).to(wider(channels.dtype))
            gates = channels[:, :, : heads.gates] + channels[:, :, heads.gates :]
            gates = gates.flatten(1, 2)
            columns = tokens.columns
            if columns is None:
                columns = torch.arange(q.shape[1]).unsqueeze(0) + (tokens.total - q.shape[1])
            kept = _largest_visible(gates, columns, self.window)
            bias = torch.where(kept, 0.0, self.closed).to(q.dtype)
            bias = bias.repeat_interleave(heads.num_queries // gates.shape[1], dim=1)
        return self.ops.causal_attention(
            q,
            k,
            v,
            past_key,
            past_value,
            tokens.lengths,
            tokens.total_length,
            heads.num_queries,
            heads.num_keys,
            bias,
            None if int8_rows is None else int8_rows.key_scale,
            None if int8_rows is None else int8_rows.value_scale,
        )


def _largest_visible(gates: Tensor, columns: Tensor, window: int) -> Tensor:
    """Which keys have the `window` largest gates among those that each new token sees.

    Of equal gates the most recent is kept; the reference does not specify that.

    Args:
        gates: Gates of all keys, `[B, G, T]`.
        columns: int64 `[B, S]` or `[1, S]`, the columns of the new tokens among the keys.
        window: Number of keys to keep.

    Returns:
        bool `[B, G, S, T]`, True for a key that the token attends to.
    """
    numbers = torch.arange(gates.shape[-1])
    visible = numbers <= columns[:, None, :, None]
    gates = gates.unsqueeze(2).masked_fill(~visible, -torch.inf)
    # A stable sort keeps equal gates in order, so the most recent key has to come first.
    order = gates.flip(-1).sort(dim=-1, descending=True, stable=True).indices
    best = (numbers < window).expand(order.shape)
    return torch.zeros_like(best).scatter(-1, order, best).flip(-1)
