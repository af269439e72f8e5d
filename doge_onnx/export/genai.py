"""genai_config.json, with which onnxruntime-genai runs a bundle.

Knows the format of that file, and which of its fields come from the checkpoint. docs/genai.md
says what works with onnxruntime-genai and what does not.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from doge_onnx.export.model_config import DogeConfig
from doge_onnx.manifest import Manifest
from doge_onnx.runtime.generation.defaults import Defaults

CONFIG_NAME = "genai_config.json"


def supported(manifest: Manifest) -> bool:
    """Whether onnxruntime-genai can run the bundle.

    onnxruntime-genai feeds a state that grows with the text, and position_ids that it counts
    itself. A graph with a state of constant size expects other rows and another mask.
    """
    return manifest.state.kind == "growing"


def genai_config(
    config: DogeConfig, manifest: Manifest, generation: dict[str, Any], origin: Path
) -> dict[str, Any]:
    """The content of genai_config.json.

    onnxruntime-genai rejects keys that it does not know, and the model type "doge"; the type
    "decoder" is for any decoder that has the usual inputs and outputs.

    Args:
        config: The checkpoint's.
        manifest: The bundle's.
        generation: The content of generation_config.json; its values win over config.json's.
        origin: Directory of the checkpoint, for error messages.
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
                # onnxruntime-genai computes the size of the state from this: a whole row.
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
            **_search(config, manifest, generation, origin),
            "past_present_share_buffer": state.in_place,
        },
    }


def _token_ids(config: DogeConfig, generation: dict[str, Any], origin: Path) -> dict[str, Any]:
    """The ids of special tokens; those that the vocabulary lacks are left out.

    onnxruntime-genai refuses an end-of-text id outside of the vocabulary, and feeds the padding
    id to the graph.
    """

    def known(value: Any) -> bool:
        whole = isinstance(value, int) and not isinstance(value, bool)
        return whole and 0 <= value < config.vocab_size

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
    # onnxruntime-genai takes trailing tokens with this id for padding. Without an id, it pads
    # with 0.
    if "pad_token_id" not in ids and eos:
        ids["pad_token_id"] = eos[0]
    return ids


def _search(
    config: DogeConfig, manifest: Manifest, generation: dict[str, Any], origin: Path
) -> dict[str, Any]:
    """The options of generation that onnxruntime-genai has and follows.

    Its own defaults differ from the model's. What has no effect there is left out: limits of new
    tokens, lists of tokens and all filters but top-k and top-p.
    """
    defaults = Defaults.parse(generation, {}, origin)
    options = defaults.recommended
    search = {
        "do_sample": defaults.sample,
        "temperature": 1.0 if options.temperature is None else options.temperature,
        # 0 is no limit; a number above the size of the vocabulary is refused.
        "top_k": min(options.top_k or 0, config.vocab_size),
        "top_p": 1.0 if options.top_p is None else options.top_p,
        "repetition_penalty": 1.0
        if options.repetition_penalty is None
        else options.repetition_penalty,
        "max_length": manifest.context_length,
    }
    if options.max_length is not None and options.max_new_tokens is None:
        search["max_length"] = min(manifest.context_length, options.max_length)
    if options.min_length and options.min_new_tokens is None:
        search["min_length"] = options.min_length
    if options.no_repeat_ngram_size:
        search["no_repeat_ngram_size"] = options.no_repeat_ngram_size
    beams = generation.get("num_beams")
    if isinstance(beams, int) and beams > 1:
        search["num_beams"] = beams
        for name, kind in (("length_penalty", int | float), ("early_stopping", bool)):
            if isinstance(generation.get(name), kind):
                search[name] = generation[name]
    return search
