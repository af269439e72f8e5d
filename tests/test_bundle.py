"""The bundle: what `open` refuses. Writing one is in test_bundle_writing.py."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from handmade import FILES, MANIFEST, edit_manifest, refusal, tree, write
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from doge_onnx import bundle
from doge_onnx.bundle import GRAPH_NAME, MANIFEST_NAME, WEIGHTS_NAME, Bundle
from doge_onnx.errors import BundleError
from doge_onnx.manifest import FORMAT_VERSION, ClosedRow, Manifest


@pytest.fixture
def path(tmp_path) -> Path:
    """A good bundle, to be broken."""
    return write(tmp_path / "bundle")


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
