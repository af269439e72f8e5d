"""The wheel, and an environment with only the wheel and its dependencies.

Knows how to make both, and when to make them again. tests/test_wheel.py says what must be in
them.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import build_library
from environments import ROOT, interpreter

CONSTRAINTS = ROOT / "constraints.txt"
DIRECTORY = ROOT / "build" / "base-install"
# The files and directories that the wheel is built from.
_SOURCES = (
    *("pyproject.toml", "setup.py", "README.md", "LICENSE"),
    *("doge_onnx", "native", "optimum", "tools/build_library.py"),
)


# What setup built into the package of an editable install.
_BUILT = ROOT / build_library.PLACE


def wheel(compiler: str | None = None) -> Path:
    """The wheel of the sources as they are; built if it is not there.

    Args:
        compiler: The C++ compiler that builds the native kernels, which may be one that does not
            exist; None for the usual one.
    """
    files = [
        path
        for name in _SOURCES
        for path in sorted([ROOT / name, *(ROOT / name).rglob("*")])
        if path.is_file() and "__pycache__" not in path.parts and _BUILT not in path.parents
    ]
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.relative_to(ROOT)}\0{path.stat().st_size}\0".encode())
        digest.update(path.read_bytes())
    kind = "wheel" if compiler is None else "wheel-without-compiler"
    directory = DIRECTORY / kind / digest.hexdigest()[:16]
    if not directory.is_dir():
        shutil.rmtree(directory.parent, ignore_errors=True)
        # Built from a copy: among the sources, setuptools would leave a build directory, and a
        # later build would put old files from it into the wheel.
        with tempfile.TemporaryDirectory() as scratch:
            for path in files:
                copy = Path(scratch) / path.relative_to(ROOT)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, copy)
            built = Path(scratch) / "wheel"
            pip("wheel", "--no-deps", "--wheel-dir", built, scratch, compiler=compiler)
            directory.parent.mkdir(parents=True)
            shutil.move(built, directory)
    (path,) = directory.glob("*.whl")
    return path


def environment() -> Path:
    """The interpreter of an environment that has only the base install, not even pip."""
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
    """Whether `path` is missing, or was made from another version of the sources."""
    stamp = path / "installed.txt"
    return not stamp.exists() or stamp.read_text(encoding="utf-8") != version + _constraints()


def mark(path: Path, version: str) -> None:
    """Note in the finished directory `path` from which version of the sources it was made."""
    (path / "installed.txt").write_text(version + _constraints(), encoding="utf-8")


def _constraints() -> str:
    return "\n" + CONSTRAINTS.read_text(encoding="utf-8")


def pip(*arguments: str | Path, compiler: str | None = None) -> None:
    """Run pip of this environment, with another C++ compiler than the usual one if it is given."""
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    chosen = {} if compiler is None else {"CXX": compiler}
    subprocess.run([*command, *arguments], check=True, env=variables() | chosen)


def variables() -> dict[str, str]:
    """This process's environment variables without PYTHONPATH, which would add other packages."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def installed_bytes(directory: Path) -> int:
    """Bytes of all files below a directory."""
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


if __name__ == "__main__":
    environment()
