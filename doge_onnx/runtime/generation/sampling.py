"""From the logits of one position to one token id.

Knows logits processors and samplers, both of which work on one sequence and are plain
callables, so that a caller may add their own. Semantics and order are those of Hugging
Face transformers: repetition penalty, temperature, top-k, top-p, min-p. Does not know
the model, the state, or where options come from.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

# (all token ids of the sequence so far, logits [V]) -> logits [V]. The logits may be changed.
LogitsProcessor = Callable[[NDArray[np.int64], NDArray[np.float32]], NDArray[np.float32]]
# logits [V] -> token id
Sampler = Callable[[NDArray[np.float32]], int]

# How many of the best candidates top-p sorts first, before it tries more.
_FIRST_SORTED = 64


def greedy(logits: NDArray[np.float32]) -> int:
    """The most likely token; of equals the one with the lowest id."""
    return int(logits.argmax())


def repetition_penalty(penalty: float) -> LogitsProcessor:
    """A processor that makes every token of the sequence so far less likely.

    Positive logits of such tokens are divided by `penalty`, negative ones multiplied.
    """

    def process(tokens: NDArray[np.int64], logits: NDArray[np.float32]) -> NDArray[np.float32]:
        # Repeated ids are read and written several times, always with the same value.
        seen = logits[tokens]
        logits[tokens] = np.where(seen < 0, seen * penalty, seen / penalty)
        return logits

    return process


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


def log_probability(logits: NDArray[np.float32], token_id: int) -> float:
    """Natural logarithm of a token's probability under the softmax of `logits`."""
    shifted = logits.astype(np.float64) - logits.max()
    return float(shifted[token_id] - np.log(np.exp(shifted).sum()))
