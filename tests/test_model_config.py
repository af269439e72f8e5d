"""The checkpoint's config: both spellings, its defaults, and errors that name the field."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from doge_onnx.errors import ConfigError
from doge_onnx.export.model_config import (
    ACTIVATIONS,
    DOGE,
    DogeConfig,
    RopeConfig,
)

MINIMAL: dict[str, Any] = {
    "model_type": "doge",
    "vocab_size": 100,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
}


def read(**changes: Any) -> DogeConfig:
    return DogeConfig.from_dict({**MINIMAL, **changes}, "some/config.json")


def test_defaults_are_those_of_transformers():
    assert read() == DogeConfig(
        generation=DOGE,
        vocab_size=100,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=6,
        head_dim=8,
        hidden_act="silu",
        rms_norm_eps=1e-6,
        max_position_embeddings=2048,
        rope=RopeConfig("default", 10_000.0, 1.0),
        keep_window_size=2048,
        tie_word_embeddings=False,
        attention_bias=False,
        mlp_bias=False,
        num_experts=0,
        num_experts_per_tok=0,
        norm_topk_prob=False,
        bos_token_id=None,
        eos_token_ids=(),
        pad_token_id=None,
    )
    assert not read().is_moe


def test_a_null_means_the_default():
    fields = (
        "num_key_value_heads",
        "head_dim",
        "rms_norm_eps",
        "max_position_embeddings",
        "rope_scaling",
        "rope_parameters",
        "rope_theta",
        "sliding_window",
        "tie_word_embeddings",
        "attention_bias",
        "mlp_bias",
        "is_moe",
        "eos_token_id",
        "bos_token_id",
        "pad_token_id",
    )
    assert read(**dict.fromkeys(fields)) == read()


def test_what_the_config_says_wins_over_defaults():
    config = read(
        num_key_value_heads=2,
        head_dim=10,
        rms_norm_eps=1e-5,
        max_position_embeddings=77,
        keep_window_size=33,
        tie_word_embeddings=True,
        attention_bias=True,
        mlp_bias=True,
        bos_token_id=0,
        eos_token_id=99,
        pad_token_id=5,
    )
    assert (config.num_key_value_heads, config.head_dim) == (2, 10)
    assert (config.rms_norm_eps, config.max_position_embeddings) == (1e-5, 77)
    assert config.keep_window_size == 33
    assert (config.tie_word_embeddings, config.attention_bias, config.mlp_bias) == (True,) * 3
    assert (config.bos_token_id, config.eos_token_ids, config.pad_token_id) == (0, (99,), 5)


def test_there_can_be_several_end_tokens():
    assert read(eos_token_id=[3, 4]).eos_token_ids == (3, 4)


def test_the_older_bias_switch_stands_for_both():
    config = read(hidden_bias=True)
    assert (config.attention_bias, config.mlp_bias) == (True, True)
    config = read(hidden_bias=True, mlp_bias=False)
    assert (config.attention_bias, config.mlp_bias) == (True, False)


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}, "rope_theta": 500.0},
        {"rope_scaling": {"type": "dynamic", "factor": 4}, "rope_theta": 500},
        {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 500.0}},
        {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0}, "rope_theta": 500.0},
        # transformers takes the older field where there are both, unless it is empty.
        {
            "rope_parameters": {"rope_type": "default", "rope_theta": 7.0},
            "rope_scaling": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 500.0},
        },
        {
            "rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 500.0},
            "rope_scaling": {},
        },
        {
            "rope_scaling": {
                "rope_type": "dynamic",
                "factor": 4.0,
                "rope_theta": 500.0,
                "original_max_position_embeddings": 2048,
                "partial_rotary_factor": 1.0,
            }
        },
    ],
)
def test_both_spellings_of_rope_mean_the_same(fields):
    assert read(**fields).rope == RopeConfig("dynamic", 500.0, 4.0)


def test_rope_without_scaling_still_has_its_base():
    assert read(rope_theta=500.0).rope == RopeConfig("default", 500.0, 1.0)
    assert read(rope_parameters={"rope_theta": 300.0}).rope == RopeConfig("default", 300.0, 1.0)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_known_activation_is_accepted(name):
    assert read(hidden_act=name).hidden_act in {"silu", "gelu", "gelu_tanh", "relu"}


def test_experts_count_only_where_the_model_is_a_mixture():
    # Dense checkpoints carry the defaults of these fields, or anything at all.
    assert read(num_experts=16384, num_experts_per_tok=64).num_experts == 0
    assert read(is_moe=False, num_experts=7).num_experts_per_tok == 0
    config = read(is_moe=True, num_experts=49, num_experts_per_tok=5, norm_topk_prob=True)
    assert (config.num_experts, config.num_experts_per_tok) == (49, 5)
    assert config.norm_topk_prob
    assert config.is_moe


# The field that the message must name, what it is, and a part of what is said about it.
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("model_type", {"model_type": "llama"}, "only Doge"),
    ("model_type", {"model_type": None}, "only Doge"),
    ("num_key_value_heads", {"num_key_value_heads": 4}, "does not divide num_attention_heads (6)"),
    ("num_key_value_heads", {"num_key_value_heads": 12}, "does not divide"),
    ("num_key_value_heads", {"num_key_value_heads": 0}, "positive whole number"),
    ("hidden_size", {"hidden_size": 50}, "not a multiple of num_attention_heads (6)"),
    ("hidden_size", {"hidden_size": -48}, "positive whole number"),
    ("vocab_size", {"vocab_size": 0}, "positive whole number"),
    ("vocab_size", {"vocab_size": None}, "missing"),
    ("intermediate_size", {"intermediate_size": -1}, "positive whole number"),
    ("num_hidden_layers", {"num_hidden_layers": 0}, "positive whole number"),
    ("num_hidden_layers", {"num_hidden_layers": True}, "positive whole number"),
    ("num_hidden_layers", {"num_hidden_layers": "3"}, "positive whole number"),
    ("num_hidden_layers", {"num_hidden_layers": 3.0}, "positive whole number"),
    ("num_attention_heads", {"num_attention_heads": False}, "positive whole number"),
    ("num_attention_heads", {"num_attention_heads": [6]}, "positive whole number"),
    ("head_dim", {"head_dim": 7}, "even"),
    ("head_dim", {"head_dim": 2}, "at least 4"),
    ("head_dim", {"head_dim": -8}, "positive whole number"),
    ("head_dim", {"hidden_size": 42}, "even"),
    ("max_position_embeddings", {"max_position_embeddings": -2048}, "positive whole number"),
    ("max_position_embeddings", {"max_position_embeddings": 2048.5}, "positive whole number"),
    ("rms_norm_eps", {"rms_norm_eps": 0}, "positive number"),
    ("rms_norm_eps", {"rms_norm_eps": -1e-6}, "positive number"),
    ("rms_norm_eps", {"rms_norm_eps": math.nan}, "positive number"),
    ("rms_norm_eps", {"rms_norm_eps": math.inf}, "positive number"),
    ("rms_norm_eps", {"rms_norm_eps": 10**400}, "positive number"),
    ("rms_norm_eps", {"rms_norm_eps": "1e-6"}, "not a number"),
    ("rms_norm_eps", {"rms_norm_eps": True}, "not a number"),
    ("hidden_act", {"hidden_act": "swiglu"}, "none of silu"),
    ("hidden_act", {"hidden_act": ["silu"]}, "none of silu"),
    ("keep_window_size", {"keep_window_size": 0}, "positive whole number"),
    ("keep_window_size", {"keep_window_size": -1}, "positive whole number"),
    ("keep_window_size", {"keep_window_size": None}, "give a number"),
    ("keep_window_size", {"model_type": "doge2", "keep_window_size": 0}, "positive whole number"),
    ("window_size", {"window_size": 0}, "positive whole number"),
    ("window_size", {"window_size": False}, "positive whole number"),
    (
        "window_size",
        {"window_size": 16, "keep_window_size": 16},
        "window_size and keep_window_size",
    ),
    ("window_size", {"model_type": "doge2", "window_size": 16}, "config of a doge2"),
    ("quantization_config", {"quantization_config": {"quant_method": "gptq"}}, "are quantized"),
    ("compression_config", {"compression_config": {"format": "pack"}}, "are quantized"),
    ("sliding_window", {"sliding_window": 4096}, "not supported"),
    ("dynamic_mask_ratio", {"dynamic_mask_ratio": 0.5}, "not supported"),
    ("tie_word_embeddings", {"tie_word_embeddings": 1}, "neither true nor false"),
    ("attention_bias", {"attention_bias": "no"}, "neither true nor false"),
    ("mlp_bias", {"mlp_bias": []}, "neither true nor false"),
    ("hidden_bias", {"hidden_bias": 0}, "neither true nor false"),
    ("is_moe", {"is_moe": "true"}, "neither true nor false"),
    ("num_experts", {"is_moe": True, "num_experts_per_tok": 2}, "missing"),
    ("num_experts", {"is_moe": True, "num_experts": 50}, "square"),
    ("num_experts", {"is_moe": True, "num_experts": -49}, "positive whole number"),
    ("num_experts_per_tok", {"is_moe": True, "num_experts": 49}, "missing"),
    (
        "num_experts_per_tok",
        {"is_moe": True, "num_experts": 4, "num_experts_per_tok": 5},
        "exceeds num_experts (4)",
    ),
    ("norm_topk_prob", {"norm_topk_prob": 1.0}, "neither true nor false"),
    ("eos_token_id", {"eos_token_id": True}, "not the id of a token"),
    ("eos_token_id", {"eos_token_id": [[1]]}, "not the id of a token"),
    ("eos_token_id", {"eos_token_id": [1, "2"]}, "not the id of a token"),
    ("pad_token_id", {"pad_token_id": 1.0}, "not the id of a token"),
    ("bos_token_id", {"bos_token_id": [1]}, "not the id of a token"),
    ("rope_scaling", {"rope_scaling": "dynamic"}, "not an object"),
    ("rope_parameters", {"rope_parameters": [1]}, "not an object"),
    ("rope_type", {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "'yarn'"),
    ("rope_type", {"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}, "'llama3'"),
    ("rope_type", {"rope_scaling": {"type": "longrope", "factor": 2.0}}, "'longrope'"),
    ("rope_type", {"rope_scaling": {"rope_type": ["linear"]}}, "not supported"),
    ("factor", {"rope_scaling": {"rope_type": "dynamic"}}, "missing"),
    ("factor", {"rope_scaling": {"rope_type": "linear", "factor": 0.5}}, "less than 1"),
    ("factor", {"rope_scaling": {"rope_type": "linear", "factor": -2}}, "positive number"),
    ("factor", {"rope_scaling": {"rope_type": "linear", "factor": math.nan}}, "positive number"),
    ("factor", {"rope_scaling": {"rope_type": "linear", "factor": True}}, "not a number"),
    ("rope_theta", {"rope_theta": 0.0}, "positive number"),
    ("rope_theta", {"rope_theta": 10**400}, "positive number"),
    ("rope_theta", {"rope_parameters": {"rope_theta": "1e4"}}, "not a number"),
    (
        "partial_rotary_factor",
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
        "not supported",
    ),
    ("type", {"rope_scaling": {"type": "linear", "rope_type": "dynamic", "factor": 2}}, "drop one"),
    ("rope_parameters: this field is", {"rope_parameters": {"mrope_section": [2, 2]}}, "[2, 2]"),
    ("full_attention", {"rope_parameters": {"full_attention": {"rope_theta": 5.0}}}, "understood"),
]


@pytest.mark.parametrize(("field", "changes", "reason"), REFUSED, ids=lambda value: str(value)[:60])
def test_an_error_names_file_field_and_reason(field, changes, reason):
    with pytest.raises(ConfigError) as error:
        read(**changes)
    message = str(error.value)
    assert message.startswith("some/config.json: ")
    assert field in message
    assert reason in message
    assert "\n" not in message


@pytest.mark.parametrize("field", sorted(MINIMAL))
def test_a_missing_field_is_named(field):
    config = {name: value for name, value in MINIMAL.items() if name != field}
    with pytest.raises(ConfigError, match=field):
        DogeConfig.from_dict(config)


def test_a_file_is_read(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(MINIMAL), encoding="utf-8")
    assert DogeConfig.from_file(path) == read()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"{", "cannot read"),
        (b"", "cannot read"),
        (b"\xff\xfe{}", "cannot read"),
        (b"[" * 100_000, "cannot read"),
        (b"[]", "does not hold a JSON object"),
        (b'"doge"', "does not hold a JSON object"),
        (b"{}", "model_type"),
    ],
    ids=["cut short", "empty", "not text", "too deep", "list", "string", "empty object"],
)
def test_a_file_that_is_no_config_is_refused(tmp_path, content, reason):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as error:
        DogeConfig.from_file(path)
    assert reason in str(error.value)
    assert str(path) in str(error.value)


def test_a_directory_without_a_config_is_no_checkpoint(tmp_path):
    with pytest.raises(ConfigError, match=r"is not a checkpoint: it has no config\.json"):
        DogeConfig.from_file(tmp_path / "config.json")
    (tmp_path / "config.json").mkdir()
    with pytest.raises(ConfigError, match="cannot read"):
        DogeConfig.from_file(tmp_path / "config.json")


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 70),
    st.integers(),
    st.just(10**400),
    st.floats(),
    st.text(max_size=5),
    st.sampled_from(["doge", "silu", "linear", "dynamic", "default"]),
)
ROPE_FIELDS = ("rope_type", "type", "factor", "rope_theta", "partial_rotary_factor")
VALUES = st.one_of(
    SCALARS,
    st.lists(SCALARS, max_size=3),
    st.dictionaries(st.sampled_from(ROPE_FIELDS), SCALARS),
)
FIELDS = (
    *DogeConfig.__dataclass_fields__,
    "model_type",
    "eos_token_id",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "hidden_bias",
    "is_moe",
    "sliding_window",
    "dynamic_mask_ratio",
)


# No test depends on how fast the machine is.
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.sampled_from(FIELDS), VALUES))
def test_no_config_whatever_raises_anything_else(changes):
    # Changes to a valid config reach further than a config of nothing but noise.
    for config in (changes, {**MINIMAL, **changes}):
        try:
            result = DogeConfig.from_dict(config)
        except ConfigError:
            continue
        assert result.num_attention_heads % result.num_key_value_heads == 0
        assert min(result.head_dim, result.hidden_size, result.vocab_size) > 0
        for number in (result.rope.theta, result.rope.factor, result.rms_norm_eps):
            assert 0 < number < math.inf
