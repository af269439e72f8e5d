"""JavaScript packages of the examples and of the tests, as their lock files have them.

Knows when `npm ci` has to run, and with which options. What is in which is said by the
`package.json` of each directory.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

# What transformers.js asks for.
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
        subprocess.CalledProcessError: npm cannot do it; it has said why.
    """
    wanted = (directory / "package-lock.json").read_text(encoding="utf-8")
    # In there, so that it goes when the packages go.
    stamp = directory / "node_modules" / ".installed.json"
    if stamp.exists() and stamp.read_text(encoding="utf-8") == wanted:
        return
    print(f"installing the packages of {directory}", file=sys.stderr)
    # Without scripts: that of onnxruntime-node fetches the libraries of CUDA.
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
