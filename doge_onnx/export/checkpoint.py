"""Find a checkpoint, on disk or on the Hub, and read its tensors under canonical names.

Knows both generations of checkpoints (transformers-native and the older remote-code
layout), and tells them apart by their tensors, never by a version string. Reads only
safetensors: nothing of a checkpoint is executed or unpickled. Does not know what the tensors
are used for.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from torch import Tensor

from doge_onnx import text_files
from doge_onnx.bundle import MANIFEST_NAME, is_bundle
from doge_onnx.errors import CheckpointError
from doge_onnx.export import adapter as adapters
from doge_onnx.export import tokenizer_conversion, tokenizer_files
from doge_onnx.export.model_config import CONFIG_NAME, DEFAULT_WINDOW, DogeConfig
from doge_onnx.export.tensor_files import Header, read_header, read_tensors
from doge_onnx.export.tensor_names import canonical_name, unwrapped
from doge_onnx.hub_errors import fetching

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
# Read for its license; a bundle has a card of its own.
CARD_NAME = "README.md"
# What is fetched from the Hub beside the weights.
_SIDE_FILES = (
    CONFIG_NAME,
    "generation_config.json",
    *tokenizer_files.NAMES,
    *tokenizer_conversion.OLDER_FILES,
    adapters.CONFIG_NAME,
    CARD_NAME,
)

# Parts of names that only a model with an adapter has.
_UNMERGED = re.compile(r"\.(base_layer|lora_[A-Za-z]\w*|modules_to_save|original_module)(\.|$)")
_PICKLES = ("*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True)
class Source:
    """A checkpoint's directory, name and revision.

    Attributes:
        directory: The files.
        model: The Hub id, or the directory's own name.
        revision: The Hub's commit, or None for a local directory.
        adapter: The adapter that is merged into it, or None for none.
    """

    directory: Path
    model: str
    revision: str | None
    adapter: Source | None = None


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's config and tensors.

    Attributes:
        config: The validated config.
        tensors: float32, by canonical name: that of the transformers-native layout without
            the leading "model.". No "lm_head.weight" where it is tied to the embedding.
        gate_heads: Number of heads that have a gate: the key/value heads or, in older
            checkpoints, the query heads.
        qk_norm: Whether queries and keys are normalised; in older checkpoints they are not.
        native_names: Whether the tensors have their transformers-native names.
        as_saved: Whether transformers finds the same tensors in the checkpoint: nothing wraps
            their names, and no adapter was merged.
    """

    config: DogeConfig
    tensors: dict[str, Tensor]
    gate_heads: int
    qk_norm: bool
    native_names: bool
    as_saved: bool = True

    @property
    def is_native(self) -> bool:
        """Whether this is the architecture that transformers calls Doge."""
        own_gates = self.gate_heads == self.config.num_key_value_heads
        known = self.config.generation.in_transformers
        return known and self.native_names and self.qk_norm and own_gates

    def shared(self) -> Checkpoint:
        """The same tensors in a mapping of its own, which a step may empty; nothing is copied."""
        return replace(self, tensors=dict(self.tensors))

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return sum(tensor.numel() for tensor in self.tensors.values())


def find(
    model: str | Path, revision: str | None = None, adapter: str | Path | None = None
) -> Source:
    """Find a checkpoint: a local directory, or else a model of the Hub, fetched if need be.

    Of the Hub's files only the config, the tokenizer, the model card and safetensors are
    fetched, into the Hub's own cache.

    Args:
        model: The directory, or the id.
        revision: Branch, tag or commit of a model on the Hub.
        adapter: An adapter that is merged into it, found in the same way.

    Raises:
        CheckpointError: There is no such directory or model, or it is an adapter itself, or the
            Hub cannot be reached or refuses.
    """
    source = _find(model, revision)
    if adapters.is_adapter(source.directory) and adapter is None:
        if (source.directory / CONFIG_NAME).is_file():
            raise CheckpointError(
                f"{model} holds an adapter beside its weights ({adapters.CONFIG_NAME}): name it as "
                "the adapter to merge it, or move it away"
            )
        base = adapters.base_of(source.directory) or "its base model"
        raise CheckpointError(
            f"{model} is an adapter, not a whole model: export {base}, and name {model} as its "
            "adapter"
        )
    return source if adapter is None else replace(source, adapter=_find(adapter, None))


def _find(model: str | Path, revision: str | None) -> Source:
    if not str(model):
        raise CheckpointError("no model is named: give a directory or the id of one on the Hub")
    path = Path(model)
    if _is_dir(path):
        if revision is not None:
            raise CheckpointError(f"{path} is a directory: only models of the Hub have a revision")
        return Source(path, path.resolve().name, None)
    if not re.fullmatch(r"[\w][\w.-]*(/[\w][\w.-]*)?", str(model)) or path.is_file():
        raise CheckpointError(f"{model} is neither a directory nor the id of a model on the Hub")
    with fetching(str(model), revision, CheckpointError):
        snapshot = snapshot_download(
            str(model),
            revision=revision,
            allow_patterns=[*_SIDE_FILES, "*.safetensors", INDEX_NAME, MANIFEST_NAME],
            # Intermediate training states sit in subdirectories, with weights of their own.
            ignore_patterns=["*/*"],
        )
    return Source(Path(snapshot), str(model), Path(snapshot).name)


def _is_dir(path: Path) -> bool:
    try:
        return path.is_dir()
    # The system does not accept the name, because of its length or its characters.
    except (OSError, ValueError):
        return False


def read_source(
    source: Source,
    progress: Callable[[str], None] = lambda _: None,
    ignore: Collection[str] = (),
) -> Checkpoint:
    """Read what `find` found, with its adapter merged; see `read`."""
    adapter = None if source.adapter is None else source.adapter.directory
    return read(source.directory, progress, ignore, adapter)


def read(
    directory: Path,
    progress: Callable[[str], None] = lambda _: None,
    ignore: Collection[str] = (),
    adapter: Path | None = None,
) -> Checkpoint:
    """Read a checkpoint's config and all its tensors, checked for name, shape and content.

    Args:
        directory: The checkpoint.
        progress: Called with a few words when a step begins.
        ignore: Fields of the config to do without; see `DogeConfig.from_file`.
        adapter: Directory of an adapter to merge into it.

    Raises:
        ConfigError: The config makes no sense, or is not a Doge model's.
        CheckpointError: There are no safetensors, or a file is missing, truncated or
            corrupted, or a tensor is missing, unknown, of the wrong shape or not finite; or the
            adapter cannot be read or does not fit.
    """
    config = DogeConfig.from_file(directory / CONFIG_NAME, ignore)
    headers: dict[str, Header] = {}
    for path in _weight_files(directory):
        for name, header in read_header(path).items():
            if name in headers:
                raise CheckpointError(f"{path}: tensor {name} is in {headers[name].path.name} too")
            headers[name] = header
    _refuse_retrieval_moe(headers)
    _refuse_unmerged_adapter(headers)
    entries: dict[str, Header] = {}
    for name, header in headers.items():
        canonical = canonical_name(name)
        if canonical is None:
            continue
        if canonical in entries:
            raise CheckpointError(
                f"{header.path}: tensors {entries[canonical].name} and {name} are the same weight"
            )
        entries[canonical] = header

    head = entries.pop("lm_head.weight", None) if config.tie_word_embeddings else None
    qk_norm = any(name.endswith(".self_attn.q_norm.weight") for name in entries)
    gates = entries.get("layers.0.self_attn.A")
    gate_heads = config.num_key_value_heads
    if gates is not None and gates.shape == (config.num_attention_heads,):
        gate_heads = config.num_attention_heads
    _check_shapes(entries, _expected_shapes(config, gate_heads, qk_norm), directory)

    tensors = {}
    by_file: dict[Path, list[str]] = {}
    for canonical, header in entries.items():
        by_file.setdefault(header.path, []).append(canonical)
    for path, names in by_file.items():
        progress(f"reading {path.name}")
        tensors.update(read_tensors(path, {name: entries[name].name for name in names}))
    if head is not None:
        copy = read_tensors(head.path, {"lm_head.weight": head.name})["lm_head.weight"]
        if not torch.equal(copy, tensors["embed_tokens.weight"]):
            raise CheckpointError(
                f"{head.path}: tensor {head.name} differs from the embedding, but the config says "
                "that they are tied (tie_word_embeddings)"
            )
    native_names = all(unwrapped(header.name) == name for name, header in entries.items())
    as_saved = adapter is None and all(
        unwrapped(name) == name.removeprefix("model.") for name in headers
    )
    if not config.generation.exp_gates and not (
        native_names and qk_norm and gate_heads == config.num_key_value_heads
    ):
        raise CheckpointError(
            f"{directory} has tensors of older Doges, but the window_size in {CONFIG_NAME} is that "
            "of a newer one, which has other gates: it is not known what this model computes"
        )
    if adapter is not None:
        progress("merging the adapter")
        adapters.merge(adapter, tensors, config.tie_word_embeddings)
    if native_names and config.keep_window_size is None:
        # dynamic_mask_ratio was left over from the older layout; transformers ignores it.
        config = replace(config, keep_window_size=DEFAULT_WINDOW)
    return Checkpoint(config, tensors, gate_heads, qk_norm, native_names, as_saved)


def _expected_shapes(
    config: DogeConfig, gate_heads: int, qk_norm: bool
) -> Iterator[tuple[str, list[int]]]:
    """Canonical name and shape of every tensor of a checkpoint.

    An iterator, so that a config that asks for a billion layers fails at the first missing tensor.
    """
    hidden, middle, dim = config.hidden_size, config.intermediate_size, config.head_dim
    queries, keys = config.num_attention_heads * dim, config.num_key_value_heads * dim
    yield "embed_tokens.weight", [config.vocab_size, hidden]
    yield "norm.weight", [hidden]
    if not config.tie_word_embeddings:
        yield "lm_head.weight", [config.vocab_size, hidden]
    linears = [
        ("self_attn.q_proj", queries, hidden, config.attention_bias),
        ("self_attn.k_proj", keys, hidden, config.attention_bias),
        ("self_attn.v_proj", keys, hidden, config.attention_bias),
        ("self_attn.dt_proj", gate_heads, keys, config.attention_bias),
        ("self_attn.o_proj", hidden, queries, config.attention_bias),
        ("mlp.gate_proj", middle, hidden, config.mlp_bias),
        ("mlp.up_proj", middle, hidden, config.mlp_bias),
        ("mlp.down_proj", hidden, middle, config.mlp_bias),
    ]
    for layer in range(config.num_hidden_layers):
        prefix = f"layers.{layer}."
        for norm in ("input_layernorm.weight", "post_attention_layernorm.weight"):
            yield prefix + norm, [hidden]
        for residual in ("input_residual", "post_attention_residual"):
            yield prefix + residual, [hidden]
        for name, outputs, inputs, bias in linears:
            yield f"{prefix}{name}.weight", [outputs, inputs]
            if bias:
                yield f"{prefix}{name}.bias", [outputs]
        yield prefix + "self_attn.A", [gate_heads]
        if config.is_moe:
            yield prefix + "mlp.router_gate.weight", [2 * math.isqrt(config.num_experts), hidden]
            yield prefix + "mlp.down_embed.weight", [config.num_experts, hidden]
            yield prefix + "mlp.up_embed.weight", [config.num_experts, hidden]
        if qk_norm:
            yield prefix + "self_attn.q_norm.weight", [dim]
            yield prefix + "self_attn.k_norm.weight", [dim]


def _weight_files(directory: Path) -> list[Path]:
    if (directory / WEIGHTS_NAME).exists():
        return [directory / WEIGHTS_NAME]
    index = directory / INDEX_NAME
    if not index.exists():
        if any(found for pattern in _PICKLES for found in directory.glob(pattern)):
            raise CheckpointError(
                f"{directory} has pickled weights only, which can run code when they are read; "
                "convert them to safetensors first"
            )
        if is_bundle(directory):
            raise CheckpointError(
                f"{directory} is a bundle, exported already: run it as it is, or export the "
                "checkpoint that it was made from"
            )
        raise CheckpointError(
            f"{directory} has no safetensors, neither {WEIGHTS_NAME} nor {INDEX_NAME}; pickled "
            "weights are not read, nor fetched from the Hub"
        )
    try:
        names = set(text_files.read_json(index)["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{index} is not a valid index of safetensors files") from None
    for name in names:
        if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+\.safetensors", name):
            raise CheckpointError(f"{index} names {name!r}, which is not a safetensors file name")
    missing = sorted(name for name in names if not (directory / name).is_file())
    if missing:
        raise CheckpointError(f"{directory} lacks {missing[0]}, which {index.name} names")
    return [directory / name for name in sorted(names)]


def _renamed(name: str, entries: dict[str, Header]) -> str:
    """What to do about a missing tensor that is there with an unknown prefix; "" if it is not."""
    for found, header in entries.items():
        if found.endswith(f".{name}"):
            prefix = header.name.removesuffix(name)
            return f", but has {header.name}: take {prefix!r} off the names of its tensors"
    return ""


def _refuse_retrieval_moe(headers: dict[str, Header]) -> None:
    for name, header in headers.items():
        if re.search(r"\.(feed_forward|mlp)\.(queries|queries_proj|keys)(\.|$)", name):
            raise CheckpointError(
                f"{header.path}: tensor {name} is of the first retrieval-style mixture of experts, "
                "which is not supported; later ones route with router_gate"
            )


def _refuse_unmerged_adapter(headers: dict[str, Header]) -> None:
    for name, header in headers.items():
        if _UNMERGED.search(name):
            raise CheckpointError(
                f"{header.path}: tensor {name} is of a model with an adapter that was not merged; "
                "save the adapter on its own and name it beside its base, or merge it with PEFT"
            )


def _check_shapes(
    entries: dict[str, Header], expected: Iterator[tuple[str, list[int]]], directory: Path
) -> None:
    known = set()
    for name, shape in expected:
        known.add(name)
        if name not in entries:
            raise CheckpointError(
                f"{directory} lacks the tensor {name} of shape {shape}{_renamed(name, entries)}"
            )
        header = entries[name]
        if list(header.shape) != shape:
            raise CheckpointError(
                f"{header.path}: tensor {header.name} has shape {list(header.shape)}, but the "
                f"config asks for {shape}"
            )
    unknown = [entry for name, entry in entries.items() if name not in known]
    if unknown:
        raise CheckpointError(
            f"{unknown[0].path}: tensor {unknown[0].name} has no place in the model that "
            f"{CONFIG_NAME} describes"
        )
