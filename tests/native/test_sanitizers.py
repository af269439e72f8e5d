"""The tests of the kernels once more, in a library that finds wrong memory accesses.

AddressSanitizer and UndefinedBehaviorSanitizer end the process at the first access outside of a
tensor or a buffer, overflow of a signed number, wrong alignment and the like.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import build_library
import pytest
from native_library import LIBRARY

pytestmark = pytest.mark.external

# Tests of the library; others compile something of their own.
KERNELS = [
    path
    for path in sorted(Path(__file__).parent.glob("test_*.py"))
    if path.name != Path(__file__).name and "native_library" in path.read_text(encoding="utf-8")
]
FLAGS = (
    *("-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
    *("-fno-omit-frame-pointer", "-g1", "-O1"),
)


def runtime(name: str) -> Path:
    """A sanitizer's library, which the process loads before all others."""
    command = [*build_library.host().compile, f"-print-file-name=lib{name}.so"]
    found = Path(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())
    if not found.is_absolute():
        pytest.skip(f"the C++ compiler has no shared library of {name}")
    return found


@pytest.fixture(scope="module")
def variables() -> dict[str, str]:
    if sys.platform != "linux":
        pytest.skip("LD_PRELOAD is of Linux")
    try:
        preloaded = [str(runtime(name)) for name in ("asan", "ubsan")]
        library = build_library.build(
            build_library.ROOT / "build" / "native" / "sanitized", flags=FLAGS
        )
    except build_library.BuildError as error:
        pytest.skip(str(error))
    return os.environ | {
        LIBRARY: str(library),
        "LD_PRELOAD": ":".join(preloaded),
        # Python and ONNX Runtime leave memory to the end of the process.
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }


@pytest.mark.parametrize("tests", KERNELS, ids=lambda path: path.stem)
def test_kernels_keep_to_their_memory(tests, variables):
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", tests],
        env=variables,
        capture_output=True,
        text=True,
        check=False,
        timeout=1200,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
