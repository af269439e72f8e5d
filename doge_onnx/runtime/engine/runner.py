"""One step of the recurrent model: new tokens and a state in, logits and a new state out.

Knows how a long step is cut into chunks. How the graph of each kind of bundle is fed is in
`growing.py` and `window.py`. Does not check the caller's ids (`inputs.py`) and does not
choose tokens (`generate.py`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from doge_onnx.bundle import Manifest
from doge_onnx.runtime.engine.session import past_names, present_names
from doge_onnx.runtime.engine.state import State, grown_capacity

# Tokens that go through the graph at once. Half as many are up to 13 % slower, twice as many up
# to 8 %, and those need twice the memory.
DEFAULT_CHUNK = 256


class Runner(ABC):
    """Runs the graph of one model; the states it makes are good for it alone.

    Attributes:
        device: Where it does.
        captures: Whether CUDA captures decode steps and replays them.
        reason_for_cpu: Why it is the CPU, where CUDA might be expected.

    Args:
        session: With the inputs and outputs that the manifest implies.
        manifest: Of the bundle.
        chunk: Most tokens of a sequence that go through the graph at once.
    """

    device = "cpu"
    captures = False
    reason_for_cpu: str | None = None

    def __init__(
        self, session: ort.InferenceSession, manifest: Manifest, chunk: int = DEFAULT_CHUNK
    ) -> None:
        layout = manifest.state
        self._session = session
        # The kernel that rotates takes no more tokens at once than it has positions for.
        self._chunk = min(chunk, manifest.context_length)
        self._names = list(
            zip(past_names(layout.num_layers), present_names(layout.num_layers), strict=True)
        )
        self._row_shape = (layout.num_heads, layout.row_size)
        # By name: NumPy has no bfloat16.
        self._dtype = layout.dtype
        self.vocab_size = manifest.vocab_size
        # Rows that a state without padding never exceeds.
        self._most_rows = manifest.context_length

    def step(
        self,
        input_ids: NDArray[np.int64],
        mask: NDArray[np.int64] | None,
        state: State | None,
        last_only: bool,
        consume: bool = False,
        follow: int | None = None,
    ) -> tuple[NDArray[np.float32], State]:
        """Feed new tokens.

        Args:
            input_ids: Token ids, C-contiguous `[B, S]`, all inside of the vocabulary.
            mask: `[B, S]`, 0 where an id is padding; None if none is.
            state: What came before, or None at the start of the sequences.
            last_only: Compute logits for the last position only.
            consume: Whether nobody will use `state` again, so that its memory may be
                overwritten.
            follow: Most tokens of a sequence that will follow these, if that is known: a new
                state gets memory for no more.

        Returns:
            Logits `[B, 1, V]` or `[B, S, V]`, not used again by anybody else, and the
            state after these tokens. If it raises, `state` is as good as before, unless
            it was given to be consumed.
        """
        new = input_ids.shape[1]
        end = new if state is None else state.length + new
        # For all chunks at once, so that no state between two of them is ever copied.
        capacity = self._capacity(end, follow)
        if new <= self._chunk:
            return self._run(input_ids, mask, state, last_only, consume, capacity)
        parts = []
        for start in range(0, new, self._chunk):
            columns = slice(start, start + self._chunk)
            logits, state = self._run(
                np.ascontiguousarray(input_ids[:, columns]),
                None if mask is None else mask[:, columns],
                state,
                last_only,
                # States between two chunks are nobody else's.
                consume or start > 0,
                capacity,
            )
            parts.append(logits)
        assert state is not None
        return parts[-1] if last_only else np.concatenate(parts, axis=1), state

    def _capacity(self, rows: int, follow: int | None) -> int:
        """Rows of a new buffer; see `grown_capacity`."""
        return grown_capacity(rows, self._most_rows, follow)

    def decoder(self, state: State) -> DecodeSession:
        """Go on from `state`, which nobody will use again, one token at a time."""
        return DecodeSession(self, state)

    def rewind(self, state: State, length: int) -> State | None:
        """The state after the first `length` tokens of an unpadded sequence, at least one.

        None where it cannot be told from `state`, and has to be computed anew.
        """
        return None

    @abstractmethod
    def _run(
        self,
        input_ids: NDArray[np.int64],
        mask: NDArray[np.int64] | None,
        state: State | None,
        last_only: bool,
        consume: bool,
        capacity: int,
    ) -> tuple[NDArray[np.float32], State]:
        """Feed at most a chunk of new tokens; see `step`.

        `capacity` is how many rows a buffer should have if a new one is made.
        """


class Best(NamedTuple):
    """The largest logits of a sequence, in the order of their ids.

    Attributes:
        ids: int64 `[N]`.
        logits: `[N]`.
    """

    ids: NDArray[np.int64]
    logits: NDArray[np.float32]


class DecodeSession:
    """One token for each sequence at a time, from a state that is this object's own.

    Attributes:
        tokens: int64 `[B, 1]`: what the next step feeds is written here.
    """

    def __init__(self, runner: Runner, state: State) -> None:
        self.tokens = np.zeros((state.batch_size, 1), np.int64)
        self._runner = runner
        self._state = state

    def step(
        self, mask: NDArray[np.int64] | None, best: int | None = None
    ) -> Sequence[NDArray[np.float32] | Best]:
        """Feed `tokens`.

        Args:
            mask: `[B, 1]`, 0 where an id is padding; None if none is.
            best: How many of the largest logits will be looked at, and those that equal the
                least of them; None for all. With 1, whoever calls writes the most likely
                token of each sequence that goes on into `tokens`.

        Returns:
            Logits `[V]` of each sequence, which the next step may overwrite; or the best of
            them alone, where that is less work.
        """
        logits, self._state = self._runner.step(
            self.tokens, mask, self._state, last_only=True, consume=True
        )
        return list(logits[:, 0])

    def end(self) -> State:
        """The state after all that was fed; no step may follow."""
        return self._state
