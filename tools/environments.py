"""Python environments beside the main one, for packages that cannot share an environment with it.

Knows how to make one from a file of requirements, and when to make it again. The files are in
`tests/requirements` and `benchmarks/peers`.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def environment(requirements: Path, directory: Path = ROOT / "build" / "environments") -> Path:
    """The interpreter of the environment for a requirements file, which is made if need be.

    Args:
        requirements: A requirements file of pip; its paths, as in `-e .`, are relative to the
            root of the repository. Its stem is the environment's name.
        directory: Directory of all environments.
    """
    wanted = requirements.read_text(encoding="utf-8")
    # Files that the requirements may refer to. The project's own code is installed as editable.
    for name in ("constraints.txt", "pyproject.toml"):
        if name == "constraints.txt" or "-e ." in wanted:
            wanted += (ROOT / name).read_text(encoding="utf-8")
    path = directory.absolute() / requirements.stem
    python, stamp = interpreter(path), path / "installed.txt"
    if not stamp.exists() or stamp.read_text(encoding="utf-8") != wanted:
        print(f"installing {requirements.name} into {path}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", "--clear", path], check=True)
        subprocess.run(
            # Compiling torch to byte code takes longer than unpacking it, and most is never used.
            [
                *(python, "-m", "pip", "install", "--quiet", "--no-compile"),
                *("-r", requirements.absolute()),
            ],
            check=True,
            cwd=ROOT,
        )
        stamp.write_text(wanted, encoding="utf-8")
    return python


def interpreter(environment: Path) -> Path:
    """Python of a virtual environment."""
    return environment / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")


if __name__ == "__main__":
    for file in sys.argv[1:]:
        environment(Path(file))
