"""The window state: at most as many rows as the window has keys.

Knows the positions of tokens and what a row holds after the gate. Does not know how queries, keys
and values are computed (`step`), which keys keep a row (`window_attention`) or how the channels of
a row are laid out (`state_rows`).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from doge_onnx.export.checkpoint import Checkpoint
from doge_onnx.export.rope import inverse_wavelengths
from doge_onnx.export.state_rows import CLOSED_GATE, Heads, Int8Rows, Tokens
from doge_onnx.export.window_attention import window_attention
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

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """The numbers that `window_attention` takes after its tensors."""
        return self.heads.num_queries, self.heads.num_keys, self.heads.dim, self.window

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
        stamps = (position_ids + 1)[..., None, None].float() * self.is_key
        rest = torch.nn.functional.pad(stamps, (0, self.heads.rest - 1))
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
        """Decide which keys keep a row, then attend: `window_attention`.

        Arguments and results are those of `GrowingState.attend`, with R rows instead of P and
        P + S. Rows are never int8.
        """
        out, key, value = window_attention(
            q, k, v, past_key, past_value, tokens.positions, self.lift, *self.sizes
        )
        return out, key, value


def _gate_limit(mask: Tensor, is_key: Tensor) -> Tensor:
    return torch.where((mask == 0)[..., None, None] & is_key, CLOSED_GATE, _OPEN)
