"""The documentation: up to date with the code, no dead links, and its examples run."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import documentation
import pytest
from conftest import TINY_CHECKPOINT
from typer.main import get_command

from doge_onnx import cli

ROOT = Path(__file__).parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
MODEL = "SmallDoge/Doge-160M"


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text_of(page), flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """What the headings of a page are called in addresses, as GitHub does it."""
    prose = re.sub(r"^```.*?^```", "", text_of(page), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.*)$", prose, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def command_lines() -> list[str]:
    """Every call of `doge-onnx` that the pages show."""
    return sorted(
        {
            line.partition("#")[0].partition("|")[0].strip()
            for page in PAGES
            for block in blocks(page, "sh")
            for line in block.splitlines()
            if line.startswith("doge-onnx ")
        }
    )


@pytest.mark.parametrize("page", ["commands.md", "api.md", "formats.md"])
def test_what_comes_from_the_code_is_up_to_date(page):
    expected = documentation.pages()[ROOT / "docs" / page]
    assert text_of(ROOT / "docs" / page) == expected, "run `make docs`"


@pytest.mark.parametrize("width", ["20", "300"])
def test_the_help_does_not_depend_on_the_terminal(monkeypatch, width):
    expected = documentation.commands()
    for name, value in {"COLUMNS": width, "TERMINAL_WIDTH": width, "FORCE_COLOR": "1"}.items():
        monkeypatch.setenv(name, value)
    assert documentation.commands() == expected
    assert "\x1b" not in expected
    assert max(map(len, expected.splitlines())) <= documentation.HELP_WIDTH


def test_every_command_and_function_is_documented():
    commands = text_of(ROOT / "docs" / "commands.md")
    for name in get_command(cli.app).commands:
        assert f"\n## doge-onnx {name}\n" in commands
    api = text_of(ROOT / "docs" / "api.md")
    for name in documentation.doge_onnx.__all__:
        shown = (f"`{name}`: ", f"### doge_onnx.{name}\n", f"### {name}\n")
        assert name == "__version__" or any(words in api for words in shown)


def test_a_docstring_becomes_markdown():
    def example(first: int, *, second: str = "x") -> int:
        """Do something.

        More on it,
        in two lines.

        Args:
            first: One
                thing.
            second: Another.

        Returns:
            A number.
        """
        return first + len(second)

    assert documentation.function_section("module.example", example) == (
        '### module.example\n\n```python\nexample(first: int, *, second: str = "x") -> int\n```\n\n'
        "Do something.\n\nMore on it,\nin two lines.\n\nArguments:\n\n- `first`: One thing.\n"
        "- `second`: Another.\n\nReturns: A number.\n"
    )


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_links_lead_somewhere(page):
    for target, anchor in re.findall(r"\]\(([^)#\s]*)#?([^)\s]*)\)", text_of(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path = (page.parent / target).resolve() if target else page
        assert path.is_relative_to(ROOT.resolve()), target
        assert path.exists(), target
        if anchor:
            assert anchor in anchors(path), f"{target}#{anchor}"


def test_the_index_names_every_page():
    named = re.findall(
        r"^\| \[.*\]\((.*?)\) \|", text_of(ROOT / "docs" / "README.md"), re.MULTILINE
    )
    assert sorted(named) == sorted(
        page.name for page in PAGES if page.parent.name == "docs" and page.name != "README.md"
    )


@pytest.mark.parametrize("line", command_lines())
def test_commands_that_are_shown_exist(line):
    verb, *arguments = shlex.split(line.replace("--help", ""))[1:]
    if arguments:
        # Parses and checks what it is given, and does nothing.
        get_command(cli.app).commands[verb].make_context(verb, arguments)


@pytest.mark.parametrize("page", ["README.md", "docs/quickstart.md", "docs/runtime.md"])
def test_the_python_of_a_page_runs(page, tiny_bundle, tmp_path):
    code = "\n".join(blocks(ROOT / page, "python"))
    (tmp_path / "bundle").symlink_to(tiny_bundle)
    result = subprocess.run(
        [sys.executable, "-c", code.replace(MODEL, str(TINY_CHECKPOINT))],
        capture_output=True,
        encoding="utf-8",
        env=os.environ | {"PYTHONIOENCODING": "utf-8"},
        cwd=tmp_path,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout


def test_the_commands_of_the_quick_start_run(tiny_bundle, tmp_path):
    shown = [
        line
        for block in blocks(ROOT / "docs" / "quickstart.md", "sh")
        for line in block.splitlines()
        # The Python of the page exports, and other tests quantize.
        if line.startswith("doge-onnx ") and " export " not in line
    ]
    assert [line.split()[1] for line in shown] == ["generate", "generate", "push"]
    (tmp_path / "bundle").symlink_to(tiny_bundle)
    for line in shown:
        command = [sys.executable, "-m", "doge_onnx.cli", *shlex.split(line)[1:]]
        result = subprocess.run(command, capture_output=True, cwd=tmp_path, check=False)
        assert result.returncode == 0, result.stderr
