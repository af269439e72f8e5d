"""How the rows of a state are laid out, and how gates, keys and values become its element type.

Knows what is in a row's channels and what each type can hold; not which rows there are
(`growing_state`, `window_state`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from doge_onnx.export.model_config import DogeConfig

# What closes a key that must never be attended to (padding, a free row): its gate, or a summand
# of it. exp() of it is 0 beside any real score, and no real gate makes up for it. Finite, because
# a row whose keys are all closed would else be NaN.
CLOSED_GATE = -1e30
# How much larger than the largest gate of the calibration text a gate may be in int8 rows.
_GATE_HEADROOM = 8
# Element types of a state. The attention kernel takes head sizes that are multiples of 8; with
# int8 it is half as fast again at multiples of 16.
_ROW_MULTIPLES = {"float32": 8, "float16": 8, "bfloat16": 8, "int8": 16}


@dataclass(frozen=True)
class GateRange:
    """What fits into a gate channel of one type.

    Attributes:
        closed: The gate of a key that must never be attended to.
        most: The largest gate of any other; larger ones become this.
    """

    closed: float
    most: float


# Half precisions. float16 ends at 65504: a closed gate plus any score of less than 5504 is still
# finite, and is below every open one as long as scores differ by less than 60000.
GATE_RANGES = {
    "float16": GateRange(-6e4, 3e4),
    "bfloat16": GateRange(CLOSED_GATE, 1e29),
}


@dataclass(frozen=True)
class Heads:
    """How heads and channels of queries, keys and values are laid out.

    Attributes:
        num_queries: Query heads.
        num_keys: Key/value heads of the state.
        dim: Channels of a head.
        gates: Gates of a key: one, or one for each query head of its group.
        gate_channels: Channels that hold them; they follow the head's own.
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
        """Channels of a row behind head and gates."""
        return self.row - self.dim - self.gate_channels

    @classmethod
    def of(cls, config: DogeConfig, num_keys: int, gates: int, dtype: str = "float32") -> Heads:
        """The layout of a state, its rows as wide as the attention kernel takes them.

        Args:
            config: The model's.
            num_keys: Key/value heads of the state.
            gates: Gates of a key.
            dtype: Element type of the rows.
        """
        channels = gates if dtype == "float32" else 2 * gates
        multiple = _ROW_MULTIPLES[dtype]
        # One channel more: what closes a key, or a key's position.
        row = -(-(config.head_dim + channels + 1) // multiple) * multiple
        return cls(config.num_attention_heads, num_keys, config.head_dim, gates, channels, row)

    def is_key(self) -> Tensor:
        """Bool `[num_rotated * gates]`: only keys have gates, queries have constants there."""
        is_key = torch.arange(self.num_rotated) >= self.num_queries
        return is_key.repeat_interleave(self.gates)


class Tokens(NamedTuple):
    """What every layer needs to know of the step's tokens.

    Attributes:
        rows: int64 `[B, S]`, each token's row of `cos` and `sin`.
        cos: `[T, dim / 2]`.
        sin: `[T, dim / 2]`.
        rest: `[B, S, num_rotated, rest]`, the channels of queries and keys behind the gates.
        positions: int64 `[B, S]`, the number of real tokens before each one.
        gate_limit: `[B, S, num_rotated * gates]`, upper bound of the gates: closed for the
            keys of padding. None where nothing but `rest` closes them.
        columns: int64 `[B, S]`, where each token stands among all; None where all sequences
            end with the mask.
        lengths: int32 `[B]`, P + S - 1; None where the state does not grow.
        total_length: int32 scalar, P + S; likewise.
        total: The same as a number.
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
    total: int = 0


class HalfRows(nn.Module):
    """How the gates of a layer become two channels of half precision.

    A rounded gate and what the rounding took away: together twice the bits of one channel.
    Both are multiplied by the query's ones.

    Args:
        heads: Layout of the state.
    """

    def __init__(self, heads: Heads) -> None:
        super().__init__()
        is_key = heads.is_key().view(heads.num_rotated, heads.gates)
        # The queries' constants come as 2, which leaves a one for each of the two.
        self.share = nn.Buffer(torch.where(is_key, 1.0, 0.5))

    def split(self, gates: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The two channels of the gates.

        Args:
            gates: float32 `[B, S, num_rotated, gates]`.
            dtype: Of the rows.

        Returns:
            Two of the same shape, and of `dtype`.
        """
        coarse = (gates * self.share).to(dtype)
        return coarse, (gates - coarse.to(gates.dtype)).to(dtype)


class Int8Rows(nn.Module):
    """How one layer's keys and values become int8, with a fixed step for each channel.

    A gate has two channels: one in coarse steps that reach far, and what these leave in fine
    ones. So it keeps 15 bits, whatever its size; a single channel would leave it 7. Both are
    multiplied by the query's ones. Until `set_ranges`, rows stay float32, and the two
    channels still add up to the gate.

    Args:
        heads: Layout of the state.
        closed: What closes a key.

    Attributes:
        closed_code: The same as it is stored.
    """

    closed_code = -127

    def __init__(self, heads: Heads, closed: float) -> None:
        super().__init__()
        self.heads = heads
        self.closed = closed
        self.is_key = nn.Buffer(heads.is_key().view(heads.num_rotated, heads.gates))
        self._set_gate_step(2.0**-10)
        self.key_scale: Tensor | None
        self.value_scale: Tensor | None
        self.register_buffer("key_scale", None)
        self.register_buffer("value_scale", None)

    def split(self, gates: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Coarse and fine part of the gates, each in a channel of its own.

        The queries' constants come as 2, which leaves a one for each of the two.

        Args:
            gates: `[B, S, num_rotated, gates]`.
            dtype: Of keys and queries.

        Returns:
            Two of the same shape, and of `dtype`.
        """
        # Whole steps, so that the kernel's own rounding has nothing left to decide.
        coarse = torch.round(gates * self.per_step) * self.step
        return coarse.to(dtype), (gates - coarse).to(dtype)

    def set_ranges(self, key: Tensor, value: Tensor, gate: float) -> None:
        """Fix the steps by what a text needed.

        Args:
            key: `[num_keys, dim]`, largest absolute value of each channel of the keys.
            value: `[num_keys, dim]`, likewise.
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
        # For the queries, half of their 2 is coarse.
        self.per_step = nn.Buffer(torch.where(self.is_key, 1 / step, 0.5))


def _steps(largest: Tensor) -> Tensor:
    # A channel that was always 0 would have no step at all.
    return torch.where(largest > 0, largest, 1.0) / 127
