"""The configuration by which onnxruntime-genai runs a bundle.

Knows its format, and what of it can be told from a checkpoint. See docs/genai.md for what works
there and what does not.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from doge_onnx.bundle import Manifest
from doge_onnx.config import DogeConfig
from doge_onnx.runtime.generation.defaults import Defaults

CONFIG_NAME = "genai_config.json"


def supported(manifest: Manifest) -> bool:
    """Whether onnxruntime-genai can run the bundle.

    It feeds a state that grows with the text, and position_ids that it counts itself: to a state
    of constant size it would give neither the rows nor the mask that the graph expects.
    """
    return manifest.state.kind == "growing"


def genai_config(
    config: DogeConfig, manifest: Manifest, generation: dict[str, Any], origin: Path
) -> dict[str, Any]:
    """The content of genai_config.json.

    It rejects keys that it does not know, and models of type "doge"; "decoder" is its name
    for any decoder that has the usual inputs and outputs.

    Args:
        config: The checkpoint's.
        manifest: The bundle's.
        generation: The content of generation_config.json, which goes before config.json.
        origin: Directory of the checkpoint, for messages.
    """
    state = manifest.state
    return {
        "model": {
            "type": "decoder",
            "vocab_size": config.vocab_size,
            "context_length": manifest.context_length,
            **_token_ids(config, generation, origin),
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
            **_search(config, generation, origin),
            "max_length": manifest.context_length,
            "past_present_share_buffer": state.in_place,
        },
    }


def _token_ids(config: DogeConfig, generation: dict[str, Any], origin: Path) -> dict[str, Any]:
    """The ids of special tokens; those that the vocabulary lacks are left out.

    It refuses an end-of-text id outside of the vocabulary, and feeds the padding id.
    """

    def known(value: Any) -> bool:
        return isinstance(value, int) and 0 <= value < config.vocab_size

    fallback = {"eos_token_id": list(config.eos_token_ids)}
    eos = sorted(filter(known, Defaults.parse(generation, fallback, origin).eos_token_ids))
    ids: dict[str, Any] = {"eos_token_id": eos}
    for name, value in (
        ("bos_token_id", config.bos_token_id),
        ("pad_token_id", config.pad_token_id),
    ):
        given = generation.get(name)
        if known(given):
            ids[name] = given
        elif value is not None:
            ids[name] = value
    # It takes the last tokens of a row that have this id for padding, and without any pads with 0.
    if "pad_token_id" not in ids and eos:
        ids["pad_token_id"] = eos[0]
    return ids


def _search(config: DogeConfig, generation: dict[str, Any], origin: Path) -> dict[str, Any]:
    """How tokens are chosen, as far as it knows how; its own defaults would be others."""
    defaults = Defaults.parse(generation, {}, origin)
    options = defaults.recommended.given()
    return {
        "do_sample": defaults.sample,
        "temperature": options.get("temperature", 1.0),
        # 0 is no limit, and it takes no number above the size of the vocabulary.
        "top_k": min(options.get("top_k") or 0, config.vocab_size),
        "top_p": options.get("top_p", 1.0),
        "repetition_penalty": options.get("repetition_penalty", 1.0),
    }
