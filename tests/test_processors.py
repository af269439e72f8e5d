"""Logits processors, against their counterparts in transformers, or their definition."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation import logits_process as hf

from doge_onnx.runtime.generation import processors
from doge_onnx.runtime.generation.config import GenerationConfig

V = 40
TOKENS = st.lists(st.integers(0, V - 1), min_size=1, max_size=30)


def _logits(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(scale=3, size=V).astype(np.float32)


def _theirs(processor, tokens, logits) -> np.ndarray:
    ids = torch.tensor(tokens)[None]
    return processor(ids, torch.from_numpy(logits.copy())[None])[0].numpy()


def _ours(processor, tokens, logits) -> np.ndarray:
    return processor(np.array(tokens, np.int64), logits.copy())


@settings(max_examples=60, deadline=None)
@given(tokens=TOKENS, seed=st.integers(0, 99), penalty=st.floats(0.1, 3))
def test_repetition_penalty_is_that_of_transformers(tokens, seed, penalty):
    logits = _logits(seed)
    expected = _theirs(hf.RepetitionPenaltyLogitsProcessor(penalty), tokens, logits)
    result = _ours(processors.repetition_penalty(penalty), tokens, logits)
    np.testing.assert_allclose(result, expected, rtol=1e-6)


@settings(max_examples=200, deadline=None)
@given(tokens=st.lists(st.integers(0, 3), min_size=1, max_size=30), size=st.integers(1, 5))
def test_ngrams_that_may_not_come_twice_are_those_of_transformers(tokens, size):
    logits = _logits(len(tokens))
    expected = _theirs(hf.NoRepeatNGramLogitsProcessor(size), tokens, logits)
    result = _ours(processors.no_repeat_ngrams(size), tokens, logits)
    np.testing.assert_array_equal(result, expected)


@settings(max_examples=60, deadline=None)
@given(biases=st.dictionaries(st.integers(0, V - 1), st.floats(-50, 50, width=32), min_size=1))
def test_logit_bias_is_a_sequence_bias_of_single_tokens(biases):
    logits = _logits(1)
    theirs = hf.SequenceBiasLogitsProcessor([[[token], bias] for token, bias in biases.items()])
    expected = _theirs(theirs, [1, 2], logits)
    np.testing.assert_allclose(_ours(processors.logit_bias(biases), [1, 2], logits), expected)


@settings(max_examples=60, deadline=None)
@given(tokens=TOKENS, prompt=st.integers(1, 30), count=st.integers(1, 20))
def test_the_fewest_tokens_are_those_of_transformers(tokens, prompt, count):
    prompt = min(prompt, len(tokens))
    logits, eos = _logits(2), [3, 17]
    expected = _theirs(hf.MinNewTokensLengthLogitsProcessor(prompt, count, eos), tokens, logits)
    # Files may name ids that the vocabulary does not have.
    result = _ours(processors.min_new_tokens(count, prompt, {*eos, V + 5}), tokens, logits)
    np.testing.assert_array_equal(result, expected)


@settings(max_examples=60, deadline=None)
@given(
    tokens=TOKENS, prompt=st.integers(1, 30), presence=st.floats(-2, 2), frequency=st.floats(-2, 2)
)
def test_presence_and_frequency_count_what_was_generated(tokens, prompt, presence, frequency):
    prompt = min(prompt, len(tokens))
    result = _logits(3)
    expected = result.astype(np.float64)
    for token, count in Counter(tokens[prompt:]).items():
        expected[token] -= presence * (count > 0) + frequency * count
    for process in (
        processors.presence_penalty(presence, prompt),
        processors.frequency_penalty(frequency, prompt),
    ):
        result = _ours(process, tokens, result)
    np.testing.assert_allclose(result, expected, atol=1e-4)


def test_those_of_the_caller_are_the_last():
    def own(tokens, logits):
        return logits

    options = GenerationConfig(suppress_tokens=[1], repetition_penalty=2, processors=[own])
    made = processors.make_processors(options, [1, 2], 9, {0})
    assert len(made) == 3
    assert made[-1] is own


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.5, "top_k": 3, "seed": 1, "stop": "x", "max_new_tokens": 3},
        {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0},
        {"no_repeat_ngram_size": 0, "min_new_tokens": 0, "logit_bias": {}, "processors": []},
        {
            "sequence_bias": [],
            "bad_words_ids": [],
            "suppress_tokens": [],
            "forced_eos_token_id": [],
        },
        {"min_length": 3, "remove_invalid_values": False, "encoder_repetition_penalty": 1},
        # For prompts of one token.
        {"forced_bos_token_id": 2},
    ],
)
def test_options_that_change_no_logits_make_no_processor(options):
    assert processors.make_processors(GenerationConfig(**options), [4, 5, 6], 9, {1}) == ()


def test_where_nothing_ends_a_text_nothing_is_ruled_out():
    options = GenerationConfig(min_new_tokens=3, exponential_decay_length_penalty=(1, 2.0))
    assert processors.make_processors(options, [1], 9, ()) == ()
