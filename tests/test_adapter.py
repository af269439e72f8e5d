"""LoRA adapters: merged as the equations say and as PEFT does it, or refused by name."""

from __future__ import annotations

import json
import math
import subprocess
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import torch
from environments import ROOT, environment
from safetensors.torch import load_file, save_file
from torch import Tensor

import doge_onnx
from doge_onnx.errors import CheckpointError, InputError
from doge_onnx.export.checkpoint import find, read

RANK, ALPHA = 2, 6
NAMES = "base_model.model.model.layers.0."
Q, DOWN = "self_attn.q_proj", "mlp.down_proj"
Weights = dict[str, Tensor]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A checkpoint of one layer with a head of its own."""
    place = tmp_path_factory.mktemp("base") / "base"
    return checkpoints.make(place, num_hidden_layers=1, tie_word_embeddings=False)


@pytest.fixture(scope="module")
def tied(tmp_path_factory) -> Path:
    return checkpoints.make(tmp_path_factory.mktemp("tied") / "tied", num_hidden_layers=1)


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def pair(module: str, rank: int = RANK, outputs: int = 48, inputs: int = 48) -> Weights:
    return {
        f"{module}.lora_A.weight": noise(rank, inputs, seed=len(module)),
        f"{module}.lora_B.weight": noise(outputs, rank, seed=len(module) + 1),
    }


def adapter(place: Path, weights: Weights | None = None, **config: Any) -> Path:
    """Write an adapter; `config` are fields of its config."""
    place.mkdir(exist_ok=True)
    if weights is None:
        weights = pair(NAMES + Q)
    content = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, **config}
    (place / "adapter_config.json").write_text(json.dumps(content), encoding="utf-8")
    save_file(weights, place / "adapter_model.safetensors")
    return place


def merged(base: Path, place: Path, module: str = Q) -> Tensor:
    """What a module's weight has become; the other tensors must be as they were."""
    before, after = read(base).tensors, read(base, adapter=place).tensors
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"layers.0.{module}.weight"}
    return after[f"layers.0.{module}.weight"]


def product(weights: Weights, module: str = Q) -> Tensor:
    parts = dict(sorted(weights.items()))
    first, second = (parts[name] for name in parts if module in name and "lora_" in name)
    return second.float() @ first.float()


def weight(base: Path, module: str = Q) -> Tensor:
    return read(base).tensors[f"layers.0.{module}.weight"]


def test_the_product_of_both_matrices_is_added(base, tmp_path):
    weights = pair(NAMES + Q)
    truth = weight(base) + ALPHA / RANK * product(weights)
    assert torch.allclose(merged(base, adapter(tmp_path / "a", weights)), truth, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_adapter_in_half_precision_is_merged_in_full(base, tmp_path, dtype):
    weights = {name: value.to(dtype) for name, value in pair(NAMES + Q).items()}
    truth = weight(base) + ALPHA / RANK * product(weights)
    assert torch.allclose(merged(base, adapter(tmp_path / "a", weights)), truth, atol=1e-6)


def test_rank_stabilised_lora_divides_by_the_root(base, tmp_path):
    weights = pair(NAMES + Q)
    truth = weight(base) + ALPHA / math.sqrt(RANK) * product(weights)
    found = merged(base, adapter(tmp_path / "a", weights, use_rslora=True))
    assert torch.allclose(found, truth, atol=1e-6)


@pytest.mark.parametrize(
    ("pattern", "factor"),
    [
        ({"q_proj": 10}, 5),
        ({"self_attn.q_proj": 10}, 5),
        ({r"model\.layers\.[0-9]+\..*q_proj": 10}, 5),
        ({"k_proj": 10, ".*": 4, "q_proj": 10}, 2),
        ({"proj": 10}, ALPHA / RANK),
        ({"layers.1.self_attn.q_proj": 10}, ALPHA / RANK),
    ],
)
def test_the_first_pattern_that_fits_a_module_counts(base, tmp_path, pattern, factor):
    weights = pair(NAMES + Q)
    found = merged(base, adapter(tmp_path / "a", weights, alpha_pattern=pattern))
    assert torch.allclose(found, weight(base) + factor * product(weights), atol=1e-5)


def test_ranks_may_differ(base, tmp_path):
    weights = pair(NAMES + DOWN, rank=5, inputs=80)
    found = merged(base, adapter(tmp_path / "a", weights, rank_pattern={"down_proj": 5}), DOWN)
    truth = weight(base, DOWN) + ALPHA / 5 * product(weights, DOWN)
    assert torch.allclose(found, truth, atol=1e-5)


@pytest.mark.parametrize("pattern", ["^lm_head", "lm_head"])
def test_patterns_may_name_the_head_from_its_beginning(base, tmp_path, pattern):
    head = "base_model.model.lm_head"
    weights = pair(head, rank=5, outputs=97)
    directory = adapter(tmp_path / "a", weights, rank_pattern={pattern: 5})
    found = read(base, adapter=directory).tensors["lm_head.weight"]
    truth = read(base).tensors["lm_head.weight"] + ALPHA / 5 * product(weights, head)
    assert torch.allclose(found, truth, atol=1e-5)


def test_dora_scales_each_row_to_its_learned_norm(base, tmp_path):
    weights, norms = pair(NAMES + Q), noise(48).abs()
    whole = {**weights, f"{NAMES}{Q}.lora_magnitude_vector": norms}
    direction = weight(base) + ALPHA / RANK * product(weights)
    truth = norms[:, None] * direction / direction.norm(dim=1, keepdim=True)
    found = merged(base, adapter(tmp_path / "a", whole, use_dora=True))
    assert torch.allclose(found, truth, atol=1e-5)


@pytest.mark.parametrize(
    "change",
    [
        lambda name: name.replace(".weight", ".default.weight"),
        lambda name: name.removeprefix("base_model.model."),
        lambda name: f"module.{name}",
        lambda name: name.replace(".layers.0.", ".layers.0._orig_mod."),
    ],
)
def test_other_spellings_of_the_names(base, tmp_path, change):
    weights = {change(name): value for name, value in pair(NAMES + Q).items()}
    found = merged(base, adapter(tmp_path / "a", weights))
    assert torch.allclose(found, weight(base) + ALPHA / RANK * product(weights), atol=1e-6)


@pytest.mark.parametrize(
    "name", [f"{NAMES}{Q}.weight", f"{NAMES}{Q}.modules_to_save.default.weight"]
)
def test_a_module_that_was_trained_as_a_whole_takes_the_place(base, tmp_path, name):
    new = noise(48, 48)
    assert torch.equal(merged(base, adapter(tmp_path / "a", {name: new})), new)


def test_an_embedding_that_was_saved_and_not_trained_changes_nothing(tied, tmp_path):
    table = read(tied).tensors["embed_tokens.weight"]
    saved = {f"base_model.model.{name}.weight": table for name in ("model.embed_tokens", "lm_head")}
    saved = {name: value.clone() for name, value in saved.items()}
    assert merged(tied, adapter(tmp_path / "a", pair(NAMES + Q) | saved)) is not None


# What is refused.


def refusal(base: Path, place: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        read(base, adapter=place)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'; only LORA"),
        ({"peft_type": None}, "peft_type is None"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4'"),
        ({"init_lora_weights": "olora"}, "init_lora_weights is 'olora'"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights is 'loftq'"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens is [1, 2]"),
        ({"layer_replication": [[0, 1]]}, "layer_replication is [[0, 1]]"),
        ({"target_parameters": ["x"]}, "target_parameters is ['x']"),
        ({"lora_bias": True}, "lora_bias is True"),
        ({"of_the_future": 3}, "of_the_future is 3, which is not supported"),
        ({"r": 3}, "with rank 3, the base model asks for [3, 48] and [48, 3]"),
        ({"r": 0}, "is 0, not a positive number"),
        ({"lora_alpha": "8"}, "lora_alpha of layers.0.self_attn.q_proj is '8'"),
        ({"alpha_pattern": {"(": 8}}, "alpha_pattern: "),
        ({"alpha_pattern": [1]}, "alpha_pattern is not an object"),
        ({"use_dora": True}, "use_dora and the tensors of"),
    ],
)
def test_a_config_that_cannot_be_followed_is_refused_by_name(base, tmp_path, config, words):
    message = refusal(base, adapter(tmp_path / "a", **config))
    assert words in message
    assert str(tmp_path / "a") in message


@pytest.mark.parametrize("value", [None, False, [], {}, 0])
def test_fields_that_are_off_do_not_matter(base, tmp_path, value):
    known = {"init_lora_weights": "gaussian", "target_modules": "all-linear"}
    assert merged(base, adapter(tmp_path / "a", of_the_future=value, **known)) is not None


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ({}, "holds no weights"),
        ({f"{NAMES}{Q}.lora_A.weight": noise(RANK, 48)}, "lacks lora_B of layers.0.self_attn"),
        (pair(f"{NAMES}self_attn.w_proj"), "layers.0.self_attn.w_proj is no module of the base"),
        (pair(f"{NAMES}{Q}", inputs=40), "have shapes [2, 40] and [48, 2]"),
        ({f"{NAMES}{Q}.weight": noise(48, 40)}, "has shape [48, 40], in the base model it is [48"),
        ({f"{NAMES}nothing.weight": noise(4)}, "nothing.weight has no place in the base"),
        ({f"{NAMES}{Q}.lora_A.weight": noise(RANK, 48) / 0}, "not finite"),
        (
            {
                name.replace(".weight", f".{each}.weight"): value.clone()
                for each in ("one", "two")
                for name, value in pair(NAMES + Q).items()
            },
            "holds more than one adapter",
        ),
    ],
)
def test_weights_that_do_not_fit_are_named(base, tmp_path, weights, words):
    assert words in refusal(base, adapter(tmp_path / "a", weights))


@pytest.mark.parametrize(
    "weights",
    [
        {
            "base_model.model.model.embed_tokens.lora_embedding_A": noise(RANK, 97),
            "base_model.model.model.embed_tokens.lora_embedding_B": noise(48, RANK),
        },
        pair("base_model.model.lm_head", outputs=97),
        {"base_model.model.lm_head.weight": noise(97, 48)},
        {"base_model.model.model.embed_tokens.weight": noise(97, 48)},
    ],
)
def test_one_half_of_a_tied_embedding_is_refused(tied, base, tmp_path, weights):
    place = adapter(tmp_path / "a", weights)
    assert "tie_word_embeddings" in refusal(tied, place)
    # Where they are not tied, it is merged.
    assert len(read(base, adapter=place).tensors) == len(read(base).tensors)


def test_a_pickled_adapter_is_never_read(base, tmp_path):
    place = adapter(tmp_path / "a")
    (place / "adapter_model.safetensors").rename(place / "adapter_model.bin")
    assert "pickled adapter only" in refusal(base, place)


def test_an_adapter_without_weights_or_config(base, tmp_path):
    place = adapter(tmp_path / "a")
    (place / "adapter_model.safetensors").unlink()
    assert "has no adapter_model.safetensors" in refusal(base, place)
    (place / "adapter_config.json").unlink()
    assert "is not an adapter: it has no adapter_config.json" in refusal(base, place)


@pytest.mark.parametrize(("told", "named"), [("some/base", "some/base"), (None, "its base model")])
def test_an_adapter_in_the_place_of_a_model_is_named(tmp_path, told, named):
    place = adapter(tmp_path / "a", base_model_name_or_path=told)
    with pytest.raises(CheckpointError) as caught:
        find(place)
    assert str(caught.value) == (
        f"{place} is an adapter, not a whole model: export {named}, and name {place} as its adapter"
    )


def test_an_adapter_beside_a_model_is_not_passed_over(tmp_path):
    place = checkpoints.make(tmp_path / "c", num_hidden_layers=1)
    adapter(place)
    with pytest.raises(CheckpointError, match="holds an adapter beside its weights"):
        find(place)
    source = find(place, adapter=place)
    assert source.adapter is not None


def test_a_bundle_as_reference_takes_no_adapter(tmp_path):
    (tmp_path / "doge_onnx.json").write_text("{}")
    with pytest.raises(InputError, match="only a checkpoint as reference takes an adapter"):
        doge_onnx.evaluate(tmp_path, adapter="a")


# As a whole.


@pytest.mark.slow
def test_an_export_merges_and_is_compared_with_the_merged_model(tied, tmp_path):
    place = adapter(tmp_path / "a")
    report = doge_onnx.export(tied, tmp_path / "bundle", adapter=place)
    assert report.parity is not None
    assert report.parity.reference.startswith("transformers")
    assert report.manifest.source == {
        "model": "tied",
        "revision": None,
        "adapter": "a",
        "adapter_revision": None,
    }
    again = doge_onnx.verify(report.path, tied, adapter=place)
    assert again.passed
    # Without it, the bundle is of another model.
    assert not doge_onnx.verify(report.path, tied).passed


# Base, and arguments of LoraConfig.
OF_PEFT: dict[str, tuple[str, dict[str, Any]]] = {
    "some": ("tied", {"target_modules": ["q_proj", "v_proj"], "lora_alpha": 12}),
    "linear": ("untied", {"target_modules": "all-linear", "use_rslora": True, "r": 3}),
    "patterns": (
        "untied",
        {
            "target_modules": r".*\.(q_proj|down_proj|o_proj|dt_proj)",
            "rank_pattern": {r"layers\.1\..*q_proj": 2, "down_proj": 6},
            "alpha_pattern": {"q_proj": 3, "model.layers.0.mlp.down_proj": 32},
        },
    ),
    "embedding": ("untied", {"target_modules": ["embed_tokens", "lm_head", "k_proj"]}),
    "saved": (
        "untied",
        {
            "target_modules": ["q_proj"],
            "modules_to_save": ["lm_head", "embed_tokens", "input_layernorm"],
        },
    ),
    "dora": ("untied", {"target_modules": ["q_proj", "up_proj"], "use_dora": True}),
    "bias": ("untied", {"target_modules": ["q_proj"], "bias": "lora_only"}),
    "biases": ("untied", {"target_modules": ["q_proj"], "bias": "all"}),
    "layers": ("tied", {"target_modules": ["q_proj"], "layers_to_transform": [1]}),
    "experts": (
        "experts",
        {"target_modules": ["router_gate", "down_embed", "up_embed", "gate_proj"]},
    ),
}


@pytest.mark.external
def test_all_is_as_peft_merges_it(tmp_path):
    bases = {
        "tied": {"num_hidden_layers": 2},
        "untied": {"num_hidden_layers": 2, "tie_word_embeddings": False, "attention_bias": True},
        "experts": {"num_hidden_layers": 1, "is_moe": True, "num_experts": 16}
        | {"num_experts_per_tok": 4},
    }
    made = {name: checkpoints.make(tmp_path / name, **config) for name, config in bases.items()}
    asked = [
        {"base": str(made[base]), "options": {"r": 4, **options}, "directory": str(tmp_path / name)}
        for name, (base, options) in OF_PEFT.items()
    ]
    python = environment(ROOT / "tests" / "requirements" / "peft.txt")
    worker = Path(__file__).parent / "peft_worker.py"
    subprocess.run([python, worker, json.dumps(asked)], check=True, capture_output=True)
    for name, (base, _) in OF_PEFT.items():
        theirs = load_file(tmp_path / name / "merged.safetensors")
        ours = read(made[base], adapter=tmp_path / name).tensors
        before = read(made[base]).tensors
        assert any(not torch.equal(ours[each], before[each]) for each in ours), name
        for each, value in ours.items():
            prefix = "" if each.startswith("lm_head") else "model."
            assert torch.allclose(value, theirs[prefix + each], atol=1e-6), (name, each)
