"""From the logits of one position to one token id.

Knows samplers, which work on one sequence and are plain callables, so that a caller may bring one.
Semantics and order are those of Hugging Face transformers: temperature, top-k, top-p, min-p. Does
not know the model, the state, or what changes logits before (`processors`).
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from doge_onnx.runtime.generation.config import GenerationConfig

# How many of the best candidates top-p sorts first, before it tries more.
_FIRST_SORTED = 64


class Sampler(Protocol):
    """A callable that chooses the next token of one sequence."""

    def __call__(self, logits: NDArray[np.float32], /) -> int:
        """Choose a token.

        Args:
            logits: float32 `[V]`, after all logits processors.

        Returns:
            A token id, 0 to V - 1.
        """
        ...


def sampler_of(options: GenerationConfig, number: int) -> Sampler:
    """The sampler of one sequence of a batch.

    Args:
        options: With a temperature, or a sampler.
        number: Of the sequence: each draws random numbers of its own.
    """
    if options.sampler is not None:
        return options.sampler
    if not options.temperature:
        return greedy
    rng = np.random.default_rng(None if options.seed is None else [options.seed, number])
    return make_sampler(rng, options.temperature, options.top_k, options.top_p, options.min_p)


def greedy(logits: NDArray[np.float32]) -> int:
    """The most likely token; of equals the one with the lowest id."""
    return int(logits.argmax())


def make_sampler(
    rng: np.random.Generator,
    temperature: float,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
) -> Sampler:
    """A sampler that draws one number from `rng` per token.

    Args:
        rng: Source of randomness; the sampler is its only user.
        temperature: Divides the logits; above 0.
        top_k: Keep the tokens that are as likely as the k-th most likely one.
        top_p: Then keep the fewest most likely tokens whose probabilities sum to this.
        min_p: Then keep tokens at least this many times as likely as the most likely.
    """

    def sample(logits: NDArray[np.float32]) -> int:
        # Candidates are ids and scores; each filter leaves fewer. The best score is 0, and what
        # a tiny temperature makes of the others, minus infinity at worst, is right.
        with np.errstate(over="ignore"):
            scores = (logits.astype(np.float64) - logits.max()) / temperature
        ids: NDArray[np.int64] = np.arange(len(scores))
        if top_k is not None:
            kept = keep_top_k(scores, top_k)
            ids, scores = ids[kept], scores[kept]
        if top_p is not None:
            kept = keep_top_p(scores, top_p)
            ids, scores = ids[kept], scores[kept]
        if min_p is not None:
            kept = keep_min_p(scores, min_p)
            ids, scores = ids[kept], scores[kept]
        cumulative = np.exp(scores).cumsum()
        # At most (1 - 2**-53) times the sum, which rounds to less than the sum.
        point = rng.random() * cumulative[-1]
        return int(ids[np.searchsorted(cumulative, point, side="right")])

    return sample


def keep_top_k(scores: NDArray[np.float64], k: int) -> NDArray[np.int64]:
    """Indices of the scores that are not below the k-th largest; all its equals stay."""
    if k >= len(scores):
        return np.arange(len(scores))
    return np.flatnonzero(scores >= np.partition(scores, -k)[-k])


def keep_top_p(scores: NDArray[np.float64], p: float) -> NDArray[np.int64]:
    """Indices of the fewest largest scores whose probabilities sum to `p` or more.

    The probabilities are the softmax of `scores`, whose maximum is 0.
    """
    if p >= 1:
        return np.arange(len(scores))
    weights = np.exp(scores)
    needed = p * weights.sum()
    count = _FIRST_SORTED
    # A nucleus is mostly small: sort the best few, and more only if they do not suffice.
    while True:
        count = min(count, len(scores))
        best = np.argpartition(weights, -count)[-count:]
        best = best[np.argsort(-weights[best], kind="stable")]
        cumulative = weights[best].cumsum()
        if cumulative[-1] >= needed or count == len(scores):
            break
        count *= 8
    return best[: int(np.searchsorted(cumulative, needed)) + 1]


def keep_min_p(scores: NDArray[np.float64], p: float) -> NDArray[np.int64]:
    """Indices of the tokens at least `p` times as likely as the most likely one."""
    if p == 0:
        return np.arange(len(scores))
    return np.flatnonzero(scores >= scores.max() + np.log(p))


def log_probabilities(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Natural logarithms of all tokens' probabilities: those of the softmax of `logits`, `[V]`."""
    shifted = logits.astype(np.float64) - logits.max()
    scores: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum())
    return scores


def largest(scores: NDArray[np.float64], count: int) -> NDArray[np.int64]:
    """Indices of the largest scores, the largest first; of equals the lowest index first."""
    candidates = keep_top_k(scores, count)
    return candidates[np.argsort(-scores[candidates], kind="stable")][:count]
