"""The model card of a bundle: what it is, how to run it, what was measured, and its interface.

Knows how to describe a manifest to a person. `snippets` has the code for each tool that runs
the bundle, and `metadata` the block that programs read.
"""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Any

from doge_onnx.bundle import MANIFEST_NAME, Bundle
from doge_onnx.errors import BundleError
from doge_onnx.export import metadata
from doge_onnx.export.checkpoint import CARD_NAME, Source
from doge_onnx.export.metadata import Metadata
from doge_onnx.export.model_config import DogeConfig
from doge_onnx.export.ort_format import OPERATORS_NAME
from doge_onnx.export.snippets import Snippet, snippets
from doge_onnx.manifest import Manifest, StateLayout
from doge_onnx.runtime.text.chat_template import ChatTemplate


def write(source: Source, config: DogeConfig, taken_over: Metadata, draft: Bundle) -> None:
    """Write the card of a bundle that has everything else, figures included.

    Args:
        source: Where the checkpoint came from.
        config: Its config.
        taken_over: What its own card says that is true of the bundle too.
        draft: The bundle, before it is sealed.
    """
    text = render(source, config, taken_over, draft.manifest, _is_conversational(draft))
    (draft.path / CARD_NAME).write_text(text, encoding="utf-8", newline="\n")


def _is_conversational(bundle: Bundle) -> bool:
    """Whether a bundle has a chat template, in a file of its own or in the tokenizer's config."""
    try:
        return ChatTemplate.read(bundle) is not None
    # A template that cannot be used counts as none; the export goes on.
    except BundleError:
        return False


def render(
    source: Source,
    config: DogeConfig,
    taken_over: Metadata,
    manifest: Manifest,
    conversational: bool = False,
) -> str:
    """The text of the card of a bundle that may have a chat template; otherwise see `write`."""
    shown = snippets(manifest, conversational)
    tags = [snippet.tag for snippet in shown if snippet.tag]
    block = metadata.compose(source, config, manifest, tags, taken_over, conversational)
    # The name of a directory may hold line breaks and backquotes.
    name = " ".join(source.model.replace("`", "'").split())
    at = f" at revision `{source.revision}`" if source.revision else ""
    engine = "ONNX Runtime" if manifest.target == "ort" else "any engine that runs standard ONNX"
    sections = [
        f"""\
# {name}, exported to ONNX

`{name}`{at}, a Doge language model of {manifest.parameters:,} parameters, exported by
doge-onnx {manifest.versions["doge-onnx"]} in recurrent-step form: one graph takes new tokens and a
state, and returns logits and the next state. The graph is made for {engine}.
""",
        _sizes(manifest),
        "## Use\n\n" + "\n".join(_shown(snippet) for snippet in shown),
        _parity(manifest),
        _quality(manifest),
        _graph(config, manifest),
        f"""\
`{MANIFEST_NAME}` holds the versions, checksums and all figures of the comparison with the
original model; `doge-onnx info` prints it.
""",
    ]
    return f"---\n{block}\n---\n\n" + "\n".join(section for section in sections if section)


def _shown(snippet: Snippet) -> str:
    return f"With {snippet.tool}:\n\n```{snippet.language}\n{snippet.code}```\n"


def _sizes(manifest: Manifest) -> str:
    state = manifest.state
    directory = PurePosixPath(manifest.graph).parent
    # The graph's directory holds its weights. In the flat layout it holds other files as well.
    weights = sum(
        int(entry["size"])
        for name, entry in manifest.files.items()
        if PurePosixPath(name).parent == directory
        and PurePosixPath(name).name.startswith(PurePosixPath(manifest.graph).name)
    )
    rows: dict[str, str] = {
        "weights": manifest.precision,
        "graph and weights": f"{weights / 1e6:.1f} MB",
        "context length": f"{manifest.context_length:,} tokens",
        "state": f"{state.dtype}, {state.token_bytes:,} bytes per token",
    }
    if state.kind == "window":
        assert state.keep_window_size is not None
        total = state.token_bytes * state.keep_window_size
        rows["context length"] = "no end"
        rows["state"] = (
            f"{state.dtype}, at most {state.keep_window_size} rows, {total / 1e6:.1f} MB, however "
            "long the text gets"
        )
    return _table("", "", rows)


def _table(name: str, value: str, rows: dict[str, str]) -> str:
    lines = [f"| {name} | {value} |", "|---|---|"]
    return "\n".join(lines + [f"| {key} | {text} |" for key, text in rows.items()]) + "\n"


def _number(figures: dict[str, Any], name: str, form: str) -> str:
    value = figures.get(name)
    return "-" if value is None else format(value, form)


def _parity(manifest: Manifest) -> str:
    """The section on how far the bundle's logits are from its checkpoint's, if that is known."""
    figures = manifest.parity
    if figures is None:
        return ""
    greedy = f"{figures.get('greedy_matched')} of {figures.get('greedy_total')}"
    rows = {
        "prompt in one step (prefill)": _number(figures, "prefill", ".1e"),
        "token by token (decode)": _number(figures, "decode", ".1e"),
        "padded batch": _number(figures, "batch", ".1e"),
        "tolerance": _number(figures, "tolerance", ".1e"),
        "largest logit": _number(figures, "logit_scale", ".1f"),
        "greedy tokens that match": greedy,
    }
    return (
        f"## Parity\n\nLargest difference of a logit from {figures.get('reference')}, on "
        f"{figures.get('tokens')} tokens:\n\n" + _table("figure", "value", rows)
    )


def _quality(manifest: Manifest) -> str:
    """The section on the loss of quality against the reference, if that is known."""
    figures = manifest.quality
    if figures is None:
        return ""
    rows = {
        "perplexity": _number(figures, "perplexity", ".4g"),
        "perplexity of the reference": _number(figures, "reference_perplexity", ".4g"),
        "mean KL divergence, nats per token": _number(figures, "mean_kl", ".3g"),
        "top-1 agreement": _number(figures, "top1_agreement", ".2%"),
        "top-1/top-2 gap where they disagree, logits": (
            f"{_number(figures, 'top2_gap_median', '.3g')} in the median, "
            f"{_number(figures, 'top2_gap_max', '.3g')} at most"
        ),
    }
    return (
        f"## Quality\n\nWeights of {manifest.precision} and a state of {manifest.state.dtype}, "
        f"measured against {figures.get('reference')} on {_number(figures, 'tokens', ',')} tokens "
        f"of text, {figures.get('text')}:\n\n" + _table("figure", "value", rows)
    )


def _graph(config: DogeConfig, manifest: Manifest) -> str:
    """The section on inputs and outputs, for readers who run the graph without this package."""
    state = manifest.state
    if state.kind == "window":
        past = present = "past_sequence_length"
        mask, positions = "sequence_length", "`[batch_size, sequence_length]`"
    else:
        past, present = "past_sequence_length", "total_sequence_length"
        mask, positions = present, None

    def rows(length: str) -> str:
        return f"`[batch_size, {state.num_heads}, {length}, {state.row_size}]`"

    position_ids = f"| `position_ids` | int64 | {positions} |\n" if positions else ""
    return f"""\
## The graph

`{manifest.graph}`{_file_format(manifest)}:

| input | type | shape |
|---|---|---|
| `input_ids` | int64 | `[batch_size, sequence_length]` |
| `attention_mask` | int64 | `[batch_size, {mask}]`, 0 for padding |
{position_ids}| `past_key_values.{{i}}.key`, `.value` | {state.dtype} | {rows(past)} |

| output | type | shape |
|---|---|---|
| `logits` | float32 | `[batch_size, sequence_length, {config.vocab_size}]` |
| `present.{{i}}.key`, `.value` | {state.dtype} | {rows(present)} |

There is one key/value pair for each of the {state.num_layers} layers. The first {state.head_dim}
channels of a key are the key itself; {_channels(state)}
"""


def _file_format(manifest: Manifest) -> str:
    """The card's words on the file of the graph, where it is not ONNX."""
    if not manifest.ort_format:
        return ""
    return (
        f", in ONNX Runtime's own format (`{OPERATORS_NAME}` lists the operators and types that a "
        "reduced build of it needs)"
    )


def _channels(state: StateLayout) -> str:
    """What the channels of a key behind the key itself are."""
    if state.kind == "window":
        return (
            "the next holds its gate, which Dynamic Mask Attention adds to the key's score, "
            "and the one after that its position plus one. A free row is zero but for a gate of "
            f"{state.closing.value:g}. There must be a free row for each token of a step, or "
            f"{state.keep_window_size} rows."
        )
    words = (
        "then comes its gate, which Dynamic Mask Attention adds to the key's score (one "
        "for each query head, where the checkpoint has them), and a channel that closes the "
        "keys of padding."
    )
    if state.dtype in ("float16", "bfloat16"):
        words = (
            "then comes its gate, which Dynamic Mask Attention adds to the key's score (one "
            "for each query head, where the checkpoint has them), and then what rounding took "
            "away from it. The gate of a key of padding is closed."
        )
    if state.dtype == "int8":
        words += (
            " All are int8, in steps that are constants of the graph; a gate has two channels, "
            "whole coarse steps and the rest in fine ones."
        )
    return words
