"""The native library, built once for all its tests."""

import build_library
import pytest


@pytest.fixture(scope="session")
def native_library(tmp_path_factory):
    try:
        compiler = build_library.host()
    except build_library.BuildError as error:
        pytest.skip(str(error))
    return build_library.build(tmp_path_factory.mktemp("native"), compiler)
