"""Reads the wire format of protobuf, so that ONNX files can be read without the `onnx` package.

Knows the numbers and places of fields. Does not know what they mean in ONNX.
Source: https://protobuf.dev/programming-guides/encoding/.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from doge_onnx.errors import BundleError

# Wire types; the group types (3, 4) are obsolete and ONNX has none.
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5

_Result = TypeVar("_Result")


def read_model(path: Path, read: Callable[[mmap.mmap], _Result]) -> _Result:
    """Map the file at `path` into memory and return the result of `read`.

    Raises:
        BundleError: The file cannot be read or is not a protobuf message.
    """
    try:
        with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as m:
            return read(m)
    except (ValueError, IndexError):  # an empty file cannot be mapped: ValueError too
        raise BundleError(f"{path} is not a readable ONNX model; export again") from None
    except OSError as error:
        raise BundleError(f"cannot read {path}: {error}") from None


def fields(data: mmap.mmap, span: slice) -> Iterator[tuple[int, int | slice | None]]:
    """The fields of the message at `span`.

    Yields:
        The number of each field, and its content: an integer, the slice of a string, of bytes or of
        a nested message, or None for a number of 4 or 8 bytes.

    Raises:
        ValueError: These bytes are not a message, or end too early.
        IndexError: They end too early, at the end of the file.
    """
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
