"""Text as it comes from files, pipes and terminals: UTF-8, maybe with a byte order mark.

Knows encodings. Does not know what a text means, and names no file in its errors: a caller does.
Imports only the standard library, because export and runtime share it.
"""

from __future__ import annotations

import codecs
import json
from pathlib import Path
from typing import Any

# Of one character.
_MAX_BYTES = 4
# The longer marks first: that of UTF-16 begins one of UTF-32.
_OTHER_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


def decode(data: bytes, complete: bool = True) -> str:
    """Decode UTF-8, whatever the encoding of the locale.

    What programs of Windows write is read as what others write: a byte order mark at the beginning
    is no part of the text, and newlines become those of Unix.

    Args:
        data: The bytes.
        complete: Whether this is all of the text; if not, half a character at the end is left out.

    Raises:
        ValueError: It is not UTF-8; the message says what it is, if that can be told.
    """
    for mark, name in _OTHER_MARKS.items():
        if data.startswith(mark):
            raise ValueError(f"it is {name} text, not UTF-8; save it as UTF-8")
    if _every_second_is_zero(data):
        raise ValueError("it looks like UTF-16 text, not UTF-8; save it as UTF-8")
    return _decode(data, complete).replace("\r\n", "\n")


def read(path: Path, max_characters: int | None = None) -> str:
    """Read a file; see `decode`.

    Args:
        path: The file.
        max_characters: Most characters to read, newlines of Windows counted as two; None for all.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is not UTF-8.
    """
    if max_characters is None:
        return decode(path.read_bytes())
    # With room for the byte order mark.
    size = _MAX_BYTES * (max_characters + 1)
    with path.open("rb") as stream:
        data = stream.read(size)
        return decode(data, complete=not stream.read(1))[:max_characters]


def read_json(path: Path) -> Any:
    """Read a JSON file; see `decode`.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is not UTF-8, or not JSON.
        RecursionError: Its brackets are nested too deeply.
    """
    return json.loads(read(path))


def repair(text: str) -> str:
    """What a user typed or gave as an argument, as the UTF-8 that it was.

    Where the locale is not UTF-8, Python keeps each byte that it cannot decode as a lone surrogate.
    A byte order mark at the beginning is dropped.

    Raises:
        ValueError: It is not UTF-8.
    """
    try:
        data = text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        # A surrogate that stands for no byte, which Windows allows.
        raise ValueError("it holds half of a surrogate pair") from None
    return _decode(data)


def _decode(data: bytes, complete: bool = True) -> str:
    try:
        return codecs.getincrementaldecoder("utf-8-sig")().decode(data, complete)
    except UnicodeDecodeError as error:
        # The decoder counts from behind the byte order mark.
        place = len(data) - len(error.object) + error.start
        raise ValueError(
            f"it is not UTF-8 text (byte 0x{data[place]:02x} at position {place})"
        ) from None


def _every_second_is_zero(data: bytes) -> bool:
    """Whether this is what Latin letters look like in UTF-16 without a byte order mark."""
    if len(data) < 2 or len(data) % 2:
        return False
    halves = data[::2], data[1::2]
    return any(not any(half) and 0 not in other for half, other in (halves, halves[::-1]))
