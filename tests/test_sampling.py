"""Samplers, against their counterparts in transformers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation import logits_process as hf

from doge_onnx.runtime.generation import sampling

V = 1500  # more than the first few candidates that top-p sorts


def _logits(seed: int, spread: float = 3.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(scale=spread, size=V).astype(np.float32)


def _kept_by(warper, scores: np.ndarray) -> set[int]:
    kept = warper(torch.zeros(1, 1, dtype=torch.int64), torch.from_numpy(scores)[None])[0]
    return set(torch.isfinite(kept).nonzero().flatten().tolist())


def _shifted(logits: np.ndarray) -> np.ndarray:
    return logits.astype(np.float64) - logits.max()


class _Fixed:
    """A random generator that draws given numbers."""

    def __init__(self, *values: float) -> None:
        self._values = list(values)

    def random(self) -> float:
        return self._values.pop(0)


@pytest.mark.parametrize("k", [1, 2, 50, V - 1, V, V + 5])
def test_top_k_keeps_what_transformers_keeps(k):
    scores = _shifted(_logits(1))
    assert set(sampling.keep_top_k(scores, k)) == _kept_by(hf.TopKLogitsWarper(k), scores)


def test_top_k_keeps_all_equals_of_the_last():
    scores = np.array([0.0, -1, -1, -1, -2])
    assert set(sampling.keep_top_k(scores, 2)) == {0, 1, 2, 3}


@pytest.mark.parametrize("p", [1e-6, 0.1, 0.5, 0.9, 0.99, 0.9999, 1.0])
@pytest.mark.parametrize("spread", [0.01, 1.0, 3.0, 30.0])
def test_top_p_keeps_what_transformers_keeps(p, spread):
    scores = _shifted(_logits(2, spread))
    assert set(sampling.keep_top_p(scores, p)) == _kept_by(hf.TopPLogitsWarper(p), scores)


@pytest.mark.parametrize("p", [0.0, 0.001, 0.1, 0.5, 1.0])
def test_min_p_keeps_what_transformers_keeps(p):
    scores = _shifted(_logits(3))
    assert set(sampling.keep_min_p(scores, p)) == _kept_by(hf.MinPLogitsWarper(p), scores)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 1000),
    temperature=st.floats(0.2, 3),
    top_k=st.integers(1, 200),
    top_p=st.floats(0.05, 1),
    min_p=st.floats(0, 0.9),
)
def test_all_filters_together_leave_what_transformers_leaves(
    seed, temperature, top_k, top_p, min_p
):
    logits = _logits(seed)
    scores = torch.from_numpy(logits.astype(np.float64))[None]
    for warper in (
        hf.TemperatureLogitsWarper(temperature),
        hf.TopKLogitsWarper(top_k),
        hf.TopPLogitsWarper(top_p),
        hf.MinPLogitsWarper(min_p),
    ):
        scores = warper(torch.zeros(1, 1, dtype=torch.int64), scores)
    probabilities = scores.softmax(-1)[0].numpy()
    points = np.linspace(0, 1, 200, endpoint=False)
    sample = sampling.make_sampler(
        _Fixed(*points),
        temperature,
        {
            name: value
            for name, value in {"top_k": top_k, "top_p": top_p, "min_p": min_p}.items()
            if value is not None
        },
    )
    drawn = [sample(logits) for _ in points]
    assert all(probabilities[token] > 0 for token in drawn)
    # Evenly spread draws hit each token in proportion to its probability, up to both ends.
    share = np.bincount(drawn, minlength=V) / len(points)
    assert np.abs(share - probabilities).max() <= 2 / len(points)


def test_a_tiny_temperature_is_greedy_and_does_not_overflow():
    logits = _logits(5, spread=1e4)
    sample = sampling.make_sampler(_Fixed(0.0, 0.5, 1 - 2**-53), 1e-300)
    with np.errstate(over="raise", invalid="raise"):
        assert {sample(logits) for _ in range(3)} == {sampling.greedy(logits)}


def test_the_largest_draw_is_still_a_token():
    # Each cumulative sum is rounded in its own way; the last interval must not be overrun.
    for seed in range(50):
        sample = sampling.make_sampler(_Fixed(1 - 2**-53), 1.0)
        assert 0 <= sample(_logits(seed)) < V


def test_the_same_generator_state_gives_the_same_tokens():
    def draw(seed):
        sample = sampling.make_sampler(np.random.default_rng(seed), 1.0)
        return [sample(_logits(i)) for i in range(20)]

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_greedy_takes_the_first_of_equals():
    assert sampling.greedy(np.array([0, 5, 5, 1], np.float32)) == 1


def test_log_probabilities_are_accurate_for_large_logits():
    logits = _logits(6) + np.float32(300)
    expected = torch.from_numpy(logits).double().log_softmax(-1).numpy()
    np.testing.assert_allclose(sampling.log_probabilities(logits), expected, rtol=1e-9)


def test_the_largest_are_in_order_and_no_more_than_asked_for():
    scores = np.array([1.0, 3.0, 2.0, 3.0, 2.0, 0.0])
    assert [sampling.largest(scores, count).tolist() for count in (1, 3, 6, 9)] == [
        [1],
        [1, 3, 2],
        [1, 3, 2, 4, 0, 5],
        [1, 3, 2, 4, 0, 5],
    ]
