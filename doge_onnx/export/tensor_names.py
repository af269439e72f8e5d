"""The names of a checkpoint's tensors: those of both layouts, and what wrappers put before them.

Knows how `torch.compile`, data parallelism and PEFT change the names of a module's parameters.
Does not read files.
"""

from __future__ import annotations

import re

# The remote-code layout's names, as (pattern, canonical name).
_OLDER_NAMES = (
    (r"^word_embed\.", "embed_tokens."),
    (r"^final_layernorm\.", "norm."),
    (r"\.pre_layernorm\.", ".input_layernorm."),
    (r"\.post_layernorm\.", ".post_attention_layernorm."),
    (r"\.pre_residual\.weight$", ".input_residual"),
    (r"\.post_residual\.weight$", ".post_attention_residual"),
    (r"\.feed_forward\.", ".mlp."),
)
# Tensors that have no effect: a buffer that some checkpoints saved, and a router bias that the
# authors' own conversion to the native layout drops as well.
_IGNORED_NAMES = re.compile(r"rotary_emb\.|\.mlp\.router_gate\.bias$")
# Modules that only wrap another one: of torch.compile, DistributedDataParallel, FSDP, activation
# checkpoints, Lightning Fabric and FairScale. They may stand anywhere in a name.
_WRAPPERS = (
    *("_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"),
    *("_forward_module", "_fpw_module"),
)
_PEFT = ["base_model", "model"]


def unwrapped(name: str) -> str:
    """A parameter's name without modules that only wrap others, and without "model." before it."""
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    while parts[:2] == _PEFT:
        parts = parts[2:]
    while parts[:1] == ["model"]:
        parts = parts[1:]
    return ".".join(parts)


def canonical_name(name: str) -> str | None:
    """The transformers-native name of a tensor without "model.", or None if it is not needed."""
    name = unwrapped(name)
    for pattern, replacement in _OLDER_NAMES:
        name = re.sub(pattern, replacement, name)
    return None if _IGNORED_NAMES.search(name) else name
