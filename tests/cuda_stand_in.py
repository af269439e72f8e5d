"""Libraries that stand in for CUDA, so that onnxruntime-gpu starts its provider without a GPU.

The provider is the real one: where it places nodes, what it refuses and what it copies is what
it does on a GPU. Only the kernels compute nothing. See `cuda_stand_in.c`.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

SOURCE = Path(__file__).with_suffix(".c")
# What the provider is linked with.
LIBRARIES = (
    "libcudart.so.13",
    "libcublas.so.13",
    "libcublasLt.so.13",
    "libcurand.so.10",
    "libcuda.so.1",
)
_RUNTIME, _DRIVER = "libcudart.so.13", "libcuda.so.1"


def build(provider: Path, directory: Path) -> None:
    """Compile libraries that have all the functions that `provider` asks for.

    Args:
        provider: onnxruntime's libonnxruntime_providers_cuda.so.
        directory: Where they go.
    """
    listed = subprocess.run(
        ["nm", "--dynamic", "--undefined-only", provider],
        capture_output=True,
        text=True,
        check=True,
    )
    wanted: dict[str, list[str]] = {name: [] for name in LIBRARIES}
    for line in listed.stdout.splitlines():
        symbol, _, library = line.split()[-1].partition("@")
        if library in wanted:
            wanted[library].append(symbol)
        elif re.match(r"cu[A-Z]", symbol):
            wanted[_DRIVER].append(symbol)
    source = SOURCE.read_text()
    written = set(re.findall(r"\b(\w+)\(", source))
    for library, symbols in wanted.items():
        code = source if library in (_RUNTIME, _DRIVER) else ""
        code += "".join(
            f"int {name}() {{ return 0; }}\n" for name in symbols if name not in written
        )
        (directory / "stand_in.c").write_text(code)
        # Symbols have versions, except for the driver's.
        (directory / "versions").write_text(f"{library} {{ global: *; }};\n")
        versions = [f"-Wl,--version-script={directory / 'versions'}"] if library != _DRIVER else []
        options = ["-std=gnu11", "-w", "-shared", "-fPIC", f"-Wl,-soname,{library}", *versions]
        files = ["-o", directory / library, directory / "stand_in.c"]
        subprocess.run(["gcc", *options, *files], check=True)
