"""What enters the commands: arguments in any locale, piped text, lines that are typed or pasted."""

from __future__ import annotations

import codecs
import io
import os
import shutil
import sys
from subprocess import PIPE

import fake_bundle
import pytest
from chat_templates import PLAIN
from commands import ASCII, assert_one_line_error, invoke, start

import doge_onnx
from doge_onnx import cli_input

BOM = codecs.BOM_UTF8
# Its bytes in UTF-8 as Python has them where the locale is ASCII.
ESCAPED = os.fsencode("“é”").decode("ascii", "surrogateescape")


@pytest.fixture
def path(tmp_path):
    return fake_bundle.write(tmp_path / "b", chat_template=PLAIN)


def lines(data: bytes, monkeypatch) -> list[str]:
    """The messages of what is piped in."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    return list(cli_input.messages())


# --- what is piped in -------------------------------------------------------------------------


@pytest.mark.parametrize("data", [BOM + b"the cat\r\n", b"the cat", b"the cat\n"])
def test_a_piped_prompt_is_its_text(path, data):
    expected = invoke("generate", path, "the cat", "--max-new-tokens", 9).stdout
    assert invoke("generate", path, "--max-new-tokens", 9, input=data).stdout == expected
    assert invoke("generate", path, "-", "--max-new-tokens", 9, input=data).stdout == expected


def test_a_byte_order_mark_in_an_argument_is_no_text(path):
    expected = invoke("generate", path, "the cat", "--max-new-tokens", 9).stdout
    assert invoke("generate", path, "\ufeffthe cat", "--max-new-tokens", 9).stdout == expected


@pytest.mark.parametrize("verb", [["generate"], ["chat"]])
def test_another_encoding_is_named(path, verb):
    result = invoke(*verb, path, input="Hello".encode("utf-16"))
    assert_one_line_error(result, "standard input", "UTF-16")


@pytest.mark.parametrize(
    ("data", "messages"),
    [
        (b"one\n\n  \ntwo", ["one", "two"]),
        (BOM + b"one\r\ntwo\r\n", ["one", "two"]),
        (b"one\\\ntwo\\\r\nthree\nfour", ["one\ntwo\nthree", "four"]),
        (b"C:\\dir\\\\\nnext", ["C:\\dir\\\\", "next"]),
        (b"end\\", ["end"]),
        (b"\\\n\\\n", []),
    ],
)
def test_a_line_is_a_message_unless_it_goes_on(data, messages, monkeypatch):
    assert lines(data, monkeypatch) == messages


# --- what is typed ----------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def typed(monkeypatch):
    """A function that gives the messages of lines, or exceptions, that are typed at the prompts."""

    def messages(*lines):
        given = iter([*lines, EOFError, EOFError])

        def read(_):
            line = next(given)
            if isinstance(line, str):
                return line
            raise line

        monkeypatch.setattr("builtins.input", read)
        monkeypatch.setattr(sys, "stdin", Terminal())
        return list(cli_input.messages())

    return messages


def test_ctrl_d_ends_a_conversation_and_ctrl_c_a_message(typed, capsys):
    given = ["Hello", KeyboardInterrupt, "not\\", KeyboardInterrupt, " ", "Bye"]
    assert typed(*given) == ["Hello", "Bye"]
    written = capsys.readouterr()
    # What takes the answers gets no prompts.
    assert written.out == ""
    assert written.err.replace(".", ">").count("> ") == 7


def test_lines_that_are_typed_go_on_as_well(typed):
    assert typed("one\\", "two\\\\", "three\\") == ["one\ntwo\\\\", "three"]


def test_what_is_typed_is_utf8_whatever_the_locale(typed):
    assert typed(ESCAPED, "\ufeffé") == ["“é”", "é"]
    with pytest.raises(doge_onnx.InputError, match=r"typed.*UTF-8"):
        typed("\udcff")


class Screen:
    """The chat in a terminal of its own; what it shows is read until some words are there."""

    def __init__(self, path, **environment):
        self._controller, terminal = os.openpty()
        self._shown = b""
        self._process = start(
            "chat",
            str(path),
            "--max-new-tokens=1",
            "--stop=x",
            stdin=terminal,
            stdout=terminal,
            env={"TERM": "xterm", **environment},
        )
        os.close(terminal)

    def type(self, keys: bytes) -> None:
        os.write(self._controller, keys)

    def until(self, words: bytes) -> bytes:
        """What was shown up to `words`, which it must end in."""
        while words not in self._shown:
            self._shown += os.read(self._controller, 1000)
        before, _, self._shown = self._shown.partition(words)
        return before

    def end(self) -> int:
        self.type(b"\x04")
        _, stderr = self._process.communicate()
        os.close(self._controller)
        assert b"Traceback" not in stderr
        return self._process.returncode


terminals = pytest.mark.skipif(not hasattr(os, "openpty"), reason="no pseudo-terminals")


def gnu_readline() -> bool:
    try:
        import readline
    except ImportError:
        return False
    return "GNU" in (readline.__doc__ or "")


@terminals
@pytest.mark.slow
@pytest.mark.skipif(not gnu_readline(), reason="no GNU readline")
def test_pasted_lines_are_one_message_and_typed_ones_come_back(tmp_path):
    # The template refuses what is not the message, so that the answers tell which one came.
    template = PLAIN + (
        "{% for m in messages if m.role == 'user' and m.content != 'one\\n two' %}"
        "{{ raise_exception('got ' + m.content) }}{% endfor %}"
    )
    screen = Screen(fake_bundle.write(tmp_path / "b", chat_template=template))
    screen.until(b"> ")
    screen.type(b"\x1b[200~one\r two\x1b[201~\r")
    screen.until(b"> ")
    # Arrow up: the last message, as it was.
    screen.type(b"\x1b[A\r")
    screen.until(b"> ")
    screen.type(b"one\\\r")
    screen.until(b". ")
    screen.type(b" two\r")
    screen.until(b"> ")
    assert screen.end() == 0


# --- arguments --------------------------------------------------------------------------------


def test_variables_are_json_or_text():
    given = ["a=1", "b=false", "c=False", "d=None", 'e="1"', "f=x=y", "g=", 'h=[1, {"k": null}]']
    assert cli_input.variables(given) == {
        "a": 1,
        "b": False,
        "c": False,
        "d": None,
        "e": "1",
        "f": "x=y",
        "g": "",
        "h": [1, {"k": None}],
    }
    for wrong in ("a", "=1", ""):
        with pytest.raises(ValueError, match="NAME=VALUE"):
            cli_input.variables([wrong])


@pytest.mark.skipif(sys.platform == "win32", reason="arguments are text there")
def test_arguments_are_utf8_in_every_locale(path, tmp_path):
    elsewhere = shutil.copytree(path, tmp_path / "bündle")
    prompt = "“é” the cat"
    expected = doge_onnx.load(path).generate(prompt, max_new_tokens=9, stop=["ü"]).text
    process = start(
        "generate", elsewhere, prompt, "--max-new-tokens=9", "--stop=ü", env=ASCII, stdin=PIPE
    )
    stdout, stderr = process.communicate()
    assert (process.returncode, stdout.decode(), stderr) == (0, expected + "\n", b"")
    process = start("info", tmp_path / "é", env=ASCII)
    stderr = process.communicate()[1].decode()
    assert (process.returncode, "é is not a bundle" in stderr) == (1, True)
    process = start("generate", path, b"caf\xe9", env=ASCII)
    stderr = process.communicate()[1].decode()
    assert (process.returncode, "PROMPT" in stderr, "UTF-8" in stderr) == (2, True, True)


@pytest.mark.parametrize("prompt", ["-x", "--no-such", "- item", "--seed"])
def test_a_prompt_that_looks_like_an_option_gets_a_hint(path, prompt):
    result = invoke("generate", path, prompt)
    assert result.exit_code == 2
    assert "goes behind '--'" in result.stderr
    result = invoke("generate", path, "--max-new-tokens", 3, "--", prompt)
    assert result.stdout == doge_onnx.load(path).generate(prompt, max_new_tokens=3).text + "\n"
    assert "goes behind" not in invoke("info", path, "--no-such").stderr


def test_the_command_begins_an_answer_and_sets_variables(tmp_path):
    template = PLAIN + "{{ mood }}{% if not wordy %}the{% endif %}"
    path = fake_bundle.write(tmp_path / "b", chat_template=template)
    model = doge_onnx.load(path)
    user = {"role": "user", "content": "the cat"}
    given = ["--template-variable", "mood=and", "--template-variable", "wordy=false"]
    variables = {"mood": "and", "wordy": False}
    expected = model.generate([user], template_variables=variables, max_new_tokens=9).text
    options = ["--max-new-tokens", 9, *given]
    assert invoke("generate", path, "--chat", "the cat", *options).stdout == expected + "\n"
    assert invoke("chat", path, *options, input="the cat").stdout == expected + "\n"
    begun = [user, {"role": "assistant", "content": "and the"}]
    expected = model.generate(begun, continue_final_message=True, max_new_tokens=9).text
    result = invoke(
        "generate", path, "--chat", "the cat", "--answer-start", "and the", "--max-new-tokens", 9
    )
    assert result.stdout == expected + "\n"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--answer-start", "and"], "it needs --chat"),
        (["--template-variable", "a=1"], "it needs --chat"),
        (["--chat", "--template-variable", "a"], "NAME=VALUE"),
    ],
)
def test_wrong_usage_of_a_template(path, given, words):
    result = invoke("generate", path, "x", *given)
    assert (result.exit_code, words in result.stderr) == (2, True)
