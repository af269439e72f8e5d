"""What a prompt becomes: how an empty one begins, and answers that the caller begins."""

from __future__ import annotations

import fake_bundle
import pytest
from chat_templates import PLAIN, TEMPLATES
from commands import assert_one_line_error, invoke
from tokenizers import Tokenizer
from watching import Watcher, prompt_ids

import doge_onnx
from doge_onnx.bundle import seal
from doge_onnx.errors import InputError


def bundle(path, **options):
    """A bundle whose tokenizer puts nothing before a text."""
    fake_bundle.write(path, **options)
    (path / "doge_onnx.json").unlink()
    plain = Tokenizer.from_file(str(path / "tokenizer.json"))
    plain.post_processor = None
    plain.save(str(path / "tokenizer.json"))
    seal(path, fake_bundle.manifest())
    return path


def everywhere(path, expected: list[int]) -> None:
    """Check that an empty text becomes these tokens, whoever asks for it."""
    model = doge_onnx.load(path)
    watcher = Watcher()
    text = model.generate("", max_new_tokens=5, processors=[watcher]).text
    assert watcher.seen[0] == expected
    assert "".join(piece.text for piece in model.stream("", max_new_tokens=5)) == text
    assert model.generate_batch(["", "x"], max_new_tokens=5)[0].text == text
    for arguments, piped in ((["", "--"], None), ([], b""), (["-"], b"\n"), ([], b"\xef\xbb\xbf")):
        result = invoke("generate", path, "--max-new-tokens", 5, *arguments, input=piped)
        assert result.stdout == text + "\n"


def test_an_empty_text_is_what_the_tokenizer_puts_before_every_text(tmp_path):
    everywhere(fake_bundle.write(tmp_path / "b", config={"bos_token_id": 7}), [0])


def test_an_empty_text_is_the_token_that_texts_begin_with(tmp_path):
    everywhere(bundle(tmp_path / "a", config={"bos_token_id": 7}), [7])
    both = bundle(tmp_path / "b", config={"bos_token_id": 7}, generation={"bos_token_id": 8})
    everywhere(both, [8])
    # Others do not get it.
    model = doge_onnx.load(both)
    assert prompt_ids(model, "x") == model.tokenizer.encode("x")


@pytest.mark.parametrize("config", [{}, {"bos_token_id": None}, {"bos_token_id": -1}])
def test_an_empty_text_without_such_a_token_is_refused(config, tmp_path):
    path = bundle(tmp_path / "b", config=config)
    assert_one_line_error(invoke("generate", path, ""), "the prompt is empty")
    with pytest.raises(InputError, match="prompt 1: the prompt is empty"):
        doge_onnx.load(path).generate_batch(["x", ""])


def test_no_token_ids_are_no_empty_text(tmp_path):
    with pytest.raises(InputError, match="the prompt is empty"):
        doge_onnx.load(fake_bundle.write(tmp_path / "b")).generate([])


# --- answers that the caller begins -------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "start", "kept"),
    [
        (PLAIN, "and the ", "and the "),
        (PLAIN, " and", " and"),
        (TEMPLATES["Llama 3"], " and the ", "and the"),
        (TEMPLATES["Llama 3"], "and", "and"),
    ],
)
def test_a_conversation_keeps_the_beginning_of_an_answer(template, start, kept, tmp_path):
    model = doge_onnx.load(fake_bundle.write(tmp_path / "b", chat_template=template))
    watcher = Watcher()
    chat = model.chat(max_new_tokens=6, processors=[watcher])
    answer = chat.send("the cat", answer_start=start)
    begun = [
        {"role": "user", "content": "the cat"},
        {"role": "assistant", "content": start},
    ]
    expected = model.generate(begun, continue_final_message=True, max_new_tokens=6)
    assert answer.token_ids == expected.token_ids
    assert chat.messages == [begun[0], {"role": "assistant", "content": kept + answer.text}]
    # The next turn goes on in the same state.
    watcher.seen.clear()
    following = chat.send("the dog")
    whole = model.apply_chat_template([*chat.messages[:2], {"role": "user", "content": "the dog"}])
    assert model.tokenizer.decode(watcher.seen[0], False) == whole
    assert following.timings.cached_tokens > len(expected.token_ids)


def test_parts_are_a_message_of_a_conversation(tmp_path):
    model = doge_onnx.load(fake_bundle.write(tmp_path / "b", chat_template=PLAIN))
    parts = [{"type": "text", "text": "the "}, {"type": "text", "text": "cat"}]
    chat, other = (model.chat(max_new_tokens=6) for _ in range(2))
    assert chat.send(parts).token_ids == other.send("the cat").token_ids
    assert chat.send("x").token_ids == other.send("x").token_ids
    with pytest.raises(InputError, match="'image'"):
        chat.send([{"type": "image"}])
    assert len(chat.messages) == 4
