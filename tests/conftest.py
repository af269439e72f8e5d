"""Bundles that several test modules share; making one takes seconds."""

import os
import shutil
from pathlib import Path

import pytest

import doge_onnx

pytest_plugins = ["exported", "native_library"]

TINY_CHECKPOINT = Path(__file__).parent.parent / "examples" / "doge-tiny"
# Fixtures that export a real checkpoint; a test with one of them is marked as slow.
EXPORTS = {"tiny_bundle", "tiny_portable_bundle", "tiny_hub_bundle", "tiny_ort", "make_bundle"}


def pytest_configure():
    # Tests look at what the command line prints, so nobody's settings may colour it, or hide
    # that it is buffered.
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "PYTHONUNBUFFERED"):
        os.environ.pop(name, None)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        if EXPORTS.intersection(item.fixturenames):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory):
    """examples/doge-tiny for ONNX Runtime; copy it before changing anything."""
    out = tmp_path_factory.mktemp("bundles") / "tiny"
    return doge_onnx.export(TINY_CHECKPOINT, out, verify=False).path


@pytest.fixture
def bundle_copy(tiny_bundle, tmp_path):
    """A copy of `tiny_bundle`, to be changed."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


@pytest.fixture(scope="session")
def tiny_portable_bundle(tmp_path_factory):
    """examples/doge-tiny in standard operators; copy it before changing anything."""
    out = tmp_path_factory.mktemp("bundles") / "tiny-portable"
    return doge_onnx.export(TINY_CHECKPOINT, out, target="portable", verify=False).path


@pytest.fixture(scope="session")
def tiny_hub_bundle(tmp_path_factory):
    """examples/doge-tiny in the layout of the Hub, by precision; each is made once."""
    made = {}

    def get(precision):
        if precision not in made:
            out = tmp_path_factory.mktemp("bundles") / f"tiny-hub-{precision}"
            # The quickest rounding: how good it is does not matter here.
            rounding = "nearest" if precision.startswith("int") else None
            options = {"precision": precision, "rounding": rounding, "layout": "hub"}
            made[precision] = doge_onnx.export(TINY_CHECKPOINT, out, verify=False, **options).path
        return made[precision]

    return get
