"""An emulated aarch64 system: Debian's Python, wheels from PyPI and the wheel of this package.

Knows how to build it in build/aarch64, and how to run a program in it. apt fetches the packages
from Debian's archive into a state directory of its own, so this machine needs neither root nor a
foreign architecture; QEMU's user mode emulator is fetched in the same way if it is not installed.
It shows that a program runs, never how fast.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from pathlib import Path

import base_install
import wheels
from environments import ROOT

DIRECTORY = ROOT / "build" / "aarch64"
SYSTEM, PACKAGES = DIRECTORY / "root", DIRECTORY / "site-packages"
QEMU = "qemu-aarch64-static"
# pip accepts only wheels for the platforms that it is given, so all must be named.
_PLATFORMS = ("manylinux2014", "manylinux_2_17", "manylinux_2_27", "manylinux_2_28")
_PROCESSORS = 2
# The emulated /proc/cpuinfo. With that of an x86 machine, ONNX Runtime crashes when it is
# imported: its library for processor detection finds no Arm core in it.
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
    """Why the system cannot be made on this machine, or None if it can."""
    if platform.machine() == "aarch64":
        return "this machine is aarch64, so the other tests already run on aarch64"
    try:
        distribution = platform.freedesktop_os_release()["ID"]
    except OSError:
        distribution = platform.system()
    # Other distributions with apt keep their arm64 packages elsewhere.
    if distribution != "debian" or not shutil.which("apt-get") or not shutil.which("dpkg-deb"):
        return f"Debian's apt-get and dpkg-deb make the aarch64 system; this is {distribution}"
    return None


def make() -> None:
    """Make the system, or bring it up to date."""
    if not (DIRECTORY / "system.txt").exists():
        print(f"making an aarch64 system in {DIRECTORY}", file=sys.stderr)
        shutil.rmtree(DIRECTORY, ignore_errors=True)
        _make_system()
        (DIRECTORY / "system.txt").touch()
    wheel = wheels.wheel(wheels.system("aarch64", "Linux"))
    version = wheel.parent.parent.name
    if base_install.is_new(PACKAGES, version):
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
        base_install.mark(PACKAGES, version)


def run(cpu: str, *arguments: str | Path, timeout: float = 300) -> str:
    """Run Python with `arguments` on an emulated processor, and return its output.

    Args:
        cpu: The processor, by QEMU's name for `-cpu`.
        arguments: Arguments of the interpreter.
        timeout: Seconds after which the process is ended.

    Raises:
        subprocess.CalledProcessError: Python failed; the error has its output.
    """
    emulator = shutil.which(QEMU) or DIRECTORY / "usr" / "bin" / QEMU
    python = SYSTEM / "usr" / "bin" / f"python{_version()}"
    return subprocess.run(
        [emulator, "-cpu", cpu, "-L", SYSTEM, python, "-X", "utf8", *arguments],
        env=base_install.variables() | {"PYTHONPATH": str(PACKAGES)},
        # Not the repository, whose package Python would import in place of the wheel's.
        cwd=DIRECTORY,
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
    # Debian 13 has the loader in /usr/lib; the link to it is in a package that is not installed.
    if not (SYSTEM / "lib").exists():
        (SYSTEM / "lib").symlink_to("usr/lib")
    # QEMU looks for every file in the system before it takes this machine's own.
    _write("proc/cpuinfo", "".join(_CPUINFO.format(i) for i in range(_PROCESSORS)))
    for name in ("possible", "present"):
        _write(f"sys/devices/system/cpu/{name}", f"0-{_PROCESSORS - 1}\n")
    if _version() == f"{sys.version_info.major}.{sys.version_info.minor}":
        # Byte code does not depend on the processor, and compiling it under emulation is slow.
        library = SYSTEM / "usr" / "lib" / f"python{_version()}"
        subprocess.run([sys.executable, "-m", "compileall", "-q", library], check=True)


def _download(packages: list[str]) -> list[Path]:
    """Fetch arm64 packages and all their dependencies, whatever is installed here."""
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
        # apt's own user, _apt, may not write here.
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
    """Version of the system's Python, such as 3.11."""
    (library,) = (SYSTEM / "usr" / "lib").glob("python3.*")
    return library.name.removeprefix("python")


if __name__ == "__main__":
    if reason := unavailable():
        print(f"not made: {reason}", file=sys.stderr)
    else:
        make()
