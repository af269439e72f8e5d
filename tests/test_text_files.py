"""Text from others' programs: byte order marks, newlines, encodings, in every file that is read."""

from __future__ import annotations

import codecs
import json
import shutil

import fake_bundle
import pytest
from chat_templates import PLAIN
from commands import assert_one_line_error, invoke
from conftest import TINY_CHECKPOINT

import doge_onnx
from doge_onnx import text_files
from doge_onnx.bundle import seal
from doge_onnx.export import sidecar
from doge_onnx.export.checkpoint import Source
from doge_onnx.export.model_config import DogeConfig


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", ""),
        (b"a\nb\n", "a\nb\n"),
        (codecs.BOM_UTF8 + b"a", "a"),
        (codecs.BOM_UTF8, ""),
        (b"a" + codecs.BOM_UTF8, "a\ufeff"),
        (b"a\r\nb\rc\n", "a\nb\rc\n"),
        ("“é”🐕".encode(), "“é”🐕"),
        (b"a\0b", "a\0b"),
    ],
)
def test_what_windows_writes_is_read_as_what_others_write(data, text):
    assert text_files.decode(data) == text


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("Hello".encode("utf-16"), "UTF-16"),
        (codecs.BOM_UTF16_BE + "Hello".encode("utf-16-be"), "UTF-16"),
        ("Hello".encode("utf-16-le"), "UTF-16"),
        ("Hello".encode("utf-16-be"), "UTF-16"),
        ("Grüße".encode("utf-16-le"), "UTF-16"),
        ("Hello".encode("utf-32"), "UTF-32"),
        (b"caf\xe9", "0xe9 at position 3"),
        (b"caf\xc3", "0xc3 at position 3"),
    ],
)
def test_another_encoding_is_named(data, words):
    with pytest.raises(ValueError, match=words):
        text_files.decode(data)


def test_a_part_of_a_file_may_end_within_a_character(tmp_path):
    path = tmp_path / "text"
    path.write_bytes(codecs.BOM_UTF8 + "é".encode() * 100 + b"\xff")
    for count in (1, 2, 7, 25):
        assert text_files.read(path, count) == "é" * count
    with pytest.raises(ValueError, match="0xff"):
        text_files.read(path)


def test_the_perplexity_of_a_text_does_not_depend_on_who_wrote_the_file(tmp_path):
    bundle = fake_bundle.write(tmp_path / "b")
    text = "the cat and the dog\n\nand the hat\n" * 5
    figures = []
    for number, data in enumerate(
        (text.encode(), codecs.BOM_UTF8 + text.encode(), text.replace("\n", "\r\n").encode())
    ):
        path = tmp_path / f"{number}.txt"
        path.write_bytes(data)
        figures.append(doge_onnx.evaluate(bundle, text=path).perplexity)
    assert figures[1] == figures[2] == figures[0]
    path.write_bytes(text.encode("utf-16"))
    assert_one_line_error(invoke("eval", bundle, "--text", path), str(path), "UTF-16")


def test_every_file_of_a_bundle_may_have_a_byte_order_mark(tmp_path):
    path = fake_bundle.write(
        tmp_path / "b", generation={"repetition_penalty": 1.5}, chat_template=PLAIN
    )
    messages = [{"role": "user", "content": "the cat"}]
    expected = doge_onnx.load(path).generate(messages, max_new_tokens=9)
    (path / "doge_onnx.json").unlink()
    template = json.loads((path / "tokenizer_config.json").read_text())["chat_template"]
    (path / "chat_template.jinja").write_text(template)
    for file in (*path.glob("*.json"), *path.glob("*.jinja")):
        file.write_bytes(codecs.BOM_UTF8 + file.read_bytes())
    seal(path, fake_bundle.manifest())
    manifest = path / "doge_onnx.json"
    manifest.write_bytes(codecs.BOM_UTF8 + manifest.read_bytes())
    model = doge_onnx.load(path)
    assert model.apply_chat_template(messages).startswith("<s>[user]")
    assert model.generate(messages, max_new_tokens=9).token_ids == expected.token_ids


def test_a_checkpoint_may_have_byte_order_marks_and_a_bundle_gets_none(tmp_path):
    checkpoint = shutil.copytree(TINY_CHECKPOINT, tmp_path / "checkpoint")
    for file in checkpoint.glob("*.json"):
        file.write_bytes(codecs.BOM_UTF8 + file.read_bytes())
    source = Source(checkpoint, str(checkpoint), None)
    out = tmp_path / "out"
    out.mkdir()
    config = DogeConfig.from_file(checkpoint / "config.json")
    sidecar.write(sidecar.read(source), source, config, fake_bundle.manifest(), out)
    for file in TINY_CHECKPOINT.glob("*.json"):
        copied = (out / file.name).read_bytes()
        assert json.loads(copied.decode("utf-8")) == json.loads(file.read_bytes())


def test_the_reference_may_have_byte_order_marks(tiny_bundle, tmp_path):
    checkpoint = shutil.copytree(TINY_CHECKPOINT, tmp_path / "checkpoint")
    for file in checkpoint.glob("*.json"):
        file.write_bytes(codecs.BOM_UTF8 + file.read_bytes())
    report = doge_onnx.verify(shutil.copytree(tiny_bundle, tmp_path / "b"), checkpoint)
    assert report.passed
