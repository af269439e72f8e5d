"""The layout "hub": other names and a sub-directory, and all that reads bundles reads it, too."""

import shutil
import subprocess
from pathlib import Path

import checkpoints
import numpy as np
import onnx
import pytest
from environments import environment
from onnx import inliner
from test_examples import PROMPT, run
from typer.testing import CliRunner

import doge_onnx
from doge_onnx import bundle as bundles
from doge_onnx.cli import app
from doge_onnx.errors import BundleError
from doge_onnx.export import exporter, quantize
from doge_onnx.runtime.engine.external_data import external_files

pytestmark = pytest.mark.slow

MOE = {"is_moe": True, "num_experts": 49, "num_experts_per_tok": 5, "num_hidden_layers": 2}
GENAI = """
import sys
import onnxruntime_genai as og
bundle, *ids = sys.argv[1:]
model = og.Model(bundle)
params = og.GeneratorParams(model)
params.set_search_options(max_length=len(ids) + 12, do_sample=False)
generator = og.Generator(model, params)
generator.append_tokens([int(token) for token in ids])
while not generator.is_done():
    generator.generate_next_token()
print(*generator.get_sequence(0))
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("mixture") / "checkpoint"
    return checkpoints.make(directory, **MOE)


@pytest.fixture(scope="module")
def pair(checkpoint, tmp_path_factory):
    """The same checkpoint in int4, which has matrices of 8 bits as well, in both layouts."""
    out = tmp_path_factory.mktemp("pair")
    options = {"precision": "int4", "rounding": "nearest", "verify": False}
    return [
        doge_onnx.export(checkpoint, out / layout, layout=layout, **options).path
        for layout in bundles.LAYOUTS
    ]


def ids_for(bundle, length=20):
    return checkpoints.random_ids(length, doge_onnx.load(bundle).manifest.vocab_size, 4)


def test_every_precision_has_a_name_of_its_own():
    names = {bundles.graph_name("hub", name) for name in ("fp32", "fp16", *quantize.RECIPES)}
    assert len(names) == 2 + len(quantize.RECIPES)
    for layout, precision, words in (
        ("nested", "fp32", "layout 'nested'"),
        ("hub", "int3", "precision 'int3'"),
    ):
        with pytest.raises(BundleError, match=words):
            bundles.graph_name(layout, precision)


def test_both_layouts_compute_the_same(pair):
    ids = ids_for(pair[0])
    logits = [doge_onnx.load(path).forward([ids], logits="all")[0] for path in pair]
    np.testing.assert_allclose(*logits, rtol=1e-5, atol=1e-5)


def test_the_graph_has_nothing_that_builds_for_browsers_lack(pair):
    kinds = []
    for path in pair:
        model = inliner.inline_local_functions(onnx.load(bundles.Bundle.open(path).graph))
        weights = {tensor.name: list(tensor.dims) for tensor in model.graph.initializer}
        kinds.append({node.op_type for node in model.graph.node})
        norms = [node for node in model.graph.node if node.op_type == "RMSNormalization"]
        assert norms
        if path == pair[1]:
            assert all(len(weights.get(node.input[1], [1])) == 1 for node in norms)
    assert kinds[0] - kinds[1] == {"GatherBlockQuantized"}


@pytest.fixture(scope="module")
def split(checkpoint, tmp_path_factory):
    """Written by the command line, with its weights in a file of their own."""
    out = tmp_path_factory.mktemp("split") / "bundle"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exporter, "MAX_EMBEDDED_BYTES", 0)
        invoke("export", checkpoint, out, "--layout", "hub", "--no-verify")
    return out


def invoke(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.output


def test_large_weights_are_beside_the_graph(split, tmp_path):
    assert external_files(split / "onnx" / "model.onnx") == {"model.onnx_data"}
    files = set(bundles.read_manifest(split).files)
    assert {"onnx/model.onnx", "onnx/model.onnx_data"} < files
    assert {path.name for path in split.iterdir() if path.is_dir()} == {"onnx"}
    # Whoever alters them is found out.
    copy = Path(shutil.copytree(split, tmp_path / "copy"))
    (copy / "onnx" / "model.onnx_data").write_bytes(b"")
    with pytest.raises(BundleError, match=r"onnx/model\.onnx_data"):
        doge_onnx.load(copy)


def test_all_verbs_read_it(checkpoint, split):
    assert "onnx/model.onnx_data" in invoke("info", split)
    invoke("verify", split, "--reference", checkpoint)
    invoke("eval", split, "--max-tokens", "64", "--window", "16")
    invoke(
        "bench", split, "--contexts", "4", "--batches", "1", "--tokens", "2", "--repetitions", "1"
    )


def test_the_bare_loop_reads_it(tiny_hub_bundle):
    bundle = tiny_hub_bundle("fp32")
    expected = doge_onnx.load(bundle).generate(PROMPT, max_new_tokens=60, temperature=0).text
    for script in ("bare_loop.py", "generate.py"):
        result = run(script, bundle, PROMPT)
        assert (result.stdout, result.stderr) == (expected + "\n", "")


@pytest.mark.external
def test_onnxruntime_genai_reads_it(pair, split):
    python = environment(Path(__file__).parent / "requirements" / "genai.txt")
    for bundle in (pair[1], split):
        ids = ids_for(bundle, 8)
        command = [python, "-c", GENAI, bundle, *map(str, ids)]
        result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        theirs = [int(token) for token in result.stdout.split()]
        ours = doge_onnx.load(bundle).generate(ids, max_new_tokens=12, temperature=0).token_ids
        assert theirs == ids + ours
