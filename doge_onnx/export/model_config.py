"""The checkpoint's config.json, read into one validated form.

Knows the field names of both generations of checkpoints (transformers-native and the
older remote-code layout) and which values make sense. Does not look at tensors:
`export.checkpoint` tells from them whether there is a q/k norm, and to which heads the gates
belong.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from doge_onnx import text_files
from doge_onnx.errors import ConfigError

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
    None where there is no window.
    """

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

    @property
    def is_moe(self) -> bool:
        """Whether the MLPs are Cross Domain Mixtures of Experts."""
        return self.num_experts > 0

    @classmethod
    def from_file(cls, path: Path) -> DogeConfig:
        """Read a config.json.

        Raises:
            ConfigError: The file cannot be read, is not a Doge model's, or has a field
                that is missing, senseless or not supported; the field is named.
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
        return cls.from_dict(raw, str(path))

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], origin: str = CONFIG_NAME) -> DogeConfig:
        """Validate a parsed config.json; `origin` is the file that error messages name.

        Raises:
            ConfigError: See `from_file`.
        """
        return _Reader(raw, origin).config()


class _Reader:
    """Typed access to a parsed config.json, with errors that name the file and the field."""

    def __init__(self, raw: Mapping[str, Any], origin: str) -> None:
        self._raw = raw
        self._origin = origin

    def config(self) -> DogeConfig:
        if self._raw.get("model_type") != "doge":
            raise self._error("model_type", "is not 'doge': only Doge checkpoints can be exported")
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
        vocab_size = self._positive_int("vocab_size")
        return DogeConfig(
            vocab_size=vocab_size,
            hidden_size=self._positive_int("hidden_size"),
            intermediate_size=self._positive_int("intermediate_size"),
            num_hidden_layers=self._positive_int("num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=self._head_dim(heads),
            hidden_act=self._activation(),
            rms_norm_eps=self._positive_float("rms_norm_eps", default=1e-6),
            max_position_embeddings=self._positive_int("max_position_embeddings", default=2048),
            rope=self._rope(),
            keep_window_size=self._keep_window_size(),
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

    def _refuse_unsupported(self) -> None:
        if self._raw.get("sliding_window") is not None:
            raise self._error("sliding_window", "is not supported: it must be null")
        for field in ("num_cdmoe_experts", "num_cdmmoe_experts", "expert_retrieval_size"):
            if self._raw.get("is_moe") and field in self._raw:
                raise self._error(
                    field,
                    "belongs to the first retrieval-style mixture of experts; that is not "
                    "supported, later ones route with router_gate",
                )
        if self._raw.get("dynamic_mask_ratio", 0.0) not in (0, None):
            raise self._error("dynamic_mask_ratio", "is not supported: it must be 0")

    def _keep_window_size(self) -> int | None:
        # The first checkpoints have dynamic_mask_ratio instead; at 0, they drop no key.
        if "keep_window_size" not in self._raw and "dynamic_mask_ratio" in self._raw:
            return None
        return self._positive_int("keep_window_size", default=DEFAULT_WINDOW)

    def _head_dim(self, heads: int) -> int:
        if self._raw.get("head_dim") is not None:
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
        name = self._raw.get("hidden_act", "silu")
        if not isinstance(name, str) or name not in ACTIVATIONS:
            raise self._error("hidden_act", f"is none of {', '.join(ACTIVATIONS)}")
        return ACTIVATIONS[name]

    def _rope(self) -> RopeConfig:
        # transformers 5 writes rope_parameters; older versions wrote rope_scaling and rope_theta.
        # If a config has both, transformers takes the older one, unless it is empty.
        field = "rope_scaling" if self._raw.get("rope_scaling") else "rope_parameters"
        scaling = self._raw.get(field)
        if scaling is None:
            scaling = {}
        if not isinstance(scaling, dict):
            raise self._error(field, "is not an object")
        reader = _Reader(scaling, f"{self._origin}: {field}")
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        if kind not in ROPE_TYPES:
            raise ConfigError(
                f"{self._origin}: {field}.rope_type {kind!r} is not supported; "
                f"supported are {', '.join(ROPE_TYPES)}"
            )
        if scaling.get("partial_rotary_factor") not in (1, None):
            raise reader._error("partial_rotary_factor", "is not supported: it must be 1.0")
        theta_owner = self if scaling.get("rope_theta") is None else reader
        factor = 1.0 if kind == "default" else reader._positive_float("factor")
        if factor < 1.0:
            raise reader._error("factor", "is less than 1")
        return RopeConfig(
            kind=kind, theta=theta_owner._positive_float("rope_theta", default=1e4), factor=factor
        )

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

    def _token_ids(self, field: str, vocab_size: int) -> tuple[int, ...]:
        value = self._raw.get(field)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(_is_int(i) and 0 <= i < vocab_size for i in ids):
            raise self._error(field, f"is not in the vocabulary of {vocab_size} tokens")
        return tuple(ids)

    def _token_id(self, field: str, vocab_size: int) -> int | None:
        ids = self._token_ids(field, vocab_size)
        return ids[0] if ids else None

    def _positive_int(self, field: str, default: int | None = None) -> int:
        value = self._get(field, default)
        if not _is_int(value) or value <= 0:
            raise self._error(field, "is not a positive whole number")
        return int(value)

    def _positive_float(self, field: str, default: float | None = None) -> float:
        value = self._get(field, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._error(field, "is not a number")
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not (math.isfinite(number) and number > 0):
            raise self._error(field, "is not a positive number")
        return number

    def _flag(self, field: str, default: bool) -> bool:
        value = self._get(field, default)
        if not isinstance(value, bool):
            raise self._error(field, "is neither true nor false")
        return value

    def _get(self, field: str, default: Any) -> Any:
        # In a checkpoint, null means the default.
        value = self._raw.get(field)
        if value is None:
            value = default
        if value is None:
            raise ConfigError(f"{self._origin}: the field {field} is missing")
        return value

    def _error(self, field: str, what: str) -> ConfigError:
        return ConfigError(f"{self._origin}: {field} is {self._raw.get(field)!r}, which {what}")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
