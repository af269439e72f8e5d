"""One sequence on its own: what it asks of whoever runs the model, and how it ends."""

from __future__ import annotations

import fake_bundle
import numpy as np
import pytest
from fake_bundle import VOCAB

from doge_onnx.runtime.engine.runner import TopLogits
from doge_onnx.runtime.generation.config import GenerationConfig
from doge_onnx.runtime.generation.sequence import GeneratedSequence
from doge_onnx.runtime.text.tokenizer import Tokenizer

GREEDY = GenerationConfig(temperature=0)


def _logits(*tokens: int) -> np.ndarray:
    """Those of the least likely token first."""
    logits = np.zeros(VOCAB, np.float32)
    logits[list(tokens)] = np.arange(1, len(tokens) + 1)
    return logits


@pytest.mark.parametrize(
    ("options", "candidates"),
    [
        ({"temperature": 0.0}, 1),
        ({"temperature": 0.0, "top_k": 5}, 1),
        ({"temperature": 1.0, "top_k": 5}, 5),
        ({"temperature": 1.0, "top_k": 5, "top_p": 0.5}, 5),
        ({"temperature": 1.0, "top_k": 5, "typical_p": 0.5}, 5),
        ({"temperature": 1.0, "top_k": 0}, None),
        # It comes before top_k, and looks at no more.
        ({"temperature": 1.0, "top_k": 5, "top_h": 0.5}, 100),
        ({"temperature": 1.0, "typical_p": 0.5}, None),
        ({"temperature": 1.0}, None),
        ({"temperature": 1.0, "top_p": 0.5}, None),
        ({"temperature": 0.0, "logprobs": True}, None),
        ({"temperature": 0.0, "top_logprobs": 2}, None),
        ({"temperature": 0.0, "repetition_penalty": 1.2}, None),
        ({"temperature": 0.0, "repetition_penalty": 1.0, "top_logprobs": 0}, 1),
        ({"temperature": 0.0, "processors": [lambda tokens, logits: logits]}, None),
        ({"sampler": lambda logits: 0}, None),
    ],
)
def test_how_many_of_the_largest_logits_it_looks_at(options, candidates):
    assert GeneratedSequence([3], 4, GenerationConfig(**options)).candidates == candidates


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    "filters", [{"top_k": 7, "top_p": 0.9}, {"top_k": 7, "typical_p": 0.8}, {"top_h": 0.9}]
)
def test_the_largest_logits_are_enough(seed, filters):
    logits = np.random.default_rng(seed).normal(size=VOCAB).astype(np.float32)
    options = GenerationConfig(temperature=2.0, seed=seed, **filters)
    whole, part = (GeneratedSequence([3], 9, options, number=2) for _ in range(2))
    ids = np.sort(np.argsort(logits)[-part.candidates :])
    for _ in range(9):
        assert whole.choose(logits) == part.choose(TopLogits(ids, logits[ids]))


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 2.0, "logit_bias": {5: 9.0}, "presence_penalty": 1.0},
        {"temperature": 1.0, "top_p": 0.5, "top_logprobs": 2},
        {"sampler": lambda logits: logits.sort() or 0},
        {"processors": [lambda tokens, logits: np.negative(logits, out=logits)]},
    ],
)
def test_logits_are_left_as_they_are(options):
    logits = _logits(4, 5)
    before = logits.copy()
    GeneratedSequence([5], 4, GenerationConfig(**options)).choose(logits)
    np.testing.assert_array_equal(logits, before)


def test_it_alone_says_when_it_ends():
    sequence = GeneratedSequence([3, 4], 3, GREEDY, {9})
    sequence.cached_tokens = 1
    reasons = []
    for token in (5, 6, 9):
        assert sequence.finish_reason is None
        assert sequence.choose(_logits(8, token)) == token
        # A token is chosen first, and its piece comes with the time that its step took.
        assert sequence.finish_reason is None
        piece = sequence.accept(0.5)
        assert piece.token_ids == (token,)
        reasons.append(piece.finish_reason)
    # An end of the text at the limit is one, too.
    assert reasons == [None, None, "eos"]
    assert sequence.finish_reason == "eos"
    timings = piece.timings
    assert (timings.prompt_tokens, timings.cached_tokens) == (2, 1)
    assert (timings.generated_tokens, timings.prefill_seconds, timings.decode_seconds) == (
        3,
        0.5,
        1,
    )
    with pytest.raises(AttributeError):
        sequence.finish_reason = None


def test_the_limit_and_no_room_are_ends():
    sequence = GeneratedSequence([3], 1, GREEDY)
    sequence.choose(_logits(5))
    assert sequence.accept(0.1).finish_reason == "length"
    full = GeneratedSequence([3], 0, GenerationConfig(temperature=0, top_logprobs=1))
    piece = full.no_room()
    assert (piece.text, piece.token_ids, piece.finish_reason) == ("", (), "length")
    assert piece.logprobs == piece.top_logprobs == ()
    assert full.finish_reason == "length"


def test_a_stop_string_goes_before_the_other_ends(tmp_path):
    path = tmp_path / "tokenizer.json"
    fake_bundle.tokenizer().save(str(path))
    tokenizer = Tokenizer(path)
    tokens = tokenizer.encode("abc", add_special_tokens=False)
    options = GenerationConfig(temperature=0, stop="c")
    sequence = GeneratedSequence([0], len(tokens), options, {1}, tokenizer)
    pieces = []
    for token in tokens:
        sequence.choose(_logits(token))
        pieces.append(sequence.accept(0.1))
    assert "".join(piece.text for piece in pieces) == "ab"
    assert sequence.finish_reason == "stop"
