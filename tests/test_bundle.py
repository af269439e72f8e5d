"""The bundle: what `open` refuses, and that `writing` leaves a whole one or nothing."""

from __future__ import annotations

import errno
import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from doge_onnx import bundle
from doge_onnx.bundle import GRAPH_NAME, MANIFEST_NAME, WEIGHTS_NAME, Bundle
from doge_onnx.errors import BundleError
from doge_onnx.manifest import FORMAT_VERSION, ClosedRow, Manifest, StateLayout, WeightsRead

MANIFEST = Manifest(
    target="ort",
    device="cpu",
    precision="fp32",
    activations="float32",
    context_length=64,
    vocab_size=97,
    parameters=1234,
    weights_read=WeightsRead(whole=5000, per_token=40),
    state=StateLayout(
        kind="growing",
        num_layers=3,
        num_heads=2,
        row_size=16,
        head_dim=8,
        dtype="float32",
        keep_window_size=2048,
        in_place=True,
        closing=ClosedRow((9,), -1e30),
    ),
    graph=GRAPH_NAME,
    source={"model": "a/b", "revision": None},
    versions={"doge-onnx": "0.0.1"},
)
FILES = {
    GRAPH_NAME: b"a graph",
    WEIGHTS_NAME: b"its weights",
    "config.json": b'{"model_type": "doge"}',
    "README.md": "Größe".encode(),
}


def write(out: Path, force: bool = False, files: dict[str, bytes] = FILES) -> Path:
    with bundle.writing(out, force) as directory:
        for name, content in files.items():
            (directory / name).write_bytes(content)
        bundle.seal(directory, MANIFEST)
    return out


@pytest.fixture
def path(tmp_path) -> Path:
    """A good bundle, to be broken."""
    return write(tmp_path / "bundle")


def edit_manifest(path: Path, change) -> None:
    """Let `change` alter the parsed manifest."""
    origin = path / MANIFEST_NAME
    raw = json.loads(origin.read_text())
    change(raw)
    origin.write_text(json.dumps(raw))


def refusal(path: Path) -> str:
    with pytest.raises(BundleError) as error:
        Bundle.open(path)
    assert "\n" not in str(error.value)
    return str(error.value)


def tree(directory: Path) -> dict[str, bytes]:
    """Everything below a directory, hidden files too."""
    return {
        str(entry.relative_to(directory)): entry.read_bytes() if entry.is_file() else b"directory"
        for entry in directory.rglob("*")
    }


# Reading.


def test_what_was_written_is_read(path):
    opened = Bundle.open(path)
    assert opened.path == path
    assert replace(opened.manifest, files={}) == MANIFEST
    assert opened.manifest.files.keys() == FILES.keys()
    assert opened.file("config.json") == path / "config.json"
    assert opened.read_json("config.json") == {"model_type": "doge"}
    assert opened.file("tokenizer.json") is None
    assert opened.read_json("tokenizer.json") == {}
    assert Bundle.open(str(path)) == opened


def test_a_file_that_the_manifest_does_not_list_is_not_the_bundles(path):
    (path / "tokenizer.json").write_text("{}")
    assert Bundle.open(path).file("tokenizer.json") is None


def test_there_is_no_bundle(tmp_path):
    message = refusal(tmp_path / "missing")
    assert f"{tmp_path / 'missing'} is not a directory" in message
    (tmp_path / "file").write_text("")
    assert "is not a directory" in refusal(tmp_path / "file")
    message = refusal(tmp_path)
    assert f"it has no {MANIFEST_NAME}" in message
    assert "doge-onnx export" in message


@pytest.mark.parametrize("name", FILES)
def test_an_altered_file_is_named(path, name):
    content = bytearray(FILES[name])
    content[0] ^= 1
    (path / name).write_bytes(content)
    assert f"{path / name} differs from the checksum" in refusal(path)


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_another_size_is_named(path, name):
    (path / name).write_bytes(FILES[name][:-1])
    assert f"{path / name} does not have the size" in refusal(path)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(path, name):
    (path / name).unlink()
    assert f"lacks {name}" in refusal(path)


def test_a_directory_in_the_place_of_a_file(path):
    (path / GRAPH_NAME).unlink()
    (path / GRAPH_NAME).mkdir()
    assert str(path / GRAPH_NAME) in refusal(path)


def test_a_newer_format_is_refused_before_anything_else(path):
    # Its fields may all be different.
    (path / MANIFEST_NAME).write_text(json.dumps({"format_version": FORMAT_VERSION + 1}))
    message = refusal(path)
    assert f"format version {FORMAT_VERSION + 1}" in message
    assert "upgrade doge-onnx" in message


@pytest.mark.parametrize("version", [None, "1", 1.0, [1], True, 0, -1])
def test_a_senseless_format_version(path, version):
    edit_manifest(path, lambda raw: raw.update(format_version=version))
    assert "format_version" in refusal(path)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"7", b"null", b"\xff\xfe", b"[" * 100_000, b"{}"],
    ids=["empty", "cut short", "list", "number", "null", "not text", "too deep", "empty object"],
)
def test_a_manifest_that_is_none(path, content):
    (path / MANIFEST_NAME).write_bytes(content)
    assert str(path / MANIFEST_NAME) in refusal(path)


FIELDS = sorted(set(asdict(MANIFEST)) - {"format_version"})
STATE_FIELDS = sorted(asdict(MANIFEST.state))
# Objects in the manifest, and what is in them.
PARTS = [
    *((("weights_read",), name) for name in asdict(MANIFEST.weights_read)),
    *((("state", "closing"), name) for name in asdict(MANIFEST.state.closing)),
]


@pytest.mark.parametrize("field", FIELDS)
def test_a_missing_field_is_named(path, field):
    edit_manifest(path, lambda raw: raw.pop(field))
    assert f"lacks the field {field!r}" in refusal(path)


@pytest.mark.parametrize("field", STATE_FIELDS)
def test_a_missing_field_of_the_state_is_named(path, field):
    edit_manifest(path, lambda raw: raw["state"].pop(field))
    assert f"lacks the field {field!r}" in refusal(path)


@pytest.mark.parametrize(("place", "field"), PARTS)
@pytest.mark.parametrize("value", [None, "1", {}, True])
def test_objects_of_the_manifest_are_checked_field_by_field(path, place, field, value):
    def inner(raw):
        for name in place:
            raw = raw[name]
        return raw

    edit_manifest(path, lambda raw: inner(raw).update({field: value}))
    assert f"field {field!r} cannot be {value!r}" in refusal(path)
    edit_manifest(path, lambda raw: inner(raw).pop(field))
    assert f"lacks the field {field!r}" in refusal(path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"channels": []}, "'channels' cannot be []"),
        # Of the key itself, behind the row, and no channel.
        ({"channels": [7]}, "'channels' cannot be [7] in rows of 16"),
        ({"channels": [9, 16]}, "'channels' cannot be [9, 16]"),
        ({"channels": ["9"]}, "'channels' cannot be ['9']"),
        ({"value": float("nan")}, "'value' cannot be nan in a state of float32"),
        ({"value": float("-inf")}, "'value' cannot be -inf"),
        # It would let the key be seen.
        ({"value": 5.0}, "'value' cannot be 5.0"),
        ({"value": 0}, "'value' cannot be 0"),
        ({"value": -(10**400)}, "'value' cannot be -1000"),
    ],
)
def test_what_closes_a_row_must_be_in_it(path, change, words):
    edit_manifest(path, lambda raw: raw["state"]["closing"].update(change))
    assert words in refusal(path)


@pytest.mark.parametrize(("value", "fits"), [(-127, True), (-128, False), (-1e30, False)])
def test_an_int8_row_is_closed_by_a_code(path, value, fits):
    def change(raw):
        raw["state"]["dtype"] = "int8"
        raw["state"]["closing"]["value"] = value

    edit_manifest(path, change)
    if fits:
        assert Bundle.open(path).manifest.state.closing == ClosedRow((9,), value)
    else:
        assert "in a state of int8" in refusal(path)


@pytest.mark.parametrize(
    ("kind", "window"), [("window", None), ("window", 0), ("growing", 0), ("growing", -1)]
)
def test_a_window_holds_at_least_a_key(path, kind, window):
    edit_manifest(path, lambda raw: raw["state"].update(kind=kind, keep_window_size=window))
    assert f"'keep_window_size' cannot be {window!r}" in refusal(path)


@pytest.mark.parametrize("name", ["whole", "per_token"])
@pytest.mark.parametrize("number", [-1, 10**400])
def test_weights_that_are_read_have_a_size(path, name, number):
    edit_manifest(path, lambda raw: raw["weights_read"].update({name: number}))
    assert f"field {name!r} is no number of bytes" in refusal(path)


def test_a_device_that_nobody_knows(path):
    edit_manifest(path, lambda raw: raw.update(device="npu"))
    assert "field 'device' is 'npu', not one of cpu, cuda" in refusal(path)


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("value", [[1], 1.5])
def test_a_field_of_the_wrong_type_is_named(path, field, value):
    edit_manifest(path, lambda raw: raw.update({field: value}))
    message = refusal(path)
    assert f"field {field!r}" in message
    assert repr(value) in message


@pytest.mark.parametrize("field", STATE_FIELDS)
@pytest.mark.parametrize("value", [[1], 1.5])
def test_a_field_of_the_state_of_the_wrong_type_is_named(path, field, value):
    edit_manifest(path, lambda raw: raw["state"].update({field: value}))
    assert f"field {field!r}" in refusal(path)


def test_true_is_no_number(path):
    edit_manifest(path, lambda raw: raw.update(context_length=True))
    assert "'context_length' cannot be True" in refusal(path)


def test_fields_of_a_later_version_do_not_matter(path):
    # Additions keep the format version; only what would be misread raises it.
    edit_manifest(path, lambda raw: raw.update(invented_later=1))
    assert replace(Bundle.open(path).manifest, files={}) == MANIFEST


@pytest.mark.parametrize("version", range(1, FORMAT_VERSION))
def test_an_older_format_is_refused_before_anything_else(path, version):
    (path / MANIFEST_NAME).write_text(json.dumps({"format_version": version}))
    assert refusal(path) == (
        f"{path / MANIFEST_NAME} has format version {version}, which this doge-onnx no longer "
        "reads; export again"
    )


def test_is_bundle(path, tmp_path):
    assert bundle.is_bundle(path)
    assert bundle.is_bundle(str(path))
    for name in (str(tmp_path), "nowhere", "a/b", "x" * 5000, "nul\0byte", ""):
        assert not bundle.is_bundle(name)


def test_the_graph_must_be_listed(path):
    edit_manifest(path, lambda raw: raw["files"].pop(GRAPH_NAME))
    assert f"lists no {GRAPH_NAME}" in refusal(path)


@pytest.mark.parametrize(
    "name",
    [
        *("../secret", "/etc/hostname", "sub\\file", "..", ".", "", "nul\0byte", "C:secret"),
        *("sub/../../secret", "sub//secret", "sub/"),
    ],
)
def test_a_manifest_cannot_name_what_is_outside(path, name):
    secret = path.parent / "secret"
    secret.write_bytes(b"x")
    entry = {"size": 1, "sha256": bundle.sha256(secret)}
    edit_manifest(path, lambda raw: raw["files"].update({name: entry}))
    message = refusal(path)
    assert repr(name) in message
    assert "is no file of a bundle" in message


def test_a_graph_in_a_directory_of_its_own(tmp_path):
    out = tmp_path / "bundle"
    manifest = replace(MANIFEST, graph=f"onnx/{GRAPH_NAME}")
    with bundle.writing(out) as scratch:
        (scratch / "onnx").mkdir()
        (scratch / "onnx" / GRAPH_NAME).write_bytes(b"a graph")
        (scratch / "onnx" / WEIGHTS_NAME).write_bytes(b"its weights")
        (scratch / "config.json").write_text("{}")
        bundle.seal(scratch, manifest)
    opened = Bundle.open(out)
    assert set(opened.manifest.files) == {
        "config.json",
        f"onnx/{GRAPH_NAME}",
        f"onnx/{WEIGHTS_NAME}",
    }
    assert opened.graph == out / "onnx" / GRAPH_NAME
    assert opened.weights(WEIGHTS_NAME) == out / "onnx" / WEIGHTS_NAME
    assert opened.weights("../config.json") is None
    (out / "onnx" / WEIGHTS_NAME).write_bytes(b"other stuff")
    assert f"onnx/{WEIGHTS_NAME}" in refusal(out)


@pytest.mark.parametrize("entry", [None, 7, "abc", [], {}, {"size": 7}, {"sha256": "abc"}])
def test_a_file_entry_that_is_none(path, entry):
    edit_manifest(path, lambda raw: raw["files"].update({GRAPH_NAME: entry}))
    assert str(path / GRAPH_NAME) in refusal(path)


def test_a_file_that_is_not_json(path):
    for content, reason in (
        (b"{", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"[]", "does not hold a JSON object"),
    ):
        write(path, force=True, files={**FILES, "config.json": content})
        with pytest.raises(BundleError, match=reason) as error:
            Bundle.open(path).read_json("config.json")
        assert str(path / "config.json") in str(error.value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.dictionaries(st.sampled_from([*FIELDS, "format_version"]), JSON),
    st.dictionaries(st.sampled_from(STATE_FIELDS), JSON),
)
def test_no_manifest_whatever_raises_anything_else(changes, state_changes):
    raw = asdict(MANIFEST)
    raw["state"].update(state_changes)
    raw.update(changes)
    try:
        manifest = Manifest.from_json(json.dumps(raw), Path("doge_onnx.json"))
    except BundleError:
        return
    assert isinstance(manifest.state.row_size, int)


def test_parity_figures_are_added_without_touching_the_rest(path):
    before = tree(path)
    bundle.write_parity(Bundle.open(path), {"passed": True})
    opened = Bundle.open(path)
    assert opened.manifest.parity == {"passed": True}
    assert replace(opened.manifest, parity=None, files={}) == MANIFEST
    after = tree(path)
    assert after.pop(MANIFEST_NAME) != before.pop(MANIFEST_NAME)
    assert after == before


def test_a_draft_has_the_files_that_are_there(tmp_path):
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx" / GRAPH_NAME).write_bytes(b"a graph")
    (tmp_path / "config.json").write_text('{"a": 1}')
    draft = Bundle.draft(tmp_path, replace(MANIFEST, graph=f"onnx/{GRAPH_NAME}"))
    assert draft.graph == tmp_path / "onnx" / GRAPH_NAME
    assert draft.weights(WEIGHTS_NAME) is None
    assert draft.read_json("config.json") == {"a": 1}
    assert draft.manifest.files[f"onnx/{GRAPH_NAME}"]["size"] == 7
    # Nobody takes it for a bundle.
    assert not bundle.is_bundle(tmp_path)
    assert bundle.seal(tmp_path, draft.manifest) == Bundle.open(tmp_path).manifest


# Writing.


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


def test_the_parent_must_be_there(tmp_path):
    with pytest.raises(BundleError, match=r"missing is not a directory; create it first"):
        write(tmp_path / "missing" / "bundle")
    assert tree(tmp_path) == {}


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
