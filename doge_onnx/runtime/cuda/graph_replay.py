"""Decode steps of fixed shapes and addresses, which CUDA can capture once and then replay.

Knows the tensors of such a step, when to capture it, and how to check that a replay computes the
same as an ordinary run. Does not know which sequences a state belongs to (`runner`).

How ONNX Runtime captures:

-   A session that may capture runs a graph with a new graph id twice in the ordinary way, all by
    itself, and captures the third run.
-   It keeps captured graphs for each thread, and frees none before the session ends.
-   A replay uses the temporary memory of the captured run. Other runs may use that memory between
    two replays, but not at the same time as one: `executor` lets one thread at a time use a device.
"""

from __future__ import annotations

import weakref
from collections import Counter, deque
from collections.abc import Callable, Sequence

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from doge_onnx.runtime.cuda.device_memory import DeviceMemory, DeviceTensor
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

# Ordinary steps on the same tensors before a capture, which takes as long as three steps.
_BEFORE_CAPTURE = 4
# Most captured graphs for each shape: each takes memory for as long as the model is loaded.
MAX_GRAPHS = 8
# Most bytes of free states that are kept for later buffers of the same shape, not counting the
# newest one.
MAX_FREE_BYTES = 2 << 30
# Steps that are checked when a model is loaded.
_CHECKED_STEPS = 4
# Relative to the largest logit. A replay runs the same kernels; a length that was captured as a
# constant changes the logits much more.
_REPLAY_TOLERANCE = 1e-2
# Relative to the largest logit: with a shorter mask, kernels may add in another order.
_TOLERANCES = {"float16": 2e-2, "bfloat16": 0.16}

_Names = Sequence[tuple[str, str]]


class StaticStep:
    """A decode step of fixed shapes: the graph, bound once, to tensors that are never replaced.

    Between two runs only the values in the tensors change: the ids, and the number of rows of each
    sequence. The mask covers all rows of the buffer; the graph reads only the rows that exist.

    Attributes:
        tensors: The state, each `[B, H, capacity, row]`.
        ids: int64 `[B, 1]` on the device, the tokens that the next run feeds.
        logits: float32 `[B, 1, V]` on the device.
        graph: Options of a run that CUDA captures or replays; None if it may not.
    """

    def __init__(
        self,
        session: ort.InferenceSession,
        names: _Names,
        tensors: Sequence[DeviceTensor],
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
        """Set how many rows of the state each sequence has before the next run, int64 `[B]`."""
        self._lengths.value.update_inplace(lengths)

    def run_on_device(self) -> DeviceTensor:
        """Run or replay the step; returns logits `[B, 1, V]`, which the next run overwrites."""
        self._count += 1
        if self.graph is not None and self._count > _BEFORE_CAPTURE:
            try:
                self.run_with(self.graph)
            # ONNX Runtime's exceptions have no other base class in common.
            except Exception:
                # Other code in this process used the device during the capture. The ordinary run
                # below writes all results again, with the same values.
                self.graph = None
            else:
                return self.logits
        self.run_with(devices.ORDINARY_RUN)
        return self.logits

    def run_with(self, options: ort.RunOptions) -> None:
        """Run the graph with these options: an ordinary run or a captured one."""
        self._session.run_with_iobinding(self._binding, options)


class StaticStepPool:
    """The steps of fixed shapes of one model, each lent to one buffer at a time.

    A captured step works only with the tensors that it was captured with. So a step and its tensors
    outlive their buffer, and the next buffer of the same shape gets them.

    Args:
        session: Runs the graph, which must have the input `past_lengths`.
        names: Name of the input and of the output for each tensor of the state.
        memory: Memory of the device.
        vocab_size: V, the size of the last axis of the logits.
        capture: Whether to capture steps; the session must have been opened for it.
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
        self._free: deque[StaticStep] = deque()
        self._of_buffer = weakref.WeakKeyDictionary[Buffer[DeviceTensor], StaticStep]()

    def take(self, batch: int, capacity: int) -> StaticStep | None:
        """Take a free step for `batch` sequences of `capacity` rows; None if there is none."""
        # Newest first. Another thread may drop a buffer, and so add a free step, at any time.
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
            if size + more <= MAX_FREE_BYTES:
                size += more
                self._free.appendleft(step)
        return taken

    def drop_free(self) -> bool:
        """Drop all free steps and their tensors; returns whether there were any."""
        kept = bool(self._free)
        self._free.clear()
        return kept

    def lend(self, step: StaticStep, buffer: Buffer[DeviceTensor]) -> None:
        """Lend a step to a buffer that has its tensors, for as long as the buffer lives."""
        self._of_buffer[buffer] = step
        if step.graph is not None:
            weakref.finalize(buffer, self._free.append, step).atexit = False

    def get(self, buffer: Buffer[DeviceTensor]) -> StaticStep:
        """The step of a buffer; makes one if the buffer has none."""
        step = self._of_buffer.get(buffer)
        if step is None:
            step = self._new(buffer.tensors)
            self.lend(step, buffer)
        return step

    def find_problem(
        self,
        tensors: Sequence[DeviceTensor],
        with_growing_mask: Callable[[NDArray[np.int64], int], NDArray[np.float32]],
        activations: str,
    ) -> str | None:
        """Check steps of fixed shapes, and their replays, against ordinary steps.

        Runs a few steps, each in up to three ways that must agree: with a growing mask, with fixed
        shapes, and captured. A value that a capture wrongly turned into a constant would show in
        every step but the first.

        Args:
            tensors: The state of a single sequence, all zeros.
            with_growing_mask: Runs the same step with a mask that ends with its token, on a state
                of its own. Takes ids `[1, 1]` and the number of tokens before them; returns logits
                `[1, 1, V]`.
            activations: Element type that the graph computes in, "float16" or "bfloat16".

        Returns:
            What is wrong, in words, or None if all agree.
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
                # Written so that NaN counts as a difference.
                if not difference <= tolerance * float(np.abs(truth).max()):
                    return f"the logits of a {what} differ by {difference:.3g}"
        if step.graph is not None:
            self._free.append(step)
        return None

    def _new(self, tensors: Sequence[DeviceTensor]) -> StaticStep:
        graph, shape = None, tensors[0].shape
        if self._capture and self._graphs[shape] < MAX_GRAPHS:
            self._graphs[shape] += 1
            graph = devices.captured_run(self._graphs.total())
        return StaticStep(
            self._session, self._names, tensors, self._memory, self._vocab_size, graph
        )
