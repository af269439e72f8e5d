"""The window state: at most as many rows as the window has keys.

Knows the positions of tokens and what a row holds after the gate. Does not know how queries, keys
and values are computed (`layer`), which keys keep a row (`window_attention`) or how the channels of
a row are laid out (`state_rows`).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from doge_onnx.export.checkpoint import Checkpoint
from doge_onnx.export.model_config import DogeConfig
from doge_onnx.export.piece import Parts, Piece
from doge_onnx.export.rope import inverse_wavelengths
from doge_onnx.export.state_rows import CLOSED_GATE, Heads, Tokens
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
        self.window = config.keep_window_size
        self.heads = Heads.of(config, checkpoint.gate_heads, gates=1)
        self.closed = CLOSED_GATE
        # A tensor, because torch's exporter converts numbers to float32.
        self.lift = nn.Buffer(torch.tensor(2.0**160, dtype=torch.float64))
        self.positions = WindowPositions(config, self.heads)

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
        rows, cos, sin, rest, gate_limit = self.positions(attention_mask, position_ids)
        return Tokens(
            rows=rows,
            cos=cos,
            sin=sin,
            rest=rest,
            positions=position_ids,
            gate_limit=gate_limit,
        )


class WindowPositions(Piece):
    """Rotations and limits of the new tokens of a step.

    Args:
        config: The model's.
        heads: Layout of the state.
    """

    inputs = ("token_mask", "positions", "frequencies", "is_key")
    outputs = ("rows", "cos", "sin", "rest", "gate_limit")

    def __init__(self, config: DogeConfig, heads: Heads) -> None:
        super().__init__()
        self.config, self.heads = config, heads
        # Computed here, because torch's exporter rounds differently when it folds constants.
        fixed = config.rope.kind != "dynamic"
        self.frequencies = nn.Buffer(inverse_wavelengths(config, torch.zeros(1))) if fixed else None
        self.is_key = nn.Buffer(heads.is_key())

    def forward(
        self, token_mask: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """See `Tokens`."""
        batch, length = positions.shape
        # Positions have no limit, so the rotation is computed and not looked up in a table.
        frequencies: Tensor = (
            inverse_wavelengths(self.config, positions)
            if self.frequencies is None
            else self.frequencies
        )
        angles = positions.unsqueeze(-1).float() * frequencies
        half = self.heads.dim // 2
        stamps = (positions + 1)[..., None, None].float() * self.is_key
        rest = torch.nn.functional.pad(stamps, (0, self.heads.rest - 1))
        return (
            torch.arange(batch * length).view(batch, length),
            angles.cos().view(batch * length, half),
            angles.sin().view(batch * length, half),
            rest,
            _gate_limit(token_mask, self.is_key),
        )

    def parts(self) -> Parts:
        """See `Piece`."""
        return Parts({}, {}, {"frequencies": self.frequencies, "is_key": self.is_key}, {})


def _gate_limit(mask: Tensor, is_key: Tensor) -> Tensor:
    return torch.where((mask == 0)[..., None, None] & is_key, CLOSED_GATE, _OPEN)
