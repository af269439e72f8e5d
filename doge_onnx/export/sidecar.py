"""The files of a bundle beside its graph: copies from the checkpoint, and genai_config.json.

Knows which files are taken over, and what of them is checked. `genai` knows the content of
genai_config.json, and `card` writes the model card.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from doge_onnx.errors import BundleError, CheckpointError
from doge_onnx.export import consistency, genai, tokenizer_files
from doge_onnx.export.checkpoint import Source
from doge_onnx.export.json_files import read_object, without_mark
from doge_onnx.export.model_config import CONFIG_NAME, DogeConfig
from doge_onnx.manifest import Manifest
from doge_onnx.runtime.generation.defaults import GENERATION_CONFIG_NAME, Defaults
from doge_onnx.runtime.generation.token_ids import split_by_vocabulary


@dataclass(frozen=True)
class SideFiles:
    """What a bundle takes over from its checkpoint.

    Attributes:
        content: Files by name.
        notes: What a user should know about them, a sentence each.
    """

    content: dict[str, bytes]
    notes: tuple[str, ...]


def read(source: Source, ignore: Collection[str] = ()) -> SideFiles:
    """Read and compare the side files, before the export does any work.

    Args:
        source: The checkpoint.
        ignore: Fields of its config to do without; see `DogeConfig.from_file`.

    Raises:
        CheckpointError: One of them cannot be read, makes no sense, or cannot work together with
            another.
        ConfigError: The config makes no sense, or is not a Doge model's.
    """
    config_path = source.directory / CONFIG_NAME
    config = DogeConfig.from_file(config_path, ignore)
    generation_path = source.directory / GENERATION_CONFIG_NAME
    generation = read_object(generation_path)
    try:
        fallback = {"eos_token_id": list(config.eos_token_ids)}
        defaults = Defaults.parse(generation, fallback, source.directory, config.vocab_size)
    except BundleError as error:
        raise CheckpointError(str(error)) from None
    notes = [*config.notes, *_unknown_tokens(generation, config.vocab_size)]
    if defaults.ignored:
        ignored = ", ".join(defaults.ignored)
        notes.append(f"{generation_path.name} asks for {ignored}, which this package does not do")
    if defaults.without_effect:
        nothing = ", ".join(defaults.without_effect)
        notes.append(
            f"{generation_path.name} has values that make no sense and no difference: {nothing}"
        )
    adapter = source.adapter
    own = adapter is not None and (adapter.directory / tokenizer_files.TOKENIZER_NAME).is_file()
    # An adapter may have been trained with tokens and a chat template of its own.
    tokenizer = tokenizer_files.read(
        adapter.directory if adapter is not None and own else source.directory
    )
    if own:
        notes.append("the tokenizer is the adapter's own")
    if tokenizer.tokenizer is None:
        notes.append(f"no {tokenizer_files.TOKENIZER_NAME}: the bundle takes token ids only")
    if tokenizer.converted is not None:
        notes.append(f"{tokenizer_files.TOKENIZER_NAME} was made from {tokenizer.converted}")
    if tokenizer.completed:
        notes.append(
            f"{tokenizer_files.TOKENIZER_NAME} lacked tokens that {tokenizer_files.CONFIG_NAME} "
            f"adds, and got them: {', '.join(map(repr, tokenizer.completed[:5]))}"
        )
    notes += consistency.compare(tokenizer, config, defaults.eos_token_ids)
    content = {CONFIG_NAME: without_mark(config_path), **tokenizer.content}
    if generation_path.is_file():
        content[GENERATION_CONFIG_NAME] = without_mark(generation_path)
    return SideFiles(content, tuple(notes))


def _unknown_tokens(generation: dict[str, Any], vocab_size: int) -> list[str]:
    """A sentence for each field of generation_config.json with the id of a token that is not there.

    Args:
        generation: The content of the file, which was checked.
        vocab_size: Of the model.
    """
    sentences = []
    for name, value in generation.items():
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


def write(
    files: SideFiles, source: Source, config: DogeConfig, manifest: Manifest, directory: Path
) -> None:
    """Write the files of a bundle into `directory`, except graph, manifest and model card."""
    for name, content in files.content.items():
        (directory / name).write_bytes(content)
    if genai.supported(manifest):
        generation = read_object(directory / GENERATION_CONFIG_NAME)
        genai_content = genai.genai_config(config, manifest, generation, source.directory)
        text = json.dumps(genai_content, indent=2) + "\n"
        (directory / genai.CONFIG_NAME).write_text(text, encoding="utf-8", newline="\n")
