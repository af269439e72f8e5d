"""Feed sequences at random, and compare with what each gets alone."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from doge_onnx.runtime.engine.runner import Runner
from doge_onnx.runtime.engine.state import State

Truth = Callable[[list[int]], NDArray[np.floating]]
# Tokens of a turn, at most.
_MOST = 70


def feed_at_random(
    runner: Runner,
    truth: Truth,
    vocab_size: int,
    context_length: int,
    tolerance: float,
    seed: int,
    turns: int = 6,
) -> None:
    """Feed batches in some turns, and decode in between.

    Args:
        runner: What is looked at.
        truth: Logits `[S, V]` of one text.
        vocab_size: Of its tokens.
        context_length: Most tokens of a sequence.
        tolerance: Most by which a logit may differ.
        seed: Of all that is random.
        turns: How often states are continued.

    Raises:
        AssertionError: A sequence does not get what it gets alone.
    """
    rng = np.random.default_rng(seed)
    batch = int(rng.integers(2, 6))
    # States that may be continued again, and the texts that they are of.
    known: list[tuple[State | None, list[list[int]]]] = [(None, [[] for _ in range(batch)])]
    expected: dict[tuple[int, ...], NDArray[np.floating]] = {}

    def check(logits: NDArray[np.float32], text: list[int]) -> None:
        """Compare the logits `[S, V]` of the last tokens of a text."""
        if not len(logits):
            return
        key = tuple(text)
        if key not in expected:
            expected[key] = truth(text)
        np.testing.assert_allclose(logits, expected[key][-len(logits) :], atol=tolerance)

    def tokens(count: int) -> list[int]:
        return rng.integers(0, vocab_size, count).tolist()

    for _ in range(turns):
        # The newest state more often than others.
        state, texts = known[-1] if rng.random() < 0.6 else known[rng.integers(len(known))]
        room = [context_length - len(text) for text in texts]
        most = int(rng.choice([1, 4, _MOST]))
        counts = [int(rng.integers(0, min(most, left) + 1)) for left in room]
        if not any(counts):
            counts = [min(1, left) for left in room]
        new = [tokens(count) for count in counts]
        last_only = bool(rng.integers(2))
        ids = [np.array(each, np.int64) for each in new]
        ends = [len(text) + count for text, count in zip(texts, counts, strict=True)]
        planned = max(ends) + 5 if rng.integers(2) else None
        logits, state = runner.forward(ids, state, last_only, max_tokens=planned)
        texts = [text + each for text, each in zip(texts, new, strict=True)]
        for rows, each, text in zip(logits, new, texts, strict=True):
            assert len(rows) == (min(1, len(each)) if last_only else len(each))
            check(rows, text)
        assert state.lengths.tolist() == ends
        known.append((state, texts))
        if max(ends) + 12 <= context_length and min(ends) > 0:
            _decode(runner, known, tokens, check, rng)


def _decode(runner, known, tokens, check, rng) -> None:
    """Decode from the newest state; sequences may end one after another."""
    # A session has its state for itself, so it gets one that nobody else has.
    state, texts = known[-1]
    new = [tokens(1) for _ in texts]
    logits, state = runner.forward([np.array(ids) for ids in new], state, last_only=True)
    texts = [text + ids for text, ids in zip(texts, new, strict=True)]
    for rows, text in zip(logits, texts, strict=True):
        check(rows, text)
    session = runner.decode(state)
    ends = bool(rng.integers(2))
    for _ in range(int(rng.integers(0, 10))):
        if ends and len(session.rows) > 1 and rng.random() < 0.4:
            count = int(rng.integers(1, len(session.rows)))
            leaving = rng.choice(session.rows, count, replace=False).tolist()
            stay = set(session.rows) - set(leaving)
            session.remove(leaving)
            assert set(session.rows) == stay
        ids = tokens(len(session.rows))
        for row, token in zip(session.rows, ids, strict=True):
            texts[row] = [*texts[row], token]
        for row, scores in zip(session.rows, session.step(ids), strict=True):
            check(scores[np.newaxis], texts[row])
    if len(session.rows) == len(texts):
        known.append((session.end(), texts))
