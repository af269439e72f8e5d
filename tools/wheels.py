"""Wheels for all systems, made on one machine: `make wheels` writes them to dist/.

Knows for which systems there are wheels, how the library of native kernels is cross-compiled for
each, and how a wheel gets its library. One wheel without the library is for all other systems. What
is compiled, and with which flags, is in `build_library`.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import base_install
import build_library
from build_library import Toolchain
from environments import ROOT, environment

DIRECTORY = ROOT / "build" / "wheels"
_REQUIREMENTS = Path(__file__).with_name("wheels.txt")
_WITHOUT = "the wheel for all systems has no native kernels\n"


@dataclass(frozen=True)
class System:
    """A system that gets a wheel with the library.

    Attributes:
        tag: Of the wheel, as the last part of its name has it.
        target: What the compiler calls it.
        machine: See `Toolchain`.
        name: See `Toolchain.system`.
    """

    tag: str
    target: str
    machine: str
    name: str


# The oldest glibc and macOS are older than any that ONNX Runtime's wheels are for.
SYSTEMS = (
    System("manylinux_2_17_x86_64", "x86_64-linux-gnu.2.17", "x86_64", "Linux"),
    System("manylinux_2_17_aarch64", "aarch64-linux-gnu.2.17", "aarch64", "Linux"),
    System("macosx_11_0_arm64", "aarch64-macos.11.0", "aarch64", "Darwin"),
    System("macosx_11_0_x86_64", "x86_64-macos.11.0", "x86_64", "Darwin"),
    System("win_amd64", "x86_64-windows-gnu", "x86_64", "Windows"),
)


def system(machine: str, name: str) -> System:
    """The system of that processor and that name."""
    return next(each for each in SYSTEMS if (each.machine, each.name) == (machine, name))


def wheel(system: System | None) -> Path:
    """The wheel of the sources as they are, for a system or, with None, for all others.

    Its directory has the name of its version, and is made if it is not there.
    """
    plain = base_install.wheel("/nonexistent/c++")
    digest = hashlib.sha256(plain.parent.name.encode() + _REQUIREMENTS.read_bytes())
    directory = DIRECTORY / digest.hexdigest()[:16] / (system.tag if system else "any")
    if not directory.is_dir():
        for old in DIRECTORY.glob("*"):
            if old != directory.parent:
                shutil.rmtree(old)
        directory.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory.parent) as scratch:
            shutil.move(_pack(plain, system, Path(scratch)), directory)
    (path,) = directory.glob("*.whl")
    return path


def _pack(plain: Path, system: System | None, scratch: Path) -> Path:
    """A directory with the wheel for a system, made from the one without the library."""
    python = environment(_REQUIREMENTS)
    command: list[str | Path] = [python, "-m", "wheel"]
    unpacked, packed = scratch / "unpacked", scratch / "packed"
    packed.mkdir()
    subprocess.run([*command, "unpack", "--dest", unpacked, plain], check=True, capture_output=True)
    (tree,) = unpacked.iterdir()
    (place,) = tree.rglob(build_library.PLACE.as_posix())
    if system is None:
        (place / build_library.REASON).write_text(_WITHOUT, encoding="utf-8")
    else:
        (place / build_library.REASON).unlink()
        # Where the compiler keeps the libraries of each system, once it has made them.
        os.environ.setdefault("ZIG_GLOBAL_CACHE_DIR", str(ROOT / "build" / "zig"))
        build_library.build(place, _toolchain(python, system))
        (text,) = tree.glob("*.dist-info/WHEEL")
        tag = f"Tag: py3-none-{system.tag}"
        text.write_text(re.sub("(?m)^Tag: .*$", tag, text.read_text(encoding="utf-8")))
    subprocess.run([*command, "pack", "--dest", packed, tree], check=True, capture_output=True)
    return packed


def _toolchain(python: Path, system: System) -> Toolchain:
    # The compiler of C links: that of C++ would first make a standard library that is not needed.
    compiler, linker = (
        (str(python), "-m", "ziglang", name, "-target", system.target) for name in ("c++", "cc")
    )
    return Toolchain(compiler, (*linker, "-O3", "-s"), system.machine, system.name)


def main() -> None:
    """Write the wheels of all systems to dist/, in place of older ones."""
    out = ROOT / "dist"
    out.mkdir(exist_ok=True)
    for old in out.glob("*.whl"):
        old.unlink()
    for system in (*SYSTEMS, None):
        made = wheel(system)
        shutil.copyfile(made, out / made.name)
        print(f"{made.name}  {made.stat().st_size / 1e3:,.0f} kB", file=sys.stderr)


if __name__ == "__main__":
    main()
