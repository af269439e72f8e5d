"""Which files an ONNX graph keeps its weights in.

Knows just enough of the protobuf wire format to find every `external_data` location in
a model file, without the `onnx` package and without copying the weights that are inside
the file. Does not know what the tensors mean or whether the graph is valid otherwise.
"""

from __future__ import annotations

import mmap
from pathlib import Path

from doge_onnx.errors import BundleError

# Wire types of protobuf; the group types (3, 4) are obsolete and ONNX has none.
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5

# Field numbers of onnx.proto. A message kind maps a field to the kind of message in it;
# every field that can hold a tensor, directly or inside of a subgraph, is here.
_MESSAGES: dict[str, dict[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "entry"},
}
_ENTRY_KEY, _ENTRY_VALUE = 1, 2


def external_files(path: Path) -> set[str]:
    """Locations of all external tensor data that the ONNX model at `path` refers to.

    Args:
        path: A model file.

    Returns:
        The locations as they stand in the file, relative to its directory; empty if the
        model holds all of its weights itself.

    Raises:
        BundleError: The file cannot be read or is not a protobuf message.
    """
    try:
        with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as m:
            return _locations(m)
    except (ValueError, IndexError):  # an empty file cannot be mapped: ValueError too
        raise BundleError(f"{path} is not a readable ONNX model; export again") from None
    except OSError as error:
        raise BundleError(f"cannot read {path}: {error}") from None


def _locations(data: mmap.mmap) -> set[str]:
    found = set()
    # A stack instead of recursion: a file made to nest deeply must not exhaust Python's.
    stack = [("model", 0, len(data))]
    while stack:
        kind, position, end = stack.pop()
        children = _MESSAGES.get(kind, {})
        entry: dict[int, bytes] = {}
        while position < end:
            tag, position = _varint(data, position)
            wire_type = tag & 7
            if wire_type == _VARINT:
                _, position = _varint(data, position)
                continue
            if wire_type == _BYTES:
                size, position = _varint(data, position)
            elif wire_type in (_FIXED32, _FIXED64):
                size = 4 if wire_type == _FIXED32 else 8
            else:
                raise ValueError("not an ONNX wire type")
            start, position = position, position + size
            if position > end:
                raise ValueError("truncated message")
            if wire_type == _BYTES and (child := children.get(tag >> 3)) is not None:
                stack.append((child, start, position))
            elif wire_type == _BYTES and kind == "entry":
                entry[tag >> 3] = data[start:position]
        if entry.get(_ENTRY_KEY) == b"location":
            found.add(entry.get(_ENTRY_VALUE, b"").decode("utf-8"))
    return found


def _varint(data: mmap.mmap, position: int) -> tuple[int, int]:
    """The variable-length integer at `position`, and the position after it."""
    value = shift = 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
        if shift > 63:
            raise ValueError("not a variable-length integer")
