"""Reads how much memory is available and how much this process has used.

Knows the interfaces of Linux and other Unix systems. Does not know what the memory is for.
"""

from __future__ import annotations

import sys
from pathlib import Path


def peak_memory() -> int | None:
    """Peak resident memory of this process, in bytes; None if the system does not report it."""
    # Not getrusage if /proc exists: on Linux, getrusage counts the parent's memory, too.
    if (kilobytes := _kilobytes("/proc/self/status", "VmHWM:")) is not None:
        return 1024 * kilobytes
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def available_memory() -> int | None:
    """Bytes that can be allocated without swapping; None if the system does not report it."""
    kilobytes = _kilobytes("/proc/meminfo", "MemAvailable:")
    return None if kilobytes is None else 1024 * kilobytes


def _kilobytes(path: str, name: str) -> int | None:
    """The number on the line of a /proc file that begins with `name`; None if there is none."""
    try:
        lines = Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith(name)), None)
