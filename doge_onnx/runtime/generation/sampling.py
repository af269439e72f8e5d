"""Samplers: choose one token from the logits of one position.

Knows samplers, which are plain callables for one sequence, so that a caller may bring one.
Semantics and order of the filters are those of Hugging Face transformers: temperature, top-H
(Potraghloo et al. 2025), top-k (Fan et al. 2018), top-p (Holtzman et al. 2020), min-p (Nguyen et
al. 2024), typical sampling (Meister et al. 2022), epsilon and eta sampling (Hewitt et al. 2022).
Does not know the model, the state, or what changed the logits before (`processors`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from doge_onnx.runtime.generation.config import GenerationConfig

# How many of the most likely candidates top-p sorts before it tries more.
_FIRST_SORTED = 64
# How many of the most likely candidates top-H looks at.
_TOP_H_CANDIDATES = 100


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
        options: Must have a temperature or a sampler.
        number: Number of the sequence in its batch; each draws its own random numbers.
    """
    if options.sampler is not None:
        return options.sampler
    if not options.temperature:
        return greedy
    rng = np.random.default_rng(None if options.seed is None else [options.seed, number])
    given = options.given()
    filters = {name: value for name, value in given.items() if name in FILTERS}
    return make_sampler(rng, options.temperature, filters)


def greedy(logits: NDArray[np.float32]) -> int:
    """The most likely token; of several equally likely ones, that of the lowest id."""
    return int(logits.argmax())


def make_sampler(
    rng: np.random.Generator, temperature: float, filters: Mapping[str, Any] | None = None
) -> Sampler:
    """A sampler that draws one number from `rng` per token.

    Args:
        rng: Source of random numbers, for this sampler only.
        temperature: Divides the logits; above 0.
        filters: Values of some of `FILTERS`, by name. Each sees what those before it in `FILTERS`
            have kept.
    """
    values = filters or {}
    chosen = [(keep, values[name]) for name, keep in FILTERS.items() if name in values]

    def sample(logits: NDArray[np.float32]) -> int:
        # Each filter keeps fewer candidates, which are ids and scores. The best score is 0. With a
        # tiny temperature the others may overflow to minus infinity, which is right.
        with np.errstate(over="ignore"):
            scores = (logits.astype(np.float64) - logits.max()) / temperature
        ids: NDArray[np.int64] = np.arange(len(scores))
        for keep, value in chosen:
            kept = keep(scores, value)
            ids, scores = ids[kept], scores[kept]
        cumulative = np.exp(scores).cumsum()
        # At most (1 - 2**-53) times the sum, which rounds to less than the sum.
        point = rng.random() * cumulative[-1]
        return int(ids[np.searchsorted(cumulative, point, side="right")])

    return sample


def keep_top_k(scores: NDArray[np.float64], k: int) -> NDArray[np.int64]:
    """Indices of the scores that are not below the k-th largest; more than k if some are equal.

    A `k` of 0 keeps all.
    """
    if k == 0 or k >= len(scores):
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
    # Few tokens mostly suffice, so the most likely ones are sorted first, and more only if needed.
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


def keep_typical_p(scores: NDArray[np.float64], p: float) -> NDArray[np.int64]:
    """Indices of the tokens closest to the expected surprise whose probabilities sum to `p`."""
    if p >= 1:
        return np.arange(len(scores))
    logarithms = _normalized(scores)
    probabilities = np.exp(logarithms)
    with np.errstate(invalid="ignore"):
        distances = np.abs(logarithms - np.nansum(logarithms * probabilities))
    order = np.argsort(distances, kind="stable")
    last = int((probabilities[order].cumsum() < p).sum())
    return np.flatnonzero(distances <= distances[order[min(last, len(order) - 1)]])


def keep_top_h(scores: NDArray[np.float64], h: float) -> NDArray[np.int64]:
    """Indices of the most likely tokens that have at most `h` times the entropy together.

    Of the 100 most likely tokens, whose probabilities are scaled to sum to 1; at least one.
    """
    best = largest(scores, _TOP_H_CANDIDATES)
    probabilities = np.exp(_normalized(scores[best]))
    # Those of probability 0 are the last ones.
    best = best[: np.count_nonzero(probabilities)]
    probabilities = probabilities[: len(best)]
    entropy = (-probabilities * np.log(probabilities)).cumsum()
    return best[: max(1, int((entropy <= h * entropy[-1]).sum()))]


def keep_epsilon(scores: NDArray[np.float64], epsilon: float) -> NDArray[np.int64]:
    """Indices of the tokens of probability `epsilon` or more, and of the most likely ones."""
    probabilities = np.exp(_normalized(scores))
    return np.flatnonzero((probabilities >= epsilon) | (scores >= scores.max()))


def keep_eta(scores: NDArray[np.float64], epsilon: float) -> NDArray[np.int64]:
    """Indices of the tokens that are no less likely than a bound, and of the most likely ones.

    The bound is the lesser of `epsilon` and sqrt(epsilon) exp(-entropy).
    """
    logarithms = _normalized(scores)
    with np.errstate(invalid="ignore"):
        entropy = -np.nansum(logarithms * np.exp(logarithms))
    return keep_epsilon(scores, min(epsilon, float(np.sqrt(epsilon) * np.exp(-entropy))))


def _normalized(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """Logarithms of the softmax of scores."""
    shifted = scores - scores.max()
    result: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum())
    return result


# What each option that filters keeps, in the order in which they apply.
FILTERS: dict[str, Callable[[NDArray[np.float64], Any], NDArray[np.int64]]] = {
    "top_h": keep_top_h,
    "top_k": keep_top_k,
    "top_p": keep_top_p,
    "min_p": keep_min_p,
    "typical_p": keep_typical_p,
    "epsilon_cutoff": keep_epsilon,
    "eta_cutoff": keep_eta,
}


def candidates(options: GenerationConfig) -> int | None:
    """How many of the largest logits the options look at, besides those equal to the smallest.

    Args:
        options: Must have a temperature or a sampler; without logits processors.

    Returns:
        None for all of them.
    """
    if options.sampler is not None:
        return None
    if not options.temperature:
        return 1
    # The first filter alone sees all tokens.
    return options.top_k or None if options.top_h is None else _TOP_H_CANDIDATES


def log_probabilities(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Natural logarithms of the softmax of `logits` `[V]`, computed in float64."""
    return _normalized(logits.astype(np.float64))


def largest(scores: NDArray[np.float64], count: int) -> NDArray[np.int64]:
    """Indices of the `count` largest scores, largest first; equal scores in order of index."""
    candidates = keep_top_k(scores, count)
    return candidates[np.argsort(-scores[candidates], kind="stable")][:count]
