"""How much memory there is, and how much this process has had, where the system tells."""

from __future__ import annotations

import sys
from pathlib import Path


def peak_memory() -> int | None:
    """The most resident memory that this process had, in bytes; None where nobody tells."""
    # Not getrusage, where there is another way: on Linux that counts the parent's memory, too.
    if (kilobytes := _kilobytes("/proc/self/status", "VmHWM:")) is not None:
        return 1024 * kilobytes
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def available_memory() -> int | None:
    """Bytes that new arrays may take without swapping; None where nobody tells."""
    kilobytes = _kilobytes("/proc/meminfo", "MemAvailable:")
    return None if kilobytes is None else 1024 * kilobytes


def _kilobytes(path: str, name: str) -> int | None:
    """The number on one line of a file of Linux; None on other systems."""
    try:
        lines = Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith(name)), None)
