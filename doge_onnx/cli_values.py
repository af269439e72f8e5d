"""Values of options that name characters or tokens in a way of the command line.

Knows escapes in stop strings, and that a token may be given as its text. Does not know what the
options do.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import typer

from doge_onnx.cli_options import NAMED_TOKENS, flag

if TYPE_CHECKING:
    from doge_onnx.runtime.model import Model

_ESCAPE = re.compile(r"\\(?:([nrt\\])|u([0-9a-fA-F]{4})|.?)", re.DOTALL)
_CHARACTERS = {"n": "\n", "r": "\r", "t": "\t", "\\": "\\"}


def with_escapes(options: dict[str, Any]) -> dict[str, Any]:
    """Options with the characters that the escapes in the stop strings stand for.

    Raises:
        typer.BadParameter: There are no stop strings, or an escape is none.
    """
    if "stop" not in options:
        raise typer.BadParameter("it needs --stop", param_hint="--stop-escape")
    return options | {"stop": [_unescaped(text) for text in options["stop"]]}


def with_token_ids(options: dict[str, Any], model: Model) -> dict[str, Any]:
    """Options with the ids of tokens that are given as text.

    Raises:
        typer.BadParameter: A text is no token of the model's.
        InputError: A token is given as text, and the model has no tokenizer.
    """
    ids = {
        name: [_token_id(name, text, model) for text in options[name]]
        for name in NAMED_TOKENS.keys() & options.keys()
    }
    return options | ids


def _token_id(name: str, text: str, model: Model) -> int:
    if text.isdecimal():
        return int(text)
    token_id = model.tokenizer.token_id(text)
    if token_id is None:
        raise typer.BadParameter(
            f"{text!r} is neither a token id nor the text of one token", param_hint=flag(name)
        )
    return token_id


def _unescaped(text: str) -> str:
    def character(match: re.Match[str]) -> str:
        simple, code = match.groups()
        if simple is None and code is None:
            raise typer.BadParameter(
                f"{match[0]} is no escape; there are \\n, \\r, \\t, \\\\ and \\uXXXX",
                param_hint="--stop",
            )
        return _CHARACTERS[simple] if simple else chr(int(code, 16))

    try:
        # Characters beyond U+FFFF are two escapes, as in JSON.
        return _ESCAPE.sub(character, text).encode("utf-16", "surrogatepass").decode("utf-16")
    except UnicodeDecodeError:
        raise typer.BadParameter(
            f"{text!r} has one half of a pair of escapes", param_hint="--stop"
        ) from None
