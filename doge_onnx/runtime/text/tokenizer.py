"""The tokenizer, and streaming of text token by token.

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

from doge_onnx import text_files
from doge_onnx.errors import BundleError, InputError

# Decoders return this for bytes that are not, or not yet, a character.
_REPLACEMENT = "\ufffd"
# Most replacements at the end of a text that may still become one character: a character has at
# most 4 bytes, and some decoders return a replacement for each byte of an incomplete one.
_MAX_PENDING = 3
# Earlier tokens that are decoded together with new ones: some decoders need the previous token, and
# several tokens may form one character.
_CONTEXT = 8
# Most tokens that are held back: bytes that form no character in this many tokens never will.
_MAX_HELD = 16


class Tokenizer:
    """A bundle's tokenizer: text to token ids and back. `Model.tokenizer` is one."""

    def __init__(self, path: Path) -> None:
        """Load a tokenizer.json.

        Raises:
            BundleError: The file does not hold a tokenizer.
        """
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(text_files.read(path))
        except Exception as error:  # the library raises nothing more specific
            raise BundleError(f"{path} does not hold a tokenizer: {error}") from None
        # The file may hold settings from training. A prompt is never truncated or padded.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        added = self._tokenizer.get_added_tokens_decoder()
        self._silent = {token_id for token_id, token in added.items() if token.special}

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Convert a text to token ids.

        Args:
            text: The text. Special tokens that are spelled out in it are parsed in any case.
            add_special_tokens: Add the special tokens that the tokenizer puts around a text.

        Raises:
            InputError: The text is no str, or holds half of a surrogate pair.
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
        """Convert token ids to text.

        Args:
            token_ids: The ids. Ids that the tokenizer does not know are left out.
            skip_special_tokens: Leave special tokens out as well.

        Raises:
            InputError: An entry is not a whole number of 0 or more.
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
        """A token as the tokenizer's file spells it; None for an unknown id."""
        if token_id < 0:
            return None
        token: str | None = self._tokenizer.id_to_token(token_id)
        return token

    def token_id(self, text: str) -> int | None:
        """The id of the token that has this text, or that the file spells so; None for several."""
        token_id: int | None = self._tokenizer.token_to_id(text)
        if token_id is not None:
            return token_id
        ids = self.encode(text, add_special_tokens=False)
        return ids[0] if len(ids) == 1 else None

    def visible(self, token_id: int) -> bool:
        """Whether a token has text, that is, whether it is known and not special."""
        return token_id not in self._silent and self.token(token_id) is not None


class TextStream:
    """Decodes a growing sequence of tokens piece by piece, at O(1) per token.

    Each token is decoded together with a few tokens before it, because some decoders treat the
    first token of a text specially: they strip its space. The piece is what the token adds to their
    text. Text that ends in half a character is held back. The first tokens are decoded together
    with the last ones of the prompt, so that the prompt and the pieces form one text.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        # Tokens that are decoded together: first those whose text was returned, then held ones.
        self._window = [i for i in prompt[-_CONTEXT:] if tokenizer.visible(i)]
        self._text = tokenizer.decode(self._window)
        if self._text.endswith(_REPLACEMENT):
            # Half a character at the end of the prompt is not part of the generated text.
            self._window, self._text = [], ""
        self._context = len(self._window)
        self._emitted = len(self._text)

    def push(self, token_id: int) -> str:
        """Add a token; returns the new text that is certain."""
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

    @property
    def held(self) -> str:
        """The text held back, which ends in half a character."""
        return self._text[self._emitted :]

    def flush(self) -> str:
        """Return the text held back, even if it ends in half a character."""
        return self._emit(len(self._text))

    def _emit(self, end: int) -> str:
        start, self._emitted = self._emitted, max(self._emitted, end)
        return self._text[start : self._emitted]

    def _shorten(self, dropped: int) -> None:
        """Drop the first tokens of the window, but none of the text that was not returned yet."""
        pending = len(self._text) - self._emitted
        self._window = self._window[dropped:]
        self._context = len(self._window)
        self._text = self._tokenizer.decode(self._window)
        self._emitted = len(self._text) - pending
