"""The wheels for all systems: what is in each, and that this machine's works."""

import platform
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import base_install
import build_library
import pytest
import wheels

import doge_onnx

pytestmark = pytest.mark.external

PROMPT = "It was a dark and stormy night"
INSTRUCTIONS = {
    "x86_64": {"scalar", "avx2", "avx_vnni", "avx512_vnni"},
    "aarch64": {"scalar", "neon", "neon_dotprod", "neon_i8mm"},
}
# What every system with the GNU C library has.
NEEDED = {"libc.so.6", "libm.so.6", "ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1"}


def library(system: wheels.System, directory: Path) -> Path:
    """The library of a system's wheel, unpacked."""
    with zipfile.ZipFile(wheels.wheel(system)) as packed:
        packed.extractall(directory)
    (path,) = (directory / build_library.PLACE).iterdir()
    return path


@pytest.mark.parametrize("system", wheels.SYSTEMS, ids=lambda system: system.tag)
def test_each_wheel_has_the_kernels_of_its_system(system, tmp_path):
    assert wheels.wheel(system).name.endswith(f"-py3-none-{system.tag}.whl")
    content = library(system, tmp_path).read_bytes()
    assert b"RegisterCustomOps" in content
    for name in INSTRUCTIONS[system.machine]:
        assert name.encode() + b"\0" in content
    # Where it was built is nobody's business.
    assert str(build_library.ROOT).encode() not in content


@pytest.mark.parametrize("machine", INSTRUCTIONS)
def test_a_library_for_linux_needs_an_old_glibc_and_nothing_else(machine, tmp_path):
    if shutil.which("readelf") is None:
        pytest.skip("there is no readelf, which shows what a library needs")
    system = wheels.system(machine, "Linux")
    path = library(system, tmp_path)
    command = ["readelf", "--wide", "--dynamic", "--dyn-syms", path]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert set(re.findall(r"NEEDED.*\[(.+)\]", shown)) <= NEEDED
    versions = {tuple(map(int, each)) for each in re.findall(r"@GLIBC_(\d+)\.(\d+)", shown)}
    allowed = tuple(map(int, re.findall(r"\d+", system.tag)[:2]))
    assert versions
    assert max(versions) <= allowed


def test_the_wheel_for_all_systems_says_that_it_has_no_kernels(tmp_path):
    with zipfile.ZipFile(wheels.wheel(None)) as packed:
        assert wheels.wheel(None).name.endswith("-py3-none-any.whl")
        (name,) = (n for n in packed.namelist() if n.startswith(build_library.PLACE.as_posix()))
        assert packed.read(name).decode() == "the wheel for all systems has no native kernels\n"


def test_the_wheel_of_this_machine_runs(tiny_bundle, tmp_path):
    machine = build_library.host().machine
    found = [s for s in wheels.SYSTEMS if (s.machine, s.name) == (machine, platform.system())]
    if not found:
        pytest.skip("there is no wheel for this machine")
    packages = tmp_path / "packages"
    base_install.pip("install", "--no-deps", "--target", packages, wheels.wheel(found[0]))
    code = (
        "import sys, doge_onnx; model = doge_onnx.load(sys.argv[1]); "
        "print(doge_onnx.__file__); print(model.kernels); "
        "print(model.generate(sys.argv[2], max_new_tokens=12, temperature=0).text)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tiny_bundle, PROMPT],
        env=base_install.variables() | {"PYTHONPATH": str(packages), "PYTHONUTF8": "1"},
        cwd=tmp_path,
        capture_output=True,
        encoding="utf-8",
        check=True,
    )
    where, kernels, text = done.stdout.split("\n", 2)
    assert Path(where).is_relative_to(packages)
    assert kernels.startswith("doge_onnx (")
    expected = doge_onnx.load(tiny_bundle).generate(PROMPT, max_new_tokens=12, temperature=0)
    assert text == expected.text + "\n"
