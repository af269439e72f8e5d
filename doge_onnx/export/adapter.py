"""Merges a LoRA adapter in the format of PEFT into the tensors of its base model.

Knows that format: adapter_config.json and the names in adapter_model.safetensors. What it does not
know, or what cannot be merged, is refused by name. A merged weight is
`W + s B A` with `s = lora_alpha / r` (`lora_alpha / sqrt(r)` for rsLoRA; Hu et al. 2021,
Kalajdzievski 2023), and with DoRA each of its rows is scaled to the norm that was learned for it
(Liu et al. 2024). All is computed in float32, whatever the adapter was saved in.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from doge_onnx.errors import CheckpointError
from doge_onnx.export.json_files import read_object
from doge_onnx.export.tensor_files import read_header, read_tensors
from doge_onnx.export.tensor_names import canonical_name, unwrapped

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
_PICKLE = "adapter_model.bin"
# Fields that only say how the adapter was trained, or what the names of its tensors say as well.
_OF_TRAINING = {
    *("peft_type", "peft_version", "task_type", "auto_mapping", "inference_mode", "revision"),
    *("base_model_name_or_path", "lora_dropout", "runtime_config", "megatron_core"),
    "qalora_group_size",
    *("target_modules", "exclude_modules", "modules_to_save", "layers_to_transform"),
    *("layers_pattern", "bias", "ensure_weight_tying"),
    # Linear layers of a Doge have their outputs first; PEFT ignores it there, too.
    "fan_in_fan_out",
    # Each goes with a value of init_lora_weights, which is what counts.
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config"),
}
_OF_MERGING = {"r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern"}
# Ways to begin that leave the base as it is. The others subtract from it what they begin with.
_PLAIN_BEGINNINGS = (True, False, None, "gaussian", "orthogonal", "eva")
# A part of an adapter: module, what it is, and the adapter's name where the file keeps it.
_PART = re.compile(
    r"(?P<module>.+)\.(?P<kind>lora_(?:A|B|embedding_A|embedding_B|magnitude_vector))"
    r"(?:\.(?P<adapter>(?!weight$|bias$)[^.]+))?(?:\.(?P<rest>weight|bias))?"
)
_SAVED = re.compile(r"(?P<module>.+)\.modules_to_save\.[^.]+\.(?P<rest>[^.]+)")


def is_adapter(directory: Path) -> bool:
    """Whether a directory holds an adapter."""
    return (directory / CONFIG_NAME).is_file()


def base_of(directory: Path) -> str | None:
    """The model that an adapter says it was trained on, or None if it does not say.

    Raises:
        CheckpointError: Its config cannot be read.
    """
    base = read_object(directory / CONFIG_NAME).get("base_model_name_or_path")
    return base if isinstance(base, str) and base else None


def merge(directory: Path, tensors: dict[str, Tensor], tied: bool) -> None:
    """Merge an adapter into the tensors of its base, which are changed in place.

    Args:
        directory: The adapter.
        tensors: float32, by canonical name.
        tied: Whether the head is the embedding.

    Raises:
        CheckpointError: The adapter cannot be read, does not fit the base, or is of a kind that
            cannot be merged.
    """
    config = _read_config(directory)
    path = _weights(directory)
    # The names of each module's parts in the file, by kind.
    loras: dict[str, dict[str, str]] = {}
    replaced: dict[str, str] = {}
    names = list(read_header(path))
    for name in names:
        bare = unwrapped(name)
        if match := _PART.fullmatch(bare):
            kind = match["kind"].removeprefix("lora_")
            if match["rest"] == "bias":
                raise CheckpointError(f"{path}: {name} is a bias of LoRA, which is not supported")
            parts = loras.setdefault(match["module"], {})
            if kind in parts:
                raise CheckpointError(
                    f"{path} holds more than one adapter: {parts[kind]} and {name}"
                )
            parts[kind] = name
            continue
        if match := _SAVED.fullmatch(bare):
            bare = f"{match['module']}.{match['rest']}"
        canonical = canonical_name(bare.replace(".base_layer.", "."))
        if canonical is None:
            continue
        if canonical in replaced:
            raise CheckpointError(f"{path}: {replaced[canonical]} and {name} are the same weight")
        replaced[canonical] = name
    read = read_tensors(path, {name: name for name in names})
    for canonical, name in replaced.items():
        _replace(path, name, canonical, read[name], tensors, tied)
    for module, found in loras.items():
        matrices = {kind: read[name] for kind, name in found.items()}
        _add(path, module, matrices, config, tensors, tied)
    if not loras and not replaced:
        raise CheckpointError(f"{path} holds no weights")


def _read_config(directory: Path) -> dict[str, Any]:
    path = directory / CONFIG_NAME
    if not path.is_file():
        raise CheckpointError(f"{directory} is not an adapter: it has no {CONFIG_NAME}")
    config = read_object(path)
    kind = config.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(f"{path}: peft_type is {kind!r}; only LORA can be merged")
    beginning = config.get("init_lora_weights")
    if beginning not in _PLAIN_BEGINNINGS:
        raise CheckpointError(
            f"{path}: init_lora_weights is {beginning!r}, which changes the base weights as "
            "training begins; convert it to a plain LoRA with PEFT, or merge it there"
        )
    for name, value in config.items():
        # What is off, empty or absent, changes nothing.
        if name not in _OF_TRAINING | _OF_MERGING | {"init_lora_weights"} and value:
            raise CheckpointError(f"{path}: {name} is {value!r}, which is not supported")
    for name in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(name) or {}, dict):
            raise CheckpointError(f"{path}: {name} is not an object")
    return config


def _weights(directory: Path) -> Path:
    path = directory / WEIGHTS_NAME
    if path.is_file():
        return path
    if (directory / _PICKLE).is_file():
        raise CheckpointError(
            f"{directory} has a pickled adapter only, which can run code when it is read; save it "
            "as safetensors first"
        )
    raise CheckpointError(f"{directory} has no {WEIGHTS_NAME}")


def _replace(
    path: Path, name: str, canonical: str, value: Tensor, tensors: dict[str, Tensor], tied: bool
) -> None:
    """Put a tensor that was trained as a whole in the place of the base's."""
    base = "embed_tokens.weight" if tied and canonical == "lm_head.weight" else canonical
    if base not in tensors:
        raise CheckpointError(f"{path}: tensor {name} has no place in the base model")
    if value.shape != tensors[base].shape:
        raise CheckpointError(
            f"{path}: tensor {name} has shape {list(value.shape)}, in the base model it is "
            f"{list(tensors[base].shape)}; merge an adapter of a resized model with PEFT"
        )
    # PEFT also saves embeddings that were not trained.
    if torch.equal(value, tensors[base]):
        return
    if tied and base == "embed_tokens.weight":
        raise _tied(path, name)
    tensors[base] = value


def _tied(path: Path, name: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: {name} changes the embedding or the head, which are one in the base "
        "(tie_word_embeddings) and would part; merge it with PEFT, which decides for both"
    )


def _add(
    path: Path,
    module: str,
    parts: dict[str, Tensor],
    config: Mapping[str, Any],
    tensors: dict[str, Tensor],
    tied: bool,
) -> None:
    """Add the product of one module's two matrices to its weight."""
    canonical = canonical_name(f"{module}.weight")
    if tied and canonical in ("embed_tokens.weight", "lm_head.weight"):
        raise _tied(path, module)
    if canonical is None or canonical not in tensors:
        raise CheckpointError(f"{path}: {module} is no module of the base model")
    embedding = "embedding_A" in parts or "embedding_B" in parts
    first, second = ("embedding_A", "embedding_B") if embedding else ("A", "B")
    if first not in parts or second not in parts:
        missing = first if first not in parts else second
        raise CheckpointError(f"{path} lacks lora_{missing} of {module}")
    inner, outer = parts[first], parts[second]
    weight = tensors[canonical]
    shape = tuple(weight.shape[::-1]) if embedding else tuple(weight.shape)
    rank = _of_module(config, "rank_pattern", "r", module, path)
    if tuple(inner.shape) != (rank, shape[1]) or tuple(outer.shape) != (shape[0], rank):
        raise CheckpointError(
            f"{path}: lora_{first} and lora_{second} of {module} have shapes "
            f"{list(inner.shape)} and {list(outer.shape)}; with rank {rank}, the base model asks "
            f"for {[rank, shape[1]]} and {[shape[0], rank]}"
        )
    alpha = _of_module(config, "alpha_pattern", "lora_alpha", module, path)
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    change = outer @ inner * scale
    merged = weight + (change.T if embedding else change)
    norms = parts.get("magnitude_vector")
    if bool(config.get("use_dora")) != (norms is not None):
        raise CheckpointError(f"{path}: use_dora and the tensors of {module} contradict each other")
    if norms is not None:
        if embedding or norms.numel() != len(merged):
            raise CheckpointError(f"{path}: DoRA of {module} is not supported in this form")
        merged = merged * (norms.reshape(-1, 1) / merged.norm(dim=1, keepdim=True))
    if not torch.isfinite(merged).all():
        raise CheckpointError(f"{path}: merged into {module}, the values are not finite")
    tensors[canonical] = merged


def _of_module(
    config: Mapping[str, Any], pattern: str, default: str, module: str, path: Path
) -> float:
    """A number that may differ from module to module: the first pattern that fits counts."""
    value = config.get(default, 8)
    # As PEFT knew it: only the head is not inside of "model.".
    name = module if module == "lm_head" else f"model.{module}"
    for key, each in (config.get(pattern) or {}).items():
        try:
            fits = re.fullmatch(rf"(.*\.)?({key})", name)
        except re.error as error:
            raise CheckpointError(f"{path.parent / CONFIG_NAME}: {pattern}: {error}") from None
        if fits:
            value = each
            break
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise CheckpointError(
            f"{path.parent / CONFIG_NAME}: {default} of {module} is {value!r}, not a positive "
            "number"
        )
    return value
