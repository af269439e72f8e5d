"""Random checkpoints and their bundles, which several test modules share: tracing takes seconds."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import checkpoints
import numpy as np
import onnx
import pytest
from checkpoints import SHAPES, rope
from onnx import inliner

import doge_onnx
from doge_onnx import bundle as bundles
from doge_onnx.bundle import GRAPH_NAME
from doge_onnx.export import exporter, ort_format
from doge_onnx.export.exporter import export

TARGETS = ("ort", "portable")
# Grows past its trained context, has a group of three query heads, and ties its head.
MAIN = {"num_hidden_layers": 2, "max_position_embeddings": 32, **rope("dynamic", 4.0)}
CONTEXT = 60
SECOND = {**SHAPES["everything at once"], "num_hidden_layers": 3, **rope("linear", 2.0)}
TOKENIZER_FILES = {
    "tokenizer.json": b'{"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}} ',
    "tokenizer_config.json": b'{ "tokenizer_class": "PreTrainedTokenizerFast" }',
    "special_tokens_map.json": b"{}",
    "chat_template.jinja": b"{{ messages }}\n",
}


@dataclass(frozen=True)
class Exported:
    checkpoint: Path
    path: Path
    report: exporter.ExportReport

    @property
    def manifest(self) -> bundles.Manifest:
        return self.report.manifest

    def graph(self) -> onnx.ModelProto:
        return onnx.load(self.path / GRAPH_NAME)


def inlined(path: Path) -> onnx.ModelProto:
    """A bundle's graph with the bodies of its functions, as ONNX Runtime sees it.

    Constants of the bodies become weights, which they are in the other graphs.
    """
    model = inliner.inline_local_functions(onnx.load(path / GRAPH_NAME))
    constants = [node for node in model.graph.node if node.op_type == "Constant"]
    for node in constants:
        model.graph.node.remove(node)
    return model


@pytest.fixture(scope="session")
def original(tmp_path_factory) -> Path:
    """A good checkpoint, not to be changed."""
    return checkpoints.make(tmp_path_factory.mktemp("original"), num_hidden_layers=2)


@pytest.fixture(scope="session")
def sharded_original(tmp_path_factory) -> Path:
    """The same in several files."""
    directory = tmp_path_factory.mktemp("sharded")
    return checkpoints.make(directory, num_hidden_layers=2, max_shard_size="60KB")


@pytest.fixture(scope="session")
def main_checkpoint(tmp_path_factory) -> Path:
    directory = checkpoints.make(tmp_path_factory.mktemp("main") / "tiny-doge", **MAIN)
    for name, content in TOKENIZER_FILES.items():
        (directory / name).write_bytes(content)
    (directory / "modeling_doge.py").write_text("raise SystemExit")
    return directory


@pytest.fixture(scope="session")
def second_checkpoint(tmp_path_factory) -> Path:
    return checkpoints.make(tmp_path_factory.mktemp("second") / "checkpoint", **SECOND)


@pytest.fixture(scope="session")
def make_bundle(tmp_path_factory):
    """Export a checkpoint, each combination once."""
    made: dict[tuple, Exported] = {}

    def get(checkpoint: Path, **options) -> Exported:
        key = (checkpoint, *sorted(options.items()))
        if key not in made:
            out = tmp_path_factory.mktemp("out") / "bundle"
            made[key] = Exported(checkpoint, out, export(checkpoint, out, **options))
        return made[key]

    return get


@pytest.fixture(scope="session")
def main(make_bundle, main_checkpoint) -> Exported:
    """For ONNX Runtime, compared with the reference, longer than the trained context."""
    return make_bundle(main_checkpoint, context_length=CONTEXT)


@pytest.fixture(scope="session", params=TARGETS)
def second(request, second_checkpoint, make_bundle) -> Exported:
    """As different from the main one as can be; for both targets."""
    return make_bundle(second_checkpoint, target=request.param, verify=False)


@pytest.fixture(scope="session", params=["main", "main portable", "second", "second portable"])
def each(request, main, second_checkpoint, make_bundle) -> Exported:
    """Two models, each for both targets."""
    target = "portable" if "portable" in request.param else "ort"
    if "second" in request.param:
        return make_bundle(second_checkpoint, target=target, verify=False)
    if target == "ort":
        return main
    return make_bundle(main.checkpoint, target=target, context_length=CONTEXT, verify=False)


@pytest.fixture(scope="session")
def tiny_ort(tiny_bundle, tmp_path_factory) -> Path:
    """examples/doge-tiny in ONNX Runtime's own format."""
    return in_ort_format(tiny_bundle, tmp_path_factory.mktemp("bundles") / "tiny-ort")


@pytest.fixture(scope="session")
def one_layer(tmp_path_factory) -> Path:
    """What is quickest to export."""
    return checkpoints.make(tmp_path_factory.mktemp("one") / "checkpoint", num_hidden_layers=1)


def in_ort_format(path: Path, out: Path) -> Path:
    """A copy of a bundle whose graph is converted, as an export does it."""
    shutil.copytree(path, out)
    manifest = bundles.read_manifest(path)
    graph = ort_format.convert(out / manifest.graph)
    bundles.seal(out, replace(manifest, graph=graph.name, native_operators=False))
    return out


def tree(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def token_by_token(path: Path, ids: list[int]) -> np.ndarray:
    model = doge_onnx.load(path)
    rows, state = [], None
    for token in ids:
        logits, state = model.forward([[token]], state)
        rows.append(logits[0, 0])
    return np.stack(rows)
