"""JavaScript packages of the examples and of the tests, in the versions of their lock files.

Knows when `npm ci` has to run, and with which options. The `package.json` of each directory lists
the packages.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

# The oldest major version that transformers.js supports.
_NODE_VERSION = 20


def lacking() -> str | None:
    """What this machine lacks to run JavaScript, and what to do about it; None if nothing."""
    for name in ("node", "npm"):
        if shutil.which(name) is None:
            return f"there is no {name}: install Node.js {_NODE_VERSION} or newer, with npm"
    version = subprocess.run(["node", "--version"], capture_output=True, text=True, check=True)
    if int(version.stdout.lstrip("v").partition(".")[0]) < _NODE_VERSION:
        return f"Node.js {version.stdout.strip()} is too old: install {_NODE_VERSION} or newer"
    return None


def packages(directory: Path) -> None:
    """Install what a directory's `package-lock.json` lists, unless it is there already.

    Raises:
        subprocess.CalledProcessError: npm failed; it has printed the reason.
    """
    wanted = (directory / "package-lock.json").read_text(encoding="utf-8")
    # Among the packages, so that it is deleted with them.
    stamp = directory / "node_modules" / ".installed.json"
    if stamp.exists() and stamp.read_text(encoding="utf-8") == wanted:
        return
    print(f"installing the packages of {directory}", file=sys.stderr)
    # Without install scripts: that of onnxruntime-node downloads the libraries of CUDA.
    options = ("--ignore-scripts", "--no-audit", "--no-fund", "--no-update-notifier")
    # Its path, since Windows starts npm.cmd only by the whole name.
    npm = shutil.which("npm") or "npm"
    subprocess.run([npm, "ci", "--loglevel=error", *options], check=True, cwd=directory)
    stamp.write_text(wanted, encoding="utf-8")


if __name__ == "__main__":
    if (reason := lacking()) is not None:
        print(f"without JavaScript: {reason}", file=sys.stderr)
    else:
        for argument in sys.argv[1:]:
            packages(Path(argument))
