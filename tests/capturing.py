"""A session of the CPU that stands for one of CUDA that captures runs.

A session of the CPU captures nothing and ignores who asks for it. This one also remembers what it
was asked for, and can have faults.
"""

from __future__ import annotations

import ctypes
import math
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from runners import PassingSession, model_on, on_device

from doge_onnx.runtime.cuda.executor import PROCESS_LOCK
from doge_onnx.runtime.engine.io_names import INPUT_IDS, PAST_LENGTHS


class Binding:
    """A binding that remembers where its inputs are."""

    def __init__(self, binding):
        self.real = binding
        self.inputs: dict[str, tuple[tuple[int, ...], int]] = {}

    def __getattr__(self, name):
        return getattr(self.real, name)

    def bind_input(self, name, *where):
        *_, shape, address = where
        self.inputs[name] = tuple(shape), address
        self.real.bind_input(name, *where)

    def of(self, name):
        """An input of whole numbers, which may be written."""
        shape, address = self.inputs[name]
        size = math.prod(shape)
        return np.ctypeslib.as_array((ctypes.c_int64 * size).from_address(address)).reshape(shape)


class Capturing(PassingSession):
    """A session of the CPU that captures runs as CUDA would, with a fault of choice.

    Attributes:
        runs: The graph id of each run; -1 for ordinary ones.
        lengths: What each run was told of its rows, where it was.
        places: Where the state of each run was.
        threads: Which threads ran it.
    """

    def __init__(self, path, fault=None):
        super().__init__(path)
        self.fault = fault
        self.runs: list[int] = []
        self.lengths: list[list[int]] = []
        self.places: list[int] = []
        self.threads: set[int] = set()
        self._captured: dict[int, list[np.ndarray]] = {}
        self._other = ThreadPoolExecutor(1)

    def io_binding(self):
        return Binding(self.session.io_binding())

    def run_with_iobinding(self, binding, options):
        assert not self._other.submit(PROCESS_LOCK.acquire, blocking=False).result()
        self.threads.add(threading.get_ident())
        number = int(options.get_run_config_entry("gpu_graph_id"))
        self.runs.append(number)
        self.places.append(binding.inputs["past_key_values.0.key"][1])
        inputs = [binding.of(name) for name in (INPUT_IDS, PAST_LENGTHS) if name in binding.inputs]
        kept = [array.copy() for array in inputs]
        if len(inputs) == 2:
            self.lengths.append(kept[1].tolist())
        if number == -1:
            if self.fault == "loses a row" and len(inputs) == 2:
                inputs[1][:] = np.maximum(kept[1] - 1, 0)
        elif self.fault == "raises":
            raise RuntimeError("x CUDA failure 901: operation failed ; GPU=0")
        elif self.fault == "out of memory":
            raise RuntimeError("Failed to allocate memory")
        elif self.fault == "does nothing" and number in self._captured:
            return
        else:
            captured = self._captured.setdefault(number, kept)
            # As if they had been numbers of the host.
            for fault, array, values in zip(
                ("captures ids", "captures lengths"), inputs, captured, strict=True
            ):
                if self.fault == fault:
                    array[:] = values
        self.session.run_with_iobinding(binding.real)
        for array, values in zip(inputs, kept, strict=True):
            array[:] = values


def capturing(path):
    """A model whose steps are captured, its runner and its session."""
    session = Capturing(path)
    runner = on_device(path, session=session, capture=True)
    with PROCESS_LOCK:
        assert runner.use_static_steps(capture=True) is None
    del session.runs[:], session.lengths[:], session.places[:]
    return model_on(path, runner), runner, session
