"""Runs the command, in this process or in one of its own."""

import os
import subprocess
import sys
from subprocess import PIPE

from typer.testing import CliRunner

from doge_onnx import cli

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
