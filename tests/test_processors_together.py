"""What a generation_config.json asks for, against the processors that transformers makes of it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation import utils

from doge_onnx.runtime.generation import processors, sampling
from doge_onnx.runtime.generation.config import GenerationConfig
from doge_onnx.runtime.generation.defaults import Defaults

V = 30
EOS = [3, 17]
# None of those that are ruled out below, which transformers refuses.
FORCED = st.integers(0, 17)
# Few different tokens, so that sequences come again.
TOKENS = st.lists(st.integers(0, 5), min_size=1, max_size=14)
SEQUENCE = st.lists(st.integers(0, 5), min_size=1, max_size=3)
PROCESSED = {
    "sequence_bias": st.lists(
        st.tuples(SEQUENCE, st.floats(-9, 9, width=32)).map(list), min_size=1, max_size=6
    ),
    "encoder_repetition_penalty": st.floats(0.3, 3),
    "repetition_penalty": st.floats(0.3, 3),
    "no_repeat_ngram_size": st.integers(0, 4),
    "encoder_no_repeat_ngram_size": st.integers(0, 4),
    # transformers refuses a list of end-of-text tokens alone.
    "bad_words_ids": st.lists(SEQUENCE, min_size=1, max_size=5).map(lambda words: [[29], *words]),
    "min_length": st.integers(0, 20),
    "min_new_tokens": st.integers(0, 20),
    "max_length": st.integers(16, 24),
    "max_new_tokens": st.integers(1, 24),
    "forced_bos_token_id": FORCED,
    "forced_eos_token_id": FORCED | st.lists(FORCED, min_size=1, max_size=3),
    "exponential_decay_length_penalty": st.tuples(st.integers(0, 6), st.floats(0.5, 2)).map(list),
    "suppress_tokens": st.lists(st.integers(18, V + 5), max_size=4),
    "begin_suppress_tokens": st.lists(st.integers(18, V + 5), max_size=4),
}
FILTERED = {
    "temperature": st.floats(0.3, 3),
    "top_h": st.floats(0.05, 1),
    "top_k": st.integers(0, V + 5),
    "top_p": st.floats(0.05, 1.5),
    "min_p": st.floats(0, 0.5),
    "typical_p": st.floats(0.05, 1.5),
    "epsilon_cutoff": st.floats(-0.1, 0.2),
    "eta_cutoff": st.floats(-0.1, 0.2),
}


class _Model(utils.GenerationMixin):
    """As much of a model as transformers looks at to make processors."""

    config = SimpleNamespace(is_encoder_decoder=False)


def _theirs(file: dict, prompt: list[int]) -> transformers.LogitsProcessorList:
    """The processors and filters of transformers, in its order, for a prompt."""
    config = transformers.GenerationConfig(**file)
    # As `generate` completes it.
    config.update(**config._get_default_generation_params(), defaults_only=True)
    config = _Model()._prepare_generated_length(
        config,
        has_default_max_length="max_length" not in file,
        has_default_min_length="min_length" not in file,
        model_input_name="input_ids",
        input_ids_length=len(prompt),
        inputs_tensor=None,
    )
    config._eos_token_tensor = torch.tensor(EOS)
    return _Model()._get_logits_processor(
        config, len(prompt), torch.tensor(prompt)[None], device="cpu"
    )


def _ours(file: dict) -> GenerationConfig:
    defaults = Defaults.parse(file | {"eos_token_id": EOS}, {}, Path("bundle"), V)
    assert defaults.ignored == ()
    return defaults.resolve(GenerationConfig())


@settings(max_examples=150, deadline=None)
@given(
    file=st.fixed_dictionaries({}, optional=PROCESSED),
    prompt=TOKENS,
    generated=TOKENS,
    seed=st.integers(0, 99),
)
def test_processors_and_their_order_are_those_of_transformers(file, prompt, generated, seed):
    # The limit without which transformers makes 20 tokens, and this package fills the context.
    file = {"max_length": 24} | file
    logits = np.random.default_rng(seed).normal(scale=3, size=V).astype(np.float32)
    options = _ours(file)
    room = 24 if options.max_new_tokens is None else options.max_new_tokens
    if options.max_new_tokens is None:
        room = options.max_length - len(prompt)
    made = processors.make_processors(options, prompt, room, EOS)
    theirs = _theirs(file, prompt)
    for count in {0, 1, len(generated), max(0, min(room - 1, len(generated)))}:
        tokens = prompt + generated[:count]
        expected = theirs(torch.tensor(tokens)[None], torch.from_numpy(logits.copy())[None])
        result = logits.copy()
        for process in made:
            result = process(np.array(tokens), result)
        np.testing.assert_allclose(result, expected[0].numpy(), rtol=2e-5, atol=1e-6)


@settings(max_examples=100, deadline=None)
@given(file=st.fixed_dictionaries({}, optional=FILTERED), seed=st.integers(0, 99))
def test_filters_and_their_order_are_those_of_transformers(file, seed):
    file = file | {"do_sample": True}
    logits = np.random.default_rng(seed).normal(scale=2, size=V).astype(np.float32)
    scores = torch.from_numpy(logits.astype(np.float64))[None]
    expected = _theirs(file, [1])(torch.tensor([[1]]), scores).softmax(-1)[0].numpy()
    options = _ours(file)
    filters = {name: value for name, value in options.given().items() if name in sampling.FILTERS}
    points = np.linspace(0, 1, 100, endpoint=False)
    rng = SimpleNamespace(random=iter(points).__next__)
    sample = sampling.make_sampler(rng, options.temperature, filters)
    drawn = [sample(logits) for _ in points]
    # Evenly spread draws hit each token in proportion to its probability, up to both ends.
    share = np.bincount(drawn, minlength=V) / len(points)
    assert np.abs(share - expected).max() <= 2 / len(points)
    assert all(expected[token] > 0 for token in drawn)


def test_what_is_not_a_number_is_replaced():
    logits = np.array([np.nan, np.inf, -np.inf, 1], np.float32)
    expected = _theirs({"remove_invalid_values": True}, [1])(
        torch.tensor([[1]]), torch.from_numpy(logits.copy())[None]
    )
    (process,) = processors.make_processors(_ours({"remove_invalid_values": True}), [1], 5, EOS)
    np.testing.assert_array_equal(process(np.array([1]), logits), expected[0].numpy())


def test_a_penalty_that_grows_without_end_stays_a_number():
    process = processors.exponential_decay(1, 1e9, EOS)
    tokens, logits = np.ones(2000, np.int64), np.ones(V, np.float32)
    with np.errstate(over="raise"):
        result = process(tokens, logits)
    assert np.isfinite(result).all()
    assert result.argmax() in EOS
