"""Names of a graph's inputs and outputs, as the state contract has them (docs/state.md)."""

from __future__ import annotations

INPUT_IDS = "input_ids"
ATTENTION_MASK = "attention_mask"
# Only of graphs with a window state, whose mask covers the new tokens only.
POSITION_IDS = "position_ids"
LOGITS = "logits"
# How many of the last positions get logits, 0 for all. Optional, and not every graph has it.
LOGITS_TO_KEEP = "logits_to_keep"
# How many rows of the state each sequence has. Optional; for its default see `export.graph`.
PAST_LENGTHS = "past_lengths"


def past_names(num_layers: int) -> list[str]:
    """Names of the graph's state inputs: key and value of each layer in turn."""
    return [f"past_key_values.{i}.{kind}" for i in range(num_layers) for kind in ("key", "value")]


def present_names(num_layers: int) -> list[str]:
    """Names of the graph's state outputs, in the order of `past_names`."""
    return [f"present.{i}.{kind}" for i in range(num_layers) for kind in ("key", "value")]
