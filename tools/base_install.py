"""The wheel, and an environment with nothing but the wheel and what it asks for.

Knows how both are made, and when they have to be made anew. What must be in them is said by
tests/test_wheel.py.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from environments import ROOT, interpreter

CONSTRAINTS = ROOT / "constraints.txt"
DIRECTORY = ROOT / "build" / "base-install"
# What the wheel is made of.
_SOURCES = ("pyproject.toml", "README.md", "LICENSE", "doge_onnx", "optimum")


def wheel() -> Path:
    """The wheel of the sources as they are; built if it is not there."""
    files = [
        path
        for name in _SOURCES
        for path in sorted([ROOT / name, *(ROOT / name).rglob("*")])
        if path.is_file() and "__pycache__" not in path.parts
    ]
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.relative_to(ROOT)}\0{path.stat().st_size}\0".encode())
        digest.update(path.read_bytes())
    directory = DIRECTORY / "wheel" / digest.hexdigest()[:16]
    if not directory.is_dir():
        shutil.rmtree(directory.parent, ignore_errors=True)
        # Not where the sources are: setuptools would leave a build directory there, and put
        # files into the wheel that an earlier build left in it.
        with tempfile.TemporaryDirectory() as scratch:
            for path in files:
                copy = Path(scratch) / path.relative_to(ROOT)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, copy)
            built = Path(scratch) / "wheel"
            pip("wheel", "--no-deps", "--wheel-dir", built, scratch)
            directory.parent.mkdir(parents=True)
            shutil.move(built, directory)
    (path,) = directory.glob("*.whl")
    return path


def environment() -> Path:
    """The interpreter of an environment with the base install alone, without pip."""
    path = DIRECTORY / "environment"
    python = interpreter(path)
    made = wheel()
    if is_new(path, made.parent.name):
        print(f"installing the wheel into {path}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", "--clear", "--without-pip", path], check=True)
        pip("--python", python, "install", "--constraint", CONSTRAINTS, made)
        mark(path, made.parent.name)
    return python


def is_new(path: Path, version: str) -> bool:
    """Whether what is at `path` was made of something else than this version of the sources."""
    stamp = path / "installed.txt"
    return not stamp.exists() or stamp.read_text(encoding="utf-8") != version + _constraints()


def mark(path: Path, version: str) -> None:
    """Write down what the finished directory `path` was made of."""
    (path / "installed.txt").write_text(version + _constraints(), encoding="utf-8")


def _constraints() -> str:
    return "\n" + CONSTRAINTS.read_text(encoding="utf-8")


def pip(*arguments: str | Path) -> None:
    """Run pip of this environment."""
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*command, *arguments], check=True, env=variables())


def variables() -> dict[str, str]:
    """This process's environment variables, but for the one that leads to other packages."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def installed_bytes(directory: Path) -> int:
    """Bytes of all files below a directory."""
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


if __name__ == "__main__":
    environment()
