"""Steps whose state stays in the memory of a device.

Each class does what its parent does, with tensors of a device in the place of NumPy's. What
crosses at a step of decoding is the ids of the tokens, or as many of the best candidates as a
sampler looks at. Does not know which device it is (`memory`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from doge_onnx.bundle import Manifest
from doge_onnx.runtime.cuda.device_memory import Best as BestFinder
from doge_onnx.runtime.cuda.device_memory import DeviceMemory, Tensor
from doge_onnx.runtime.cuda.graph_replay import FixedStep, FixedSteps
from doge_onnx.runtime.cuda.lock import DeviceLock
from doge_onnx.runtime.engine.binding import last_position
from doge_onnx.runtime.engine.device import CPU, ORDINARY_RUN
from doge_onnx.runtime.engine.growing_runner import BufferSession, CopyingRunner, GrowingRunner
from doge_onnx.runtime.engine.runner import Best, DecodeSession, Runner
from doge_onnx.runtime.engine.session import (
    ATTENTION_MASK,
    INPUT_IDS,
    LOGITS,
    LOGITS_TO_KEEP,
    has_logits_to_keep,
    has_past_length,
)
from doge_onnx.runtime.engine.state import Buffer, State
from doge_onnx.runtime.engine.window_runner import WindowRunner

# Tokens that go through the graph at once: a device with its own memory is busy with many only.
CUDA_CHUNK = 2048
# Candidates beyond those that a sampler asked for, in case that some equal the last of them.
_SPARE = 16


class CudaBinding:
    """A graph bound to state tensors of a device; takes the place of `InPlaceBinding`.

    ONNX Runtime copies an input from another memory when it is bound, and not when the graph
    runs: whatever changes on the host is bound again.
    """

    def __init__(
        self,
        session: ort.InferenceSession,
        names: Sequence[tuple[str, str]],
        tensors: Sequence[Tensor],
        mask: NDArray[np.int64],
        memory: DeviceMemory,
        vocab_size: int,
    ) -> None:
        """Bind `tensors` to pairs of input and output names; they must outlive this."""
        self._session, self._memory, self._vocab_size = session, memory, vocab_size
        self._binding = session.io_binding()
        memory.bind_in_place(self._binding, names, tensors)
        self._mask = mask
        self._ids: Tensor | None = None
        # What is bound on the host must live as long.
        self._host: dict[str, NDArray[np.int64]] = {}
        self._ones: Tensor | None = None
        self._logits: Tensor | None = None
        self._positions: tuple[int, ...] = (0, 0)
        self._keeps = has_logits_to_keep(session)
        self._kept = -1

    def put(self, name: str, array: NDArray[np.int64]) -> None:
        """Give an input a value; `array` itself is only read now."""
        self._put(name, array.copy())
        if name == INPUT_IDS:
            self._positions = array.shape

    def _put(self, name: str, array: NDArray[np.int64]) -> None:
        # Not bind_cpu_input, which takes no inputs that have a default.
        self._binding.bind_input(name, CPU, 0, np.int64, array.shape, array.ctypes.data)
        self._host[name] = array

    @property
    def ids(self) -> Tensor:
        """int64 `[B, 1]` on the device: what the next runs feed, from the first use of this on."""
        if self._ids is None:
            self._ids = self._memory.empty((len(self._mask), 1), "int64")
            self._memory.bind_input(self._binding, INPUT_IDS, self._ids)
            self._positions = self._ids.shape
        return self._ids

    def bind_mask(self, length: int) -> None:
        """Give the graph the mask of the first `length` tokens."""
        mask = self._mask[:, :length]
        if not mask.all():
            self._put(ATTENTION_MASK, np.array(mask, order="C"))
            return
        # Without padding, it is the beginning of a tensor that was there before.
        if self._ones is None:
            self._ones = self._memory.ones(self._mask.size)
        ones = self._ones.reshaped(len(mask), length)
        self._memory.bind_input(self._binding, ATTENTION_MASK, ones)

    def run(self, last_only: bool) -> NDArray[np.float32]:
        """Run the graph for the tokens that are bound; see `InPlaceBinding.run`."""
        logits: NDArray[np.float32] = self._memory.read(self.run_on_device(last_only))
        return last_position(logits) if last_only else logits

    def run_on_device(self, last_only: bool = True) -> Tensor:
        """Run the graph; logits `[B, 1, V]` or `[B, S, V]` that the next run overwrites."""
        batch, positions = self._positions
        if self._keeps:
            keep = 1 if last_only else 0
            if keep != self._kept:
                self._put(LOGITS_TO_KEEP, np.array([keep], np.int64))
                self._kept = keep
            positions = 1 if last_only else positions
        shape = (batch, positions, self._vocab_size)
        if self._logits is None or self._logits.shape != shape:
            self._logits = self._memory.empty(shape, "float32")
            self._memory.bind_output(self._binding, LOGITS, self._logits)
        self._session.run_with_iobinding(self._binding, ORDINARY_RUN)
        return self._logits


class _CudaRunner(Runner):
    """What the runners of a device have in common: one of them runs at a time.

    Args:
        session: With the inputs and outputs that the manifest implies.
        manifest: Of the bundle.
        memory: Where states are.
        chunk: Most tokens of a sequence that go through the graph at once.
        capture: Whether the session may capture runs.
    """

    def __init__(
        self,
        session: ort.InferenceSession,
        manifest: Manifest,
        memory: DeviceMemory,
        chunk: int = CUDA_CHUNK,
        capture: bool = False,
    ) -> None:
        super().__init__(session, manifest, chunk)
        self.device, self.memory = memory.device, memory
        self.lock = DeviceLock(few_threads=capture)
        # What there is in a row that holds nothing.
        self._zero = np.zeros(self._row_shape[1], np.float32)

    def step(self, *args: Any, **options: Any) -> tuple[NDArray[np.float32], State]:
        """Feed new tokens; see `Runner.step`."""
        return self.lock.run(super().step, *args, **options)

    def _bind(self, tensors: Sequence[Any], mask: NDArray[np.int64]) -> CudaBinding:
        return CudaBinding(self._session, self._names, tensors, mask, self.memory, self.vocab_size)

    def _no_rows(self, batch: int) -> Tensor:
        """A state tensor without rows."""
        heads, row_size = self._row_shape
        return self.memory.empty((batch, heads, 0, row_size), self._dtype)


class CudaGrowingRunner(_CudaRunner, GrowingRunner):
    """For graphs whose past and present are one buffer; captures decode steps where that is asked.

    The arguments are those of `_CudaRunner`.
    """

    def __init__(
        self,
        session: ort.InferenceSession,
        manifest: Manifest,
        memory: DeviceMemory,
        chunk: int = CUDA_CHUNK,
        capture: bool = False,
    ) -> None:
        super().__init__(session, manifest, memory, chunk, capture)
        self._activations = manifest.activations
        # None where the graph finds lengths in shapes only.
        self._fixed: FixedSteps | None = None
        if has_past_length(session):
            self._fixed = FixedSteps(session, self._names, memory, self.vocab_size, capture)
            self.captures = capture

    def check_fixed_steps(self) -> str | None:
        """Use steps of fixed shapes from now on only if they are right here, and replays of them.

        Returns:
            What is wrong, or None if nothing is; see `FixedSteps`.
        """
        if self._fixed is None:
            return "its graph takes lengths from shapes; export it again"
        # As large as the first buffer of a single text, which then finds its step captured.
        capacity = self._capacity(1, None)
        mask = np.ones((1, capacity), np.int64)
        mask[0, 1] = 0
        # A binding does not keep what it is bound to.
        state = self._zeros(1, capacity)
        binding = self._bind(state, mask)

        def growing(ids: NDArray[np.int64], length: int) -> NDArray[np.float32]:
            binding.put(INPUT_IDS, ids)
            binding.bind_mask(length)
            return binding.run(last_only=True)

        problem = self._fixed.problem(self._zeros(1, capacity), mask, growing, self._activations)
        if problem is not None:
            self._fixed, self.captures = None, False
        return problem

    def claim(self, state: State | None, batch: int, end: int, capacity: int) -> Buffer:
        """See `GrowingRunner.claim`."""
        if state is not None:
            # All rows of its buffer come along, since they lie between others; nothing reads them.
            capacity = max(capacity, state.buffer.capacity)
        return super().claim(state, batch, end, capacity)

    def decoder(self, state: State) -> DecodeSession:
        """Go on from `state`, which nobody will use again, one token at a time."""
        return _CudaSession(self, state)

    def new_binding(self, buffer: Buffer) -> CudaBinding | FixedStep:
        """What runs the graph on a buffer, one token at a time, for one user of it."""
        if self._fixed is None:
            return self._bind(buffer.tensors, buffer.mask)
        step = self._fixed.of(buffer)
        step.follow(buffer.mask)
        return step

    def _capacity(self, rows: int, follow: int | None) -> int:
        if not self.captures:
            return super()._capacity(rows, follow)
        # Of few sizes, so that what was captured can be used again; with room for a token.
        return super()._capacity(max(rows, min(rows + 1, self._most_rows)), None)

    def _new_buffer(self, state: State | None, mask: NDArray[np.int64], rows: int) -> Buffer:
        batch, capacity = mask.shape
        past = [] if state is None else state.buffer.tensors
        step = None if self._fixed is None else self._fixed.take(batch, capacity)
        if self._fixed is None or step is None:
            return Buffer(self._new_tensors(past, batch, capacity), mask, rows)
        # First of all, so that an interrupt loses nothing.
        buffer = Buffer(step.tensors, mask, rows)
        self._fixed.lend(step, buffer)
        # At the start of a text, what was there before does no harm: nothing reads it.
        for source, target in zip(past, step.tensors, strict=False):
            self.memory.extension(source, self._zero, target)()
        return buffer

    def _new_tensors(self, past: Sequence[Tensor], batch: int, capacity: int) -> list[Tensor]:
        """Tensors of so many rows that begin with those of the past, if there is one."""
        try:
            more = [self.memory.extended(t, self._zero, capacity - t.shape[2]) for t in past]
            return more or self._zeros(batch, capacity)
        # The exceptions of ONNX Runtime share no base class but this one.
        except Exception:
            if self._fixed is None or not self._fixed.let_go():
                raise
        # There may be room now.
        return self._new_tensors(past, batch, capacity)

    def _zeros(self, batch: int, capacity: int) -> list[Tensor]:
        none = self._no_rows(batch)
        return [self.memory.extended(none, self._zero, capacity) for _ in self._names]


class _CudaSession(BufferSession):
    """Leaves the logits where they are if it can."""

    def __init__(self, runner: CudaGrowingRunner, state: State) -> None:
        super().__init__(runner, state)
        self._resident = runner
        self._finder: BestFinder | None = None
        self._count = 0
        # Whether the ids that come next are on the device already.
        self._chosen = False

    def step(
        self, mask: NDArray[np.int64] | None, best: int | None = None
    ) -> Sequence[NDArray[np.float32] | Best]:
        """Feed `tokens`; see `DecodeSession.step`."""
        return self._resident.lock.run(self._step, mask, best)

    def _step(
        self, mask: NDArray[np.int64] | None, best: int | None
    ) -> Sequence[NDArray[np.float32] | Best]:
        self._advance(mask)
        if not self._chosen:
            self._binding.ids.value.update_inplace(self.tokens)
        logits = self._binding.run_on_device()
        self._chosen = best == 1
        if best is None:
            return list(self._resident.memory.read(logits)[:, 0])
        finder = self._find(logits, best)
        finder.run()
        if best == 1:
            zero = np.zeros(1, np.float32)
            return [Best(ids, zero) for ids in finder.read_ids()]
        return self._candidates(logits, *finder.read(), best)

    def _find(self, logits: Tensor, best: int) -> BestFinder:
        count = 1 if best == 1 else min(best + _SPARE, logits.shape[2])
        if self._finder is None or self._count != count:
            # A single one is what the next step feeds, and goes where that reads.
            ids = self._binding.ids if best == 1 else None
            self._finder, self._count = self._resident.memory.best(logits, count, ids), count
        return self._finder

    def _candidates(
        self, logits: Tensor, ids: NDArray[np.int64], values: NDArray[np.float32], best: int
    ) -> Sequence[NDArray[np.float32] | Best]:
        """The best of each sequence, with all that equal the last of those asked for."""
        memory, everything = self._resident.memory, None
        scores: list[NDArray[np.float32] | Best] = []
        for row, (row_ids, row_values) in enumerate(zip(ids, values, strict=True)):
            if len(row_ids) < logits.shape[2] and row_values[best - 1] == row_values[-1]:
                # There may be more of them.
                everything = memory.read(logits) if everything is None else everything
                scores.append(everything[row, 0])
                continue
            order = np.argsort(row_ids)
            scores.append(Best(row_ids[order], row_values[order]))
        return scores

    def _bind(self, buffer: Buffer) -> None:
        # Not the one that all who use the buffer share: logits and ids of this are its own.
        self._binding = self._resident.new_binding(buffer)
        self._finder, self._chosen = None, False


class CudaWindowRunner(_CudaRunner, WindowRunner):
    """For graphs with a state of constant size."""

    def _allocate(self, state: State | None, batch: int, rows: int, capacity: int) -> list[Any]:
        closed = self._zero.copy()
        closed[list(self._closing.channels)] = self._closing.value
        if state is None:
            past = [self._no_rows(batch)] * len(self._names)
        else:
            past = list(state.buffer.tensors)
        free = [closed, self._zero] * (len(past) // 2)
        return [
            self.memory.extended(tensor, row, capacity - rows)
            for tensor, row in zip(past, free, strict=True)
        ]


class CudaCopyingRunner(_CudaRunner, CopyingRunner):
    """For graphs of standard operators."""

    def rewind(self, state: State, length: int) -> State | None:
        """Not here: the rows would have to cross; see `Runner.rewind`."""
        return None

    def _empty(self, batch: int) -> ort.OrtValue:
        return self._no_rows(batch).value

    def _feed(
        self, feeds: dict[str, NDArray[np.int64]], past: Sequence[ort.OrtValue]
    ) -> tuple[NDArray[np.float32], Sequence[ort.OrtValue]]:
        binding = self._session.io_binding()
        for name, array in feeds.items():
            binding.bind_cpu_input(name, array)
        for name, value in zip(self._past, past, strict=True):
            binding.bind_ortvalue_input(name, value)
        for name in self._outputs:
            binding.bind_output(name, self.device, 0)
        self._session.run_with_iobinding(binding)
        logits, *present = binding.get_outputs()
        return logits.numpy(), present
