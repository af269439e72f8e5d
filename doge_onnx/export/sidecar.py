"""The files of a bundle beside its graph: what the checkpoint brings, and what others read.

Knows onnxruntime-genai's configuration format and the text of the bundle's model card.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tokenizers

from doge_onnx.bundle import (
    CLOSED_GATE,
    MANIFEST_NAME,
    Manifest,
    read_manifest,
    replace_file,
)
from doge_onnx.config import DogeConfig
from doge_onnx.errors import BundleError, CheckpointError
from doge_onnx.export.checkpoint import SIDE_FILES, Source
from doge_onnx.runtime.options import GENERATION_CONFIG_NAME, Defaults

TOKENIZER_NAME = "tokenizer.json"
GENAI_CONFIG_NAME = "genai_config.json"
CARD_NAME = "README.md"


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
    """Write all files of a bundle that are neither graph nor manifest into `directory`."""
    for name in SIDE_FILES:
        path = source.directory / name
        if path.is_file():
            shutil.copyfile(path, directory / name)
    # It feeds a state that grows, and no position_ids that go on for ever.
    if manifest.state.kind == "growing":
        genai = json.dumps(genai_config(config, manifest), indent=2)
        (directory / GENAI_CONFIG_NAME).write_text(genai + "\n", encoding="utf-8")
    (directory / CARD_NAME).write_text(card(source, config, manifest), encoding="utf-8")


def rewrite_card(source: Source, config: DogeConfig, directory: Path) -> None:
    """Write the model card of a finished bundle anew, with the figures in its manifest.

    Raises:
        BundleError: There is no readable manifest, or the card cannot be written.
    """
    replace_file(directory, CARD_NAME, card(source, config, read_manifest(directory)))


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


def card(source: Source, config: DogeConfig, manifest: Manifest) -> str:
    """The model card of a bundle."""
    state = manifest.state
    at = f" at revision `{source.revision}`" if source.revision else ""
    engine = "ONNX Runtime" if manifest.target == "ort" else "any engine that runs standard ONNX"
    if state.kind == "window":
        extent = f"The state has at most {state.keep_window_size} rows, and texts have no end."
        mask = "`[batch_size, sequence_length]`, 0 for padding"
        positions = "| `position_ids` | int64 | `[batch_size, sequence_length]` |\n"
        past = present = "past_sequence_length"
        rest = (
            "the next holds its gate, which Dynamic Mask Attention adds to the key's score, "
            "and the one after that its position plus one. A free row is zero but for a gate of "
            f"{CLOSED_GATE:g}. There must be a row for each token of a step that is free, or "
            f"{state.keep_window_size} rows."
        )
    else:
        extent = f"The context length is {manifest.context_length} tokens."
        mask = "`[batch_size, total_sequence_length]`, 0 for padding"
        positions = ""
        past, present = "past_sequence_length", "total_sequence_length"
        rest = (
            "then comes its gate, which Dynamic Mask Attention adds to the key's score (one "
            "for each query head, where the checkpoint has them), and a channel that closes the "
            "keys of padding."
        )
        if state.dtype == "int8":
            rest += (
                " All are int8, in steps that are constants of the graph; a gate has two channels, "
                "whole coarse steps and the rest in fine ones."
            )

    def rows(length: str) -> str:
        return f"`[batch_size, {state.num_heads}, {length}, {state.row_size}]`"

    return f"""# {source.model}, exported to ONNX

`{source.model}`{at}, a Doge language model of {manifest.parameters:,} parameters, exported by
doge-onnx {manifest.versions["doge-onnx"]} in recurrent-step form: one graph takes new tokens and a
state, and returns logits and the next state. Weights are {manifest.precision}, the graph is made
for {engine}. {extent}

```python
import doge_onnx

model = doge_onnx.load("path/to/this/directory")
print(model.generate("Hey how are you doing?", max_new_tokens=100).text)
```

## The graph

| input | type | shape |
|---|---|---|
| `input_ids` | int64 | `[batch_size, sequence_length]` |
| `attention_mask` | int64 | {mask} |
{positions}| `past_key_values.{{i}}.key`, `.value` | {state.dtype} | {rows(past)} |

| output | type | shape |
|---|---|---|
| `logits` | float32 | `[batch_size, sequence_length, {config.vocab_size}]` |
| `present.{{i}}.key`, `.value` | {state.dtype} | {rows(present)} |

There is one key/value pair for each of the {state.num_layers} layers. The first {state.head_dim}
channels of a key are the key itself; {rest}
{_quality(manifest)}
`{MANIFEST_NAME}` holds the versions, checksums and the figures of the comparison with the
original model; `doge-onnx info` prints it.
"""


def _quality(manifest: Manifest) -> str:
    """The card's section on what the bundle loses against its reference, if that is known."""
    figures = manifest.quality
    if figures is None:
        return ""

    def number(name: str, form: str) -> str:
        value = figures.get(name)
        return "-" if value is None else format(value, form)

    return f"""
## Quality

Weights of {manifest.precision}, measured against {figures.get("reference")} on
{number("tokens", ",")} tokens of text, {figures.get("text")}:

| figure | value |
|---|---|
| perplexity | {number("perplexity", ".4g")} |
| perplexity of the reference | {number("reference_perplexity", ".4g")} |
| mean KL divergence, nats per token | {number("mean_kl", ".3g")} |
| top-1 agreement | {number("top1_agreement", ".2%")} |
| top-1/top-2 gap where they disagree, logits | {number("top2_gap_median", ".3g")} in the median, \
{number("top2_gap_max", ".3g")} at most |
"""
