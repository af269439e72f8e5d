"""The generation loop: prefill, then one token per sequence and step.

Knows how a batch of unequal prompts is fed and that its sequences end one by one. What
runs the model and what chooses tokens are parameters. Does not know text, stop
conditions, or where options come from: whoever consumes the steps ends a sequence.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from doge_onnx.runtime.sampling import LogitsProcessor, Sampler, log_probability
from doge_onnx.runtime.state import State
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


@dataclass(frozen=True)
class Step:
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
    ids, mask = left_pad([row.prompt for row in rows])
    histories = [_History(row) for row in rows]
    state: State | None = None
    while any(row.running for row in rows):
        started = time.perf_counter()
        scores = None
        logits, state = stepper.step(ids, mask, state, last_only=True, consume=True)
        ids = np.full((len(rows), 1), _PADDING_ID, np.int64)
        tokens: list[tuple[int, int, float | None]] = []
        for number, row in enumerate(rows):
            if not row.running:
                continue
            scores = logits[number, -1]
            history = histories[number]
            token_id, logprob = _choose(row, history.tokens, scores, logprobs)
            history.append(token_id)
            ids[number, 0] = token_id
            tokens.append((number, token_id, logprob))
            row.running = history.new < row.max_new_tokens
        # Their memory serves the next step if nothing refers to it.
        del logits, scores
        yield Step(tokens, time.perf_counter() - started)
        running = [row.running for row in rows]
        mask = None if all(running) else np.array(running, np.int64)[:, None]


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
    row: Row, history: NDArray[np.int64], logits: NDArray[np.float32], logprobs: bool
) -> tuple[int, float | None]:
    scores = logits.copy() if row.processors else logits
    for process in row.processors:
        scores = process(history, scores)
    token_id = row.sampler(scores)
    return token_id, log_probability(logits, token_id) if logprobs else None


class _History:
    """The tokens of a row so far, prompt included, in one array that is never copied."""

    def __init__(self, row: Row) -> None:
        self._prompt = len(row.prompt)
        self._tokens = np.empty(self._prompt + row.max_new_tokens, np.int64)
        self._tokens[: self._prompt] = row.prompt
        self.new = 0

    @property
    def tokens(self) -> NDArray[np.int64]:
        return self._tokens[: self._prompt + self.new]

    def append(self, token_id: int) -> None:
        self._tokens[self._prompt + self.new] = token_id
        self.new += 1
