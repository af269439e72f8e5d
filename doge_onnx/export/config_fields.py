"""Which fields of a config.json the model does not depend on.

Knows the fields that have no effect on what a Doge computes, and why, and for some the value that
has none. Does not know the fields that are read (`model_config`). Every other field could be the
one that makes it another model, so it is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

# Who wrote the file, and with what.
_TOOLS = (
    *("accelerate", "autotrain", "axolotl", "cuda", "datasets", "deepspeed", "doge_onnx"),
    *("huggingface_hub", "lightning", "llamafactory", "mergekit", "optimum", "peft", "python"),
    *("pytorch", "safetensors", "small_doge", "swift", "tokenizers", "torch", "transformers"),
    *("transformersjs", "trl", "unsloth", "verl"),
)
_WRITER = {
    *(f"{tool}_version" for tool in _TOOLS),
    *("_auto_class", "_commit_hash", "_name_or_path", "name_or_path", "model_name"),
    *("architectures", "auto_map", "custom_pipelines", "finetuning_task", "task_specific_params"),
    *("tokenizer_class", "prefix", "unsloth_fixed", "transformers.js_config"),
}
# How PyTorch computes it. The tensors say which element type they have.
_IMPLEMENTATION = {
    *("dtype", "torch_dtype", "torchscript", "use_bfloat16", "device_map", "hf_device_map"),
    *("attn_implementation", "_attn_implementation", "_attn_implementation_autoset"),
    *("_attn_implementation_internal", "_flash_attn_2_enabled", "use_flash_attention_2"),
    *("experts_implementation", "_experts_implementation", "_experts_implementation_internal"),
    *("chunk_size_feed_forward", "pretraining_tp", "tf_legacy_loss", "trust_remote_code"),
    *("use_flash_attn", "num_logits_to_keep", "logits_to_keep", "torch_compile"),
    "unsloth_tiled_mlp",
}
# How a trainer cut and padded its texts. How far positions reach, max_position_embeddings says.
_TEXTS = {
    *("padding_side", "model_max_length", "max_seq_length", "max_seq_len"),
    *("tokenizer_padding_side", "tokenizer_model_max_length"),
}
# Of an input that is a picture. A checkpoint that takes one has a tensor that a Doge has not.
_PICTURES = {"num_channels", "patch_size", "image_size"}
# Used in training only.
_TRAINING = {
    *("attention_dropout", "hidden_dropout", "initializer_range", "classifier_dropout"),
    *("gradient_checkpointing", "output_router_logits", "router_aux_loss_coef"),
}
# What a call returns beside the logits, and whether it caches.
_RETURNED = {
    *("output_attentions", "_output_attentions", "output_hidden_states", "return_dict"),
    *("use_return_dict", "tie_last_hidden_states", "use_cache"),
}
# Of heads that classify texts. A checkpoint with such a head has a tensor that a Doge has not.
_CLASSIFICATION = {"id2label", "label2id", "num_labels", "_num_labels", "problem_type"}
# A decoder alone does the same with either value.
_DECODER = {"is_decoder", "tie_encoder_decoder", "cross_attention_hidden_size"}
# Tokens that only a tokenizer or an encoder has a use for.
_TOKENS = {f"{name}_token_id" for name in ("unk", "sep", "cls", "mask", "decoder_start")}
WITHOUT_EFFECT = frozenset(
    _WRITER
    | _IMPLEMENTATION
    | _TRAINING
    | _TEXTS
    | _RETURNED
    | _CLASSIFICATION
    | _PICTURES
    | _DECODER
    | _TOKENS
)
# Notes for a reader, if they hold text.
_PROSE = re.compile(
    r"(.*_)?(authors?|citation|comments?|contact|date|description|language|licen[cs]e|notes?|tags"
    r"|url|website)"
)

# Of fields that other models have: the values that change nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (False,),
    "embedding_multiplier": (1,),
    "is_causal": (True,),
    "is_encoder_decoder": (False,),
    "logit_scale": (1,),
    "logits_scaling": (1,),
    "num_nextn_predict_layers": (0,),
    "partial_rotary_factor": (1,),
    "residual_multiplier": (1,),
    # The file that transformers reads; this one is read here, too.
    "transformers_weights": ("model.safetensors",),
    "use_bidirectional_attention": (False,),
    "use_sliding_window": (False,),
}

# Options of generation, which transformers below 5.0 kept here, and their defaults there.
_GENERATION: dict[str, Any] = {
    "assistant_confidence_threshold": 0.4,
    "assistant_lookbehind": 10,
    "bad_words_ids": None,
    "begin_suppress_tokens": None,
    "diversity_penalty": 0.0,
    "do_sample": False,
    "early_stopping": False,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "exponential_decay_length_penalty": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "length_penalty": 1.0,
    "max_length": 20,
    "max_new_tokens": None,
    "min_length": 0,
    "min_p": None,
    "no_repeat_ngram_size": 0,
    "num_assistant_tokens": 20,
    "num_assistant_tokens_schedule": "constant",
    "num_beam_groups": 1,
    "num_beams": 1,
    "num_return_sequences": 1,
    "output_scores": False,
    "remove_invalid_values": False,
    "repetition_penalty": 1.0,
    "return_dict_in_generate": False,
    "suppress_tokens": None,
    "target_lookbehind": 10,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "typical_p": 1.0,
}

# RoPE fields that types other than default, linear and dynamic have; with these, transformers does
# not look at them.
ROPE_OF_OTHER_TYPES = frozenset(
    {
        *("attention_factor", "beta_fast", "beta_slow", "high_freq_factor", "long_factor"),
        *("low_freq_factor", "mscale", "mscale_all_dim", "original_max_position_embeddings"),
        *("short_factor", "truncate"),
    }
)


def not_understood(config: Mapping[str, Any], read: Iterable[str]) -> list[str]:
    """Names of the fields that could change what the model computes, and that nobody reads.

    Args:
        config: A parsed config.json.
        read: Names of the fields that are read.
    """
    known = {*read, *WITHOUT_EFFECT, *_GENERATION}
    return [name for name in config if name not in known and not _is_harmless(name, config)]


def misplaced_generation(config: Mapping[str, Any]) -> list[str]:
    """Names of the options of generation that a config.json sets, where nobody reads them."""
    return [
        name
        for name, default in _GENERATION.items()
        if config.get(name) is not None and config[name] != default
    ]


def _is_harmless(name: str, config: Mapping[str, Any]) -> bool:
    value = config[name]
    # Asks for nothing. False and 0 might: they can turn something off that a Doge has.
    if value is None or value in ("", [], {}):
        return True
    if name in _NEUTRAL:
        return any(value == neutral for neutral in _NEUTRAL[name])
    if name == "layer_types":
        return isinstance(value, list) and all(layer == "full_attention" for layer in value)
    return _PROSE.fullmatch(name) is not None and _is_text(value)


def _is_text(value: Any) -> bool:
    items = value if isinstance(value, list) else [value]
    return all(isinstance(item, str) for item in items)
