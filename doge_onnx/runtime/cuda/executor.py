"""Lets one thread at a time use a device, and runs captured steps on few threads.

Knows threads and locks, and turns failures of the device into errors of this package. Does not know
what the functions do that it calls.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, TypeVar

from doge_onnx.errors import DogeOnnxError
from doge_onnx.runtime.engine.graph_session import ORT_ERRORS, run_error

# One lock for the whole process: while CUDA captures, no thread may allocate or copy.
PROCESS_LOCK = threading.RLock()

_Result = TypeVar("_Result")


class DeviceExecutor:
    """Calls the functions that use the device of one model, one at a time.

    Args:
        few_threads: Whether to call all functions on two threads only: on the thread that made this
            object, and on one worker thread for all other callers. A session of ONNX Runtime that
            may capture keeps CUDA's handles and its captured graphs for each thread that has run
            it, until the session ends.
    """

    def __init__(self, few_threads: bool) -> None:
        self._few_threads = few_threads
        self._home = threading.get_ident()
        self._others = ThreadPoolExecutor(1, "doge-onnx")

    def run(self, function: Callable[..., _Result], *args: Any, **options: Any) -> _Result:
        """Wait until no other thread uses a device, then call a function and return its result."""
        if not self._few_threads or threading.get_ident() == self._home:
            return _alone(function, *args, **options)
        future: Future[_Result] = self._others.submit(_alone, function, *args, **options)
        try:
            return future.result()
        except BaseException:
            # Ctrl-C does not reach the worker thread, which may still write to the state.
            wait([future])
            raise


def _alone(function: Callable[..., _Result], *args: Any, **options: Any) -> _Result:
    with PROCESS_LOCK:
        try:
            return function(*args, **options)
        except DogeOnnxError:
            raise
        # Of memory that is allocated, copied or read; a graph's own are no longer among them.
        except ORT_ERRORS as error:
            raise run_error("use the device", error) from error
