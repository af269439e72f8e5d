"""Holds the files of a checkpoint against each other: each may be valid, and they still disagree.

Compares the model's vocabulary with the tokenizer's, special tokens that a chat template writes
with those that the tokenizer knows, the tokens that end a text, and the lengths of a context. What
always fails is refused; what is only suspicious becomes a note for the user. Does not read files.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

import jinja2
import tokenizers

from doge_onnx.errors import CheckpointError
from doge_onnx.export import template_text
from doge_onnx.export.model_config import DogeConfig
from doge_onnx.export.tokenizer_files import CONFIG_NAME, TOKENIZER_NAME, TokenizerFiles

# transformers writes a huge number where a tokenizer has no limit.
_NO_LIMIT = 10**9
# Most tokens that a message names.
_SHOWN = 5
# Models have more rows than tokens, rounded up to a multiple that suits hardware.
_PADDED_ROWS = 256


def compare(files: TokenizerFiles, config: DogeConfig, end_ids: Collection[int]) -> tuple[str, ...]:
    """Compare the tokenizer with the model.

    Args:
        files: The tokenizer's files.
        config: The model's config.
        end_ids: The tokens that end a text, as generation takes them from the model's files.

    Returns:
        Notes for the user, a sentence each.

    Raises:
        CheckpointError: The two cannot work together.
    """
    if files.tokenizer is None:
        return ()
    return tuple(_Comparison(files, files.tokenizer, config, end_ids).notes())


def end_note(files: TokenizerFiles, end_ids: Collection[int]) -> str | None:
    """What is suspicious about the tokens that end a text; None if nothing is.

    Args:
        files: The tokenizer's files.
        end_ids: See `compare`.
    """
    if files.tokenizer is None:
        return None
    if not end_ids:
        return (
            "no file says which token ends a text (eos_token_id): texts end at the limit of tokens "
            "only"
        )
    token = files.special_tokens.get("eos_token")
    token_id = None if token is None else files.tokenizer.token_to_id(token)
    if token_id is None or token_id in end_ids:
        return None
    return (
        f"the tokenizer ends a text with {_named({token_id: str(token)})}, but generation ends at "
        f"{_named(_tokens(files.tokenizer, end_ids))} (eos_token_id)"
    )


def _tokens(tokenizer: tokenizers.Tokenizer, ids: Collection[int]) -> dict[int, str]:
    return {i: tokenizer.id_to_token(i) or "no token" for i in sorted(ids)}


def _named(tokens: Mapping[int, str]) -> str:
    """Tokens with their ids, for a message."""
    shown = [f"{token!r} ({i})" for i, token in sorted(tokens.items())[:_SHOWN]]
    more = len(tokens) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more > 0 else "")


class _Comparison:
    """One comparison; `notes` may be called once."""

    def __init__(
        self,
        files: TokenizerFiles,
        tokenizer: tokenizers.Tokenizer,
        config: DogeConfig,
        end_ids: Collection[int],
    ) -> None:
        self._files, self._tokenizer, self._config = files, tokenizer, config
        self._end_ids = end_ids
        self._ids: dict[str, int] = tokenizer.get_vocab(with_added_tokens=True)
        self._added = {t.content for t in tokenizer.get_added_tokens_decoder().values()}
        self._beyond = {i: token for token, i in self._ids.items() if i >= config.vocab_size}

    def notes(self) -> Iterator[str]:
        template, problem = self._files.template, None
        texts: frozenset[str] = frozenset()
        if template is not None:
            try:
                texts = template_text.written(template)
            except jinja2.TemplateSyntaxError as error:
                reason = " ".join(str(error).split())
                problem = f"the chat template is no valid Jinja ({reason}): chat will not work"
        self._refuse_tokens_that_are_needed(texts)
        if problem is not None:
            yield problem
        yield from self._sizes()
        yield from self._special_tokens()
        yield from self._template(texts)
        yield from self._ends(texts)
        yield from self._beginning()
        yield from self._lengths()

    def _refuse_tokens_that_are_needed(self, texts: frozenset[str]) -> None:
        """Refuse a tokenizer whose texts or conversations always need what the model lacks."""
        ordinary = {i: t for i, t in self._beyond.items() if t not in self._added}
        if ordinary:
            raise CheckpointError(
                f"{self._origin} is another model's: it has {_named(ordinary)}, and the model has "
                f"{self._config.vocab_size} tokens"
            )
        around = set(self._tokenizer.encode("").ids)
        special = self._files.special_tokens
        ends = {special.get(name) for name in ("bos_token", "eos_token")}
        for why, needed in (
            ("which it puts around every text", [i for i in self._beyond if i in around]),
            ("which begin or end a text", [i for i, t in self._beyond.items() if t in ends]),
            (
                "which the chat template writes",
                [i for i, t in self._beyond.items() if any(t in text for text in texts)],
            ),
        ):
            if needed:
                raise CheckpointError(
                    f"{self._origin} has tokens that the model lacks, {why}: "
                    f"{_named({i: self._beyond[i] for i in needed})}; the model has "
                    f"{self._config.vocab_size} tokens. Resize its embeddings and train them, or "
                    "export with the tokenizer that belongs to it"
                )

    @property
    def _origin(self) -> str:
        return str(self._files.directory / (self._files.converted or TOKENIZER_NAME))

    def _sizes(self) -> Iterator[str]:
        rows = self._config.vocab_size
        if self._beyond:
            yield (
                f"the tokenizer has tokens that the model lacks: {_named(self._beyond)}; a prompt "
                "with one of them is refused"
            )
        highest = max(self._ids.values(), default=-1) + 1
        if rows - highest > max(_PADDED_ROWS, rows // 50):
            yield (
                f"the model has {rows} tokens and the tokenizer {highest}: is it the model's own? "
                "The tokens without a text stay silent"
            )

    def _special_tokens(self) -> Iterator[str]:
        """Special tokens of tokenizer_config.json that tokenizer.json does not know."""
        wanted = dict.fromkeys(self._files.special_tokens.values(), "")
        extra = self._files.config.get("additional_special_tokens")
        for entry in extra if isinstance(extra, list) else ():
            text = entry.get("content") if isinstance(entry, dict) else entry
            if isinstance(text, str):
                wanted[text] = ""
        decoder = self._files.config.get("added_tokens_decoder")
        moved = {}
        for number, entry in (decoder if isinstance(decoder, dict) else {}).items():
            text = entry.get("content") if isinstance(entry, dict) else None
            if not isinstance(text, str):
                continue
            wanted[text] = ""
            if text in self._ids and str(self._ids[text]) != str(number):
                moved[self._ids[text]] = text
        missing = [token for token in wanted if token not in self._ids]
        if missing:
            yield (
                f"{CONFIG_NAME} has special tokens that {TOKENIZER_NAME} lacks: "
                f"{', '.join(map(repr, missing[:_SHOWN]))}; they are read as plain text"
            )
        if moved:
            yield (
                f"{CONFIG_NAME} gives other ids than {TOKENIZER_NAME} to {_named(moved)}; the "
                "latter counts"
            )

    def _template(self, texts: frozenset[str]) -> Iterator[str]:
        cut = sorted(
            token
            for token in template_text.special_tokens(texts)
            if len(self._tokenizer.encode(token, add_special_tokens=False).ids) != 1
        )
        if cut:
            yield (
                f"the chat template writes {', '.join(map(repr, cut[:_SHOWN]))}, which the "
                "tokenizer does not know as tokens and cuts into pieces"
            )

    def _ends(self, texts: frozenset[str]) -> Iterator[str]:
        note = end_note(self._files, self._end_ids)
        if note is not None:
            yield note
        template = self._files.template
        if not texts or template is None or not self._end_ids:
            return
        names = template_text.variables(template)
        written = {token for token in self._added if any(token in text for text in texts)}
        written |= {t for name, t in self._files.special_tokens.items() if name in names}
        written.discard(self._files.special_tokens.get("bos_token", ""))
        ends = _tokens(self._tokenizer, self._end_ids)
        if written and not written & set(ends.values()):
            yield (
                f"the chat template writes none of the tokens at which generation ends, "
                f"{_named(ends)}: answers may not end by themselves"
            )

    def _beginning(self) -> Iterator[str]:
        token, told = self._files.special_tokens.get("bos_token"), self._config.bos_token_id
        token_id = None if token is None else self._ids.get(token)
        if token_id is not None and told is not None and token_id != told:
            yield (
                f"the tokenizer begins a text with {_named({token_id: str(token)})}, config.json "
                f"with {_named(_tokens(self._tokenizer, [told]))} (bos_token_id)"
            )

    def _lengths(self) -> Iterator[str]:
        limit, trained = self._files.config.get("model_max_length"), self._config
        if isinstance(limit, bool) or not isinstance(limit, int | float):
            return
        if limit != trained.max_position_embeddings and limit < _NO_LIMIT:
            yield (
                f"{CONFIG_NAME} has a model_max_length of {limit:g}, config.json "
                f"max_position_embeddings of {trained.max_position_embeddings}; the latter counts"
            )
