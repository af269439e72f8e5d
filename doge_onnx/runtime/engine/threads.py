"""Threads: how many to use, and how attention is divided among them.

Knows cores, control groups and one environment variable of ONNX Runtime. Does not know sessions.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

# ONNX Runtime reads this when it makes a session. There is no session option for it.
_NO_FLASH_ATTENTION = "ORT_GQA_DISABLE_FLASH_ATTENTION"
_ENVIRONMENT_LOCK = threading.Lock()


def usable_cores() -> int:
    """Number of physical cores that this process may use; 0 lets ONNX Runtime decide.

    Two threads on one core share its multipliers, so the second gains nothing. Threads beyond a
    container's quota are suspended in the middle of a step, while the others wait for them.
    """
    try:
        processors = os.sched_getaffinity(0)
    except AttributeError:  # not on Linux
        return 0
    cores = {
        _read(f"/sys/devices/system/cpu/cpu{p}/topology/thread_siblings_list") or str(p)
        for p in processors
    }
    return max(1, min(len(cores), _quota()))


def _quota() -> int:
    """Processors that the control group allows this process, rounded down.

    `sys.maxsize` if it sets no limit. Read from `cpu.max` (cgroup v2), or else from
    `cpu.cfs_quota_us` and `cpu.cfs_period_us` (v1).
    """
    words = _read("/sys/fs/cgroup/cpu.max").split() or [
        _read(f"/sys/fs/cgroup/cpu/cpu.cfs_{name}_us") for name in ("quota", "period")
    ]
    if len(words) != 2 or not all(word.isdecimal() for word in words) or words[1] == "0":
        return sys.maxsize
    return int(words[0]) // int(words[1])


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="ascii").strip()
    except OSError:
        return ""


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
