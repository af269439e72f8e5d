"""The generation loop: prefill, then one token for each sequence at a time.

Knows in which order the sequences of a batch are fed, and that they end one by one. Does not know
how a sequence chooses a token and when it ends (`sequence`), or how the model is run (`runner`).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Generator, Sequence

import numpy as np

from doge_onnx.errors import NotEnoughMemoryError
from doge_onnx.runtime.engine.runner import PositionLogits, Runner
from doge_onnx.runtime.generation.output import Piece
from doge_onnx.runtime.generation.prefix_cache import PrefixCache
from doge_onnx.runtime.generation.sequence import GeneratedSequence


def generate_pieces(
    runner: Runner,
    sequences: Sequence[GeneratedSequence],
    prefix_cache: PrefixCache | None = None,
) -> Generator[tuple[int, Piece], None, None]:
    """Feed all prompts, then generate until all sequences have ended.

    Each sequence gets the tokens that it would get alone, but for rounding; see
    `Model.generate_batch`.

    Args:
        runner: Runs the model.
        sequences: The sequences of the batch.
        prefix_cache: For a single sequence only: the beginning of the prompt that the cache holds
            is not fed again. The cache is updated at the end, even if the consumer closes the
            generator early.

    Yields:
        The number of a sequence and its next piece.
    """
    for number, sequence in enumerate(sequences):
        if sequence.max_new_tokens == 0:
            yield number, sequence.no_room()
    # Sorted by length, because the runner feeds neighbours of similar length together.
    numbers = [number for number, one in enumerate(sequences) if one.max_new_tokens > 0]
    numbers.sort(key=lambda number: len(sequences[number].prompt))
    if not numbers:
        return
    batch = [sequences[number] for number in numbers]
    state = None if prefix_cache is None else prefix_cache.take(runner, batch[0].prompt)
    if state is not None:
        batch[0].cached_tokens = int(state.lengths[0])
    started = time.perf_counter()
    logits, state = runner.forward(
        [np.array(one.prompt[one.cached_tokens :], np.int64) for one in batch],
        state,
        last_only=True,
        # With a prefix cache, later calls may go on from this state. Else no more tokens than these
        # will be fed: the last token that is chosen is not.
        max_tokens=None
        if prefix_cache is not None
        else max(len(one.prompt) + one.max_new_tokens - 1 for one in batch),
    )
    scores: Sequence[PositionLogits] = [row[-1] for row in logits]
    session = runner.decode(state)
    del logits, state
    fed = list(batch[0].prompt)
    # A consumer that closes the generator ends all sequences here.
    with contextlib.suppress(GeneratorExit):
        while True:
            rows = list(session.rows)
            chosen = [batch[row].choose(one) for row, one in zip(rows, scores, strict=True)]
            seconds = time.perf_counter() - started
            for row in rows:
                yield numbers[row], batch[row].accept(seconds)
            started = time.perf_counter()
            ended = [row for row in rows if batch[row].finish_reason is not None]
            if len(ended) == len(rows):
                break
            if ended:
                session.remove(ended)
            tokens = dict(zip(rows, chosen, strict=True))
            top = _top([batch[row] for row in session.rows])
            try:
                scores = session.step([tokens[row] for row in session.rows], top)
            except NotEnoughMemoryError:
                raise
            # A state that grows needs more of it.
            except MemoryError as error:
                raise runner.no_memory(error) from error
            fed.append(chosen[0])
    if prefix_cache is not None:
        prefix_cache.put(fed, session.end())


def _top(sequences: Sequence[GeneratedSequence]) -> int | None:
    """The most logits that any of the sequences needs, largest first; None for all logits."""
    counts = [sequence.candidates for sequence in sequences]
    return None if None in counts else max(count for count in counts if count is not None)
