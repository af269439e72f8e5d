"""The interface of all runners: new tokens and a state in, logits and the next state out.

Knows what every runner and every decode session offers. The runners themselves, one for each kind
of graph, are in `growing_runner`, `copying_runner` and `window_runner`, and those for a GPU in
`cuda.runner`. Does not check a caller's ids (`input_checks`) and does not choose tokens
(`generation.loop`).

What each kind of bundle supports:

-   A growing state that the graph extends in place (target "ort"): each sequence of a batch has its
    own length, and the state holds no padding. A sequence that ends leaves the batch. On a GPU it
    keeps its place and stops growing, because steps there have fixed shapes.
-   Growing states of standard operators (target "portable") and window states: sequences are padded
    on the left so that they all end in the same column, and a sequence that has ended is fed
    padding (`padded_runner`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from doge_onnx.bundle import Manifest
from doge_onnx.errors import DogeOnnxError, NotEnoughMemoryError
from doge_onnx.runtime.engine.graph_session import run_error
from doge_onnx.runtime.engine.io_names import past_names, present_names
from doge_onnx.runtime.engine.kernels import Kernels
from doge_onnx.runtime.engine.state import State

# Most tokens of a prompt in one run of the graph. Half as many are up to 13 % slower; twice as many
# are up to 8 % slower and need twice the memory.
DEFAULT_CHUNK = 256

Result = TypeVar("Result")


class TopLogits(NamedTuple):
    """The N largest logits of one position, sorted by token id.

    Attributes:
        ids: Token ids, int64 `[N]`.
        logits: Their logits, float32 `[N]`.
    """

    ids: NDArray[np.int64]
    logits: NDArray[np.float32]


# Logits of one position: all of them, `[V]`, or only the largest.
PositionLogits = NDArray[np.float32] | TopLogits


class Executor(Protocol):
    """Calls the functions that use a device, when no other caller uses it."""

    def run(self, function: Callable[..., Result], *args: Any) -> Result:
        """Call a function and return its result."""


class ImmediateExecutor:
    """For the CPU, which any number of callers may use at once."""

    def run(self, function: Callable[..., Result], *args: Any) -> Result:
        """Call a function and return its result."""
        return function(*args)


class Runner(ABC):
    """Runs the graph of one model. A state can only be continued by the runner that made it.

    Attributes:
        device: Where the graph runs, "cpu" or "cuda".
        captures: Whether CUDA captures decode steps and replays them.
        reason_for_cpu: Why the device is the CPU, where a user might expect CUDA; else None.
        vocab_size: Size of the vocabulary, V.
        executor: Calls what uses the device.

    Args:
        session: Has the inputs and outputs that the manifest implies.
        manifest: The bundle's.
        chunk: Most tokens of a sequence in one run of the graph.
    """

    device = "cpu"
    captures = False
    reason_for_cpu: str | None = None

    def __init__(
        self, session: ort.InferenceSession, manifest: Manifest, chunk: int = DEFAULT_CHUNK
    ) -> None:
        layout = manifest.state
        self.executor: Executor = ImmediateExecutor()
        self._session = session
        # The rotary tables have one row for each position up to the context length.
        self._chunk = min(chunk, manifest.context_length)
        self._names = list(
            zip(past_names(layout.num_layers), present_names(layout.num_layers), strict=True)
        )
        self._row_shape = (layout.num_heads, layout.row_size)
        # A name and not a dtype: NumPy has no bfloat16.
        self._dtype = layout.dtype
        self.vocab_size = manifest.vocab_size
        self._context_length = manifest.context_length

    def forward(
        self,
        tokens: Sequence[NDArray[np.int64]],
        state: State | None,
        last_only: bool,
        consume: bool = False,
        max_tokens: int | None = None,
    ) -> tuple[list[NDArray[np.float32]], State]:
        """Feed each sequence of a batch its new tokens.

        Args:
            tokens: New token ids of each sequence, int64 `[S_b]`, all inside the vocabulary. Some
                sequences may have no new tokens, but not all.
            state: The state before these tokens; None at the start of the sequences.
            last_only: Compute logits for the last position of each sequence only.
            consume: Whether the caller gives up `state`, so that the runner may overwrite its
                memory.
            max_tokens: Most tokens that any of the sequences will ever have, if the caller knows:
                a new state gets memory for no more.

        Returns:
            Float32 logits of each sequence, `[1, V]` or `[S_b, V]`, or `[0, V]` of one without new
            tokens, in arrays that belong to the caller; and the state after these tokens. If the
            call raises, `state` is unchanged, unless the caller gave it up.

        Raises:
            NotEnoughMemoryError: The state, the logits or the run needs more memory than there is.
            BundleError: ONNX Runtime cannot run the graph.
            DeviceError: The device fails.
        """
        try:
            return self.executor.run(self._forward, tokens, state, last_only, consume, max_tokens)
        except NotEnoughMemoryError:
            raise
        except MemoryError as error:
            raise self.no_memory(error) from error

    @property
    def kernels(self) -> Kernels:
        """Which kernels run the graph's fused operators."""
        kernels: Kernels = self._session.kernels
        return kernels

    def no_memory(self, error: MemoryError) -> DogeOnnxError:
        """The error of this package for a lack of memory, which names the bundle."""
        return run_error(f"run {self._session.graph}", error)

    @abstractmethod
    def _forward(
        self,
        tokens: Sequence[NDArray[np.int64]],
        state: State | None,
        last_only: bool,
        consume: bool,
        max_tokens: int | None,
    ) -> tuple[list[NDArray[np.float32]], State]:
        """`forward`, called by the executor."""

    @abstractmethod
    def decode(self, state: State) -> DecodeSession:
        """Start a decode session from `state`, which the caller gives up."""

    def rewind(self, state: State, length: int) -> State | None:
        """The state after the first `length` >= 1 tokens of a single sequence.

        None where `state` does not hold enough to tell, so that the caller has to feed those tokens
        again.
        """
        return None


class DecodeSession(ABC):
    """Decodes a batch one token at a time. The session owns the state that it started from.

    Attributes:
        rows: Numbers of the sequences that have not left, counted as in the state, in the order
            that `step` takes their tokens. `remove` may change the order.
    """

    rows: list[int]

    @abstractmethod
    def step(self, token_ids: Sequence[int], top: int | None = None) -> Sequence[PositionLogits]:
        """Feed the next token of each sequence.

        Args:
            token_ids: One for each of `rows`.
            top: How many of the largest logits the caller needs; logits equal to the smallest of
                those are included. None for all logits. With 1, the caller promises to feed the
                most likely tokens in the next step.

        Returns:
            For each of `rows`, float32 logits `[V]`, which the next step may overwrite, or only
            the largest, where that is less work.
        """

    @abstractmethod
    def remove(self, rows: Collection[int]) -> None:
        """Remove sequences that have ended. At least one must stay."""

    @abstractmethod
    def end(self) -> State:
        """End the session; returns the state after all fed tokens.

        Only for a session that no sequence has left.
        """
