"""The command line: what it prints where, exit codes, and what it leaves behind.

What `generate` does is in test_cli_generate.py.
"""

import json
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict

import fake_bundle
import pytest
from commands import assert_one_line_error, invoke, start
from conftest import TINY_CHECKPOINT
from safetensors.torch import load_file, save_file
from typer.main import get_command

import doge_onnx
from doge_onnx import bundle as bundles
from doge_onnx import cli, cli_options
from doge_onnx.bundle import MANIFEST_NAME, Bundle, read_manifest
from doge_onnx.export import exporter, half, lowering, quantize
from doge_onnx.runtime.engine import device
from doge_onnx.runtime.engine.kernels import choose_kernels

# --- the command itself -------------------------------------------------------------------


def test_version():
    result = invoke("--version")
    assert (result.exit_code, result.stdout) == (0, f"doge-onnx {doge_onnx.__version__}\n")


def test_every_option_of_every_verb_is_explained():
    verbs = get_command(cli.app).commands
    assert set(verbs) == {"export", "verify", "eval", "generate", "chat", "bench", "info", "push"}
    for name, verb in verbs.items():
        # Without spaces: lines break behind hyphens, too.
        text = "".join(invoke(name, "--help").stdout.split())
        assert verb.help
        assert verb.params
        for parameter in verb.params:
            assert parameter.help
            assert "".join(parameter.help.split()) in text


def test_choices_are_those_of_the_library():
    assert tuple(cli_options.Precisions) == quantize.PRECISIONS
    assert tuple(cli_options.Roundings) == quantize.ROUNDINGS
    assert tuple(cli_options.KVCaches) == tuple(exporter.KV_CACHES)
    assert tuple(cli_options.States) == exporter.STATES
    assert tuple(cli_options.Layouts) == bundles.LAYOUTS
    assert tuple(cli_options.Formats) == exporter.FORMATS
    assert tuple(cli_options.Targets) == tuple(lowering.TARGETS)
    assert tuple(cli_options.Devices) == device.DEVICES
    assert tuple(cli_options.ExportDevices) == half.DEVICES


def test_help_imports_nothing_slow():
    script = (
        "import sys, doge_onnx.cli\n"
        "slow = {'torch', 'transformers', 'onnx', 'onnxruntime', 'numpy', 'tokenizers'}\n"
        "sys.exit(', '.join(slow & set(sys.modules)) or 0)\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
    assert (result.returncode, result.stderr) == (0, b"")


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["fly"],
        ["info"],
        ["info", "bundle", "--fast"],
        ["verify", "bundle"],
        ["export", "model"],
        ["export", "model", "out", "--context-length", "0"],
        ["export", "model", "out", "--precision", "fp64"],
        ["export", "model", "out", "--target", "gpu"],
        ["generate", "bundle", "x", "--max-new-tokens", "-1"],
        ["generate", "bundle", "x", "--max-new-tokens", "many"],
        ["generate", "bundle", "x", "--temperature", "-0.1"],
        ["generate", "bundle", "x", "--temperature", "nan"],
        ["generate", "bundle", "x", "--top-k", "-1"],
        ["generate", "bundle", "x", "--top-p", "1.1"],
        ["generate", "bundle", "x", "--top-p", "-1"],
        ["generate", "bundle", "x", "--min-p", "-0.1"],
        ["generate", "bundle", "x", "--repetition-penalty", "-1"],
        ["generate", "bundle", "x", "--seed", "-1"],
        ["generate", "bundle", "x", "--threads", "0"],
        ["generate", "bundle", "x", "--logprobs"],
        ["generate", "bundle", "x", "--top-logprobs", "3"],
        ["generate", "bundle", "x", "--logit-bias", "5"],
        ["generate", "bundle", "x", "--logit-bias", "five=1"],
        ["generate", "bundle", "x", "--logit-bias", "5=nan"],
        ["generate", "bundle", "x", "--stop", ""],
        ["generate", "bundle", "x", "--sampler", "greedy"],
        ["chat", "bundle", "--logprobs"],
        ["generate", "bundle", "x", "--device", "abacus"],
        ["export", "model", "out", "--device", "auto"],
    ],
)
def test_wrong_usage_is_told_from_failure(arguments):
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert "Usage: " in result.output
    assert isinstance(result.exception, SystemExit)


def test_errors_keep_brackets_and_stay_on_one_line(tmp_path):
    odd = tmp_path / "[bold]a[/bold]\nb"
    result = invoke("info", odd)
    assert_one_line_error(result, "[bold]a[/bold] b is not a bundle")
    assert len(result.stderr.splitlines()) == 1


# --- export and verify ----------------------------------------------------------------------


@pytest.mark.slow
def test_export_makes_a_verified_bundle_and_says_what_it_made(tmp_path):
    out = tmp_path / "out"
    result = invoke("export", TINY_CHECKPOINT, out, "--context-length", "512")
    assert result.exit_code == 0, result.output
    manifest = read_manifest(out)
    assert manifest.context_length == 512
    assert manifest.parity["passed"]
    summary = dict(line.split(maxsplit=1) for line in result.stdout.splitlines())
    size = sum(path.stat().st_size for path in out.iterdir())
    assert summary["bundle"] == str(out)
    assert summary["size"] == f"{size / 1e6:.1f} MB"
    assert summary["parameters"] == "3,413,768"
    assert f"{manifest.parity['max_abs_diff']:.1e} at most" in summary["parity"]
    assert result.stderr.splitlines()[0] == f"exporting {TINY_CHECKPOINT}"
    assert "  tracing the graph" in result.stderr.splitlines()


def test_export_refuses_what_it_must_not_replace(bundle_copy):
    before = sorted(bundle_copy.parent.rglob("*"))
    assert_one_line_error(invoke("export", TINY_CHECKPOINT, bundle_copy), str(bundle_copy), "force")
    assert sorted(bundle_copy.parent.rglob("*")) == before


def test_export_of_something_else_leaves_nothing_behind(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    assert_one_line_error(invoke("export", model, tmp_path / "out"), str(model), "config.json")
    assert list(tmp_path.iterdir()) == [model]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no such signals")
@pytest.mark.parametrize(
    ("number", "code", "last"),
    [(signal.SIGINT, 130, "error: interrupted"), (signal.SIGTERM, 143, None)],
)
def test_export_ended_by_a_signal_cleans_up(number, code, last, tmp_path):
    process = start(
        "export",
        str(TINY_CHECKPOINT),
        str(tmp_path / "out"),
        text=True,
        # Whoever runs the tests in the background has it ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    with process:
        # From this step on there is something to clean up.
        for line in process.stderr:
            if line == "  tracing the graph\n":
                assert len(list(tmp_path.glob(".out.*.part"))) == 1
                process.send_signal(number)
                break
        rest = process.stderr.read()
        assert process.stdout.read() == ""
    assert process.returncode == code
    assert "Traceback" not in rest
    assert last is None or rest.splitlines()[-1] == last
    assert list(tmp_path.iterdir()) == []


def test_verify_prints_and_records_the_figures(bundle_copy):
    assert read_manifest(bundle_copy).parity is None
    result = invoke("verify", bundle_copy, "--reference", TINY_CHECKPOINT)
    assert result.exit_code == 0, result.output
    parity = read_manifest(bundle_copy).parity
    assert parity["passed"]
    for name in ("prefill", "decode", "batch", "tolerance"):
        assert f"{parity[name]:.1e}" in result.stdout
    assert f"maximum absolute difference  {parity['max_abs_diff']:.1e}\n" in result.stdout
    assert f"{parity['greedy_total']}/{parity['greedy_total']} tokens" in result.stdout


def test_verify_fails_beyond_the_tolerance(bundle_copy, tmp_path):
    other = shutil.copytree(TINY_CHECKPOINT, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    tensors["model.layers.1.self_attn.A"] += 1
    save_file(tensors, other / "model.safetensors")
    result = invoke("verify", bundle_copy, "--reference", other)
    assert result.exit_code == 3
    assert "maximum absolute difference" in result.stdout
    assert result.stderr.splitlines()[-1].startswith(f"error: {bundle_copy} differs from ")
    assert not read_manifest(bundle_copy).parity["passed"]


# --- info -----------------------------------------------------------------------------------


def test_info_shows_the_manifest_to_a_person(bundle_copy):
    manifest = read_manifest(bundle_copy)
    odd = "[red]some/model[/red]"
    altered = json.loads(manifest.to_json())
    altered["source"] = {"model": odd, "revision": None}
    (bundle_copy / MANIFEST_NAME).write_text(json.dumps(altered), encoding="utf-8")
    result = invoke("info", bundle_copy)
    assert (result.exit_code, result.stderr) == (0, "")
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert f"source {odd}" in lines
    assert "revision -" in lines
    assert "parameters 3,413,768" in lines
    assert "target ort" in lines
    assert "checked no" in lines
    assert f"torch {manifest.versions['torch']}" in lines
    assert all(any(line.startswith(f"{name} ") for line in lines) for name in manifest.files)


def test_what_a_terminal_would_obey_is_shown_and_not_sent(bundle_copy):
    altered = json.loads(read_manifest(bundle_copy).to_json())
    altered["source"] = {"model": "a\x1b]0;title\x07\nlicense  MIT é", "revision": None}
    (bundle_copy / MANIFEST_NAME).write_text(json.dumps(altered), encoding="utf-8")
    result = invoke("info", bundle_copy)
    assert r"a\x1b]0;title\x07\nlicense  MIT é" in result.stdout
    assert "\x1b" not in result.stdout
    assert_one_line_error(invoke("info", "\x1b[31m"), r"\x1b[31m")


def test_info_gives_the_manifest_to_a_program(tiny_bundle):
    result = invoke("info", tiny_bundle, "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    written = (tiny_bundle / MANIFEST_NAME).read_text(encoding="utf-8")
    assert json.loads(result.stdout) == json.loads(written) | {
        "end_tokens": [{"id": 1, "text": "<|end_of_text|>"}],
        "stop_strings": [],
        "other_end_token": None,
        "ignored_generation_options": [],
        "generation_options_without_effect": [],
        "hub": None,
        "kernels": asdict(choose_kernels(Bundle.open(tiny_bundle).manifest)),
    }


def test_info_shows_what_ends_a_text(bundle_copy):
    # Nothing ends with a token that the model lacks.
    asked = {"eos_token_id": [0, 19, 5000], "stop_strings": ["\n\n", "User:"], "top_k": -1}
    (bundle_copy / "generation_config.json").write_text(json.dumps(asked), encoding="utf-8")
    shown = [" ".join(line.split()) for line in invoke("info", bundle_copy).stdout.splitlines()]
    assert "ends a text 0 <|begin_of_text|>, 19 ." in shown
    assert "does not, but the tokenizer says so 1 <|end_of_text|>" in shown
    assert r"ends before '\n\n', 'User:'" in shown
    assert "without effect top_k: -1" in shown
    result = json.loads(invoke("info", bundle_copy, "--json").stdout)
    assert result["end_tokens"] == [
        {"id": 0, "text": "<|begin_of_text|>"},
        {"id": 19, "text": "."},
    ]
    assert result["other_end_token"] == {"id": 1, "text": "<|end_of_text|>"}
    assert result["stop_strings"] == ["\n\n", "User:"]
    assert result["generation_options_without_effect"] == ["top_k: -1"]


def test_info_names_what_a_bundle_asks_for_and_nobody_does(bundle_copy):
    asked = {"do_sample": True, "top_k": 5, "penalty_alpha": 0.6, "num_beams": 4}
    (bundle_copy / "generation_config.json").write_text(json.dumps(asked), encoding="utf-8")
    shown = invoke("info", bundle_copy).stdout
    assert "asked for, not done  num_beams, penalty_alpha\n" in shown
    result = json.loads(invoke("info", bundle_copy, "--json").stdout)
    assert result["ignored_generation_options"] == ["num_beams", "penalty_alpha"]


@pytest.mark.slow
def test_export_names_once_what_a_checkpoint_asks_for_and_nobody_does(tmp_path):
    model = shutil.copytree(TINY_CHECKPOINT, tmp_path / "model")
    asked = {"top_k": -1, "penalty_alpha": 0.6, "num_beams": 4}
    (model / "generation_config.json").write_text(json.dumps(asked), encoding="utf-8")
    result = invoke("export", model, tmp_path / "out", "--no-verify")
    assert result.exit_code == 0, result.output
    line = "asks for num_beams, penalty_alpha, which this package does not do"
    assert result.stderr.count(f"generation_config.json {line}") == 1
    assert result.stderr.count("no sense and no difference: top_k: -1") == 1


def test_info_shows_what_an_export_noted(tmp_path):
    path = fake_bundle.write(tmp_path / "b", notes=("one thing", "another"))
    shown = invoke("info", path).stdout
    assert "Notes\n" in shown
    assert "1  one thing\n" in shown
    assert "2  another\n" in shown
    assert json.loads(invoke("info", path, "--json").stdout)["notes"] == ["one thing", "another"]
