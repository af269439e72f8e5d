"""Measures the bandwidth of memory: reads by threads of this machine, or a copy on a device.

Does not know models.
"""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from doge_onnx.measure.memory import available_memory
from doge_onnx.runtime.cuda.device_memory import DeviceMemory
from doge_onnx.runtime.cuda.executor import PROCESS_LOCK
from doge_onnx.runtime.engine.threads import preferred_threads

# Larger than the caches of most processors, but small enough for most machines.
MAX_ARRAY_BYTES = 512 * 2**20
MIN_ARRAY_BYTES = 16 * 2**20
# Number of reads, of which the fastest counts.
READS = 5


def read_bandwidth(threads: int) -> float:
    """Bytes per second that `threads` threads together read from memory; the best of `READS`."""
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
    """Bytes per second that a copy on a device reads and writes together; the best of `READS`."""
    rows = MAX_ARRAY_BYTES // 256
    with PROCESS_LOCK:
        source, target = (memory.empty((1, 1, size, 64), "float32") for size in (rows, rows + 1))
        # Not `extended`, which allocates: on a GPU, that takes longer than the copy.
        copy = memory.extension(source, np.zeros(64, np.float32), target)
        best = float("inf")
        for _ in range(READS):
            started = time.perf_counter()
            copy()
            best = min(best, time.perf_counter() - started)
    return 2 * 256 * rows / best


def array_bytes() -> int:
    """Size in bytes of the array that `read_bandwidth` reads; smaller if memory is short."""
    available = available_memory()
    if available is None:
        return MAX_ARRAY_BYTES
    return max(MIN_ARRAY_BYTES, min(MAX_ARRAY_BYTES, available // 4))


def default_threads() -> int:
    """Number of threads that a model uses if the caller gives none."""
    return preferred_threads() or os.cpu_count() or 1
