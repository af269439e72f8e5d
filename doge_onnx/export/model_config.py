"""The checkpoint's config.json, read into one validated form.

Knows the fields of all generations of Doges, how the generations are told apart, and which values
make sense. A field that is not read has to be known to have no effect (`config_fields`); any other
is refused, since it could make the file another model's. Does not look at tensors:
`export.checkpoint` tells from them whether there is a q/k norm, and to which heads the gates
belong.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from doge_onnx import text_files
from doge_onnx.errors import ConfigError
from doge_onnx.export.config_fields import (
    ROPE_OF_OTHER_TYPES,
    misplaced_generation,
    not_understood,
)
from doge_onnx.runtime.generation.token_ids import split_by_vocabulary

CONFIG_NAME = "config.json"
DEFAULT_WINDOW = 2048
ROPE_TYPES = ("default", "linear", "dynamic")
# Names on the left as in checkpoints; "swish" is the older name of the same function.
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu": "relu",
}
# Fields of mixtures of experts, also of those that are not supported. Dense checkpoints carry the
# defaults of these, or anything at all.
_MOE_FIELDS = ("num_experts", "num_experts_per_tok", "norm_topk_prob")
_RETRIEVAL_FIELDS = (
    "expert_retrieval_size",
    *(f"num_{name}_{what}" for name in ("cdmoe", "cdmmoe") for what in ("experts", "heads")),
    *(f"num_{name}_experts_per_head" for name in ("cdmoe", "cdmmoe")),
)
_LONGEST_VALUE = 40


@dataclass(frozen=True)
class Generation:
    """What sets one generation of Doges apart from the others, as far as its config tells.

    Attributes:
        name: For messages.
        window_field: The field with the size of the window.
        exp_gates: Whether a gate is exp(A · softplus(W_dt v)), or else A · softplus(W_dt v).
        in_transformers: Whether transformers has this architecture.
    """

    name: str
    window_field: str = "keep_window_size"
    exp_gates: bool = True
    in_transformers: bool = False


MODEL_TYPES = ("doge", "doge2")
DOGE = Generation("Doge", in_transformers=True)
DOGE2 = Generation("Doge2")
# The Doge in the repository of flash-sparse-attention, from October 2025 on.
SPARSE_DOGE = Generation("Doge with window_size", "window_size", exp_gates=False)


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding.

    Attributes:
        kind: One of `ROPE_TYPES`.
        theta: The base of the wavelengths.
        factor: How far "linear" and "dynamic" stretch the context; 1.0 for "default".
    """

    kind: str
    theta: float
    factor: float


@dataclass(frozen=True)
class DogeConfig:
    """A Doge model's shape and constants; the field names are those of transformers.

    `num_experts` and `num_experts_per_tok` are 0 for a dense model. `keep_window_size` is
    None where there is no window. Ids of tokens are those that the vocabulary has. `ignored` has
    the names of the fields that were left out because the caller wanted it, and `notes` a sentence
    for all that was left out because it has no effect.
    """

    generation: Generation

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    hidden_act: str
    rms_norm_eps: float
    max_position_embeddings: int
    rope: RopeConfig
    keep_window_size: int | None
    tie_word_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    num_experts: int
    num_experts_per_tok: int
    norm_topk_prob: bool
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None
    ignored: tuple[str, ...] = ()
    notes: tuple[str, ...] = field(default=(), compare=False)

    @property
    def is_moe(self) -> bool:
        """Whether the MLPs are Cross Domain Mixtures of Experts."""
        return self.num_experts > 0

    @classmethod
    def from_file(cls, path: Path, ignore: Collection[str] = ()) -> DogeConfig:
        """Read a config.json.

        Args:
            path: The file.
            ignore: Names of fields to read the file without, such as "my_field", or
                "rope_parameters.my_field" for one of an object. Need not be there.

        Raises:
            ConfigError: The file cannot be read, is not a Doge model's, or has a field
                that is missing, senseless, not supported or not understood; the field is named.
        """
        try:
            raw = text_files.read_json(path)
        except FileNotFoundError:
            raise ConfigError(f"{path.parent} is not a checkpoint: it has no {path.name}") from None
        # RecursionError: brackets nested deeper than any config's.
        except (OSError, ValueError, RecursionError) as error:
            raise ConfigError(f"cannot read {path}: {error}") from None
        if not isinstance(raw, dict):
            raise ConfigError(f"{path} does not hold a JSON object")
        return cls.from_dict(raw, str(path), ignore)

    @classmethod
    def from_dict(
        cls, raw: Mapping[str, Any], origin: str = CONFIG_NAME, ignore: Collection[str] = ()
    ) -> DogeConfig:
        """Validate a parsed config.json; `origin` is the file that error messages name.

        Raises:
            ConfigError: See `from_file`.
        """
        kept, ignored = _without(raw, ignore)
        return _Reader(kept, origin).config(ignored)


def _without(
    raw: Mapping[str, Any], ignore: Collection[str]
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """A config without the fields of these names, and the names of those that it had."""
    kept, ignored = dict(raw), []
    for name in ignore:
        owner, inner = kept, name
        if name not in kept and "." in name:
            outer, inner = name.split(".", 1)
            if isinstance(kept.get(outer), dict):
                owner = kept[outer] = dict(kept[outer])
        if inner in owner:
            del owner[inner]
            ignored.append(name)
    return kept, tuple(ignored)


class _Reader:
    """Typed access to a parsed config.json, with errors that name the file and the field.

    Notes which fields were read, so that the others can be checked.
    """

    def __init__(self, raw: Mapping[str, Any], origin: str) -> None:
        self._raw = raw
        self._origin = origin
        self._read: set[str] = set()
        self._notes: list[str] = []

    def config(self, ignored: tuple[str, ...]) -> DogeConfig:
        generation = self._generation()
        self._refuse_unsupported()
        heads = self._positive_int("num_attention_heads")
        kv_heads = self._positive_int("num_key_value_heads", default=heads)
        if heads % kv_heads:
            raise self._error(
                "num_key_value_heads", f"does not divide num_attention_heads ({heads})"
            )
        # The remote-code layout has one switch for both biases.
        hidden_bias = self._flag("hidden_bias", default=False)
        is_moe = self._flag("is_moe", default=False)
        self._read.update(_MOE_FIELDS, _RETRIEVAL_FIELDS)
        vocab_size = self._positive_int("vocab_size")
        config = DogeConfig(
            generation=generation,
            vocab_size=vocab_size,
            hidden_size=self._positive_int("hidden_size"),
            intermediate_size=self._positive_int("intermediate_size"),
            num_hidden_layers=self._positive_int("num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=self._head_dim(heads),
            hidden_act=self._activation(),
            rms_norm_eps=self._positive_float("rms_norm_eps", default=1e-6),
            max_position_embeddings=self._trained_length(),
            rope=self._rope(),
            keep_window_size=self._window(generation),
            tie_word_embeddings=self._flag("tie_word_embeddings", default=False),
            attention_bias=self._flag("attention_bias", default=hidden_bias),
            mlp_bias=self._flag("mlp_bias", default=hidden_bias),
            num_experts=self._num_experts() if is_moe else 0,
            num_experts_per_tok=self._num_experts_per_tok() if is_moe else 0,
            norm_topk_prob=self._flag("norm_topk_prob", default=False),
            bos_token_id=self._token_id("bos_token_id", vocab_size),
            eos_token_ids=self._token_ids("eos_token_id", vocab_size),
            pad_token_id=self._token_id("pad_token_id", vocab_size),
        )
        self._refuse_what_is_left()
        if options := misplaced_generation(self._raw):
            self._note(f"sets {', '.join(options)}; only generation_config.json is asked for those")
        if ignored:
            self._note(f"was read without {', '.join(ignored)}, as asked")
        return replace(config, ignored=ignored, notes=tuple(self._notes))

    def _generation(self) -> Generation:
        """Tell the generations apart; docs/export.md has the same as a table."""
        model_type = self._take("model_type")
        has_window_size = self._take("window_size") is not None
        if model_type == "doge2":
            generation = DOGE2
        elif model_type == "doge":
            generation = SPARSE_DOGE if has_window_size else DOGE
        else:
            raise self._error(
                "model_type",
                "is neither 'doge' nor 'doge2': only Doge checkpoints can be exported",
            )
        other = "keep_window_size" if generation is SPARSE_DOGE else "window_size"
        if self._take(other) is not None:
            fields = "window_size and keep_window_size" if model_type == "doge" else other
            raise ConfigError(
                f"{self._origin}: {fields} cannot be in the config of a {model_type}: Doges with "
                "window_size are another generation, whose gates have no exp; name the field that "
                "the model was not trained with as one to ignore"
            )
        return generation

    def _refuse_unsupported(self) -> None:
        for name in ("quantization_config", "compression_config"):
            if self._take(name):
                raise ConfigError(
                    f"{self._origin}: {name} says that the weights are quantized; export the "
                    "checkpoint with floating-point weights that they were made from"
                )
        if self._take("sliding_window") is not None:
            raise self._error("sliding_window", "is not supported: it must be null")
        for name in _RETRIEVAL_FIELDS:
            if self._raw.get("is_moe") and self._raw.get(name) is not None:
                raise self._error(
                    name,
                    "belongs to the first retrieval-style mixture of experts; that is not "
                    "supported, later ones route with router_gate",
                )
        if self._take("dynamic_mask_ratio") not in (0, None):
            raise self._error("dynamic_mask_ratio", "is not supported: it must be 0")

    def _refuse_what_is_left(self) -> None:
        left = not_understood(self._raw, self._read)
        if left:
            shown = ", ".join(f"{name} ({_short(self._raw[name])})" for name in left)
            which = "this field is" if len(left) == 1 else "these fields are"
            raise ConfigError(
                f"{self._origin}: {which} not understood, and may change what the model computes: "
                f"{shown}; if you know better, name what is to be ignored"
            )

    def _window(self, generation: Generation) -> int | None:
        name = generation.window_field
        # The first checkpoints have dynamic_mask_ratio instead; at 0, they drop no key.
        if generation is DOGE and name not in self._raw and "dynamic_mask_ratio" in self._raw:
            return None
        if name in self._raw and self._raw[name] is None:
            raise self._error(name, "may mean no window or the usual one: give a number")
        return self._positive_int(name, default=DEFAULT_WINDOW)

    def _head_dim(self, heads: int) -> int:
        if self._take("head_dim") is not None:
            head_dim = self._positive_int("head_dim")
        else:
            hidden = self._positive_int("hidden_size")
            if hidden % heads:
                raise self._error(
                    "hidden_size", f"is not a multiple of num_attention_heads ({heads})"
                )
            head_dim = hidden // heads
        if head_dim % 2 or head_dim < 4:
            raise ConfigError(
                f"{self._origin}: head_dim is {head_dim}; rotary embeddings need an even one of at "
                "least 4"
            )
        return head_dim

    def _activation(self) -> str:
        name = self._get("hidden_act", "silu")
        if not isinstance(name, str) or name not in ACTIVATIONS:
            raise self._error("hidden_act", f"is none of {', '.join(ACTIVATIONS)}")
        return ACTIVATIONS[name]

    def _rope(self) -> RopeConfig:
        # transformers 5 writes rope_parameters; older versions wrote rope_scaling and rope_theta.
        # If a config has both, transformers takes the older one, unless it is empty.
        older, newer = self._take("rope_scaling"), self._take("rope_parameters")
        name, other = ("rope_scaling", newer) if older else ("rope_parameters", None)
        scaling = older or newer
        if scaling is None:
            scaling = {}
        if not isinstance(scaling, dict):
            raise self._error(name, "is not an object")
        if other and other != scaling:
            self._note("has rope_scaling and rope_parameters, which differ; the former counts")
        reader = _Reader(scaling, f"{self._origin}: {name}")
        rope = reader._rope_fields(name, self)
        self._notes += reader._notes
        return rope

    def _rope_fields(self, name: str, parent: _Reader) -> RopeConfig:
        """Read the fields of `rope_parameters` or `rope_scaling`, which `name` says."""
        kind = self._raw.get("rope_type", self._raw.get("type", "default"))
        if kind not in ROPE_TYPES:
            raise ConfigError(
                f"{parent._origin}: {name}.rope_type {kind!r} is not supported; "
                f"supported are {', '.join(ROPE_TYPES)}"
            )
        # Code of the older layout takes one, transformers the other.
        self._read.add("rope_type")
        if self._take("type") not in (kind, None):
            raise self._error("type", f"is not that of rope_type ({kind!r}): drop one of both")
        if self._take("partial_rotary_factor") not in (1, None):
            raise self._error("partial_rotary_factor", "is not supported: it must be 1.0")
        unused = set(ROPE_OF_OTHER_TYPES)
        factor = 1.0
        if kind == "default":
            unused.add("factor")
        else:
            factor = self._positive_float("factor")
            if factor < 1.0:
                raise self._error("factor", "is less than 1")
        self._read |= unused
        # The configs of released checkpoints have it; there it says nothing new.
        trained = parent._trained_length()
        if self._raw.get("original_max_position_embeddings") == trained:
            unused.discard("original_max_position_embeddings")
        if found := sorted(field for field in unused if self._raw.get(field) is not None):
            self._note(f"has {', '.join(found)}, of which RoPE of the type {kind} makes no use")
        outer = parent._positive_float("rope_theta", default=1e4)
        theta = self._positive_float("rope_theta", default=outer)
        if theta != outer and parent._raw.get("rope_theta") is not None:
            parent._note(f"has a rope_theta of {outer:g}; that of {theta:g} in {name} counts")
        self._refuse_what_is_left()
        return RopeConfig(kind, theta, factor)

    def _trained_length(self) -> int:
        return self._positive_int("max_position_embeddings", default=2048)

    def _num_experts(self) -> int:
        experts = self._positive_int("num_experts")
        if math.isqrt(experts) ** 2 != experts:
            raise self._error("num_experts", "is not a square number")
        return experts

    def _num_experts_per_tok(self) -> int:
        per_token = self._positive_int("num_experts_per_tok")
        if per_token > self._num_experts():
            raise self._error("num_experts_per_tok", f"exceeds num_experts ({self._num_experts()})")
        return per_token

    def _token_ids(self, name: str, vocab_size: int) -> tuple[int, ...]:
        try:
            known, unknown = split_by_vocabulary(self._take(name), vocab_size)
        except ValueError:
            raise self._error(name, "is not the id of a token") from None
        if unknown:
            ids = ", ".join(map(str, unknown))
            self._note(f"names {ids} as {name}, which the model of {vocab_size} tokens lacks")
        return tuple(known)

    def _token_id(self, name: str, vocab_size: int) -> int | None:
        if isinstance(self._take(name), list):
            raise self._error(name, "is not the id of a token")
        ids = self._token_ids(name, vocab_size)
        return ids[0] if ids else None

    def _positive_int(self, name: str, default: int | None = None) -> int:
        value = self._get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            raise self._error(name, "is not a positive whole number")
        return value

    def _positive_float(self, name: str, default: float | None = None) -> float:
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._error(name, "is not a number")
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not (math.isfinite(number) and number > 0):
            raise self._error(name, "is not a positive number")
        return number

    def _flag(self, name: str, default: bool) -> bool:
        value = self._get(name, default)
        if not isinstance(value, bool):
            raise self._error(name, "is neither true nor false")
        return value

    def _get(self, name: str, default: Any) -> Any:
        # In a checkpoint, null means the default.
        value = self._take(name)
        if value is None:
            value = default
        if value is None:
            raise ConfigError(f"{self._origin}: the field {name} is missing")
        return value

    def _take(self, name: str) -> Any:
        self._read.add(name)
        return self._raw.get(name)

    def _note(self, what: str) -> None:
        self._notes.append(f"{Path(self._origin).name} {what}")

    def _error(self, name: str, what: str) -> ConfigError:
        return ConfigError(f"{self._origin}: {name} is {_short(self._raw.get(name))}, which {what}")


def _short(value: Any) -> str:
    """The value as a message shows it."""
    text = repr(value)
    return text if len(text) <= _LONGEST_VALUE else f"{text[: _LONGEST_VALUE - 3]}..."
