"""The window state: at most as many rows as the window has keys, and how attention reads it.

Knows which keys keep a row, the positions of tokens and which keys a query attends to. Does not
know how queries, keys and values are computed (`step`) or how the channels of a row are laid out
(`state_rows`).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from doge_onnx.export.checkpoint import Checkpoint
from doge_onnx.export.rope import inverse_wavelengths
from doge_onnx.export.state_rows import CLOSED_GATE, Heads, Int8Rows, Tokens
from doge_onnx.manifest import ClosedRow

# Upper bound of gates that are not closed: the largest float32, which limits nothing.
_OPEN = torch.finfo(torch.float32).max


class WindowState(nn.Module):
    """At most W rows, where W is the number of keys in the window: `[B, H, R, row]`, R <= W.

    The gate of a key does not depend on the query, and later queries see more keys, never fewer. So
    a key that is not among the W largest gates will never be again, and its row can go to another
    token. Rows are in any order, and a free row has a closed gate. The channel after the gate holds
    the position of the key plus one. It orders equal gates, of which the more recent stays, and
    hides from a query the tokens of its own step that come after it.

    Each head chooses rows for itself. If gates belong to query heads, each query head keeps its own
    copy of the keys of its group, so that H = Hq.

    Positions are exact up to 2^24 tokens, the limit of integers in float32.

    R may be less than W as long as every head has S free rows for S new tokens; the caller adds
    free rows. S never exceeds R.

    Args:
        checkpoint: The model's checkpoint.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__()
        config = checkpoint.config
        assert config.keep_window_size is not None
        self.config = config
        self.window = config.keep_window_size
        self.heads = Heads.of(config, checkpoint.gate_heads, gates=1)
        # Computed here, because torch's exporter rounds differently when it folds constants.
        fixed = config.rope.kind != "dynamic"
        self.frequencies = nn.Buffer(inverse_wavelengths(config, torch.zeros(1))) if fixed else None
        # A tensor, because torch's exporter converts numbers to float32.
        self.lift = nn.Buffer(torch.tensor(2.0**160, dtype=torch.float64))
        self.is_key = nn.Buffer(self.heads.is_key())

    @property
    def table_size(self) -> int:
        """Number of values in the rotary tables: none, because the graph computes rotations."""
        return 0

    @property
    def closing(self) -> ClosedRow:
        """The values that close a row and so mark it as free."""
        return ClosedRow((self.heads.dim,), CLOSED_GATE)

    def tokens(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Tokens:
        """Positions and padding of a step's tokens.

        Args:
            input_ids: int64 `[B, S]`.
            attention_mask: int64 `[B, S]`, for the new ids only: 1 for a token, 0 for padding.
            position_ids: int64 `[B, S]`, the number of tokens before each id, without padding.
        """
        batch, length = input_ids.shape
        # Positions have no limit, so the rotation is computed and not looked up in a table.
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
        """Decide which keys keep a row, then attend.

        Pairs the new key of the largest gate with the row of the smallest gate, the next largest
        with the next smallest, and so on; the larger of each pair gets the row. The keys that stay
        and the keys that lose their row (or never get one) are all keys there are. A key without a
        row may still be among the W largest that an earlier token of this step sees. So these keys
        take part in the attention of this step, and of no other.

        Arguments and results are those of `GrowingState.attend`, with R rows instead of P and
        P + S. Rows are never int8.
        """
        batch, length, _ = q.shape
        heads, dim = self.heads, self.heads.dim
        k, v = (x.unflatten(-1, (heads.num_keys, heads.row)).transpose(1, 2) for x in (k, v))
        # Past and present may be one buffer. Then only the inputs of the new rows are certain to be
        # read before the rows are overwritten, so nothing else may read the past.
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
        # Number of visible keys with a higher rank than each key without a row: all visible rows,
        # and the visible keys of higher rank without a row. A closed row counts, too, but a row can
        # only be closed if every key without a row is closed as well.
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
        """Numbers that order keys `[B, H, R, row]` by gate, then by position: float64 `[B, H, R]`.

        A gate has 24 bits of mantissa, so float64 has room for the position in the bits below. With
        stamp < 2^24, what it adds stays below the distance to the next gate.
        The summand orders gates that underflowed to 0 as well. It is far below the smallest other
        gate after the factor `lift`, which is needed because torch's exporter takes tiny numbers
        for 0.
        """
        gate, stamp = key[..., self.heads.dim].double(), key[..., self.heads.dim + 1].double()
        rank = gate * self.lift + 32.0
        return rank + rank.abs() * (stamp * 2.0**-52)


def _gate_limit(mask: Tensor, is_key: Tensor) -> Tensor:
    return torch.where((mask == 0).unsqueeze(-1) & is_key, CLOSED_GATE, _OPEN)


def _rows(state: Tensor, index: Tensor) -> Tensor:
    """The rows `index` `[B, H, S]` of a state `[B, H, R, row]`: `[B, H, S, row]`."""
    return state.gather(2, index.unsqueeze(-1).expand(*index.shape, state.shape[-1]))


def _overwrite(state: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    """A state `[B, H, R, row]` with the rows `index` `[B, H, S]` replaced."""
    return state.scatter(2, index.unsqueeze(-1).expand(rows.shape), rows)


def _mask(scores: Tensor, keeps: Tensor, group: int) -> Tensor:
    """Close the scores `[B, H, G * S, K]` where `keeps` `[B, H, S, K]` is false."""
    batch, heads, length, keys = keeps.shape
    grouped = scores.view(batch, heads, group, length, keys)
    closed = torch.where(keeps.unsqueeze(2), grouped, CLOSED_GATE)
    return closed.view(batch, heads, group * length, keys)
