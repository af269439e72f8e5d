"""A state with as many rows as the window has keys, for ever, and how attention reads it.

Knows which keys keep a row, which positions tokens have and which keys a query attends to; not
how queries, keys and values come about (`step`), nor what is in a row (`state_rows`).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from doge_onnx.export.checkpoint import Checkpoint
from doge_onnx.export.rope import inverse_wavelengths
from doge_onnx.export.state_rows import CLOSED_GATE, Heads, Int8Rows, Tokens
from doge_onnx.manifest import ClosedRow

# The upper bound of gates that are not closed: none.
_OPEN = torch.finfo(torch.float32).max


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
        self.heads = Heads.of(config, checkpoint.gate_heads, gates=1)
        # Computed here, because the exporter rounds differently when it folds constants.
        fixed = config.rope.kind != "dynamic"
        self.frequencies = nn.Buffer(inverse_wavelengths(config, torch.zeros(1))) if fixed else None
        # A tensor, because the exporter passes numbers through float32.
        self.lift = nn.Buffer(torch.tensor(2.0**160, dtype=torch.float64))
        self.is_key = nn.Buffer(self.heads.is_key())

    @property
    def table_size(self) -> int:
        """Number of values that the graph holds beside the weights: it computes rotations."""
        return 0

    @property
    def closing(self) -> ClosedRow:
        """What closes a row, and so makes it free."""
        return ClosedRow((self.heads.dim,), CLOSED_GATE)

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


def _gate_limit(mask: Tensor, is_key: Tensor) -> Tensor:
    return torch.where((mask == 0).unsqueeze(-1) & is_key, CLOSED_GATE, _OPEN)


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
