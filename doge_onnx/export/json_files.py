"""Reads the JSON files of a checkpoint, which may hold anything."""

from __future__ import annotations

import codecs
import json
from pathlib import Path
from typing import Any

from doge_onnx import text_files
from doge_onnx.errors import CheckpointError


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file, or an empty one if there is no such file.

    Raises:
        CheckpointError: The file cannot be read, or does not hold a JSON object.
    """
    if not path.is_file():
        return {}
    return parse_object(without_mark(path), path)


def without_mark(path: Path) -> bytes:
    """The content of a file without the byte order mark that most readers of JSON refuse.

    Raises:
        CheckpointError: The file cannot be read.
    """
    try:
        return path.read_bytes().removeprefix(codecs.BOM_UTF8)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error}") from None


def parse_object(content: bytes, origin: Path) -> dict[str, Any]:
    """The JSON object in the content of a file; `origin` is the file that errors name.

    Raises:
        CheckpointError: The content is no JSON object.
    """
    try:
        value = json.loads(text_files.decode(content))
    # RecursionError: brackets that are nested too deeply.
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot read {origin}: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{origin} does not hold a JSON object")
    return value
