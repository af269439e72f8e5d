"""Small random checkpoints of every generation, written without transformers.

Weights are drawn under their canonical names, which is how the oracle reads them, and written
under the names, and with the config, of the layout that is asked for.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import oracle
from numpy.typing import NDArray
from safetensors.numpy import save_file

# Nothing square, so that no swapped axis can go unnoticed; and few layers with few heads, so
# that random gates are seldom too close to each other to be told apart in float32.
SMALL = {
    "vocab_size": 61,
    "hidden_size": 40,
    "intermediate_size": 52,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
    "is_moe": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
}

# Left out of a checkpoint, it would be the default of transformers, 2048.
_WIDE = 2048

_REMOTE_NAMES = {
    "embed_tokens.": "word_embed.",
    ".input_layernorm.": ".pre_layernorm.",
    ".post_attention_layernorm.": ".post_layernorm.",
    ".input_residual": ".pre_residual.weight",
    ".post_attention_residual": ".post_residual.weight",
    ".mlp.": ".feed_forward.",
}


@dataclass(frozen=True)
class Layout:
    """What tells one generation of checkpoints from another.

    Attributes:
        remote_names: Whether tensors and config fields have the remote-code layout's names.
        qk_norm: Whether queries and keys are normalised.
        query_gates: Whether there is a gate for each query head, not for each key/value head.
    """

    remote_names: bool
    qk_norm: bool
    query_gates: bool


LAYOUTS = {
    "native": Layout(remote_names=False, qk_norm=True, query_gates=False),
    "intermediate": Layout(remote_names=False, qk_norm=False, query_gates=True),
    "normed, query gates": Layout(remote_names=False, qk_norm=True, query_gates=True),
    "bare, key gates": Layout(remote_names=False, qk_norm=False, query_gates=False),
    "older": Layout(remote_names=True, qk_norm=False, query_gates=True),
}


@dataclass(frozen=True)
class Model:
    """A checkpoint and what the oracle reads.

    Attributes:
        directory: The checkpoint.
        config: Native fields.
        tensors: float64, by canonical name.
        marker: A file that is there once any code of the checkpoint has run.
    """

    directory: Path
    config: dict[str, Any]
    tensors: dict[str, NDArray[np.float64]]
    marker: Path

    def logits(self, ids: Sequence[int]) -> NDArray[np.float64]:
        """What the oracle says."""
        return oracle.logits(self.config, self.tensors, ids)


def make(
    directory: Path,
    layout: str | Layout = "older",
    *,
    seed: int = 0,
    A: float | None = None,
    dt_scale: float = 1.0,
    router_bias: bool = False,
    model_type: str = "doge",
    extra_config: dict[str, Any] | None = None,
    **overrides: Any,
) -> Model:
    """Save a random checkpoint.

    Args:
        directory: Where; made if need be.
        layout: One of `LAYOUTS`, or its name.
        seed: Of the weights.
        A: The same for all heads, in place of random ones.
        dt_scale: By how much the gates' projection is larger than others.
        router_bias: Give routers a bias, which has to be dropped.
        model_type: As in config.json.
        extra_config: Fields that go into config.json as they are.
        overrides: Native fields of the config.
    """
    layout = LAYOUTS[layout] if isinstance(layout, str) else layout
    config = {**SMALL, **overrides}
    tensors = _draw(config, layout, seed)
    for name, tensor in tensors.items():
        if A is not None and name.endswith(".A"):
            tensor[:] = A
        elif name.endswith(".dt_proj.weight"):
            tensor *= dt_scale
    directory.mkdir(parents=True, exist_ok=True)
    marker = directory / "code-was-executed"
    saved = {_saved_name(name, layout): tensor for name, tensor in tensors.items()}
    if config["is_moe"] and router_bias:
        for name in [name for name in saved if name.endswith(".router_gate.weight")]:
            # Far from harmless, should anybody add it.
            bias = np.random.default_rng(seed).normal(size=len(saved[name])).astype(np.float32)
            saved[name.removesuffix("weight") + "bias"] = 3 * bias
    save_file(saved, directory / "model.safetensors", metadata={"format": "pt"})
    written = _remote_config(config, directory, marker) if layout.remote_names else dict(config)
    written = {"model_type": model_type, "architectures": ["DogeForCausalLM"], **written}
    written |= extra_config or {}
    (directory / "config.json").write_text(json.dumps(written), encoding="utf-8")
    exact = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}
    # Without the field, transformers and the native layout have this window.
    return Model(directory, {"keep_window_size": _WIDE, **config}, exact, marker)


def _draw(config: dict[str, Any], layout: Layout, seed: int) -> dict[str, NDArray[np.float32]]:
    rng = np.random.default_rng(seed)
    hidden, middle = config["hidden_size"], config["intermediate_size"]
    queries = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    gates = config["num_attention_heads" if layout.query_gates else "num_key_value_heads"]
    tensors = {}

    def draw(name: str, *shape: int, scale: float = 1.0, around: float = 0.0) -> None:
        tensors[name] = (around + scale * rng.normal(size=shape)).astype(np.float32)

    def norm(name: str, size: int) -> None:
        draw(name, size, scale=0.3, around=1.0)

    def linear(name: str, outputs: int, inputs: int, bias: bool) -> None:
        draw(name + ".weight", outputs, inputs, scale=0.8 / math.sqrt(inputs))
        if bias:
            draw(name + ".bias", outputs, scale=0.2)

    draw("embed_tokens.weight", config["vocab_size"], hidden, scale=0.5)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"layers.{layer}."
        for name in ("input_layernorm.weight", "post_attention_layernorm.weight"):
            norm(prefix + name, hidden)
        for name in ("input_residual", "post_attention_residual"):
            norm(prefix + name, hidden)
        for name, outputs, inputs in (
            ("q_proj", queries, hidden),
            ("k_proj", keys, hidden),
            ("v_proj", keys, hidden),
            ("dt_proj", gates, keys),
            ("o_proj", hidden, queries),
        ):
            linear(f"{prefix}self_attn.{name}", outputs, inputs, config["attention_bias"])
        draw(prefix + "self_attn.A", gates)
        if layout.qk_norm:
            norm(prefix + "self_attn.q_norm.weight", config["head_dim"])
            norm(prefix + "self_attn.k_norm.weight", config["head_dim"])
        for name, outputs, inputs in (
            ("gate_proj", middle, hidden),
            ("up_proj", middle, hidden),
            ("down_proj", hidden, middle),
        ):
            linear(f"{prefix}mlp.{name}", outputs, inputs, config["mlp_bias"])
        if config["is_moe"]:
            experts = config["num_experts"]
            linear(prefix + "mlp.router_gate", 2 * math.isqrt(experts), hidden, bias=False)
            # A neuron's weight is 1 / top_k or so, and still it should show.
            draw(prefix + "mlp.down_embed.weight", experts, hidden, scale=0.5)
            draw(prefix + "mlp.up_embed.weight", experts, hidden)
    norm("norm.weight", hidden)
    if not config["tie_word_embeddings"]:
        linear("lm_head", config["vocab_size"], hidden, bias=False)
    return tensors


def _saved_name(name: str, layout: Layout) -> str:
    if name.startswith("lm_head."):
        return name
    if layout.remote_names:
        name = name.replace("norm.", "final_layernorm.") if name.startswith("norm.") else name
        for native, remote in _REMOTE_NAMES.items():
            name = name.replace(native, remote)
    return "model." + name


def _remote_config(config: dict[str, Any], directory: Path, marker: Path) -> dict[str, Any]:
    """The fields of the remote-code layout, with a reference to code that nobody may run."""
    assert config["attention_bias"] == config["mlp_bias"], "there is one switch for both"
    rope = dict(config["rope_parameters"])
    theta, kind = rope.pop("rope_theta"), rope.pop("rope_type")
    new = ("attention_bias", "mlp_bias", "rope_parameters")
    written = {name: value for name, value in config.items() if name not in new}
    written |= {
        "hidden_bias": config["attention_bias"],
        "rope_theta": theta,
        "rope_scaling": None if kind == "default" else {"type": kind, **rope},
        "auto_map": {
            "AutoConfig": "configuration_doge.DogeConfig",
            "AutoModelForCausalLM": "modeling_doge.DogeForCausalLM",
        },
    }
    for module in ("configuration_doge", "modeling_doge"):
        code = f"open({str(marker)!r}, 'w').close()\n"
        (directory / f"{module}.py").write_text(code, encoding="utf-8")
    return written
