"""Small random Doge checkpoints, and what transformers computes with them.

A freshly initialised Doge has `A = 0`: every gate is 1, and Dynamic Mask Attention is plain
attention. So everything that initialisation leaves at 0 or 1 is drawn at random here.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

# These models are so small that a second thread only waits for the first, and on a machine
# with other work to do, waits for long: the tests take up to six times as long with two.
torch.set_num_threads(1)

# Small, but with nothing square: a swapped axis cannot go unnoticed.
SMALL = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}

# One unusual thing at a time, and then several at once.
SHAPES: dict[str, dict[str, Any]] = {
    "small": {},
    "one layer": {"num_hidden_layers": 1},
    "one KV head": {"num_key_value_heads": 1},
    "every head a KV head": {"num_key_value_heads": 6},
    "many groups": {
        "hidden_size": 64,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "num_hidden_layers": 2,
    },
    "untied": {"tie_word_embeddings": False},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "attention bias only": {"attention_bias": True, "num_hidden_layers": 1},
    "mlp bias only": {"mlp_bias": True, "num_hidden_layers": 1},
    "gelu": {"hidden_act": "gelu", "num_hidden_layers": 1},
    "tanh gelu": {"hidden_act": "gelu_pytorch_tanh", "num_hidden_layers": 1},
    "relu": {"hidden_act": "relu", "num_hidden_layers": 1},
    "head_dim of its own": {"head_dim": 20},
    "head_dim without room for a gate": {"head_dim": 16, "num_hidden_layers": 2},
    "large eps": {"rms_norm_eps": 1e-2, "num_hidden_layers": 1},
    "everything at once": {
        "vocab_size": 101,
        "hidden_size": 40,
        "intermediate_size": 52,
        "num_hidden_layers": 5,
        "num_attention_heads": 5,
        "num_key_value_heads": 1,
        "head_dim": 12,
        "hidden_act": "gelu",
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": False,
    },
}


def rope(kind: str, factor: float | None = None, theta: float = 1e4) -> dict[str, Any]:
    """The config override for one type of rotary embedding."""
    parameters = {"rope_type": kind, "rope_theta": theta}
    if factor is not None:
        parameters["factor"] = factor
    return {"rope_parameters": parameters}


def make(
    directory: Path,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str | None = None,
    **overrides: Any,
) -> Path:
    """Save a random transformers-native checkpoint; `overrides` are fields of its config."""
    config = transformers.DogeConfig(**{**SMALL, **overrides})
    config._attn_implementation = "eager"
    model = transformers.DogeForCausalLM(config)
    randomise(model, seed)
    options = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
    model.to(dtype).save_pretrained(directory, **options)
    return directory


@torch.no_grad()
def randomise(model: torch.nn.Module, seed: int) -> None:
    """Draw every weight anew, so that gates, norms and scales do something."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith(".A"):
            value = noise
        elif "norm" in name or "residual" in name:
            value = 1 + 0.3 * noise
        elif name.endswith("bias"):
            value = 0.2 * noise
        elif "embed" in name:
            value = 0.5 * noise
        else:
            value = 0.8 * noise / parameter.shape[-1] ** 0.5
        parameter.copy_(value)


def edit_config(directory: Path, **changes: Any) -> None:
    """Change fields of a saved config.json."""
    path = directory / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**config, **changes}), encoding="utf-8")


def reference(directory: Path) -> transformers.DogeForCausalLM:
    """The checkpoint in transformers, float32, eager attention.

    Load it anew for each run: dynamic RoPE that has grown past the trained context stays so.
    """
    return transformers.DogeForCausalLM.from_pretrained(
        directory, attn_implementation="eager", dtype=torch.float32
    ).eval()


@torch.no_grad()
def reference_logits(directory: Path, ids: Sequence[int]) -> Tensor:
    """The truth: logits `[S, V]` of transformers fed one token at a time."""
    model = reference(directory)
    cache = transformers.DynamicCache()
    # The cache goes by position, since its name is another from transformers 5.24 on.
    rows = [model(torch.tensor([[token]]), None, None, cache).logits[0, 0] for token in ids]
    return torch.stack(rows)


def random_ids(count: int, vocab_size: int = 97, seed: int = 0) -> list[int]:
    """Token ids that are the same at every call."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocab_size, (count,), generator=generator).tolist()


def assert_close(ours: Any, truth: Any, relative: float = 1e-4) -> None:
    """Compare logits; the difference is measured against the largest of them.

    Float32 sums in another order differ by 1e-5 at most here, a wrong gate, mask or position
    by more than 1e-2.
    """
    ours, truth = torch.as_tensor(ours), torch.as_tensor(truth)
    assert ours.shape == truth.shape
    scale = truth.abs().max()
    assert scale > 0.5, "these logits are too small to tell anything"
    assert (ours - truth).abs().max() <= relative * scale
