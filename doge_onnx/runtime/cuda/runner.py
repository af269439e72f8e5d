"""Runners that keep the state in the memory of a GPU.

Knows, for each runner of `engine`, how to do the same with tensors on a device in place of NumPy
arrays. A decode step copies only ids and lengths to the device, and back only as many of the
largest logits as the sampler needs. Does not know how to allocate on a device (`device_memory`) or
how steps are captured (`graph_replay`).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Protocol

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from doge_onnx.manifest import Manifest
from doge_onnx.runtime.cuda.device_memory import DeviceMemory, DeviceTensor, DeviceTopK
from doge_onnx.runtime.cuda.executor import DeviceExecutor
from doge_onnx.runtime.cuda.graph_replay import StaticStepPool
from doge_onnx.runtime.engine.binding import last_positions
from doge_onnx.runtime.engine.copying_runner import CopyingRunner
from doge_onnx.runtime.engine.device import CPU, ORDINARY_RUN
from doge_onnx.runtime.engine.growing_runner import InPlaceRunner, InPlaceSession, mask_columns
from doge_onnx.runtime.engine.io_names import (
    ATTENTION_MASK,
    INPUT_IDS,
    LOGITS,
    LOGITS_TO_KEEP,
    PAST_LENGTHS,
)
from doge_onnx.runtime.engine.padded_runner import PaddedState
from doge_onnx.runtime.engine.runner import DecodeSession, PositionLogits, TopLogits
from doge_onnx.runtime.engine.session import has_logits_to_keep
from doge_onnx.runtime.engine.state import Buffer, State
from doge_onnx.runtime.engine.window_runner import WindowRunner

# Most tokens of a prompt in one run of the graph: a GPU is only busy with many at once.
CUDA_CHUNK = 2048
# Logits read beyond the number that a sampler asked for, in case some equal the last of those.
EXTRA_CANDIDATES = 16


class CudaBinding:
    """The graph, bound to state tensors on a device; takes the place of `InPlaceBinding`.

    ONNX Runtime copies an input from host memory when it is bound, and not when the graph runs. So
    an input on the host is bound again whenever its value changes.

    Attributes:
        capacity: Rows of the state's tensors.
    """

    def __init__(
        self,
        session: ort.InferenceSession,
        names: Sequence[tuple[str, str]],
        tensors: Sequence[DeviceTensor],
        memory: DeviceMemory,
        vocab_size: int,
    ) -> None:
        """Bind the tensors of a state, which must outlive the binding.

        Args:
            session: Runs the graph.
            names: Name of the input and of the output for each tensor.
            tensors: The state, each `[B, H, capacity, row]`.
            memory: Memory of the device.
            vocab_size: V, the size of the last axis of the logits.
        """
        self._session, self._memory, self._vocab_size = session, memory, vocab_size
        self._binding = session.io_binding()
        memory.bind_in_place(self._binding, names, tensors)
        self._batch, _, self.capacity, _ = tensors[0].shape
        self._ids: DeviceTensor | None = None
        # Inputs on the host, which must live as long as they are bound.
        self._host: dict[str, NDArray[np.int64]] = {}
        self._ones: DeviceTensor | None = None
        self._logits: DeviceTensor | None = None
        self._positions: tuple[int, ...] = (0, 0)
        self._keeps = has_logits_to_keep(session)
        self._kept = -1

    def put(self, name: str, array: NDArray[np.int64]) -> None:
        """Set an input for the next runs to a copy of `array`."""
        array = array.copy()
        # Not bind_cpu_input, which refuses inputs that have a default.
        self._binding.bind_input(name, CPU, 0, np.int64, array.shape, array.ctypes.data)
        self._host[name] = array
        if name == INPUT_IDS:
            self._positions = array.shape

    @property
    def ids(self) -> DeviceTensor:
        """The tokens to feed, int64 `[B, 1]` on the device; the first use binds them as input."""
        if self._ids is None:
            self._ids = self._memory.empty((self._batch, 1), "int64")
            self._memory.bind_input(self._binding, INPUT_IDS, self._ids)
            self._positions = self._ids.shape
        return self._ids

    def put_lengths(self, lengths: NDArray[np.int64]) -> None:
        """Set how many rows of the state each sequence has before the next run, int64 `[B]`."""
        self.put(PAST_LENGTHS, lengths)
        columns = mask_columns(int(lengths.max()) + 1, self.capacity)
        # The mask is the beginning of a tensor of ones that is made once.
        if self._ones is None:
            self._ones = self._memory.ones(self._batch * self.capacity)
        mask = self._ones.reshaped(self._batch, columns)
        self._memory.bind_input(self._binding, ATTENTION_MASK, mask)

    def run(self, keep: int) -> NDArray[np.float32]:
        """Run the graph for the bound tokens; see `Binding.run`."""
        logits: NDArray[np.float32] = self._memory.read(self.run_on_device(keep))
        return last_positions(logits, keep)

    def run_on_device(self, keep: int = 1) -> DeviceTensor:
        """Run the graph; returns logits on the device, which the next run overwrites.

        Args:
            keep: Number of last positions to compute logits for, if the graph can; 0 for all.

        Returns:
            float32 `[B, keep or S, V]`.
        """
        batch, positions = self._positions
        if self._keeps:
            if keep != self._kept:
                self.put(LOGITS_TO_KEEP, np.array([keep], np.int64))
                self._kept = keep
            positions = keep or positions
        shape = (batch, positions, self._vocab_size)
        if self._logits is None or self._logits.shape != shape:
            self._logits = self._memory.empty(shape, "float32")
            self._memory.bind_output(self._binding, LOGITS, self._logits)
        self._session.run_with_iobinding(self._binding, ORDINARY_RUN)
        return self._logits


class DeviceContext:
    """What all runners of a GPU share: memory for states, the device's executor, and bindings.

    Args:
        session: Has the inputs and outputs that the manifest implies.
        manifest: The bundle's.
        names: Input and output of each tensor of the state.
        memory: Memory of the device.
        capture: Whether the session may capture runs.
    """

    def __init__(
        self,
        session: ort.InferenceSession,
        manifest: Manifest,
        names: Sequence[tuple[str, str]],
        memory: DeviceMemory,
        capture: bool = False,
    ) -> None:
        self.memory = memory
        self.executor = DeviceExecutor(few_threads=capture)
        # An empty row.
        self.zero = np.zeros(manifest.state.row_size, np.float32)
        self._session, self._names, self._vocab_size = session, names, manifest.vocab_size
        self._layout = manifest.state

    def bind(self, tensors: Sequence[DeviceTensor]) -> CudaBinding:
        """Bind the graph to the tensors of a state."""
        return CudaBinding(self._session, self._names, tensors, self.memory, self._vocab_size)

    def no_rows(self, batch: int) -> DeviceTensor:
        """A state tensor without rows, `[batch, heads, 0, row]`."""
        shape = (batch, self._layout.num_heads, 0, self._layout.row_size)
        return self.memory.empty(shape, self._layout.dtype)


class DecodeBinding(Protocol):
    """The graph, bound to the buffer of a decode session: `CudaBinding` or `StaticStep`."""

    @property
    def ids(self) -> DeviceTensor:
        """int64 `[B, 1]` on the device: the tokens of the next run."""

    def put_lengths(self, lengths: NDArray[np.int64]) -> None:
        """Set how many rows of each sequence come before the tokens of the next run."""

    def run_on_device(self) -> DeviceTensor:
        """Run the graph; returns logits `[B, 1, V]`, which the next run overwrites."""


class CudaGrowingRunner(InPlaceRunner[DeviceTensor]):
    """Runs graphs that extend their state in place; can capture decode steps.

    Args:
        session: Has the inputs and outputs that the manifest implies.
        manifest: The bundle's.
        memory: Memory of the device.
        chunk: Most tokens of a sequence in one run of the graph.
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
        self._context = DeviceContext(session, manifest, self._names, memory, capture)
        self.executor = self._context.executor
        self._activations = manifest.activations
        # None until a check has shown that steps of fixed shapes are right here.
        self._static_steps: StaticStepPool | None = None

    def bind(self, tensors: Sequence[DeviceTensor]) -> CudaBinding:
        """Bind the graph to the tensors of a state."""
        return self._context.bind(tensors)

    def use_static_steps(self, capture: bool) -> str | None:
        """Run decode steps with fixed shapes from now on, if a check finds them right here.

        Args:
            capture: Whether CUDA captures and replays them; the session must have been opened for
                it.

        Returns:
            What the check found wrong, or None; see `StaticStepPool.find_problem`.
        """
        steps = StaticStepPool(self._session, self._names, self.memory, self.vocab_size, capture)
        # The shape of the first buffer of a single sequence, which can then use the captured step.
        capacity = self._rounded_capacity(1)
        # Kept in a variable, because a binding does not keep its tensors alive.
        state = self._zeros(1, capacity)
        binding = self.bind(state)

        def with_growing_mask(ids: NDArray[np.int64], past: int) -> NDArray[np.float32]:
            binding.put(INPUT_IDS, ids)
            binding.put(ATTENTION_MASK, np.ones((1, past + 1), np.int64))
            return binding.run(keep=1)

        problem = steps.find_problem(self._zeros(1, capacity), with_growing_mask, self._activations)
        if problem is None:
            self._static_steps, self.captures = steps, capture
        return problem

    def decode(self, state: State) -> DecodeSession:
        """Start a decode session; see `Runner.decode`."""
        return _CudaSession(self, state)

    def bind_step(self, buffer: Buffer[DeviceTensor]) -> DecodeBinding:
        """Bind the graph to a buffer for decode steps; only one session may use the result."""
        return (
            self.bind(buffer.tensors)
            if self._static_steps is None
            else self._static_steps.get(buffer)
        )

    def _capacity(self, rows: int, most: int | None) -> int:
        if not self.captures:
            return super()._capacity(rows, most)
        return self._rounded_capacity(rows)

    def _rounded_capacity(self, rows: int) -> int:
        """Capacity of a new buffer with room for a token: one of few, to match captured steps."""
        return super()._capacity(max(rows, min(rows + 1, self._context_length)), None)

    def _new_buffer(
        self, past: Sequence[DeviceTensor], batch: int, length: int, capacity: int, end: int
    ) -> Buffer[DeviceTensor]:
        if past:
            # The copy takes all rows of the past, also the unused rows between two sequences.
            capacity = max(capacity, past[0].shape[2])
        step = None if self._static_steps is None else self._static_steps.take(batch, capacity)
        if self._static_steps is None or step is None:
            return super()._new_buffer(past, batch, length, capacity, end)
        # Lent before anything else, so that an interrupt does not lose the step.
        buffer = Buffer(step.tensors, capacity, np.full(batch, end, np.int64))
        self._static_steps.lend(step, buffer)
        # Without a past, old rows may stay in the buffer: the graph does not read them.
        for source, target in zip(past, step.tensors, strict=False):
            self.memory.extension(source, self._context.zero, target)()
        return buffer

    def _new_tensors(
        self, past: Sequence[DeviceTensor], batch: int, length: int, capacity: int
    ) -> Sequence[DeviceTensor]:
        try:
            more = [
                self.memory.extended(t, self._context.zero, capacity - t.shape[2]) for t in past
            ]
            return more or self._zeros(batch, capacity)
        # ONNX Runtime's exceptions have no other base class in common.
        except Exception:
            if self._static_steps is None or not self._static_steps.drop_free():
                raise
        # Dropping free steps may have made room.
        return self._new_tensors(past, batch, length, capacity)

    def _zeros(self, batch: int, capacity: int) -> list[DeviceTensor]:
        none = self._context.no_rows(batch)
        return [self.memory.extended(none, self._context.zero, capacity) for _ in self._names]


class _CudaSession(InPlaceSession[CudaGrowingRunner]):
    """A decode session that leaves the logits on the device if it can.

    Shapes are fixed, so a sequence that has ended keeps its place: each step feeds it a token and
    writes that token's row after the sequence's last one, always over the same row.
    """

    def __init__(self, runner: CudaGrowingRunner, state: State) -> None:
        super().__init__(runner, state)
        self._ids = np.zeros((state.batch_size, 1), np.int64)
        self._binding: DecodeBinding | None = None
        self._top_k: DeviceTopK | None = None
        self._count = 0
        # Whether the device holds the ids of the next step already.
        self._chosen = False

    def step(self, token_ids: Sequence[int], top: int | None = None) -> Sequence[PositionLogits]:
        """Feed the next token of each sequence; see `DecodeSession.step`."""
        self._ids[self.rows, 0] = token_ids
        return self._runner.executor.run(self._step, top)

    def remove(self, rows: Collection[int]) -> None:
        """Remove sequences; see `DecodeSession.remove`."""
        self.rows = [row for row in self.rows if row not in rows]

    def _step(self, top: int | None) -> Sequence[PositionLogits]:
        before, buffer = self._buffer, self._make_room()
        if self._binding is None or buffer is not before:
            self._binding = self._runner.bind_step(buffer)
            self._top_k, self._chosen = None, False
        binding = self._binding
        binding.put_lengths(self._lengths)
        if not self._chosen:
            binding.ids.value.update_inplace(self._ids)
        logits = binding.run_on_device()
        self._lengths[self.rows] += 1
        self._longest = int(self._lengths.max())
        self._chosen = top == 1
        memory = self._runner.memory
        if top is None:
            everything = memory.read(logits)
            return [everything[row, 0] for row in self.rows]
        top_k = self._prepare_top_k(binding, logits, top)
        top_k.run()
        if top == 1:
            zero, ids = np.zeros(1, np.float32), top_k.read_ids()
            return [TopLogits(ids[row], zero) for row in self.rows]
        return self._candidates(logits, *top_k.read(), top)

    def _prepare_top_k(self, binding: DecodeBinding, logits: DeviceTensor, top: int) -> DeviceTopK:
        count = 1 if top == 1 else min(top + EXTRA_CANDIDATES, logits.shape[2])
        if self._top_k is None or self._count != count:
            # The single most likely token is fed next, so it is written to the input directly.
            ids = binding.ids if top == 1 else None
            self._top_k, self._count = self._runner.memory.top_k(logits, count, ids), count
        return self._top_k

    def _candidates(
        self, logits: DeviceTensor, ids: NDArray[np.int64], values: NDArray[np.float32], top: int
    ) -> Sequence[PositionLogits]:
        """The `top` largest logits of each sequence, and all that equal the smallest of them.

        Args:
            logits: float32 `[B, 1, V]` on the device.
            ids: Token ids of the largest logits, int64 `[B, count]`, count >= `top`.
            values: Their logits, float32 `[B, count]`, largest first.
            top: How many the caller asked for.
        """
        memory, everything = self._runner.memory, None
        scores: list[PositionLogits] = []
        for row in self.rows:
            row_ids, row_values = ids[row], values[row]
            if len(row_ids) < logits.shape[2] and row_values[top - 1] == row_values[-1]:
                # Even more logits may equal the smallest one.
                everything = memory.read(logits) if everything is None else everything
                scores.append(everything[row, 0])
                continue
            order = np.argsort(row_ids)
            scores.append(TopLogits(row_ids[order], row_values[order]))
        return scores


class CudaWindowRunner(WindowRunner):
    """Runs graphs with a state of bounded size."""

    def __init__(
        self,
        session: ort.InferenceSession,
        manifest: Manifest,
        memory: DeviceMemory,
        chunk: int = CUDA_CHUNK,
    ) -> None:
        super().__init__(session, manifest, chunk)
        self.device, self.memory = memory.device, memory
        self._context = DeviceContext(session, manifest, self._names, memory)
        self.executor = self._context.executor

    def bind(self, tensors: Sequence[Any]) -> CudaBinding:
        """Bind the graph to the tensors of a state."""
        return self._context.bind(tensors)

    def _new_tensors(self, state: PaddedState | None, batch: int, capacity: int) -> list[Any]:
        zero = self._context.zero
        closed = zero.copy()
        closed[list(self._closing.channels)] = self._closing.value
        past = [self._context.no_rows(batch)] * len(self._names)
        if state is not None:
            past = list(state.buffer.tensors)
        free = [closed, zero] * (len(past) // 2)
        return [
            self.memory.extended(tensor, row, capacity - tensor.shape[2])
            for tensor, row in zip(past, free, strict=True)
        ]


class CudaCopyingRunner(CopyingRunner):
    """Runs graphs of standard operators."""

    def __init__(
        self,
        session: ort.InferenceSession,
        manifest: Manifest,
        memory: DeviceMemory,
        chunk: int = CUDA_CHUNK,
    ) -> None:
        super().__init__(session, manifest, chunk)
        self.device, self.memory = memory.device, memory
        self._context = DeviceContext(session, manifest, self._names, memory)
        self.executor = self._context.executor

    def rewind(self, state: State, length: int) -> State | None:
        """None: the rows would have to be copied to the host and back; see `Runner.rewind`."""
        return None

    def _empty(self, batch: int) -> ort.OrtValue:
        return self._context.no_rows(batch).value

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
