"""Adds the library of native kernels to the package; all else is in pyproject.toml.

An editable install has the library among its sources. Where there is no C++ compiler, the package
is installed without it, and holds a file that says why.
"""

import sys
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "tools"))

import build_library  # noqa: E402  # its directory had to be added first


class BuildPackage(build_py):
    """Copies the package, then builds the library into the copy."""

    def run(self) -> None:
        """Build; a missing compiler is said, and is no error."""
        super().run()
        reason = build_library.install(ROOT if self.editable_mode else Path(self.build_lib))
        if reason is not None:
            self.warn(reason)


class WithLibrary(Distribution):
    """A package with more in it than Python."""

    def has_ext_modules(self) -> bool:
        """Whether it belongs where packages for one system are."""
        return True


class BuildWheel(bdist_wheel):
    """A wheel for every Python, and for this system if it holds the library."""

    def get_tag(self) -> tuple[str, str, str]:
        """Python, ABI and platform that it is for."""
        build = self.get_finalized_command("build_py")
        root = ROOT if build.editable_mode else Path(build.build_lib)
        pure = (root / build_library.PLACE / build_library.REASON).exists()
        return "py3", "none", "any" if pure else super().get_tag()[2]


setup(distclass=WithLibrary, cmdclass={"build_py": BuildPackage, "bdist_wheel": BuildWheel})
