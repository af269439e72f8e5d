"""How fast memory is read: by threads on this machine, or by a copy on a device."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from doge_onnx.measure.memory import available_memory
from doge_onnx.runtime.cuda.device_memory import DeviceMemory
from doge_onnx.runtime.cuda.lock import EXCLUSIVE
from doge_onnx.runtime.engine.threads import usable_cores

# More than the caches of most processors, and not so much that it hurts.
MAX_ARRAY_BYTES = 512 * 2**20
MIN_ARRAY_BYTES = 16 * 2**20
# The best of so many reads counts.
READS = 5


def read_bandwidth(threads: int) -> float:
    """Bytes per second that `threads` threads together read from memory; the best of several."""
    data = np.ones(array_bytes() // 8, np.int64)
    parts = np.array_split(data, threads)
    with ThreadPoolExecutor(threads) as pool:
        best = float("inf")
        for _ in range(READS):
            started = time.perf_counter()
            list(pool.map(np.max, parts))
            best = min(best, time.perf_counter() - started)
    return data.nbytes / best


def copy_bandwidth(memory: DeviceMemory) -> float:
    """Bytes per second that a copy on a device reads and writes; the best of several."""
    rows = MAX_ARRAY_BYTES // 256
    with EXCLUSIVE:
        source, target = (memory.empty((1, 1, size, 64), "float32") for size in (rows, rows + 1))
        # Not `extended`: on a GPU, memory takes longer to get than to fill.
        copy = memory.extension(source, np.zeros(64, np.float32), target)
        best = float("inf")
        for _ in range(READS):
            started = time.perf_counter()
            copy()
            best = min(best, time.perf_counter() - started)
    return 2 * 256 * rows / best


def array_bytes() -> int:
    """Size of the array that `read_bandwidth` reads: smaller where memory is short."""
    available = available_memory()
    if available is None:
        return MAX_ARRAY_BYTES
    return max(MIN_ARRAY_BYTES, min(MAX_ARRAY_BYTES, available // 4))


def default_threads() -> int:
    """As many threads as a model takes that is not told."""
    return usable_cores() or os.cpu_count() or 1
