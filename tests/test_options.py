"""The options of generation: what they may be, what completes them, and what each one does."""

from __future__ import annotations

import copy
import itertools
import pickle
import typing
from collections import Counter
from dataclasses import FrozenInstanceError, fields

import fake_bundle
import numpy as np
import pytest
from fake_bundle import VOCAB, reference

import doge_onnx
from doge_onnx.errors import InputError
from doge_onnx.runtime.generation import sampling
from doge_onnx.runtime.generation.config import (
    GenerationConfig,
    GenerationOptions,
    option_names,
)
from doge_onnx.runtime.generation.defaults import Defaults
from doge_onnx.runtime.generation.processors import LogitsProcessor
from doge_onnx.runtime.generation.sampling import Sampler

PROMPT = [4, 100, 33]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return doge_onnx.load(fake_bundle.write(tmp_path_factory.mktemp("bundle") / "b"))


def _log_softmax(logits):
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


# --- the object ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", -1),
        ("max_new_tokens", 1.5),
        ("min_new_tokens", -1),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", "hot"),
        ("temperature", 10**400),
        ("top_k", -1),
        ("top_k", 2.0),
        ("top_p", -0.1),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("repetition_penalty", 0),
        ("repetition_penalty", 1e-39),
        ("repetition_penalty", 1e39),
        ("presence_penalty", float("nan")),
        ("presence_penalty", -1e300),
        ("frequency_penalty", 1e31),
        ("frequency_penalty", True),
        ("no_repeat_ngram_size", -1),
        ("max_length", 0),
        ("max_time", -1),
        ("typical_p", 0),
        ("top_h", 1.1),
        ("epsilon_cutoff", 1),
        ("bad_words_ids", [5]),
        ("bad_words_ids", [[]]),
        ("suppress_tokens", 5),
        ("suppress_tokens", [-1]),
        ("begin_suppress_tokens", ["a"]),
        ("sequence_bias", {5: 1.0}),
        ("sequence_bias", {(): 1.0}),
        ("sequence_bias", [[[5], float("inf")]]),
        ("sequence_bias", [[[5]]]),
        ("forced_eos_token_id", -1),
        ("forced_bos_token_id", True),
        ("exponential_decay_length_penalty", [5]),
        ("exponential_decay_length_penalty", [5, 0]),
        ("remove_invalid_values", 1),
        ("stop_token_ids", "<s>"),
        ("stop_token_ids", [1.5]),
        ("logit_bias", [1, 2]),
        ("logit_bias", {-1: 1.0}),
        ("logit_bias", {"a": 1.0}),
        ("logit_bias", {1: float("inf")}),
        ("logit_bias", {1: 1e300}),
        ("logit_bias", {1: 10**400}),
        ("seed", -1),
        ("seed", True),
        ("stop", ""),
        ("stop", ["a", ""]),
        ("stop", 5),
        ("stop", [5]),
        ("ignore_eos", 1),
        ("logprobs", "yes"),
        ("top_logprobs", -1),
        ("top_logprobs", True),
        ("processors", len),
        ("processors", [5]),
        ("sampler", 5),
    ],
)
def test_options_out_of_range_are_refused_by_name(name, value):
    with pytest.raises(InputError, match=rf"^{name} must be .*, not "):
        GenerationConfig(**{name: value})
    with pytest.raises(InputError, match=rf"^{name} must be .*, not "):
        GenerationConfig().merged(**{name: value})


@pytest.mark.parametrize("name", option_names("filters"))
def test_an_option_that_filters_asks_for_sampling_and_is_carried_out(name):
    assert name in sampling.FILTERS
    value = 1 if name == "top_k" else 0.5
    options = Defaults().resolve(GenerationConfig(**{name: value}))
    assert (options.temperature, getattr(options, name)) == (1.0, value)


@pytest.mark.parametrize("name", ["temperature", *option_names("filters")])
def test_a_sampler_replaces_other_options(name):
    value = 1 if name == "top_k" else 0.5
    with pytest.raises(InputError, match=f"sampler replaces {name}"):
        GenerationConfig(sampler=np.argmax, **{name: value})
    with pytest.raises(InputError, match=f"sampler replaces {name}"):
        GenerationConfig(**{name: value}).merged(sampler=np.argmax)


def test_numbers_of_numpy_are_numbers():
    config = GenerationConfig(
        temperature=np.float32(0.5),
        top_k=np.int64(5),
        seed=np.uint8(3),
        logit_bias={np.int64(1): np.float16(2)},
    )
    assert config == GenerationConfig(temperature=0.5, top_k=5, seed=3, logit_bias={1: 2.0})
    assert type(config.top_k) is int


def test_an_object_of_options_is_a_value_that_cannot_be_changed():
    stops, biases = ["a", "b"], {1: 2.0}
    config = GenerationConfig(stop=stops, logit_bias=biases, processors=[len], seed=3)
    stops.append("c")
    biases[2] = 1.0
    assert (config.stop, dict(config.logit_bias)) == (("a", "b"), {1: 2.0})
    with pytest.raises(FrozenInstanceError):
        config.seed = 4
    with pytest.raises(TypeError):
        config.logit_bias[1] = 3.0
    for twin in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert twin == config
        assert hash(twin) == hash(config)
    assert GenerationConfig(stop="a").stop == ("a",)
    assert repr(GenerationConfig(seed=3, stop="a")) == "GenerationConfig(seed=3, stop=('a',))"


def test_an_override_of_none_is_none_given():
    config = GenerationConfig(temperature=0.5, seed=3)
    assert config.merged(temperature=None, seed=4) == GenerationConfig(temperature=0.5, seed=4)
    assert config.merged(temperature=0).temperature == 0
    assert config == GenerationConfig(temperature=0.5, seed=3)


def test_the_keyword_arguments_are_the_fields():
    names = {"LogitsProcessor": LogitsProcessor, "Sampler": Sampler}
    hints = typing.get_type_hints(GenerationConfig, localns=names)
    assert typing.get_type_hints(GenerationOptions, localns=names) == hints
    assert list(hints) == [entry.name for entry in fields(GenerationConfig)]
    assert GenerationOptions.__required_keys__ == frozenset()


# --- what each option does ----------------------------------------------------------------


def _by_hand(change, count):
    """The greedy text where `change(generated, logits)` alters logits in place."""
    generated = []
    for _ in range(count):
        logits = reference(PROMPT + generated)[-1]
        change(generated, logits)
        generated.append(int(logits.argmax()))
    return generated


def test_a_bias_makes_and_unmakes_tokens(model):
    first = model.generate(PROMPT, max_new_tokens=1).token_ids[0]
    biases = {first: -1e3, 7: 5.0}

    def change(_, logits):
        for token, bias in biases.items():
            logits[token] += bias

    out = model.generate(PROMPT, max_new_tokens=12, logit_bias=biases)
    assert out.token_ids == _by_hand(change, 12)
    assert first not in out.token_ids
    assert model.generate(PROMPT, max_new_tokens=3, logit_bias={7: 1e4}).token_ids == [7] * 3
    with pytest.raises(InputError, match=f"logit_bias has token id {VOCAB}"):
        model.generate(PROMPT, logit_bias={VOCAB: 1.0})


@pytest.mark.parametrize("name", ["presence_penalty", "frequency_penalty"])
def test_penalties_count_the_text_and_not_the_prompt(model, name):
    def change(generated, logits):
        for token, count in Counter(generated).items():
            logits[token] -= 9.0 * (count if name == "frequency_penalty" else 1)

    out = model.generate(PROMPT, max_new_tokens=40, **{name: 9.0})
    assert out.token_ids == _by_hand(change, 40)
    assert out.token_ids != model.generate(PROMPT, max_new_tokens=40).token_ids


def test_no_tokens_come_twice(model):
    def pairs(tokens):
        return Counter(itertools.pairwise(tokens))

    plain = model.generate(PROMPT, max_new_tokens=60).token_ids
    assert max(pairs(PROMPT + plain).values()) > 1
    unlike = model.generate(PROMPT, max_new_tokens=60, no_repeat_ngram_size=2).token_ids
    assert max(pairs(PROMPT + unlike).values()) == 1


def test_no_text_ends_before_its_fewest_tokens_or_where_ends_are_ignored(tmp_path, model):
    plain = model.generate(PROMPT, max_new_tokens=30).token_ids
    eos = plain[3]
    path = fake_bundle.write(tmp_path / "b", generation={"eos_token_id": [eos]})
    ending = doge_onnx.load(path)
    short = ending.generate(PROMPT, max_new_tokens=30)
    assert (short.finish_reason, short.token_ids) == ("eos", plain[: plain.index(eos) + 1])

    def change(generated, logits):
        if len(generated) < 8:
            logits[eos] = -np.inf

    expected = _by_hand(change, 30)
    if eos in expected:
        expected = expected[: expected.index(eos) + 1]
    assert len(expected) >= 8
    assert ending.generate(PROMPT, max_new_tokens=30, min_new_tokens=8).token_ids == expected
    ignoring = ending.generate(PROMPT, max_new_tokens=30, min_new_tokens=8, ignore_eos=True)
    assert (ignoring.token_ids, ignoring.finish_reason) == (plain, "length")


def test_top_logprobs_are_those_of_the_model_whatever_the_options(model):
    out = model.generate(
        PROMPT, max_new_tokens=8, top_logprobs=3, temperature=3, logit_bias={5: 9.0}, seed=1
    )
    expected = _log_softmax(reference(PROMPT + out.token_ids)[len(PROMPT) - 1 : -1])
    assert len(out.top_logprobs) == len(out.logprobs) == 8
    for scores, tokens, token_id, own in zip(
        expected, out.top_logprobs, out.token_ids, out.logprobs, strict=True
    ):
        assert [token.token_id for token in tokens] == np.argsort(-scores)[:3].tolist()
        values = [token.logprob for token in tokens]
        np.testing.assert_allclose(values, np.sort(scores)[::-1][:3], atol=1e-3)
        assert own == pytest.approx(scores[token_id], abs=1e-3)
    (piece,) = model.stream(PROMPT, max_new_tokens=1, top_logprobs=VOCAB + 5)
    assert len(piece.top_logprobs[0]) == VOCAB
    assert model.generate(PROMPT, max_new_tokens=0, top_logprobs=3).top_logprobs == []
    alone = model.generate(PROMPT, max_new_tokens=1, logprobs=True)
    assert (len(alone.logprobs), alone.top_logprobs) == (1, None)


# --- what the caller brings ---------------------------------------------------------------


def test_processors_of_the_caller_come_after_the_others(model):
    seen = []

    def process(tokens, logits):
        seen.append((tokens.tolist(), float(logits[7])))
        logits[:] = 0
        logits[9] = 1
        return logits

    out = model.generate(
        [4, 5], max_new_tokens=3, logit_bias={7: 1e6}, processors=[process], logprobs=True
    )
    assert out.token_ids == [9, 9, 9]
    assert [tokens for tokens, _ in seen] == [[4, 5], [4, 5, 9], [4, 5, 9, 9]]
    assert min(score for _, score in seen) > 1e5
    # Log-probabilities are the model's own, whatever a processor writes.
    expected = _log_softmax(reference([4, 5, 9, 9])[1:])[:, 9]
    np.testing.assert_allclose(out.logprobs, expected, atol=1e-3)


def test_a_sampler_of_the_caller_chooses(model):
    def least_likely(logits):
        chosen = int(logits.argmin())
        logits[:] = 0
        return chosen

    out = model.generate([4, 5], max_new_tokens=4, sampler=least_likely, logprobs=True)
    logits = reference([4, 5, *out.token_ids])[1:-1]
    assert out.token_ids == logits.argmin(-1).tolist()
    expected = _log_softmax(logits)[np.arange(4), out.token_ids]
    np.testing.assert_allclose(out.logprobs, expected, atol=1e-3)
    batch = model.generate_batch([[4, 5], [9]], max_new_tokens=4, sampler=least_likely)
    assert batch[0].token_ids == out.token_ids


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"processors": [lambda tokens, logits: None]}, r"of shape \[\d+\], not NoneType"),
        ({"processors": [lambda tokens, logits: logits[:-1]]}, r"of shape \[\d+\], not float32 of"),
        (
            {"processors": [lambda tokens, logits: logits > 0]},
            "numbers .*, not bool of",
        ),
        (
            {"processors": [lambda tokens, logits: logits + 0j]},
            "numbers .*, not complex",
        ),
        ({"processors": [lambda tokens, logits: logits * np.nan]}, "is not a number, or infinite"),
        ({"processors": [lambda tokens, logits: logits + np.inf]}, "is not a number, or infinite"),
        ({"processors": [lambda tokens, logits: logits - np.inf]}, "no token is left"),
        ({"sampler": lambda logits: VOCAB}, f"0 to {VOCAB - 1}, not {VOCAB}"),
        ({"sampler": lambda logits: -1}, "not -1"),
        ({"sampler": lambda logits: "a"}, "not 'a'"),
    ],
)
def test_what_the_caller_brings_is_checked(model, options, message):
    with pytest.raises(InputError, match=message):
        model.generate([4, 5], max_new_tokens=2, **options)


def test_the_largest_numbers_of_options_leave_a_distribution(model):
    extremes = {
        "presence_penalty": -1e30,
        "frequency_penalty": -1e30,
        "repetition_penalty": 1e9,
        "logit_bias": {3: 1e30, 4: 1e30},
    }
    for name, value in extremes.items():
        for temperature in (0, 1):
            options = {name: value, "temperature": temperature, "seed": 3}
            assert len(model.generate([4, 5], max_new_tokens=6, **options).token_ids) <= 6
    biased = model.generate([4, 5], max_new_tokens=6, temperature=1, logit_bias={3: 1e30, 4: 1e30})
    assert set(biased.token_ids) <= {3, 4}


def test_logits_of_a_processor_that_cannot_be_written_go_on_to_the_next(model):
    def frozen(tokens, logits):
        logits.flags.writeable = False
        return logits

    def changing(tokens, logits):
        logits[7] = 1e9
        return logits

    out = model.generate([4, 5], max_new_tokens=2, processors=[frozen, changing])
    assert out.token_ids == [7, 7]


def test_a_name_that_is_no_option_is_refused_whatever_its_value(model):
    for value in (None, 5):
        with pytest.raises(InputError, match="no option 'max_tokens'; there are max_new_tokens"):
            model.generate([4, 5], **{"max_tokens": value})


def test_tokens_that_a_processor_gets_cannot_be_changed(model):
    def process(tokens, logits):
        tokens[0] = 1
        return logits

    with pytest.raises(ValueError, match="read-only"):
        model.generate([4, 5], max_new_tokens=2, processors=[process])
