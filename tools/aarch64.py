"""An aarch64 system that runs under emulation: Debian's Python, the wheels of PyPI and ours.

Knows how it is put together, in build/aarch64 and nowhere else, and how a program is run in it.
Packages come from Debian's archive through apt with a state of its own, so neither root nor a
foreign architecture on this machine is needed; QEMU's user mode emulator comes the same way where
it is not installed. It shows that something runs, never how fast.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from pathlib import Path

import base_install
from environments import ROOT

DIRECTORY = ROOT / "build" / "aarch64"
SYSTEM, PACKAGES = DIRECTORY / "root", DIRECTORY / "site-packages"
QEMU = "qemu-aarch64-static"
# Of the C library that each of these is good for, pip wants to be told all.
_PLATFORMS = ("manylinux2014", "manylinux_2_17", "manylinux_2_27", "manylinux_2_28")
_PROCESSORS = 2
# What is read there of an x86 machine makes ONNX Runtime crash as it is imported: its library
# for this takes the processors that it finds for Arm's and finds no core in them.
_CPUINFO = """processor\t: {}
BogoMIPS\t: 108.00
Features\t: fp asimd evtstrm crc32 cpuid
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x0
CPU part\t: 0xd08
CPU revision\t: 3

"""


def unavailable() -> str | None:
    """Why this machine cannot have it, or None."""
    if platform.machine() == "aarch64":
        return "this machine is an aarch64 one: what the other tests show is shown for it"
    try:
        distribution = platform.freedesktop_os_release()["ID"]
    except OSError:
        distribution = platform.system()
    # Others that have apt keep their arm64 packages elsewhere.
    if distribution != "debian" or not shutil.which("apt-get") or not shutil.which("dpkg-deb"):
        return f"Debian's apt-get and dpkg-deb make the aarch64 system; this is {distribution}"
    return None


def make() -> None:
    """Put the system together, or bring it up to date."""
    if not (DIRECTORY / "system.txt").exists():
        print(f"making an aarch64 system in {DIRECTORY}", file=sys.stderr)
        shutil.rmtree(DIRECTORY, ignore_errors=True)
        _make_system()
        (DIRECTORY / "system.txt").touch()
    wheel = base_install.wheel()
    if base_install.is_new(PACKAGES, wheel.parent.name):
        shutil.rmtree(PACKAGES, ignore_errors=True)
        platforms = [part for name in _PLATFORMS for part in ("--platform", f"{name}_aarch64")]
        base_install.pip(
            "install",
            *("--target", PACKAGES),
            *platforms,
            *("--only-binary", ":all:", "--python-version", _version()),
            *("--constraint", base_install.CONSTRAINTS),
            wheel,
        )
        base_install.mark(PACKAGES, wheel.parent.name)


def run(cpu: str, *arguments: str | Path, timeout: float = 300) -> str:
    """What Python prints when it is run with `arguments` on an emulated processor.

    Args:
        cpu: As QEMU's `-cpu` takes it.
        arguments: Of the interpreter.
        timeout: Seconds after which it is given up.

    Raises:
        subprocess.CalledProcessError: It failed; the error has what it wrote.
    """
    emulator = shutil.which(QEMU) or DIRECTORY / "usr" / "bin" / QEMU
    python = SYSTEM / "usr" / "bin" / f"python{_version()}"
    return subprocess.run(
        [emulator, "-cpu", cpu, "-L", SYSTEM, python, "-X", "utf8", *arguments],
        env=base_install.variables() | {"PYTHONPATH": str(PACKAGES)},
        check=True,
        capture_output=True,
        encoding="utf-8",
        timeout=timeout,
    ).stdout


def _make_system() -> None:
    packages = ["python3-minimal", "libpython3-stdlib", "libstdc++6"]
    if not shutil.which(QEMU):
        packages.append(f"qemu-user-static:{_own_architecture()}")
    for package in _download(packages):
        if package.name.startswith("qemu-user-static"):
            _extract(package, DIRECTORY, f"./usr/bin/{QEMU}")
        else:
            _extract(package, SYSTEM)
    shutil.rmtree(DIRECTORY / "apt")
    # Debian 13 has the loader in /usr/lib, and a link to it in a package that is not needed.
    if not (SYSTEM / "lib").exists():
        (SYSTEM / "lib").symlink_to("usr/lib")
    # QEMU looks for every file here before it takes the one of this machine.
    _write("proc/cpuinfo", "".join(_CPUINFO.format(i) for i in range(_PROCESSORS)))
    for name in ("possible", "present"):
        _write(f"sys/devices/system/cpu/{name}", f"0-{_PROCESSORS - 1}\n")
    if _version() == f"{sys.version_info.major}.{sys.version_info.minor}":
        # Byte code is the same everywhere, and slow to make under emulation.
        library = SYSTEM / "usr" / "lib" / f"python{_version()}"
        subprocess.run([sys.executable, "-m", "compileall", "-q", library], check=True)


def _download(packages: list[str]) -> list[Path]:
    """Fetch packages of arm64 and all that they need, as if nothing were installed."""
    apt = DIRECTORY / "apt"
    for name in ("state/lists/partial", "cache/archives/partial"):
        (apt / name).mkdir(parents=True)
    (apt / "status").touch()
    options = {
        "APT::Architecture": "arm64",
        "APT::Architectures": f"arm64,{_own_architecture()}",
        "APT::Install-Recommends": "0",
        "Acquire::Languages": "none",
        "Dir::State": apt / "state",
        "Dir::State::status": apt / "status",
        "Dir::Cache": apt / "cache",
        # Not as the user _apt, who may not write here.
        "APT::Sandbox::User": "",
        "Debug::NoLocking": "1",
    }
    command = ["apt-get", "-qq", "-y"]
    command += [part for name, value in options.items() for part in ("-o", f"{name}={value}")]
    subprocess.run([*command, "update"], check=True)
    subprocess.run([*command, "install", "--download-only", *packages], check=True)
    return sorted((apt / "cache" / "archives").glob("*.deb"))


def _extract(package: Path, directory: Path, *members: str) -> None:
    with subprocess.Popen(
        ["dpkg-deb", "--fsys-tarfile", package], stdout=subprocess.PIPE
    ) as archive:
        directory.mkdir(exist_ok=True)
        tar = ["tar", "--extract", "--no-same-owner", "--directory", str(directory), *members]
        subprocess.run(tar, stdin=archive.stdout, check=True)


def _own_architecture() -> str:
    command = ["dpkg", "--print-architecture"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def _write(name: str, text: str) -> None:
    path = SYSTEM / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="ascii")


def _version() -> str:
    """Of the Python in it, such as 3.11."""
    (library,) = (SYSTEM / "usr" / "lib").glob("python3.*")
    return library.name.removeprefix("python")


if __name__ == "__main__":
    if reason := unavailable():
        print(f"not made: {reason}", file=sys.stderr)
    else:
        make()
