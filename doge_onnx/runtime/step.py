"""One step of the recurrent model: new tokens and a state in, logits and a new state out.

Knows how a long step is cut into chunks. How the graph of each kind of bundle is fed is in
`growing.py` and `window.py`. Does not check the caller's ids (`inputs.py`) and does not
choose tokens (`generate.py`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from doge_onnx.bundle import Manifest
from doge_onnx.runtime.session import past_names, present_names
from doge_onnx.runtime.state import State

# Tokens that go through the graph at once. Fewer use the processor less well, more need memory
# in proportion and are no faster.
DEFAULT_CHUNK = 512


class Stepper(ABC):
    """Runs the graph of one model; the states it makes are good for it alone.

    Args:
        session: With the inputs and outputs that the manifest implies.
        manifest: Of the bundle.
        chunk: Most tokens of a sequence that go through the graph at once.
    """

    def __init__(
        self, session: ort.InferenceSession, manifest: Manifest, chunk: int = DEFAULT_CHUNK
    ) -> None:
        layout = manifest.state
        self._session = session
        self._chunk = chunk
        self._names = list(
            zip(past_names(layout.num_layers), present_names(layout.num_layers), strict=True)
        )
        self._row_shape = (layout.num_heads, layout.row_size)
        self._dtype = np.dtype(layout.dtype)
        self._vocab_size = manifest.vocab_size

    def step(
        self,
        input_ids: NDArray[np.int64],
        mask: NDArray[np.int64] | None,
        state: State | None,
        last_only: bool,
        consume: bool = False,
    ) -> tuple[NDArray[np.float32], State]:
        """Feed new tokens.

        Args:
            input_ids: Token ids, C-contiguous `[B, S]`, all inside of the vocabulary.
            mask: `[B, S]`, 0 where an id is padding; None if none is.
            state: What came before, or None at the start of the sequences.
            last_only: Compute logits for the last position only.
            consume: Whether nobody will use `state` again, so that its memory may be
                overwritten.

        Returns:
            Logits `[B, 1, V]` or `[B, S, V]`, not used again by anybody else, and the
            state after these tokens. If it raises, `state` is as good as before, unless
            it was given to be consumed.
        """
        if input_ids.shape[1] <= self._chunk:
            return self._run(input_ids, mask, state, last_only, consume)
        parts = []
        for start in range(0, input_ids.shape[1], self._chunk):
            columns = slice(start, start + self._chunk)
            logits, state = self._run(
                np.ascontiguousarray(input_ids[:, columns]),
                None if mask is None else mask[:, columns],
                state,
                last_only,
                # States between two chunks are nobody else's.
                consume or start > 0,
            )
            parts.append(logits)
        assert state is not None
        return parts[-1] if last_only else np.concatenate(parts, axis=1), state

    @abstractmethod
    def _run(
        self,
        input_ids: NDArray[np.int64],
        mask: NDArray[np.int64] | None,
        state: State | None,
        last_only: bool,
        consume: bool,
    ) -> tuple[NDArray[np.float32], State]:
        """Feed at most a chunk of new tokens; see `step`."""
