"""How many bytes of its weights a graph must read in one step.

Knows just enough of the protobuf wire format to find the size of every weight in a model file
and the operators that read it, without the `onnx` package and without reading the weights.
Does not know what they mean.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from doge_onnx.errors import BundleError

# Wire types of protobuf.
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
# Field numbers of onnx.proto.
_MODEL_GRAPH = 7
_GRAPH_NODE, _GRAPH_INITIALIZER = 1, 5
_NODE_INPUT, _NODE_OP_TYPE = 1, 4
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


@dataclass(frozen=True)
class Table:
    """A weight of which a step reads some rows only.

    Attributes:
        rows: Its first dimension.
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
    """The weights of the ONNX model at `path`, wherever their data is.

    Raises:
        BundleError: The file cannot be read or is not a protobuf message.
    """
    try:
        with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as m:
            return _sort(m)
    except (ValueError, IndexError):  # an empty file cannot be mapped: ValueError too
        raise BundleError(f"{path} is not a readable ONNX model; export again") from None
    except OSError as error:
        raise BundleError(f"cannot read {path}: {error}") from None


def _sort(data: mmap.mmap) -> Weights:
    weights: dict[bytes, Table] = {}
    # Of each name that an operator reads: whether all operators only look rows up in it.
    looked_up: dict[bytes, bool] = {}
    for graph in _messages(data, slice(0, len(data)), _MODEL_GRAPH):
        for tensor in _messages(data, graph, _GRAPH_INITIALIZER):
            name, weight = _tensor(data, tensor)
            weights[name] = weight
        for node in _messages(data, graph, _GRAPH_NODE):
            names = [data[span] for span in _messages(data, node, _NODE_INPUT)]
            kind = b"".join(data[span] for span in _messages(data, node, _NODE_OP_TYPE)).decode()
            for number, name in enumerate(names):
                rows_only = number in _LOOKED_UP.get(kind, ())
                looked_up[name] = looked_up.get(name, True) and rows_only
    tables = {name: w for name, w in weights.items() if looked_up.get(name, False) and w.rows}
    whole = sum(weight.size for name, weight in weights.items() if name not in tables)
    return Weights(whole, tuple(tables.values()))


def _tensor(data: mmap.mmap, span: slice) -> tuple[bytes, Table]:
    """Name and size of a tensor; a scalar has one row."""
    name, bits = b"", 0
    dims: list[int] = []
    for number, value in _fields(data, span):
        if number == _TENSOR_NAME and isinstance(value, slice):
            name = data[value]
        elif number == _TENSOR_DATA_TYPE and isinstance(value, int):
            bits = _BITS.get(value, 0)
        elif number == _TENSOR_DIMS and isinstance(value, int):
            dims.append(value)
        elif number == _TENSOR_DIMS and isinstance(value, slice):
            # All of them in one field, as proto3 writes them.
            position = value.start
            while position < value.stop:
                size, position = _varint(data, position)
                dims.append(size)
    return name, Table(dims[0] if dims else 1, (math.prod(dims) * bits + 7) // 8)


def _messages(data: mmap.mmap, span: slice, wanted: int) -> Iterator[slice]:
    """Where the messages or strings of the field `wanted` are, in the message at `span`."""
    for number, value in _fields(data, span):
        if number == wanted and isinstance(value, slice):
            yield value


def _fields(data: mmap.mmap, span: slice) -> Iterator[tuple[int, int | slice | None]]:
    """The fields of the message at `span`: number, and value or place; None for floats."""
    position: int = span.start
    while position < span.stop:
        tag, position = _varint(data, position)
        wire_type = tag & 7
        value: int | slice | None = None
        if wire_type == _VARINT:
            value, position = _varint(data, position)
        elif wire_type == _BYTES:
            size, start = _varint(data, position)
            position = start + size
            value = slice(start, position)
        elif wire_type in (_FIXED32, _FIXED64):
            position += 4 if wire_type == _FIXED32 else 8
        else:
            raise ValueError("not an ONNX wire type")
        if position > span.stop:
            raise ValueError("truncated message")
        yield tag >> 3, value


def _varint(data: mmap.mmap, position: int) -> tuple[int, int]:
    """The variable-length integer at `position`, and the position after it."""
    value = shift = 0
    while shift < 64:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
    raise ValueError("not a variable-length integer")
