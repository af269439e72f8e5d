"""Whatever the model and however a text is cut into steps: the logits are the oracle's.

The examples are the same at every run. To look for new ones, set PROPERTY_EXAMPLES to how many.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import older_checkpoints
import oracle
import pytest
from checkpoints import assert_close
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from older_checkpoints import LAYOUTS
from stepping import Growing, Window, pad, random_text, row

import doge_onnx
from doge_onnx.export import checkpoint as checkpoint_reader

pytestmark = pytest.mark.slow

_ASKED = int(os.environ.get("PROPERTY_EXAMPLES", "0"))


def examples(count, **options):
    return settings(
        max_examples=_ASKED or count,
        derandomize=not _ASKED,
        database=None,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
        **options,
    )


@dataclass(frozen=True)
class Case:
    """A checkpoint, by what `older_checkpoints.make` takes."""

    layout: str
    fields: dict[str, Any]

    def make(self, directory: str) -> older_checkpoints.Model:
        model = older_checkpoints.make(Path(directory), self.layout, **self.fields)
        if "extra_config" in self.fields:
            model.config["keep_window_size"] = None
        return model


@st.composite
def ropes(draw):
    kind = draw(st.sampled_from(["default", "linear", "dynamic"]))
    rope = {"rope_type": kind, "rope_theta": draw(st.sampled_from([100.0, 1e4, 5e5]))}
    if kind != "default":
        rope["factor"] = draw(st.sampled_from([1.0, 1.5, 4.0]))
    return rope


@st.composite
def cases(draw, max_layers=3):
    layout = draw(st.sampled_from(list(LAYOUTS)))
    kv_heads = draw(st.integers(1, 3))
    attention_bias = draw(st.booleans())
    fields = {
        "seed": draw(st.integers(0, 2**32 - 1)),
        "vocab_size": draw(st.integers(8, 60)),
        "hidden_size": draw(st.integers(9, 40)),
        "intermediate_size": draw(st.integers(1, 40)),
        "num_hidden_layers": draw(st.integers(1, max_layers)),
        "num_attention_heads": kv_heads * draw(st.integers(1, 4)),
        "num_key_value_heads": kv_heads,
        "head_dim": 2 * draw(st.integers(2, 12)),
        "hidden_act": draw(st.sampled_from(["silu", "gelu", "gelu_pytorch_tanh", "relu"])),
        "rms_norm_eps": draw(st.sampled_from([1e-6, 1e-3])),
        "max_position_embeddings": draw(st.integers(4, 64)),
        "rope_parameters": draw(ropes()),
        "tie_word_embeddings": draw(st.booleans()),
        "attention_bias": attention_bias,
        # The remote-code layout has one switch for both.
        "mlp_bias": attention_bias if layout == "older" else draw(st.booleans()),
    }
    window = draw(st.none() | st.integers(1, 40))
    if window is not None:
        fields["keep_window_size"] = window
    elif layout == "older" and draw(st.booleans()):
        fields["extra_config"] = {"dynamic_mask_ratio": 0.0}
    if draw(st.booleans()):
        side = draw(st.integers(1, 6))
        fields |= {
            "is_moe": True,
            "num_experts": side**2,
            "num_experts_per_tok": draw(st.integers(1, side**2)),
            "norm_topk_prob": draw(st.booleans()),
            "router_bias": draw(st.booleans()) and layout == "older",
        }
    return Case(layout, fields)


def cuts(length):
    """Where a text is cut: nowhere, or between any of its tokens."""
    return st.sets(st.integers(1, max(1, length - 1)), max_size=12).map(
        lambda places: sorted(place for place in places if place < length)
    )


def truth_of(model, ids):
    reader = oracle.Oracle(model.config, model.tensors)
    truth = np.array([reader.step(token) for token in ids])
    # Closer decisions may fall the other way in float32.
    assume(reader.margin > 1e-5)
    return truth


def kinds(directory):
    """The kinds of state that a checkpoint can have."""
    has_window = checkpoint_reader.read(Path(directory)).config.keep_window_size is not None
    return [Growing, Window] if has_window else [Growing]


@examples(150)
@given(data=st.data())
def test_however_a_text_is_cut(data):
    case = data.draw(cases())
    length = data.draw(st.integers(1, 70))
    ids = random_text(length, case.fields["vocab_size"], data.draw(st.integers(0, 9)))
    splits = data.draw(st.lists(cuts(length), min_size=1, max_size=3))
    operators = data.draw(st.sampled_from(["fused", "standard"]))
    with tempfile.TemporaryDirectory() as directory:
        model = case.make(directory)
        truth = truth_of(model, ids)
        for kind in kinds(directory):
            step = kind(Path(directory), operators)
            for split in splits:
                assert_close(step.run(row(ids), cuts=split)[0], truth)


@examples(75)
@given(data=st.data())
def test_however_a_batch_is_padded(data):
    case = data.draw(cases(max_layers=2))
    vocabulary = case.fields["vocab_size"]
    lengths = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=4))
    texts = [random_text(length, vocabulary, seed) for seed, length in enumerate(lengths)]
    gaps = [sorted(data.draw(st.sets(st.integers(0, 39), max_size=8))) for _ in texts]
    # No gap behind the end of a text, so that the last token of each row is a real one.
    gaps = [[gap for gap in row if gap < len(text)] for row, text in zip(gaps, texts, strict=True)]
    ids, mask = pad([[token % vocabulary for token in text] for text in texts], gaps)
    split = data.draw(cuts(ids.shape[1]))
    first_rows = data.draw(st.integers(0, 40))
    with tempfile.TemporaryDirectory() as directory:
        model = case.make(directory)
        truths = [truth_of(model, text) for text in texts]
        steps = [Growing(Path(directory))]
        if Window in kinds(directory):
            window = model.config["keep_window_size"]
            steps.append(Window(Path(directory), first_rows=min(first_rows, window)))
        for step in steps:
            logits = step.run(ids, mask, split)
            assert logits.isfinite().all()
            for got, real, truth in zip(logits, mask.bool(), truths, strict=True):
                assert_close(got[real], truth)


# A trace takes seconds, so each is used for several texts; and nobody waits for a shrunk one.
@examples(5, phases=[Phase.generate])
@given(data=st.data())
def test_bundles(data):
    case = data.draw(cases(max_layers=2))
    target = data.draw(st.sampled_from(["ort", "portable"]))
    vocabulary = case.fields["vocab_size"]
    texts = [random_text(length, vocabulary, seed) for seed, length in enumerate((64, 47, 9))]
    splits = data.draw(st.lists(cuts(64), min_size=4, max_size=4))
    ids, mask = (tensor.numpy() for tensor in pad(texts))
    with tempfile.TemporaryDirectory() as directory:
        model = case.make(directory)
        truths = [truth_of(model, text) for text in texts]
        state = "window" if Window in kinds(directory) and data.draw(st.booleans()) else "growing"
        out = Path(directory, "bundle")
        doge_onnx.export(
            directory, out, target=target, state=state, context_length=100, verify=False
        )
        bundle = doge_onnx.load(out, prefill_chunk=data.draw(st.sampled_from([None, 1, 7])))
        for split in splits:
            assert_close(run(bundle, ids[:1], mask[:1], split)[0], truths[0])
            for got, text, truth in zip(run(bundle, ids, mask, split), texts, truths, strict=True):
                assert_close(got[-len(text) :], truth)


def run(bundle, ids, mask, split):
    rows, state = [], None
    pieces = zip(np.split(ids, split, axis=1), np.split(mask, split, axis=1), strict=True)
    for piece, real in pieces:
        logits, state = bundle.forward(piece, state, logits="all", attention_mask=real)
        rows.append(logits)
    return np.concatenate(rows, axis=1)
