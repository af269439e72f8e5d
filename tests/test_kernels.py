"""Which kernels run a bundle: this package's own or ONNX Runtime's, and what says so."""

from __future__ import annotations

import json

import build_library
import fake_bundle
import native_bundle
import numpy as np
import pytest
from commands import invoke

import doge_onnx
from doge_onnx.manifest import Manifest
from doge_onnx.runtime.engine import kernels

IDS = [5, 9, 11, 7]


@pytest.fixture
def place(monkeypatch, tmp_path):
    """An empty place for the library, which this process takes for the installation's."""
    for name in (kernels.SWITCH, kernels.INSTRUCTIONS):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(kernels, "PLACE", tmp_path / "place")
    return tmp_path / "place"


@pytest.fixture
def library(place):
    try:
        return build_library.build(place)
    except build_library.BuildError as error:
        pytest.skip(str(error))


@pytest.fixture
def bundle(tmp_path):
    return native_bundle.write(tmp_path / "bundle")


def runs_natively(model) -> bool:
    """Whether the logits are those of the kernel; the body of the function computes others."""
    logits, _ = model.forward([IDS], logits="all")
    return np.allclose(logits[0], fake_bundle.reference(IDS), atol=1e-3)


def test_the_library_runs_where_it_is(library, bundle):
    model = doge_onnx.load(bundle)
    assert runs_natively(model)
    assert model.kernels.reason is None
    assert str(model.kernels) == f"doge_onnx ({model.kernels.instructions})"


def test_a_caller_can_switch_it_off(library, bundle):
    model = doge_onnx.load(bundle, native=False)
    assert not runs_natively(model)
    assert str(model.kernels) == "ONNX Runtime's, because native kernels are switched off"


def test_the_environment_can_switch_it_off(library, bundle, monkeypatch):
    monkeypatch.setenv("DOGE_ONNX_NATIVE", "0")
    model = doge_onnx.load(bundle)
    assert not runs_natively(model)
    assert model.kernels == doge_onnx.Kernels(None, "DOGE_ONNX_NATIVE is 0")


def test_native_is_yes_or_no(bundle):
    with pytest.raises(doge_onnx.InputError, match="native must be True or False, not 'yes'"):
        doge_onnx.load(bundle, native="yes")


def test_the_environment_chooses_the_instruction_set(library, bundle, monkeypatch):
    monkeypatch.setenv("DOGE_ONNX_INSTRUCTIONS", "scalar")
    model = doge_onnx.load(bundle)
    assert model.kernels.instructions == "scalar"
    assert runs_natively(model)


def test_an_instruction_set_that_is_not_there_is_named(library, bundle, monkeypatch):
    monkeypatch.setenv("DOGE_ONNX_INSTRUCTIONS", "abacus")
    with pytest.raises(doge_onnx.InputError, match="DOGE_ONNX_INSTRUCTIONS is 'abacus'"):
        doge_onnx.load(bundle)


def test_without_a_library_the_functions_run(place, bundle):
    model = doge_onnx.load(bundle)
    assert not runs_natively(model)
    assert model.kernels.reason == "doge-onnx was installed without native kernels"


def test_setup_leaves_a_reason_where_there_is_no_compiler(monkeypatch, tmp_path, bundle):
    monkeypatch.setenv("CXX", "/nonexistent/c++")
    told = build_library.install(tmp_path)
    monkeypatch.setattr(kernels, "PLACE", tmp_path / build_library.PLACE)
    assert doge_onnx.load(bundle).kernels.reason == told
    assert told.startswith("doge-onnx was installed without native kernels: there is no C++ comp")


def test_a_library_that_cannot_be_loaded_is_no_error(place, bundle):
    place.mkdir()
    (place / "libdoge_onnx.so").write_bytes(b"\x7fELF of something else")
    model = doge_onnx.load(bundle)
    assert not runs_natively(model)
    assert "the library of native kernels cannot be loaded" in model.kernels.reason


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"target": "portable"}, "a bundle of the target portable has no native operators"),
        ({"device": "cuda"}, "a bundle for the device cuda has no native operators"),
        ({"graph": "model.ort"}, "a graph in ONNX Runtime's own format has no native operators"),
        ({}, "its graph has no native operators"),
    ],
)
def test_a_bundle_without_native_operators_says_why(library, changes, reason):
    manifest: Manifest = fake_bundle.manifest(**changes)
    assert kernels.choose_kernels(manifest).reason == reason


def test_on_a_gpu_native_operators_have_no_kernels(library):
    manifest = fake_bundle.manifest(native_operators=True)
    assert kernels.choose_kernels(manifest, "cuda").reason == "it runs on cuda"


def test_info_says_in_one_line_which_kernels_run(library, bundle, monkeypatch):
    shown = str(doge_onnx.load(bundle).kernels)
    (line,) = (row for row in invoke("info", bundle).stdout.splitlines() if "kernels" in row)
    assert line.split(maxsplit=1) == ["kernels", shown]
    monkeypatch.setenv("DOGE_ONNX_NATIVE", "0")
    assert "ONNX Runtime's, because DOGE_ONNX_NATIVE is 0" in invoke("info", bundle).stdout
    found = json.loads(invoke("info", bundle, "--json").stdout)["kernels"]
    assert found == {"instructions": None, "reason": "DOGE_ONNX_NATIVE is 0"}
