"""The examples run as they are, and agree with each other."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import doge_onnx
from doge_onnx.bundle import MANIFEST_NAME, read_manifest, seal

EXAMPLES = Path(__file__).parent.parent / "examples"
PROMPT = "It was a dark and stormy night"


def run(script, *arguments):
    return subprocess.run(
        [sys.executable, EXAMPLES / script, *arguments],
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=120,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.parametrize("target", ["tiny_bundle", "tiny_portable_bundle"])
def test_both_examples_print_the_greedy_text_and_nothing_else(target, request):
    bundle = request.getfixturevalue(target)
    expected = doge_onnx.load(bundle).generate(PROMPT, max_new_tokens=60, temperature=0)
    assert expected.finish_reason == "length"
    for script in ("generate.py", "bare_loop.py"):
        result = run(script, bundle, PROMPT)
        assert (result.returncode, result.stdout, result.stderr) == (0, expected.text + "\n", "")


@pytest.mark.parametrize("script", ["generate.py", "bare_loop.py"])
def test_examples_stop_at_the_end_of_text(script, tiny_bundle, tmp_path):
    bundle = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, bundle)
    model = doge_onnx.load(tiny_bundle)
    greedy = model.generate(PROMPT, max_new_tokens=60, temperature=0)
    # The tenth token becomes the one that ends a text.
    end = greedy.token_ids[9]
    first = greedy.token_ids.index(end)
    declare_end_of_text(bundle, end)
    expected = model.generate(PROMPT, max_new_tokens=first, temperature=0).text
    assert run(script, bundle, PROMPT).stdout == expected + "\n"


def declare_end_of_text(bundle, token_id):
    path = bundle / "generation_config.json"
    path.write_text(f'{{"eos_token_id": [{token_id}]}}', encoding="utf-8")
    seal(bundle, read_manifest(bundle))


def test_bare_loop_refuses_a_state_of_another_kind(tiny_bundle, tmp_path):
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    text = (bundle / MANIFEST_NAME).read_text(encoding="utf-8")
    other = text.replace('"kind": "growing"', '"kind": "window"')
    assert other != text
    (bundle / MANIFEST_NAME).write_text(other, encoding="utf-8")
    result = run("bare_loop.py", bundle, PROMPT)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == "this loop is for the state that grows with the text\n"


@pytest.mark.parametrize("script", ["generate.py", "bare_loop.py"])
def test_examples_say_how_they_are_used(script):
    result = run(script)
    assert result.returncode == 1
    assert result.stderr == f"usage: {script} BUNDLE PROMPT\n"


def test_bare_loop_is_a_short_template_without_this_package():
    source = (EXAMPLES / "bare_loop.py").read_text(encoding="utf-8")
    assert len(source.splitlines()) < 85
    imported = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.partition(".")[0])
    assert imported - set(sys.stdlib_module_names) == {"numpy", "onnxruntime", "tokenizers"}
