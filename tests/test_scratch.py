"""What a killed process leaves beside a bundle's place: the next one to write there removes it."""

from __future__ import annotations

import errno
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import filelock
import pytest
from handmade import tree, write

from doge_onnx import bundle
from doge_onnx.bundle import Bundle
from doge_onnx.errors import BundleError

# Writes until it is killed; the file says that it has begun.
WRITER = """
import pathlib, sys
from doge_onnx import bundle
with bundle.writing(pathlib.Path(sys.argv[1])) as directory:
    (directory / "half").write_text("a graph")
    print(flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def writer(tmp_path) -> Iterator[subprocess.Popen[str]]:
    """Another process that is writing `tmp_path / "bundle"`."""
    command = [sys.executable, "-c", WRITER, str(tmp_path / "bundle")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "\n"
        yield process
        process.kill()


def names(directory: Path) -> list[str]:
    return sorted(entry.name for entry in directory.iterdir())


def test_what_a_killed_process_left_is_removed(writer, tmp_path):
    writer.kill()
    writer.wait()
    left = names(tmp_path)
    assert [name.rsplit(".", 1)[-1] for name in left] == ["part", "lock"]
    assert Bundle.open(write(tmp_path / "bundle"))
    assert names(tmp_path) == ["bundle"]


def test_what_a_living_process_writes_stays(writer, tmp_path):
    before = tree(tmp_path)
    assert len(before) == 3
    write(tmp_path / "bundle")
    assert before.items() <= tree(tmp_path).items()
    assert Bundle.open(tmp_path / "bundle")


def test_only_names_of_this_place_are_removed(tmp_path):
    others = [
        *(".other.0123abcd.part", ".bundle.0123abcd.tmp", ".bundle.part", ".bundle.0123abcg.part"),
        *("bundle.0123abcd.part", ".bundle.more.0123abcd.part", ".bundle.0123abcd.part.txt"),
    ]
    for name in others:
        (tmp_path / name).mkdir()
    (tmp_path / ".bundle.0123abcd.part").mkdir()
    write(tmp_path / "bundle")
    assert names(tmp_path) == sorted([*others, "bundle"])


def test_a_bundle_that_was_being_replaced_goes_only_when_there_is_a_new_one(tmp_path):
    # A process was killed between the two renames.
    write(tmp_path / ".bundle.0123abcd.old")
    before = tree(tmp_path)

    def fail() -> None:
        with bundle.writing(tmp_path / "bundle"):
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert tree(tmp_path) == before
    write(tmp_path / "bundle")
    assert names(tmp_path) == ["bundle"]


def test_of_two_that_write_at_once_the_first_to_end_stays(tmp_path):
    out = tmp_path / "bundle"

    def late() -> None:
        with bundle.writing(out):
            write(out)

    with pytest.raises(BundleError, match="exists; choose another place"):
        late()
    assert Bundle.open(out)
    assert names(tmp_path) == ["bundle"]


@pytest.mark.parametrize(
    "answer", [NotImplementedError("no flock"), OSError(errno.ENOLCK, "no locks")]
)
def test_without_locks_bundles_are_written_and_nothing_is_removed(tmp_path, monkeypatch, answer):
    def refuse(*_: object, **__: object) -> None:
        raise answer

    monkeypatch.setattr(filelock.FileLock, "acquire", refuse)
    (tmp_path / ".bundle.0123abcd.part").mkdir()
    assert Bundle.open(write(tmp_path / "bundle"))
    assert names(tmp_path) == [".bundle.0123abcd.part", "bundle"]


def test_a_directory_that_cannot_be_listed_is_written_all_the_same(tmp_path, monkeypatch):
    def refuse(self: Path) -> Iterator[Path]:
        raise PermissionError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "iterdir", refuse)
        write(tmp_path / "bundle")
    assert Bundle.open(tmp_path / "bundle")
