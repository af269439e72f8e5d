"""The files of a checkpoint's tokenizer, in the form that a bundle takes over.

Knows their names, and what transformers 4 and 5 each need to load them. `tokenizer_conversion`
turns older tokenizers into a tokenizer.json; `consistency` compares the tokenizer with the model.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tokenizers

from doge_onnx.errors import CheckpointError
from doge_onnx.export import tokenizer_conversion
from doge_onnx.export.json_files import parse_object, without_mark

TOKENIZER_NAME = "tokenizer.json"
CONFIG_NAME = "tokenizer_config.json"
SPECIAL_TOKENS_NAME = "special_tokens_map.json"
TEMPLATE_NAME = "chat_template.jinja"
NAMES = (TOKENIZER_NAME, CONFIG_NAME, SPECIAL_TOKENS_NAME, TEMPLATE_NAME)
# A class that takes tokenizer.json as it is, in transformers 4 and 5 alike. The other name of it
# is not known to transformers 4.
_CLASS = "PreTrainedTokenizerFast"
_NEWER_CLASS = "TokenizersBackend"
_TOKEN_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


@dataclass(frozen=True)
class TokenizerFiles:
    """The files of a tokenizer.

    Attributes:
        directory: Where they come from.
        content: What a bundle gets, by file name.
        tokenizer: The tokenizer itself, or None if there is none.
        config: The content of tokenizer_config.json; empty if there is none.
        special_tokens: Its special tokens by their names, such as `eos_token`.
        converted: The file that tokenizer.json was made from, or None if it was there.
        completed: Tokens that were added to tokenizer.json, where only tokenizer_config.json had
            them.
    """

    directory: Path
    content: dict[str, bytes]
    tokenizer: tokenizers.Tokenizer | None
    config: dict[str, Any]
    special_tokens: dict[str, str] = field(default_factory=dict)
    converted: str | None = None
    completed: tuple[str, ...] = ()

    @property
    def template(self) -> str | None:
        """The source of the chat template, the one named "default" of several; None without."""
        if TEMPLATE_NAME in self.content:
            return self.content[TEMPLATE_NAME].decode("utf-8", errors="replace")
        source = self.config.get("chat_template")
        if isinstance(source, list):
            named = {e.get("name"): e.get("template") for e in source if isinstance(e, dict)}
            source = named.get("default")
        return source if isinstance(source, str) else None


def read(directory: Path) -> TokenizerFiles:
    """Read the tokenizer of a checkpoint, converting an older one.

    Raises:
        CheckpointError: A file cannot be read, or the tokenizer cannot be converted.
    """
    content = {}
    for name in NAMES:
        path = directory / name
        if path.is_file():
            content[name] = without_mark(path)
    converted = None
    if TOKENIZER_NAME not in content:
        older = tokenizer_conversion.older_file(directory)
        if older is not None:
            new = tokenizer_conversion.convert(directory, older)
            content = {name: new[name] for name in NAMES if name in new}
            converted = older.name
    config, special = {}, {}
    if CONFIG_NAME in content:
        config = parse_object(content[CONFIG_NAME], directory / CONFIG_NAME)
    if SPECIAL_TOKENS_NAME in content:
        special = parse_object(content[SPECIAL_TOKENS_NAME], directory / SPECIAL_TOKENS_NAME)
    tokenizer, completed = None, []
    if TOKENIZER_NAME in content:
        tokenizer = _parse(content[TOKENIZER_NAME], directory / TOKENIZER_NAME)
        completed = _complete(tokenizer, config.get("added_tokens_decoder"))
        if completed:
            content[TOKENIZER_NAME] = tokenizer.to_str(pretty=True).encode()
        readable = _readable_by_both(config)
        if readable != config:
            config = readable
            text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
            content[CONFIG_NAME] = text.encode()
    named = {
        name: token
        # As in transformers: the config's own, unless it is empty.
        for name, value in {**special, **{k: v for k, v in config.items() if v}}.items()
        if name.endswith("_token") and (token := _text(value)) is not None
    }
    return TokenizerFiles(directory, content, tokenizer, config, named, converted, tuple(completed))


def _parse(content: bytes, origin: Path) -> tokenizers.Tokenizer:
    try:
        tokenizer = tokenizers.Tokenizer.from_str(content.decode())
    # The library raises no more specific class.
    except Exception as error:
        raise CheckpointError(f"cannot read {origin}: {error}") from None
    # The file may hold settings from training; the runtime never uses them.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _complete(tokenizer: tokenizers.Tokenizer, decoder: Any) -> list[str]:
    """Add the tokens that only tokenizer_config.json has, as transformers does when it loads.

    Only those are added whose ids follow upon the tokenizer's own; it can give no others.
    """
    entries = {}
    for number, entry in decoder.items() if isinstance(decoder, dict) else ():
        text = _text(entry) if isinstance(entry, dict) else None
        if number.isdecimal() and text and tokenizer.token_to_id(text) is None:
            flags = {name: entry.get(name) is True for name in _TOKEN_FLAGS}
            entries[int(number)] = tokenizers.AddedToken(text, **flags)
    added = []
    for number, token in sorted(entries.items()):
        if number != tokenizer.get_vocab_size(with_added_tokens=True):
            break
        add = tokenizer.add_special_tokens if token.special else tokenizer.add_tokens
        add([token])
        added.append(token.content)
    return added


def _text(token: Any) -> str | None:
    """A token of a config: a text, or an object with its text and properties."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _readable_by_both(config: dict[str, Any]) -> dict[str, Any]:
    """A tokenizer_config.json that transformers 4 and 5 read to the same effect.

    transformers 4 does not know the name that version 5 gives to its own class, nor which class a
    Doge has; and where version 5 has a list of special tokens, it expects an object.
    """
    changed = dict(config)
    if changed.get("tokenizer_class") in (None, _NEWER_CLASS):
        changed["tokenizer_class"] = _CLASS
    extra = changed.get("extra_special_tokens")
    if isinstance(extra, list):
        del changed["extra_special_tokens"]
        if extra:
            changed["additional_special_tokens"] = extra
    return changed
