"""Runs graphs that need all sequences of a batch to end in the same column.

Knows how to pad unequal sequences on the left and how to cut a long prompt into chunks. Does not
know how the graph is run: that is in `copying_runner` and `window_runner`. `runner` lists which
bundles need padding.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from doge_onnx.bundle import Manifest
from doge_onnx.runtime.engine.runner import DEFAULT_CHUNK, DecodeSession, PositionLogits, Runner
from doge_onnx.runtime.engine.state import Buffer, State, buffer_capacity

# Any id will do, because the mask hides padding.
_PADDING_ID = 0


class PaddedState(State):
    """A state whose sequences all have the same number of columns.

    Attributes:
        columns: Tokens that each sequence was fed, padding included.
    """

    def __init__(
        self, buffer: Buffer[Any], lengths: NDArray[np.int64], owner: object, columns: int
    ) -> None:
        super().__init__(buffer, lengths, owner)
        self.columns = columns


class PaddedRunner(Runner):
    """Feeds a batch as one matrix of token ids, with a mask that marks padding."""

    def __init__(
        self, session: ort.InferenceSession, manifest: Manifest, chunk: int = DEFAULT_CHUNK
    ) -> None:
        super().__init__(session, manifest, chunk)
        # Most rows of a sequence without padding.
        self._most_rows = manifest.context_length

    def _forward(
        self,
        tokens: Sequence[NDArray[np.int64]],
        state: State | None,
        last_only: bool,
        consume: bool,
        max_tokens: int | None,
    ) -> tuple[list[NDArray[np.float32]], State]:
        """Feed each sequence of a batch its new tokens; see `Runner.forward`."""
        assert state is None or isinstance(state, PaddedState)
        ids, mask = left_pad(tokens)
        new = ids.shape[1]
        end = new if state is None else state.columns + new
        # Room for all chunks from the start, so that no buffer is copied between two chunks.
        capacity = buffer_capacity(end, self._most_rows, max_tokens)
        parts = []
        for start in range(0, new, self._chunk):
            columns = slice(start, start + self._chunk)
            logits, state = self._run(
                np.ascontiguousarray(ids[:, columns]),
                np.ascontiguousarray(mask[:, columns]),
                state,
                last_only,
                # The caller never sees the states between two chunks.
                consume or start > 0,
                capacity,
            )
            parts.append(logits)
        assert state is not None
        every = parts[-1] if last_only or len(parts) == 1 else np.concatenate(parts, axis=1)
        kept = [min(len(row), every.shape[1]) for row in tokens]
        return [row[len(row) - count :] for row, count in zip(every, kept, strict=True)], state

    def decode(self, state: State) -> DecodeSession:
        """Start a decode session; see `Runner.decode`."""
        return _PaddedSession(self, state)

    @abstractmethod
    def _run(
        self,
        input_ids: NDArray[np.int64],
        mask: NDArray[np.int64],
        state: PaddedState | None,
        last_only: bool,
        consume: bool,
        capacity: int,
    ) -> tuple[NDArray[np.float32], PaddedState]:
        """Feed up to one chunk of new tokens.

        Args:
            input_ids: int64 `[B, S]`, C-contiguous.
            mask: int64 `[B, S]`, C-contiguous; 1 for a token, 0 for padding.
            state: See `forward`.
            last_only: Compute logits for the last position only.
            consume: See `forward`.
            capacity: Rows of the buffer, if the runner has to make one.

        Returns:
            Float32 logits `[B, 1, V]` or `[B, S, V]`, and the state after these tokens.
        """


class _PaddedSession(DecodeSession):
    """A decode session that feeds padding to sequences that have ended."""

    def __init__(self, runner: PaddedRunner, state: State) -> None:
        self.rows = list(range(state.batch_size))
        self._runner, self._state = runner, state

    def step(self, token_ids: Sequence[int], top: int | None = None) -> Sequence[PositionLogits]:
        """Feed the next token of each sequence; see `DecodeSession.step`."""
        tokens = [np.empty(0, np.int64)] * self._state.batch_size
        for row, token_id in zip(self.rows, token_ids, strict=True):
            tokens[row] = np.array([token_id], np.int64)
        logits, self._state = self._runner.forward(
            tokens, self._state, last_only=True, consume=True
        )
        return [logits[row][0] for row in self.rows]

    def remove(self, rows: Collection[int]) -> None:
        """Remove sequences; see `DecodeSession.remove`."""
        self.rows = [row for row in self.rows if row not in rows]

    def end(self) -> State:
        """End the session; see `DecodeSession.end`."""
        return self._state


def left_pad(
    tokens: Sequence[Sequence[int] | NDArray[np.int64]],
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pad sequences on the left to equal lengths; returns ids and mask, both int64 `[B, S]`."""
    longest = max(len(row) for row in tokens)
    ids = np.full((len(tokens), longest), _PADDING_ID, np.int64)
    mask = np.zeros_like(ids)
    for number, row in enumerate(tokens):
        ids[number, longest - len(row) :] = row
        mask[number, longest - len(row) :] = 1
    return ids, mask
