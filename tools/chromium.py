"""A Chromium for the tests of the web page: finds one, or installs Debian's if it may."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
LACKING = "there is no Chromium: install one, on Debian with `apt-get install chromium`"


def find() -> str | None:
    """Path of a Chromium, or None if there is none."""
    return next((path for name in _NAMES if (path := shutil.which(name)) is not None), None)


def install() -> None:
    """Install Debian's Chromium if there is none; needs apt and root.

    A failure is only printed: the tests that need Chromium are then skipped.
    """
    if find() is not None:
        return
    if shutil.which("apt-get") is None or os.geteuid() != 0:
        print(f"without a browser: {LACKING}", file=sys.stderr)
        return
    print("installing Chromium", file=sys.stderr)
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for arguments in (("update",), ("install", "--yes", "--no-install-recommends", "chromium")):
        done = subprocess.run(
            ["apt-get", "--quiet", *arguments],
            env=environment,
            stdout=subprocess.DEVNULL,
            check=False,
        )
        if done.returncode != 0:
            print(f"apt-get {arguments[0]} failed; {LACKING}", file=sys.stderr)
            return


if __name__ == "__main__":
    install()
