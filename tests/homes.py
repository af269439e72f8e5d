"""Homes: the directories in which programs keep their settings and caches, empty."""

from __future__ import annotations

import os
from pathlib import Path

_PLACES = (
    "HOME",
    "XDG_CACHE_HOME",
    "XDG_CONFIG_HOME",
    "XDG_DATA_HOME",
    "XDG_STATE_HOME",
    "USERPROFILE",
    "APPDATA",
    "LOCALAPPDATA",
)
# What this process has set, or what would lead a program to another place than those above.
_SETTINGS = ("ORT_DISABLE_TELEMETRY", "HF_HOME", "HF_HUB_CACHE", "MPLCONFIGDIR")


def variables(directory: Path) -> dict[str, str]:
    """Variables of a process in which every home is `directory`, which is made."""
    directory.mkdir()
    kept = {name: value for name, value in os.environ.items() if name not in _SETTINGS}
    return kept | dict.fromkeys(_PLACES, str(directory))


def left_in(directory: Path) -> list[str]:
    """What has been written into a home."""
    return sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*"))
