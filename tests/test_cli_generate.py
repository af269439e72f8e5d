"""The command `generate`: options, standard input and output, what ends it."""

import json
import os
import re
from dataclasses import fields
from pathlib import Path
from subprocess import PIPE

import pytest
from commands import ASCII, PROMPT, assert_one_line_error, invoke, start

import doge_onnx
from doge_onnx.runtime.generation.config import GenerationConfig
from doge_onnx.runtime.model import Model


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
        "max_length": 900,
        "max_time": 60.0,
        "min_new_tokens": 1,
        "temperature": 0.9,
        "top_k": 50,
        "top_p": 0.95,
        "min_p": 0.01,
        "typical_p": 0.99,
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
    given += ["--stop-token=5", "--stop-token=<|pad|>", "--suppress-token= the"]
    given += ["--threads=1", "--prefill-chunk=4"]
    given += ["--device=cpu", "--no-cuda-graph", "--no-native", "--verbose"]
    result = invoke("generate", tiny_bundle, PROMPT, *given, *more)
    assert result.exit_code == 0, result.output
    loading = {"device": "cpu", "threads": 1, "prefill_chunk": 4, "verbose": True}
    loading |= {"cuda_graph": False, "native": False, "revision": None}
    several = {"stop": ["one", "two"], "logit_bias": {5: -1.5, 6: 2.0}, "ignore_eos": True}
    several |= {"stop_token_ids": [5, 2], "suppress_tokens": [268]}
    assert calls == [
        ((str(tiny_bundle),), loading),
        ((PROMPT,), options | several | ({"logprobs": True, "top_logprobs": 2} if more else {})),
    ]
    shown = {e.name for e in fields(GenerationConfig) if e.metadata["option"].kind is not None}
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


@pytest.mark.parametrize(
    ("written", "stop"),
    [
        (r"\n", "\n"),
        (r"a\tb\r\n", "a\tb\r\n"),
        (r"\\n", r"\n"),
        (r"\u00e9\ud83d\ude00", "\u00e9\U0001f600"),
        ("\u00e9", "\u00e9"),
    ],
)
def test_escapes_in_stop_strings_are_taken_on_request(tiny_bundle, monkeypatch, written, stop):
    calls = []
    monkeypatch.setattr(Model, "stream", lambda self, text, **options: calls.append(options) or [])
    invoke("generate", tiny_bundle, PROMPT, "--stop", written)
    invoke("generate", tiny_bundle, PROMPT, "--stop", written, "--stop-escape")
    assert calls == [{"stop": [written]}, {"stop": [stop]}]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--stop", "\\q", "--stop-escape"], r"\\q is no escape; there are \\n, \\r, \\t"),
        (["--stop", "a\\", "--stop-escape"], "is no escape"),
        (["--stop", "\\ud83d", "--stop-escape"], "has one half of a pair of escapes"),
        (["--stop-escape"], "it needs --stop"),
        (["--stop-token", "two tokens"], "'two tokens' is neither a token id nor the text of one"),
        (["--suppress-token", ""], "'' is neither a token id nor the text of one token"),
    ],
)
def test_what_names_no_text_or_token_is_wrong_usage(tiny_bundle, given, message):
    result = invoke("generate", tiny_bundle, PROMPT, *given)
    assert result.exit_code == 2
    assert re.search(message, " ".join(result.stderr.split()))


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
