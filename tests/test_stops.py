"""What ends a text: stop strings, however the text is cut and among special tokens; stop tokens."""

from __future__ import annotations

import fake_bundle
import numpy as np
import pytest
from chat_templates import PLAIN
from fake_bundle import BOS, VOCAB
from hypothesis import given, settings
from hypothesis import strategies as st
from watching import Watcher

import doge_onnx
from doge_onnx.errors import InputError
from doge_onnx.runtime.generation.config import GenerationConfig
from doge_onnx.runtime.generation.sequence import GeneratedSequence
from doge_onnx.runtime.text.stops import StopFinder
from doge_onnx.runtime.text.tokenizer import Tokenizer

BOS_ID, EOS_ID = 0, 1
PROMPT = [4, 100, 33]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    fake_bundle.tokenizer().save(str(path))
    return Tokenizer(path)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return doge_onnx.load(fake_bundle.write(tmp_path_factory.mktemp("bundle") / "b"))


# --- stop strings -------------------------------------------------------------------------


def _stopped(stops, pieces) -> tuple[str, bool]:
    finder = StopFinder(stops)
    text = "".join(finder.push(piece) for piece in pieces)
    return text + finder.flush(), finder.found


def _expected(stops, text) -> tuple[str, bool]:
    """By definition: read character by character until a stop string is complete."""
    for end in range(1, len(text) + 1):
        ended = [stop for stop in stops if text[:end].endswith(stop)]
        if ended:
            return text[: end - len(max(ended, key=len))], True
    return text, False


@settings(max_examples=300)
@given(
    text=st.text("ab", max_size=12),
    stops=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    data=st.data(),
)
def test_stop_strings_are_found_however_the_text_is_cut(text, stops, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=5)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert _stopped(stops, pieces) == _expected(stops, text)


def test_only_what_may_become_a_stop_string_is_held_back():
    finder = StopFinder(["STOP"])
    assert [finder.push(p) for p in ("abS", "T", "x", "yST", "OP more")] == [
        "ab",
        "",
        "STx",
        "y",
        "",
    ]
    assert finder.found
    assert finder.push("after") == "" == finder.flush()


@settings(max_examples=200)
@given(
    parts=st.lists(st.tuples(st.text("ab", max_size=3), st.booleans()), max_size=8),
    stops=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
)
def test_hidden_text_is_looked_at_and_not_returned(parts, stops):
    finder = StopFinder(stops)
    shown = "".join(finder.push(text, hidden=hidden) for text, hidden in parts) + finder.flush()
    before, found = _expected(stops, "".join(text for text, _ in parts))
    hidden = [flag for text, flag in parts for _ in text]
    assert finder.found == found
    assert shown == "".join(c for c, h in zip(before, hidden, strict=False) if not h)


def pieces_of(tokenizer, tokens, eos=(), **options):
    """The pieces of a text whose tokens are given; it is fed no more of them when it has ended."""
    config = GenerationConfig(temperature=0, **options)
    sequence = GeneratedSequence([BOS_ID], len(tokens), config, set(eos), tokenizer)
    pieces = []
    for token in tokens:
        logits = np.zeros(VOCAB, np.float32)
        logits[token] = 1
        sequence.choose(logits)
        pieces.append(sequence.accept(0.1))
        if sequence.finish_reason is not None:
            break
    return [piece.text for piece in pieces], sequence.finish_reason


def ids_of(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False)


@pytest.mark.parametrize(
    ("text", "stop", "shown", "reason"),
    [
        ("the cat<s> dog", "<s>", "the cat", "stop"),
        ("<s>the cat", "<s>", "", "stop"),
        ("the<s>\n cat", "<s>\n", "the", "stop"),
        ("the<s> cat", "<s>\n", "the cat", "length"),
        ("the cat<s>\n dog", "t<s>\n", "the ca", "stop"),
        ("the<s><s> cat", "<s><s>", "the", "stop"),
        ("the<s> cat<s><s>", ["<s><s>", "zz"], "the cat", "stop"),
        ("the<s> cat", " c", "the", "stop"),
        # A special token stands between the two.
        ("the<s> cat", "the cat", "the cat", "length"),
        # A part of its name.
        ("the<s> cat", "e<", "th", "stop"),
        # It ends the text anyway.
        ("the cat</s> dog", "</s>", "the cat", "stop"),
        ("the cat</s> dog", "t</s>", "the ca", "stop"),
        ("the cat</s> dog", "z</s>", "the cat", "eos"),
    ],
)
def test_stop_strings_are_found_among_special_tokens(tokenizer, text, stop, shown, reason):
    texts, ended = pieces_of(tokenizer, ids_of(tokenizer, text), {EOS_ID}, stop=stop)
    assert ("".join(texts), ended) == (shown, reason)


def test_what_may_become_a_stop_string_is_held_back_over_special_tokens(tokenizer):
    tokens = [ids_of(tokenizer, part)[0] for part in ("a", BOS, "b", "c", "a", BOS, "b", "d")]
    assert pieces_of(tokenizer, tokens, stop="a<s>bd") == (
        ["", "", "", "abc", "", "", "", ""],
        "stop",
    )


def test_half_a_character_before_a_stop_is_part_of_the_text(tokenizer):
    first, second = ids_of(tokenizer, "\u00e9")
    a = ids_of(tokenizer, "a")
    texts, reason = pieces_of(tokenizer, [*a, first, BOS_ID, second], stop=BOS)
    assert ("".join(texts), reason) == ("a\ufffd", "stop")
    # The half stands between the letter and the special token.
    texts, reason = pieces_of(tokenizer, [*a, first, BOS_ID, second], stop="a<s>")
    assert ("".join(texts), reason) == ("a\u00e9", "length")
    texts, reason = pieces_of(tokenizer, [first, second, BOS_ID, *a], stop="\u00e9<s>")
    assert ("".join(texts), reason) == ("", "stop")


def test_every_way_to_a_text_finds_special_tokens(model):
    # The model is made to write its first three tokens and then a special one, and again.
    def script(tokens, logits):
        logits[BOS_ID if len(tokens) % 4 == 3 else 5 + len(tokens)] = 1e4
        return logits

    options = {"max_new_tokens": 12, "processors": [script], "stop": [BOS]}
    alone = model.generate([4, 5], **options)
    assert (alone.finish_reason, alone.token_ids) == ("stop", [7, BOS_ID])
    pieces = list(model.stream([4, 5], **options))
    assert "".join(piece.text for piece in pieces) == alone.text == model.tokenizer.decode([7])
    batch = model.generate_batch([[4, 5], [4, 5, 6, 7]], **options)
    assert [out.finish_reason for out in batch] == ["stop", "stop"]
    assert batch[0].text == alone.text


def test_without_a_tokenizer_stop_strings_are_refused(tmp_path):
    path = fake_bundle.write(
        tmp_path / "b", generation={"stop_strings": ["x"]}, with_tokenizer=False
    )
    model = doge_onnx.load(path)
    with pytest.raises(InputError, match=r"stop strings need text, and .* has no tokenizer\.json"):
        model.generate(PROMPT, max_new_tokens=3)
    assert len(model.generate(PROMPT, max_new_tokens=3, stop=[]).token_ids) == 3


# --- stop tokens --------------------------------------------------------------------------


@pytest.mark.parametrize("ignore_eos", [False, True])
def test_a_stop_token_ends_a_text_and_is_no_part_of_it(model, ignore_eos):
    plain = model.generate(PROMPT, max_new_tokens=9)
    token = plain.token_ids[4]
    at = plain.token_ids.index(token)
    for value in (token, [token, 200], np.array([token]).tolist()):
        out = model.generate(PROMPT, max_new_tokens=9, stop_token_ids=value, ignore_eos=ignore_eos)
        assert (out.token_ids, out.finish_reason) == (plain.token_ids[: at + 1], "stop")
        assert out.text == model.tokenizer.decode(plain.token_ids[:at])
    # It may end no text before its fewest tokens, like an end-of-text token.
    out = model.generate(PROMPT, max_new_tokens=9, stop_token_ids=token, min_new_tokens=9)
    assert token not in out.token_ids[:-1]
    with pytest.raises(InputError, match=f"stop_token_ids has token id {VOCAB}, and the vocab"):
        model.generate(PROMPT, stop_token_ids=[VOCAB])


def test_what_ends_an_answer_is_no_part_of_the_conversation(tmp_path):
    watcher = Watcher()
    model = doge_onnx.load(fake_bundle.write(tmp_path / "b", chat_template=PLAIN))
    plain = model.chat(max_new_tokens=12).send("the cat")
    for options in ({"stop_token_ids": plain.token_ids[5]}, {"stop": BOS}):

        def script(tokens, logits):
            # The special token, in place of the fifth.
            if len(tokens) == plain.prompt_tokens + 5:
                logits[BOS_ID] = 1e4
            return logits

        chat = model.chat(max_new_tokens=12, processors=[script, watcher], **options)
        answer = chat.send("the cat")
        assert answer.finish_reason == "stop"
        assert chat.messages[1]["content"] == answer.text
        watcher.seen.clear()
        chat.send("the dog")
        fed = model.tokenizer.decode(watcher.seen[0], skip_special_tokens=False)
        assert fed == model.apply_chat_template(chat.messages[:-1])


# --- other limits -------------------------------------------------------------------------


def test_a_limit_of_the_whole_length_counts_the_prompt(model):
    out = model.generate(PROMPT, max_length=8)
    assert (len(out.token_ids), out.finish_reason) == (5, "length")
    assert len(model.generate(PROMPT, max_length=8, max_new_tokens=9).token_ids) == 9
    assert model.generate(PROMPT, max_length=3).token_ids == []
    with pytest.raises(InputError, match="the prompt has 3 tokens, more than max_length, which is"):
        model.generate(PROMPT, max_length=2)
    with pytest.raises(InputError, match="more than the context length of 300"):
        model.generate([4] * 301, max_length=900)


def test_a_conversation_keeps_within_the_limit_of_the_whole_length(tmp_path):
    model = doge_onnx.load(fake_bundle.write(tmp_path / "b", chat_template=PLAIN))
    chat = model.chat(max_length=80)
    for content in ("the cat", "the dog and the hat", "and the cat", "the hat"):
        answer = chat.send(content)
        assert answer.finish_reason == "eos" or (answer.prompt_tokens + len(answer.token_ids) == 80)
        # A quarter is left for the answer.
        assert answer.prompt_tokens <= 60
    assert len(chat.messages) < 8


def test_the_last_token_can_be_forced(model):
    plain = model.generate(PROMPT, max_new_tokens=6)
    out = model.generate(PROMPT, max_new_tokens=6, forced_eos_token_id=77)
    assert out.token_ids == [*plain.token_ids[:5], 77]
    filled = model.generate([4] * 298, forced_eos_token_id=77)
    assert (len(filled.token_ids), filled.token_ids[-1]) == (2, 77)


def test_a_limit_of_time_ends_a_text_with_the_token_that_exceeds_it(tokenizer):
    # Each token takes a tenth of a second.
    texts, reason = pieces_of(tokenizer, ids_of(tokenizer, "zzzzzz"), max_time=0.25)
    assert (texts, reason) == (["z", "z", "z"], "length")
    texts, reason = pieces_of(tokenizer, ids_of(tokenizer, "zzzzzz"), max_time=0)
    assert (texts, reason) == (["z"], "length")
