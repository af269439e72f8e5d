"""What a bundle gets of a checkpoint's tokenizer, and how older ones are converted."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import transformers
from conftest import TINY_CHECKPOINT
from environments import ROOT, environment

from doge_onnx.errors import CheckpointError
from doge_onnx.export import tokenizer_files
from doge_onnx.export.tokenizer_files import TokenizerFiles

TEXTS = ["Once upon  a time,\n\tthere's 12 €", "<|begin_of_text|>Hi<|eot_id|> naïve 漢字", " x"]
CONFIG = json.loads((TINY_CHECKPOINT / "tokenizer_config.json").read_text(encoding="utf-8"))


@pytest.fixture
def older(tmp_path) -> Path:
    """The tokenizer of examples/doge-tiny as vocab.json and merges.txt."""
    content = json.loads((TINY_CHECKPOINT / "tokenizer.json").read_text(encoding="utf-8"))
    (tmp_path / "vocab.json").write_text(json.dumps(content["model"]["vocab"]), encoding="utf-8")
    merges = content["model"]["merges"]
    pairs = [pair if isinstance(pair, str) else " ".join(pair) for pair in merges]
    lines = ["#version: 0.2", *pairs]
    (tmp_path / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    added = {
        str(token.pop("id")): token for token in (dict(each) for each in content["added_tokens"])
    }
    write(tmp_path, tokenizer_class="GPT2Tokenizer", added_tokens_decoder=added, unk_token=None)
    return tmp_path


def write(directory: Path, **changes: Any) -> None:
    text = json.dumps({**CONFIG, **changes})
    (directory / "tokenizer_config.json").write_text(text, encoding="utf-8")


def ids(files: TokenizerFiles) -> list[list[int]]:
    assert files.tokenizer is not None
    return [files.tokenizer.encode(text).ids for text in TEXTS]


def truth(special: bool = True) -> list[list[int]]:
    made = tokenizers.Tokenizer.from_file(str(TINY_CHECKPOINT / "tokenizer.json"))
    return [made.encode(text, add_special_tokens=special).ids for text in TEXTS]


def loaded(files: TokenizerFiles, place: Path) -> Any:
    """The tokenizer that transformers makes of a bundle's files."""
    place.mkdir()
    for name, content in files.content.items():
        (place / name).write_bytes(content)
    return transformers.AutoTokenizer.from_pretrained(place)


def test_files_are_taken_over_unchanged():
    files = tokenizer_files.read(TINY_CHECKPOINT)
    assert files.content == {
        name: (TINY_CHECKPOINT / name).read_bytes()
        for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
    }
    assert ids(files) == truth()
    assert files.converted is None


def test_what_transformers_5_saves_is_written_as_both_versions_read_it(tmp_path):
    saved = transformers.AutoTokenizer.from_pretrained(TINY_CHECKPOINT)
    saved.add_special_tokens({"extra_special_tokens": ["<|eot_id|>", "<|start_header_id|>"]})
    saved.save_pretrained(tmp_path / "saved")
    before = json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())
    assert (before["tokenizer_class"], type(before["extra_special_tokens"])) == (
        "TokenizersBackend",
        list,
    )
    files = tokenizer_files.read(tmp_path / "saved")
    assert files.config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert "extra_special_tokens" not in files.config
    again = loaded(files, tmp_path / "bundle")
    assert again.all_special_tokens == saved.all_special_tokens
    assert [again(text)["input_ids"] for text in TEXTS] == truth()


# What transformers reads from each directory: its class, ids, special tokens and a conversation.
READER = """
import json, sys
from transformers import AutoTokenizer
texts, said = json.loads(sys.argv[1]), []
for directory in sys.argv[2:]:
    read = AutoTokenizer.from_pretrained(directory)
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "there"}]
    said.append(
        [
            [read(text)["input_ids"] for text in texts],
            sorted(read.all_special_tokens),
            [read.bos_token, read.eos_token, read.pad_token, read.model_max_length],
            read.apply_chat_template(messages, tokenize=False) if read.chat_template else None,
        ]
    )
print(json.dumps(said))
"""
TEMPLATE = "{% for m in messages %}<|start_header_id|>{{ m.content }}<|eot_id|>{% endfor %}"


@pytest.mark.external
def test_transformers_4_and_5_read_the_same(tmp_path, older):
    place = tmp_path / "bundles"
    place.mkdir()
    saved = transformers.AutoTokenizer.from_pretrained(TINY_CHECKPOINT)
    saved.save_pretrained(place / "plain")
    saved.chat_template = TEMPLATE
    saved.add_special_tokens({"extra_special_tokens": ["<|eot_id|>", "<|new|>"]})
    saved.save_pretrained(place / "chat")
    (place / "bare").mkdir()
    shutil.copy(TINY_CHECKPOINT / "tokenizer.json", place / "bare")
    sources = {"tiny": TINY_CHECKPOINT, "older": older}
    sources |= {path.name: path for path in list(place.iterdir())}
    bundles = []
    for name, source in sources.items():
        bundle = tmp_path / f"bundle {name}"
        bundle.mkdir()
        for file, content in tokenizer_files.read(source).content.items():
            (bundle / file).write_bytes(content)
        shutil.copy(TINY_CHECKPOINT / "config.json", bundle)
        bundles.append(bundle)
    texts = [*TEXTS, "a<|new|>b <|start_header_id|>"]
    said = []
    for python in (environment(ROOT / "tests" / "requirements" / "optimum.txt"), sys.executable):
        command = [python, "-c", READER, json.dumps(texts), *bundles]
        result = subprocess.run(command, check=False, capture_output=True, encoding="utf-8")
        assert result.returncode == 0, result.stderr
        said.append(json.loads(result.stdout.splitlines()[-1]))
    assert said[0] == said[1]
    assert said[0][0][0][:3] == truth()
    assert any(conversation for *_, conversation in said[0])


def test_a_tokenizer_without_a_class_gets_one(tmp_path):
    shutil.copy(TINY_CHECKPOINT / "tokenizer.json", tmp_path)
    assert tokenizer_files.read(tmp_path).config == {"tokenizer_class": "PreTrainedTokenizerFast"}


def test_tokens_that_only_the_config_has_are_added_as_transformers_adds_them(tmp_path):
    shutil.copy(TINY_CHECKPOINT / "tokenizer.json", tmp_path)
    flags = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False)
    added = {
        "4096": {"content": "<|a|>", "special": True, **flags},
        "4097": {"content": "<think>", "special": False, **flags},
        "9000": {"content": "<|far|>", "special": True, **flags},
    }
    write(tmp_path, added_tokens_decoder=added)
    files = tokenizer_files.read(tmp_path)
    assert files.completed == ("<|a|>", "<think>")
    text = "x<|a|>y<think>"
    assert files.tokenizer is not None
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)(text)["input_ids"]
    assert files.tokenizer.encode(text).ids == theirs
    kept = tokenizers.Tokenizer.from_str(files.content["tokenizer.json"].decode())
    assert kept.encode(text).ids == theirs


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_broken_file_is_named(tmp_path, name):
    shutil.copytree(TINY_CHECKPOINT, tmp_path / "c")
    (tmp_path / "c" / name).write_text("[]", encoding="utf-8")
    with pytest.raises(CheckpointError, match=name):
        tokenizer_files.read(tmp_path / "c")


@pytest.mark.parametrize(
    ("template", "listed", "found"),
    [
        (None, "{{ a }}", "{{ a }}"),
        ("{{ b }}", "{{ a }}", "{{ b }}"),
        (None, [{"name": "rag", "template": "x"}, {"name": "default", "template": "y"}], "y"),
        (None, [{"name": "rag", "template": "x"}], None),
        (None, 3, None),
    ],
)
def test_the_template_is_the_one_that_the_runtime_takes(tmp_path, template, listed, found):
    write(tmp_path, chat_template=listed)
    if template is not None:
        (tmp_path / "chat_template.jinja").write_text(template, encoding="utf-8")
    assert tokenizer_files.read(tmp_path).template == found


# Conversion.


def refuse(*_: Any, **__: Any) -> None:
    raise AssertionError("nothing is asked for over the network")


def test_vocabulary_and_merges_become_a_tokenizer(older, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    files = tokenizer_files.read(older)
    assert files.converted == "vocab.json"
    assert ids(files) == truth(special=False)
    assert files.special_tokens["eos_token"] == "<|end_of_text|>"
    assert capfd.readouterr() == ("", "")
    again = loaded(files, tmp_path / "bundle")
    assert [again(text)["input_ids"] for text in TEXTS] == truth(special=False)


def test_what_begins_a_text_is_kept(older):
    write(older, tokenizer_class="GPT2TokenizerFast", add_bos_token=True, unk_token=None)
    files = tokenizer_files.read(older)
    assert files.tokenizer is not None
    assert files.tokenizer.encode("Once").ids[0] == 0


def test_two_files_alone_are_byte_pairs_without_special_tokens(older):
    (older / "tokenizer_config.json").unlink()
    files = tokenizer_files.read(older)
    assert ids(files)[0] == truth(special=False)[0]
    assert files.tokenizer is not None
    assert files.tokenizer.get_vocab_size() == 4096
    assert files.special_tokens == {}


def test_code_of_a_tokenizer_is_not_run(older, tmp_path):
    (older / "evil.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w')", encoding="utf-8")
    write(older, tokenizer_class="GPT2Tokenizer", auto_map={"AutoTokenizer": [None, "evil.Evil"]})
    assert tokenizer_files.read(older).converted == "vocab.json"
    assert not (tmp_path / "run").exists()


def test_a_class_that_is_no_name_says_nothing(older):
    write(older, tokenizer_class=["GPT2Tokenizer", None])
    assert tokenizer_files.read(older).converted == "vocab.json"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("LlamaTokenizer", "as a LlamaTokenizer of transformers it would lose parts of 'Once"),
        ("NoSuchTokenizer", "as a NoSuchTokenizer: "),
    ],
)
def test_what_cannot_be_converted_is_said_in_one_line(older, name, words):
    write(older, tokenizer_class=name)
    with pytest.raises(CheckpointError) as caught:
        tokenizer_files.read(older)
    assert words in str(caught.value)
    assert str(caught.value).endswith("; or remove it for a bundle that takes token ids only")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("missing", ["vocab.json", "merges.txt"])
def test_one_file_without_the_other(older, missing):
    (older / missing).unlink()
    with pytest.raises(CheckpointError, match=f"without {missing}"):
        tokenizer_files.read(older)


# Trains SentencePiece models and converts them, where there is sentencepiece. Prints the ids of
# texts in both, or what is said of a kind that transformers would cut otherwise.
SENTENCEPIECE = """
import json, sys
from pathlib import Path
import sentencepiece
from doge_onnx.errors import CheckpointError
from doge_onnx.export import tokenizer_files
place, page, texts = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
said = {}
for kind in ("bpe", "unigram"):
    directory = place / kind
    directory.mkdir()
    sentencepiece.SentencePieceTrainer.train(
        input=page, model_prefix=str(directory / "tokenizer"), vocab_size=600, model_type=kind,
        byte_fallback=True, normalization_rule_name="identity", minloglevel=2,
    )
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"}
    (directory / "tokenizer_config.json").write_text(json.dumps({**config, "unk_token": "<unk>"}))
    theirs = sentencepiece.SentencePieceProcessor(str(directory / "tokenizer.model"))
    try:
        ours = tokenizer_files.read(directory).tokenizer
    except CheckpointError as error:
        said[kind] = str(error)
        continue
    said[kind] = [(ours.encode(text).ids, [1, *theirs.encode(text)]) for text in texts]
print(json.dumps(said))
"""


@pytest.mark.external
def test_sentencepiece_is_converted_to_the_same_ids(tmp_path):
    python = environment(ROOT / "tests" / "requirements" / "peft.txt")
    texts = ["Once upon a time", "It was 12 o'clock, naïve café 漢字", "a bundle of ONNX graphs"]
    page = ROOT / "docs" / "architecture.md"
    command = [python, "-c", SENTENCEPIECE, tmp_path, page, json.dumps(texts)]
    result = subprocess.run(command, check=False, capture_output=True, encoding="utf-8")
    assert result.returncode == 0, result.stderr
    said = json.loads(result.stdout.splitlines()[-1])
    assert all(ours == theirs for ours, theirs in said["bpe"])
    assert "otherwise than SentencePiece does" in said["unigram"]


def test_sentencepiece_is_asked_for_by_name(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    (tmp_path / "tokenizer.model").write_bytes(b"anything")
    with pytest.raises(CheckpointError, match="not installed: pip install sentencepiece"):
        tokenizer_files.read(tmp_path)
