"""The generation loop: prefill, then one token per sequence and step.

Knows how a batch of unequal prompts is fed and that its sequences end one by one. What
runs the model and what chooses tokens are parameters. Does not know text, stop
conditions, or where options come from: whoever consumes the steps ends a sequence.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from doge_onnx.runtime.engine.runner import Best, Runner
from doge_onnx.runtime.engine.state import State
from doge_onnx.runtime.generation.sampling import LogitsProcessor, Sampler, log_probability

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
        candidates: How many of the largest logits the sampler looks at, and those that equal
            the least of them; None for all. Only where there are no processors.
        running: Whether more tokens are wanted. The loop clears it at `max_new_tokens`;
            the consumer clears it to end the sequence before.
        cached: How many tokens of the prompt were not fed because a `Memory` had them.
    """

    prompt: Sequence[int]
    max_new_tokens: int
    sampler: Sampler
    processors: Sequence[LogitsProcessor] = ()
    candidates: int | None = None
    running: bool = True
    cached: int = 0


@dataclass
class Memory:
    """What one sequence was fed, and the state after it, from one run to the next.

    Attributes:
        tokens: Token ids.
        state: None if there are none.
    """

    tokens: Sequence[int] = ()
    state: State | None = None

    def take(self, runner: Runner, prompt: Sequence[int]) -> State | None:
        """The state after the first tokens of a prompt, as many as are known.

        The last token is never among them: its logits are wanted. What is taken is gone from
        here, so that a run which fails leaves nothing half-right behind.
        """
        tokens, state = self.tokens, self.state
        self.tokens, self.state = (), None
        known = next(
            (i for i, (a, b) in enumerate(zip(tokens, prompt[:-1], strict=False)) if a != b),
            min(len(tokens), len(prompt) - 1),
        )
        if state is None or known == 0:
            return None
        return state if known == len(tokens) else runner.rewind(state, known)


class Step(NamedTuple):
    """What one step chose.

    Attributes:
        tokens: For each running row: its number, the token, and the natural logarithm of
            the token's probability under the model's own distribution, if asked for.
        seconds: Time for running the model and choosing.
    """

    tokens: list[tuple[int, int, float | None]]
    seconds: float


def generate_steps(
    runner: Runner, rows: Sequence[Row], logprobs: bool = False, memory: Memory | None = None
) -> Generator[Step, None, None]:
    """Generate until no row is running; the first step is the prefill of the prompts.

    Each row gets the tokens that it would get alone: what belongs to the others, and
    what it is fed after its own end, is padding to it.

    Args:
        runner: Runs the model.
        rows: The sequences.
        logprobs: Whether to compute them.
        memory: Of a single row: what is in it of the prompt is not fed again, and it is brought
            up to date at the end, also if the consumer closes this before.
    """
    for row in rows:
        row.running = row.running and row.max_new_tokens > 0
    if not any(row.running for row in rows):
        return
    state = None if memory is None else memory.take(runner, rows[0].prompt)
    if state is not None:
        rows[0].cached = state.length
    ids, mask = left_pad([row.prompt[row.cached :] for row in rows])
    histories = [_History(row) for row in rows]
    started = time.perf_counter()
    logits, state = runner.step(
        ids,
        mask,
        state,
        last_only=True,
        # The last token that is chosen is not fed. What follows another run is not known.
        follow=max(row.max_new_tokens for row in rows) - 1 if memory is None else None,
    )
    scores: Sequence[NDArray[np.float32] | Best] = list(logits[:, -1])
    best = None if logprobs else _candidates(rows)
    decoder = runner.decoder(state)
    del logits, state
    fed = list(rows[0].prompt)
    count = 0
    # Closed by a consumer that has had enough, it ends as if the sequences had ended here.
    with contextlib.suppress(GeneratorExit):
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
                break
            started = time.perf_counter()
            ended = None if all(running) else np.array(running, np.int64)[:, None]
            scores = decoder.step(ended, best)
            fed.append(tokens[0][1])
    if memory is not None:
        memory.tokens, memory.state = fed, decoder.end()


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


def _candidates(rows: Sequence[Row]) -> int | None:
    """How many of the largest logits all samplers together look at; None for all."""
    counts = [None if row.processors else row.candidates for row in rows]
    return None if None in counts else max(count for count in counts if count is not None)


def _choose(
    row: Row, history: _History, logits: NDArray[np.float32] | Best, logprobs: bool
) -> tuple[int, float | None]:
    if isinstance(logits, Best):
        return int(logits.ids[row.sampler(logits.logits)]), None
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
