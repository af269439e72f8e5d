"""The library of native kernels, built once for all its tests."""

import os
from pathlib import Path

import build_library
import pytest

# Of a process that runs these tests with another library: one with sanitizers.
LIBRARY = "NATIVE_TEST_LIBRARY"


@pytest.fixture(scope="session")
def native_library() -> Path:
    """The library of the sources as they are."""
    if LIBRARY in os.environ:
        return Path(os.environ[LIBRARY])
    try:
        return build_library.build(build_library.ROOT / "build" / "native" / "tests")
    except build_library.BuildError as error:
        pytest.skip(str(error))
