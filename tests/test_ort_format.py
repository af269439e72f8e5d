"""Bundles whose graph is in ONNX Runtime's own format."""

import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import checkpoints
import numpy as np
import onnxruntime
import pytest
from checkpoints import random_ids
from conftest import TINY_CHECKPOINT
from environments import environment
from exported import in_ort_format, inlined
from onnxruntime.tools.reduced_build_config_parser import parse_config

import doge_onnx
from doge_onnx.bundle import GRAPH_NAME, WEIGHTS_NAME, Bundle, seal
from doge_onnx.errors import BundleError, DogeOnnxError
from doge_onnx.export import exporter, ort_format
from doge_onnx.export.exporter import export
from doge_onnx.runtime.engine.external_data import external_files

pytestmark = pytest.mark.slow

MOE = {"is_moe": True, "num_experts": 49, "num_experts_per_tok": 5, "num_hidden_layers": 1}
NEAREST = {"rounding": "nearest"}
# Config of the checkpoint, options of the export.
CASES = {
    "window": ({"num_hidden_layers": 1, "keep_window_size": 16}, {"state": "window"}),
    "int8, int8 state": (
        {"num_hidden_layers": 1},
        {"precision": "int8", "kv_cache": "int8"} | NEAREST,
    ),
    "int4": ({"num_hidden_layers": 2}, {"precision": "int4"} | NEAREST),
    "mixture of int8": (MOE, {"precision": "int8"} | NEAREST),
}


@pytest.fixture(scope="module")
def shipped(one_layer, tmp_path_factory) -> Path:
    """What an export leaves, compared with transformers."""
    return export(one_layer, tmp_path_factory.mktemp("ort") / "shipped", format="ort").path


@pytest.mark.parametrize("case", CASES)
def test_the_logits_are_those_of_the_onnx_format(case, tmp_path):
    config, options = CASES[case]
    checkpoint = checkpoints.make(tmp_path / "checkpoint", **config)
    onnx = export(checkpoint, tmp_path / "onnx", verify=False, **options).path
    ort = in_ort_format(onnx, tmp_path / "ort")
    ids = random_ids(40, 97)
    results = []
    for path in (onnx, ort):
        # The format has no functions, so none of the native kernels, whose products are more exact.
        model = doge_onnx.load(path, native=False)
        first, state = model.forward([ids[:30], ids[5:35]], logits="all")
        rest = []
        for token in ids[30:]:
            logits, state = model.forward([[token], [token]], state)
            rest.append(logits)
        results.append(np.concatenate([*first, *np.concatenate(rest)]))
    np.testing.assert_array_equal(*results)


def test_an_export_is_verified_in_the_format_that_is_shipped(shipped):
    manifest = Bundle.open(shipped).manifest
    assert manifest.graph == "model.ort"
    assert manifest.parity["passed"]
    others = {"config.json", "generation_config.json", "genai_config.json", "README.md"}
    assert set(manifest.files) == others | {"model.ort", "required_operators.config"}


def test_the_text_is_that_of_the_onnx_format(tiny_ort, tiny_bundle):
    prompt = "It was a dark and stormy night"
    texts = [
        doge_onnx.load(path).generate(prompt, max_new_tokens=40, temperature=0).text
        for path in (tiny_ort, tiny_bundle)
    ]
    assert texts[0] == texts[1]


def test_the_list_of_operators_is_what_a_reduced_build_reads(tiny_ort, tiny_bundle):
    path = tiny_ort / ort_format.OPERATORS_NAME
    operators, types = parse_config(str(path), enable_type_reduction=True)
    # Layouts of one kind of processor would be in a domain of their own.
    assert set(operators) == {"ai.onnx", "com.microsoft"}
    # What is computed of constants alone has been, and needs no operator any more.
    listed = {
        name for versions in operators.values() for names in versions.values() for name in names
    }
    graph = inlined(tiny_bundle).graph
    assert "Cos" not in listed
    assert {node.op_type for node in graph.node} - listed <= {"Cos", "Sin"}
    assert "GroupQueryAttention" in operators["com.microsoft"][1]
    assert types is not None
    assert path.read_text(encoding="utf-8").splitlines()[1] == "# - model.ort"


@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_a_tied_table_is_in_the_file_once(precision, tmp_path, monkeypatch):
    # So large that it is most of the model; the weights are in a file of their own before.
    monkeypatch.setattr(exporter, "MAX_EMBEDDED_BYTES", 0)
    checkpoint = checkpoints.make(tmp_path / "checkpoint", vocab_size=4001, num_hidden_layers=1)
    options = {} if precision == "fp32" else {"precision": precision} | NEAREST
    onnx = export(checkpoint, tmp_path / "onnx", verify=False, **options)
    ort = export(checkpoint, tmp_path / "ort", verify=False, format="ort", **options)
    assert WEIGHTS_NAME in onnx.manifest.files
    assert WEIGHTS_NAME not in ort.manifest.files
    table = 4001 * 48 * (4 if precision == "fp32" else 1)
    # Rotations that are computed as ONNX is loaded are in the file; so are, in the shape of a
    # lookup, the scales.
    assert onnx.size < ort.size < onnx.size + table / 2
    assert external_files(ort.path / "model.ort") == set()


def test_bench_knows_what_a_step_reads(tiny_ort):
    report = doge_onnx.bench(tiny_ort, contexts=[16], batches=[1], repetitions=1, tokens=4)
    manifest = Bundle.open(tiny_ort).manifest
    assert report.file_bytes == (tiny_ort / "model.ort").stat().st_size
    assert report.cells[0].bytes_per_step > manifest.weights_read.step_bytes(1)
    assert report.cells[0].mbu > 0


def test_the_card_and_genai_name_the_file(shipped):
    card = (shipped / "README.md").read_text(encoding="utf-8")
    assert "`model.ort`, in ONNX Runtime's own format" in card
    config = json.loads((shipped / "genai_config.json").read_text(encoding="utf-8"))
    assert config["model"]["decoder"]["filename"] == "model.ort"


@pytest.mark.external
def test_onnxruntime_genai_runs_it(shipped):
    prompt = random_ids(12, 97)
    expected = doge_onnx.load(shipped).generate(prompt, max_new_tokens=20)
    code = """
import sys, json
import onnxruntime_genai as og
model = og.Model(sys.argv[1])
params = og.GeneratorParams(model)
params.set_search_options(max_length=32)
generator = og.Generator(model, params)
generator.append_tokens(json.loads(sys.argv[2]))
while not generator.is_done():
    generator.generate_next_token()
print(json.dumps(generator.get_sequence(0).tolist()))
"""
    python = environment(Path(__file__).parent / "requirements" / "genai.txt")
    output = subprocess.check_output([python, "-c", code, shipped, json.dumps(prompt)], text=True)
    assert json.loads(output)[len(prompt) :] == expected.token_ids


# What is refused.


def test_a_model_that_is_too_large_is_refused_before_anything_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr(ort_format, "MAX_BYTES", 10_000_000)
    monkeypatch.setattr(exporter, "trace", lambda *_: pytest.fail("traced"))
    with pytest.raises(DogeOnnxError, match=r"at most 2 GB, and these .* about 0\.0 GB; choose"):
        export(TINY_CHECKPOINT, tmp_path / "out", format="ort")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "tflite"}, "format 'tflite' is not known; choose from onnx, ort"),
        ({"format": "ort", "target": "portable"}, "only ONNX Runtime reads the ORT format"),
        ({"format": "ort", "layout": "hub"}, "transformers.js reads no ORT format"),
    ],
)
def test_other_formats_and_targets_are_refused(options, message, tmp_path):
    with pytest.raises(DogeOnnxError, match=re.escape(message)):
        export(TINY_CHECKPOINT, tmp_path / "out", **options)


def test_what_onnx_runtime_says_of_a_failed_conversion_is_passed_on(tmp_path):
    (tmp_path / GRAPH_NAME).write_bytes(b"no graph")
    with pytest.raises(BundleError, match="cannot write the ORT format"):
        ort_format.convert(tmp_path / GRAPH_NAME)


def test_onnx_under_the_other_name_does_not_load(tiny_bundle, tmp_path):
    """Its external data would not have been looked at."""
    path = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    (path / GRAPH_NAME).rename(path / "model.ort")
    seal(path, replace(Bundle.open(tiny_bundle).manifest, graph="model.ort"))
    with pytest.raises(BundleError, match="ONNX Runtime cannot load"):
        doge_onnx.load(path)
    assert onnxruntime.InferenceSession(tiny_bundle / GRAPH_NAME).get_inputs()
