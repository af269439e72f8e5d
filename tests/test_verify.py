"""The comparison with the reference: what it finds, and what it leaves behind."""

from __future__ import annotations

import shutil
from pathlib import Path

import checkpoints
import pytest
import torch
from checkpoints import rope
from exported import MAIN, tree

import doge_onnx
from doge_onnx import bundle as bundles
from doge_onnx.bundle import GRAPH_NAME, MANIFEST_NAME, Bundle
from doge_onnx.errors import (
    BundleError,
    CheckpointError,
    ParityError,
)
from doge_onnx.export import verify as verifier
from doge_onnx.export.exporter import export

pytestmark = pytest.mark.slow


def test_an_export_is_compared_with_the_reference(main):
    parity = main.report.parity
    assert parity is not None
    assert parity.passed
    assert parity.greedy_matched == parity.greedy_total > 20
    assert max(parity.prefill, parity.decode, parity.batch) == parity.max_abs_diff
    assert 0 < parity.max_abs_diff <= parity.tolerance < 1e-3 * parity.logit_scale
    compared = {"checkpoint": "tiny-doge", "revision": None}
    assert main.manifest.parity == parity.as_dict() | compared
    assert main.manifest.parity["passed"] is True
    assert main.manifest.parity["reference"].startswith("transformers ")


@pytest.mark.parametrize("options", [{"precision": "int8"}, {"kv_cache": "int8"}])
def test_a_quantized_bundle_is_not_held_to_parity(options, one_layer, make_bundle):
    made = make_bundle(one_layer, verify=False, **options)
    with pytest.raises(BundleError, match=r"is quantized.*evaluate it with"):
        verifier.verify(made.path, one_layer)
    assert made.manifest.parity is None


def test_an_export_without_comparison_says_so(second):
    assert second.report.parity is None
    assert second.manifest.parity is None


@pytest.fixture
def copy(main, tmp_path) -> Path:
    return Path(shutil.copytree(main.path, tmp_path / "copy"))


def test_verify_writes_its_figures_and_nothing_else(copy, main):
    bundles.write_parity(Bundle.open(copy), {})
    before = tree(copy)
    said: list[str] = []
    report = doge_onnx.verify(copy, main.checkpoint, progress=said.append)
    assert report.passed
    report.require("it")
    compared = {"checkpoint": "tiny-doge", "revision": None}
    assert Bundle.open(copy).manifest.parity == report.as_dict() | compared
    after = tree(copy)
    assert after.pop(MANIFEST_NAME) != before.pop(MANIFEST_NAME)
    assert after == before
    assert len(said) > 2


def _reseeded(directory: Path, out: Path) -> Path:
    return checkpoints.make(out, seed=1, **MAIN)


def _without_gates(directory: Path, out: Path) -> Path:
    model = checkpoints.reference(directory)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.A.zero_()
    model.save_pretrained(out)
    return out


def _other_stretch(directory: Path, out: Path) -> Path:
    shutil.copytree(directory, out)
    checkpoints.edit_config(out, **rope("dynamic", 2.0))
    return out


@pytest.mark.parametrize("change", [_reseeded, _without_gates, _other_stretch])
def test_verify_finds_a_model_that_differs(copy, main, change, tmp_path):
    other = change(main.checkpoint, tmp_path / "other")
    report = doge_onnx.verify(copy, other)
    assert not report.passed
    assert report.max_abs_diff > report.tolerance
    with pytest.raises(ParityError) as error:
        report.require("some/bundle")
    assert "some/bundle differs from transformers" in str(error.value)
    assert f"{report.max_abs_diff:.2e}" in str(error.value)
    assert Bundle.open(copy).manifest.parity["passed"] is False
    assert tree(copy)[GRAPH_NAME] == tree(main.path)[GRAPH_NAME]


def test_greedy_tokens_count_even_where_logits_are_close():
    figures = {
        "prefill": 1e-6,
        "decode": 1e-6,
        "batch": 1e-6,
        "greedy_matched": 24,
        "greedy_total": 24,
        "logit_scale": 10.0,
        "tolerance": 1e-3,
        "tokens": 10,
        "reference": "transformers",
        "device": "cpu",
    }
    assert verifier.ParityReport(**figures).passed
    for name in ("prefill", "decode", "batch"):
        assert not verifier.ParityReport(**{**figures, name: 2e-3}).passed
        assert not verifier.ParityReport(**{**figures, name: float("nan")}).passed
    assert not verifier.ParityReport(**{**figures, "greedy_matched": 23}).passed


def test_verify_refuses_another_shape(copy, second_checkpoint, one_layer):
    before = tree(copy)
    for other, difference in ((second_checkpoint, "vocabulary of 101"), (one_layer, "1 layers")):
        with pytest.raises(CheckpointError, match=difference):
            doge_onnx.verify(copy, other)
    assert tree(copy) == before


def test_verify_refuses_an_altered_bundle(copy, main):
    (copy / GRAPH_NAME).write_bytes(b"x" + (copy / GRAPH_NAME).read_bytes()[1:])
    with pytest.raises(BundleError, match="differs from the checksum"):
        doge_onnx.verify(copy, main.checkpoint)


def test_an_export_that_differs_from_the_reference_is_not_put_in_place(
    one_layer, tmp_path, monkeypatch
):
    monkeypatch.setitem(verifier.RELATIVE_TOLERANCES, "float32", 0.0)
    with pytest.raises(ParityError, match="bundle differs from transformers"):
        export(one_layer, tmp_path / "bundle")
    assert not list(tmp_path.iterdir())
