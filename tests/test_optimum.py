"""Optimum exports Doges with this package, and runs its bundles through transformers' `generate`.

All that needs Optimum runs in an environment of its own, with transformers 4.57.
"""

import importlib
import itertools
import json
import os
import shutil
import subprocess
from pathlib import Path

import checkpoints
import numpy as np
import onnx
import pytest
import tokenizers
from environments import ROOT, environment
from onnx import TensorProto, helper

import doge_onnx
from doge_onnx.bundle import Bundle

pytestmark = pytest.mark.external

TINY = ROOT / "examples" / "doge-tiny"
PROMPT = "It was a dark and stormy night"
PROMPTS = [PROMPT, "The old man", "Once"]
SMALL_IDS = [[5, 6, 7, 8, 9, 10, 11], [20, 21, 22], list(range(30, 50))]
COUNT = 30
WINDOW = 12
# Arguments of `optimum-cli export onnx -m examples/doge-tiny`, the exit code, and words at the end.
FAILING = {
    ("--task", "text-generation"): (2, "--task text-generation: the graph of a Doge always has"),
    ("--opset", "17"): (2, "--opset does not apply to a Doge"),
    ("--no-dynamic-axes",): (2, "--no-dynamic-axes does not apply to a Doge"),
    ("--dtype", "fp16", "--model-kwargs", '{"precision": "int8"}'): (
        2,
        "--dtype fp16 contradicts the precision that --model-kwargs names",
    ),
    ("--model-kwargs", "[1]"): (2, "--model-kwargs must be a JSON object"),
    ("--model-kwargs", '{"bits": 8}'): (
        2,
        "'bits' is not known for a Doge; choose from adapter, block_",
    ),
    ("--model-kwargs", '{"precision": "int8", "target": "portable"}'): (
        1,
        "error: standard ONNX has no fast operators for quantized weights",
    ),
    # What is no Doge, Optimum looks at itself.
    ("--model", "no/such-model"): (1, "LocalEntryNotFoundError"),
}


@pytest.fixture(scope="session")
def python():
    """The interpreter that has Optimum."""
    return environment(ROOT / "tests" / "requirements" / "optimum.txt")


def run(*command, code=0):
    # The environment has this tree as an editable package; where else Python is told to look must
    # not hide that the plugin is not among its files. One thread, for the reason that
    # tests/checkpoints.py gives.
    settings = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    settings.pop("PYTHONPATH", None)
    result = subprocess.run(
        command,
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
        env=settings,
    )
    assert result.returncode == code, result.stderr
    return result


@pytest.fixture(scope="session")
def cli_export(python, tmp_path_factory):
    """What Optimum's own command makes of examples/doge-tiny, and what it prints."""
    out = tmp_path_factory.mktemp("optimum") / "deep" / "tiny"
    task = ("--task", "text-generation-with-past")
    return out, run(python.parent / "optimum-cli", "export", "onnx", "-m", TINY, *task, out)


@pytest.fixture(scope="session")
def bundles(cli_export, make_bundle, one_layer, tmp_path_factory):
    """Bundles by name; but for the first, made in the environment of the tests."""
    quick = {"rounding": "nearest", "verify": False}
    windowed = tmp_path_factory.mktemp("windowed") / "checkpoint"
    checkpoints.make(windowed, num_hidden_layers=1, keep_window_size=WINDOW)
    made = {
        "int8": make_bundle(TINY, precision="int8", layout="hub", **quick),
        "int4, int8 state": make_bundle(one_layer, precision="int4", kv_cache="int8", **quick),
        "window": make_bundle(windowed, state="window", verify=False),
    }
    return {"fp32": cli_export[0]} | {name: bundle.path for name, bundle in made.items()}


@pytest.fixture(scope="session")
def ids():
    """Prompts of each bundle."""
    tokenizer = tokenizers.Tokenizer.from_file(str(TINY / "tokenizer.json"))
    tiny = [tokenizer.encode(text).ids for text in PROMPTS]
    return {"fp32": tiny, "int8": tiny, "int4, int8 state": SMALL_IDS, "window": SMALL_IDS}


@pytest.fixture(scope="session")
def results(python, bundles, ids, tmp_path_factory):
    """What tests/optimum_worker.py finds."""
    place = tmp_path_factory.mktemp("worker")
    # With a config as transformers 5 writes it, which 4.57 reads only in part.
    experts = {"is_moe": True, "num_experts": 16, "num_experts_per_tok": 4, "num_hidden_layers": 1}
    linear = checkpoints.rope("linear", 2.0, theta=5e3)
    asked = {
        "bundles": {name: str(path) for name, path in bundles.items()},
        "ids": ids,
        "count": COUNT,
        "prompt": PROMPT,
        "checkpoint": str(TINY),
        "experts": str(checkpoints.make(place / "experts", **experts)),
        "linear": str(checkpoints.make(place / "linear", num_hidden_layers=1, **linear)),
        "other": str(other_model(place / "other")),
        "format": str(without_onnx(bundles["window"], place / "format")),
        "directory": str(place / "saved"),
        "commands": [
            ["export", "onnx", "-m", str(TINY), *arguments, str(place / "out")]
            for arguments in FAILING
        ],
    }
    worker = Path(__file__).parent / "optimum_worker.py"
    return json.loads(run(python, worker, json.dumps(asked)).stdout.splitlines()[-1])


def without_onnx(bundle, directory):
    """A bundle whose graph is of another format."""
    shutil.copytree(bundle, directory)
    (directory / "model.onnx").rename(directory / "model.ort")
    return directory


def other_model(directory):
    """A directory whose config is a Doge's, and whose graph is none."""
    directory.mkdir()
    (directory / "config.json").write_text((TINY / "config.json").read_text())
    values = [
        helper.make_tensor_value_info(name, TensorProto.INT64, ["batch_size"])
        for name in ("input_ids", "logits")
    ]
    node = helper.make_node("Identity", ["input_ids"], ["logits"])
    graph = helper.make_graph([node], "other", values[:1], values[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(model, directory / "model.onnx")
    return directory


def test_the_command_line_makes_a_bundle_that_was_compared(cli_export):
    path, result = cli_export
    assert result.stdout.splitlines()[0].split() == ["bundle", str(path)]
    manifest = Bundle.open(path).manifest
    assert manifest.parity["passed"]
    assert manifest.parity["reference"].startswith("transformers 4.57")
    assert (manifest.target, manifest.precision, manifest.source["model"]) == (
        "ort",
        "fp32",
        "doge-tiny",
    )
    # It is what `doge-onnx export` makes, and so runs without Optimum.
    text = doge_onnx.load(path).generate(PROMPT, max_new_tokens=COUNT, temperature=0).text
    assert len(text) > COUNT


def shortfall(model, prompt, tokens):
    """How far the logit of any of the tokens is below the largest one of its position, at most."""
    logits, _ = model.forward([prompt + tokens], logits="all")
    rows = logits[0, len(prompt) - 1 : -1]
    return float((rows.max(axis=-1) - rows[np.arange(len(tokens)), tokens]).max())


@pytest.mark.parametrize("name", ["fp32", "int8", "int4, int8 state", "window"])
def test_greedy_tokens_are_those_of_the_runtime(name, results, bundles, ids):
    model = doge_onnx.load(bundles[name])
    found = results["greedy"][name]
    if model.manifest.quantized:
        # A quantized product rounds its inputs too, in Optimum's batches otherwise than here, so
        # of two that are all but equally likely either may come out.
        pairs = list(zip(ids[name] * 3, itertools.chain(*found.values()), strict=True))
        assert [len(tokens) for _, tokens in pairs] == [COUNT] * 6 + [8] * 3
        assert max(shortfall(model, prompt, tokens) for prompt, tokens in pairs) < 0.1
        return
    options = {"max_new_tokens": COUNT, "temperature": 0}
    truth = [model.generate(prompt, **options).token_ids for prompt in ids[name]]
    assert [len(tokens) for tokens in truth] == [COUNT] * len(truth)
    assert found["alone"] == truth
    assert found["batch"] == truth
    assert found["stateless"] == [tokens[:8] for tokens in truth]


def test_texts_of_the_window_outgrow_it():
    assert min(len(ids) for ids in SMALL_IDS) + COUNT > 2 * WINDOW
    assert max(len(ids) for ids in SMALL_IDS) > WINDOW


@pytest.mark.parametrize("how", ["sampled", "beams"])
def test_other_strategies_choose_as_with_the_model_of_transformers(how, results):
    both = results["transformers"]
    assert both["onnx"][how] == both["torch"][how]
    assert both["onnx"]["sampled"] != both["onnx"]["beams"]


@pytest.mark.parametrize("way", ["streamed", "pipeline", "plain", "bound"])
def test_every_way_gives_the_text_of_the_runtime(way, results, bundles):
    text = doge_onnx.load(bundles["fp32"]).generate(PROMPT, max_new_tokens=20, temperature=0).text
    assert results["texts"][way].rstrip("\n") == text


def test_a_saved_model_loads_again(results, bundles):
    assert results["saved"] == [row[:8] for row in results["greedy"]["fp32"]["batch"]]


def test_a_checkpoint_is_exported_and_compared_as_it_is_loaded(results):
    experts, linear = results["exported"]["experts"], results["exported"]["linear"]
    # Here transformers runs no experts, and reads its successor's configs if it is told how.
    assert experts["parity"]["reference"].startswith("the step in PyTorch, float64")
    assert linear["parity"]["reference"].startswith("transformers 4.57")
    assert experts["parity"]["passed"]
    assert linear["parity"]["passed"]


def test_generation_ends_with_the_context(results):
    assert max(map(len, SMALL_IDS)) < 40
    assert results["exported"]["linear"]["longest"] == 40


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (
            "mask",
            "InputError: attention_mask is of shape [1, 2], but with 0 tokens in the state and 3 "
            "new ones it must be [1, 3]",
        ),
        (
            "long",
            "InputError: row 0 would have 3000 tokens, more than the context length of 2048",
        ),
        ("type", "is a model of the type 'gpt2', not a Doge; use ORTModelForCausalLM"),
        ("graph", "model.onnx is not the graph of a bundle"),
        ("format", "bundle, but its graph is not an .onnx file"),
        ("window mask", "InputError: after the first tokens, a window state needs an attention"),
        ("window binding", "InputError: a window state cannot be used with IO binding"),
    ],
)
def test_what_does_not_fit_is_said_in_one_line(what, message, results):
    assert message in results["errors"][what]
    assert "\n" not in results["errors"][what]


@pytest.mark.parametrize("arguments", FAILING)
def test_the_command_line_refuses_what_it_cannot_do_in_one_line(arguments, results):
    code, line = results["commands"][list(FAILING).index(arguments)]
    assert (code, FAILING[arguments][1] in line) == (FAILING[arguments][0], True), line


def test_the_plugin_costs_other_commands_nothing(python):
    plugin = "optimum.commands.register.register_doge_onnx"
    heavy = "{'torch', 'transformers', 'onnxruntime', 'numpy'}"
    code = f"import sys, {plugin}; print(sorted({heavy} & set(sys.modules)))"
    assert run(python, "-c", code).stdout == "[]\n"


def test_the_model_class_without_optimum_says_what_to_install():
    with pytest.raises(doge_onnx.MissingExtraError, match=r"pip install 'doge-onnx\[optimum\]'"):
        importlib.import_module("doge_onnx.optimum").ORTDogeForCausalLM  # noqa: B018


def test_the_command_line_spares_what_is_not_a_bundle(python, tmp_path):
    (tmp_path / "novel.txt").write_text("mine")
    result = run(python.parent / "optimum-cli", *("export", "onnx", "-m", TINY), tmp_path, code=2)
    assert "holds files that are not of a bundle" in result.stderr
    assert "Traceback" not in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["novel.txt"]
