"""Runs the graph of a bundle: new tokens and a state in, logits and a new state out.

Knows what every runner and every decode session can do. How the graph of each kind of bundle is
fed is in `growing_runner`, `copying_runner` and `window_runner`, and for a GPU in `cuda.runner`.
Does not check a caller's ids (`input_checks`) and does not choose tokens (`generation.loop`).

Which kinds can what:

-   A growing state that the graph extends in place (target "ort"): each sequence of a batch has a
    length of its own, and nothing in the state is padding. A sequence that ends leaves the batch;
    on a GPU it stays in its place, not growing any more, since steps there have fixed shapes.
-   Growing states of standard operators (target "portable") and window states: the tokens of a
    batch end together, padded on the left, and a sequence that has ended is fed padding
    (`padded_runner`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from doge_onnx.bundle import Manifest
from doge_onnx.runtime.engine.io_names import past_names, present_names
from doge_onnx.runtime.engine.state import State

# Tokens that go through the graph at once. Half as many are up to 13 % slower, twice as many up
# to 8 %, and those need twice the memory.
DEFAULT_CHUNK = 256


class TopLogits(NamedTuple):
    """The largest logits of a sequence, in the order of their ids.

    Attributes:
        ids: int64 `[N]`.
        logits: float32 `[N]`.
    """

    ids: NDArray[np.int64]
    logits: NDArray[np.float32]


# Logits of one position: all of them, `[V]`, or the largest.
Scores = NDArray[np.float32] | TopLogits


class Runner(ABC):
    """Runs the graph of one model; the states it makes are good for it alone.

    Attributes:
        device: Where it does.
        captures: Whether CUDA captures decode steps and replays them.
        reason_for_cpu: Why it is the CPU, where CUDA might be expected.
        vocab_size: Size of the vocabulary.

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
        # The tables of the rotation have no more rows than this.
        self._chunk = min(chunk, manifest.context_length)
        self._names = list(
            zip(past_names(layout.num_layers), present_names(layout.num_layers), strict=True)
        )
        self._row_shape = (layout.num_heads, layout.row_size)
        # By name: NumPy has no bfloat16.
        self._dtype = layout.dtype
        self.vocab_size = manifest.vocab_size
        self._context_length = manifest.context_length

    @abstractmethod
    def feed(
        self,
        tokens: Sequence[NDArray[np.int64]],
        state: State | None,
        last_only: bool,
        consume: bool = False,
        most_tokens: int | None = None,
    ) -> tuple[list[NDArray[np.float32]], State]:
        """Feed each sequence of a batch its new tokens.

        Args:
            tokens: Token ids of each sequence, int64 `[S_b]`, all inside of the vocabulary; some
                may be empty, but not all.
            state: What came before, or None at the start of the sequences.
            last_only: Compute logits for the last position of each sequence only.
            consume: Whether nobody will use `state` again, so that its memory may be
                overwritten.
            most_tokens: Most tokens that any of the sequences will ever have, if that is known:
                a new state gets memory for no more.

        Returns:
            Logits `[1, V]` or `[S_b, V]` of each sequence, `[0, V]` of one without new tokens,
            not used again by anybody else; and the state after these tokens. If it raises,
            `state` is as good as before, unless it was given to be consumed.
        """

    @abstractmethod
    def decode(self, state: State) -> DecodeSession:
        """Go on from `state`, which nobody will use again, one token at a time."""

    def rewind(self, state: State, length: int) -> State | None:
        """The state after the first `length` tokens of a single sequence, at least one.

        None where it cannot be told from `state`, and has to be computed anew.
        """
        return None


class DecodeSession(ABC):
    """One token for each sequence at a time, from a state that is this object's own.

    Attributes:
        rows: Which sequences of the state are still fed, by their numbers in it, in the order of
            `step`. Removing one may change the order.
    """

    rows: list[int]

    @abstractmethod
    def step(self, token_ids: Sequence[int], top: int | None = None) -> Sequence[Scores]:
        """Feed the next token of each sequence.

        Args:
            token_ids: For each of `rows`.
            top: How many of the largest logits will be looked at, and those that equal the least
                of them; None for all. With 1, `token_ids` of the next step are the most likely
                tokens.

        Returns:
            Logits `[V]` for each of `rows`, which the next step may overwrite; or the largest of
            them alone, where that is less work.
        """

    @abstractmethod
    def remove(self, rows: Collection[int]) -> None:
        """Let sequences leave that have ended; at least one must stay."""

    @abstractmethod
    def end(self) -> State:
        """The state after all that was fed, if no sequence has left; no step may follow."""
