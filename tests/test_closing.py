"""What closes a row: a reader does by hand what the manifest says, and the key is as never read."""

from __future__ import annotations

from pathlib import Path

import checkpoints
import numpy as np
import older_checkpoints
import onnxruntime
import pytest
import torch
from checkpoints import random_ids

from doge_onnx.bundle import Bundle
from doge_onnx.export import checkpoint as checkpoint_reader
from doge_onnx.export.growing_state import GrowingState
from doge_onnx.export.operators import STANDARD
from doge_onnx.export.step import RecurrentStep
from doge_onnx.manifest import StateLayout

VOCAB = 97
# Tokens that stay, the one whose row is closed, and the one that comes after it.
TEXT, CLOSED, NEXT = random_ids(6, VOCAB), 5, 11
EXPORTS = {
    "float32": {},
    "float32, past the window": {"context_length": 64},
    "portable": {"target": "portable"},
    "float16": {"device": "cuda"},
    "int8": {"kv_cache": "int8"},
    "window": {"state": "window"},
}
# Of the largest logit: what rounding of a state does to it.
TOLERANCES = {"float32": 1e-5, "float16": 1e-3, "int8": 1e-5, "bfloat16": 5e-3}


@pytest.fixture(scope="module", params=["native", "older"])
def model(request, tmp_path_factory) -> Path:
    """A checkpoint; the older one has a gate for each query head."""
    directory = tmp_path_factory.mktemp("closing") / request.param
    window = {"keep_window_size": 16, "num_hidden_layers": 2}
    if request.param == "native":
        return checkpoints.make(directory, **window)
    return older_checkpoints.make(directory, "older", vocab_size=VOCAB, **window).directory


class Graph:
    """A bundle's graph, fed by somebody who has read its manifest and nothing else."""

    def __init__(self, bundle: Bundle) -> None:
        self.layout = bundle.manifest.state
        self._session = onnxruntime.InferenceSession(bundle.graph)
        layers = range(self.layout.num_layers)
        self._names = [f"past_key_values.{i}.{kind}" for i in layers for kind in ("key", "value")]

    def step(self, ids: list[int], mask: list[int], state: list[np.ndarray] | None):
        """Logits `[V]` after the last of `ids`, and the state; `mask` is of all tokens."""
        feeds = {"input_ids": np.array([ids]), "attention_mask": np.array([mask])}
        if self.layout.kind == "window":
            feeds["attention_mask"] = np.array([mask[-len(ids) :]])
            feeds["position_ids"] = np.cumsum([mask], axis=1)[:, -len(ids) :] - 1
        state = self._room(0 if self.layout.kind == "growing" else 12) if state is None else state
        logits, *state = self._session.run(None, feeds | dict(zip(self._names, state, strict=True)))
        return logits[0, -1], state

    def _room(self, rows: int) -> list[np.ndarray]:
        """A state of free rows."""
        shape = (1, self.layout.num_heads, rows, self.layout.row_size)
        state = [np.zeros(shape, self.layout.dtype) for _ in self._names]
        for key in state[::2]:
            close(self.layout, key)
        return state


def close(layout: StateLayout, rows: np.ndarray) -> None:
    """Close rows of keys `[..., row_size]`."""
    rows[..., list(layout.closing.channels)] = layout.closing.value


@pytest.mark.parametrize("kind", EXPORTS)
def test_a_closed_row_is_as_never_read(kind, model, make_bundle):
    options = {"context_length": 16} if "window" not in kind else {}
    made = make_bundle(model, verify=False, **(options | EXPORTS[kind]))
    graph = Graph(Bundle.open(made.path))
    layout = graph.layout
    _, start = graph.step(TEXT, [1] * 6, None)
    expected, _ = graph.step([NEXT], [1] * 7, start)
    _, state = graph.step([CLOSED], [1] * 7, start)
    # Its key is still in the state, so that only the row can close it: the mask counts tokens.
    mask = [1] * 6 + [0, 1]
    unclosed, _ = graph.step([NEXT], mask, state)
    for key in state[::2]:
        place = np.s_[:, :, 6]
        if layout.kind == "window":
            # Behind the gate is the position plus one.
            place = key[..., layout.head_dim + 1] == 7
            assert place.sum() == layout.num_heads
        rows = key[place]
        close(layout, rows)
        key[place] = rows
    closed, _ = graph.step([NEXT], mask, state)
    limit = TOLERANCES[layout.dtype] * np.abs(expected).max()
    assert np.abs(closed - expected).max() <= limit
    assert np.abs(unclosed - expected).max() > 4 * limit


@torch.no_grad()
def test_a_closed_row_of_bfloat16(model):
    # ONNX Runtime has no kernels for it on the CPU.
    checkpoint = checkpoint_reader.read(model)
    layers = checkpoint.config.num_hidden_layers
    state = GrowingState(checkpoint, 16, STANDARD, "bfloat16", "bfloat16")
    step = RecurrentStep(checkpoint, state, STANDARD).halve().eval()
    closing, heads = state.closing, state.heads
    empty = torch.zeros(1, heads.num_keys, 0, heads.row, dtype=torch.bfloat16)

    def run(ids, mask, past):
        return step((torch.tensor([ids]), torch.tensor([mask])), past)

    _, start = run(TEXT, [1] * 6, [(empty, empty)] * layers)
    expected, _ = run([NEXT], [1] * 7, start)
    _, past = run([CLOSED], [1] * 7, start)
    mask = [1] * 6 + [0, 1]
    unclosed, _ = run([NEXT], mask, past)
    for key, _ in past:
        key[:, :, 6, list(closing.channels)] = closing.value
    closed, _ = run([NEXT], mask, past)
    limit = TOLERANCES["bfloat16"] * float(expected.abs().max())
    assert float((closed - expected).abs().max()) <= limit
    assert float((unclosed - expected).abs().max()) > 4 * limit
