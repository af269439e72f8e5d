"""Runs code in a Python of its own, in which packages can be missing."""

from __future__ import annotations

import subprocess
import sys
import textwrap

BLOCK = """
    import sys

    class Block:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] in {blocked!r}:
                raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

    sys.meta_path.insert(0, Block())
"""
# Packages that the extras install, and those of the base install that not all of it needs.
EXTRA = {
    "torch",
    "onnx",
    "onnx_ir",
    "onnxscript",
    "transformers",
    "safetensors",
    "huggingface_hub",
    "yaml",
    "typer",
    "rich",
    "jinja2",
}


def run(code: str, blocked: set[str] | None = None) -> str:
    """What code prints, in a Python that cannot import the packages `blocked`."""
    prelude = textwrap.dedent(BLOCK).format(blocked=blocked) if blocked else ""
    return subprocess.run(
        [sys.executable, "-c", prelude + textwrap.dedent(code)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
