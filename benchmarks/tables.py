"""Replaces tables in Markdown files with new figures."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path


def replace_table(path: Path, name: str, lines: Iterable[str]) -> None:
    """Put lines between the comments `<!-- NAME: begin -->` and `<!-- NAME: end -->` of a file."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, rest = path.read_text(encoding="utf-8").split(begin)
    after = rest.split(end)[1]
    path.write_text("\n".join([before + begin, *lines, end + after]), encoding="utf-8")
