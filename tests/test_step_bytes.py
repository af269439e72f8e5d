"""The weights that a decode step reads: what an export says, and a count of its file by hand."""

from __future__ import annotations

import re
from pathlib import Path

import checkpoints
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from conftest import TINY_CHECKPOINT
from onnx import helper, numpy_helper

from doge_onnx.bundle import GRAPH_NAME, Bundle
from doge_onnx.export.exporter import export
from doge_onnx.export.step_bytes import weights_read
from doge_onnx.manifest import WeightsRead

NEAREST = {"rounding": "nearest", "verify": False}
EXPERTS, PER_TOKEN = 49, 5
SIZES = {"num_hidden_layers": 2, "num_experts": EXPERTS, "num_experts_per_tok": PER_TOKEN}
# Config of the checkpoint and options of the export.
CASES = {
    "tied": ({}, {}),
    "tied int8": ({}, {"precision": "int8"}),
    "tied int4": ({}, {"precision": "int4"}),
    "untied": ({"tie_word_embeddings": False}, {}),
    "untied int8": ({"tie_word_embeddings": False}, {"precision": "int8"}),
    "untied int4": ({"tie_word_embeddings": False}, {"precision": "int4"}),
    "untied int4, hub": ({"tie_word_embeddings": False}, {"precision": "int4", "layout": "hub"}),
    "untied portable": ({"tie_word_embeddings": False}, {"target": "portable"}),
    "untied fp16": ({"tie_word_embeddings": False}, {"device": "cuda"}),
    "mixture": ({"is_moe": True}, {}),
    "mixture int8": ({"is_moe": True}, {"precision": "int8"}),
    "mixture int4": ({"is_moe": True}, {"precision": "int4"}),
}


def counted(path: Path, tied: bool) -> tuple[int, int]:
    """Bytes read whole and bytes of looked-up rows, by names and shapes of what is in the file.

    Without the rotations, and without the constants of the state.
    """
    whole = rows = 0
    graph = onnx.load(path).graph
    defaults = {value.name for value in graph.input}
    for tensor in graph.initializer:
        size = numpy_helper.to_array(tensor).nbytes
        if tensor.name in defaults or tensor.name.startswith(("rotation.", "state.")):
            continue
        # The scales of tables, in the shape that their operator wants.
        tables = (checkpoints.SMALL["vocab_size"], EXPERTS)
        scales = len(tensor.dims) == 3 and tensor.dims[2] == 1 and tensor.dims[0] in tables
        expert = tensor.dims[:1] == [EXPERTS] and re.match(r"layers\.\d+\.experts\.", tensor.name)
        if expert or (scales and tensor.dims[0] == EXPERTS):
            rows += PER_TOKEN * size // EXPERTS
        elif scales or (tensor.name.startswith("embed.table.") and not tied):
            rows += size // tensor.dims[0]
        else:
            whole += size
    return whole, rows


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_manifest_says_what_the_file_has(case, tmp_path):
    config, options = CASES[case]
    config = SIZES | config
    checkpoint = checkpoints.make(tmp_path / "checkpoint", **config)
    if "precision" in options:
        options = options | NEAREST
    made = export(checkpoint, tmp_path / "out", **({"verify": False} | options))
    read = made.manifest.weights_read
    tied = config.get("tie_word_embeddings", True)
    whole, rows = counted(made.path / made.manifest.graph, tied)
    # The state's own constants and the rows of rotations, some hundred bytes.
    assert whole <= read.whole < whole + 2000
    assert rows <= read.per_token < rows + 200
    # Of a tied embedding it is a copy of its scales.
    assert (rows > 40) == (not tied or "mixture" in case)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "least"),
    [({}, 4.0), ({"precision": "int8"}, 1.0), ({"precision": "int4"}, 0.5)],
)
def test_a_trained_model_reads_its_weights_once(options, least, tmp_path):
    if options:
        options = options | NEAREST
    made = export(TINY_CHECKPOINT, tmp_path / "out", **({"verify": False} | options))
    manifest = made.manifest
    read = manifest.weights_read
    # Its head is its embedding, so that nothing but rotations is looked up.
    assert read.per_token < 1000
    assert least * manifest.parameters < read.whole < made.size
    # Beside what a step reads, the file has the graph; and the bundle a tokenizer.
    graph = (made.path / GRAPH_NAME).stat().st_size
    assert graph - 200_000 < read.whole < graph


@pytest.mark.slow
@pytest.mark.parametrize("is_moe", [False, True])
def test_the_format_of_the_file_does_not_matter(is_moe, tmp_path):
    config = SIZES | {"tie_word_embeddings": False, "is_moe": is_moe}
    checkpoint = checkpoints.make(tmp_path / "checkpoint", **config)
    onnx_file, ort_file = (
        export(checkpoint, tmp_path / form, format=form, precision="int8", **NEAREST).path
        for form in ("onnx", "ort")
    )
    expected = Bundle.open(onnx_file).manifest.weights_read
    assert Bundle.open(ort_file).manifest.weights_read == expected


def test_more_tokens_look_more_rows_up():
    read = WeightsRead(whole=1000, per_token=18)
    assert [read.step_bytes(batch) for batch in (1, 3)] == [1018, 1054]


# --- graphs by hand -----------------------------------------------------------------------

IDS = ("ids", ["batch", "length"])


def read_by(nodes: list[onnx.NodeProto], weights: dict[str, np.ndarray], *others) -> WeightsRead:
    """What a step of a graph reads that takes `ids`; `others` are names and shapes of values."""
    named = [helper.make_tensor_value_info(name, 7, shape) for name, shape in (IDS, *others)]
    tensors = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    end = helper.make_tensor_value_info(nodes[-1].output[0], 1, None)
    graph = helper.make_graph(nodes, "g", named[:1], [end], tensors, value_info=named[1:])
    return weights_read(ir.from_proto(helper.make_model(graph)))


def test_a_table_that_is_also_the_head_is_read_whole():
    nodes = [
        helper.make_node("Gather", ["tied", "ids"], ["x"]),
        helper.make_node("Gather", ["untied", "ids"], ["y"]),
        helper.make_node("Add", ["x", "y"], ["z"]),
        helper.make_node("FusedMatMul", ["z", "tied"], ["logits"]),
    ]
    weights = {"tied": np.zeros((50, 4), np.float32), "untied": np.zeros((30, 4), np.float32)}
    assert read_by(nodes, weights) == WeightsRead(whole=50 * 16, per_token=16)


def test_what_says_where_to_look_is_read_whole():
    nodes = [helper.make_node("Gather", ["ids", "where"], ["x"])]
    assert read_by(nodes, {"where": np.zeros(3, np.int64)}) == WeightsRead(24, 0)


def test_a_weight_in_another_shape_is_the_same_weight():
    nodes = [
        helper.make_node("Unsqueeze", ["scales", "axes"], ["scales3"]),
        helper.make_node("GatherBlockQuantized", ["codes", "ids", "scales3"], ["x"]),
    ]
    weights = {
        "codes": np.zeros((64, 2, 16), np.uint8),
        "scales": np.zeros((64, 2), np.float32),
        "axes": np.zeros(1, np.int64),
    }
    assert read_by(nodes, weights) == WeightsRead(whole=0, per_token=32 + 8 + 8)
    nodes.append(helper.make_node("MatMulNBits", ["x", "codes", "scales"], ["logits"]))
    assert read_by(nodes, weights) == WeightsRead(whole=64 * 32 + 64 * 8, per_token=8)


def test_as_many_rows_as_a_token_has_indices():
    nodes = [
        helper.make_node("TopK", ["ids"], ["experts"]),
        helper.make_node("Gather", ["table", "experts"], ["x"]),
    ]
    experts = ("experts", ["batch", "length", 5])
    found = read_by(nodes, {"table": np.zeros((64, 10), np.uint8)}, experts)
    assert found == WeightsRead(whole=0, per_token=50)


def test_a_default_of_an_input_is_no_weight():
    nodes = [helper.make_node("Gather", ["table", "ids"], ["x"])]
    weights = {"table": np.zeros((6, 10), np.uint8), "ids": np.zeros((1, 1), np.int64)}
    assert read_by(nodes, weights) == WeightsRead(whole=0, per_token=10)
