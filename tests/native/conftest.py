"""The native library, built once for all its tests."""

import subprocess
from pathlib import Path

import pytest

NATIVE = Path(__file__).parents[2] / "native"


@pytest.fixture(scope="session")
def native_library():
    subprocess.run(["/tmp/scratch-layers/build.sh"], check=True)
    return Path("/tmp/scratch-layers/b/libdoge.so")
