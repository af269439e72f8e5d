"""The files of a bundle beside its graph: copies from the checkpoint, and genai_config.json.

Knows which files are copied and checks them. `genai` knows the content of genai_config.json, and
`card` writes the model card.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tokenizers

from doge_onnx import text_files
from doge_onnx.errors import BundleError, CheckpointError
from doge_onnx.export import genai
from doge_onnx.export.checkpoint import SIDE_FILES, Source
from doge_onnx.export.model_config import DogeConfig
from doge_onnx.manifest import Manifest
from doge_onnx.runtime.generation.defaults import GENERATION_CONFIG_NAME, Defaults
from doge_onnx.runtime.generation.token_ids import split_by_vocabulary

TOKENIZER_NAME = "tokenizer.json"


def check(source: Source, progress: Callable[[str], None]) -> None:
    """Check the side files that the runtime needs, before the export does any work.

    Raises:
        CheckpointError: One of them cannot be read, or makes no sense.
    """
    path = source.directory / GENERATION_CONFIG_NAME
    if path.is_file():
        try:
            content = text_files.read_json(path)
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(f"cannot read {path}: {error}") from None
        if not isinstance(content, dict):
            raise CheckpointError(f"{path} does not hold a JSON object")
        try:
            defaults = Defaults.parse(content, {}, source.directory)
        except BundleError as error:
            raise CheckpointError(str(error)) from None
        if defaults.ignored:
            ignored = ", ".join(defaults.ignored)
            progress(f"{path.name} asks for {ignored}, which this package does not do")
        if defaults.without_effect:
            nothing = ", ".join(defaults.without_effect)
            progress(f"{path.name} has values that make no sense and no difference: {nothing}")
    tokenizer = source.directory / TOKENIZER_NAME
    if not tokenizer.is_file():
        progress(f"no {TOKENIZER_NAME}: the bundle will take token ids only")
        return
    try:
        tokenizers.Tokenizer.from_str(text_files.read(tokenizer))
    # The library raises no more specific class.
    except Exception as error:
        raise CheckpointError(f"cannot read {tokenizer}: {error}") from None


def unknown_tokens(source: Source, vocab_size: int) -> list[str]:
    """A sentence for each field of generation_config.json with the id of a token that is not there.

    Args:
        source: The checkpoint, whose files were checked.
        vocab_size: Of the model.

    Raises:
        CheckpointError: A token that is forced is not there.
    """
    sentences = []
    content = _read_object(source.directory / GENERATION_CONFIG_NAME)
    try:
        Defaults.parse(content, {}, source.directory, vocab_size)
    except BundleError as error:
        raise CheckpointError(str(error)) from None
    for name, value in content.items():
        if not name.endswith("_token_id"):
            continue
        try:
            _, unknown = split_by_vocabulary(value, vocab_size)
        # Where a field has an effect, its value was checked.
        except ValueError:
            continue
        if unknown:
            ids = ", ".join(map(str, unknown))
            sentences.append(
                f"{GENERATION_CONFIG_NAME} names {ids} as {name}, which the model of {vocab_size} "
                "tokens lacks"
            )
    return sentences


def _read_object(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = text_files.read_json(path) if path.is_file() else {}
    return content


def write(source: Source, config: DogeConfig, manifest: Manifest, directory: Path) -> None:
    """Write the files of a bundle into `directory`, except graph, manifest and model card."""
    for name in SIDE_FILES:
        path = source.directory / name
        if path.is_file():
            _copy(path, directory / name)
    if genai.supported(manifest):
        generation = _read_object(directory / GENERATION_CONFIG_NAME)
        content = genai.genai_config(config, manifest, generation, source.directory)
        text = json.dumps(content, indent=2) + "\n"
        (directory / genai.CONFIG_NAME).write_text(text, encoding="utf-8", newline="\n")


def _copy(source: Path, target: Path) -> None:
    """Copy a file without the byte order mark that most readers of JSON refuse."""
    data = source.read_bytes()
    target.write_bytes(data.removeprefix(codecs.BOM_UTF8))
