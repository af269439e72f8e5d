"""Compiles the library of native kernels, `native/`.

Knows its sources, the flags of each file, and how to find a compiler. Setup (`setup.py`), tests and
the tool that makes wheels call it; called as a program, it builds the library into the package.
Imports only the standard library. Does not know who loads the library, or why.

The library needs nothing of the C++ standard library at run time, so that compilers without one
can make it for another system.
"""

from __future__ import annotations

import contextlib
import filecmp
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "native"
# Where the package looks for the library, below the directory that holds `doge_onnx`.
PLACE = Path("doge_onnx", "runtime", "native")
# In place of the library: why it is not there.
REASON = "missing.txt"
# Of the library, by system. Windows has no prefix.
_NAMES = {"Windows": "doge_onnx.dll", "Darwin": "libdoge_onnx.dylib"}
_MACHINES = {"amd64": "x86_64", "arm64": "aarch64"}
# Flags of each instruction set, by machine: those that the compiler knows, the first ones if
# possible. Its file is isa_NAME.cc.
_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni")
_INSTRUCTION_SETS: dict[str, dict[str, tuple[tuple[str, ...], ...]]] = {
    "x86_64": {
        "avx2": (_AVX2,),
        "avx_vnni": ((*_AVX2, "-mavxvnni"),),
        "avx512_vnni": ((*_AVX2, *_AVX512),),
    },
    "aarch64": {
        "neon": ((),),
        # Zig knows processors, and no architectures.
        "neon_dotprod": (
            ("-march=armv8.2-a+dotprod",),
            ("-mcpu=generic+v8_2a+dotprod",),
        ),
        "neon_i8mm": (
            ("-march=armv8.2-a+dotprod+i8mm",),
            ("-mcpu=generic+v8_2a+dotprod+i8mm",),
        ),
    },
}
_FLAGS = (
    *("-std=c++17", "-O3", "-Wall", "-Wextra", "-fvisibility=hidden"),
    *("-fno-exceptions", "-fno-rtti", "-fno-threadsafe-statics", "-ffp-contract=fast"),
)
# Flags that not every compiler knows. Windows code is position-independent without being told;
# GCC's reassociation would undo the order in which kernels keep their sums in registers.
_OPTIONAL_FLAGS = ("-fPIC", "-fno-tree-reassoc")
_COMPILERS = ("c++", "g++", "clang++")


class BuildError(Exception):
    """The library cannot be built; the message is one line."""


@dataclass(frozen=True)
class Toolchain:
    """A compiler, and the system that it compiles for.

    Attributes:
        compile: The command that compiles a file of C++.
        link: The command that links objects.
        machine: "x86_64", "aarch64", or another processor's name in lower case.
        system: "Linux", "Darwin", "Windows" or another name, as `platform.system` has it.
    """

    compile: tuple[str, ...]
    link: tuple[str, ...]
    machine: str
    system: str

    @property
    def library_name(self) -> str:
        """File name of the library."""
        return _NAMES.get(self.system, "libdoge_onnx.so")


def host() -> Toolchain:
    """The C++ compiler of this machine: the environment variable CXX, or one of the usual names.

    Raises:
        BuildError: There is none.
    """
    wanted = os.environ.get("CXX")
    commands = [tuple(shlex.split(wanted))] if wanted else [(name,) for name in _COMPILERS]
    system = platform.system()
    machine = platform.machine().lower()
    for command in commands:
        if command and shutil.which(command[0]):
            if system == "Darwin":
                # Python's own architecture, which under Rosetta is not that of the processor.
                command = (*command, "-arch", platform.machine())
            return Toolchain(command, command, _MACHINES.get(machine, machine), system)
    tried = f"CXX is {wanted!r}" if wanted else f"tried {', '.join(_COMPILERS)}"
    raise BuildError(f"there is no C++ compiler ({tried})")


def build(
    directory: Path,
    toolchain: Toolchain | None = None,
    flags: Sequence[str] = (),
    sources: Sequence[Path] | None = None,
) -> Path:
    """Compile what is not up to date, and link the library.

    Objects are kept in build/native: each is made again if its source, a header or the command
    changed. So several processes may build at once, and a second build takes no time.

    Args:
        directory: Directory for the library.
        toolchain: The compiler; None for that of this machine.
        flags: More flags for all files and for the linker, such as "-fsanitize=address".
        sources: Files to build; None for all of `native`. Another file may include its headers.

    Returns:
        The library.

    Raises:
        BuildError: There is no compiler, or it fails.
    """
    tools = toolchain or host()
    files = sorted(SOURCES.glob("*.cc")) if sources is None else list(sources)
    every = [name for sets in _INSTRUCTION_SETS.values() for name in sets]
    known = {
        name: extra
        for name, choices in _INSTRUCTION_SETS.get(tools.machine, {}).items()
        if (extra := next((each for each in choices if _accepts(tools, each)), None)) is not None
    }
    common = [*_FLAGS, *(flag for flag in _OPTIONAL_FLAGS if _accepts(tools, [flag])), *flags]
    # The choice of an instruction set must not name the kernels that are left out.
    left_out = [f"-DDOGE_ONNX_NO_{name.upper()}" for name in every if name not in known]
    commands: list[tuple[Path, list[str]]] = []
    for file in files:
        name = file.stem.removeprefix("isa_")
        if name not in every:
            commands.append((file, [*common, f"-I{SOURCES}", *left_out]))
        elif name in known:
            commands.append((file, [*common, f"-I{SOURCES}", *known[name]]))
    headers = b"".join(path.read_bytes() for path in _headers())
    settings = "\0".join([*tools.compile, *common]).encode()
    cache = ROOT / "build" / "native" / hashlib.sha256(settings).hexdigest()[:12]
    cache.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = [pool.submit(_compile, tools, *each, headers, cache) for each in commands]
        objects = [job.result() for job in jobs]
    library = _link(tools, objects, flags, cache)
    result = directory / tools.library_name
    if not result.exists() or not filecmp.cmp(library, result, shallow=False):
        directory.mkdir(parents=True, exist_ok=True)
        with _whole(result) as unfinished:
            shutil.copyfile(library, unfinished)
    return result


def install(package_root: Path) -> str | None:
    """Build the library into the package, or note there why it cannot be built.

    Args:
        package_root: The directory that holds the package `doge_onnx`.

    Returns:
        Why there is no library, a line; None if there is one.
    """
    place = package_root / PLACE
    place.mkdir(parents=True, exist_ok=True)
    reason = None
    try:
        build(place)
    except BuildError as error:
        reason = f"doge-onnx was installed without native kernels: {error}"
        for name in (*_NAMES.values(), "libdoge_onnx.so"):
            (place / name).unlink(missing_ok=True)
        (place / REASON).write_text(f"{reason}\n", encoding="utf-8")
    else:
        (place / REASON).unlink(missing_ok=True)
    return reason


def _headers() -> Iterator[Path]:
    for pattern in ("*.h", "*.inl"):
        yield from sorted(SOURCES.glob(pattern))


def _accepts(tools: Toolchain, flags: Sequence[str]) -> bool:
    """Whether a compiler knows flags; clang only warns of some that it does not know."""
    if not flags:
        return True
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "empty.cc"
        source.touch()
        command = [*tools.compile, "-Werror", *flags, "-c", str(source), "-o", f"{source}.o"]
        return _run(command).returncode == 0


def _compile(
    tools: Toolchain, source: Path, flags: Sequence[str], headers: bytes, cache: Path
) -> Path:
    command = [*tools.compile, *flags, "-c", str(source)]
    inputs = b"\0".join([*map(str.encode, command), headers, source.read_bytes()])
    return _made(command, cache, source.stem, ".o", inputs)


def _link(tools: Toolchain, objects: Sequence[Path], flags: Sequence[str], cache: Path) -> Path:
    command = [*tools.link, "-shared", *map(str, objects), *flags]
    if tools.system == "Linux":
        # The C++ compiler would name its standard library as needed, although nothing of it is. And
        # what is nowhere defined is an error here, not when the library is loaded.
        command += ["-Wl,--as-needed", "-Wl,-z,defs", "-lm"]
    elif tools.system == "Darwin":
        # Without a name, it would hold the path of the place where it was built.
        command.append(f"-Wl,-install_name,@rpath/{tools.library_name}")
    name = Path(tools.library_name)
    return _made(command, cache, name.stem, name.suffix, "\0".join(command).encode())


def _made(command: Sequence[str], cache: Path, stem: str, suffix: str, inputs: bytes) -> Path:
    """The file that a command makes of `inputs`: a new one, or the one that is there."""
    result = cache / f"{stem}-{hashlib.sha256(inputs).hexdigest()[:20]}{suffix}"
    if result.exists():
        return result
    with _whole(result) as unfinished:
        done = _run([*command, "-o", str(unfinished)])
        if done.stderr:
            print(done.stderr, file=sys.stderr)
        if done.returncode:
            first = next((line for line in done.stderr.splitlines() if "error" in line), "")
            raise BuildError(f"{command[0]} could not build {stem}{suffix} ({first.strip()})")
    for old in cache.glob(f"{stem}-*{suffix}"):
        if old != result:
            old.unlink(missing_ok=True)
    return result


@contextlib.contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """A place for a file that then appears at `path`, complete; after an error, it does not."""
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        unfinished = Path(scratch) / path.name
        yield unfinished
        unfinished.replace(path)


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise BuildError(f"{command[0]} cannot be run ({error})") from None


if __name__ == "__main__":
    print(install(ROOT) or f"the native library is in {ROOT / PLACE}")
