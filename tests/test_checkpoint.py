"""Reading checkpoints: every dtype and layout, and broken ones of every kind."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import checkpoints
import pytest
import torch
from safetensors.torch import load_file, save_file

from doge_onnx.bundle import MANIFEST_NAME
from doge_onnx.errors import CheckpointError, ConfigError
from doge_onnx.export.checkpoint import read

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def directory(original, tmp_path) -> Path:
    """A good checkpoint to break."""
    return Path(shutil.copytree(original, tmp_path / "checkpoint"))


@pytest.fixture
def sharded(sharded_original, tmp_path) -> Path:
    return Path(shutil.copytree(sharded_original, tmp_path / "sharded"))


def edit(directory: Path, change) -> None:
    """Let `change` alter the dict of a checkpoint's tensors, and save it again."""
    tensors = load_file(directory / WEIGHTS)
    change(tensors)
    save_file(tensors, directory / WEIGHTS)


def refusal(directory: Path, error: type[Exception] = CheckpointError) -> str:
    with pytest.raises(error) as caught:
        read(directory)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# What is read.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tensors_arrive_as_float32_unchanged(dtype, tmp_path):
    checkpoint = read(checkpoints.make(tmp_path, dtype=dtype, **checkpoints.SHAPES["biases"]))
    saved = load_file(tmp_path / WEIGHTS)
    assert {tensor.dtype for tensor in saved.values()} == {dtype}
    assert {name.removeprefix("model.") for name in saved} == set(checkpoint.tensors)
    for name, tensor in saved.items():
        ours = checkpoint.tensors[name.removeprefix("model.")]
        assert ours.dtype == torch.float32
        assert torch.equal(ours, tensor.float())


def test_dtypes_may_be_mixed(directory):
    edit(directory, lambda t: t.update({"model.norm.weight": t["model.norm.weight"].bfloat16()}))
    assert read(directory).tensors["norm.weight"].dtype == torch.float32


def test_a_sharded_checkpoint_is_the_same(original, sharded):
    assert len(list(sharded.glob("*.safetensors"))) > 2
    whole, parts = read(original), read(sharded)
    assert whole.tensors.keys() == parts.tensors.keys()
    for name, tensor in whole.tensors.items():
        assert torch.equal(parts.tensors[name], tensor)


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_head_is_counted_once(tmp_path, tied):
    checkpoint = read(checkpoints.make(tmp_path, tie_word_embeddings=tied))
    assert checkpoint.parameters == checkpoints.reference(tmp_path).num_parameters()
    assert ("lm_head.weight" in checkpoint.tensors) != tied


def test_a_tied_head_that_was_saved_all_the_same_is_left_out(directory, original):
    head = load_file(directory / WEIGHTS)["model.embed_tokens.weight"].clone()
    edit(directory, lambda tensors: tensors.update({"lm_head.weight": head}))
    assert read(directory).tensors.keys() == read(original).tensors.keys()


def test_names_without_the_model_prefix_are_the_same(directory, original):
    def strip(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)

    edit(directory, strip)
    assert read(directory).tensors.keys() == read(original).tensors.keys()


def test_saved_rotary_buffers_are_ignored(directory, original):
    edit(directory, lambda t: t.update({"model.rotary_emb.inv_freq": torch.ones(4)}))
    assert read(directory).tensors.keys() == read(original).tensors.keys()


def test_progress_names_the_files(sharded):
    said: list[str] = []
    read(sharded, said.append)
    for path in sharded.glob("*.safetensors"):
        assert any(path.name in words for words in said)


# Files that are missing or broken.


class _Evil:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return (Path.touch, (self.marker,))


def test_pickled_weights_are_never_read(directory, tmp_path):
    marker = tmp_path / "code was run"
    (directory / WEIGHTS).unlink()
    (directory / "pytorch_model.bin").write_bytes(pickle.dumps(_Evil(marker)))
    assert "pickled weights only" in refusal(directory)
    assert not marker.exists()
    # It really is a trap.
    pickle.loads((directory / "pytorch_model.bin").read_bytes())
    assert marker.exists()


def test_a_bundle_is_no_checkpoint(directory):
    (directory / WEIGHTS).unlink()
    (directory / MANIFEST_NAME).write_text("{}")
    assert "is a bundle, exported already" in refusal(directory)


def test_a_checkpoint_without_weights(directory):
    (directory / WEIGHTS).unlink()
    message = refusal(directory)
    assert WEIGHTS in message
    assert INDEX in message


def test_a_checkpoint_without_config(directory):
    (directory / "config.json").unlink()
    assert "it has no config.json" in refusal(directory, ConfigError)


def test_another_models_checkpoint(directory):
    checkpoints.edit_config(directory, model_type="llama", architectures=["LlamaForCausalLM"])
    assert "only Doge" in refusal(directory, ConfigError)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:5],
        lambda data: data[:200],
        lambda data: data[:-1],
        lambda data: data[: len(data) // 2],
        lambda data: data + b"\0",
        lambda data: b"\xff" * 8 + data[8:],
        lambda data: data[:8] + b"x" + data[9:],
        lambda data: b"version https://git-lfs.github.com/spec/v1\n",
        lambda data: pickle.dumps({"a": 1}) * 100,
    ],
    ids=[
        "empty",
        "no header length",
        "cut in the header",
        "a byte short",
        "half",
        "a byte long",
        "absurd header length",
        "header is not JSON",
        "pointer of git-lfs",
        "pickle by another name",
    ],
)
def test_a_damaged_weight_file_is_named(directory, damage):
    path = directory / WEIGHTS
    path.write_bytes(damage(path.read_bytes()))
    message = refusal(directory)
    assert str(path) in message
    assert "truncated or corrupted" in message


def test_weights_that_cannot_be_read(directory):
    (directory / WEIGHTS).unlink()
    (directory / WEIGHTS).mkdir()
    assert str(directory / WEIGHTS) in refusal(directory)


def test_a_missing_shard_is_named(sharded):
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.unlink()
    assert f"lacks {shard.name}" in refusal(sharded)


def test_a_damaged_shard_is_named(sharded):
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-10])
    assert str(shard) in refusal(sharded)


@pytest.mark.parametrize(
    "name",
    [
        "../outside.safetensors",
        "/tmp/outside.safetensors",
        "sub/model.safetensors",
        "sub\\model.safetensors",
        "model.bin",
        "",
        "..",
        7,
        None,
    ],
)
def test_an_index_names_safetensors_files_beside_it_only(sharded, name):
    outside = sharded.parent / "outside.safetensors"
    shutil.copy(sorted(sharded.glob("*.safetensors"))[0], outside)
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = name
    (sharded / INDEX).write_text(json.dumps(index))
    message = refusal(sharded)
    assert INDEX in message
    assert repr(name) in message


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": ["b"]}}', "\x00"],
)
def test_a_senseless_index_is_refused(sharded, content):
    (sharded / INDEX).write_text(content)
    assert str(sharded / INDEX) in refusal(sharded)


def test_an_index_of_nothing(sharded):
    (sharded / INDEX).write_text('{"weight_map": {}}')
    assert "lacks the tensor embed_tokens.weight" in refusal(sharded)


# Tensors that are wrong.

Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


def test_a_wrong_shape_is_named_with_both_shapes(directory):
    edit(directory, lambda tensors: tensors.update({Q_PROJ: torch.zeros(48, 40)}))
    message = refusal(directory)
    assert Q_PROJ in message
    assert "[48, 40]" in message
    assert "[48, 48]" in message


def test_a_config_that_contradicts_the_tensors(directory):
    checkpoints.edit_config(directory, intermediate_size=81)
    message = refusal(directory)
    assert "mlp.gate_proj.weight" in message
    assert "[80, 48]" in message
    assert "[81, 48]" in message


def test_a_missing_tensor_is_named(directory):
    edit(directory, lambda tensors: tensors.pop(Q_PROJ))
    assert "lacks the tensor layers.1.self_attn.q_proj.weight" in refusal(directory)


def test_an_untied_head_must_be_there(directory):
    checkpoints.edit_config(directory, tie_word_embeddings=False)
    assert "lacks the tensor lm_head.weight" in refusal(directory)


def test_a_bias_that_the_config_promises_must_be_there(directory):
    checkpoints.edit_config(directory, mlp_bias=True)
    assert "lacks the tensor layers.0.mlp.gate_proj.bias" in refusal(directory)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.2.self_attn.q_proj.weight",
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.0.self_attn.surprise",
        "transformer.h.0.attn.c_attn.weight",
    ],
)
def test_a_tensor_without_a_place_is_named(directory, name):
    edit(directory, lambda tensors: tensors.update({name: torch.zeros(48)}))
    message = refusal(directory)
    assert f"tensor {name} has no place" in message


def test_one_weight_under_two_names(directory):
    edit(directory, lambda tensors: tensors.update({"norm.weight": torch.ones(48)}))
    message = refusal(directory)
    assert "model.norm.weight" in message
    assert "the same weight" in message


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_that_are_not_finite_are_refused(directory, value, dtype):
    def spoil(tensors):
        tensors[Q_PROJ] = tensors[Q_PROJ].to(dtype)
        tensors[Q_PROJ][47, 3] = value

    edit(directory, spoil)
    message = refusal(directory)
    assert f"{directory / WEIGHTS}: tensor {Q_PROJ}" in message
    assert "not finite" in message


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_other_element_types_are_refused(directory, dtype):
    edit(directory, lambda tensors: tensors.update({Q_PROJ: tensors[Q_PROJ].to(dtype)}))
    message = refusal(directory)
    assert f"tensor {Q_PROJ} has element type" in message
    assert "BF16, F16, F32, F64" in message


def test_double_precision_is_read_as_transformers_reads_it(directory):
    edit(directory, lambda tensors: tensors.update({n: t.double() for n, t in tensors.items()}))
    found = read(directory).tensors[Q_PROJ.removeprefix("model.")]
    expected = checkpoints.reference(directory).state_dict()[Q_PROJ]
    assert torch.equal(found, expected)


def test_the_element_type_of_a_tensor_that_is_not_read_does_not_matter(directory):
    table = {"model.rotary_emb.inv_freq": torch.arange(4)}
    edit(directory, lambda tensors: tensors.update(table))
    read(directory)


def test_a_tensor_in_two_shards_is_refused(sharded):
    first, *_, last = sorted(sharded.glob("model-*.safetensors"))
    name, tensor = next(iter(load_file(first).items()))
    save_file(load_file(last) | {name: tensor}, last)
    assert f"{last}: tensor {name} is in {first.name} too" in refusal(sharded)


def test_a_billion_layers_fail_at_the_first_that_is_missing(directory):
    checkpoints.edit_config(directory, num_hidden_layers=10**9)
    assert "lacks the tensor layers.2." in refusal(directory)


@pytest.mark.parametrize("equal", [True, False])
def test_a_head_beside_a_tied_embedding_must_equal_it(equal, tmp_path):
    directory = checkpoints.make(tmp_path / "c", num_hidden_layers=1, tie_word_embeddings=True)

    def add_head(tensors):
        embedding = tensors["model.embed_tokens.weight"]
        tensors["lm_head.weight"] = embedding.clone() if equal else embedding + 1

    edit(directory, add_head)
    if equal:
        assert "lm_head.weight" not in read(directory).tensors
    else:
        assert "lm_head.weight differs from the embedding" in refusal(directory)
