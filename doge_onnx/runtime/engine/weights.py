"""How many bytes of its weights a graph must read in one step.

Knows just enough of ONNX to find the size of every weight in a model file and the operators
that read it, without reading the weights. Does not know what they mean.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from doge_onnx.runtime.engine.ort_file import Node, Tensor, is_ort_format, read_graph
from doge_onnx.runtime.engine.protobuf import fields, messages, read_model, varint

# Field numbers of onnx.proto.
_MODEL_GRAPH = 7
_GRAPH_NODE, _GRAPH_INITIALIZER = 1, 5
_NODE_INPUT, _NODE_OUTPUT, _NODE_OP_TYPE = 1, 2, 4
_TENSOR_DIMS, _TENSOR_DATA_TYPE, _TENSOR_NAME = 1, 2, 8
# Bits of an element, by the number of its type in onnx.proto; what is not here holds no weights.
_BITS = {
    **dict.fromkeys((7, 11, 13), 64),
    **dict.fromkeys((1, 6, 12), 32),
    **dict.fromkeys((4, 5, 10, 16), 16),
    **dict.fromkeys((2, 3, 9, 17, 18, 19, 20), 8),
    **dict.fromkeys((21, 22), 4),
}
# Inputs of which an operator reads only the rows that another input names: embeddings, experts,
# and the rotation of each position.
_LOOKED_UP = {
    "Gather": {0},
    "GatherBlockQuantized": {0, 2, 3},
    "RotaryEmbedding": {2, 3},
    "GroupQueryAttention": {7, 8},
}
# Operators whose output is their first input in another shape.
_RESHAPING = ("Reshape", "Squeeze", "Unsqueeze")


@dataclass(frozen=True)
class Table:
    """A weight of which a step reads some rows only.

    Attributes:
        rows: Its first dimension; 1 of a scalar.
        size: Bytes of all rows.
    """

    rows: int
    size: int


@dataclass(frozen=True)
class Weights:
    """The weights of a graph, by how a step reads them.

    Attributes:
        whole: Bytes of those that every step reads from end to end. An embedding that is the
            head, too, is one of them.
        tables: The others.
    """

    whole: int
    tables: tuple[Table, ...]

    def step_bytes(self, batch: int, experts: int = 0, experts_per_token: int = 0) -> int:
        """Bytes that a step with one new token for each of `batch` sequences must read.

        Of a table, that is one row for each token; of a table of `experts`, it is
        `experts_per_token`. Tokens that share rows need fewer, so it is an upper bound there.
        """
        total = self.whole
        for table in self.tables:
            wanted = batch * (experts_per_token if table.rows == experts else 1)
            total += table.size * min(wanted, table.rows) // table.rows
        return total


def read_weights(path: Path) -> Weights:
    """The weights of the graph at `path`, an ONNX or ORT file, wherever their data is.

    Raises:
        BundleError: The file cannot be read or is of neither format.
    """
    if is_ort_format(path):
        return _sort(*read_graph(path))
    return read_model(path, lambda data: _sort(*_read_onnx(data)))


def _sort(tensors: Iterable[Tensor], nodes: Collection[Node]) -> Weights:
    weights = {
        name: Table(dims[0] if dims else 1, (math.prod(dims) * _BITS.get(kind, 0) + 7) // 8)
        for name, kind, dims in tensors
    }
    # Names of tensors in another shape. Nodes may come before those whose output they read.
    before = {node.outputs[0]: node.inputs[0] for node in nodes if node.kind in _RESHAPING}
    # Of each name that an operator reads: whether all operators only look rows up in it.
    looked_up: dict[bytes, bool] = {}
    for node in nodes:
        if node.kind in _RESHAPING:
            continue
        for number, name in enumerate(node.inputs):
            # A chain is no longer than there are links: a graph with a circle has no end.
            for _ in before:
                name = before.get(name, name)
            rows_only = number in _LOOKED_UP.get(node.kind, ())
            looked_up[name] = looked_up.get(name, True) and rows_only
    tables = {name: w for name, w in weights.items() if looked_up.get(name, False) and w.rows}
    whole = sum(weight.size for name, weight in weights.items() if name not in tables)
    return Weights(whole, tuple(tables.values()))


def _read_onnx(data: mmap.mmap) -> tuple[list[Tensor], list[Node]]:
    tensors, nodes = [], []
    for graph in messages(data, slice(0, len(data)), _MODEL_GRAPH):
        tensors += [_tensor(data, span) for span in messages(data, graph, _GRAPH_INITIALIZER)]
        for span in messages(data, graph, _GRAPH_NODE):
            kind = b"".join(data[part] for part in messages(data, span, _NODE_OP_TYPE)).decode()
            inputs, outputs = (
                [data[part] for part in messages(data, span, number)]
                for number in (_NODE_INPUT, _NODE_OUTPUT)
            )
            nodes.append(Node(kind, inputs, outputs))
    return tensors, nodes


def _tensor(data: mmap.mmap, span: slice) -> Tensor:
    name, data_type = b"", 0
    dims: list[int] = []
    for number, value in fields(data, span):
        if number == _TENSOR_NAME and isinstance(value, slice):
            name = data[value]
        elif number == _TENSOR_DATA_TYPE and isinstance(value, int):
            data_type = value
        elif number == _TENSOR_DIMS and isinstance(value, int):
            dims.append(value)
        elif number == _TENSOR_DIMS and isinstance(value, slice):
            # All of them in one field, as proto3 writes them.
            position = value.start
            while position < value.stop:
                size, position = varint(data, position)
                dims.append(size)
    return Tensor(name, data_type, dims)
