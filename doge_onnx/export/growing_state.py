"""The growing state: one row for each token.

Knows the positions of tokens. Does not know how queries, keys and values are computed (`layer`),
which keys a query attends to (`attention`) or what the channels of a row hold (`state_rows`).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from doge_onnx.export.checkpoint import Checkpoint
from doge_onnx.export.operators import Operators
from doge_onnx.export.piece import Parts, Piece
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
        limits: Tensor | None = None
        self.closed = CLOSED_GATE
        if activations in GATE_RANGES:
            half = GATE_RANGES[activations]
            self.closed = half.closed
            limits = torch.full((2, self.heads.num_rotated, self.heads.gates), half.most)
            limits[0, self.heads.is_key()] = half.closed
        if dtype in ("float32", "int8"):
            rest[0, self.heads.num_queries :, 0] = self.closed
        window = config.keep_window_size
        self.window = window if window is not None and context_length > window else None
        # Most columns of a mask: with padding on the left, a batch is longer than its sequences.
        numbers = torch.arange(2 * context_length)
        self.positions = Positions(numbers, rest, limits, operators)

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
        positions, rest, columns, lengths, total_length, gate_limit = self.positions(
            attention_mask, input_ids, past_lengths
        )
        return Tokens(
            rows=positions,
            cos=self.cos,
            sin=self.sin,
            rest=rest,
            positions=positions,
            gate_limit=gate_limit,
            columns=None if past_lengths is None else columns,
            lengths=lengths,
            total_length=total_length,
        )


class Positions(Piece):
    """Where the new tokens of a step are.

    Args:
        numbers: int64 `[N]`, 0 to N - 1, for at most N columns.
        rest: `[2, num_rotated, rest]`, the last channels of rows: of padding, then of tokens.
        limits: `[2, num_rotated, gates]`, upper bounds of gates, likewise; None for no limit.
        operators: Implementation of the operators.
    """

    operator = "Positions"
    inputs = ("attention_mask", "input_ids", "past_lengths", "numbers", "rest_table")
    outputs = ("positions", "rest", "columns", "lengths", "total_length", "gate_limit")

    def __init__(
        self, numbers: Tensor, rest: Tensor, limits: Tensor | None, operators: Operators
    ) -> None:
        super().__init__()
        self.ops = operators
        self.numbers, self.rest = nn.Buffer(numbers), nn.Buffer(rest)
        self.limits: Tensor | None
        self.register_buffer("limits", limits)

    def forward(
        self, attention_mask: Tensor, input_ids: Tensor, past_lengths: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """See `GrowingState.tokens`."""
        # Positions count tokens and not columns, so padding does not change a token's rotation.
        # Past the trained context, the rotation depends on the absolute position.
        positions, is_token, columns, lengths, total_length = self.ops.new_columns(
            attention_mask,
            input_ids,
            past_lengths,
            None if past_lengths is None else self.numbers,
            # Half precision is for CUDA, and only there gates have limits.
            self.limits is not None,
        )
        limit = None if self.limits is None else self.limits[is_token]
        return positions, self.rest[is_token], columns, lengths, total_length, limit

    def parts(self) -> Parts:
        """See `Piece`."""
        plain = {"numbers": self.numbers, "rest_table": self.rest, "limits": self.limits}
        return Parts({}, {}, plain, {})
