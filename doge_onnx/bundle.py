"""The bundle: the directory that `export` writes and everything else reads.

Knows which files belong to a bundle and how to write the directory so that no reader ever sees
half of one. Does not know what is inside the graph, nor what the manifest says (`manifest`).
Imports only the standard library and `scratch`, because export and runtime share it.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import hashlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from doge_onnx import scratch, text_files
from doge_onnx.errors import BundleError
from doge_onnx.manifest import Manifest as Manifest

MANIFEST_NAME = "doge_onnx.json"
GRAPH_NAME = "model.onnx"
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
class Bundle:
    """A bundle on disk: one whose files were all checked, or a draft of one.

    Attributes:
        path: Its directory.
        manifest: What the manifest says.
        repo: Id on the Hub, if it was fetched from there; the directory is in the Hub's cache then.
        commit: That of the Hub, likewise.
    """

    path: Path
    manifest: Manifest
    repo: str | None = None
    commit: str | None = None

    @classmethod
    def open(cls, path: str | Path | Bundle) -> Bundle:
        """Open a bundle and check every file against its checksum; one that is open stays so.

        Raises:
            BundleError: There is no bundle, or it is incomplete, altered or of another
                format version.
        """
        if isinstance(path, Bundle):
            return path
        path = Path(path)
        if not path.is_dir():
            raise BundleError(f"{path} is not a directory; make a bundle with `doge-onnx export`")
        manifest = read_manifest(path)
        if manifest.graph not in manifest.files:
            raise BundleError(f"{path / MANIFEST_NAME} lists no {manifest.graph}; export again")
        for name, entry in manifest.files.items():
            check_name(path / MANIFEST_NAME, name)
            check_file(path, name, entry)
        return cls(path, manifest)

    @classmethod
    def draft(cls, directory: Path, manifest: Manifest) -> Bundle:
        """A bundle that is being written, to be run before it is sealed.

        Args:
            directory: With all that a run needs; nothing in it is checked.
            manifest: What will be in the directory's manifest. Its list of files need not be there.
        """
        sizes = {name: {"size": path.stat().st_size} for name, path in _files(directory)}
        return cls(directory, replace(manifest, files=sizes))

    @property
    def name(self) -> str:
        """What a user calls it: its id on the Hub, or its directory."""
        return self.repo or str(self.path)

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
            value = text_files.read_json(path)
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
        text = text_files.read(origin)
    except FileNotFoundError:
        if not path.exists():
            raise BundleError(
                f"{path} is not a bundle: there is no such directory; ids of bundles on the Hub "
                "look like user/model"
            ) from None
        raise BundleError(
            f"{path} is not a bundle: it has no {MANIFEST_NAME}; make one with `doge-onnx export`"
        ) from None
    except (OSError, ValueError) as error:
        raise BundleError(f"cannot read {origin}: {error}") from None
    return Manifest.from_json(text, origin)


def write_parity(bundle: Bundle, parity: dict[str, Any]) -> None:
    """Put the figures of a comparison into the manifest of a finished bundle.

    Raises:
        BundleError: It cannot be written, or is in the Hub's cache; the manifest is then as it was.
    """
    if bundle.repo is not None:
        raise BundleError(
            f"{bundle.path} is in the Hub's cache, where files stay as they were fetched"
        )
    path, manifest = bundle.path, replace(bundle.manifest, parity=parity)
    with _disk_errors(path):
        unfinished = path / f".{MANIFEST_NAME}.tmp"
        try:
            unfinished.write_text(manifest.to_json(), encoding="utf-8", newline="\n")
            unfinished.replace(path / MANIFEST_NAME)
        finally:
            unfinished.unlink(missing_ok=True)


def check_destination(out: Path, force: bool) -> None:
    """Refuse a destination that must not be written, before any work is done.

    Raises:
        BundleError: `out` exists and `force` is not set, or it is not something that a
            bundle may replace, or something above it is not a directory.
    """
    try:
        str(out.absolute()).encode()
        exists = out.exists() or out.is_symlink()
    # The name is not UTF-8, which ONNX cannot write, or the system does not accept it.
    except (OSError, ValueError) as error:
        raise BundleError(f"{str(out)!r} cannot be the name of a bundle: {error}") from None
    above = next((each for each in out.parents if each.exists() or each.is_symlink()), out.parent)
    if not above.is_dir():
        raise BundleError(f"{above} is not a directory; choose another place")
    if not exists:
        return
    if not force:
        raise BundleError(f"{out} exists; choose another place, or force its replacement")
    if out.is_symlink() or not out.is_dir():
        raise BundleError(f"{out} is not a directory; force replaces bundles only")
    # Not Path.is_mount, which Windows lacks before Python 3.12.
    if os.path.ismount(out):
        raise BundleError(f"{out} is a mount point; name a directory inside of it")
    # Forcing must never delete a directory that is no bundle and only has this name.
    if any(out.iterdir()) and not (out / MANIFEST_NAME).is_file():
        raise BundleError(f"{out} holds no bundle; force replaces bundles only")


@contextlib.contextmanager
def writing(out: Path, force: bool = False) -> Iterator[Path]:
    """Yield a scratch directory beside `out` that becomes `out` if the block succeeds.

    If an error or Ctrl-C ends the block, `out` stays as it was and the scratch directory is
    deleted; so are the directories above `out` that had to be made. What killed processes left
    beside `out` is removed. The block writes the manifest last, with `seal`.

    Raises:
        BundleError: See `check_destination`; or the disk is full or not writable.
    """
    check_destination(out, force)
    with _disk_errors(out), scratch.parents(out):
        scratch.remove_abandoned(out, scratch.UNFINISHED)
        with scratch.beside(out) as directory:
            yield directory
            # Sessions in reference cycles still map their files, and Windows renames no directory
            # with such a file.
            gc.collect()
            # Another process may have written it in the meantime.
            check_destination(out, force)
            scratch.replace(directory, out)
        # Only now: it may be the bundle that a killed process was about to replace.
        scratch.remove_abandoned(out, scratch.REPLACED)


def seal(directory: Path, manifest: Manifest) -> Manifest:
    """Write the manifest of a finished directory, with the checksum of each of its files."""
    files = {
        name: {"size": path.stat().st_size, "sha256": sha256(path)}
        for name, path in _files(directory)
    }
    manifest = replace(manifest, files=files)
    (directory / MANIFEST_NAME).write_text(manifest.to_json(), encoding="utf-8", newline="\n")
    return manifest


def _files(directory: Path) -> Iterator[tuple[str, Path]]:
    """The files of a bundle but its manifest: names as in that, and where they are."""
    for path in sorted(directory.rglob("*")):
        if path.is_file() and path != directory / MANIFEST_NAME:
            yield path.relative_to(directory).as_posix(), path


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


def check_name(origin: Path, name: str) -> None:
    """Refuse a file that the manifest at `origin` names and that is not inside of its bundle.

    Raises:
        BundleError: It is an absolute path, has a drive, or leads outside.
    """
    if any(part in ("", ".", "..") or set(part) & set("\\:\0") for part in name.split("/")):
        raise BundleError(f"{origin} names {name!r}, which is no file of a bundle")


def check_file(directory: Path, name: str, entry: Any) -> None:
    """Compare a file with what its manifest says of it.

    Args:
        directory: That of the bundle.
        name: Of the file, checked by `check_name`.
        entry: With "size" in bytes and "sha256", if it is valid.

    Raises:
        BundleError: The file is missing, differs or cannot be read.
    """
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


@contextlib.contextmanager
def _disk_errors(out: Path) -> Iterator[None]:
    """Turn what the file system refuses into a BundleError."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise BundleError(f"no room left on the disk while writing {out}") from None
        raise BundleError(f"cannot write {out}: {error}") from None
