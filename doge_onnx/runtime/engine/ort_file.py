"""ONNX Runtime's own file format, a flatbuffer: tensors and operators of such a file.

Knows just enough of flatbuffers and of ONNX Runtime's schema to find names, shapes and operators
without reading the weights. Does not know what they mean. (ONNX Runtime brings a reader along,
which needs another package and sets up logging for the whole process.)
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, TypeVar

from doge_onnx.errors import BundleError

ORT_SUFFIX = ".ort"
_IDENTIFIER = b"ORTM"
# Places of fields in their tables, of ort.fbs.
_SESSION_MODEL, _MODEL_GRAPH = 6, 18
_GRAPH_INITIALIZERS, _GRAPH_NODES = 4, 8
_NODE_OP_TYPE, _NODE_INPUTS, _NODE_OUTPUTS = 14, 20, 22
_TENSOR_NAME, _TENSOR_DIMS, _TENSOR_DATA_TYPE = 4, 8, 10

_Item = TypeVar("_Item")


class Tensor(NamedTuple):
    """A weight: its name, the number of its element type in onnx.proto, and its shape."""

    name: bytes
    data_type: int
    dims: list[int]


class Node(NamedTuple):
    """An operator and the names of what it reads and makes; an input left out is empty."""

    kind: str
    inputs: list[bytes]
    outputs: list[bytes]


def is_ort_format(path: Path) -> bool:
    """Whether ONNX Runtime takes the file at `path` for one of its own format: by its name."""
    return path.suffix == ORT_SUFFIX


def read_graph(path: Path) -> tuple[list[Tensor], list[Node]]:
    """Tensors and nodes of a file of ONNX Runtime's format, in any order; no weight is read.

    Raises:
        BundleError: The file cannot be read or is not of that format.
    """
    try:
        with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as m:
            if m[4:8] != _IDENTIFIER:
                raise ValueError("another file")
            model = _follow(m, _field(m, _follow(m, 0), _SESSION_MODEL))
            graph = _follow(m, _field(m, model, _MODEL_GRAPH))
            return (
                list(_vector(m, graph, _GRAPH_INITIALIZERS, _tensor)),
                list(_vector(m, graph, _GRAPH_NODES, _node)),
            )
    except (ValueError, struct.error):  # an empty file cannot be mapped: ValueError too
        raise BundleError(f"{path} is not a readable ORT model; export again") from None
    except OSError as error:
        raise BundleError(f"cannot read {path}: {error}") from None


def _tensor(data: mmap.mmap, place: int) -> Tensor:
    table = _follow(data, place)
    (data_type,) = struct.unpack_from("<i", data, _field(data, table, _TENSOR_DATA_TYPE))
    dims = list(_vector(data, table, _TENSOR_DIMS, _int64, size=8))
    return Tensor(_string(data, _field(data, table, _TENSOR_NAME)), data_type, dims)


def _node(data: mmap.mmap, place: int) -> Node:
    table = _follow(data, place)
    return Node(
        _string(data, _field(data, table, _NODE_OP_TYPE)).decode(),
        list(_vector(data, table, _NODE_INPUTS, _string)),
        list(_vector(data, table, _NODE_OUTPUTS, _string)),
    )


def _follow(data: mmap.mmap, place: int) -> int:
    """Where the offset at `place` leads to."""
    (offset,) = struct.unpack_from("<I", data, place)
    return place + int(offset)


def _field(data: mmap.mmap, table: int, slot: int) -> int:
    """Where a field of the table at `table` is.

    Raises:
        ValueError: The table has no such field.
    """
    place = _find(data, table, slot)
    if place is None:
        raise ValueError("a field is missing")
    return place


def _find(data: mmap.mmap, table: int, slot: int) -> int | None:
    (back,) = struct.unpack_from("<i", data, table)
    places = table - int(back)
    (size,) = struct.unpack_from("<H", data, places)
    if slot >= size:
        return None
    (offset,) = struct.unpack_from("<H", data, places + slot)
    return table + int(offset) if offset else None


def _vector(
    data: mmap.mmap, table: int, slot: int, read: Callable[[mmap.mmap, int], _Item], size: int = 4
) -> Iterator[_Item]:
    """What `read` makes of each item; an empty vector may be left out, as of a scalar's shape."""
    place = _find(data, table, slot)
    if place is not None:
        start = _follow(data, place)
        (count,) = struct.unpack_from("<I", data, start)
        for number in range(count):
            yield read(data, start + 4 + size * number)


def _string(data: mmap.mmap, place: int) -> bytes:
    start = _follow(data, place)
    (length,) = struct.unpack_from("<I", data, start)
    return data[start + 4 : start + 4 + length]


def _int64(data: mmap.mmap, place: int) -> int:
    (value,) = struct.unpack_from("<q", data, place)
    return int(value)
