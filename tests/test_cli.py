"""The command line: what it prints where, exit codes, and what it leaves behind."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from subprocess import PIPE

import pytest
from conftest import TINY_CHECKPOINT
from safetensors.torch import load_file, save_file
from typer.main import get_command
from typer.testing import CliRunner

import doge_onnx
from doge_onnx import bundle as bundles
from doge_onnx import cli, cli_options
from doge_onnx.bundle import MANIFEST_NAME, read_manifest
from doge_onnx.export import exporter, half, lowering, quantize
from doge_onnx.runtime.engine import device
from doge_onnx.runtime.generation.config import GenerationConfig
from doge_onnx.runtime.model import Model

PROMPT = "It was a dark and stormy night"
COMMAND = [sys.executable, "-m", "doge_onnx.cli"]
# Streams as ASCII as they get: no UTF-8 mode, no better locale.
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}


def invoke(*arguments, **options):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments], **options)


def start(*arguments, env=None, **options):
    """The command as a process of its own, with its output in pipes."""
    return subprocess.Popen(
        [*COMMAND, *arguments],
        stdout=options.pop("stdout", PIPE),
        stderr=PIPE,
        env=os.environ | (env or {}),
        **options,
    )


def assert_one_line_error(result, *words, code=1):
    """`result` ended with a single line that holds `words`, and with no result."""
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    last = result.stderr.splitlines()[-1]
    assert last.startswith("error: ")
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in last


@pytest.fixture
def bundle_copy(tiny_bundle, tmp_path):
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


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
        ["generate", "bundle", "x", "--top-k", "0"],
        ["generate", "bundle", "x", "--top-p", "1.1"],
        ["generate", "bundle", "x", "--top-p", "0"],
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
                assert [path.suffix for path in tmp_path.iterdir()] == [".part"]
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
    assert result.exit_code == 1
    assert "maximum absolute difference" in result.stdout
    assert result.stderr.splitlines()[-1].startswith(f"error: {bundle_copy} differs from ")
    assert not read_manifest(bundle_copy).parity["passed"]


# --- generate -------------------------------------------------------------------------------


def test_generate_prints_the_text_alone(tiny_bundle):
    expected = doge_onnx.load(tiny_bundle).generate(PROMPT, max_new_tokens=20)
    result = invoke("generate", tiny_bundle, PROMPT, "--max-new-tokens", 20)
    assert (result.exit_code, result.stdout, result.stderr) == (0, expected.text + "\n", "")


@pytest.mark.parametrize(
    ("way", "more"),
    [("stream", []), ("generate", ["--json", "--logprobs", "--top-logprobs=2"])],
)
def test_generate_passes_every_option_on(tiny_bundle, monkeypatch, way, more):
    options = {
        "max_new_tokens": 3,
        "min_new_tokens": 1,
        "temperature": 0.9,
        "top_k": 50,
        "top_p": 0.95,
        "min_p": 0.01,
        "repetition_penalty": 1.2,
        "presence_penalty": -0.5,
        "frequency_penalty": 0.5,
        "no_repeat_ngram_size": 3,
        "seed": 7,
    }
    calls = []
    load, run = doge_onnx.load, getattr(Model, way)

    def recording_load(*arguments, **keywords):
        calls.append((arguments, keywords))
        return load(*arguments, **keywords)

    def recording_run(model, *arguments, **keywords):
        calls.append((arguments, keywords))
        return run(model, *arguments, **keywords)

    monkeypatch.setattr(doge_onnx, "load", recording_load)
    monkeypatch.setattr(Model, way, recording_run)
    given = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    given += ["--stop=one", "--stop=two", "--logit-bias=5=-1.5", "--logit-bias=6=2", "--ignore-eos"]
    given += ["--threads=1", "--prefill-chunk=4"]
    given += ["--device=cpu", "--no-cuda-graph", "--verbose"]
    result = invoke("generate", tiny_bundle, PROMPT, *given, *more)
    assert result.exit_code == 0, result.output
    loading = {"device": "cpu", "threads": 1, "prefill_chunk": 4, "verbose": True}
    loading["cuda_graph"] = False
    several = {"stop": ["one", "two"], "logit_bias": {5: -1.5, 6: 2.0}, "ignore_eos": True}
    assert calls == [
        ((str(tiny_bundle),), loading),
        ((PROMPT,), options | several | ({"logprobs": True, "top_logprobs": 2} if more else {})),
    ]
    shown = {entry.name for entry in fields(GenerationConfig)} - {"processors", "sampler"}
    assert shown == options.keys() | several.keys() | {"logprobs", "top_logprobs"}


def test_generate_gives_a_program_what_the_library_returns(tiny_bundle):
    expected = doge_onnx.load(tiny_bundle).generate(
        PROMPT, max_new_tokens=40, stop=["ever"], logprobs=True
    )
    assert expected.finish_reason == "stop"
    given = ["--max-new-tokens", 40, "--stop", "ever", "--json"]
    shown = {
        "text": expected.text,
        "token_ids": expected.token_ids,
        "finish_reason": "stop",
        "prompt_tokens": expected.prompt_tokens,
    }
    assert json.loads(invoke("generate", tiny_bundle, PROMPT, *given).stdout) == shown
    result = json.loads(invoke("generate", tiny_bundle, PROMPT, *given, "--logprobs").stdout)
    assert result.pop("logprobs") == pytest.approx(expected.logprobs, abs=1e-3)
    assert result == shown
    result = json.loads(invoke("generate", tiny_bundle, PROMPT, *given, "--top-logprobs=2").stdout)
    assert result.pop("logprobs") == pytest.approx(expected.logprobs, abs=1e-3)
    top = result.pop("top_logprobs")
    # The text is greedy, so that the most likely tokens are its own.
    assert [first["token_id"] for first, _ in top] == expected.token_ids
    assert [first["logprob"] for first, _ in top] == pytest.approx(expected.logprobs, abs=1e-3)
    assert result == shown


def test_stats_go_where_the_text_is_not(tiny_bundle):
    plain = invoke("generate", tiny_bundle, PROMPT, "--max-new-tokens", 5)
    result = invoke("generate", tiny_bundle, PROMPT, "--max-new-tokens", 5, "--stats")
    assert result.stdout == plain.stdout
    prefill, decode = result.stderr.splitlines()
    assert prefill.startswith("prefill: 9 tokens in ")
    assert decode.startswith("decode: 4 tokens in ")
    assert prefill.endswith(" tokens/s")
    assert decode.endswith(" tokens/s")


def test_stats_are_a_part_of_the_json(tiny_bundle):
    result = invoke("generate", tiny_bundle, PROMPT, "--max-new-tokens=5", "--stats", "--json")
    assert result.stderr == ""
    stats = json.loads(result.stdout)["stats"]
    assert stats["generated_tokens"] == 5
    assert stats["prefill_tokens_per_second"] == pytest.approx(9 / stats["prefill_seconds"])
    assert stats["decode_tokens_per_second"] == pytest.approx(4 / stats["decode_seconds"])


@pytest.mark.parametrize("more", [[], ["--json"]])
def test_stats_of_nothing(tiny_bundle, more):
    result = invoke("generate", tiny_bundle, PROMPT, "--max-new-tokens=0", "--stats", *more)
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("argument", [[], ["-"]])
@pytest.mark.parametrize("end", ["", "\n", "\r\n"])
def test_the_prompt_can_be_piped_in(tiny_bundle, argument, end):
    expected = invoke("generate", tiny_bundle, PROMPT, "--max-new-tokens", 8)
    result = invoke(
        "generate", tiny_bundle, *argument, "--max-new-tokens", 8, input=f"{PROMPT}{end}"
    )
    assert result.stdout == expected.stdout


def test_a_prompt_goes_before_what_is_piped_in(tiny_bundle):
    expected = invoke("generate", tiny_bundle, PROMPT, "--max-new-tokens", 8)
    result = invoke("generate", tiny_bundle, PROMPT, "--max-new-tokens", 8, input="Chapter 1")
    assert result.stdout == expected.stdout


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="no pseudo-terminals")
def test_no_prompt_on_a_terminal_is_wrong_usage(tiny_bundle):
    controller, terminal = os.openpty()
    # Ctrl-D: should the command wait for a text after all, this ends it.
    os.write(controller, b"\x04")
    process = start("generate", str(tiny_bundle), stdin=terminal)
    _, stderr = process.communicate()
    os.close(terminal)
    os.close(controller)
    assert b"PROMPT" in stderr
    assert process.returncode == 2


@pytest.mark.parametrize(
    ("arguments", "piped", "words"),
    [
        ([""], None, ["prompt is empty"]),
        ([], b"", ["prompt is empty"]),
        (["-"], b"caf\xe9", ["standard input", "UTF-8"]),
        (["word " * 3000], None, ["2048", "tokens"]),
        (["x", "--logit-bias", "99999=1"], None, ["logit_bias", "99999"]),
        (["x", "--device", "cuda"], None, ["fp32", "half precision only", "for the device cuda"]),
    ],
)
def test_generate_says_what_it_cannot_take(tiny_bundle, arguments, piped, words):
    assert_one_line_error(invoke("generate", tiny_bundle, *arguments, input=piped), *words)


def test_generate_refuses_an_altered_bundle(bundle_copy):
    with (bundle_copy / "model.onnx").open("ab") as stream:
        stream.write(b"x")
    assert_one_line_error(invoke("generate", bundle_copy, "x"), "model.onnx")
    assert_one_line_error(invoke("generate", bundle_copy / "no", "x"), str(bundle_copy / "no"))


def test_generate_interrupted_ends_the_line_and_says_so(tiny_bundle, monkeypatch):
    piece = next(doge_onnx.load(tiny_bundle).stream(PROMPT))

    def interrupted(*_, **__):
        yield piece
        raise KeyboardInterrupt

    monkeypatch.setattr(Model, "stream", interrupted)
    result = invoke("generate", tiny_bundle, PROMPT)
    assert result.exit_code == 130
    assert (result.stdout, result.stderr) == (f"{piece.text}\n", "error: interrupted\n")


def test_pipes_carry_utf8_whatever_the_locale(tiny_bundle):
    prompt = "“Où est-il”"
    options = {"temperature": 100.0, "seed": 1, "max_new_tokens": 200}
    expected = doge_onnx.load(tiny_bundle).generate(prompt, **options).text
    assert not expected.isascii()
    given = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    for more in ([], ["--json"]):
        process = start("generate", str(tiny_bundle), *given, *more, env=ASCII, stdin=PIPE)
        stdout, stderr = process.communicate(prompt.encode("utf-8"))
        assert (process.returncode, stderr) == (0, b"")
        shown = stdout.decode("utf-8")
        assert (json.loads(shown)["text"] if more else shown.removesuffix("\n")) == expected


def test_a_closed_pipe_ends_quietly(tiny_bundle):
    with start("generate", str(tiny_bundle), PROMPT) as process:
        assert process.stdout.read(1)
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
@pytest.mark.parametrize("arguments", [["info"], ["info", "--json"], ["generate", "-"], ["-h"]])
def test_a_full_disk_behind_the_output_is_an_error(tiny_bundle, arguments):
    verb, *rest = arguments
    with (
        Path("/dev/full").open("w") as full,
        start(verb, str(tiny_bundle), *rest, stdout=full, stdin=PIPE) as process,
    ):
        _, stderr = process.communicate(b"x")
    assert process.returncode == 1
    assert stderr.startswith(b"error: ")
    assert stderr.count(b"\n") == 1


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
    assert json.loads(result.stdout) == json.loads(written) | {"ignored_generation_options": []}


def test_info_names_what_a_bundle_asks_for_and_nobody_does(bundle_copy):
    asked = {"do_sample": True, "top_k": 5, "typical_p": 0.9, "num_beams": 4}
    (bundle_copy / "generation_config.json").write_text(json.dumps(asked), encoding="utf-8")
    shown = invoke("info", bundle_copy).stdout
    assert "asked for, not done  num_beams, typical_p\n" in shown
    result = json.loads(invoke("info", bundle_copy, "--json").stdout)
    assert result["ignored_generation_options"] == ["num_beams", "typical_p"]


@pytest.mark.slow
def test_export_names_once_what_a_checkpoint_asks_for_and_nobody_does(tmp_path):
    model = shutil.copytree(TINY_CHECKPOINT, tmp_path / "model")
    asked = {"top_k": 5, "typical_p": 0.9, "num_beams": 4}
    (model / "generation_config.json").write_text(json.dumps(asked), encoding="utf-8")
    result = invoke("export", model, tmp_path / "out", "--no-verify")
    assert result.exit_code == 0, result.output
    line = "generation_config.json asks for num_beams, typical_p, which this package does not do"
    assert result.stderr.count(line) == 1
