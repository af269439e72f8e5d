"""The phases of a node on several threads, watched by ThreadSanitizer."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import build_library
import pytest

pytestmark = pytest.mark.slow

CELLS, RUNS = 24, 300


def test_phases_are_ordered_for_every_thread(tmp_path):
    if sys.platform != "linux":
        pytest.skip("ThreadSanitizer is tried on Linux only")
    program = tmp_path / "team"
    try:
        compiler = build_library.host().compile
    except build_library.BuildError as error:
        pytest.skip(str(error))
    files = [Path(__file__).with_name("team_check.cc"), build_library.SOURCES / "context.cc"]
    flags = ["-std=c++17", "-O1", "-g", "-pthread", f"-I{build_library.SOURCES}"]
    command = [*compiler, *flags, "-fsanitize=thread", *files, "-o", program]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    if "tsan" in built.stderr:
        pytest.skip("the C++ compiler has no ThreadSanitizer")
    assert built.returncode == 0, built.stderr
    done = subprocess.run([program], capture_output=True, text=True, check=False, timeout=300)
    if "unexpected memory mapping" in done.stderr:
        pytest.skip("ThreadSanitizer does not run on this system")
    assert done.returncode == 0, done.stderr[-4000:]
    # Of each run: all cells see the sum of the first phase, and one cell of it.
    sums = [sum(cell + run for cell in range(CELLS)) for run in range(RUNS)]
    assert int(done.stdout) == sum((CELLS + 1) * each for each in sums)
