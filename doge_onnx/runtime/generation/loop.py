"""The generation loop: prefill, then one token per sequence and step.

Knows how a batch of unequal prompts is fed and that its sequences end one by one. What runs the
model is a parameter; how tokens are chosen and when a sequence ends is the sequence's own affair.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from doge_onnx.runtime.engine.runner import Best, Runner
from doge_onnx.runtime.engine.state import State
from doge_onnx.runtime.generation.output import Piece
from doge_onnx.runtime.generation.sequence import GeneratedSequence

# Any id does, since its mask keeps everything from seeing it.
_PADDING_ID = 0


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


def generate_pieces(
    runner: Runner, sequences: Sequence[GeneratedSequence], memory: Memory | None = None
) -> Generator[tuple[int, Piece], None, None]:
    """Generate until every sequence has ended; the first step is the prefill of the prompts.

    Each sequence gets the tokens that it would get alone: what belongs to the others, and
    what it is fed after its own end, is padding to it.

    Args:
        runner: Runs the model.
        sequences: None of which has begun.
        memory: Of a single sequence: what is in it of the prompt is not fed again, and it is
            brought up to date at the end, also if the consumer closes this before.

    Yields:
        Each piece with the number of the sequence that it belongs to.
    """
    for number, sequence in enumerate(sequences):
        if sequence.max_new_tokens == 0:
            yield number, sequence.no_room()
    if all(sequence.finish_reason for sequence in sequences):
        return
    first = sequences[0]
    state = None if memory is None else memory.take(runner, first.prompt)
    if state is not None:
        first.cached_tokens = state.length
    ids, mask = left_pad([sequence.prompt[sequence.cached_tokens :] for sequence in sequences])
    started = time.perf_counter()
    logits, state = runner.step(
        ids,
        mask,
        state,
        last_only=True,
        # The last token that is chosen is not fed. What follows another run is not known.
        follow=max(each.max_new_tokens for each in sequences) - 1 if memory is None else None,
    )
    scores: Sequence[NDArray[np.float32] | Best] = list(logits[:, -1])
    best = _candidates(sequences)
    decoder = runner.decoder(state)
    del logits, state
    fed = list(first.prompt)
    # Closed by a consumer that has had enough, it ends as if the sequences had ended here.
    with contextlib.suppress(GeneratorExit):
        while True:
            running = [n for n, each in enumerate(sequences) if each.finish_reason is None]
            for number in running:
                decoder.tokens[number, 0] = sequences[number].choose(scores[number])
            # Their memory serves the next step if nothing refers to it.
            del scores
            seconds = time.perf_counter() - started
            for number in running:
                yield number, sequences[number].accept(seconds)
            going_on = np.array([each.finish_reason is None for each in sequences], np.int64)
            if not going_on.any():
                break
            started = time.perf_counter()
            token_id = int(decoder.tokens[0, 0])
            scores = decoder.step(None if going_on.all() else going_on[:, None], best)
            fed.append(token_id)
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


def _candidates(sequences: Sequence[GeneratedSequence]) -> int | None:
    """How many of the largest logits all sequences together look at; None for all."""
    counts = [sequence.candidates for sequence in sequences]
    return None if None in counts else max(count for count in counts if count is not None)
