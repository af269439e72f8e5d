"""Files of a checkpoint that are each valid, and disagree: refused, or told to the user."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import checkpoints
import fake_bundle
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, processors

import doge_onnx
from doge_onnx.errors import CheckpointError, InputError
from doge_onnx.export import sidecar
from doge_onnx.export.checkpoint import Source

# 97 tokens, as many as the model has: three special ones, and letters.
SPECIAL = ["<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>"]
LETTERS = [chr(33 + number) for number in range(97 - len(SPECIAL))]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NAMED = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}


def tokenizer(*added: str, special: list[str] = SPECIAL) -> tokenizers.Tokenizer:
    vocabulary = {token: number for number, token in enumerate([*special, *LETTERS])}
    made = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.add_special_tokens([*special, *added])
    return made


def notes(
    place: Path,
    made: tokenizers.Tokenizer | None = None,
    template: str | None = None,
    generation: dict[str, Any] | None = None,
    changes: dict[str, Any] | None = None,
    **named: Any,
) -> str:
    """What an export would say of these files, a line for each note."""
    place.mkdir(exist_ok=True)
    config = {"model_type": "doge", **checkpoints.SMALL, "eos_token_id": 1, **(changes or {})}
    (place / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (made or tokenizer()).save(str(place / "tokenizer.json"))
    content = {"tokenizer_class": "PreTrainedTokenizerFast", **NAMED, **named}
    (place / "tokenizer_config.json").write_text(json.dumps(content), encoding="utf-8")
    if template is not None:
        (place / "chat_template.jinja").write_text(template, encoding="utf-8")
    if generation is not None:
        (place / "generation_config.json").write_text(json.dumps(generation), encoding="utf-8")
    return "\n".join(sidecar.read(Source(place, "model", None)).notes)


def refusal(*arguments: Any, **options: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        notes(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_files_that_agree_say_nothing(tmp_path):
    assert notes(tmp_path, template=CHATML, generation={"eos_token_id": [1, 4]}) == ""


def test_tokens_beyond_the_model_are_named(tmp_path):
    said = notes(tmp_path, tokenizer("<|a|>", "<|b|>", "<|c|>"))
    assert "tokens that the model lacks: '<|a|>' (97), '<|b|>' (98), '<|c|>' (99)" in said


def test_many_tokens_beyond_the_model_are_counted(tmp_path):
    said = notes(tmp_path, tokenizer(*(f"<|{number}|>" for number in range(20))))
    assert "'<|4|>' (101) and 15 more" in said


def test_tokens_beyond_the_model_that_a_conversation_needs_are_refused(tmp_path):
    made = tokenizer("<|user|>", "<|assistant|>", "<|unused|>")
    template = "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m.content }}{% endfor %}"
    said = refusal(tmp_path, made, template)
    assert "the chat template writes: '<|user|>' (97), '<|assistant|>' (98);" in said
    assert "unused" not in said


def test_tokens_beyond_the_model_that_only_tools_need_are_told(tmp_path):
    template = "{% if tools %}<|tools|>{% endif %}" + CHATML
    said = notes(tmp_path, tokenizer("<|tools|>"), template, {"eos_token_id": [1, 4]})
    assert said.count("<|tools|>") == 1


@pytest.mark.parametrize("name", ["bos_token", "eos_token"])
def test_the_beginning_or_end_of_texts_beyond_the_model_is_refused(tmp_path, name):
    said = refusal(tmp_path, tokenizer("<|new|>"), **{name: "<|new|>"})
    assert "which begin or end a text: '<|new|>' (97)" in said
    assert "the model has 97 tokens" in said


def test_a_token_around_every_text_beyond_the_model_is_refused(tmp_path):
    made = tokenizer("<|new|>")
    made.post_processor = processors.TemplateProcessing("<|new|> $A", None, [("<|new|>", 97)])
    assert "puts around every text: '<|new|>' (97)" in refusal(tmp_path, made)


def test_padding_beyond_the_model_is_told(tmp_path):
    said = notes(tmp_path, tokenizer("[PAD]"), pad_token={"content": "[PAD]"})
    assert "'[PAD]' (97)" in said


def test_another_models_tokenizer_is_refused(tmp_path):
    said = refusal(tmp_path, changes={"vocab_size": 60})
    assert "is another model's: it has " in said
    assert "and the model has 60 tokens" in said


def test_far_fewer_tokens_than_the_model_has_are_told(tmp_path):
    assert "the model has 9000 tokens and the tokenizer 97" in notes(
        tmp_path / "a", changes={"vocab_size": 9000}
    )
    # A few unused rows are usual.
    assert notes(tmp_path / "b", changes={"vocab_size": 128}) == ""


def test_special_tokens_of_the_template_that_are_none_are_told(tmp_path):
    made = tokenizer(special=[*SPECIAL[:3], "<x>", "<y>"])
    said = notes(tmp_path, made, CHATML)
    assert "writes '<|im_end|>', '<|im_start|>', which the tokenizer does not know" in said
    assert notes(tmp_path, made, "{# <|im_start|> #}{{ messages[0].content }}") == ""


def test_a_template_that_is_no_jinja_is_told(tmp_path):
    assert "chat template is no valid Jinja" in notes(tmp_path, template="{% for %}")


def test_special_tokens_that_only_the_config_has_are_told(tmp_path):
    said = notes(tmp_path, mask_token="<mask>", additional_special_tokens=["<s>", "<|q|>"])
    assert "special tokens that tokenizer.json lacks: '<mask>', '<|q|>'" in said


@pytest.mark.parametrize(
    ("generation", "note"),
    [
        ({"eos_token_id": 1}, None),
        ({"eos_token_id": [4, 1]}, None),
        ({}, None),
        (
            {"eos_token_id": 4},
            "with '</s>' (1), but generation ends at '<|im_end|>' (4)",
        ),
    ],
)
def test_the_tokenizers_end_is_held_against_generations(tmp_path, generation, note):
    said = notes(tmp_path, generation=generation)
    assert said == "" if note is None else note in said


def test_a_model_without_an_end_is_told(tmp_path):
    assert "no file says which token ends a text" in notes(tmp_path, changes={"eos_token_id": None})


def test_a_template_whose_answers_never_end_is_told(tmp_path):
    said = notes(tmp_path, template=CHATML, generation={"eos_token_id": 1})
    assert "writes none of the tokens at which generation ends, '</s>' (1)" in said
    ending = CHATML.replace("'<|im_end|>'", "eos_token")
    assert notes(tmp_path, template=ending, generation={"eos_token_id": 1}) == ""


def test_two_beginnings_are_told(tmp_path):
    said = notes(tmp_path, changes={"bos_token_id": 3})
    assert "begins a text with '<s>' (0), config.json with '<|im_start|>' (3)" in said


@pytest.mark.parametrize(
    ("limit", "told"), [(64, False), (10**30, False), (1e30, False), (32, True), (4096, True)]
)
def test_context_lengths_are_compared(tmp_path, limit, told):
    said = notes(tmp_path, model_max_length=limit)
    assert (f"a model_max_length of {limit}, config.json" in said) == told


def test_a_prompt_with_a_token_that_the_model_lacks_names_it(tmp_path):
    path = fake_bundle.write(tmp_path / "b", with_tokenizer=False)
    made = fake_bundle.tokenizer()
    made.add_special_tokens(["<|new|>"])
    made.save(str(path / "tokenizer.json"))
    fake_bundle.seal(path, fake_bundle.manifest())
    model = doge_onnx.load(path)
    with pytest.raises(InputError, match=r"has the token '<\|new\|>' \(\d+\), which the tokenizer"):
        model.generate("a<|new|>", max_new_tokens=1)
