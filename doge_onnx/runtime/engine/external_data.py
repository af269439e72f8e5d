"""Finds the files in which an ONNX graph keeps its weights.

Knows just enough of ONNX to find every `external_data` location in a model file, without copying
the weights inside the file. Does not know what the tensors mean, nor whether the rest of the graph
is valid.
"""

from __future__ import annotations

import mmap
from pathlib import Path

from doge_onnx.manifest import ORT_SUFFIX
from doge_onnx.runtime.engine.protobuf import fields, read_model

# Field numbers of onnx.proto: for each kind of message, its fields and the kind of message in each.
# Every field that can hold a tensor, directly or in a subgraph, is here.
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
    """Locations of all external tensor data that the graph at `path` refers to.

    Args:
        path: A file of the ONNX format, or of ONNX Runtime's own.

    Returns:
        The locations as written in the file, relative to its directory; empty if the file holds all
        weights itself.

    Raises:
        BundleError: The file cannot be read or is not a protobuf message.
    """
    # A file of the ORT format holds all weights itself.
    return set() if path.suffix == ORT_SUFFIX else read_model(path, _locations)


def _locations(data: mmap.mmap) -> set[str]:
    found = set()
    # No recursion: a hostile file could nest deeper than Python's limit.
    stack = [("model", slice(0, len(data)))]
    while stack:
        kind, span = stack.pop()
        children = _MESSAGES.get(kind, {})
        entry: dict[int, bytes] = {}
        for number, value in fields(data, span):
            if not isinstance(value, slice):
                continue
            if (child := children.get(number)) is not None:
                stack.append((child, value))
            elif kind == "entry":
                entry[number] = data[value]
        if entry.get(_ENTRY_KEY) == b"location":
            found.add(entry.get(_ENTRY_VALUE, b"").decode("utf-8"))
    return found
