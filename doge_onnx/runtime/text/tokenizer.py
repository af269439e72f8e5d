"""Text in and text out: the tokenizer, text that grows token by token, stop strings.

Knows token ids and strings. Does not know the model or how tokens are chosen.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray

from doge_onnx.errors import BundleError, InputError

# What a decoder shows for bytes that are no character (yet).
_REPLACEMENT = "\ufffd"
# The end of a text that may still become a character: one has at most 4 bytes, and some decoders
# show a replacement for each byte of one that is incomplete.
_MAX_PENDING = 3
# Tokens of which some decoders need the one before, and of which several may make one character.
_CONTEXT = 8
# Bytes that make no character in this many tokens never will.
_MAX_HELD = 16


class Tokenizer:
    """A bundle's tokenizer: from text to token ids and back. `Model.tokenizer` is one."""

    def __init__(self, path: Path) -> None:
        """Load a tokenizer.json.

        Raises:
            BundleError: The file does not hold a tokenizer.
        """
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing more specific
            raise BundleError(f"{path} does not hold a tokenizer: {error}") from None
        # A file may carry the settings of its training; a prompt is never cut or filled up.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        added = self._tokenizer.get_added_tokens_decoder()
        self._silent = {token_id for token_id, token in added.items() if token.special}

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text.

        Args:
            text: Special tokens that are written in it become tokens in any case.
            add_special_tokens: Put those around it that the tokenizer puts around a text.

        Raises:
            InputError: It is no str, or holds half of a surrogate pair, which no encoding has.
        """
        if not isinstance(text, str):
            raise InputError(f"the text must be a str, not {type(text).__name__}")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InputError(f"the text holds a lone surrogate at position {error.start}") from None
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(
        self, token_ids: Sequence[int] | NDArray[np.integer[Any]], skip_special_tokens: bool = True
    ) -> str:
        """Text of some tokens.

        Args:
            token_ids: What the tokenizer does not know among them has no text.
            skip_special_tokens: Leave out those that have a meaning rather than a text.

        Raises:
            InputError: Something that is no token id.
        """
        try:
            text: str = self._tokenizer.decode(
                [operator.index(token_id) for token_id in token_ids],
                skip_special_tokens=skip_special_tokens,
            )
        except (TypeError, OverflowError):
            raise InputError(f"token ids are whole numbers, 0 or more, not {token_ids!r}") from None
        return text

    def token(self, token_id: int) -> str | None:
        """A token as the tokenizer's file spells it; None if it does not know the id."""
        if token_id < 0:
            return None
        token: str | None = self._tokenizer.id_to_token(token_id)
        return token

    def visible(self, token_id: int) -> bool:
        """Whether a token has text: it is neither special nor unknown to the tokenizer."""
        return token_id not in self._silent and self.token(token_id) is not None


class TextStream:
    """The text of a growing sequence of tokens, piece by piece, at O(1) per token.

    A token is decoded together with those before it, because some decoders treat the
    first token of a text specially (they strip its space); only what it adds to their
    text is new. Text that ends in half a character is held back. The first tokens are
    decoded after the last ones of the prompt, so that prompt and pieces read as one text.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        # Tokens that are decoded together: context, whose text is out, and then held ones.
        self._window = [i for i in prompt[-_CONTEXT:] if tokenizer.visible(i)]
        self._text = tokenizer.decode(self._window)
        if self._text.endswith(_REPLACEMENT):
            # Half a character of the prompt is no part of the text that follows it.
            self._window, self._text = [], ""
        self._context = len(self._window)
        self._emitted = len(self._text)

    def push(self, token_id: int) -> str:
        """Add a token; return the text that is now certain."""
        if not self._tokenizer.visible(token_id):
            return ""
        self._window.append(token_id)
        self._text = self._tokenizer.decode(self._window)
        if not self._text.endswith(_REPLACEMENT):
            piece = self._emit(len(self._text))
            self._shorten(self._context)
            return piece
        if len(self._window) - self._context > _MAX_HELD:
            piece = self._emit(len(self._text) - _MAX_PENDING)
            self._shorten(len(self._window) - _CONTEXT)
            return piece
        return ""

    def flush(self) -> str:
        """The text held back, complete or not."""
        return self._emit(len(self._text))

    def _emit(self, end: int) -> str:
        start, self._emitted = self._emitted, max(self._emitted, end)
        return self._text[start : self._emitted]

    def _shorten(self, dropped: int) -> None:
        """Forget the first tokens of the window; what was not emitted stays the same."""
        pending = len(self._text) - self._emitted
        self._window = self._window[dropped:]
        self._context = len(self._window)
        self._text = self._tokenizer.decode(self._window)
        self._emitted = len(self._text) - pending


class StopFinder:
    """Ends a text before the first stop string in it, however the text is cut up.

    The first is the one that is complete first; of several that end together, the longest.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """Add text; return what is certainly before any stop string."""
        if self.found:
            return ""
        if not self._stops:
            return text
        text = self._held + text
        matches = [
            (start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0
        ]
        if matches:
            self.found = True
            self._held = ""
            return text[: min(matches)[1]]
        safe = len(text) - max(_overlap(text, stop) for stop in self._stops)
        self._held = text[safe:]
        return text[:safe]

    def flush(self) -> str:
        """The text held back, which has become no stop string."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`, but not all of it."""
    return next(
        size for size in range(min(len(stop) - 1, len(text)), -1, -1) if text.endswith(stop[:size])
    )
