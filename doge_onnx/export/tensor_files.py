"""Reads safetensors files: their headers, and tensors as float32, checked for what they hold.

Nothing is executed or unpickled. Does not know what the tensors mean.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from doge_onnx.errors import CheckpointError

_DTYPES = ("BF16", "F16", "F32", "F64")


@dataclass(frozen=True)
class Header:
    """One tensor's entry in a safetensors file.

    Attributes:
        path: The file.
        name: The tensor's name in it.
        shape: Its shape.
    """

    path: Path
    name: str
    shape: tuple[int, ...]


@contextmanager
def _open_safetensors(path: Path) -> Iterator[safe_open]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise CheckpointError(f"{path} is truncated or corrupted: {error}") from None
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error}") from None


def read_header(path: Path) -> dict[str, Header]:
    """The entries of a file, by the names that its tensors have there.

    Raises:
        CheckpointError: It cannot be read.
    """
    headers = {}
    with _open_safetensors(path) as file:
        for name in file.keys():  # noqa: SIM118 - not a mapping, it only looks like one
            headers[name] = Header(path, name, tuple(file.get_slice(name).get_shape()))
    return headers


def read_tensors(path: Path, names: dict[str, str]) -> dict[str, Tensor]:
    """Read tensors of one file as float32.

    Args:
        path: The file.
        names: The names that the result has for them, and the file's own.

    Raises:
        CheckpointError: The file cannot be read, or a tensor has another element type, or holds
            values that are not finite.
    """
    tensors = {}
    with _open_safetensors(path) as file:
        for canonical, name in names.items():
            # Only here: a file may also hold tensors that nobody reads, such as tables of RoPE.
            kind = file.get_slice(name).get_dtype()
            if kind not in _DTYPES:
                raise CheckpointError(
                    f"{path}: tensor {name} has element type {kind}; supported are "
                    f"{', '.join(_DTYPES)}"
                )
            tensor = file.get_tensor(name).to(torch.float32)
            if not torch.isfinite(tensor).all():
                raise CheckpointError(f"{path}: tensor {name} holds values that are not finite")
            tensors[canonical] = tensor
    return tensors
