"""Control groups of Linux: how much processor time they allow this process.

Knows the files of both versions, as Documentation/admin-guide of the Linux kernel describes them.
Does not know what a limit means for threads (`threads`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath


def processor_quota(root: Path = Path("/")) -> float:
    """Processors that the control groups of this process allow it to use at a time.

    The process is in one group of each hierarchy, such as that of a service or of a pod, and the
    group is inside of others. The limit of each of them counts, so the lowest one is the limit.

    Args:
        root: Where the system's files begin.

    Returns:
        Processors, 1.5 for one and a half; infinity if nothing sets a limit.
    """
    quotas = [_quota(group) for group in _groups(root)]
    return min(quotas, default=math.inf)


def _groups(root: Path) -> Iterator[Path]:
    """Directories of all groups that this process is in and that may limit processor time."""
    own = dict(_own_groups(root))
    for version, inside, place in _hierarchies(root):
        if version not in own:
            continue
        # A container may see only the part of a hierarchy that begins with its own group, and its
        # path then lacks that part or has all of it. What is not below the mount cannot be read.
        path = PurePosixPath(own[version])
        below = path.relative_to(inside) if path.is_relative_to(inside) else PurePosixPath()
        parts = () if ".." in below.parts else below.parts
        top = root / place.lstrip("/")
        for length in range(len(parts) + 1):
            yield top.joinpath(*parts[:length])


def _own_groups(root: Path) -> Iterator[tuple[int, str]]:
    """The version of each hierarchy that can limit processor time, and this process's path in it.

    /proc/self/cgroup has lines `number:controllers:path`; version 2 has no controllers there.
    """
    for line in _read(root / "proc/self/cgroup").split("\n"):
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            yield 2, path
        elif "cpu" in controllers.split(","):
            yield 1, path


def _hierarchies(root: Path) -> Iterator[tuple[int, str, str]]:
    """For each mount of such a hierarchy: its version, the path that is mounted, and where.

    /proc/self/mountinfo has lines `id parent device path place options ... - type source options`.
    """
    for line in _read(root / "proc/self/mountinfo").split("\n"):
        before, _, after = line.partition(" - ")
        fields, system = before.split(" "), after.split(" ")
        if len(fields) < 5 or len(system) < 3:
            continue
        inside, place = map(_unescaped, fields[3:5])
        if system[0] == "cgroup2":
            yield 2, inside, place
        elif system[0] == "cgroup" and "cpu" in system[2].split(","):
            yield 1, inside, place


def _quota(group: Path) -> float:
    """Processors that one group allows: time in each period, both in microseconds."""
    words = _read(group / "cpu.max").split() or [
        _read(group / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")
    ]
    # "max" and -1 stand for no limit.
    if len(words) != 2 or not all(re.fullmatch("[0-9]+", word) for word in words):
        return math.inf
    quota, period = map(int, words)
    return quota / period if period else math.inf


def _unescaped(field: str) -> str:
    """A path as it stands in mountinfo, where a blank is a backslash and an octal number."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)


def _read(path: Path) -> str:
    try:
        # The name of a group may be any bytes.
        return path.read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return ""
