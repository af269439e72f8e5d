"""Python environments of the peers: one for each, because they cannot share one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
CONSTRAINTS = HERE.parent.parent / "constraints.txt"


def environment(directory: Path, requirements: str) -> Path:
    """The interpreter of an environment that has what a file lists; made if it is not there."""
    wanted = (HERE / requirements).read_text(encoding="utf-8")
    wanted += CONSTRAINTS.read_text(encoding="utf-8")
    path = (directory / Path(requirements).stem).absolute()
    python, stamp = path / "bin" / "python", path / "installed.txt"
    if not stamp.exists() or stamp.read_text(encoding="utf-8") != wanted:
        print(f"installing {requirements} into {path}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", "--clear", path], check=True)
        subprocess.run(
            [python, "-m", "pip", "install", "--quiet", "-r", HERE / requirements], check=True
        )
        stamp.write_text(wanted, encoding="utf-8")
    return python
