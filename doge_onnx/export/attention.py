"""Attention to a state, then the output's product, the residual connection and the next norm.

One piece for each kind of state. Knows which keys a query attends to. Does not know how queries,
keys and values are computed (`layer`), what the channels of a row hold (`state_rows`) or which rows
a window state keeps (`window_attention`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from doge_onnx.export.growing_state import GrowingState
from doge_onnx.export.matrices import Linear, QuantizedLinear
from doge_onnx.export.operators import Operators, wider
from doge_onnx.export.piece import Attributes, Parts, Piece
from doge_onnx.export.state_rows import Int8Rows, Tokens
from doge_onnx.export.window_attention import attend_to_window
from doge_onnx.export.window_state import WindowState

State = GrowingState | WindowState

_FIRST = ("q", "k", "v", "past_key", "past_value")
_LAST = ("x", "output", "output_scales", "output_bias", "residual", "norm")


class _AnyAttention(Piece):
    """What all kinds of attention share: their end.

    Args:
        state: The layout of the state.
        output: The output's matrix, with as many inputs as queries have channels.
        residual: Scale of the stream, `[H]`.
        norm: Weight of the norm after it, `[H]`.
        eps: Of the norm.
        operators: Implementation of the operators.
    """

    outputs = ("h", "x", "present_key", "present_value")

    def __init__(
        self,
        state: State,
        output: Linear,
        residual: nn.Parameter,
        norm: nn.Parameter,
        eps: float,
        operators: Operators,
    ) -> None:
        super().__init__()
        self.ops = operators
        self.heads = state.heads
        self.window = state.window
        self.closed = state.closed
        self.output: Linear | QuantizedLinear = output
        self.residual, self.norm, self.eps = residual, norm, eps

    def _end(self, attended: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.ops.skip_rms_norm(self.output(attended), self.residual * x, self.norm, self.eps)

    def parts(self) -> Parts:
        """See `Piece`."""
        attributes: Attributes = {
            "heads": self.heads.num_queries,
            "kv_heads": self.heads.num_keys,
            "head_dim": self.heads.dim,
            "gates": self.heads.gates,
            "window": self.window or 0,
            "closed": self.closed,
            "epsilon": self.eps,
        }
        plain: dict[str, Tensor | None] = {"residual": self.residual, "norm": self.norm}
        return Parts({"output": self.output}, {}, plain, attributes)


class Attention(_AnyAttention):
    """Attention to a growing state in floating point."""

    operator = "Attention"
    inputs = (*_FIRST, "columns", "lengths", "total_length", *_LAST)

    def __init__(self, state: State, *args: Any) -> None:
        super().__init__(state, *args)
        assert isinstance(state, GrowingState)
        # In half precision both channels of each gate, else the gates and the closing channel.
        self._count = self.heads.gates + 1
        if state.activations != "float32":
            self._count = self.heads.gate_channels

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        past_key: Tensor,
        past_value: Tensor,
        tokens: Tokens,
        x: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Call this piece with what it needs of the tokens."""
        streams: tuple[Tensor, Tensor, Tensor, Tensor] = self(
            q, k, v, past_key, past_value, tokens.columns, tokens.lengths, tokens.total_length, x
        )
        return streams

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        past_key: Tensor,
        past_value: Tensor,
        columns: Tensor | None,
        lengths: Tensor,
        total_length: Tensor,
        x: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Attend to the past and the new tokens.

        Args:
            q: Queries, `[B, S, Hq * row]`.
            k: New keys, `[B, S, Hkv * row]`.
            v: New values, `[B, S, Hkv * row]`.
            past_key: `[B, Hkv, P, row]`.
            past_value: `[B, Hkv, P, row]`.
            columns: int64 `[B, S]`, the column of each new token; None for the last S columns.
            lengths: int32 `[B]`, P + S - 1 of each sequence.
            total_length: P + S as an int32 scalar.
            x: The stream, `[B, S, H]`.

        Returns:
            The normed stream and the stream, `[B, S, H]`, and the present key and value
            `[B, Hkv, P + S, row]`.
        """
        heads, bias = self.heads, None
        if self.window is not None:
            channels = self.ops.all_gates(
                past_key, k, columns, total_length, heads.dim, self._count
            )
            channels = channels.unflatten(1, (heads.num_keys, self._count))
            channels = channels.to(wider(channels.dtype))
            gates = channels[:, :, : heads.gates] + channels[:, :, heads.gates :]
            gates = gates.flatten(1, 2)
            if columns is None:
                length = q.shape[1]
                columns = torch.arange(length).unsqueeze(0) + (gates.shape[-1] - length)
            kept = _largest_visible(gates, columns, self.window)
            bias = torch.where(kept, 0.0, self.closed).to(q.dtype)
            bias = bias.repeat_interleave(heads.num_queries // gates.shape[1], dim=1)
        out, key, value = self.ops.causal_attention(
            q,
            k,
            v,
            past_key,
            past_value,
            lengths,
            total_length,
            heads.num_queries,
            heads.num_keys,
            bias,
        )
        return *self._end(out, x), key, value


class Int8Attention(_AnyAttention):
    """Attention to a growing state in int8; see `Int8Rows`.

    Attributes:
        int8_rows: The scales of the layer.
    """

    operator = "Int8Attention"
    inputs = (*_FIRST, "lengths", "total_length", "key_scale", "value_scale", *_LAST)
    int8_rows: Int8Rows

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        past_key: Tensor,
        past_value: Tensor,
        tokens: Tokens,
        x: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Call this piece with what it needs of the tokens."""
        streams: tuple[Tensor, Tensor, Tensor, Tensor] = self(
            q, k, v, past_key, past_value, tokens.lengths, tokens.total_length, x
        )
        return streams

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        past_key: Tensor,
        past_value: Tensor,
        lengths: Tensor,
        total_length: Tensor,
        x: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Attend to the past and the new tokens; arguments and results are `Attention`'s.

        Until the scales are set, the past is float32.
        """
        out, key, value = self.ops.causal_attention(
            q,
            k,
            v,
            past_key,
            past_value,
            lengths,
            total_length,
            self.heads.num_queries,
            self.heads.num_keys,
            None,
            self.int8_rows.key_scale,
            self.int8_rows.value_scale,
        )
        return *self._end(out, x), key, value

    def parts(self) -> Parts:
        """See `Piece`."""
        parts = super().parts()
        scales = {
            "key_scale": self.int8_rows.key_scale,
            "value_scale": self.int8_rows.value_scale,
        }
        return Parts(parts.products, parts.tables, parts.plain | scales, parts.attributes)


class WindowAttention(_AnyAttention):
    """Attention to a window state."""

    operator = "WindowAttention"
    inputs = (*_FIRST, "positions", "lift", *_LAST)

    def __init__(self, state: State, *args: Any) -> None:
        super().__init__(state, *args)
        assert isinstance(state, WindowState)
        self.lift = state.lift

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        past_key: Tensor,
        past_value: Tensor,
        tokens: Tokens,
        x: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Call this piece with what it needs of the tokens."""
        streams: tuple[Tensor, Tensor, Tensor, Tensor] = self(
            q, k, v, past_key, past_value, tokens.positions, x
        )
        return streams

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        past_key: Tensor,
        past_value: Tensor,
        positions: Tensor,
        x: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Decide which keys keep a row, then attend: `attend_to_window`.

        Other arguments and results are those of `Attention`, with R rows instead of P and P + S.
        """
        assert self.window is not None
        out, key, value = attend_to_window(
            q,
            k,
            v,
            past_key,
            past_value,
            positions,
            self.lift,
            self.heads.num_queries,
            self.heads.num_keys,
            self.heads.dim,
            self.window,
        )
        return *self._end(out, x), key, value

    def parts(self) -> Parts:
        """See `Piece`."""
        parts = super().parts()
        lift = {"lift": self.lift}
        return Parts(parts.products, parts.tables, parts.plain | lift, parts.attributes)


AnyAttention = Attention | Int8Attention | WindowAttention


def attention_of(state: State, int8_rows: Int8Rows | None) -> type[AnyAttention]:
    """The kind of attention that a state needs."""
    if isinstance(state, WindowState):
        return WindowAttention
    return Attention if int8_rows is None else Int8Attention


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
