"""The home directory: nothing is left there, whatever is imported and whatever runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import checkpoints
import fake_bundle
import homes
import pytest
from commands import COMMAND
from environments import environment
from typer.main import get_command

from doge_onnx import cli
from doge_onnx.bundle import read_manifest
from doge_onnx.export.snippets import PLACE, snippets

ROOT = Path(__file__).parent.parent
# One call of each verb that does all of its work, on a bundle B.
VERBS = {
    "eval": "B --text text --max-tokens 20",
    "generate": "B the --max-new-tokens 2",
    "chat": "B --max-new-tokens 2",
    "bench": "B --contexts 4 --batches 1 --tokens 2 --repetitions 1",
    "info": "B",
    "push": "B user/name --dry-run",
}
# In one process, since the imports take most of their time; C is a checkpoint.
WITH_A_CHECKPOINT = {"export": "C B --no-verify", "verify": "B --reference C"}


def assert_home_stays_empty(command, home, **options):
    # One thread: on a busy machine, two of them wait for each other for long.
    variables = homes.variables(home) | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=variables, capture_output=True, check=False, **options)
    assert result.returncode == 0, result.stderr
    assert homes.left_in(home) == []


def test_every_verb_is_tried_here():
    assert set(get_command(cli.app).commands) == {*VERBS, *WITH_A_CHECKPOINT}


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_leaves_nothing_at_home(verb, tmp_path):
    fake_bundle.write(tmp_path / "B", chat_template="{{ messages[-1].content }}")
    (tmp_path / "text").write_text("the cat and the dog and the hat")
    command = [*COMMAND, verb, *VERBS[verb].split()]
    assert_home_stays_empty(command, tmp_path / "home", cwd=tmp_path, input=b"the\n")


@pytest.mark.slow
def test_verbs_with_a_checkpoint_leave_nothing_at_home(tmp_path):
    checkpoints.make(tmp_path / "C", num_hidden_layers=1)
    calls = [[verb, *arguments.split()] for verb, arguments in WITH_A_CHECKPOINT.items()]
    code = f"""
from doge_onnx import cli
for arguments in {calls!r}:
    cli.app(arguments, standalone_mode=False)
"""
    assert_home_stays_empty([sys.executable, "-c", code], tmp_path / "home", cwd=tmp_path)
    assert read_manifest(tmp_path / "B").parity


def test_onnx_runtime_behind_the_package_leaves_nothing_at_home(tmp_path):
    code = "import doge_onnx, onnxruntime"
    assert_home_stays_empty([sys.executable, "-c", code], tmp_path / "home")


@pytest.mark.parametrize("own", ["0", "1", ""])
def test_what_somebody_chose_stays(own, tmp_path):
    code = "import os, doge_onnx; print(repr(os.environ['ORT_DISABLE_TELEMETRY']))"
    variables = homes.variables(tmp_path / "home") | {"ORT_DISABLE_TELEMETRY": own}
    command = [sys.executable, "-c", code]
    assert subprocess.check_output(command, env=variables, text=True) == f"{own!r}\n"


def test_the_loop_without_this_package_leaves_nothing_at_home(tmp_path):
    bundle = fake_bundle.write(tmp_path / "B")
    loop = ROOT / "examples" / "bare_loop.py"
    assert_home_stays_empty([sys.executable, loop, bundle, "the"], tmp_path / "home")


@pytest.mark.slow
@pytest.mark.external
def test_onnxruntime_genai_as_the_card_runs_it_leaves_nothing_at_home(tiny_bundle, tmp_path):
    (code,) = (
        snippet.code
        for snippet in snippets(read_manifest(tiny_bundle))
        if snippet.tool == "onnxruntime-genai"
    )
    code = code.replace(PLACE, str(tiny_bundle)).replace("+ 100", "+ 3")
    python = environment(ROOT / "tests" / "requirements" / "genai.txt")
    assert_home_stays_empty([python, "-c", code], tmp_path / "home")
