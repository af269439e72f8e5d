"""Attention with a window state: which keys keep a row, and which keys a query attends to.

Knows the channels of a row that hold the gate and the position. Does not know how queries, keys and
values are computed (`layer`) or how tokens get their positions (`window_state`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from doge_onnx.export.state_rows import CLOSED_GATE


def attend_to_window(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past_key: Tensor,
    past_value: Tensor,
    positions: Tensor,
    lift: Tensor,
    num_queries: int,
    num_keys: int,
    dim: int,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Decide which keys keep a row, then attend.

    Pairs the new key of the largest gate with the row of the smallest gate, the next largest
    with the next smallest, and so on; the larger of each pair gets the row. The keys that stay
    and the keys that lose their row (or never get one) are all keys there are. A key without a
    row may still be among the W largest that an earlier token of this step sees. So these keys
    take part in the attention of this step, and of no other.

    Args:
        q: Queries, `[B, S, Hq * row]`.
        k: New keys, `[B, S, H * row]`.
        v: New values, `[B, S, H * row]`.
        past_key: `[B, H, R, row]`.
        past_value: `[B, H, R, row]`.
        positions: int64 `[B, S]`.
        lift: See `_rank`.
        num_queries: Hq.
        num_keys: H.
        dim: Channels of a head; the gate and the position of a key come after them.
        window: W.

    Returns:
        The attention output `[B, S, Hq * row]`, and the present key and value, in the shape of
        the past.
    """
    batch, length, _ = q.shape
    row = past_key.shape[-1]
    k, v = (x.unflatten(-1, (num_keys, row)).transpose(1, 2) for x in (k, v))
    # Past and present may be one buffer. Then only the inputs of the new rows are certain to be
    # read before the rows are overwritten, so nothing else may read the past.
    old_rank, slots = torch.topk(_rank(past_key, dim, lift), length, largest=False)
    new_rank, order = torch.topk(_rank(k, dim, lift), length)
    enters = new_rank > old_rank
    old_key, old_value = (_rows(past, slots) for past in (past_key, past_value))
    new_key, new_value = (_rows(new, order) for new in (k, v))
    wins = enters.unsqueeze(-1)
    key = _overwrite(past_key, slots, torch.where(wins, new_key, old_key))
    value = _overwrite(past_value, slots, torch.where(wins, new_value, old_value))
    lost_key = torch.where(wins, old_key, new_key)
    lost_value = torch.where(wins, old_value, new_value)
    lost_rank = torch.where(enters, old_rank, new_rank)

    now = (positions + 1).float().view(batch, 1, length, 1)
    sees = key[..., dim + 1].unsqueeze(2) <= now
    sees_lost = lost_key[..., dim + 1].unsqueeze(2) <= now
    # Number of visible keys with a higher rank than each key without a row: all visible rows,
    # and the visible keys of higher rank without a row. A closed row counts, too, but a row can
    # only be closed if every key without a row is closed as well.
    above = (lost_rank.unsqueeze(-1) > lost_rank.unsqueeze(-2)).float()
    before = sees.float().sum(-1, keepdim=True) + sees_lost.float() @ above
    keeps_lost = sees_lost & (before < window)

    group = num_queries // num_keys
    q = q.view(batch, length, num_keys, group, row).permute(0, 2, 3, 1, 4)
    queries = q.reshape(batch, num_keys, group * length, row)
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
    out = out.view(batch, num_keys, group, length, row).permute(0, 3, 1, 2, 4)
    return out.reshape(batch, length, num_queries * row), key, value


def _rank(key: Tensor, dim: int, lift: Tensor) -> Tensor:
    """Numbers that order keys `[B, H, R, row]` by gate, then by position: float64 `[B, H, R]`.

    A gate has 24 bits of mantissa, so float64 has room for the position in the bits below. With
    stamp < 2^24, what it adds stays below the distance to the next gate.
    The summand orders gates that underflowed to 0 as well. It is far below the smallest other
    gate after the factor `lift`, which is needed because torch's exporter takes tiny numbers
    for 0.
    """
    gate, stamp = key[..., dim].double(), key[..., dim + 1].double()
    rank = gate * lift + 32.0
    return rank + rank.abs() * (stamp * 2.0**-52)


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
