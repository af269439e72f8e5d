"""Checkpoints whose tensors have the names of what wrapped the model as it was trained."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import checkpoints
import older_checkpoints
import pytest
import torch
from safetensors.torch import load_file, save_file

import doge_onnx
from doge_onnx.errors import CheckpointError
from doge_onnx.export.checkpoint import read

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
WRAPPED: dict[str, Callable[[str], str]] = {
    "torch.compile": lambda name: f"_orig_mod.{name}",
    "data parallel": lambda name: f"module.{name}",
    "both": lambda name: f"module._orig_mod.{name}",
    "both, the other way": lambda name: f"_orig_mod.module.{name}",
    "compiled layers": lambda name: name.replace(".self_attn.", "._orig_mod.self_attn."),
    "PEFT": lambda name: f"base_model.model.{name}",
    "FSDP": lambda name: f"_fsdp_wrapped_module.{name}".replace(
        ".mlp.", "._checkpoint_wrapped_module.mlp."
    ),
    "Lightning Fabric": lambda name: f"_forward_module.{name}",
    "FairScale": lambda name: f"_fpw_module.{name}",
    "a trainer": lambda name: f"model.{name}",
}


def rename(path: Path, change: Callable[[str], str]) -> None:
    """Give the tensors of a file other names."""
    tensors = {change(name): value for name, value in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("change", WRAPPED.values(), ids=WRAPPED)
def test_known_prefixes_are_taken_off(original, tmp_path, change):
    directory = Path(shutil.copytree(original, tmp_path / "c"))
    rename(directory / WEIGHTS, change)
    found, truth = read(directory), read(original)
    assert found.tensors.keys() == truth.tensors.keys()
    assert all(torch.equal(found.tensors[name], value) for name, value in truth.tensors.items())
    assert found.is_native


def test_an_unknown_prefix_is_named(original, tmp_path):
    directory = Path(shutil.copytree(original, tmp_path / "c"))
    rename(directory / WEIGHTS, lambda name: f"student.{name}")
    with pytest.raises(CheckpointError, match=r"take 'student\.model\.' off the names"):
        read(directory)


@pytest.mark.parametrize("change", [WRAPPED["both"], WRAPPED["PEFT"]])
def test_also_in_several_files(sharded_original, tmp_path, change):
    directory = Path(shutil.copytree(sharded_original, tmp_path / "c"))
    for path in directory.glob("*.safetensors"):
        rename(path, change)
    index = json.loads((directory / INDEX).read_text())
    index["weight_map"] = {change(name): file for name, file in index["weight_map"].items()}
    (directory / INDEX).write_text(json.dumps(index))
    assert read(directory).tensors.keys() == read(sharded_original).tensors.keys()


def test_also_in_the_older_layout(tmp_path):
    plain, wrapped = tmp_path / "plain", tmp_path / "wrapped"
    older_checkpoints.make(plain, num_hidden_layers=1)
    shutil.copytree(plain, wrapped)
    rename(wrapped / WEIGHTS, WRAPPED["both"])
    found, truth = read(wrapped), read(plain)
    assert found.tensors.keys() == truth.tensors.keys()
    assert (found.native_names, found.gate_heads) == (truth.native_names, truth.gate_heads)


def test_two_tensors_that_become_one_are_refused(original, tmp_path):
    directory = Path(shutil.copytree(original, tmp_path / "c"))
    tensors = load_file(directory / WEIGHTS)
    tensors["_orig_mod.model.norm.weight"] = tensors["model.norm.weight"].clone()
    save_file(tensors, directory / WEIGHTS)
    with pytest.raises(CheckpointError, match="the same weight") as caught:
        read(directory)
    assert "_orig_mod.model.norm.weight" in str(caught.value)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_proj.base_layer.weight",
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight",
        "model.embed_tokens.lora_embedding_B.default",
        "lm_head.modules_to_save.default.weight",
    ],
)
def test_an_adapter_that_was_not_merged_is_named(original, tmp_path, name):
    directory = Path(shutil.copytree(original, tmp_path / "c"))
    save_file({**load_file(directory / WEIGHTS), name: torch.ones(2, 2)}, directory / WEIGHTS)
    with pytest.raises(CheckpointError) as caught:
        read(directory)
    assert f"tensor {name} is of a model with an adapter that was not merged" in str(caught.value)


@pytest.mark.slow
def test_an_export_is_compared_with_transformers_all_the_same(tmp_path):
    directory = checkpoints.make(tmp_path / "c", num_hidden_layers=1)
    rename(directory / WEIGHTS, WRAPPED["both"])
    report = doge_onnx.export(directory, tmp_path / "bundle")
    assert report.parity is not None
    assert report.parity.passed
    assert report.parity.reference.startswith("transformers")
