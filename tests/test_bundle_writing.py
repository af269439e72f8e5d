"""Writing a bundle: `writing` leaves a whole one or nothing."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from handmade import MANIFEST, tree, write

from doge_onnx import bundle
from doge_onnx.bundle import GRAPH_NAME, MANIFEST_NAME, Bundle
from doge_onnx.errors import BundleError
from doge_onnx.manifest import Manifest


@pytest.fixture
def path(tmp_path) -> Path:
    """A good bundle, to be broken."""
    return write(tmp_path / "bundle")


def test_a_destination_that_exists_is_left_alone(path):
    before = tree(path)
    with pytest.raises(BundleError, match="exists; choose another place, or force its replacement"):
        write(path)
    assert tree(path.parent) == {
        "bundle": b"directory",
        **{f"bundle/{name}": content for name, content in before.items()},
    }


def test_force_replaces_a_bundle_as_a_whole(path):
    write(path, force=True, files={GRAPH_NAME: b"another graph"})
    assert {entry.name for entry in path.iterdir()} == {GRAPH_NAME, MANIFEST_NAME}
    assert Bundle.open(path)
    assert [entry.name for entry in path.parent.iterdir()] == ["bundle"]


def test_force_replaces_an_empty_directory(tmp_path):
    (tmp_path / "bundle").mkdir()
    assert Bundle.open(write(tmp_path / "bundle", force=True))


def test_force_never_replaces_anything_else(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    (tmp_path / "file").write_text("content")
    write(tmp_path / "bundle")
    (tmp_path / "link").symlink_to("bundle")
    (tmp_path / "dangling").symlink_to("nowhere")
    before = tree(tmp_path)
    for name in ("thesis", "file", "link", "dangling"):
        with pytest.raises(BundleError, match="force replaces bundles only"):
            write(tmp_path / name, force=True)
        with pytest.raises(BundleError, match="exists"):
            write(tmp_path / name)
    assert tree(tmp_path) == before


def test_missing_directories_above_are_made(tmp_path):
    assert Bundle.open(write(tmp_path / "deep" / "deeper" / "bundle"))
    assert [entry.name for entry in (tmp_path / "deep" / "deeper").iterdir()] == ["bundle"]


def test_directories_that_were_made_go_again_and_others_stay(tmp_path):
    (tmp_path / "there").mkdir()

    def fail(out: Path) -> None:
        with bundle.writing(out):
            raise Stop

    with pytest.raises(Stop):
        fail(tmp_path / "there" / "deep" / "deeper" / "bundle")
    assert tree(tmp_path) == {"there": b"directory"}


@pytest.mark.parametrize("name", ["file", "file/deep", "dangling", "dangling/deep"])
def test_what_is_above_must_be_directories(tmp_path, name):
    (tmp_path / "file").write_text("content")
    (tmp_path / "dangling").symlink_to("nowhere")
    before = tree(tmp_path)
    with pytest.raises(BundleError, match=r"(file|dangling) is not a directory"):
        write(tmp_path / name / "bundle")
    assert tree(tmp_path) == before


def test_a_bundle_can_be_written_to_a_name_without_a_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Bundle.open(write(Path("bundle")))
    assert [entry.name for entry in tmp_path.iterdir()] == ["bundle"]


class Stop(BaseException):
    pass


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, RuntimeError, Stop])
@pytest.mark.parametrize("force", [False, True])
def test_whatever_ends_the_writing_leaves_nothing_behind(tmp_path, error, force):
    if force:
        write(tmp_path / "bundle")
    before = tree(tmp_path)

    def fail() -> None:
        with bundle.writing(tmp_path / "bundle", force) as directory:
            (directory / GRAPH_NAME).write_bytes(b"half a gra")
            (directory / "sub").mkdir()
            raise error

    with pytest.raises(error):
        fail()
    assert tree(tmp_path) == before


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_one_clear_error(tmp_path, code):
    def fail() -> None:
        with bundle.writing(tmp_path / "bundle") as directory:
            (directory / GRAPH_NAME).write_bytes(b"half a gra")
            raise OSError(code, "no room")

    with pytest.raises(BundleError, match="no room left on the disk") as error:
        fail()
    assert str(tmp_path / "bundle") in str(error.value)
    assert tree(tmp_path) == {}


def test_a_disk_that_cannot_be_written(tmp_path, monkeypatch):
    def refuse(*_: Any, **__: Any) -> str:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(BundleError, match=r"cannot write .*bundle: .*Permission denied"):
        write(tmp_path / "bundle")
    assert tree(tmp_path) == {}


def test_a_replacement_that_fails_at_the_last_moment_restores_the_old(path, monkeypatch):
    before = tree(path.parent)
    rename = Path.rename

    def fail_to_put_in_place(self: Path, target: Path) -> Path:
        if self.suffix == ".part":
            raise OSError(errno.EIO, "the disk is broken")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_to_put_in_place)
    with pytest.raises(BundleError, match="the disk is broken"):
        write(path, force=True, files={GRAPH_NAME: b"another graph"})
    assert tree(path.parent) == before


def test_parity_on_a_full_disk_leaves_the_manifest_whole(path, monkeypatch):
    before, opened = tree(path), Bundle.open(path)
    write_text = Path.write_text

    def half(self: Path, text: str, **options: Any) -> int:
        write_text(self, text[:10], **options)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(BundleError, match="no room left on the disk"):
        bundle.write_parity(opened, {"passed": True})
    assert tree(path) == before


def test_room_is_checked_before_work_is_done(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=3_000_000))
    bundle.check_free_space(tmp_path, 3_000_000)
    with pytest.raises(BundleError, match="about 4 MB are needed, 3 MB are free"):
        bundle.check_free_space(tmp_path, 4_000_000)


@pytest.mark.parametrize(
    "field", ["context_length", "vocab_size", "num_layers", "num_heads", "row_size", "head_dim"]
)
def test_sizes_of_a_manifest_are_positive(field):
    raw = json.loads(MANIFEST.to_json())
    (raw if field in raw else raw["state"])[field] = 0
    with pytest.raises(BundleError, match=f"field '{field}' is not positive"):
        Manifest.from_json(json.dumps(raw), Path("m"))


def test_a_mount_point_is_not_replaced(path, monkeypatch):
    monkeypatch.setattr("os.path.ismount", lambda path: True)
    with pytest.raises(BundleError, match="is a mount point"):
        bundle.check_destination(path, force=True)


def test_a_bundle_has_the_permissions_that_any_new_directory_gets(path, tmp_path):
    (tmp_path / "other").mkdir()
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode
