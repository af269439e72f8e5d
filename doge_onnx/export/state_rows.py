"""The layout of the rows of a state, and the conversion of keys, values and gates to its type.

Knows the channels of a row and the range of each element type. Does not know which rows a state has
(`growing_state`, `window_state`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from doge_onnx.export.model_config import DogeConfig

# Closes a key that no query may attend to (padding, a free row): the value of its gate, or a
# summand of it. exp() of it is 0 beside any real score, and no real gate compensates for it.
# Finite, because with -inf a query whose keys are all closed would give NaN.
CLOSED_GATE = -1e30
# In int8 rows, a gate may be this many times as large as the largest gate of the calibration text.
_GATE_HEADROOM = 8
# Element types of a state, and the number of which the row size is a multiple. The attention kernel
# supports multiples of 8; with int8 it is half as fast again at multiples of 16.
_ROW_MULTIPLES = {"float32": 8, "float16": 8, "bfloat16": 8, "int8": 16}


@dataclass(frozen=True)
class GateRange:
    """The range of a gate in one element type.

    Attributes:
        closed: Gate of a key that no query may attend to.
        most: Largest gate of any other key; larger gates are reduced to it.
    """

    closed: float
    most: float


# The largest float16 is 65504. So a closed gate plus a score of less than 5504 in magnitude is
# finite, and it is below every open one as long as scores differ by less than 60000.
GATE_RANGES = {
    "float16": GateRange(-6e4, 3e4),
    "bfloat16": GateRange(CLOSED_GATE, 1e29),
}


@dataclass(frozen=True)
class Heads:
    """The layout of heads and channels of queries, keys and values.

    Attributes:
        num_queries: Query heads.
        num_keys: Key/value heads of the state.
        dim: Channels of a head.
        gates: Gates of a key: one, or one for each query head of its group.
        gate_channels: Channels that hold the gates; they follow the head's channels.
        row: Channels of a row of the state: head, gates, and the rest.
    """

    num_queries: int
    num_keys: int
    dim: int
    gates: int
    gate_channels: int
    row: int

    @property
    def num_rotated(self) -> int:
        """Heads of queries and keys together."""
        return self.num_queries + self.num_keys

    @property
    def rest(self) -> int:
        """Channels of a row after head and gates."""
        return self.row - self.dim - self.gate_channels

    @classmethod
    def of(cls, config: DogeConfig, num_keys: int, gates: int, dtype: str = "float32") -> Heads:
        """The layout of a state, with a row size that the attention kernel supports.

        Args:
            config: The model's config.
            num_keys: Key/value heads of the state.
            gates: Gates of a key.
            dtype: Element type of the rows.
        """
        channels = gates if dtype == "float32" else 2 * gates
        multiple = _ROW_MULTIPLES[dtype]
        # One more channel, which closes a key or holds its position.
        row = -(-(config.head_dim + channels + 1) // multiple) * multiple
        return cls(config.num_attention_heads, num_keys, config.head_dim, gates, channels, row)

    def is_key(self) -> Tensor:
        """Bool `[num_rotated, gates]`: True for gates of keys, False for constants of queries."""
        is_key = torch.arange(self.num_rotated) >= self.num_queries
        return is_key.unsqueeze(-1).repeat(1, self.gates)


class Tokens(NamedTuple):
    """Positions, padding and lengths of a step's tokens, the same for every layer.

    Attributes:
        rows: int64 `[B, S]`, each token's row of `cos` and `sin`.
        cos: Rotary table, `[T, dim / 2]`.
        sin: Rotary table, `[T, dim / 2]`.
        rest: `[B, S, num_rotated, rest]`, the channels of queries and keys after the gates.
        positions: int64 `[B, S]`, the number of tokens before each one, without padding.
        gate_limit: `[B, S, num_rotated, gates]`, upper bound of the gates, which closes the keys
            of padding. None if `rest` closes them.
        columns: int64 `[B, S]`, the column of each token; None if all sequences end with the mask.
        lengths: int32 `[B]`, P + S - 1 of each sequence; None for a window state.
        total_length: P + S as an int32 scalar; None for a window state.
    """

    rows: Tensor
    cos: Tensor
    sin: Tensor
    rest: Tensor
    positions: Tensor
    gate_limit: Tensor | None = None
    columns: Tensor | None = None
    lengths: Tensor | None = None
    total_length: Tensor | None = None


class HalfRows(nn.Module):
    """Splits the gates of a layer into two channels of half precision.

    One channel holds the rounded gate and one the rounding error, so that together they have twice
    the bits of one channel. Queries have a one for each, so attention adds the two.

    Args:
        heads: Layout of the state.
    """

    def __init__(self, heads: Heads) -> None:
        super().__init__()
        # The constants of queries are 2, so that each of the two channels gets a one.
        self.share = nn.Buffer(torch.where(heads.is_key(), 1.0, 0.5))

    def split(self, gates: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Split gates into two channels.

        Args:
            gates: float32 `[B, S, num_rotated, gates]`.
            dtype: Element type of the rows.

        Returns:
            The rounded gates and the rounding errors, in the same shape and of `dtype`.
        """
        coarse = (gates * self.share).to(dtype)
        return coarse, (gates - coarse.to(gates.dtype)).to(dtype)


class Int8Rows(nn.Module):
    """Converts the keys and values of one layer to int8, with a constant scale for each channel.

    A gate has two channels: one in coarse steps with a large range, and one in fine steps for the
    remainder. So a gate keeps 15 bits, whatever its size; a single channel would keep 7. Queries
    have a one for each, so attention adds the two. Until `set_ranges` is called, rows stay float32,
    and the two channels still add up to the gate.

    Args:
        heads: Layout of the state.
        closed: Value that closes a key.

    Attributes:
        closed_code: The int8 code of `closed`.
    """

    closed_code = -127

    def __init__(self, heads: Heads, closed: float) -> None:
        super().__init__()
        self.heads = heads
        self.closed = closed
        self.is_key = nn.Buffer(heads.is_key())
        self._set_gate_step(2.0**-10)
        self.key_scale: Tensor | None
        self.value_scale: Tensor | None
        self.register_buffer("key_scale", None)
        self.register_buffer("value_scale", None)

    def split(self, gates: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Split gates into a coarse and a fine channel.

        The constants of queries are 2, so that each of the two channels gets a one.

        Args:
            gates: `[B, S, num_rotated, gates]`.
            dtype: Element type of keys and queries.

        Returns:
            The coarse and the fine parts, in the same shape and of `dtype`.
        """
        # A whole number of steps, so that the kernel's own rounding changes nothing.
        coarse = torch.round(gates * self.per_step) * self.step
        return coarse.to(dtype), (gates - coarse).to(dtype)

    def set_ranges(self, key: Tensor, value: Tensor, gate: float) -> None:
        """Set the scales from the ranges that a calibration text needed.

        Args:
            key: `[num_keys, dim]`, largest absolute value of each channel of the keys.
            value: `[num_keys, dim]`, the same for the values.
            gate: The largest gate.
        """
        self._set_gate_step(max(_GATE_HEADROOM * gate, 1.0) / 127)
        step = float(self.step[-1, 0])
        gates = torch.tensor([step, step / 2 / 127]).repeat_interleave(self.heads.gates)
        closed = torch.tensor([self.closed / self.closed_code])
        unused = torch.ones(self.heads.rest - 1)
        behind = torch.cat([gates, closed, unused]).expand(self.heads.num_keys, -1)
        self.key_scale = nn.Buffer(torch.cat([_steps(key), behind], dim=-1)[None, :, None])
        unused = torch.ones(self.heads.num_keys, self.heads.row - self.heads.dim)
        self.value_scale = nn.Buffer(torch.cat([_steps(value), unused], dim=-1)[None, :, None])

    def _set_gate_step(self, step: float) -> None:
        self.step = nn.Buffer(torch.where(self.is_key, step, 1.0))
        # Of the queries' constant 2, one half is the coarse part.
        self.per_step = nn.Buffer(torch.where(self.is_key, 1 / step, 0.5))


def _steps(largest: Tensor) -> Tensor:
    # A channel that was always 0 gets a scale as if its largest value were 1, and not 0.
    return torch.where(largest > 0, largest, 1.0) / 127
