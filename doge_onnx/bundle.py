"""The bundle: the directory that `export` writes and everything else reads.

Knows the manifest (`doge_onnx.json`), which files belong to a bundle and how the
directory is written so that nobody ever sees half of one. Does not know what is inside
the graph. Imports only the standard library, because export and runtime share it.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path, PurePosixPath
from typing import Any

from doge_onnx.errors import BundleError

FORMAT_VERSION = 4
MANIFEST_NAME = "doge_onnx.json"
GRAPH_NAME = "model.onnx"
# The gate of a key that must never be attended to (padding, a free row), or a summand of that gate.
# exp() of it is 0 beside any real score, and no real gate is large enough to undo it. It is finite,
# because the softmax of a query whose keys are all closed would otherwise be NaN.
CLOSED_GATE = -1e30
# The Hub's tools recognise external data by this end of its name only.
WEIGHTS_SUFFIX = "_data"
WEIGHTS_NAME = GRAPH_NAME + WEIGHTS_SUFFIX
LAYOUTS = ("flat", "hub")
# Where transformers.js looks for the graph of each of its dtypes: fp32, fp16, q8 and q4. No two
# have the same name, so that one repository can hold all of them.
_HUB_GRAPHS = {
    "fp32": "onnx/model.onnx",
    "fp16": "onnx/model_fp16.onnx",
    "int8": "onnx/model_quantized.onnx",
    "int4": "onnx/model_q4.onnx",
}


@dataclass(frozen=True)
class StateLayout:
    """What a step carries over: one key and one value tensor per layer.

    Attributes:
        kind: "growing": one row per token seen, `[batch, num_heads, tokens, row_size]`.
            "window": at most `keep_window_size` rows, in any order; a free row is zero but
            for its gate, which is `CLOSED_GATE`.
        num_layers: Number of key/value pairs.
        num_heads: Heads of each tensor.
        row_size: Channels of one row: head_dim, the gate channels, and zeros up to a
            multiple that the attention kernel takes.
        head_dim: Channels of a row that hold the key or value itself; the gate follows.
        dtype: Name of the element type: NumPy's, or "bfloat16", which NumPy lacks.
        keep_window_size: Number of keys, those with the largest gates, that one query
            attends to; None for all.
        in_place: Whether past and present may be one buffer with spare rows, which the
            graph then extends without copying it.
    """

    kind: str
    num_layers: int
    num_heads: int
    row_size: int
    head_dim: int
    dtype: str
    keep_window_size: int | None
    in_place: bool

    @property
    def item_size(self) -> int:
        """Bytes of one element."""
        return {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}[self.dtype]


@dataclass(frozen=True)
class Manifest:
    """The content of `doge_onnx.json`.

    Attributes:
        target: "ort" (ONNX Runtime's fused operators) or "portable" (standard ones only).
        precision: Of the weights, for example "fp32".
        context_length: Most tokens that one sequence may have, prompt included.
        vocab_size: Token ids are in `range(vocab_size)`.
        parameters: Number of weights of the checkpoint, tied ones counted once.
        state: Shape and element type of the recurrent state.
        source: Where the checkpoint came from: "model" and "revision".
        versions: Versions of this package and of the libraries that made the bundle.
        parity: Figures of the comparison with the reference, or None if none was made.
        files: Size and SHA-256 of every file of the bundle but the manifest itself.
        quality: Figures of the evaluation of a quantized bundle, or None if none was made.
        graph: Which of the files is the graph; external weights are in the same directory.
        activations: Element type that the graph computes in, named like that of the state.
        format_version: Version of this format.
    """

    target: str
    precision: str
    context_length: int
    vocab_size: int
    parameters: int
    state: StateLayout
    source: dict[str, str | None]
    versions: dict[str, str]
    parity: dict[str, Any] | None = None
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    # "since" is the first format version with the field; older ones mean its default.
    quality: dict[str, Any] | None = field(default=None, metadata={"since": 2})
    graph: str = field(default=GRAPH_NAME, metadata={"since": 3})
    activations: str = field(default="float32", metadata={"since": 4})
    format_version: int = FORMAT_VERSION

    @property
    def quantized(self) -> bool:
        """Whether weights or state are whole numbers of few bits, with scales."""
        return self.precision not in ("fp32", "fp16", "bf16") or self.state.dtype == "int8"

    def to_json(self) -> str:
        """The manifest as it stands in the file."""
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str, origin: Path) -> Manifest:
        """Parse a manifest; `origin` is the file that error messages name.

        Raises:
            BundleError: It is not JSON, its format is newer than this version reads, or
                a field is missing or of the wrong type.
        """
        try:
            raw = json.loads(text)
        # RecursionError: brackets nested deeper than any manifest's.
        except (ValueError, RecursionError) as error:
            raise BundleError(f"{origin} is not valid JSON ({error}); export again") from None
        if not isinstance(raw, dict):
            raise BundleError(f"{origin} does not hold a JSON object; export again")
        version = raw.get("format_version")
        if not isinstance(version, int) or version < 1:
            raise BundleError(f"{origin} has no format_version; it is not a bundle's manifest")
        if version > FORMAT_VERSION:
            raise BundleError(
                f"{origin} has format version {version}, newer than the {FORMAT_VERSION} that "
                "this doge-onnx reads; upgrade doge-onnx"
            )
        values = _typed_fields(cls, raw, version, origin)
        state = _typed_fields(StateLayout, values["state"], version, origin)
        values["state"] = StateLayout(**state)
        manifest = cls(**values)
        for owner, name in (
            (manifest, "context_length"),
            (manifest, "vocab_size"),
            (manifest.state, "num_layers"),
            (manifest.state, "num_heads"),
            (manifest.state, "row_size"),
        ):
            if getattr(owner, name) < 1:
                raise BundleError(f"{origin}: field {name!r} is not positive; export again")
        return manifest


# Annotations are strings here (`from __future__ import annotations`), and these are all of them.
_FIELD_TYPES: dict[str, type | tuple[type, ...]] = {
    "str": str,
    "int": int,
    "int | None": (int, type(None)),
    "bool": bool,
    "StateLayout": dict,
    "dict[str, str]": dict,
    "dict[str, str | None]": dict,
    "dict[str, dict[str, Any]]": dict,
    "dict[str, Any] | None": (dict, type(None)),
}


def _typed_fields(cls: type, raw: Mapping[str, Any], version: int, origin: Path) -> dict[str, Any]:
    """The values of a dataclass's fields out of parsed JSON, each checked for its type.

    A field that is newer than the format `version` of the JSON may be left out.
    """
    values = {}
    for entry in fields(cls):
        if entry.name not in raw:
            if version < entry.metadata.get("since", 1):
                continue
            raise BundleError(f"{origin} lacks the field {entry.name!r}; export again")
        value = raw[entry.name]
        expected = _FIELD_TYPES[str(entry.type)]
        if not isinstance(value, expected) or (isinstance(value, bool) and expected is int):
            raise BundleError(f"{origin}: field {entry.name!r} cannot be {value!r}; export again")
        values[entry.name] = value
    return values


@dataclass(frozen=True)
class Bundle:
    """A bundle on disk whose manifest was read and whose files were all checked."""

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: str | Path) -> Bundle:
        """Open a bundle and check every file against its checksum.

        Raises:
            BundleError: There is no bundle, or it is incomplete, altered or too new.
        """
        path = Path(path)
        if not path.is_dir():
            raise BundleError(f"{path} is not a directory; make a bundle with `doge-onnx export`")
        manifest = read_manifest(path)
        if manifest.graph not in manifest.files:
            raise BundleError(f"{path / MANIFEST_NAME} lists no {manifest.graph}; export again")
        for name, entry in manifest.files.items():
            _check_file(path, name, entry)
        return cls(path, manifest)

    @property
    def graph(self) -> Path:
        """Path of the graph."""
        return self.path / self.manifest.graph

    def weights(self, location: str) -> Path | None:
        """Path of a file that the graph calls `location`, or None if it is not the bundle's."""
        return self.file(str(PurePosixPath(self.manifest.graph).parent / location))

    def file(self, name: str) -> Path | None:
        """Path of one of the bundle's files, or None if the bundle has no such file."""
        return self.path / name if name in self.manifest.files else None

    def read_json(self, name: str) -> dict[str, Any]:
        """One of the bundle's JSON files, or an empty dict if the bundle has no such file.

        Raises:
            BundleError: The file does not hold a JSON object.
        """
        path = self.file(name)
        if path is None:
            return {}
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise BundleError(f"{path} is not valid JSON ({error})") from None
        if not isinstance(value, dict):
            raise BundleError(f"{path} does not hold a JSON object")
        return value


def graph_name(layout: str, precision: str) -> str:
    """Path of the graph in a bundle: "flat" has it beside the other files, "hub" as on the Hub.

    Raises:
        BundleError: One of the two is not known.
    """
    if layout not in LAYOUTS:
        raise BundleError(f"layout {layout!r} is not known; choose from {', '.join(LAYOUTS)}")
    if layout == "flat":
        return GRAPH_NAME
    if precision not in _HUB_GRAPHS:
        raise BundleError(f"the Hub has no name for graphs of precision {precision!r}")
    return _HUB_GRAPHS[precision]


def is_bundle(path: str | Path) -> bool:
    """Whether `path` has a manifest, valid or not; `path` may be any text."""
    # Path.is_file raises for names that the system does not accept.
    return os.path.isfile(os.path.join(path, MANIFEST_NAME))


def read_manifest(path: Path) -> Manifest:
    """Read the manifest of the bundle at `path` without looking at its other files.

    Raises:
        BundleError: There is no readable manifest, or it is not valid.
    """
    origin = path / MANIFEST_NAME
    try:
        text = origin.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise BundleError(
            f"{path} is not a bundle: it has no {MANIFEST_NAME}; make one with `doge-onnx export`"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise BundleError(f"cannot read {origin}: {error}") from None
    return Manifest.from_json(text, origin)


def write_parity(path: Path, parity: dict[str, Any]) -> None:
    """Put the figures of a comparison into the manifest of the bundle at `path`."""
    _write_manifest(path, replace(read_manifest(path), parity=parity))


def write_quality(path: Path, quality: dict[str, Any]) -> None:
    """Put the figures of an evaluation into the manifest of the bundle at `path`."""
    _write_manifest(path, replace(read_manifest(path), quality=quality))


def replace_file(path: Path, name: str, text: str) -> None:
    """Replace a text file of the bundle at `path`, and its checksum in the manifest.

    Until it returns, `Bundle.open` refuses the bundle: call it before anybody reads the bundle.

    Raises:
        BundleError: There is no readable manifest, or the file cannot be written.
    """
    manifest = read_manifest(path)
    with _disk_errors(path):
        (path / name).write_text(text, encoding="utf-8")
        entry = _file_entry(path / name)
    _write_manifest(path, replace(manifest, files={**manifest.files, name: entry}))


def _write_manifest(path: Path, manifest: Manifest) -> None:
    """Replace the manifest of the bundle at `path`; a failure leaves the one that is there."""
    with _disk_errors(path):
        scratch = path / f".{MANIFEST_NAME}.tmp"
        try:
            scratch.write_text(manifest.to_json(), encoding="utf-8")
            scratch.replace(path / MANIFEST_NAME)
        finally:
            scratch.unlink(missing_ok=True)


def check_destination(out: Path, force: bool) -> None:
    """Refuse a destination that must not be written, before any work is done.

    Raises:
        BundleError: `out` exists and `force` is not set, or it is not something that a
            bundle may replace, or its parent is not a directory.
    """
    try:
        str(out.absolute()).encode()
        exists = out.exists() or out.is_symlink()
    # The name is not UTF-8, which ONNX cannot write, or the system does not accept it.
    except (OSError, ValueError) as error:
        raise BundleError(f"{str(out)!r} cannot be the name of a bundle: {error}") from None
    if not out.parent.is_dir():
        raise BundleError(f"{out.parent} is not a directory; create it first")
    if not exists:
        return
    if not force:
        raise BundleError(f"{out} exists; choose another place, or force its replacement")
    if out.is_symlink() or not out.is_dir():
        raise BundleError(f"{out} is not a directory; force replaces bundles only")
    if out.is_mount():
        raise BundleError(f"{out} is a mount point; name a directory inside of it")
    # Forcing must never delete a directory that is no bundle and only has this name.
    if any(out.iterdir()) and not (out / MANIFEST_NAME).is_file():
        raise BundleError(f"{out} holds no bundle; force replaces bundles only")


@contextlib.contextmanager
def writing(out: Path, force: bool = False) -> Iterator[Path]:
    """Yield a scratch directory beside `out` that becomes `out` if the block succeeds.

    If an error or Ctrl-C ends the block, `out` stays as it was and the scratch directory is
    deleted. The block writes the manifest last, with `seal`.

    Raises:
        BundleError: See `check_destination`; or the disk is full or not writable.
    """
    check_destination(out, force)
    with _disk_errors(out):
        scratch = _beside(out, "part")
        try:
            scratch.mkdir()
            yield scratch
            _replace_directory(scratch, out)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def seal(directory: Path, manifest: Manifest) -> Manifest:
    """Write the manifest of a finished directory, with the checksum of each of its files."""
    files = {
        path.relative_to(directory).as_posix(): _file_entry(path)
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path != directory / MANIFEST_NAME
    }
    manifest = replace(manifest, files=files)
    (directory / MANIFEST_NAME).write_text(manifest.to_json(), encoding="utf-8")
    return manifest


def check_free_space(directory: Path, needed: int) -> None:
    """Raise BundleError if the disk of `directory` has less than `needed` bytes free."""
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise BundleError(
            f"no room in {directory}: about {needed / 1e6:.0f} MB are needed, "
            f"{free / 1e6:.0f} MB are free"
        )


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _file_entry(path: Path) -> dict[str, Any]:
    """What a manifest says of a file."""
    return {"size": path.stat().st_size, "sha256": sha256(path)}


def _check_file(directory: Path, name: str, entry: Any) -> None:
    # An absolute path, a drive, or "..", would let a manifest point outside its bundle.
    if any(part in ("", ".", "..") or set(part) & set("\\:\0") for part in name.split("/")):
        raise BundleError(
            f"{directory / MANIFEST_NAME} names {name!r}, which is no file of a bundle"
        )
    path = directory / name
    try:
        size = path.stat().st_size
        if not isinstance(entry, dict) or size != entry.get("size"):
            raise BundleError(f"{path} does not have the size that its manifest says; export again")
        if sha256(path) != entry.get("sha256"):
            raise BundleError(f"{path} differs from the checksum in its manifest; export again")
    except FileNotFoundError:
        raise BundleError(f"the bundle {directory} lacks {name}; export again") from None
    except OSError as error:
        raise BundleError(f"cannot read {path}: {error}") from None


def _replace_directory(scratch: Path, out: Path) -> None:
    """Rename `scratch` to `out`; an older `out` is deleted only once the new one is in place."""
    if not out.exists():
        scratch.rename(out)
        return
    retired = _beside(out, "old")
    try:
        out.rename(retired)
        scratch.rename(out)
    except BaseException:
        if retired.exists() and not out.exists():
            retired.rename(out)
        raise
    shutil.rmtree(retired, ignore_errors=True)


def _beside(out: Path, suffix: str) -> Path:
    """A name that is free, on the same disk as `out`."""
    return out.parent / f".{out.name}.{secrets.token_hex(4)}.{suffix}"


@contextlib.contextmanager
def _disk_errors(out: Path) -> Iterator[None]:
    """Turn what the file system refuses into a BundleError."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise BundleError(f"no room left on the disk while writing {out}") from None
        raise BundleError(f"cannot write {out}: {error}") from None
