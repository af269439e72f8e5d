"""What the library says fits Python and the command line alike: it names no flags."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import doge_onnx

PACKAGE = Path(doge_onnx.__file__).parent
FLAG = re.compile(r"(^|[\s`'\"(=])--[a-z]")
# Its flags are those of `optimum-cli`, whose command it extends.
COMMAND_LINES = {"optimum/command.py"}
# How text for a shell begins, which a reader runs as it stands.
COMMANDS = ("pip install",)

MODULES = sorted(
    path
    for path in PACKAGE.rglob("*.py")
    if not path.name.startswith("cli") and path.relative_to(PACKAGE).as_posix() not in COMMAND_LINES
)


def flags(source: str) -> list[str]:
    """Each string in a module that names a flag of a command, with its line."""
    found = [
        (node.lineno, node.value)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    return [
        f"line {line}: {text}"
        for line, text in found
        if FLAG.search(text) and not text.lstrip().startswith(COMMANDS)
    ]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_the_library_names_no_flag(path):
    assert flags(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        "raise ValueError('use --force')",
        "raise ValueError(f'{path} exists; `--force` replaces it')",
        "def f():\n    '''Do it (--force).'''",
        "x = '--target portable' if y else 'nothing'",
    ],
)
def test_a_flag_is_found_wherever_it_stands(source):
    assert len(flags(source)) == 1


def test_dashes_and_commands_for_a_shell_are_no_flags():
    assert flags("x = 'a -- b'; y = '---'; z = 'pip install --no-deps onnxruntime-gpu'") == []
