"""`generate`, `generate_batch` and `stream`: prompts, the loop and its ends."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import threading

import fake_bundle
import numpy as np
import pytest
from fake_bundle import CONTEXT, VOCAB, reference
from watching import Fault

import doge_onnx
from doge_onnx.bundle import Bundle
from doge_onnx.errors import InputError
from doge_onnx.runtime.generation.config import GenerationConfig
from doge_onnx.runtime.generation.defaults import Defaults
from doge_onnx.runtime.model import Model
from doge_onnx.runtime.text.tokenizer import Tokenizer

EOS = 1


@pytest.fixture(scope="module", params=["in_place", "copying"])
def model(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("bundle") / "b"
    return doge_onnx.load(fake_bundle.write(path, in_place=request.param == "in_place"))


class Script:
    """Runs no graph: whatever the prompts, sequence b is to say `texts[b]`, token by token.

    Attributes:
        fed: For each step, the new tokens of each sequence that took part, by its number.
    """

    def __init__(self, tokenizer: Tokenizer, *texts: str | list[int]) -> None:
        self.tokens = [
            tokenizer.encode(text)[1:] if isinstance(text, str) else list(text) for text in texts
        ]
        self.fed: list[dict[int, list[int]]] = []
        self.rows = list(range(len(texts)))

    def forward(self, tokens, state, last_only, consume=False, max_tokens=None):
        self.fed.append({row: ids.tolist() for row, ids in enumerate(tokens)})
        return [logits[None] for logits in self._logits()], None

    def decode(self, state):
        return self

    def step(self, token_ids, top=None):
        self.fed.append({row: [token] for row, token in zip(self.rows, token_ids, strict=True)})
        return self._logits()

    def remove(self, rows):
        self.rows = [row for row in self.rows if row not in rows]

    def _logits(self):
        step = len(self.fed) - 1
        result = np.ones((len(self.rows), VOCAB), np.float32)
        for logits, row in zip(result, self.rows, strict=True):
            logits[self.tokens[row][step] if step < len(self.tokens[row]) else EOS] = 10
        return list(result)


@pytest.fixture
def scripted(tmp_path):
    path = fake_bundle.write(tmp_path / "b")
    bundle = Bundle.open(path)
    tokenizer = Tokenizer(path / "tokenizer.json")

    def make(*texts):
        script = Script(tokenizer, *texts)
        return Model(bundle, script, Defaults.read(bundle), tokenizer), script

    return make


def text_of(pieces) -> str:
    return "".join(piece.text for piece in pieces)


def _greedily(prompt: list[int], count: int) -> list[int]:
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(reference(ids)[-1].argmax()))
    return ids[len(prompt) :]


def test_greedy_tokens_are_those_of_the_model(model):
    prompt = [4, 100, 33]
    out = model.generate(prompt, max_new_tokens=20)
    assert out.token_ids == _greedily(prompt, 20)
    assert (out.finish_reason, out.prompt_tokens, out.logprobs) == ("length", 3, None)
    assert model.generate(np.array(prompt), max_new_tokens=20).token_ids == out.token_ids


def test_each_prompt_of_a_batch_gets_what_it_gets_alone(model):
    prompts = [[4, 100, 33], [9], [200, 2, 3, 40, 50, 60, 7], [9]]
    together = model.generate_batch(prompts, max_new_tokens=25)
    for prompt, out in zip(prompts, together, strict=True):
        assert out.token_ids == model.generate(prompt, max_new_tokens=25).token_ids
    texts = ["the cat", "a much longer prompt than that"]
    together = model.generate_batch(texts, max_new_tokens=10)
    assert [o.text for o in together] == [model.generate(t, max_new_tokens=10).text for t in texts]
    lengths = [len(model.tokenizer.encode(text)) for text in texts]
    assert [out.prompt_tokens for out in together] == lengths
    first, _ = model.generate_batch(np.array([[4, 5], [6, 7]]), max_new_tokens=3)
    assert first.token_ids == model.generate((4, 5), max_new_tokens=3).token_ids
    assert model.generate_batch([]) == []


def test_rows_that_reach_the_context_do_not_disturb_the_others(model):
    long = np.random.default_rng(0).integers(2, VOCAB, CONTEXT - 3).tolist()
    full = [*long, 5, 6, 7]
    prompts = [long, [9, 8], full]
    alone = model.generate(prompts[1], max_new_tokens=12)
    ended, other, nothing = model.generate_batch(prompts, max_new_tokens=12)
    assert other.token_ids == alone.token_ids
    assert (len(ended.token_ids), ended.finish_reason) == (3, "length")
    assert ended.token_ids == model.generate(long).token_ids
    assert (nothing.token_ids, nothing.text, nothing.finish_reason) == ([], "", "length")


def test_without_a_limit_the_text_goes_on_to_the_end_of_the_context(model):
    out = model.generate([4, 4])
    assert len(out.token_ids) == CONTEXT - 2
    assert out.finish_reason == "length"


def test_a_sequence_that_has_ended_is_fed_no_more(scripted):
    model, script = scripted("x", "long text")
    short, long = model.generate_batch(["a", "bb"])
    assert script.fed[0] == {0: model.tokenizer.encode("a"), 1: model.tokenizer.encode("bb")}
    # Both run for as many tokens as the first has; the last of each is not fed.
    assert [list(step) for step in script.fed[1:]] == [[0, 1]] * (len(short.token_ids) - 1) + [
        [1]
    ] * (len(long.token_ids) - len(short.token_ids))
    assert [step[1][0] for step in script.fed[1:]] == long.token_ids[:-1]


def test_end_of_text_ends_a_text(scripted):
    model, script = scripted("the cat")
    out = model.generate("x")
    assert (out.text, out.finish_reason) == ("the cat", "eos")
    assert out.token_ids == [*script.tokens[0], EOS]
    assert len(script.fed) == len(out.token_ids)


def test_end_of_text_at_the_limit_is_still_end_of_text(scripted):
    model, script = scripted("the")
    out = model.generate("x", max_new_tokens=len(script.tokens[0]) + 1)
    assert out.finish_reason == "eos"


def test_rows_end_one_by_one(scripted):
    model, _ = scripted("the", "z" * 20, "the dog STOP and more", "y" * 20)
    outs = model.generate_batch(["a"] * 4, stop="STOP", max_new_tokens=12)
    assert [out.finish_reason for out in outs] == ["eos", "length", "stop", "length"]
    assert [out.text for out in outs[:1] + outs[2:3]] == ["the", "the dog "]
    assert [len(out.token_ids) for out in (outs[1], outs[3])] == [12, 12]


def test_a_stop_string_that_spans_tokens_ends_the_text_before_it(scripted):
    text = "the cat. The end. More"
    model, script = scripted(text)
    out = model.generate("x", stop=["End", "e en"])
    assert (out.text, out.finish_reason) == ("the cat. Th", "stop")
    # The tokens of the stop string are there, and the model was not run for more.
    assert model.tokenizer.decode(out.token_ids).startswith("the cat. The en")
    assert len(out.token_ids) == len(script.fed) < len(script.tokens[0])
    model, _ = scripted(text)
    pieces = list(model.stream("x", stop=["End", "e en"]))
    assert text_of(pieces) == out.text
    assert pieces[-1].finish_reason == "stop"


def test_what_only_begins_like_a_stop_string_is_not_lost(scripted):
    model, _ = scripted("the cat STO")
    out = model.generate("x", stop="STOP")
    assert (out.text, out.finish_reason) == ("the cat STO", "eos")
    assert text_of(scripted("the cat STO")[0].stream("x", stop="STOP")) == "the cat STO"


def test_streaming_shows_whole_characters_only(scripted):
    text = "naïve 😀 — 猫 end"
    model, _ = scripted(text)
    pieces = [piece.text for piece in model.stream("x")]
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert "😀" in pieces
    model, script = scripted(text)
    cut = next(i for i, piece in enumerate(pieces) if piece == "😀")
    out = model.generate("x", max_new_tokens=cut)
    assert out.text == model.tokenizer.decode(script.tokens[0][:cut])
    assert out.text.endswith("\ufffd")


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 1.5, "seed": 3}, {"stop": ["\ufffd", "e"]}]
)
def test_stream_and_generate_agree(model, options):
    out = model.generate("the cat", max_new_tokens=40, logprobs=True, **options)
    pieces = list(model.stream("the cat", max_new_tokens=40, logprobs=True, **options))
    assert text_of(pieces) == out.text
    assert [i for piece in pieces for i in piece.token_ids] == out.token_ids
    assert [value for piece in pieces for value in piece.logprobs] == out.logprobs
    assert [piece.finish_reason for piece in pieces] == [None] * (len(pieces) - 1) + [
        out.finish_reason
    ]
    assert pieces[-1].timings.generated_tokens == len(out.token_ids) == out.timings.generated_tokens
    assert all(piece.timings is None for piece in pieces[:-1])


def test_log_probabilities_are_those_of_the_model_whatever_the_options(model):
    prompt = [4, 100, 33]
    out = model.generate(
        prompt, max_new_tokens=8, logprobs=True, temperature=3, repetition_penalty=2.0, seed=1
    )
    logits = reference(prompt + out.token_ids)[len(prompt) - 1 : -1]
    expected = logits - logits.max(-1, keepdims=True)
    expected -= np.log(np.exp(expected).sum(-1, keepdims=True))
    np.testing.assert_allclose(out.logprobs, expected[np.arange(8), out.token_ids], atol=1e-3)


def test_a_seed_fixes_the_text_and_rows_draw_on_their_own(model):
    def sample(prompt, seed):
        return model.generate(prompt, max_new_tokens=15, temperature=40.0, seed=seed)

    def sample_batch(prompts, seed):
        return model.generate_batch(prompts, max_new_tokens=15, temperature=40.0, seed=seed)

    alone = sample([4, 5], 7)
    assert sample([4, 5], 7).token_ids == alone.token_ids
    assert sample([4, 5], 8).token_ids != alone.token_ids
    assert sample([4, 5], None).token_ids != sample([4, 5], None).token_ids
    first, second = sample_batch([[4, 5], [4, 5]], 7)
    assert first.token_ids == alone.token_ids
    assert second.token_ids != first.token_ids
    # What a row draws does not depend on who else is in the batch.
    assert sample_batch([[9], [4, 5], [2] * 5], 7)[1].token_ids == second.token_ids


def test_repetition_penalty_counts_prompt_and_text(scripted):
    model, _ = scripted([40, 40, 40])
    out = model.generate([50], max_new_tokens=3, repetition_penalty=1e9)
    # Once used, a token is worth less than the others, and the first of those is next.
    assert out.token_ids == [40, 0, 1]
    model, _ = scripted([40, 40, 40])
    assert model.generate([0, 40], max_new_tokens=1, repetition_penalty=1e9).token_ids == [1]
    model, _ = scripted([40, 40, 40])
    assert model.generate([50], max_new_tokens=3).token_ids == [40, 40, 40]


def test_no_new_tokens_is_an_empty_text(scripted):
    model, script = scripted("the cat")
    out = model.generate("x", max_new_tokens=0, logprobs=True)
    assert (out.text, out.token_ids, out.finish_reason, out.logprobs) == ("", [], "length", [])
    (piece,) = model.stream("x", max_new_tokens=0)
    assert (piece.text, piece.token_ids, piece.finish_reason) == ("", (), "length")
    assert out.timings.decode_tokens_per_second is out.timings.prefill_tokens_per_second is None
    assert script.fed == []


def test_timings_count_prefill_and_decode_apart(model):
    timings = model.generate([1, 2, 3], max_new_tokens=5).timings
    assert (timings.prompt_tokens, timings.generated_tokens) == (3, 5)
    assert timings.prefill_tokens_per_second == 3 / timings.prefill_seconds
    assert timings.decode_tokens_per_second == 4 / timings.decode_seconds


def test_a_model_may_be_used_from_several_threads(model):
    expected = model.generate([4, 100, 33], max_new_tokens=30).token_ids
    _, state = model.forward([[4, 100, 33]])
    results = []

    def run():
        ids, last, at = [], state, expected[0]
        for _ in range(20):
            ids.append(at)
            logits, last = model.forward([[at]], last)
            at = int(logits[0, 0].argmax())
        results.append(ids)

    threads = [threading.Thread(target=run) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [expected[:20]] * 6


def test_several_threads_may_generate_at_once(model):
    prompts = [[4, 100, 33], [9], [200, 2, 3, 40], [7, 7]]
    expected = [model.generate(prompt, max_new_tokens=40).token_ids for prompt in prompts]
    results = {}

    def run(number):
        results[number] = model.generate(prompts[number % 4], max_new_tokens=40).token_ids

    threads = [threading.Thread(target=run, args=[number]) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [results[number] for number in range(8)] == expected * 2


@pytest.mark.parametrize("batch", [1, 3])
def test_a_text_outgrows_its_first_buffer(model, batch):
    prompts = [[4, 100 + row, 33] for row in range(batch)]
    outs = model.generate_batch(prompts)
    for prompt, out in zip(prompts, outs, strict=True):
        assert len(out.token_ids) == CONTEXT - 3
        last = [*prompt, *out.token_ids][:-1]
        assert out.token_ids[-1] == int(reference(last)[-1].argmax())


def test_an_interrupted_text_leaves_the_model_as_it_was(model):
    expected = model.generate([4, 100, 33], max_new_tokens=10).token_ids
    fault = Fault(KeyboardInterrupt(), call=5)
    with pytest.raises(KeyboardInterrupt):
        model.generate([4, 100, 33], max_new_tokens=10, processors=[fault])
    assert model.generate([4, 100, 33], max_new_tokens=10).token_ids == expected


def test_a_bundle_without_a_tokenizer_takes_and_gives_ids(tmp_path):
    model = doge_onnx.load(fake_bundle.write(tmp_path / "b", with_tokenizer=False))
    out = model.generate([4, 5], max_new_tokens=3)
    assert (out.text, out.token_ids) == ("", _greedily([4, 5], 3))
    assert [piece.token_ids for piece in model.stream([4, 5], max_new_tokens=3)] == [
        (token,) for token in out.token_ids
    ]
    with pytest.raises(InputError, match=r"no tokenizer\.json; pass token ids"):
        model.generate("text")


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "prompt is empty"),
        ([[]], "generate_batch takes those"),
        (["a", ""], "generate_batch takes those"),
        ([1, VOCAB], f"token id {VOCAB} in row 0, position 1"),
        ([1, -1], "token id -1"),
        ([[1], [2, 999]], "generate_batch takes those"),
        ([1.5], "token ids are whole numbers, not float"),
        ([1, "a"], "token ids are whole numbers, not str"),
        (["a", 1], "token ids are whole numbers, not str"),
        ([True], "token ids are whole numbers, not bool"),
        (np.array([1.0]), "token ids are whole numbers, not float64"),
        (5, "list of messages, not int"),
        (None, "list of messages, not NoneType"),
        (np.array([[1, 2]]), "generate_batch takes those"),
        ([1, None], "token ids are whole numbers, not NoneType"),
        (b"bytes", "list of messages, not bytes"),
        (np.array(5), "list of messages"),
        ([4] * (CONTEXT + 1), "301 tokens, more than the context length of 300"),
    ],
)
def test_wrong_prompts_are_refused(model, prompt, message):
    with pytest.raises(InputError, match=message):
        model.generate(prompt, max_new_tokens=1)
    # By the call itself, not by the first piece.
    with pytest.raises(InputError, match=message):
        model.stream(prompt, max_new_tokens=1)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ("text", "generate takes one"),
        (None, "generate takes one"),
        ([1, 2], "^prompt 0: a prompt must be text"),
        ([{"role": "user", "content": "x"}], "^prompt 0: a prompt must be text"),
        ([[4, 100], [5, 999_999]], r"^prompt 1: token id 999999 "),
        ([[4], [5], []], r"^prompt 2: the prompt is empty"),
        ([[[1]]], "^prompt 0: this is a list of prompts"),
    ],
)
def test_wrong_prompts_of_a_batch_are_named(model, prompts, message):
    with pytest.raises(InputError, match=message):
        model.generate_batch(prompts, max_new_tokens=1)


def test_what_is_no_option_is_refused(model):
    with pytest.raises(InputError, match="config must be a GenerationConfig, not int"):
        model.generate("x", 40)
    with pytest.raises(InputError, match="no option 'max_tokens'"):
        model.generate("x", max_tokens=40)
    for call in (model.generate, model.stream):
        with pytest.raises(InputError, match=r"top_k must be .*, not -1"):
            call("x", top_k=-1)


def test_an_override_goes_before_the_config(model):
    config = GenerationConfig(max_new_tokens=4, temperature=40.0, seed=1)
    alone = model.generate([4, 5], max_new_tokens=6, temperature=40.0, seed=1)
    assert model.generate([4, 5], config, max_new_tokens=6).token_ids == alone.token_ids
    assert len(model.generate([4, 5], config, max_new_tokens=None).token_ids) == 4
    pieces = model.stream([4, 5], config)
    assert [piece.token_ids for piece in pieces] == [(token,) for token in alone.token_ids[:4]]


@pytest.mark.parametrize(
    "twin", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))]
)
def test_what_is_generated_is_a_plain_value(model, twin):
    out = model.generate("the cat", max_new_tokens=4, top_logprobs=2)
    assert twin(out) == out
    pieces = list(model.stream("the cat", max_new_tokens=4, top_logprobs=2))
    assert twin(pieces[-1]) == pieces[-1]
    assert pieces[-1].timings is not None
    with pytest.raises(dataclasses.FrozenInstanceError):
        pieces[0].text = "other"


def test_a_tiny_temperature_is_greedy_and_quiet(model, recwarn):
    cold = model.generate([4, 100, 33], max_new_tokens=5, temperature=1e-310, seed=3)
    assert cold.token_ids == model.generate([4, 100, 33], max_new_tokens=5).token_ids
    assert not list(recwarn)
