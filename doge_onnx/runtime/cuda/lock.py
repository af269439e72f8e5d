"""A device has one user at a time, and where steps are captured, they come from few threads.

Does not know what is run.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, TypeVar

# Of the whole process: while CUDA captures, it lets no thread allocate or copy.
EXCLUSIVE = threading.RLock()

_Result = TypeVar("_Result")


class DeviceLock:
    """Runs what uses the device of one model.

    Args:
        few_threads: Whether only the thread that makes this and one more ever run anything, the
            one more for all others. ONNX Runtime keeps CUDA's handles, and what it captured, for
            each thread that ran a session which may capture, until the session ends.
    """

    def __init__(self, few_threads: bool) -> None:
        self._few_threads = few_threads
        self._home = threading.get_ident()
        self._others = ThreadPoolExecutor(1, "doge-onnx")

    def run(self, function: Callable[..., _Result], *args: Any, **options: Any) -> _Result:
        """Call a function when nobody else uses a device, and return what it does."""
        if not self._few_threads or threading.get_ident() == self._home:
            return _alone(function, *args, **options)
        future: Future[_Result] = self._others.submit(_alone, function, *args, **options)
        try:
            return future.result()
        except BaseException:
            # An interrupt does not reach the other thread, which may still be writing.
            wait([future])
            raise


def _alone(function: Callable[..., _Result], *args: Any, **options: Any) -> _Result:
    with EXCLUSIVE:
        return function(*args, **options)
