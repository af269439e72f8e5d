"""What docs/command-line.md promises of all commands: exit codes, streams, colours, completion."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from subprocess import PIPE

import fake_bundle
import pytest
from chat_templates import PLAIN
from commands import COMMAND, invoke, start

import doge_onnx
from doge_onnx import api
from doge_onnx.errors import BundleError, ParityError, QualityError

PAGE = Path(__file__).parent.parent / "docs" / "command-line.md"
MODULE = [sys.executable, "-m", "doge_onnx"]
posix = pytest.mark.skipif(sys.platform == "win32", reason="no such signals or terminals")


@pytest.fixture
def path(tmp_path):
    return fake_bundle.write(tmp_path / "b", chat_template=PLAIN)


# --- exit codes -------------------------------------------------------------------------------


def test_the_page_lists_the_codes_that_the_program_has():
    listed = re.findall(r"^\| (\d+) \|", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert listed == ["0", "1", "2", "3", "129", "130", "141", "143"]


def test_success_failure_and_wrong_usage(path, tmp_path):
    assert invoke("info", path).exit_code == 0
    assert invoke("info", tmp_path / "no").exit_code == 1
    assert invoke("info").exit_code == 2


@pytest.mark.parametrize(
    ("error", "code"), [(ParityError("x"), 3), (QualityError("x"), 3), (BundleError("x"), 1)]
)
def test_a_difference_is_told_from_other_failures(error, code, monkeypatch):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(doge_onnx, "evaluate", fail)
    result = invoke("eval", "bundle")
    assert (result.exit_code, result.stderr.splitlines()[-1]) == (code, "error: x")


@posix
@pytest.mark.parametrize(
    ("number", "code", "last"),
    [(signal.SIGINT, 130, b"error: interrupted\n"), (signal.SIGTERM, 143, b""), (1, 129, b"")],
    ids=["SIGINT", "SIGTERM", "SIGHUP"],
)
def test_a_signal_ends_a_command(path, number, code, last):
    process = start(
        "chat",
        str(path),
        "--max-new-tokens=1",
        stdin=PIPE,
        preexec_fn=lambda: [signal.signal(each, signal.SIG_DFL) for each in (1, 2, 15)],
    )
    process.stdin.write(b"the cat\n")
    process.stdin.flush()
    # The model is loaded, and the answer complete or almost so.
    process.stdout.readline()
    process.send_signal(number)
    _, stderr = process.communicate()
    assert process.returncode == code
    assert stderr == last


def test_whoever_needs_no_more_output_ends_the_command(path):
    with start("generate", str(path), "the cat") as process:
        assert process.stdout.read(1)
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


# --- names, colours and completion ------------------------------------------------------------


def test_the_package_runs_as_a_module(path):
    run = subprocess.run([*MODULE, "info", path], capture_output=True, check=False)
    assert (run.returncode, run.stderr) == (0, b"")
    assert run.stdout.decode() == invoke("info", path).stdout
    wrong = subprocess.run([*MODULE, "fly"], capture_output=True, check=False)
    assert wrong.returncode == 2
    assert b"Usage: python -m doge_onnx [OPTIONS] COMMAND" in wrong.stderr
    # A shell cannot complete that, but the command.
    shown = subprocess.run([*MODULE, "--help"], capture_output=True, check=False).stdout
    assert b"completion" not in shown
    assert "--show-completion" in invoke("--help").stdout


def on_a_terminal(*arguments, **environment) -> bytes:
    """What a command shows on a terminal of its own."""
    controller, terminal = os.openpty()
    kept = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR", "TERM")}
    with subprocess.Popen(
        [*COMMAND, *map(str, arguments)],
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        env=kept | {"TERM": "xterm"} | environment,
    ) as process:
        os.close(terminal)
        shown = b""
        try:
            while piece := os.read(controller, 1000):
                shown += piece
        # The other end is closed.
        except OSError:
            pass
        os.close(controller)
    assert process.returncode == 0
    return shown


@posix
def test_colours_are_for_terminals_and_those_who_want_them(path):
    assert b"\x1b[" in on_a_terminal("info", path)
    assert b"\x1b" not in on_a_terminal("info", path, NO_COLOR="1")
    assert b"\x1b" not in on_a_terminal("info", path, TERM="dumb")
    for environment, coloured in (({}, False), ({"FORCE_COLOR": "1"}, True)):
        process = start("info", str(path), env=environment)
        assert (b"\x1b[" in process.communicate()[0]) is coloured


@posix
@pytest.mark.parametrize(
    ("environment", "moves"),
    [({}, True), ({"NO_COLOR": "1"}, True), ({"TERM": "dumb"}, False)],
    ids=["xterm", "no colour", "dumb"],
)
def test_steps_are_lines_where_a_terminal_cannot_show_a_spinner(path, environment, moves):
    shown = on_a_terminal("eval", path, "--max-tokens", 8, "--window", 4, **environment)
    assert (b"\x1b[?25l" in shown) is moves
    assert (b"\r\n  " in shown) is not moves


def test_forced_colours_make_no_spinner_of_a_pipe(path):
    process = start("eval", str(path), "--max-tokens=8", "--window=4", env={"FORCE_COLOR": "1"})
    assert b"\x1b[?25l" not in process.communicate()[1]


@pytest.mark.parametrize(
    ("words", "completed"),
    [("doge-onnx ver", ["verify"]), ("doge-onnx eval b --max-k", ["--max-kl"])],
)
def test_a_shell_completes_verbs_and_options(words, completed):
    process = start(
        env={
            "_DOGE_ONNX_COMPLETE": "complete_bash",
            "COMP_WORDS": words,
            "COMP_CWORD": str(words.count(" ")),
        }
    )
    stdout, stderr = process.communicate()
    assert (process.returncode, stdout.decode().split(), stderr) == (0, completed, b"")


def test_completion_writes_into_the_home_when_it_is_asked_to(tmp_path):
    environment = {"HOME": str(tmp_path), "USERPROFILE": str(tmp_path)}
    process = start(env=environment | {"_DOGE_ONNX_COMPLETE": "source_bash"})
    assert b"complete -o default" in process.communicate()[0]
    assert list(tmp_path.iterdir()) == []


# --- figures that cannot be kept --------------------------------------------------------------


def test_figures_that_cannot_be_kept_are_shown(monkeypatch, tmp_path):
    from doge_onnx.export import verify

    figures = {"prefill": 1e-6, "decode": 2e-6, "batch": 3e-6, "logit_scale": 9.0, "tokens": 4}
    greedy = {"greedy_matched": 4, "greedy_total": 4}
    where = {"reference": "transformers", "device": "cpu"}
    report = verify.ParityReport(**figures, **greedy, **where, tolerance=1e-3)
    path = fake_bundle.write(tmp_path / "b")
    before = (path / "doge_onnx.json").read_bytes()
    written = []

    def full(*arguments):
        written.append(arguments)
        raise BundleError("cannot write b: Read-only file system")

    monkeypatch.setattr(verify, "compare", lambda *_: report)
    monkeypatch.setattr(verify, "write_parity", full)
    monkeypatch.setattr(
        verify.checkpoints, "find", lambda *_: verify.Source(tmp_path, "model", None)
    )
    result = invoke("verify", path, "--reference", "model")
    assert result.exit_code == 0
    assert "3.0e-06" in result.stdout
    assert "warning: the figures are not kept: cannot write b: Read-only" in result.stderr
    assert (path / "doge_onnx.json").read_bytes() == before
    found = api.verify(path, "model")
    assert (found.max_abs_diff, found.unrecorded is not None) == (3e-6, True)
    assert "unrecorded" not in found.as_dict()
    assert len(written) == 2


def test_a_verdict_does_not_depend_on_what_can_be_kept(monkeypatch, path):
    from doge_onnx.export.verify import ParityReport

    report = ParityReport(1, 1, 1, 0, 4, 1, 1e-3, 4, "it", "cpu", unrecorded="read-only")
    monkeypatch.setattr(doge_onnx, "verify", lambda *_, **__: report)
    result = invoke("verify", path, "--reference", "model")
    assert result.exit_code == 3
    assert "maximum absolute difference" in result.stdout
    assert "not kept: read-only" in result.stderr
