"""Builds small ONNX graphs that work on the device between two decode steps.

ONNX Runtime offers no other way to copy on a device or to find the most likely token there. Knows
just enough of the file format to write such graphs without the `onnx` package. Does not know how
they are run (`device_memory`).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

# Element types and their numbers in onnx.proto.
ELEMENT_TYPES = {"float32": 1, "int8": 3, "int64": 7, "float16": 10, "bfloat16": 16}
# Field numbers of onnx.proto.
_MODEL_IR_VERSION, _MODEL_GRAPH, _MODEL_OPSET = 1, 7, 8
_OPSET_VERSION = 2
_GRAPH_NODE, _GRAPH_NAME, _GRAPH_INPUT, _GRAPH_OUTPUT = 1, 2, 11, 12
_NODE_INPUT, _NODE_OUTPUT, _NODE_OP_TYPE, _NODE_ATTRIBUTE = 1, 2, 4, 5
_ATTRIBUTE_NAME, _ATTRIBUTE_INT, _ATTRIBUTE_TYPE, _TYPE_INT = 1, 3, 20, 2
_VALUE_NAME, _VALUE_TYPE = 1, 2
_TYPE_TENSOR, _TENSOR_ELEMENT, _TENSOR_SHAPE, _SHAPE_DIM, _DIM_NAME = 1, 1, 2, 1, 2
_IR_VERSION, _OPSET = 10, 18


@functools.cache
def extension(dtype: str) -> bytes:
    """A serialized graph that copies a state tensor and appends equal rows to it.

    Inputs: `past` `[B, H, P, row]`; `row` `[1, 1, 1, row]`, the row to append; `shape` int64 `[4]`,
    the shape of all appended rows together. Output: `present` `[B, H, P + shape[2], row]`.

    Args:
        dtype: Element type of the state, a key of `ELEMENT_TYPES`.
    """
    kind = ELEMENT_TYPES[dtype]
    return _model(
        [
            _node("Expand", ["row", "shape"], ["more"]),
            _node("Concat", ["past", "more"], ["present"], axis=2),
        ],
        [_value("past", kind, 4), _value("row", kind, 4), _value("shape", 7, 1)],
        [_value("present", kind, 4)],
    )


@functools.cache
def top_k() -> bytes:
    """A serialized graph that finds the largest logits.

    Inputs: `logits` float32 `[B, 1, V]`, `count` int64 `[1]`. Outputs: `values` float32 and
    `ids` int64, both `[B, 1, count]`, largest first.
    """
    return _model(
        [_node("TopK", ["logits", "count"], ["values", "ids"], axis=-1, largest=1, sorted=1)],
        [_value("logits", 1, 3), _value("count", 7, 1)],
        [_value("values", 1, 3), _value("ids", 7, 3)],
    )


def _model(nodes: list[bytes], inputs: list[bytes], outputs: list[bytes]) -> bytes:
    graph = b"".join(
        [
            *(_bytes(_GRAPH_NODE, node) for node in nodes),
            _bytes(_GRAPH_NAME, b"doge_onnx"),
            *(_bytes(_GRAPH_INPUT, value) for value in inputs),
            *(_bytes(_GRAPH_OUTPUT, value) for value in outputs),
        ]
    )
    opset = _bytes(_MODEL_OPSET, _int(_OPSET_VERSION, _OPSET))
    return _int(_MODEL_IR_VERSION, _IR_VERSION) + _bytes(_MODEL_GRAPH, graph) + opset


def _node(operator: str, inputs: Sequence[str], outputs: Sequence[str], **attributes: int) -> bytes:
    return b"".join(
        [
            *(_bytes(_NODE_INPUT, name.encode()) for name in inputs),
            *(_bytes(_NODE_OUTPUT, name.encode()) for name in outputs),
            _bytes(_NODE_OP_TYPE, operator.encode()),
            *(
                _bytes(
                    _NODE_ATTRIBUTE,
                    _bytes(_ATTRIBUTE_NAME, name.encode())
                    + _int(_ATTRIBUTE_INT, value)
                    + _int(_ATTRIBUTE_TYPE, _TYPE_INT),
                )
                for name, value in attributes.items()
            ),
        ]
    )


def _value(name: str, element_type: int, rank: int) -> bytes:
    """The description of an input or output whose axes may have any size."""
    dims = (
        _bytes(_SHAPE_DIM, _bytes(_DIM_NAME, f"{name}_{axis}".encode())) for axis in range(rank)
    )
    shape = _bytes(_TENSOR_SHAPE, b"".join(dims))
    tensor = _bytes(_TYPE_TENSOR, _int(_TENSOR_ELEMENT, element_type) + shape)
    return _bytes(_VALUE_NAME, name.encode()) + _bytes(_VALUE_TYPE, tensor)


def _bytes(number: int, content: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _int(number: int, value: int) -> bytes:
    return _varint(number << 3) + _varint(value)


def _varint(value: int) -> bytes:
    # Protobuf writes a negative number as its two's complement in 64 bits.
    value &= 2**64 - 1
    encoded = bytearray()
    while value > 127:
        encoded.append(value & 127 | 128)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)
