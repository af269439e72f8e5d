"""Which kernels run a graph's fused operators: those of this package's library, or ONNX Runtime's.

Knows where the library is, what it says of itself, and the environment variables that switch it off
or choose its instruction set. Does not know what its kernels compute, nor sessions (`session`).
"""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from pathlib import Path

from doge_onnx.errors import InputError
from doge_onnx.manifest import Manifest

SWITCH = "DOGE_ONNX_NATIVE"
INSTRUCTIONS = "DOGE_ONNX_INSTRUCTIONS"
# Setup builds the library into this directory, or a file that says why it could not.
PLACE = Path(__file__).parents[1] / "native"
_REASON = "missing.txt"
_SUFFIXES = {".so", ".dylib", ".dll"}


@dataclass(frozen=True)
class Kernels:
    """Which kernels run a bundle.

    Attributes:
        instructions: The instruction set of this package's own kernels, such as "avx2"; None if
            they do not run.
        reason: Why they do not run; None if they do.
    """

    instructions: str | None
    reason: str | None = None

    def __str__(self) -> str:
        if self.instructions is None:
            return f"ONNX Runtime's, because {self.reason}"
        return f"doge_onnx ({self.instructions})"


def choose_kernels(manifest: Manifest, device: str = "cpu", native: bool = True) -> Kernels:
    """The kernels that will run a bundle.

    Args:
        manifest: The bundle's.
        device: "cpu" or "cuda".
        native: Whether the caller wants this package's kernels.

    Raises:
        InputError: `native` is not True or False, or the environment names an instruction set for
            which there are no kernels here.
    """
    if not isinstance(native, bool):
        raise InputError(f"native must be True or False, not {native!r}")
    if not native:
        return Kernels(None, "native kernels are switched off")
    if os.environ.get(SWITCH) == "0":
        return Kernels(None, f"{SWITCH} is 0")
    if device != "cpu":
        return Kernels(None, f"it runs on {device}")
    if not manifest.native_operators:
        return Kernels(None, f"{_owner(manifest)} has no native operators")
    path = library()
    if path is None:
        return Kernels(None, why_missing())
    try:
        loaded = ctypes.CDLL(str(path))
    except OSError as error:
        return Kernels(None, f"the library of native kernels cannot be loaded ({error})")
    loaded.doge_onnx_instruction_set.restype = ctypes.c_char_p
    chosen = loaded.doge_onnx_instruction_set().decode()
    wanted = os.environ.get(INSTRUCTIONS)
    if wanted and wanted != chosen:
        raise InputError(
            f"{INSTRUCTIONS} is {wanted!r}, and this processor or this installation has no kernels "
            "of that name; take the variable away"
        )
    return Kernels(chosen)


def library() -> Path | None:
    """The library of native kernels; None if this installation has none."""
    files = sorted(PLACE.iterdir()) if PLACE.is_dir() else []
    return next((path for path in files if path.suffix in _SUFFIXES), None)


def why_missing() -> str:
    """Why this installation has no library of native kernels."""
    try:
        return (PLACE / _REASON).read_text(encoding="utf-8").strip()
    except OSError:
        return "doge-onnx was installed without native kernels"


def _owner(manifest: Manifest) -> str:
    """What has no native operators: a kind of bundle, or this one only."""
    if manifest.target != "ort":
        return f"a bundle of the target {manifest.target}"
    if manifest.device != "cpu":
        return f"a bundle for the device {manifest.device}"
    if manifest.ort_format:
        return "a graph in ONNX Runtime's own format"
    return "its graph"
