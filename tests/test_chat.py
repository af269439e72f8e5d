"""Conversations: answers to messages, the state that they keep, and the command line."""

from __future__ import annotations

import contextlib
import json
import signal

import fake_bundle
import older_checkpoints
import pytest
from chat_templates import PLAIN, tokenizer_files
from typer.testing import CliRunner
from watching import Fault, Watcher

import doge_onnx
from doge_onnx import cli, cli_chat
from doge_onnx.errors import InputError
from doge_onnx.runtime.engine.growing_runner import GrowingRunner

# --- answers to messages ------------------------------------------------------------------


@pytest.fixture(params=["in place", "copying"])
def path(request, tmp_path):
    in_place = request.param == "in place"
    return fake_bundle.write(tmp_path / "b", in_place=in_place, chat_template=PLAIN)


@pytest.fixture
def model(path):
    return doge_onnx.load(path)


def user(*contents):
    return [{"role": "user", "content": content} for content in contents]


def test_messages_are_a_prompt_and_lists_of_them_a_batch(model):
    short, long = user("the cat"), user("the dog and the hat", "and the cat")
    single = model.generate(short, max_new_tokens=8)
    assert single.text == model.generate(
        model.tokenizer.encode("<s>[user] the cat</s>[assistant] ", add_special_tokens=False),
        max_new_tokens=8,
    ).text  # fmt: skip
    pieces = model.stream(short, max_new_tokens=8)
    assert "".join(piece.text for piece in pieces) == single.text
    batch = model.generate_batch([short, long, "the"], max_new_tokens=8)
    alone = [single, *(model.generate(prompt, max_new_tokens=8) for prompt in (long, "the"))]
    assert [c.token_ids for c in batch] == [c.token_ids for c in alone]


def send(chat, watcher, content):
    """Say something; the answer, the tokens of its prompt, and how many are in the state then."""
    watcher.seen.clear()
    answer = chat.send(content)
    # The last token that is chosen is not fed.
    return answer, watcher.seen[0], len(watcher.seen[-1])


def turns(model, chat, watcher, *contents):
    """Say things; check each answer against one to the whole conversation, and what was fed."""
    known = 0
    for content in contents:
        said = [*chat.messages, *user(content)]
        answer, ids, fed = send(chat, watcher, content)
        # A model need not cut its text as a tokenizer would.
        whole = model.generate(ids, max_new_tokens=12)
        assert answer.token_ids == whole.token_ids
        assert chat.messages == [*said, {"role": "assistant", "content": answer.text}]
        assert answer.timings.cached_tokens == known
        known = fed
        text = model.tokenizer.decode(ids)
        prompt = model.apply_chat_template(said)
        assert text == prompt.replace("<s>", "").replace("</s>", "")


def test_each_turn_feeds_what_is_new_and_no_more(model):
    watcher = Watcher()
    chat = model.chat(system="and", max_new_tokens=12, processors=[watcher])
    assert chat.messages == [{"role": "system", "content": "and"}]
    turns(model, chat, watcher, "the cat", "the dog", "the hat and", "x")


def test_the_template_alone_says_how_an_answer_ends(model, tmp_path):
    # Whatever token that is, the model's own is not read beside it.
    token_ids = model.generate(user("the cat"), max_new_tokens=3).token_ids
    path = fake_bundle.write(
        tmp_path / "other", chat_template=PLAIN, generation={"eos_token_id": [1, token_ids[-1]]}
    )
    watcher = Watcher()
    chat = doge_onnx.load(path).chat(max_new_tokens=9, processors=[watcher])
    first = chat.send("the cat")
    assert (first.finish_reason, first.token_ids) == ("eos", token_ids)
    _, prompt, _ = send(chat, watcher, "the dog")
    encode = model.tokenizer.encode
    expected = [
        *encode("<s>[user] the cat</s>[assistant] ", add_special_tokens=False),
        *token_ids[:-1],
        *encode("</s>[user] the dog</s>[assistant] ", add_special_tokens=False),
    ]
    assert prompt == expected


def test_a_turn_goes_on_in_the_buffer_of_the_last_one(tmp_path, monkeypatch):
    buffers = []
    forward = GrowingRunner.forward

    def watched(*arguments, **keywords):
        logits, state = forward(*arguments, **keywords)
        buffers.append(state.buffer)
        return logits, state

    monkeypatch.setattr(GrowingRunner, "forward", watched)
    chat = doge_onnx.load(fake_bundle.write(tmp_path / "b", chat_template=PLAIN)).chat(
        max_new_tokens=12
    )
    for content in ("the cat", "the dog"):
        chat.send(content)
    assert len(buffers) >= 2
    assert all(buffer is buffers[0] for buffer in buffers)


def test_a_buffer_that_a_conversation_outgrows(model):
    watcher = Watcher()
    chat = model.chat(max_new_tokens=12, processors=[watcher])
    turns(model, chat, watcher, *["the cat and the dog"] * 4)


def test_a_stop_string_is_no_part_of_the_conversation(model):
    first = model.generate(user("the cat"), max_new_tokens=12).text
    chat = model.chat(max_new_tokens=12, stop=first[4])
    answer = chat.send("the cat")
    assert answer.finish_reason == "stop"
    assert chat.messages[-1]["content"] == answer.text == first[: first.index(first[4])]
    again = chat.send("the dog")
    whole = model.generate(chat.messages[:-1], max_new_tokens=12, stop=first[4])
    assert again.token_ids == whole.token_ids
    assert 0 < again.timings.cached_tokens < again.prompt_tokens


def test_only_one_of_two_answers_that_were_asked_for_at_once_begins(model):
    chat = model.chat(max_new_tokens=5)
    first, second = chat.stream("one"), chat.stream("two")
    next(first)
    with pytest.raises(InputError, match="has not ended"):
        next(second)
    first.close()
    assert [message["content"] for message in chat.messages[::2]] == ["one"]


def test_an_answer_that_is_closed_stands_as_far_as_it_was_read(model):
    watcher = Watcher()
    chat = model.chat(max_new_tokens=50, processors=[watcher])
    answer = chat.stream("the cat")
    read = "".join(next(answer).text for _ in range(7))
    with pytest.raises(InputError, match="has not ended"):
        chat.send("x")
    answer.close()
    assert chat.messages[1:] == [{"role": "assistant", "content": read}]
    fed = len(watcher.seen[-1])
    following, ids, _ = send(chat, watcher, "the dog")
    assert following.timings.cached_tokens > 5
    assert following.timings.cached_tokens <= fed
    assert following.token_ids == model.generate(ids, max_new_tokens=50).token_ids


def test_an_answer_that_is_not_begun_changes_nothing(model):
    chat = model.chat(max_new_tokens=5)
    chat.stream("the cat").close()
    assert chat.messages == []
    assert (
        chat.send("the dog").token_ids
        == model.generate(user("the dog"), max_new_tokens=5).token_ids
    )


def test_a_run_that_fails_is_forgotten_and_read_again(model):
    fault = Fault(ZeroDivisionError(), call=8)
    chat = model.chat(max_new_tokens=6, processors=[fault])
    assert len(chat.send("the cat").token_ids) == 6
    with pytest.raises(ZeroDivisionError):
        chat.send("the dog")
    following, ids, _ = send(chat, fault, "and")
    assert following.timings.cached_tokens == 0
    assert following.token_ids == model.generate(ids, max_new_tokens=6).token_ids


def test_messages_may_be_changed_between_turns(model):
    watcher = Watcher()
    chat = model.chat(max_new_tokens=6, processors=[watcher])
    chat.send("the cat")
    chat.send("the dog")
    # The last turn never was.
    del chat.messages[2:]
    again, ids, _ = send(chat, watcher, "the hat")
    assert again.timings.cached_tokens > 0
    assert again.token_ids == model.generate(ids, max_new_tokens=6).token_ids
    assert [message["content"] for message in chat.messages[::2]] == ["the cat", "the hat"]


def test_the_oldest_turns_are_forgotten_when_the_context_is_full(model):
    watcher = Watcher()
    chat = model.chat(system="and", max_new_tokens=10, processors=[watcher])
    for number in range(12):
        answer, ids, _ = send(chat, watcher, f"the cat {number} and the dog and the hat")
        assert len(answer.token_ids) == 10
        assert answer.prompt_tokens <= fake_bundle.CONTEXT - 10
        assert answer.token_ids == model.generate(ids, max_new_tokens=10).token_ids
    assert chat.messages[0] == {"role": "system", "content": "and"}
    assert chat.messages[1]["role"] == "user"
    assert 2 < len(chat.messages) < 25
    assert " 11 " in chat.messages[-2]["content"]
    with pytest.raises(InputError, match="more than the context length"):
        chat.send("the " * 400)
    assert " 11 " in chat.messages[-2]["content"]


def test_answers_that_are_sampled_draw_numbers_of_their_own(model):
    def answers():
        chat = model.chat(temperature=2.0, seed=3, max_new_tokens=8)
        return [chat.send("the cat").token_ids for _ in range(2)]

    first = answers()
    assert first == answers()
    assert first[0] != first[1]


@pytest.mark.slow
def test_a_conversation_with_a_state_of_constant_size(tmp_path):
    checkpoint = tmp_path / "checkpoint"
    older_checkpoints.make(
        checkpoint, "native", vocab_size=4096, keep_window_size=24, num_hidden_layers=1
    )
    tokenizer_files(checkpoint, chat_template=PLAIN)
    path = tmp_path / "bundle"
    doge_onnx.export(checkpoint, path, state="window", verify=False)
    model = doge_onnx.load(path)
    watcher = Watcher()
    chat = model.chat(max_new_tokens=12, processors=[watcher])
    known = 0
    for content in ("Hello there", "And then?", "More"):
        answer, ids, fed = send(chat, watcher, content)
        assert answer.token_ids == model.generate(ids, max_new_tokens=12).token_ids
        assert answer.timings.cached_tokens == known
        known = fed
    assert known > 24
    # It cannot go back: everything is read again.
    del chat.messages[2:]
    again, ids, _ = send(chat, watcher, "Hm")
    assert again.timings.cached_tokens == 0
    assert again.token_ids == model.generate(ids, max_new_tokens=12).token_ids


# --- the command line ---------------------------------------------------------------------


def invoke(*arguments, **options):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments], **options)


def test_generate_answers_a_message(model, path):
    result = invoke("generate", path, "--chat", "the cat", "--max-new-tokens", 8)
    assert result.stdout == model.generate(user("the cat"), max_new_tokens=8).text + "\n"
    result = invoke(
        "generate", path, "--chat", "--system", "and", "--json", "--max-new-tokens", 8,
        input="the cat\n",
    )  # fmt: skip
    told = [{"role": "system", "content": "and"}, *user("the cat")]
    assert json.loads(result.stdout)["text"] == model.generate(told, max_new_tokens=8).text
    result = invoke("generate", path, "x", "--system", "and")
    assert (result.exit_code, "--chat" in result.stderr) == (2, True)


def test_chat_answers_line_by_line(model, path):
    result = invoke(
        "chat", path, "--system", "and", "--max-new-tokens", 8, input="the cat\n\n  \nthe dog é"
    )
    chat = model.chat(system="and", max_new_tokens=8)
    answers = [chat.send(content).text for content in ("the cat", "the dog é")]
    assert result.stdout == "".join(answer + "\n" for answer in answers)
    assert (result.exit_code, result.stderr) == (0, "")


def test_chat_says_when_it_forgets(path):
    result = invoke("chat", path, "--max-new-tokens", 4, input="the cat and the hat\n" * 12)
    assert result.exit_code == 0
    assert "are forgotten" in result.stderr


@pytest.mark.parametrize(
    ("template", "given", "words"),
    [
        (None, "x\n", "no chat template"),
        ("{% for %}", "x\n", "no valid Jinja"),
        ("{{ raise_exception('no') }}", "x\n", "refuses this: no"),
        (PLAIN, b"\xff\n", "not UTF-8"),
        (PLAIN, "the " * 400, "more than the context length"),
    ],
)
def test_what_is_wrong_with_a_chat_is_one_line(template, given, words, tmp_path):
    path = fake_bundle.write(tmp_path / "b", chat_template=template)
    result = invoke("chat", path, input=given)
    assert (result.exit_code, result.stdout) == (1, "")
    assert words in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_ctrl_c_ends_an_answer_and_not_the_conversation(model, capsys):
    chat = model.chat(max_new_tokens=50)
    before = signal.getsignal(signal.SIGINT)
    count = 0

    def interrupted():
        nonlocal count
        with contextlib.closing(chat.stream("the cat")) as answer:
            for piece in answer:
                count += 1
                if count == 3:
                    signal.raise_signal(signal.SIGINT)
                yield piece

    cli_chat.print_answer(interrupted(), interactive=True)
    assert signal.getsignal(signal.SIGINT) is before
    assert count == 3
    assert capsys.readouterr().out == chat.messages[-1]["content"] + "\n"
    assert chat.send("the dog").timings.cached_tokens > 0
