"""Chat templates, next to transformers, and conversations that keep their state."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import signal
import sys
from datetime import datetime

import fake_bundle
import older_checkpoints
import pytest
import transformers
from conftest import TINY_CHECKPOINT
from typer.testing import CliRunner

import doge_onnx
from doge_onnx import cli, cli_chat
from doge_onnx.bundle import Bundle, seal
from doge_onnx.errors import BundleError, InputError
from doge_onnx.runtime.text import chat_template as chats
from doge_onnx.runtime.text.chat_template import ChatTemplate

# In the style of what is on the Hub, each with something that another has not.
TEMPLATES = {
    "ChatML": """\
{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ \
'<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}{% endif %}{{'<|im_start|>' + \
message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}{% endfor %}{% if \
add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}""",
    "Llama 3": """\
{% set loop_messages = messages %}
{% for message in loop_messages %}
    {% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' \
+ message['content'] | trim + '<|eot_id|>' %}
    {% if loop.index0 == 0 %}
        {% set content = bos_token + content %}
    {% endif %}
    {{- content }}
{% endfor %}
{% if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{% endif %}
""",
    # With a date in the system's message, as the Doge models that are tuned on instructions.
    "Doge": """\
{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = strftime_now("%B %Y") %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n" }}
{%- if tools is not none %}
    {{- "Environment: ipython\\n" }}
{%- endif %}
{{- "Today Date: " + date_string + "\\n" }}
{{- system_message + eos_token + "\\n\\n" }}
{%- for message in messages %}
    {%- if message.role == 'tool' or 'tool_calls' in message %}{% continue %}{%- endif %}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n' }}
{{- message['content'] + eos_token + '\\n\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n' }}
{%- endif %}
""",
    "strict": """\
{{ bos_token }}{% for message in messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Roles must alternate') }}
{% elif message['role'] == 'user' %}
[INST] {{ message['content'] }} [/INST]
{%- else %}
{% generation %}
 {{ message['content'] }}{{ eos_token }}
{% endgeneration %}
{% endif %}
{% endfor %}
""",
    "everything": """\
{%- macro one(message, last=false) -%}
  {{ message.role | upper }}: {{ message | tojson }}{{ '' if last else pad_token }}
{%- endmacro -%}
{% set ns = namespace(count=0) %}
{% for message in messages %}
  {% if message.content is defined and message.content | length > 900 %}
    {% break %}
  {% endif %}
  {% set ns.count = ns.count + 1 %}
{{ one(message, loop.last) }} {{ unk_token }}{{ sep_token is defined }}
  {# not seen #}
{% endfor %}
{{ ns.count }} {{ messages | map(attribute='role') | join(',') }} {{ tools is none }}
{{ messages[0] | tojson(indent=2) }}  {{ 'é<&>' | tojson }} {{ [3, 1] | sort }}

""",
}
CONVERSATIONS = [
    [{"role": "user", "content": "Hello"}],
    [
        {"role": "system", "content": "  Be <kind> & “brief”.\n"},
        {"role": "user", "content": " Who are you?\n\n{{ bos_token }} <|eot_id|>"},
        {"role": "assistant", "content": "日本語 🐕"},
        {"role": "user", "content": ""},
    ],
    [
        {"role": "user", "content": "a", "name": "b", "nothing": None},
        {"role": "assistant", "content": "\tc  "},
        {"role": "user", "content": "d" * 1000},
    ],
]
# One that any conversation suits.
PLAIN = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
)


def tokenizer_files(directory, **changes):
    """The tokenizer of examples/doge-tiny in a bundle, with changes to its config."""
    for path in TINY_CHECKPOINT.glob("*token*.json"):
        shutil.copy(path, directory)
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def prompts(directory, conversation, add_generation_prompt):
    """The text and tokens of transformers, and this package's."""
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    options = {"add_generation_prompt": add_generation_prompt}
    text = theirs.apply_chat_template(conversation, tokenize=False, **options)
    ids = theirs.apply_chat_template(conversation, return_dict=False, **options)
    model = doge_onnx.load(directory)
    ours = model.apply_chat_template(conversation, add_generation_prompt)
    tokenizer = model._text_tokenizer
    return (text, ids), (ours, tokenizer.encode(ours, add_special_tokens=False))


def bundle_with(path, **changes):
    """A bundle with the tokenizer of examples/doge-tiny."""
    fake_bundle.write(path, with_tokenizer=False)
    tokenizer_files(path, **changes)
    return path


def reseal(path):
    (path / "doge_onnx.json").unlink()
    seal(path, fake_bundle.manifest())
    return path


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_gives_what_it_gives_in_transformers(name, tmp_path):
    path = reseal(bundle_with(tmp_path / "b", chat_template=TEMPLATES[name]))
    for conversation in CONVERSATIONS:
        if name == "strict" and conversation[0]["role"] == "system":
            with pytest.raises(InputError, match="Roles must alternate"):
                doge_onnx.load(path).generate(conversation)
            continue
        for add in (True, False):
            theirs, ours = prompts(path, conversation, add)
            assert ours == theirs


@pytest.mark.parametrize("where", ["several", "file", "map", "objects"])
def test_a_template_is_found_where_transformers_finds_it(where, tmp_path):
    changes = {"chat_template": "wrong"}
    if where == "several":
        named = {"tool_use": "wrong", "default": PLAIN}
        changes["chat_template"] = [{"name": n, "template": t} for n, t in named.items()]
    elif where == "objects":
        token = {"__type": "AddedToken", "content": "<|eot_id|>", "special": True}
        # What tells a tokenizer's config that is complete from one that is not.
        changes = {"chat_template": PLAIN, "eos_token": token, "added_tokens_decoder": {}}
    path = bundle_with(tmp_path / "b", **changes)
    if where in ("file", "map"):
        (path / "chat_template.jinja").write_text(PLAIN + "\n")
    if where == "map":
        tokens = {"eos_token": {"content": "<|eot_id|>"}, "bos_token": "<|pad|>"}
        (path / "special_tokens_map.json").write_text(json.dumps(tokens))
    theirs, ours = prompts(reseal(path), CONVERSATIONS[1], True)
    assert ours == theirs
    assert ours[0].startswith("<|pad|>" if where == "map" else "<|begin_of_text|>")


def test_the_beginning_of_a_text_is_not_doubled(tmp_path):
    model = doge_onnx.load(fake_bundle.write(tmp_path / "b", chat_template=PLAIN))
    assert model._prompt_ids("x").count(0) == 1
    assert model._prompt_ids([{"role": "user", "content": "x"}]).count(0) == 1


def test_the_date_is_today(tmp_path):
    template = ChatTemplate("{{ strftime_now('%Y') }}", {}, tmp_path)
    assert template.render(CONVERSATIONS[0]) == str(datetime.now().year)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{% for message in messages %}", "no valid Jinja"),
        ("{{ messages | no_such_filter }}", "no valid Jinja"),
        ("{{ messages[0].content + 1 }}", "fails with these messages"),
        ("{{ messages[0].content.x.y }}", "refuses this"),
        ("{{ raise_exception('only users') }}", "refuses this: only users"),
        ("{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}", "fails with these messages"),
        ("{{ messages.append(1) }}", "refuses this"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "refuses this"),
        ("{{ strftime_now.__globals__ }}{{ x.y }}", "refuses this"),
        ("{% if 1 %}" * 2000, "nested too deeply"),
        ("{{ messages[0].content.ljust(2 ** 62) }}", "MemoryError"),
    ],
)
def test_a_template_that_fails_is_a_line(source, words, tmp_path):
    with pytest.raises((InputError, BundleError)) as caught:
        ChatTemplate(source, {}, tmp_path).render(CONVERSATIONS[0])
    assert words in str(caught.value)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) + f(n - 1) }}{% endif %}{% endmacro %}{{ f(50) }}",
        "{% for a in range(9999) %}{{ 'x' * 9999 }}{% endfor %}",
        "{{ 9 ** (9 ** 9) }}",
        "{% set n = namespace(x=7) %}{% for i in range(40) %}{% set n.x = n.x * n.x %}{% endfor %}",
    ],
)
def test_a_template_without_an_end_is_stopped(source, monkeypatch, tmp_path):
    monkeypatch.setattr(chats, "_MAX_STEPS", 100_000)
    monkeypatch.setattr(chats, "_MAX_SIZE", 1_000_000)
    before = sys.gettrace()
    with pytest.raises(BundleError, match="does not come to an end"):
        ChatTemplate(source, {}, tmp_path).render(CONVERSATIONS[0])
    assert sys.gettrace() is before


def test_a_long_conversation_is_no_endless_one(tmp_path):
    template = ChatTemplate(TEMPLATES["Llama 3"], {"bos_token": "<s>"}, tmp_path)
    assert template.render(CONVERSATIONS[0] * 3000).count("Hello") == 3000


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        (["Hello", {"role": "user", "content": "x"}], "message 0"),
        ([{"role": "user", "content": "x"}, {"content": "x"}], "message 1 needs a 'role'"),
        ([{"role": "user"}], "needs a 'content'"),
        ([{"role": "user", "content": ["x"]}], "needs a 'content'"),
        ([{"role": "user", "content": "x", "more": {1, 2}}], "nothing but text"),
        ([{"role": "user", "content": "\ud800"}], "surrogate"),
    ],
)
def test_messages_of_the_wrong_form(messages, words, tmp_path):
    model = doge_onnx.load(fake_bundle.write(tmp_path / "b", chat_template=PLAIN))
    with pytest.raises(InputError, match=words):
        model.generate(messages)


@pytest.mark.parametrize(
    ("template", "words"),
    [(None, "no chat template"), ([{"name": "rag", "template": ""}], "'rag'"), (7, "is no text")],
)
def test_a_bundle_without_a_good_template(template, words, tmp_path):
    model = doge_onnx.load(fake_bundle.write(tmp_path / "b", chat_template=template))
    for call in (lambda: model.generate(CONVERSATIONS[0]), model.chat):
        with pytest.raises((InputError, BundleError), match=words):
            call()
    assert model.generate("the cat", max_new_tokens=2).text


def test_a_template_without_a_tokenizer(tmp_path):
    path = fake_bundle.write(tmp_path / "b", with_tokenizer=False)
    (path / "chat_template.jinja").write_text(PLAIN)
    model = doge_onnx.load(reseal(path))
    assert ChatTemplate.read(Bundle.open(path)) is not None
    with pytest.raises(InputError, match=r"no tokenizer\.json"):
        model.generate(CONVERSATIONS[0])


# --- answers to messages ------------------------------------------------------------------


@pytest.fixture(params=["in place", "copying"])
def model(request, tmp_path):
    path = fake_bundle.write(
        tmp_path / "b", in_place=request.param == "in place", chat_template=PLAIN
    )
    return doge_onnx.load(path)


def user(*contents):
    return [{"role": "user", "content": content} for content in contents]


def test_messages_are_a_prompt_and_lists_of_them_a_batch(model):
    short, long = user("the cat"), user("the dog and the hat", "and the cat")
    single = model.generate(short, max_new_tokens=8)
    assert single.text == model.generate(
        model._text_tokenizer.encode("<s>[user] the cat</s>[assistant] ", add_special_tokens=False),
        max_new_tokens=8,
    ).text  # fmt: skip
    assert "".join(model.stream(short, max_new_tokens=8)) == single.text
    batch = model.generate([short, long, "the"], max_new_tokens=8)
    alone = [single, *(model.generate(prompt, max_new_tokens=8) for prompt in (long, "the"))]
    assert [c.token_ids for c in batch] == [c.token_ids for c in alone]


def turns(model, chat, *contents):
    """Say things; check each answer against one to the whole conversation, and what was fed."""
    for content in contents:
        known = len(chat._memory.tokens)
        said = [*chat.messages, *user(content)]
        answer = chat.send(content)
        ids = chat._memory.tokens[: answer.prompt_tokens]
        # A model need not cut its text as a tokenizer would.
        whole = model.generate(list(ids), max_new_tokens=12)
        assert answer.token_ids == whole.token_ids
        assert chat.messages == [*said, {"role": "assistant", "content": answer.text}]
        assert answer.timings.cached_tokens == known
        text = model._text_tokenizer.decode([i for i in ids if model._text_tokenizer.visible(i)])
        prompt = model.apply_chat_template(said)
        assert text == prompt.replace("<s>", "").replace("</s>", "")


def test_each_turn_feeds_what_is_new_and_no_more(model):
    chat = model.chat(system="and", max_new_tokens=12)
    assert chat.messages == [{"role": "system", "content": "and"}]
    turns(model, chat, "the cat", "the dog", "the hat and", "x")


def test_the_template_alone_says_how_an_answer_ends(model, tmp_path):
    # Whatever token that is, the model's own is not read beside it.
    token_ids = model.generate(user("the cat"), max_new_tokens=3).token_ids
    path = fake_bundle.write(
        tmp_path / "other", chat_template=PLAIN, generation={"eos_token_id": [1, token_ids[-1]]}
    )
    chat = doge_onnx.load(path).chat(max_new_tokens=9)
    first = chat.send("the cat")
    assert (first.finish_reason, first.token_ids) == ("eos", token_ids)
    second = chat.send("the dog")
    encode = model._text_tokenizer.encode
    expected = [
        *encode("<s>[user] the cat</s>[assistant] ", add_special_tokens=False),
        *token_ids[:-1],
        *encode("</s>[user] the dog</s>[assistant] ", add_special_tokens=False),
    ]
    assert chat._memory.tokens[: second.prompt_tokens] == expected


def test_a_turn_goes_on_in_the_buffer_of_the_last_one(tmp_path):
    chat = doge_onnx.load(fake_bundle.write(tmp_path / "b", chat_template=PLAIN)).chat(
        max_new_tokens=12
    )
    buffers = []
    for content in ("the cat", "the dog"):
        chat.send(content)
        buffers.append(chat._memory.state.buffer)
    assert buffers[0] is buffers[1]


def test_a_buffer_that_a_conversation_outgrows(model):
    chat = model.chat(max_new_tokens=12)
    turns(model, chat, *["the cat and the dog"] * 4)


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


def test_an_answer_that_is_closed_stands_as_far_as_it_was_read(model):
    chat = model.chat(max_new_tokens=50)
    answer = chat.stream("the cat")
    read = "".join(next(answer) for _ in range(7))
    with pytest.raises(InputError, match="has not ended"):
        chat.send("x")
    answer.close()
    assert chat.messages[1:] == [{"role": "assistant", "content": read}]
    fed = len(chat._memory.tokens)
    following = chat.send("the dog")
    assert following.timings.cached_tokens > 5
    assert following.timings.cached_tokens <= fed
    ids = chat._memory.tokens[: following.prompt_tokens]
    assert following.token_ids == model.generate(list(ids), max_new_tokens=50).token_ids


def test_an_answer_that_is_not_begun_changes_nothing(model):
    chat = model.chat(max_new_tokens=5)
    chat.stream("the cat").close()
    assert chat.messages == []
    assert chat.send("the dog").token_ids == model.generate(user("the dog"), 5).token_ids


def test_a_run_that_fails_is_forgotten_and_read_again(model, monkeypatch):
    chat = model.chat(max_new_tokens=6)
    chat.send("the cat")
    decoder = type(model._runner.decoder(model.forward([[1]])[1]))
    with monkeypatch.context() as patch:
        patch.setattr(decoder, "step", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            chat.send("the dog")
    assert chat._memory.state is None
    following = chat.send("and")
    assert following.timings.cached_tokens == 0
    ids = chat._memory.tokens[: following.prompt_tokens]
    assert following.token_ids == model.generate(list(ids), max_new_tokens=6).token_ids


def test_messages_may_be_changed_between_turns(model):
    chat = model.chat(max_new_tokens=6)
    chat.send("the cat")
    chat.send("the dog")
    # The last turn never was.
    del chat.messages[2:]
    again = chat.send("the hat")
    assert again.timings.cached_tokens > 0
    ids = chat._memory.tokens[: again.prompt_tokens]
    assert again.token_ids == model.generate(list(ids), max_new_tokens=6).token_ids
    assert [message["content"] for message in chat.messages[::2]] == ["the cat", "the hat"]


def test_the_oldest_turns_are_forgotten_when_the_context_is_full(model):
    chat = model.chat(system="and", max_new_tokens=10)
    for number in range(12):
        answer = chat.send(f"the cat {number} and the dog and the hat")
        assert len(answer.token_ids) == 10
        assert answer.prompt_tokens <= fake_bundle.CONTEXT - 10
        ids = chat._memory.tokens[: answer.prompt_tokens]
        assert answer.token_ids == model.generate(list(ids), max_new_tokens=10).token_ids
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


def test_a_conversation_with_a_state_of_constant_size(tmp_path):
    checkpoint = tmp_path / "checkpoint"
    older_checkpoints.make(
        checkpoint, "native", vocab_size=4096, keep_window_size=24, num_hidden_layers=1
    )
    tokenizer_files(checkpoint, chat_template=PLAIN)
    path = tmp_path / "bundle"
    doge_onnx.export(checkpoint, path, state="window", verify=False)
    model = doge_onnx.load(path)
    chat = model.chat(max_new_tokens=12)
    turns_fed = 0
    for content in ("Hello there", "And then?", "More"):
        answer = chat.send(content)
        ids = chat._memory.tokens[: answer.prompt_tokens]
        assert answer.token_ids == model.generate(list(ids), max_new_tokens=12).token_ids
        assert answer.timings.cached_tokens == turns_fed
        turns_fed = len(chat._memory.tokens)
    assert turns_fed > 24
    # It cannot go back: everything is read again.
    del chat.messages[2:]
    again = chat.send("Hm")
    assert again.timings.cached_tokens == 0
    ids = chat._memory.tokens[: again.prompt_tokens]
    assert again.token_ids == model.generate(list(ids), max_new_tokens=12).token_ids


# --- the command line ---------------------------------------------------------------------


def invoke(*arguments, **options):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments], **options)


def test_generate_answers_a_message(model):
    path = model._bundle.path
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


def test_chat_answers_line_by_line(model):
    path = model._bundle.path
    result = invoke(
        "chat", path, "--system", "and", "--max-new-tokens", 8, input="the cat\n\n  \nthe dog é"
    )
    chat = model.chat(system="and", max_new_tokens=8)
    answers = [chat.send(content).text for content in ("the cat", "the dog é")]
    assert result.stdout == "".join(answer + "\n" for answer in answers)
    assert (result.exit_code, result.stderr) == (0, "")


def test_chat_says_when_it_forgets(model):
    path = model._bundle.path
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

    cli_chat.print_answer(interrupted())
    assert signal.getsignal(signal.SIGINT) is before
    assert count == 3
    assert capsys.readouterr().out == chat.messages[-1]["content"] + "\n"
    assert chat.send("the dog").timings.cached_tokens > 0


def test_ctrl_d_ends_a_conversation_and_ctrl_c_a_line(monkeypatch, capsys):
    lines = iter(["Hello", KeyboardInterrupt, " ", "Bye", EOFError])

    def read(prompt):
        line = next(lines)
        if isinstance(line, str):
            return line
        raise line

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr("builtins.input", read)
    monkeypatch.setattr(sys, "stdin", Terminal())
    assert list(cli_chat.messages()) == ["Hello", "Bye"]
    assert capsys.readouterr().out == "\n\n"
