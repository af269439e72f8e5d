"""The generation loop: prefill, then one token per sequence and step.

Knows how a batch of unequal prompts is fed and that its sequences end one by one. What
runs the model and what chooses tokens are parameters. Does not know text, stop
conditions, or where options come from: whoever consumes the steps ends a sequence.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from doge_onnx.runtime.sampling import LogitsProcessor, Sampler, log_probability
from doge_onnx.runtime.step import Stepper

# Any id does, since its mask keeps everything from seeing it.
_PADDING_ID = 0


@dataclass
class Row:
    """One sequence of a batch.

    Attributes:
        prompt: Token ids, at least one.
        max_new_tokens: Most tokens to generate; those fit into the context.
        sampler: Chooses a token from the logits.
        processors: Applied to the logits first, in this order.
        running: Whether more tokens are wanted. The loop clears it at `max_new_tokens`;
            the consumer clears it to end the sequence before.
    """

    prompt: Sequence[int]
    max_new_tokens: int
    sampler: Sampler
    processors: Sequence[LogitsProcessor] = ()
    running: bool = True


class Step(NamedTuple):
    """What one step chose.

    Attributes:
        tokens: For each running row: its number, the token, and the natural logarithm of
            the token's probability under the model's own distribution, if asked for.
        seconds: Time for running the model and choosing.
    """

    tokens: list[tuple[int, int, float | None]]
    seconds: float


def generate_steps(stepper: Stepper, rows: Sequence[Row], logprobs: bool = False) -> Iterator[Step]:
    """Generate until no row is running; the first step is the prefill of the prompts.

    Each row gets the tokens that it would get alone: what belongs to the others, and
    what it is fed after its own end, is padding to it.
    """
    for row in rows:
        row.running = row.running and row.max_new_tokens > 0
    if not any(row.running for row in rows):
        return
    ids, mask = left_pad([row.prompt for row in rows])
    histories = [_History(row) for row in rows]
    started = time.perf_counter()
    logits, state = stepper.step(
        ids,
        mask,
        None,
        last_only=True,
        # The last token that is chosen is not fed.
        follow=max(row.max_new_tokens for row in rows) - 1,
    )
    scores: Sequence[NDArray[np.float32]] = list(logits[:, -1])
    decoder = stepper.decoder(state)
    del logits, state
    count = 0
    while True:
        count += 1
        tokens: list[tuple[int, int, float | None]] = []
        for number, row in enumerate(rows):
            if not row.running:
                continue
            token_id, logprob = _choose(row, histories[number], scores[number], logprobs)
            decoder.tokens[number, 0] = token_id
            tokens.append((number, token_id, logprob))
            row.running = count < row.max_new_tokens
        # Their memory serves the next step if nothing refers to it.
        del scores
        yield Step(tokens, time.perf_counter() - started)
        running = [row.running for row in rows]
        if not any(running):
            return
        started = time.perf_counter()
        scores = decoder.step(None if all(running) else np.array(running, np.int64)[:, None])


def left_pad(
    prompts: Sequence[Sequence[int]],
) -> tuple[NDArray[np.int64], NDArray[np.int64] | None]:
    """Prompts as one matrix, so that all end together; its mask, or None if none is padded."""
    longest = max(len(prompt) for prompt in prompts)
    ids = np.full((len(prompts), longest), _PADDING_ID, np.int64)
    mask = np.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = prompt
        mask[row, longest - len(prompt) :] = 1
    return ids, None if mask.all() else mask


def _choose(
    row: Row, history: _History, logits: NDArray[np.float32], logprobs: bool
) -> tuple[int, float | None]:
    if not row.processors:
        token_id = row.sampler(logits)
    else:
        scores = logits.copy()
        for process in row.processors:
            scores = process(history.tokens, scores)
        token_id = row.sampler(scores)
        history.append(token_id)
    return token_id, log_probability(logits, token_id) if logprobs else None


class _History:
    """The tokens of a row so far, prompt included, in one array that is never copied."""

    def __init__(self, row: Row) -> None:
        self._tokens = np.empty(len(row.prompt) + row.max_new_tokens, np.int64)
        self._count = len(row.prompt)
        self._tokens[: self._count] = row.prompt

    @property
    def tokens(self) -> NDArray[np.int64]:
        return self._tokens[: self._count]

    def append(self, token_id: int) -> None:
        self._tokens[self._count] = token_id
        self._count += 1
