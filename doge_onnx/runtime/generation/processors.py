"""Logits processors: change the logits of one sequence before a token is chosen.

Knows each processor and their order: logit bias, repetition penalty, presence penalty, frequency
penalty, repeated n-grams, fewest new tokens, and then the caller's own. Semantics and order are
those of Hugging Face transformers; the presence and frequency penalties, which transformers lacks,
follow OpenAI's API. Does not know the model or how a token is chosen (`sampling`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from doge_onnx.runtime.generation.config import GenerationConfig


class LogitsProcessor(Protocol):
    """A callable that changes the logits of the next token of one sequence."""

    def __call__(
        self, tokens: NDArray[np.int64], logits: NDArray[np.float32], /
    ) -> NDArray[np.float32]:
        """Change logits.

        Args:
            tokens: All token ids of the sequence so far, prompt included, int64 `[S]`. Read-only,
                and valid only during the call.
            logits: float32 `[V]`; the processor may change them in place.

        Returns:
            Logits `[V]`; minus infinity rules a token out.
        """
        ...


def make_processors(
    options: GenerationConfig, prompt_length: int, eos_token_ids: Collection[int]
) -> tuple[LogitsProcessor, ...]:
    """The processors that the options of one sequence ask for, in the order of application.

    Args:
        options: The options of the sequence.
        prompt_length: Number of tokens of its prompt.
        eos_token_ids: Tokens that end a text.
    """
    result: list[LogitsProcessor] = []
    if options.logit_bias:
        result.append(logit_bias(options.logit_bias))
    if options.repetition_penalty not in (None, 1):
        result.append(repetition_penalty(options.repetition_penalty))
    if options.presence_penalty:
        result.append(presence_penalty(options.presence_penalty, prompt_length))
    if options.frequency_penalty:
        result.append(frequency_penalty(options.frequency_penalty, prompt_length))
    if options.no_repeat_ngram_size:
        result.append(no_repeat_ngrams(options.no_repeat_ngram_size))
    if options.min_new_tokens and eos_token_ids:
        result.append(min_new_tokens(options.min_new_tokens, prompt_length, eos_token_ids))
    return (*result, *(options.processors or ()))


def logit_bias(biases: Mapping[int, float]) -> LogitsProcessor:
    """A processor that adds a number to the logits of some tokens, by their ids."""
    ids = np.array(list(biases), np.int64)
    values = np.array(list(biases.values()), np.float32)

    def process(tokens: NDArray[np.int64], logits: NDArray[np.float32]) -> NDArray[np.float32]:
        logits[ids] += values
        return logits

    return process


def repetition_penalty(penalty: float) -> LogitsProcessor:
    """A processor that makes every token of the sequence so far less likely.

    Positive logits of such tokens are divided by `penalty`, negative ones multiplied.
    """

    def process(tokens: NDArray[np.int64], logits: NDArray[np.float32]) -> NDArray[np.float32]:
        # An id that occurs twice is written twice, with the same value.
        seen = logits[tokens]
        logits[tokens] = np.where(seen < 0, seen * penalty, seen / penalty)
        return logits

    return process


def presence_penalty(penalty: float, prompt_length: int) -> LogitsProcessor:
    """A processor that subtracts `penalty` from the logits of tokens generated before."""

    def process(tokens: NDArray[np.int64], logits: NDArray[np.float32]) -> NDArray[np.float32]:
        generated = tokens[prompt_length:]
        # As above: an id that occurs twice is written twice, with the same value.
        logits[generated] = logits[generated] - np.float32(penalty)
        return logits

    return process


def frequency_penalty(penalty: float, prompt_length: int) -> LogitsProcessor:
    """A processor that subtracts `penalty` times how often a token was generated before."""

    def process(tokens: NDArray[np.int64], logits: NDArray[np.float32]) -> NDArray[np.float32]:
        ids, counts = np.unique(tokens[prompt_length:], return_counts=True)
        logits[ids] -= (penalty * counts).astype(np.float32)
        return logits

    return process


def no_repeat_ngrams(size: int) -> LogitsProcessor:
    """A processor that rules out tokens that would repeat `size` consecutive tokens."""

    def process(tokens: NDArray[np.int64], logits: NDArray[np.float32]) -> NDArray[np.float32]:
        if len(tokens) < size:
            return logits
        grams = np.lib.stride_tricks.sliding_window_view(tokens, size)
        last = tokens[len(tokens) - size + 1 :]
        logits[grams[(grams[:, :-1] == last).all(axis=1), -1]] = -np.inf
        return logits

    return process


def min_new_tokens(
    count: int, prompt_length: int, eos_token_ids: Collection[int]
) -> LogitsProcessor:
    """A processor that rules out end-of-text tokens until `count` tokens are generated."""
    ids = np.array(sorted(eos_token_ids), np.int64)

    def process(tokens: NDArray[np.int64], logits: NDArray[np.float32]) -> NDArray[np.float32]:
        if len(tokens) - prompt_length < count:
            # The bundle's files may name ids that the vocabulary does not have.
            logits[ids[ids < len(logits)]] = -np.inf
        return logits

    return process
