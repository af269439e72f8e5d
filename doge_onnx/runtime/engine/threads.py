"""Threads: how many to use, and how attention is divided among them.

Knows cores and the environment variables of OpenMP and ONNX Runtime. Does not know where a limit of
processor time is written (`control_groups`), nor sessions.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path

from doge_onnx.runtime.engine.control_groups import processor_quota

# ONNX Runtime reads this when it makes a session. There is no session option for it.
_NO_FLASH_ATTENTION = "ORT_GQA_DISABLE_FLASH_ATTENTION"
_ENVIRONMENT_LOCK = threading.Lock()
# Far more than any processor has. With 99999, `bench` on two cores had not ended after minutes.
MOST_THREADS = 1024


def preferred_threads() -> int:
    """Threads of an operator if the caller names no number; 0 lets ONNX Runtime decide.

    The number in `OMP_NUM_THREADS`, which other libraries read, too; of a list, which is for nested
    loops, the first. Without one, or with one above `MOST_THREADS`, see `usable_cores`.
    """
    words = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    asked = int(words) if re.fullmatch("[0-9]{1,9}", words) else 0
    return asked if 0 < asked <= MOST_THREADS else usable_cores()


def usable_cores(root: Path = Path("/")) -> int:
    """Number of physical cores that this process may use, at least 1; 0 if the system does not say.

    Two threads on one core share its multipliers, so the second gains nothing. A quota of control
    groups is rounded down: the threads of a step wait for each other, so once the quota of a period
    is used up, all of them wait for the next period.

    Args:
        root: Where the system's files begin.
    """
    try:
        processors = os.sched_getaffinity(0)
    except AttributeError:  # not on Linux
        return 0
    cores = {_core(root, processor) for processor in processors}
    return max(1, math.floor(min(len(cores), processor_quota(root))))


def _core(root: Path, processor: int) -> str:
    """The processors of a processor's core; its own number if that cannot be read."""
    topology = root / f"sys/devices/system/cpu/cpu{processor}/topology"
    try:
        return (topology / "thread_siblings_list").read_text(encoding="ascii").strip()
    except OSError:
        return str(processor)


@contextlib.contextmanager
def attention_by_heads(wanted: bool) -> Iterator[None]:
    """A context in which a new session computes attention head by head, if `wanted`.

    With rows of fp32, a step is 7 to 17 % faster than with ONNX Runtime's default from 512 tokens
    on, and equal below; with rows of int8 it is slower. A value that the user has set stays.

    The environment belongs to the whole process: only one thread at a time is in this context,
    even if not `wanted`, and sessions that other libraries make meanwhile are affected too.
    """
    with _ENVIRONMENT_LOCK:
        if not wanted or _NO_FLASH_ATTENTION in os.environ:
            yield
            return
        os.environ[_NO_FLASH_ATTENTION] = "1"
        try:
            yield
        finally:
            os.environ.pop(_NO_FLASH_ATTENTION, None)
