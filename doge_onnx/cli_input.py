"""What a user gives to the commands: arguments, piped text, and what is typed at a prompt.

Knows terminals, pipes and their encodings. Does not know what a text is for.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TextIO

import typer

from doge_onnx import text_files
from doge_onnx.errors import InputError

_PROMPT, _NEXT_LINE = "> ", ". "


def text(argument: str) -> str:
    """The text of an argument, whatever the encoding of the locale.

    Raises:
        typer.BadParameter: It is not UTF-8.
    """
    try:
        return text_files.repair(argument)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def variables(entries: Iterable[str]) -> dict[str, Any]:
    """The values of NAME=VALUE pairs.

    A value is JSON, one of Python's names for true, false and null, or else text.

    Raises:
        ValueError: There is no name or no value.
    """
    found = {}
    for entry in entries:
        name, equals, value = entry.partition("=")
        if not name or not equals:
            raise ValueError(f"{entry!r} is not NAME=VALUE, such as enable_thinking=false")
        found[name] = _value(value)
    return found


def _value(words: str) -> Any:
    constants = {"True": True, "False": False, "None": None}
    if words in constants:
        return constants[words]
    try:
        return json.loads(words)
    except (ValueError, RecursionError):
        return words


def piped() -> str:
    """All of standard input, without the newline at its end.

    Raises:
        InputError: It is not UTF-8.
    """
    # `echo` and editors add a newline that is seldom meant as a part of the text.
    return _decoded(sys.stdin.buffer.read()).removesuffix("\n")


def messages() -> Iterator[str]:
    """The user's messages, one for each line, until Ctrl-D or the end of the pipe.

    A line that ends in a backslash goes on in the next one. Lines that are pasted into a terminal
    are one message where the system has GNU readline, which can tell them from lines that are
    typed.

    Raises:
        InputError: The text is not UTF-8.
    """
    terminal = sys.stdin.isatty()
    if terminal:
        _edit_lines()
    while True:
        try:
            message = _message(_typed_line if terminal else _piped_line)
        except KeyboardInterrupt:
            if not terminal:
                raise
            # Ctrl-C discards the message, as in a shell.
            _prompt_stream().write("\n")
            continue
        except EOFError:
            if terminal:
                _prompt_stream().write("\n")
            return
        if message.strip():
            yield message


def _message(next_line: Callable[[str], str]) -> str:
    """The next message.

    Args:
        next_line: Reads a line behind a prompt; raises EOFError at the end.
    """
    lines = [next_line(_PROMPT)]
    # Two backslashes are one that does not go on, and so on.
    while (len(lines[-1]) - len(lines[-1].rstrip("\\"))) % 2:
        lines[-1] = lines[-1][:-1]
        try:
            lines.append(next_line(_NEXT_LINE))
        except EOFError:
            break
    return "\n".join(lines)


def _piped_line(_prompt: str) -> str:
    line = sys.stdin.buffer.readline()
    if not line:
        raise EOFError
    return _decoded(line).removesuffix("\n")


def _decoded(data: bytes) -> str:
    try:
        return text_files.decode(data)
    except ValueError as error:
        raise InputError(f"cannot read standard input: {error}") from None


def _typed_line(prompt: str) -> str:
    stream = _prompt_stream()
    if stream is not sys.stdout:
        stream.write(prompt)
        stream.flush()
        prompt = ""
    try:
        return text_files.repair(input(prompt))
    except ValueError as error:
        raise InputError(f"cannot read what was typed: {error}") from None


def _prompt_stream() -> TextIO:
    """Where prompts go: not into a file or a pipe that takes the answers."""
    return sys.stdout if sys.stdout.isatty() else sys.stderr


def _edit_lines() -> None:
    """Give input() arrow keys, a history that ends with the process, and pasted lines together."""
    try:
        # input() uses it once it is imported.
        import readline
    except ImportError:
        return
    # Python turns this off, because its own prompt cannot take several lines. Other libraries that
    # take the place of GNU readline do not have it.
    if "GNU" in (readline.__doc__ or "") and os.environ.get("TERM") != "dumb":
        readline.parse_and_bind("set enable-bracketed-paste on")
