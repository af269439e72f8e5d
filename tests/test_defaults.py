"""What a bundle's generation_config.json recommends, and what of it is followed."""

from __future__ import annotations

import fake_bundle
import numpy as np
import pytest
import transformers
from fake_bundle import VOCAB

import doge_onnx
from doge_onnx.bundle import Bundle
from doge_onnx.errors import BundleError
from doge_onnx.runtime.generation import processors
from doge_onnx.runtime.generation.config import GenerationConfig
from doge_onnx.runtime.generation.defaults import Defaults, ignored_fields

PROMPT = [4, 100, 33]


def _defaults(tmp_path, generation):
    return Defaults.read(Bundle.open(fake_bundle.write(tmp_path / "b", generation=generation)))


def _resolve(defaults, **given):
    return defaults.resolve(GenerationConfig(**given))


def test_without_recommendations_generation_is_greedy(tmp_path):
    defaults = _defaults(tmp_path, None)
    assert defaults.eos_token_ids == {1}
    assert _resolve(defaults) == GenerationConfig(temperature=0)
    assert _resolve(defaults, seed=1).temperature == 0
    assert _resolve(defaults, top_p=0.9).temperature == 1
    assert _resolve(defaults, top_p=0.9, temperature=0).temperature == 0


def test_recommendations_of_the_bundle_are_followed(tmp_path):
    recommended = {
        "temperature": 0.7,
        "top_k": 40,
        "top_p": 0.9,
        "min_p": 0.01,
        "repetition_penalty": 1.1,
        "no_repeat_ngram_size": 4,
        "min_new_tokens": 2,
        "max_new_tokens": 5,
    }
    defaults = _defaults(tmp_path, recommended | {"do_sample": True, "eos_token_id": [2, 3]})
    assert defaults.eos_token_ids == {2, 3}
    assert defaults.ignored == ()
    assert _resolve(defaults).given() == recommended
    given = {"temperature": 0, "top_k": 3, "max_new_tokens": 9, "seed": 1}
    assert _resolve(defaults, **given).given() == recommended | given


def test_sampling_that_is_not_recommended_is_not_done(tmp_path):
    defaults = _defaults(tmp_path, {"do_sample": False, "temperature": 0.7, "top_k": 0})
    assert _resolve(defaults).temperature == 0
    assert _resolve(defaults, min_p=0.1).temperature == 0.7
    assert _resolve(defaults, temperature=0.3).top_k == 0


def test_a_sampler_of_the_caller_replaces_what_is_recommended(tmp_path):
    recommended = {"do_sample": True, "temperature": 0.7, "top_k": 4, "max_new_tokens": 5}
    options = _resolve(_defaults(tmp_path, recommended), sampler=np.argmax)
    assert options.given() == {"max_new_tokens": 5, "sampler": np.argmax}


@pytest.mark.parametrize(
    ("generation", "message"),
    [
        ({"do_sample": True, "top_p": -1}, r"generation_config\.json: top_p must be"),
        ({"do_sample": True, "top_k": -1}, r"generation_config\.json: top_k must be"),
        ({"do_sample": True, "top_k": 50.0}, r"generation_config\.json: top_k must be"),
        ({"do_sample": True, "temperature": "0.7"}, r"temperature must be .*, not '0.7'"),
        ({"do_sample": True, "temperature": 10**400}, r"generation_config\.json: temperature must"),
        ({"repetition_penalty": "1.1"}, r"generation_config\.json: repetition_penalty must be"),
        ({"bad_words_ids": [5]}, r"generation_config\.json: bad_words_ids must be"),
        ({"no_repeat_ngram_size": 2.0}, r"generation_config\.json: no_repeat_ngram_size must be"),
        ({"forced_eos_token_id": VOCAB}, f"forced_eos_token_id is {VOCAB}, and the vocabulary has"),
        ({"forced_eos_token_id": 4, "suppress_tokens": [4]}, "rules out all tokens of forced_eos"),
        ({"do_sample": "true"}, r"generation_config\.json: do_sample must be true or false"),
        ({"do_sample": 1}, r"generation_config\.json: do_sample must be true or false"),
        ({"min_new_tokens": "x"}, r"generation_config\.json: min_new_tokens must be"),
        ({"eos_token_id": "x"}, "eos_tok"),
        ({"eos_token_id": [True]}, "eos_tok"),
    ],
)
def test_recommendations_that_make_no_sense_are_refused(tmp_path, generation, message):
    with pytest.raises(BundleError, match=message):
        _defaults(tmp_path, generation)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_beams", 4),
        ("num_return_sequences", 2),
        ("penalty_alpha", 0.6),
        ("diversity_penalty", 0.5),
        ("guidance_scale", 1.5),
        ("watermarking_config", {"greenlist_ratio": 0.25}),
        ("token_healing", True),
        ("constraints", ["x"]),
        ("force_words_ids", [[5]]),
        ("dola_layers", "low"),
        ("is_assistant", True),
        ("generation_kwargs", {"x": 1}),
        ("an_option_of_the_future", 0),
        ("max_tokens", 5),
    ],
)
def test_what_is_asked_for_and_not_done_is_named(tmp_path, name, value):
    assert ignored_fields({name: value, "temperature": 0.5}) == (name,)
    assert _defaults(tmp_path, {"zzz": 1, name: value}).ignored == tuple(sorted([name, "zzz"]))
    assert ignored_fields({name: None}) == ignored_fields({name: False}) == ()


# What releases of transformers before 5 fill in.
FILLED_IN = {
    "assistant_confidence_threshold": 0.4,
    "diversity_penalty": 0.0,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "generation_kwargs": {},
    "length_penalty": 1.0,
    "max_length": 20,
    "min_length": 0,
    "no_repeat_ngram_size": 0,
    "num_assistant_tokens_schedule": "constant",
    "num_beam_groups": 1,
    "num_beams": 1,
    "num_return_sequences": 1,
    "repetition_penalty": 1.0,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "transformers_version": "4.48.3",
    "typical_p": 1.0,
}


def test_what_changes_nothing_is_not_named(tmp_path):
    written = transformers.GenerationConfig(
        use_cache=True,
        cache_implementation="static",
        pad_token_id=0,
        bos_token_id=0,
        output_scores=True,
        return_dict_in_generate=True,
    ).to_dict()
    assert ignored_fields(written | {"_from_model_config": True}) == ()
    defaults = _defaults(tmp_path, FILLED_IN)
    assert defaults.ignored == defaults.without_effect == ()
    options = _resolve(defaults)
    assert (options.temperature, options.max_length) == (0, None)
    sequence = {"prompt": [1, 2], "max_new_tokens": 3, "end_token_ids": {1}}
    assert processors.make_processors(options, **sequence) == ()


@pytest.mark.parametrize(
    ("file", "top_k"),
    [
        ({"do_sample": True}, 50),
        ({"do_sample": True, "temperature": 0.7, "transformers_version": "4.48.3"}, 50),
        ({"do_sample": True, "transformers_version": "5.24.0"}, 50),
        # An author who names them has sampled.
        ({"temperature": 0.7, "top_p": 0.9}, 50),
        ({"do_sample": True, "top_k": 7}, 7),
        # Both mean no limit.
        ({"do_sample": True, "top_k": 0}, 0),
        ({"do_sample": True, "top_k": None}, None),
        # Nobody has said anything about sampling.
        ({}, None),
        ({"do_sample": False, "max_new_tokens": 5}, None),
    ],
)
def test_without_a_top_k_a_file_that_samples_means_50(tmp_path, file, top_k):
    defaults = _defaults(tmp_path, file)
    assert _resolve(defaults, temperature=1).top_k == top_k
    assert _resolve(defaults, top_k=0).top_k == 0
    assert _resolve(defaults, top_k=3).top_k == 3


@pytest.mark.parametrize(
    ("file", "note"),
    [
        ({"top_k": -1}, "top_k: -1"),
        ({"top_k": 50.0, "do_sample": False}, "top_k: 50.0"),
        ({"temperature": "0.7"}, 'temperature: "0.7"'),
        ({"typical_p": 0.0}, "typical_p: 0.0"),
        ({"min_p": 3}, "min_p: 3"),
        # transformers takes these for no limit, also where it samples.
        ({"do_sample": True, "top_p": 7}, "top_p: 7"),
        ({"do_sample": True, "typical_p": 2.0}, "typical_p: 2.0"),
        ({"do_sample": True, "epsilon_cutoff": 1.0}, "epsilon_cutoff: 1.0"),
        ({"do_sample": True, "eta_cutoff": -0.5}, "eta_cutoff: -0.5"),
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size: -1"),
        ({"min_new_tokens": -3}, "min_new_tokens: -3"),
        # No token is chosen that the vocabulary does not have.
        ({"suppress_tokens": [-1]}, "suppress_tokens: -1"),
        ({"begin_suppress_tokens": [5, VOCAB]}, f"begin_suppress_tokens: {VOCAB}"),
        ({"bad_words_ids": [[5, VOCAB]]}, f"bad_words_ids: {VOCAB}"),
        ({"sequence_bias": [[[VOCAB], 1.0]]}, f"sequence_bias: {VOCAB}"),
    ],
)
def test_what_is_wrong_and_changes_nothing_is_noted(tmp_path, file, note):
    defaults = _defaults(tmp_path, file)
    assert (defaults.without_effect, defaults.ignored) == ((note,), ())
    model = doge_onnx.load(tmp_path / "b")
    plain = doge_onnx.load(fake_bundle.write(tmp_path / "plain"))
    if not file.get("do_sample"):
        expected = plain.generate(PROMPT, max_new_tokens=6).token_ids
        assert model.generate(PROMPT, max_new_tokens=6).token_ids == expected
    assert model.generate(PROMPT, max_new_tokens=6, temperature=1, seed=3).finish_reason


def test_what_makes_sense_is_not_noted(tmp_path):
    file = {"do_sample": True, "top_p": 0.0, "top_k": 0, "typical_p": 1, "temperature": 2}
    assert _defaults(tmp_path, file).without_effect == ()
    # Of all tokens, a top_p of 0 leaves the most likely one.
    sampled = doge_onnx.load(tmp_path / "b").generate(PROMPT, max_new_tokens=6)
    plain = doge_onnx.load(fake_bundle.write(tmp_path / "plain"))
    assert sampled.token_ids == plain.generate(PROMPT, max_new_tokens=6).token_ids


@pytest.mark.parametrize(
    ("file", "limited"),
    [
        ({"max_length": 20}, 20),
        ({"max_length": 20, "transformers_version": "5.23.0"}, 20),
        # That is what these releases fill in, and do not obey.
        ({"max_length": 20, "transformers_version": "4.48.3"}, None),
        ({"max_length": 21, "transformers_version": "4.48.3"}, 21),
    ],
)
def test_a_limit_of_prompt_and_text(tmp_path, file, limited):
    assert _resolve(_defaults(tmp_path, file)).max_length == limited


def test_limits_of_the_caller_replace_those_of_the_file(tmp_path):
    file = {"max_new_tokens": 5, "min_new_tokens": 2, "stop_strings": ["x", "y"]}
    defaults = _defaults(tmp_path, file)
    options = _resolve(defaults)
    assert (options.max_new_tokens, options.min_new_tokens, options.stop) == (5, 2, ("x", "y"))
    options = _resolve(defaults, max_length=40, min_length=9, stop=[])
    assert (options.max_new_tokens, options.max_length) == (None, 40)
    assert (options.min_new_tokens, options.min_length, options.stop) == (None, 9, ())
    # As in transformers, the number of new tokens wins over the whole length.
    assert _resolve(defaults, max_length=40, max_new_tokens=3).max_new_tokens == 3
