"""Which fields of a config.json may stand there unread, and which make it another model's."""

from __future__ import annotations

import json
from typing import Any

import older_checkpoints
import pytest
import transformers
from commands import invoke
from test_model_config import MINIMAL

import doge_onnx
from doge_onnx.bundle import read_manifest
from doge_onnx.errors import ConfigError
from doge_onnx.export.model_config import DOGE, DOGE2, SPARSE_DOGE, DogeConfig


def read(changes: dict[str, Any], ignore: tuple[str, ...] = ()) -> DogeConfig:
    return DogeConfig.from_dict({**MINIMAL, **changes}, "some/config.json", ignore)


def refusal(changes: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as error:
        read(changes)
    assert "\n" not in str(error.value)
    return str(error.value)


# Which generation it is.


@pytest.mark.parametrize(
    ("changes", "generation", "window"),
    [
        ({}, DOGE, 2048),
        ({"keep_window_size": 7}, DOGE, 7),
        ({"keep_window_size": 7, "window_size": None}, DOGE, 7),
        ({"dynamic_mask_ratio": 0.0}, DOGE, None),
        ({"dynamic_mask_ratio": 0.0, "keep_window_size": 7}, DOGE, 7),
        ({"window_size": 7}, SPARSE_DOGE, 7),
        ({"window_size": 7, "keep_window_size": None}, SPARSE_DOGE, 7),
        ({"model_type": "doge2"}, DOGE2, 2048),
        ({"model_type": "doge2", "keep_window_size": 7}, DOGE2, 7),
        ({"model_type": "doge2", "dynamic_mask_ratio": 0.0}, DOGE2, 2048),
    ],
)
def test_the_config_tells_the_generation(changes, generation, window):
    config = read(changes)
    assert (config.generation, config.keep_window_size) == (generation, window)
    assert config.notes == ()


# What has no effect.


def test_all_that_transformers_writes_is_known(tmp_path):
    written = transformers.DogeConfig(**MINIMAL).to_dict()
    assert DogeConfig.from_dict(written) == read({})
    transformers.DogeConfig(**MINIMAL).save_pretrained(tmp_path)
    saved = DogeConfig.from_file(tmp_path / "config.json")
    assert saved == read({})
    assert saved.notes == ()


# What transformers 4 wrote, and the code that the first model cards ship.
OLD: dict[str, Any] = {
    "_name_or_path": "./results/Doge-20M",
    "architectures": ["DogeForCausalLM"],
    "attention_dropout": 0.1,
    "auto_map": {"AutoConfig": "configuration_doge.DogeConfig"},
    "expert_retrieval_size": 64,
    "hidden_bias": False,
    "hidden_dropout": 0.1,
    "initializer_range": 0.02,
    "is_moe": False,
    "num_cdmoe_experts": 2048,
    "num_cdmoe_experts_per_head": 8,
    "num_cdmoe_heads": 4,
    "num_cdmmoe_heads": 4,
    "router_aux_loss_coef": 0.001,
    "output_router_logits": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.48.1",
    "unk_token_id": 0,
    "use_cache": False,
    "_attn_implementation_autoset": True,
    "chunk_size_feed_forward": 0,
    "pruned_heads": {},
    "is_decoder": True,
    "id2label": {"0": "LABEL_0"},
    "problem_type": "regression",
    "task_specific_params": None,
    "max_length": 20,
    "num_beams": 1,
    "layer_types": ["full_attention"] * 3,
    "is_causal": True,
    "per_layer_config": None,
    "quantization_config": None,
}
# What other tools and people add.
OTHERS: dict[str, Any] = {
    "unsloth_version": "2025.1",
    "trl_version": "0.20",
    "transformers.js_config": {"dtype": "q4"},
    "my_comment": "trained on a rainy day",
    "license": "apache-2.0",
    "tags": ["small", "dog"],
    "padding_side": "left",
    "model_max_length": 4096,
    "use_flash_attn": True,
    "num_logits_to_keep": 1,
    "patch_size": 16,
    "transformers_weights": "model.safetensors",
    "whatever": None,
    "nothing": {},
    "empty": [],
}


@pytest.mark.parametrize("name", [*OLD, *OTHERS])
def test_a_field_without_effect_is_passed_over(name):
    config = read({name: {**OLD, **OTHERS}[name]})
    assert config == read({})
    assert config.notes == ()


@pytest.mark.parametrize("name", ["do_sample", "temperature", "repetition_penalty", "max_length"])
def test_options_of_generation_in_the_wrong_file_are_noted(name):
    config = read({name: {"do_sample": True}.get(name, 7)})
    assert config == read({})
    assert len(config.notes) == 1
    assert f"config.json sets {name};" in config.notes[0]


# What may have one.

UNKNOWN: dict[str, Any] = {
    "keep_windows_size": 2048,
    "attn_logit_softcapping": 30.0,
    "attention_type": "linear",
    "use_dynamic_mask": False,
    "qk_scale": 0,
    "gate_bias": True,
    "_sliding_window_pattern": 6,
    "layer_types": ["full_attention", "sliding_attention", "full_attention"],
    "partial_rotary_factor": 0.5,
    "num_nextn_predict_layers": 1,
    "is_causal": False,
    "pruned_heads": {"0": [1]},
    "per_layer_config": {"0": {"intermediate_size": 8}},
    "q_lora_rank": 64,
    "num_attention_groups": 2,
    "text_config": {"vocab_size": 9},
    "my_comment": 3,
    "rope_interleaved": True,
    "attention_chunk_size": 64,
    "adapters": {"default": "lora"},
    "transformers_weights": "other.safetensors",
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_a_field_that_is_not_understood_is_refused_by_name(name):
    message = refusal({name: UNKNOWN[name]})
    assert message.startswith("some/config.json: this field is not understood")
    assert f"{name} (" in message
    assert read({name: UNKNOWN[name]}, ignore=(name,)) == read({name: UNKNOWN[name]}, (name,))


def test_all_fields_that_are_not_understood_are_named_at_once():
    message = refusal({**UNKNOWN, "long": "x" * 1000})
    assert all(f"{name} (" in message for name in UNKNOWN)
    assert len(message) < 1500


def test_what_the_caller_names_is_as_if_it_were_not_there():
    config = read({"gate_bias": True, "keep_window_size": 5}, ignore=("gate_bias", "typo"))
    assert config.ignored == ("gate_bias",)
    assert config.notes == ("config.json was read without gate_bias, as asked",)
    assert read({"keep_window_size": 5}, ignore=("keep_window_size",)).keep_window_size == 2048
    rope = {"rope_type": "linear", "factor": 2.0, "mrope_section": [4]}
    assert read({"rope_parameters": rope}, ("rope_parameters.mrope_section",)).rope.factor == 2.0
    # The caller's own object is not changed.
    assert "mrope_section" in rope


# RoPE.


@pytest.mark.parametrize("kind", ["default", "linear", "dynamic"])
def test_rope_fields_of_other_types_are_noted(kind):
    rope = {"rope_type": kind, "factor": 2.0, "attention_factor": 1.5, "beta_fast": None}
    config = read({"rope_scaling": rope, "rope_theta": 300.0})
    assert (config.rope.kind, config.rope.theta) == (kind, 300.0)
    assert len(config.notes) == 1
    assert "attention_factor" in config.notes[0]
    assert "beta_fast" not in config.notes[0]
    assert ("factor, of which" in config.notes[0].replace("attention_factor", "")) == (
        kind == "default"
    )


def test_an_original_length_is_noted_only_if_it_is_another():
    rope = {"rope_type": "dynamic", "factor": 4.0, "original_max_position_embeddings": 2048}
    assert read({"rope_scaling": rope, "max_position_embeddings": 2048}).notes == ()
    assert read({"rope_scaling": rope, "max_position_embeddings": None}).notes == ()
    notes = read({"rope_scaling": rope, "max_position_embeddings": 8192}).notes
    assert "original_max_position_embeddings" in notes[0]


def test_of_two_ropes_that_differ_one_is_noted():
    older, newer = {"type": "linear", "factor": 2.0}, {"rope_type": "default", "rope_theta": 5.0}
    config = read({"rope_scaling": older, "rope_parameters": newer})
    assert config.rope.kind == "linear"
    assert "rope_scaling and rope_parameters, which differ" in config.notes[0]
    config = read({"rope_theta": 7.0, "rope_parameters": newer})
    assert config.rope.theta == 5.0
    note = "config.json has a rope_theta of 7; that of 5 in rope_parameters counts"
    assert config.notes == (note,)


# Tokens.


@pytest.mark.parametrize("value", [-1, 100, 10**30])
def test_a_token_that_the_vocabulary_lacks_is_noted(value):
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        config = read({name: value})
        assert config == read({})
        assert config.notes == (
            f"config.json names {value} as {name}, which the model of 100 tokens lacks",
        )
    assert read({"eos_token_id": [2, value]}).eos_token_ids == (2,)


# The whole way.

SENTENCES = (
    "config.json names 9999 as pad_token_id, which the model of 61 tokens lacks",
    "config.json names -1 as eos_token_id, which the model of 61 tokens lacks",
    "config.json sets temperature; only generation_config.json is asked for those",
    "config.json was read without gate_bias, as asked",
    "generation_config.json names -1 as eos_token_id, which the model of 61 tokens lacks",
)


@pytest.mark.slow
def test_an_export_says_what_it_passed_over(tmp_path):
    fields = {
        **{name: value for name, value in OLD.items() if name not in ("is_moe", "layer_types")},
        **OTHERS,
        "pad_token_id": 9999,
        "eos_token_id": [2, -1],
        "temperature": 0.5,
        "gate_bias": True,
    }
    checkpoint, bundle = tmp_path / "checkpoint", tmp_path / "bundle"
    model = older_checkpoints.make(checkpoint, "native", num_hidden_layers=1, extra_config=fields)
    generation = checkpoint / "generation_config.json"
    generation.write_text(json.dumps({"eos_token_id": [3, -1]}), encoding="utf-8")
    refused = invoke("export", str(checkpoint), str(bundle))
    assert refused.exit_code == 1
    assert "gate_bias (True)" in refused.stderr
    wrong = invoke("export", str(checkpoint), str(bundle), "--ignore-config-field", "gate")
    assert wrong.exit_code == 1
    done = invoke("export", str(checkpoint), str(bundle), "--ignore-config-field", "gate_bias")
    assert done.exit_code == 0, done.stderr
    manifest = read_manifest(bundle)
    assert manifest.ignored_fields == ("gate_bias",)
    assert set(SENTENCES) <= set(manifest.notes)
    # transformers is the reference, in spite of all.
    assert manifest.parity is not None
    assert manifest.parity["reference"].startswith("transformers")
    shown = invoke("info", str(bundle))
    for sentence in SENTENCES:
        assert sentence in done.stderr
        assert sentence in shown.stdout
    # Neither asks again.
    assert doge_onnx.verify(bundle, checkpoint).passed
    doge_onnx.evaluate(bundle, checkpoint, max_tokens=64)
    loaded = doge_onnx.load(bundle)
    # The end token that does not exist ends nothing, and is none to be suppressed.
    loaded.generate([1], max_new_tokens=4, min_new_tokens=4)
    logits, _ = loaded.forward([[5, 6, 7]], logits="all")
    assert abs(logits[0] - model.logits([5, 6, 7])).max() < 1e-3


@pytest.mark.slow
def test_a_value_that_transformers_refuses_is_one_line(tmp_path):
    older_checkpoints.make(tmp_path / "c", "native", num_hidden_layers=1)
    config = json.loads((tmp_path / "c" / "config.json").read_text())
    config["use_cache"] = "sometimes"
    (tmp_path / "c" / "config.json").write_text(json.dumps(config))
    result = invoke("export", str(tmp_path / "c"), str(tmp_path / "b"))
    assert result.exit_code == 1
    assert "use_cache" in result.stderr
    assert not (tmp_path / "b").exists()
