"""What a step carries over, and how its attention reads and extends it.

`GrowingState` keeps a row for every token; `WindowState` keeps as many rows as the model's
window has keys, for ever. Both know how rows are laid out, which positions tokens have and
which keys a query attends to; neither knows how queries, keys and values come about (`step`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from doge_onnx.bundle import CLOSED_GATE
from doge_onnx.config import DogeConfig
from doge_onnx.export.checkpoint import Checkpoint
from doge_onnx.export.operators import Operators, wider
from doge_onnx.export.rope import inverse_wavelengths, rotary_tables

# How much larger than the largest gate of the calibration text a gate may be in int8 rows.
_GATE_HEADROOM = 8
# The upper bound of gates that are not closed: none.
_OPEN = torch.finfo(torch.float32).max
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
        is_key = _is_key(heads).view(heads.num_rotated, heads.gates)
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
    """

    def __init__(self, heads: Heads, closed: float) -> None:
        super().__init__()
        self.heads = heads
        self.closed = closed
        self.is_key = nn.Buffer(_is_key(heads).view(heads.num_rotated, heads.gates))
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
        closed = torch.tensor([-self.closed / 127])
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


class GrowingState(nn.Module):
    """One row per token: keys and values as `[B, Hkv, P, row]`, extended by S rows.

    Where gates belong to query heads, a key has a gate channel for each query head of its
    group. The channel behind the gates closes the keys of padding.

    Args:
        checkpoint: The model's.
        context_length: Number of positions that the rotary tables cover. Only if it exceeds
            the window can a key ever fall out of it, and only then is that in the graph.
        operators: Implementation of the operators.
        dtype: Element type of the rows: that of the activations, or "int8" for rows that
            `Int8Rows` describes.
        activations: "float32", "float16" or "bfloat16".
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
        self.heads = _heads(config, config.num_key_value_heads, gates, extra=1, dtype=dtype)
        # One more than a text has tokens: padding behind a full text stands there.
        cos, sin = rotary_tables(config, context_length + 1)
        # Radians per position of each channel pair, where they are the same at all positions.
        self.frequencies: Tensor | None = None
        if config.rope.kind != "dynamic" or context_length <= config.max_position_embeddings:
            self.frequencies = inverse_wavelengths(config, torch.zeros(()))
        self.cos, self.sin = nn.Buffer(cos), nn.Buffer(sin)
        # What is behind the gates, of padding and of tokens.
        rest = torch.zeros(2, self.heads.num_rotated, self.heads.rest)
        rest[:, : self.heads.num_queries, 0] = 1.0
        # In half precision the sum with a large gate would not close a key: its gate itself does.
        self.limits: Tensor | None
        self.register_buffer("limits", None)
        self.closed = CLOSED_GATE
        if activations in GATE_RANGES:
            half = GATE_RANGES[activations]
            self.closed = half.closed
            limits = torch.full((2, self.heads.num_rotated * self.heads.gates), half.most)
            limits[0, _is_key(self.heads)] = half.closed
            self.limits = nn.Buffer(limits)
        if dtype in ("float32", "int8"):
            rest[0, self.heads.num_queries :, 0] = self.closed
        self.rest = nn.Buffer(rest)
        window = config.keep_window_size
        self.window = window if window is not None and context_length > window else None
        # As many as a mask may have columns, see `max_rows` of the runtime.
        self.numbers = nn.Buffer(torch.arange(2 * context_length))

    @property
    def table_size(self) -> int:
        """Number of values that the graph holds beside the weights."""
        return self.cos.numel() + self.sin.numel()

    @property
    def takes_past_length(self) -> bool:
        """Whether a step can be told where its tokens are in a mask that is longer.

        Then none of its shapes depends on their place, and CUDA can replay it. Half precision is
        for CUDA; the choice of a window's keys needs the very length.
        """
        return self.activations != "float32" and self.window is None

    def tokens(
        self, input_ids: Tensor, attention_mask: Tensor, past_length: Tensor | None = None
    ) -> Tokens:
        """Positions, padding and lengths of a step's tokens.

        Args:
            input_ids: int64 `[B, S]`.
            attention_mask: int64 `[B, P + S]`, or longer with `past_length`.
            past_length: int64 `[1]`, P, or -1 for P + S being the mask's length; see
                `operators`.
        """
        # Counting real tokens, not slots: padding, wherever it is, does not move a token's
        # rotation, which past the trained context depends on its absolute position.
        positions, is_token, lengths, total_length = self.ops.new_columns(
            attention_mask, input_ids, past_length, None if past_length is None else self.numbers
        )
        return Tokens(
            rows=positions,
            cos=self.cos,
            sin=self.sin,
            rest=self.rest[is_token],
            positions=positions,
            gate_limit=None if self.limits is None else self.limits[is_token],
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
            q: `[B, S, Hq * row]`.
            k: `[B, S, Hkv * row]`.
            v: `[B, S, Hkv * row]`.
            tokens: Of this step.
            past_key: `[B, Hkv, P, row]`.
            past_value: `[B, Hkv, P, row]`.
            int8_rows: Of the layer, where its rows are int8.

        Returns:
            `[B, S, Hq * row]`, and the present key and value `[B, Hkv, P + S, row]`.
        """
        heads = self.heads
        bias = None
        if self.window is not None:
            assert tokens.total_length is not None
            # A gate, and what closes it; or, in half precision, its two channels.
            count = heads.gates + 1 if self.limits is None else heads.gate_channels
            channels = self.ops.all_gates(
                past_key, k, tokens.total_length, tokens.total, heads.dim, count
            )
            channels = channels.unflatten(1, (heads.num_keys, count)).to(wider(channels.dtype))
            gates = channels[:, :, : heads.gates] + channels[:, :, heads.gates :]
            gates = gates.flatten(1, 2)
            kept = _largest_visible(gates, q.shape[1], self.window)
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


class WindowState(nn.Module):
    """As many rows as the window has keys, in any order: `[B, H, R, row]`, R <= W, for ever.

    The gate of a key does not depend on the query, and the keys that a query can see only
    grow in number; so a key that is not among the W largest gates never will be again, and
    its row can be given to another token. A free row has a closed gate. Behind the gate,
    a key has its position plus one, by which equal gates are told apart (the more recent
    one stays) and by which a query knows the tokens of its own step that come after it.

    Each head chooses rows for itself. Where gates belong to query heads, each of them keeps
    its own copy of the keys of its group: H is then Hq.

    Positions are exact up to 2^24 tokens, where float32 ends to count.

    R is W, or less as long as there are S free rows in every head for S new tokens; it is
    the caller who adds free rows. S never exceeds R.

    Args:
        checkpoint: The model's.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__()
        config = checkpoint.config
        assert config.keep_window_size is not None
        self.config = config
        self.window = config.keep_window_size
        self.heads = _heads(config, checkpoint.gate_heads, gates=1, extra=1)
        # Computed here, because the exporter rounds differently when it folds constants.
        fixed = config.rope.kind != "dynamic"
        self.frequencies = nn.Buffer(inverse_wavelengths(config, torch.zeros(1))) if fixed else None
        # A tensor, because the exporter passes numbers through float32.
        self.lift = nn.Buffer(torch.tensor(2.0**160, dtype=torch.float64))
        self.is_key = nn.Buffer(_is_key(self.heads))

    @property
    def table_size(self) -> int:
        """Number of values that the graph holds beside the weights: it computes rotations."""
        return 0

    def tokens(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Tokens:
        """Positions and padding of a step's tokens.

        Args:
            input_ids: int64 `[B, S]`.
            attention_mask: int64 `[B, S]`, of the new tokens only.
            position_ids: int64 `[B, S]`, the number of real tokens before each one.
        """
        batch, length = input_ids.shape
        # There is no last position, so the rotation is computed and not looked up.
        frequencies: Tensor = (
            inverse_wavelengths(self.config, position_ids)
            if self.frequencies is None
            else self.frequencies
        )
        angles = position_ids.unsqueeze(-1).float() * frequencies
        half = self.heads.dim // 2
        stamps = (position_ids + 1).unsqueeze(-1).float() * self.is_key
        rest = torch.nn.functional.pad(stamps.unsqueeze(-1), (0, self.heads.rest - 1))
        return Tokens(
            rows=torch.arange(batch * length).view(batch, length),
            cos=angles.cos().view(batch * length, half),
            sin=angles.sin().view(batch * length, half),
            rest=rest,
            positions=position_ids,
            gate_limit=_gate_limit(attention_mask, self.is_key),
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
        """Let the new tokens compete for rows, then attend.

        Sorted, the largest new token meets the smallest row, the next largest the next
        smallest, and so on: each pair's winner gets the row. Winners and losers together are
        all the keys there are. A loser may still be among the W largest of what an earlier
        token of the step sees, so the losers take part in this step's attention, and in no
        other.

        Args and returns are those of `GrowingState.attend`, with R rows instead of P and
        P + S; rows are never int8.
        """
        batch, length, _ = q.shape
        heads, dim = self.heads, self.heads.dim
        k, v = (x.unflatten(-1, (heads.num_keys, heads.row)).transpose(1, 2) for x in (k, v))
        # Nothing may read the past once its rows are overwritten: when past and present are
        # one buffer, only what the new rows depend on is sure to be read before.
        old_rank, slots = torch.topk(self._rank(past_key), length, largest=False)
        new_rank, order = torch.topk(self._rank(k), length)
        enters = new_rank > old_rank
        old_key, old_value = (_rows(past, slots) for past in (past_key, past_value))
        new_key, new_value = (_rows(new, order) for new in (k, v))
        wins = enters.unsqueeze(-1)
        key = _overwrite(past_key, slots, torch.where(wins, new_key, old_key))
        value = _overwrite(past_value, slots, torch.where(wins, new_value, old_value))
        lost_key = torch.where(wins, old_key, new_key)
        lost_value = torch.where(wins, old_value, new_value)
        lost_rank = torch.where(enters, old_rank, new_rank)

        now = (tokens.positions + 1).float().view(batch, 1, length, 1)
        sees = key[..., dim + 1].unsqueeze(2) <= now
        sees_lost = lost_key[..., dim + 1].unsqueeze(2) <= now
        # A loser has this many keys before it: all the winners that are visible, and the
        # visible losers of higher rank. A closed row counts like any other, but it can only be
        # among the winners if every loser is closed, too.
        above = (lost_rank.unsqueeze(-1) > lost_rank.unsqueeze(-2)).float()
        before = sees.float().sum(-1, keepdim=True) + sees_lost.float() @ above
        keeps_lost = sees_lost & (before < self.window)

        group = heads.num_queries // heads.num_keys
        q = q.view(batch, length, heads.num_keys, group, heads.row).permute(0, 2, 3, 1, 4)
        queries = q.reshape(batch, heads.num_keys, group * length, heads.row)
        rows = past_key.shape[2]
        scores = torch.cat(
            [
                _mask(queries @ key.transpose(-1, -2), sees, group),
                _mask(queries @ lost_key.transpose(-1, -2), keeps_lost, group),
            ],
            dim=-1,
        )
        weights = torch.softmax(scores, dim=-1)
        out = weights[..., :rows] @ value + weights[..., rows:] @ lost_value
        out = out.view(batch, heads.num_keys, group, length, heads.row).permute(0, 3, 1, 2, 4)
        return out.reshape(batch, length, heads.num_queries * heads.row), key, value

    def _rank(self, key: Tensor) -> Tensor:
        """Order of keys `[B, H, R, row]` by gate, equal ones by position: float64 `[B, H, R]`.

        A gate has 24 bits of mantissa, so in float64 there is room below it for the position:
        1 + stamp · 2^-52 is exact, and with stamp < 2^24 it does not reach the next gate.
        The summand gives gates that underflowed to 0 an order too. It is far below the
        smallest other gate, but no tiny number itself: the exporter takes those for 0.
        """
        gate, stamp = key[..., self.heads.dim].double(), key[..., self.heads.dim + 1].double()
        return (gate * self.lift + 32.0) * (1.0 + stamp * 2.0**-52)


def _heads(
    config: DogeConfig, num_keys: int, gates: int, extra: int, dtype: str = "float32"
) -> Heads:
    channels = gates if dtype == "float32" else 2 * gates
    multiple = _ROW_MULTIPLES[dtype]
    row = -(-(config.head_dim + channels + extra) // multiple) * multiple
    return Heads(config.num_attention_heads, num_keys, config.head_dim, gates, channels, row)


def _is_key(heads: Heads) -> Tensor:
    """Bool `[num_rotated * gates]`: only keys have gates, queries have constants there."""
    is_key = torch.arange(heads.num_rotated) >= heads.num_queries
    return is_key.repeat_interleave(heads.gates)


def _gate_limit(mask: Tensor, is_key: Tensor) -> Tensor:
    return torch.where((mask == 0).unsqueeze(-1) & is_key, CLOSED_GATE, _OPEN)


def _largest_visible(gates: Tensor, length: int, window: int) -> Tensor:
    """Which keys are among the `window` largest that each new token sees.

    Of equal gates the most recent is kept; the reference leaves that open.

    Args:
        gates: `[B, G, T]`, of all keys.
        length: S; the new tokens are the last S keys.
        window: Number of keys to keep.

    Returns:
        bool `[B, G, S, T]`.
    """
    total = gates.shape[-1]
    columns = torch.arange(total)
    visible = columns <= (torch.arange(length) + (total - length)).unsqueeze(-1)
    gates = gates.unsqueeze(2).masked_fill(~visible, -torch.inf)
    # A stable sort keeps the order of equals, so the most recent has to come first.
    order = gates.flip(-1).sort(dim=-1, descending=True, stable=True).indices
    best = (columns < window).expand(order.shape)
    return torch.zeros_like(best).scatter(-1, order, best).flip(-1)


def _rows(state: Tensor, index: Tensor) -> Tensor:
    """Rows `index` `[B, H, S]` of `[B, H, R, row]`."""
    return state.gather(2, index.unsqueeze(-1).expand(*index.shape, state.shape[-1]))


def _overwrite(state: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    """`state` `[B, H, R, row]` with rows `index` `[B, H, S]` replaced."""
    return state.scatter(2, index.unsqueeze(-1).expand(rows.shape), rows)


def _mask(scores: Tensor, keeps: Tensor, group: int) -> Tensor:
    """Close the scores `[B, H, G * S, K]` where `keeps` `[B, H, S, K]` is false."""
    batch, heads, length, keys = keeps.shape
    grouped = scores.view(batch, heads, group, length, keys)
    closed = torch.where(keeps.unsqueeze(2), grouped, CLOSED_GATE)
    return closed.view(batch, heads, group * length, keys)
