"""Turns the files of an older tokenizer into a tokenizer.json, with transformers.

Knows the files that such tokenizers consist of, and checks the result: against SentencePiece
itself, or by turning texts into ids and back. Nothing of a checkpoint is executed: only data is
copied to the place where transformers looks, and it may neither run code nor use the network.
"""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from doge_onnx.errors import CheckpointError
from doge_onnx.export.json_files import read_object, without_mark
from doge_onnx.export.quiet import quiet_transformers

# Files that hold a vocabulary, most telling first.
_SENTENCEPIECE = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
_BYTE_PAIRS = ("vocab.json", "merges.txt")
_BESIDE = ("added_tokens.json", "special_tokens_map.json", "chat_template.jinja")
CONFIG_NAME = "tokenizer_config.json"
# What a conversion reads.
OLDER_FILES = (*_SENTENCEPIECE, *_BYTE_PAIRS, "added_tokens.json")
# Classes that say nothing of how a text is cut.
_GENERIC = ("PreTrainedTokenizerFast", "PreTrainedTokenizer", "TokenizersBackend")
_PROBES = ("Once upon a time", "It was a dark night, and 12 bells rang!", "naïve café, 漢字")
_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token")
_IDS_ONLY = "; or remove it for a bundle that takes token ids only"


def older_file(directory: Path) -> Path | None:
    """The file of a directory that holds the vocabulary of an older tokenizer, if there is one.

    Raises:
        CheckpointError: There is a vocab.json without its merges.txt, or the other way round.
    """
    for name in _SENTENCEPIECE:
        if (directory / name).is_file():
            return directory / name
    there = [name for name in _BYTE_PAIRS if (directory / name).is_file()]
    if len(there) == 1:
        (missing,) = set(_BYTE_PAIRS) - set(there)
        raise CheckpointError(
            f"{directory} has {there[0]} without {missing}, so its tokenizer cannot be converted"
            f"{_IDS_ONLY}"
        )
    return directory / _BYTE_PAIRS[0] if there else None


def convert(directory: Path, vocabulary: Path) -> dict[str, bytes]:
    """Convert a tokenizer.

    Args:
        directory: The tokenizer's files.
        vocabulary: The one among them that `older_file` found.

    Returns:
        The files of the new tokenizer by name: tokenizer.json, tokenizer_config.json and, where
        the tokenizer has one, chat_template.jinja.

    Raises:
        CheckpointError: transformers cannot convert it, or would cut texts otherwise.
    """
    from_sentencepiece = vocabulary.name in _SENTENCEPIECE
    if from_sentencepiece:
        _require_sentencepiece(vocabulary)
    config = read_object(directory / CONFIG_NAME)
    # It would have transformers ask for code.
    config.pop("auto_map", None)
    named = config.get("tokenizer_class")
    named = named if isinstance(named, str) else None
    if from_sentencepiece and named in ("LlamaTokenizer", "LlamaTokenizerFast"):
        # transformers 5 documents this default, and forgets it without a tokenizer.json.
        config.setdefault("add_bos_token", True)
    usual = "LlamaTokenizer" if from_sentencepiece else "GPT2Tokenizer"
    candidates = [usual, _GENERIC[0]] if named is None or named in _GENERIC else [named]
    reasons = []
    with TemporaryDirectory() as scratch, quiet_transformers():
        place = Path(scratch, "tokenizer")
        place.mkdir()
        for name in (*OLDER_FILES, *_BESIDE):
            if (directory / name).is_file():
                (place / name).write_bytes(without_mark(directory / name))
        for candidate in candidates:
            text = json.dumps({**config, "tokenizer_class": candidate})
            (place / CONFIG_NAME).write_text(text, encoding="utf-8")
            tokenizer = _load(place, directory, candidate)
            problem = (
                _differs_from_sentencepiece(tokenizer, vocabulary)
                if from_sentencepiece
                else _loses_text(tokenizer)
            )
            if problem is None:
                return _saved(tokenizer, Path(scratch, "saved"))
            reasons.append(problem)
    raise CheckpointError(f"{vocabulary} cannot be converted: {reasons[0]}{_IDS_ONLY}")


def _require_sentencepiece(vocabulary: Path) -> None:
    try:
        import sentencepiece  # noqa: F401
    except ImportError:
        raise CheckpointError(
            f"{vocabulary} is converted with sentencepiece, which is not installed: pip install "
            f"sentencepiece{_IDS_ONLY}"
        ) from None


def _load(place: Path, origin: Path, name: str) -> Any:
    """The tokenizer, without special tokens that its class, `name`, only has by default.

    Raises:
        CheckpointError: transformers cannot load it.
    """
    from transformers import AutoTokenizer, PretrainedConfig

    def load(**changes: Any) -> Any:
        return AutoTokenizer.from_pretrained(
            place,
            config=PretrainedConfig(),
            local_files_only=True,
            trust_remote_code=False,
            **changes,
        )

    try:
        tokenizer = load()
        vocabulary = _own_tokens(place)
        unknown = [
            name
            for name in _SPECIAL
            if (token := getattr(tokenizer, name)) is not None and str(token) not in vocabulary
        ]
        if unknown:
            tokenizer = load(**dict.fromkeys(unknown))
    # transformers and the libraries under it raise all kinds.
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise CheckpointError(
            f"transformers cannot convert the tokenizer of {origin} as a {name}: {reason}"
            f"{_IDS_ONLY}"
        ) from None
    if not tokenizer.is_fast:
        raise CheckpointError(
            f"transformers has no fast form of the tokenizer of {origin}, a "
            f"{type(tokenizer).__name__}{_IDS_ONLY}"
        )
    return tokenizer


def _own_tokens(place: Path) -> set[str]:
    """The tokens that a tokenizer's own files name."""
    vocabulary: set[str] = set()
    for name in (*_SENTENCEPIECE, _BYTE_PAIRS[0]):
        path = place / name
        if not path.is_file():
            continue
        if name in _SENTENCEPIECE:
            import sentencepiece

            model = sentencepiece.SentencePieceProcessor(str(path))
            vocabulary |= {model.id_to_piece(i) for i in range(model.get_piece_size())}
        else:
            vocabulary |= read_object(path).keys()
    vocabulary |= read_object(place / "added_tokens.json").keys()
    for name in (CONFIG_NAME, "special_tokens_map.json"):
        content = read_object(place / name)
        added = content.get("added_tokens_decoder")
        values = [*content.values(), *(added.values() if isinstance(added, dict) else ())]
        for value in values:
            text = value.get("content") if isinstance(value, dict) else value
            if isinstance(text, str):
                vocabulary.add(text)
    return vocabulary


def _differs_from_sentencepiece(tokenizer: Any, vocabulary: Path) -> str | None:
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(str(vocabulary))
    for text in _PROBES:
        if tokenizer.encode(text, add_special_tokens=False) != model.encode(text):
            return (
                f"as a {type(tokenizer).__name__} of transformers it would cut {text!r} otherwise "
                "than SentencePiece does"
            )
    return None


def _loses_text(tokenizer: Any) -> str | None:
    for text in _PROBES:
        ids = tokenizer.encode(text, add_special_tokens=False)
        if tokenizer.decode(ids, clean_up_tokenization_spaces=False).strip() != text:
            return (
                f"as a {type(tokenizer).__name__} of transformers it would lose parts of {text!r}"
            )
    return None


def _saved(tokenizer: Any, place: Path) -> dict[str, bytes]:
    tokenizer.save_pretrained(place)
    files = {path.name: path.read_bytes() for path in place.iterdir()}
    content = json.loads(files[CONFIG_NAME])
    # Its own class would build the tokenizer anew; this one takes tokenizer.json as it is.
    content["tokenizer_class"] = _GENERIC[0]
    for name in ("is_local", "local_files_only"):
        content.pop(name, None)
    files[CONFIG_NAME] = json.dumps(content, indent=2, ensure_ascii=False).encode()
    return files
