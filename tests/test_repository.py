"""What the files at the top of the repository say, compared with each other and with the code."""

from __future__ import annotations

import re
import tomllib

import pytest
import yaml
from environments import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
WORKFLOW = ROOT / ".github" / "workflows" / "ci.yml"


def lower_bounds(requirements: list[str]) -> dict[str, Version]:
    """The highest lower bound of each package; there must be one."""
    bounds: dict[str, Version] = {}
    for requirement in map(Requirement, requirements):
        (bound,) = (entry for entry in requirement.specifier if entry.operator == ">=")
        name, version = canonicalize_name(requirement.name), Version(bound.version)
        bounds[name] = max(version, bounds.get(name, version))
    return bounds


def pins(name: str) -> dict[str, Version]:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(package): Version(version) for package, version in pairs}


def make_targets() -> set[str]:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    return set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE))


def test_the_oldest_versions_are_the_lower_bounds():
    asked = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["export"]]
    assert pins("constraints-oldest.txt") == lower_bounds(asked)


def test_the_pinned_versions_are_allowed():
    pinned = pins("constraints.txt")
    extras = PROJECT["optional-dependencies"]
    for line in (*PROJECT["dependencies"], *extras["export"], *extras["dev"], *extras["docs"]):
        requirement = Requirement(line)
        if requirement.name != PROJECT["name"]:
            version = pinned[canonicalize_name(requirement.name)]
            assert requirement.specifier.contains(version), line


def test_the_workflow_runs_targets_that_exist_on_the_versions_that_are_promised():
    text = WORKFLOW.read_text(encoding="utf-8")
    run = set(re.findall(r"run: make ([a-z]+)", text))
    assert {"check", "test", "demo"} <= run <= make_targets()
    check = yaml.safe_load(text)["jobs"]["check"]["strategy"]["matrix"]
    promised = re.findall(r"Python :: (3\.\d+)", "\n".join(PROJECT["classifiers"]))
    assert check["python"] == promised
    assert [system.partition("-")[0] for system in check["system"]] == [
        "ubuntu",
        "macos",
        "windows",
    ]


def test_the_licence_is_the_one_that_is_named():
    (name,) = PROJECT["license-files"]
    text = (ROOT / name).read_text(encoding="utf-8")
    assert PROJECT["license"] == "Apache-2.0"
    assert "Apache License" in text
    assert "Version 2.0, January 2004" in text
    assert not any(entry.startswith("License ::") for entry in PROJECT["classifiers"])


@pytest.mark.parametrize("address", sorted(PROJECT["urls"].values()))
def test_addresses_of_files_name_files_that_exist(address):
    _, found, path = address.partition("/blob/main/")
    assert not found or (ROOT / path).is_file()


def test_packages_of_setuptools_are_those_on_disk():
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    named = set(pyproject["tool"]["setuptools"]["packages"])
    on_disk = {
        ".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "doge_onnx").rglob("*.py")
    }
    assert {name for name in named if name.startswith("doge_onnx")} == on_disk
