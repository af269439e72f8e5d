"""A small bundle whose files are no real ones: for what looks at files and manifest only."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from doge_onnx import bundle
from doge_onnx.bundle import GRAPH_NAME, MANIFEST_NAME, WEIGHTS_NAME, Bundle
from doge_onnx.errors import BundleError
from doge_onnx.manifest import ClosedRow, Manifest, StateLayout, WeightsRead

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
