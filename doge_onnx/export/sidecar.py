"""The files of a bundle beside its graph: what the checkpoint brings, and what others read.

Knows onnxruntime-genai's configuration format. The model card is `card`'s.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tokenizers

from doge_onnx.bundle import Manifest
from doge_onnx.config import DogeConfig
from doge_onnx.errors import BundleError, CheckpointError
from doge_onnx.export.checkpoint import SIDE_FILES, Source
from doge_onnx.runtime.options import GENERATION_CONFIG_NAME, Defaults

TOKENIZER_NAME = "tokenizer.json"
GENAI_CONFIG_NAME = "genai_config.json"


def check(source: Source, progress: Callable[[str], None]) -> None:
    """Read the side files that the runtime will need, before any work is done.

    Raises:
        CheckpointError: One of them cannot be read, or makes no sense.
    """
    path = source.directory / GENERATION_CONFIG_NAME
    if path.is_file():
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(f"cannot read {path}: {error}") from None
        if not isinstance(content, dict):
            raise CheckpointError(f"{path} does not hold a JSON object")
        try:
            Defaults.parse(content, {}, source.directory)
        except BundleError as error:
            raise CheckpointError(str(error)) from None
    tokenizer = source.directory / TOKENIZER_NAME
    if not tokenizer.is_file():
        progress(f"no {TOKENIZER_NAME}: the bundle will take token ids only")
        return
    try:
        tokenizers.Tokenizer.from_file(str(tokenizer))
    # The library raises nothing more special.
    except Exception as error:
        raise CheckpointError(f"cannot read {tokenizer}: {error}") from None


def write(source: Source, config: DogeConfig, manifest: Manifest, directory: Path) -> None:
    """Write what a bundle has beside graph, manifest and model card into `directory`."""
    for name in SIDE_FILES:
        path = source.directory / name
        if path.is_file():
            shutil.copyfile(path, directory / name)
    # It feeds a state that grows, and no position_ids that go on for ever.
    if manifest.state.kind == "growing":
        genai = json.dumps(genai_config(config, manifest), indent=2)
        (directory / GENAI_CONFIG_NAME).write_text(genai + "\n", encoding="utf-8")


def genai_config(config: DogeConfig, manifest: Manifest) -> dict[str, Any]:
    """What onnxruntime-genai needs to run the bundle.

    It rejects keys that it does not know, and models of type "doge"; "decoder" is its name
    for any decoder that has the usual inputs and outputs.
    """
    state = manifest.state
    ids: dict[str, Any] = {"eos_token_id": list(config.eos_token_ids)}
    if config.bos_token_id is not None:
        ids["bos_token_id"] = config.bos_token_id
    if config.pad_token_id is not None:
        ids["pad_token_id"] = config.pad_token_id
    elif config.eos_token_ids:
        ids["pad_token_id"] = config.eos_token_ids[0]
    return {
        "model": {
            "type": "decoder",
            "vocab_size": config.vocab_size,
            "context_length": manifest.context_length,
            **ids,
            "decoder": {
                "filename": manifest.graph,
                "session_options": {"provider_options": []},
                "num_attention_heads": config.num_attention_heads,
                "num_hidden_layers": state.num_layers,
                "num_key_value_heads": state.num_heads,
                # It sizes the state by this, so it is the row and not the head itself.
                "head_size": state.row_size,
                "hidden_size": config.hidden_size,
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {
            "do_sample": False,
            "max_length": manifest.context_length,
            "past_present_share_buffer": state.in_place,
        },
    }
