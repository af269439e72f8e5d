"""Logits processors: change the logits of one sequence before a token is chosen.

Knows each processor and their order, with the caller's own as the last. Semantics and order are
those of Hugging Face transformers; the presence and frequency penalties, which transformers lacks,
follow OpenAI's API. Does not know the model or how a token is chosen (`sampling`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Protocol, cast

import numpy as np
from numpy.typing import NDArray

from doge_onnx.runtime.generation.config import GenerationConfig
from doge_onnx.runtime.generation.option import LARGEST_SUMMAND


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
    options: GenerationConfig,
    prompt: Sequence[int],
    max_new_tokens: int,
    end_token_ids: Collection[int],
) -> tuple[LogitsProcessor, ...]:
    """The processors that the options of one sequence ask for, in the order of application.

    Args:
        options: The options of the sequence.
        prompt: Token ids of its prompt.
        max_new_tokens: Most tokens that it will get.
        end_token_ids: Tokens that end its text.
    """
    length = len(prompt)
    # As `GenerationConfig` stores them.
    biases = cast("tuple[tuple[tuple[int, ...], float], ...] | None", options.sequence_bias)
    # A prompt of one token is the token that begins a text.
    first = cast("tuple[int, ...] | None", options.forced_bos_token_id) if length == 1 else None
    last = cast("tuple[int, ...] | None", options.forced_eos_token_id)
    fewest = options.min_new_tokens
    if fewest is None:
        fewest = (options.min_length or 0) - length
    result: list[LogitsProcessor] = []
    if options.logit_bias:
        result.append(logit_bias(options.logit_bias))
    if biases:
        result.append(sequence_bias(biases))
    if options.encoder_repetition_penalty not in (None, 1):
        result.append(encoder_repetition_penalty(options.encoder_repetition_penalty, prompt))
    if options.repetition_penalty not in (None, 1):
        result.append(repetition_penalty(options.repetition_penalty))
    if options.presence_penalty:
        result.append(presence_penalty(options.presence_penalty, length))
    if options.frequency_penalty:
        result.append(frequency_penalty(options.frequency_penalty, length))
    if options.no_repeat_ngram_size:
        result.append(no_repeat_ngrams(options.no_repeat_ngram_size))
    if options.encoder_no_repeat_ngram_size:
        result.append(no_ngrams_of_prompt(options.encoder_no_repeat_ngram_size, prompt))
    if options.bad_words_ids:
        result.append(bad_words(options.bad_words_ids, end_token_ids))
    if fewest > 0 and end_token_ids:
        result.append(min_new_tokens(fewest, length, end_token_ids))
    if first:
        result.append(forced_tokens(first, length))
    if last:
        result.append(forced_tokens(last, length + max_new_tokens - 1))
    if options.remove_invalid_values:
        result.append(remove_invalid_values)
    if options.exponential_decay_length_penalty is not None and end_token_ids:
        start, factor = options.exponential_decay_length_penalty
        result.append(exponential_decay(length + start, factor, end_token_ids))
    if options.suppress_tokens:
        result.append(suppressed_tokens(options.suppress_tokens))
    if options.begin_suppress_tokens:
        begin = length + 1 if first else length
        result.append(suppressed_tokens(options.begin_suppress_tokens, begin))
    return (*result, *(options.processors or ()))


def logit_bias(biases: Mapping[int, float]) -> LogitsProcessor:
    """A processor that adds a number to the logits of some tokens, by their ids."""
    ids = np.array(list(biases), np.int64)
    values = np.array(list(biases.values()), np.float32)

    def process(tokens: NDArray[np.int64], logits: NDArray[np.float32]) -> NDArray[np.float32]:
        logits[ids] += values
        return logits

    return process


def sequence_bias(biases: Iterable[tuple[Sequence[int], float]]) -> LogitsProcessor:
    """A processor that adds a number to the logit of the last token of some sequences.

    It does so where the other tokens of the sequence are the last ones of the text.

    Args:
        biases: The sequences, at least one token each, and their numbers.
    """
    groups: dict[int, list[tuple[Sequence[int], float]]] = {}
    for ids, bias in biases:
        groups.setdefault(len(ids) - 1, []).append((ids, bias))
    # Those of equal length are compared together: their beginnings, last tokens and numbers.
    arrays = [
        (
            length,
            np.array([ids[:-1] for ids, _ in group], np.int64),
            np.array([ids[-1] for ids, _ in group], np.int64),
            np.array([bias for _, bias in group], np.float32),
        )
        for length, group in groups.items()
    ]

    def process(tokens: NDArray[np.int64], logits: NDArray[np.float32]) -> NDArray[np.float32]:
        for length, beginnings, last, values in arrays:
            if length > len(tokens):
                continue
            matching = (beginnings == tokens[len(tokens) - length :]).all(axis=1)
            # Ids that the vocabulary does not have are never chosen.
            matching &= last < len(logits)
            np.add.at(logits, last[matching], values[matching])
        return logits

    return process


def bad_words(words: Iterable[Sequence[int]], end_token_ids: Collection[int]) -> LogitsProcessor:
    """A processor that rules out tokens that would complete one of the sequences `words`.

    A sequence that is a single token of `end_token_ids` is left out: a text has to end somewhere.
    """
    kept = [ids for ids in words if not (len(ids) == 1 and ids[0] in end_token_ids)]
    return sequence_bias([(ids, -np.inf) for ids in kept])


def encoder_repetition_penalty(penalty: float, prompt: Sequence[int]) -> LogitsProcessor:
    """A processor that makes the tokens of the prompt more likely, with a penalty above 1.

    Positive logits of such tokens are multiplied by `penalty`, negative ones divided.
    """
    process = repetition_penalty(1 / penalty)
    ids = np.array(prompt, np.int64)
    return lambda _, logits: process(ids, logits)


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
        _rule_out_ngrams(tokens, tokens, size, logits)
        return logits

    return process


def no_ngrams_of_prompt(size: int, prompt: Sequence[int]) -> LogitsProcessor:
    """A processor that rules out tokens that would repeat `size` tokens of the prompt."""
    ids = np.array(prompt, np.int64)

    def process(tokens: NDArray[np.int64], logits: NDArray[np.float32]) -> NDArray[np.float32]:
        if len(ids) >= size:
            _rule_out_ngrams(ids, tokens, size, logits)
        return logits

    return process


def _rule_out_ngrams(
    where: NDArray[np.int64], tokens: NDArray[np.int64], size: int, logits: NDArray[np.float32]
) -> None:
    grams = np.lib.stride_tricks.sliding_window_view(where, size)
    last = tokens[len(tokens) - size + 1 :]
    logits[grams[(grams[:, :-1] == last).all(axis=1), -1]] = -np.inf


def min_new_tokens(
    count: int, prompt_length: int, end_token_ids: Collection[int]
) -> LogitsProcessor:
    """A processor that rules out end-of-text tokens until `count` tokens are generated."""
    ids = np.array(sorted(end_token_ids), np.int64)

    def process(tokens: NDArray[np.int64], logits: NDArray[np.float32]) -> NDArray[np.float32]:
        if len(tokens) - prompt_length < count:
            logits[_known(ids, logits)] = -np.inf
        return logits

    return process


def suppressed_tokens(token_ids: Sequence[int], length: int | None = None) -> LogitsProcessor:
    """A processor that rules tokens out, always or only for the token behind the first `length`."""
    ids = np.array(token_ids, np.int64)

    def process(tokens: NDArray[np.int64], logits: NDArray[np.float32]) -> NDArray[np.float32]:
        if length is None or len(tokens) == length:
            logits[_known(ids, logits)] = -np.inf
        return logits

    return process


def forced_tokens(token_ids: Sequence[int], length: int) -> LogitsProcessor:
    """A processor that rules out all tokens but these, for the token behind the first `length`."""
    ids = np.array(token_ids, np.int64)

    def process(tokens: NDArray[np.int64], logits: NDArray[np.float32]) -> NDArray[np.float32]:
        if len(tokens) == length and (known := _known(ids, logits)).size:
            logits[:] = -np.inf
            logits[known] = 0
        return logits

    return process


def remove_invalid_values(
    tokens: NDArray[np.int64], logits: NDArray[np.float32]
) -> NDArray[np.float32]:
    """The processor that replaces what is no number by 0, and infinity by the largest number."""
    return np.nan_to_num(logits, copy=False)


def exponential_decay(
    length: int, factor: float, end_token_ids: Collection[int]
) -> LogitsProcessor:
    """A processor that raises the logits of end-of-text tokens more with each token.

    Behind the first `length` tokens, it adds `factor` to the power of the number of tokens since
    then, less 1, times the absolute value of the logit.
    """
    ids = np.array(sorted(end_token_ids), np.int64)

    def process(tokens: NDArray[np.int64], logits: NDArray[np.float32]) -> NDArray[np.float32]:
        count = len(tokens) - length
        if count > 0:
            known = _known(ids, logits)
            known = known[np.isfinite(logits[known])]
            with np.errstate(over="ignore"):
                share = np.minimum(np.float64(factor) ** count - 1, LARGEST_SUMMAND)
            raised = logits[known] + np.abs(logits[known]) * share
            logits[known] = np.minimum(raised, LARGEST_SUMMAND)
        return logits

    return process


def _known(ids: NDArray[np.int64], logits: NDArray[np.float32]) -> NDArray[np.int64]:
    """The ids that the vocabulary has: the bundle's files may name others."""
    return ids[ids < len(logits)]
