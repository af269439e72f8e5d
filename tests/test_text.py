"""The tokenizer, and text that grows token by token."""

from __future__ import annotations

import fake_bundle
import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from doge_onnx.errors import BundleError, InputError
from doge_onnx.runtime.text.tokenizer import TextStream, Tokenizer


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    path = tmp_path_factory.mktemp("byte") / "tokenizer.json"
    fake_bundle.tokenizer().save(str(path))
    return Tokenizer(path)


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory):
    """In the way of Llama 2: a leading space per word, and bytes for what is not in it."""
    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁the", "▁cat", "s", "▁a"]
    result = tokenizers.Tokenizer(
        models.BPE({w: i for i, w in enumerate(words)}, [], byte_fallback=True, unk_token="<unk>")
    )
    result.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    result.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    path = tmp_path_factory.mktemp("sentencepiece") / "tokenizer.json"
    result.save(str(path))
    return Tokenizer(path), {word: i for i, word in enumerate(words)}


@pytest.fixture(scope="module")
def metaspace(tmp_path_factory):
    words = ["<unk>", "▁the", "▁cat", "s", "▁a"]
    result = tokenizers.Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, "<unk>"))
    result.decoder = decoders.Metaspace()
    path = tmp_path_factory.mktemp("metaspace") / "tokenizer.json"
    result.save(str(path))
    return Tokenizer(path), {word: i for i, word in enumerate(words)}


def _pieces(tokenizer: Tokenizer, ids, prompt=()) -> list[str]:
    stream = TextStream(tokenizer, prompt)
    return [*(stream.push(i) for i in ids), stream.flush()]


def _byte(tokenizer: Tokenizer, value: int) -> int:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    order = printable + [b for b in range(256) if b not in printable]
    character = chr(value) if value in printable else chr(256 + order.index(value) - len(printable))
    assert character in alphabet
    return fake_bundle.tokenizer().token_to_id(character)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=40))
def test_pieces_join_to_the_text_and_none_has_half_a_character(byte_level, text):
    text = text.replace("\ufffd", "")
    ids = [_byte(byte_level, value) for value in text.encode()]
    pieces = _pieces(byte_level, ids)
    assert "".join(pieces) == text
    assert "\ufffd" not in "".join(pieces)
    # A character comes with its last byte, not later.
    assert len("".join(pieces[:-1])) == len(text)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, fake_bundle.VOCAB + 3), max_size=60))
def test_any_tokens_join_to_what_the_tokenizer_decodes(byte_level, ids):
    expected = fake_bundle.tokenizer().decode(ids, skip_special_tokens=True)
    assert "".join(_pieces(byte_level, ids)) == expected


def test_a_character_comes_when_its_last_byte_does(byte_level):
    ids = [_byte(byte_level, value) for value in "a😀b".encode()]
    assert _pieces(byte_level, ids) == ["a", "", "", "", "😀", "b", ""]


def test_half_a_character_at_the_end_comes_with_the_flush(byte_level):
    ids = [_byte(byte_level, value) for value in "é".encode()][:1]
    assert _pieces(byte_level, ids) == ["", "\ufffd"]


def test_special_tokens_between_the_bytes_of_a_character_do_not_matter(byte_level):
    first, second = (_byte(byte_level, value) for value in "é".encode())
    assert _pieces(byte_level, [first, 0, 10**6, second]) == ["", "", "", "é", ""]


def test_half_a_character_of_the_prompt_is_not_part_of_the_text(byte_level):
    first, second = (_byte(byte_level, value) for value in "é".encode())
    pieces = _pieces(byte_level, [second, _byte(byte_level, 97)], prompt=[first])
    assert "".join(pieces) == "\ufffda"


def test_a_character_after_many_stray_bytes_is_whole(byte_level):
    for count in range(10, 40):
        ids = [_byte(byte_level, value) for value in b"\x80" * count + "😀".encode()]
        assert "".join(_pieces(byte_level, ids)) == "\ufffd" * count + "😀"


def test_no_more_than_a_short_window_is_ever_decoded(byte_level):
    sizes = []

    class Counting:
        visible = staticmethod(byte_level.visible)

        @staticmethod
        def decode(ids):
            sizes.append(len(ids))
            return byte_level.decode(ids)

    stray = _byte(byte_level, 0x80)
    stream = TextStream(Counting(), [])
    text = "".join(stream.push(i) for i in [97] * 500 + [stray] * 500 + [97] * 500)
    assert text + stream.flush() == byte_level.decode([97] * 500 + [stray] * 500 + [97] * 500)
    assert max(sizes) < 40


def test_spaces_before_words_survive(sentencepiece, metaspace):
    for tokenizer, ids in (sentencepiece, metaspace):
        words = [ids[w] for w in ("▁the", "▁cat", "s", "▁a")]
        assert _pieces(tokenizer, words) == ["the", " cat", "s", " a", ""]
        assert _pieces(tokenizer, words[1:], prompt=words[:1]) == [" cat", "s", " a", ""]


def test_a_lone_space_token_survives(sentencepiece):
    tokenizer, ids = sentencepiece
    tokens = [ids[w] for w in ("▁the", "▁", "▁", "▁cat")]
    assert "".join(_pieces(tokenizer, tokens)) == "the   cat"


def test_fallback_bytes_become_characters(sentencepiece):
    tokenizer, ids = sentencepiece
    tokens = [ids[f"<0x{byte:02X}>"] for byte in ("€" * 30 + "😀é").encode()]
    pieces = _pieces(tokenizer, [ids["▁the"], *tokens, ids["▁a"]])
    assert "".join(pieces) == "the" + "€" * 30 + "😀é a"
    assert pieces[1:4] == ["", "", "€"]


def test_a_file_that_is_no_tokenizer_is_named(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text("[]")
    with pytest.raises(BundleError, match=r"tokenizer\.json does not hold a tokenizer"):
        Tokenizer(path)


def test_truncation_and_padding_of_the_file_do_not_touch_a_prompt(tmp_path):
    result = fake_bundle.tokenizer()
    result.enable_truncation(3)
    result.enable_padding(length=8)
    path = tmp_path / "tokenizer.json"
    result.save(str(path))
    tokenizer = Tokenizer(path)
    assert len(tokenizer.encode("zzzzz")) == 6
    assert len(tokenizer.encode("z")) == 2


def test_a_lone_surrogate_is_refused(byte_level):
    with pytest.raises(InputError, match="surrogate at position 1"):
        byte_level.encode("a\ud800")


def test_a_tokenizer_gives_text_back(byte_level):
    ids = byte_level.encode("the café")
    assert byte_level.token(ids[0]) == fake_bundle.BOS
    assert byte_level.decode(ids) == "the café"
    assert byte_level.decode(np.array(ids), skip_special_tokens=False) == "<s>the café"
    # What is no token has no text.
    assert byte_level.decode([*ids, 10**6]) == "the café"
    assert byte_level.token(10**6) is None
    assert byte_level.decode([]) == ""


@pytest.mark.parametrize("ids", [[-1], [1.5], ["a"], [None], [2**40]])
def test_what_is_no_token_id_has_no_text(byte_level, ids):
    with pytest.raises(InputError, match="token ids are whole numbers"):
        byte_level.decode(ids)
