"""Decode steps whose shapes and addresses never change, which CUDA captures once and replays.

Knows what such a step reads and writes beside the state, when it is captured, and how to find out
whether a replay computes what the step does. Does not know whose state it is (`runner`).

Facts about ONNX Runtime that all of this rests on: a session that was made for it captures the
third run with a new graph id, after two ordinary ones that it makes by itself. It keeps what it
captured for each thread, and forgets nothing before the session ends. A replay uses the temporary
memory of the captured run, which is free for other runs in between, but not at the same time; who
uses a device takes turns (`lock`).
"""

from __future__ import annotations

import weakref
from collections import Counter, deque
from collections.abc import Callable, Sequence

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from doge_onnx.runtime.cuda.device_memory import DeviceMemory, Tensor
from doge_onnx.runtime.engine import device as devices
from doge_onnx.runtime.engine.io_names import (
    ATTENTION_MASK,
    INPUT_IDS,
    LOGITS,
    LOGITS_TO_KEEP,
    PAST_LENGTHS,
)
from doge_onnx.runtime.engine.session import has_logits_to_keep
from doge_onnx.runtime.engine.state import Buffer

# Steps on the same tensors before they are captured, which takes as long as three.
_BEFORE_CAPTURE = 4
# For each shape: a captured graph takes memory for as long as the model is loaded.
MOST_GRAPHS = 8
# Bytes of states that are kept for later texts of the same shape, beside that of the last text.
MOST_FREE = 2 << 30
# Steps that are looked at before any text.
_CHECKED_STEPS = 4
# Of the largest logit. A replay runs the same kernels; lengths that were captured with their
# values, as numbers, change much more.
_REPLAY_TOLERANCE = 1e-2
# A shorter mask may be another order of sums, which differ as rounding does.
_TOLERANCES = {"float16": 2e-2, "bfloat16": 0.16}

_Names = Sequence[tuple[str, str]]


class FixedStep:
    """A graph that is bound for good: one token for each sequence, on the same tensors.

    Only what the tensors hold changes: the ids, and how many rows of each sequence are there. The
    mask is of all rows of the buffer, of which the graph reads no more than those.

    Attributes:
        tensors: The state, each `[B, H, capacity, row]`.
        ids: int64 `[B, 1]` on the device: what the next run feeds.
        logits: float32 `[B, 1, V]` on the device.
        graph: Options of a run that is captured or replayed; None if there will be none.
    """

    def __init__(
        self,
        session: ort.InferenceSession,
        names: _Names,
        tensors: Sequence[Tensor],
        memory: DeviceMemory,
        vocab_size: int,
        graph: ort.RunOptions | None,
    ) -> None:
        batch, _, capacity, _ = tensors[0].shape
        self.tensors, self.graph = tensors, graph
        self.ids = memory.empty((batch, 1), "int64")
        self.logits = memory.empty((batch, 1, vocab_size), "float32")
        self._lengths = memory.empty((batch,), "int64")
        self._session, self._binding = session, session.io_binding()
        memory.bind_in_place(self._binding, names, tensors)
        self._mask = memory.ones(batch * capacity).reshaped(batch, capacity)
        for name, tensor in (
            (INPUT_IDS, self.ids),
            (ATTENTION_MASK, self._mask),
            (PAST_LENGTHS, self._lengths),
        ):
            memory.bind_input(self._binding, name, tensor)
        memory.bind_output(self._binding, LOGITS, self.logits)
        self._keep = np.ones(1, np.int64)
        if has_logits_to_keep(session):
            where = (devices.CPU, 0, np.int64, self._keep.shape, self._keep.ctypes.data)
            self._binding.bind_input(LOGITS_TO_KEEP, *where)
        self._count = 0

    def put_lengths(self, lengths: NDArray[np.int64]) -> None:
        """Let the next run feed the tokens behind so many rows of each sequence."""
        self._lengths.value.update_inplace(lengths)

    def run_on_device(self) -> Tensor:
        """Run the graph, or replay it; logits `[B, 1, V]` that the next run overwrites."""
        self._count += 1
        if self.graph is not None and self._count > _BEFORE_CAPTURE:
            try:
                self.run_with(self.graph)
            # The exceptions of ONNX Runtime share no base class but this one.
            except Exception:
                # Something else in this process used the device meanwhile. What was written is
                # written again, with the same values.
                self.graph = None
            else:
                return self.logits
        self.run_with(devices.ORDINARY_RUN)
        return self.logits

    def run_with(self, options: ort.RunOptions) -> None:
        """Run the graph as `options` say."""
        self._session.run_with_iobinding(self._binding, options)


class FixedSteps:
    """Fixed steps of one model, each with the tensors of one buffer at a time.

    A step that was captured is only good with its own tensors. So these outlive their buffer,
    and the next buffer of the same shape gets them.

    Args:
        session: What runs the graph, which can be told where its tokens are.
        names: Input and output of each tensor of the state.
        memory: Where that is.
        vocab_size: Size of the last axis of the logits.
        capture: Whether to capture steps; the session must have been made for it.
    """

    def __init__(
        self,
        session: ort.InferenceSession,
        names: _Names,
        memory: DeviceMemory,
        vocab_size: int,
        capture: bool,
    ) -> None:
        self._session, self._names, self._memory = session, names, memory
        self._vocab_size = vocab_size
        self._capture = capture
        self._graphs: Counter[tuple[int, ...]] = Counter()
        self._free: deque[FixedStep] = deque()
        self._of_buffer: weakref.WeakKeyDictionary[Buffer, FixedStep] = weakref.WeakKeyDictionary()

    def take(self, batch: int, capacity: int) -> FixedStep | None:
        """A step whose tensors have that shape and nobody uses, which is the caller's now."""
        # The newest ones; whenever a buffer goes, on whatever thread, there is one more.
        steps = [self._free.popleft() for _ in range(len(self._free))]
        taken, size = None, 0
        for number, step in enumerate(reversed(steps)):
            shape = step.tensors[0].shape
            if step.graph is None:
                continue
            if taken is None and (shape[0], shape[2]) == (batch, capacity):
                taken = step
                continue
            sizes = (tensor.value.tensor_size_in_bytes() for tensor in step.tensors)
            more = sum(sizes) if number > 0 else 0
            if size + more <= MOST_FREE:
                size += more
                self._free.appendleft(step)
        return taken

    def let_go(self) -> bool:
        """Let go of all that is kept for later texts; whether there was anything."""
        kept = bool(self._free)
        self._free.clear()
        return kept

    def lend(self, step: FixedStep, buffer: Buffer) -> None:
        """Let a step be that of a buffer which has its tensors, for as long as it lives."""
        self._of_buffer[buffer] = step
        if step.graph is not None:
            weakref.finalize(buffer, self._free.append, step).atexit = False

    def of(self, buffer: Buffer) -> FixedStep:
        """The step of a buffer's tensors."""
        step = self._of_buffer.get(buffer)
        if step is None:
            step = self._new(buffer.tensors)
            self.lend(step, buffer)
        return step

    def problem(
        self,
        tensors: Sequence[Tensor],
        with_growing_mask: Callable[[NDArray[np.int64], int], NDArray[np.float32]],
        activations: str,
    ) -> str | None:
        """What is wrong with fixed steps or with replaying them, or None if nothing is.

        Each of a few steps is run in up to three ways, which must agree: of whatever a capture
        would fix that must not be fixed, all steps but the first would show it.

        Args:
            tensors: A state of a single sequence, of zeros.
            with_growing_mask: Runs the same step with a mask that ends with its token, on a state
                of its own: from ids `[1, 1]` and the number of tokens before to logits
                `[1, 1, V]`.
            activations: What the graph computes in.
        """
        step = self._new(tensors)
        nothing = np.full(step.logits.shape, np.nan, np.float32)
        for past in range(_CHECKED_STEPS):
            ids = np.full((1, 1), (past + 1) % self._vocab_size, np.int64)
            step.ids.value.update_inplace(ids)
            step.put_lengths(np.array([past], np.int64))
            results = [with_growing_mask(ids, past)]
            for options in (devices.ORDINARY_RUN, step.graph):
                if options is not None:
                    step.logits.value.update_inplace(nothing)
                    step.run_with(options)
                    results.append(self._memory.read(step.logits))
            for what, truth, ours, tolerance in zip(
                ("step of fixed shapes", "replayed step"),
                results,
                results[1:],
                (_TOLERANCES[activations], _REPLAY_TOLERANCE),
                strict=False,
            ):
                difference = float(np.abs(ours - truth).max())
                # Not a number is no good, either.
                if not difference <= tolerance * float(np.abs(truth).max()):
                    return f"the logits of a {what} differ by {difference:.3g}"
        if step.graph is not None:
            self._free.append(step)
        return None

    def _new(self, tensors: Sequence[Tensor]) -> FixedStep:
        graph, shape = None, tensors[0].shape
        if self._capture and self._graphs[shape] < MOST_GRAPHS:
            self._graphs[shape] += 1
            graph = devices.captured_run(self._graphs.total())
        return FixedStep(self._session, self._names, tensors, self._memory, self._vocab_size, graph)
