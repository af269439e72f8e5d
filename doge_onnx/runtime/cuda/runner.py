"""Runners whose state stays in the memory of a device.

Each does what its parent does, with tensors of a device in the place of NumPy's. What crosses at a
step of decoding is the ids and lengths of the sequences, or as many of the largest logits as a
sampler looks at. Does not know which device it is (`device_memory`).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from doge_onnx.manifest import Manifest
from doge_onnx.runtime.cuda.device_memory import DeviceMemory, Tensor, TopFinder
from doge_onnx.runtime.cuda.graph_replay import FixedStep, FixedSteps
from doge_onnx.runtime.cuda.lock import DeviceLock
from doge_onnx.runtime.engine.binding import last_position
from doge_onnx.runtime.engine.copying_runner import CopyingRunner
from doge_onnx.runtime.engine.device import CPU, ORDINARY_RUN
from doge_onnx.runtime.engine.growing_runner import InPlaceRunner, InPlaceSession, mask_columns
from doge_onnx.runtime.engine.io_names import (
    ATTENTION_MASK,
    INPUT_IDS,
    LOGITS,
    LOGITS_TO_KEEP,
    PAST_LENGTHS,
    past_names,
    present_names,
)
from doge_onnx.runtime.engine.padded_runner import PaddedState
from doge_onnx.runtime.engine.runner import DecodeSession, Scores, TopLogits
from doge_onnx.runtime.engine.session import has_logits_to_keep
from doge_onnx.runtime.engine.state import Buffer, State
from doge_onnx.runtime.engine.window_runner import WindowRunner

# Tokens that go through the graph at once: a device with its own memory is busy with many only.
CUDA_CHUNK = 2048
# Candidates beyond those that a sampler asked for, in case that some equal the last of them.
SPARE = 16


class CudaBinding:
    """A graph bound to state tensors of a device; takes the place of `InPlaceBinding`.

    ONNX Runtime copies an input from another memory when it is bound, and not when the graph
    runs: whatever changes on the host is bound again.

    Attributes:
        capacity: Rows of the tensors.
    """

    def __init__(
        self,
        session: ort.InferenceSession,
        names: Sequence[tuple[str, str]],
        tensors: Sequence[Tensor],
        memory: DeviceMemory,
        vocab_size: int,
    ) -> None:
        """Bind `tensors` to pairs of input and output names; they must outlive this."""
        self._session, self._memory, self._vocab_size = session, memory, vocab_size
        self._binding = session.io_binding()
        memory.bind_in_place(self._binding, names, tensors)
        self._batch, _, self.capacity, _ = tensors[0].shape
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
        array = array.copy()
        # Not bind_cpu_input, which takes no inputs that have a default.
        self._binding.bind_input(name, CPU, 0, np.int64, array.shape, array.ctypes.data)
        self._host[name] = array
        if name == INPUT_IDS:
            self._positions = array.shape

    @property
    def ids(self) -> Tensor:
        """int64 `[B, 1]` on the device: what the next runs feed, from the first use of this on."""
        if self._ids is None:
            self._ids = self._memory.empty((self._batch, 1), "int64")
            self._memory.bind_input(self._binding, INPUT_IDS, self._ids)
            self._positions = self._ids.shape
        return self._ids

    def put_lengths(self, lengths: NDArray[np.int64]) -> None:
        """Let the next run feed the tokens behind so many rows of each sequence."""
        self.put(PAST_LENGTHS, lengths)
        columns = mask_columns(int(lengths.max()) + 1, self.capacity)
        # The mask is the beginning of a tensor that was there before.
        if self._ones is None:
            self._ones = self._memory.ones(self._batch * self.capacity)
        mask = self._ones.reshaped(self._batch, columns)
        self._memory.bind_input(self._binding, ATTENTION_MASK, mask)

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
                self.put(LOGITS_TO_KEEP, np.array([keep], np.int64))
                self._kept = keep
            positions = 1 if last_only else positions
        shape = (batch, positions, self._vocab_size)
        if self._logits is None or self._logits.shape != shape:
            self._logits = self._memory.empty(shape, "float32")
            self._memory.bind_output(self._binding, LOGITS, self._logits)
        self._session.run_with_iobinding(self._binding, ORDINARY_RUN)
        return self._logits


class _DeviceState:
    """What the runners of a device share: where states are, and who may use the device.

    Args:
        session: With the inputs and outputs that the manifest implies.
        manifest: Of the bundle.
        memory: Where states are.
        capture: Whether the session may capture runs.
    """

    def __init__(
        self, session: ort.InferenceSession, manifest: Manifest, memory: DeviceMemory, capture: bool
    ) -> None:
        layout = manifest.state
        self.memory = memory
        self.lock = DeviceLock(few_threads=capture)
        # What there is in a row that holds nothing.
        self.zero = np.zeros(layout.row_size, np.float32)
        self._session, self._vocab_size = session, manifest.vocab_size
        past, present = past_names(layout.num_layers), present_names(layout.num_layers)
        self.names = list(zip(past, present, strict=True))
        self._layout = layout

    def bind(self, tensors: Sequence[Tensor]) -> CudaBinding:
        """What runs the graph on the tensors of a state."""
        return CudaBinding(self._session, self.names, tensors, self.memory, self._vocab_size)

    def no_rows(self, batch: int) -> Tensor:
        """A state tensor without rows."""
        shape = (batch, self._layout.num_heads, 0, self._layout.row_size)
        return self.memory.empty(shape, self._layout.dtype)


class CudaGrowingRunner(InPlaceRunner):
    """For graphs that extend their state in place; captures decode steps where that is asked.

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
        self._on_device = _DeviceState(session, manifest, memory, capture)
        self.lock = self._on_device.lock
        self._activations = manifest.activations
        # None until steps of fixed shapes were seen to be right.
        self._fixed: FixedSteps | None = None

    def feed(
        self,
        tokens: Sequence[NDArray[np.int64]],
        state: State | None,
        last_only: bool,
        consume: bool = False,
        most_tokens: int | None = None,
    ) -> tuple[list[NDArray[np.float32]], State]:
        """Feed each sequence of a batch its new tokens; see `Runner.feed`."""
        return self._on_device.lock.run(
            super().feed, tokens, state, last_only, consume, most_tokens
        )

    def bind(self, tensors: Sequence[Any]) -> CudaBinding:
        """What runs the graph on the tensors of a state."""
        return self._on_device.bind(tensors)

    def use_fixed_steps(self, capture: bool) -> str | None:
        """Run decode steps with fixed shapes from now on, if they are right here.

        Args:
            capture: Whether CUDA captures and replays them, if replays are right; the session must
                have been made for it.

        Returns:
            What is wrong, or None if nothing is; see `FixedSteps`.
        """
        steps = FixedSteps(self._session, self._names, self.memory, self.vocab_size, capture)
        # As large as the first buffer of a single text, which then finds its step captured.
        capacity = self._rounded_capacity(1)
        # A binding does not keep what it is bound to.
        state = self._zeros(1, capacity)
        binding = self.bind(state)

        def with_growing_mask(ids: NDArray[np.int64], past: int) -> NDArray[np.float32]:
            binding.put(INPUT_IDS, ids)
            binding.put(ATTENTION_MASK, np.ones((1, past + 1), np.int64))
            return binding.run(last_only=True)

        problem = steps.problem(self._zeros(1, capacity), with_growing_mask, self._activations)
        if problem is None:
            self._fixed, self.captures = steps, capture
        return problem

    def decode(self, state: State) -> DecodeSession:
        """Go on from `state`, which nobody will use again, one token at a time."""
        return _CudaSession(self, state)

    def bind_step(self, buffer: Buffer) -> CudaBinding | FixedStep:
        """What runs the graph on a buffer, one token at a time, for one user of it."""
        return self.bind(buffer.tensors) if self._fixed is None else self._fixed.of(buffer)

    def _capacity(self, rows: int, most: int | None) -> int:
        if not self.captures:
            return super()._capacity(rows, most)
        return self._rounded_capacity(rows)

    def _rounded_capacity(self, rows: int) -> int:
        """Of few sizes, so that what was captured can be used again; with room for a token."""
        return super()._capacity(max(rows, min(rows + 1, self._context_length)), None)

    def _new_buffer(
        self, past: Sequence[Any], batch: int, length: int, capacity: int, end: int
    ) -> Buffer:
        if past:
            # All rows of a buffer come along, since they lie between others; nothing reads them.
            capacity = max(capacity, past[0].shape[2])
        step = None if self._fixed is None else self._fixed.take(batch, capacity)
        if self._fixed is None or step is None:
            return super()._new_buffer(past, batch, length, capacity, end)
        # First of all, so that an interrupt loses nothing.
        buffer = Buffer(step.tensors, capacity, np.full(batch, end, np.int64))
        self._fixed.lend(step, buffer)
        # At the start of a text, what was there before does no harm: nothing reads it.
        for source, target in zip(past, step.tensors, strict=False):
            self.memory.extension(source, self._on_device.zero, target)()
        return buffer

    def _new_tensors(
        self, past: Sequence[Any], batch: int, length: int, capacity: int
    ) -> Sequence[Tensor]:
        try:
            more = [
                self.memory.extended(t, self._on_device.zero, capacity - t.shape[2]) for t in past
            ]
            return more or self._zeros(batch, capacity)
        # The exceptions of ONNX Runtime share no base class but this one.
        except Exception:
            if self._fixed is None or not self._fixed.let_go():
                raise
        # There may be room now.
        return self._new_tensors(past, batch, length, capacity)

    def _zeros(self, batch: int, capacity: int) -> list[Tensor]:
        none = self._on_device.no_rows(batch)
        return [self.memory.extended(none, self._on_device.zero, capacity) for _ in self._names]


class _CudaSession(InPlaceSession):
    """Leaves the logits where they are if it can.

    A sequence that has ended keeps its place, since shapes are fixed: it is fed, and writes, at
    the row behind its last one, again and again.
    """

    def __init__(self, runner: CudaGrowingRunner, state: State) -> None:
        super().__init__(runner, state)
        self._cuda = runner
        self._ids = np.zeros((state.batch_size, 1), np.int64)
        self._binding: CudaBinding | FixedStep | None = None
        self._finder: TopFinder | None = None
        self._count = 0
        # Whether the ids that come next are on the device already.
        self._chosen = False

    def step(self, token_ids: Sequence[int], top: int | None = None) -> Sequence[Scores]:
        """Feed the next token of each sequence; see `DecodeSession.step`."""
        self._ids[self.rows, 0] = token_ids
        return self._cuda.lock.run(self._step, top)

    def remove(self, rows: Collection[int]) -> None:
        """Let sequences leave; see `DecodeSession.remove`."""
        self.rows = [row for row in self.rows if row not in rows]

    def _step(self, top: int | None) -> Sequence[Scores]:
        before, buffer = self._buffer, self._make_room()
        if self._binding is None or buffer is not before:
            self._binding = self._cuda.bind_step(buffer)
            self._finder, self._chosen = None, False
        binding = self._binding
        binding.put_lengths(self._lengths)
        if not self._chosen:
            binding.ids.value.update_inplace(self._ids)
        logits = binding.run_on_device()
        self._lengths[self.rows] += 1
        self._longest = int(self._lengths.max())
        self._chosen = top == 1
        memory = self._cuda.memory
        if top is None:
            everything = memory.read(logits)
            return [everything[row, 0] for row in self.rows]
        finder = self._find(binding, logits, top)
        finder.run()
        if top == 1:
            zero, ids = np.zeros(1, np.float32), finder.read_ids()
            return [TopLogits(ids[row], zero) for row in self.rows]
        return self._candidates(logits, *finder.read(), top)

    def _find(self, binding: CudaBinding | FixedStep, logits: Tensor, top: int) -> TopFinder:
        count = 1 if top == 1 else min(top + SPARE, logits.shape[2])
        if self._finder is None or self._count != count:
            # A single one is what the next step feeds, and goes where that reads.
            ids = binding.ids if top == 1 else None
            self._finder, self._count = self._cuda.memory.top(logits, count, ids), count
        return self._finder

    def _candidates(
        self, logits: Tensor, ids: NDArray[np.int64], values: NDArray[np.float32], top: int
    ) -> Sequence[Scores]:
        """The largest of each sequence, with all that equal the last of those asked for."""
        memory, everything = self._cuda.memory, None
        scores: list[Scores] = []
        for row in self.rows:
            row_ids, row_values = ids[row], values[row]
            if len(row_ids) < logits.shape[2] and row_values[top - 1] == row_values[-1]:
                # There may be more of them.
                everything = memory.read(logits) if everything is None else everything
                scores.append(everything[row, 0])
                continue
            order = np.argsort(row_ids)
            scores.append(TopLogits(row_ids[order], row_values[order]))
        return scores


class CudaWindowRunner(WindowRunner):
    """For graphs with a state of constant size."""

    def __init__(
        self,
        session: ort.InferenceSession,
        manifest: Manifest,
        memory: DeviceMemory,
        chunk: int = CUDA_CHUNK,
    ) -> None:
        super().__init__(session, manifest, chunk)
        self.device, self.memory = memory.device, memory
        self._on_device = _DeviceState(session, manifest, memory, capture=False)

    def feed(
        self,
        tokens: Sequence[NDArray[np.int64]],
        state: State | None,
        last_only: bool,
        consume: bool = False,
        most_tokens: int | None = None,
    ) -> tuple[list[NDArray[np.float32]], State]:
        """Feed each sequence of a batch its new tokens; see `Runner.feed`."""
        return self._on_device.lock.run(
            super().feed, tokens, state, last_only, consume, most_tokens
        )

    def bind(self, tensors: Sequence[Any]) -> CudaBinding:
        """What runs the graph on the tensors of a state."""
        return self._on_device.bind(tensors)

    def _new_tensors(self, state: PaddedState | None, batch: int, capacity: int) -> list[Any]:
        zero = self._on_device.zero
        closed = zero.copy()
        closed[list(self._closing.channels)] = self._closing.value
        past = [self._on_device.no_rows(batch)] * len(self._names)
        if state is not None:
            past = list(state.buffer.tensors)
        free = [closed, zero] * (len(past) // 2)
        return [
            self.memory.extended(tensor, row, capacity - tensor.shape[2])
            for tensor, row in zip(past, free, strict=True)
        ]


class CudaCopyingRunner(CopyingRunner):
    """For graphs of standard operators."""

    def __init__(
        self,
        session: ort.InferenceSession,
        manifest: Manifest,
        memory: DeviceMemory,
        chunk: int = CUDA_CHUNK,
    ) -> None:
        super().__init__(session, manifest, chunk)
        self.device, self.memory = memory.device, memory
        self._on_device = _DeviceState(session, manifest, memory, capture=False)

    def feed(
        self,
        tokens: Sequence[NDArray[np.int64]],
        state: State | None,
        last_only: bool,
        consume: bool = False,
        most_tokens: int | None = None,
    ) -> tuple[list[NDArray[np.float32]], State]:
        """Feed each sequence of a batch its new tokens; see `Runner.feed`."""
        return self._on_device.lock.run(
            super().feed, tokens, state, last_only, consume, most_tokens
        )

    def rewind(self, state: State, length: int) -> State | None:
        """Not here: the rows would have to cross; see `Runner.rewind`."""
        return None

    def _empty(self, batch: int) -> ort.OrtValue:
        return self._on_device.no_rows(batch).value

    def _run_graph(
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
