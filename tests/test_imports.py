"""What is imported when: the base install has no torch, and `import doge_onnx` costs nothing."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import inspect
import re
import sys
import textwrap
import tomllib
from pathlib import Path

import fake_bundle
import pytest
from fresh_python import EXTRA, run

import doge_onnx
from doge_onnx import api

PACKAGE = Path(doge_onnx.__file__).parent
ARCHITECTURE = PACKAGE.parent / "docs" / "architecture.md"
RUNTIME_MODULES = sorted(
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
    for half in ("runtime", "measure")
    for path in (PACKAGE / half).rglob("*.py")
    if path.stem != "__init__"
)
# In place of the real exporter, which takes seconds to import.
EXPORTER = """
    import importlib.util
    import sys

    class Exporter:
        def find_spec(self, name, path=None, target=None):
            if name == "doge_onnx.export.exporter":
                return importlib.util.spec_from_loader(name, self)

        def create_module(self, spec):
            return None

        def exec_module(self, module):
            module.ExportReport = type("ExportReport", (), {})
            module.export = lambda *args, **options: print("called with", *args)

    sys.meta_path.insert(0, Exporter())
"""


def test_the_runtime_needs_numpy_onnxruntime_and_tokenizers_alone(tmp_path):
    path = fake_bundle.write(tmp_path / "b")
    assert len(RUNTIME_MODULES) > 20
    code = f"""
        import importlib
        for name in {RUNTIME_MODULES!r}:
            importlib.import_module(name)
        import doge_onnx
        model = doge_onnx.load({str(path)!r})
        print(len(model.generate("the cat", max_new_tokens=3).token_ids))
    """
    assert run(code, blocked=EXTRA) == "3\n"


def test_chat_templates_alone_need_jinja(tmp_path):
    path = fake_bundle.write(tmp_path / "b", chat_template="{{ messages }}")
    code = f"""
        import doge_onnx
        model = doge_onnx.load({str(path)!r})
        try:
            model.generate([{{"role": "user", "content": "x"}}])
        except doge_onnx.MissingExtraError as error:
            print(error)
    """
    assert "pip install jinja2" in run(code, blocked=EXTRA)


def test_the_package_alone_imports_nothing_heavy():
    heavy = EXTRA | {"numpy", "onnxruntime", "tokenizers"}
    code = "import doge_onnx; print(doge_onnx.__version__, 'Model' in dir(doge_onnx))"
    assert run(code, blocked=heavy) == f"{doge_onnx.__version__} True\n"


@pytest.mark.parametrize("call", ["export('model', 'out')", "verify('bundle', 'model')"])
def test_a_missing_extra_says_what_to_install(call):
    code = f"""
        import doge_onnx
        try:
            doge_onnx.{call}
        except doge_onnx.MissingExtraError as error:
            print(error)
    """
    assert "pip install 'doge-onnx[export]'" in run(code, blocked={"torch", "transformers"})


def test_another_import_error_is_a_bug_and_stays_one():
    code = """
        import doge_onnx
        try:
            doge_onnx.export("model", "out")
        except ImportError as error:
            print(type(error).__name__, error.name)
    """
    assert run(code, blocked={"numpy"}) == "ModuleNotFoundError numpy\n"


@pytest.mark.parametrize(
    "imports",
    [
        "import doge_onnx",
        "import doge_onnx.export",
        "import doge_onnx.export.exporter",
        "import doge_onnx; import doge_onnx.export.exporter",
        "from doge_onnx.export import exporter; import doge_onnx",
        "import doge_onnx.export.exporter as e; assert e.ExportReport; import doge_onnx",
        "from doge_onnx import export; export.__call__; import doge_onnx",
    ],
)
def test_export_is_a_function_and_a_package_in_any_order(imports):
    code = f"""
        {imports}
        doge_onnx.export("model", "out")
        import doge_onnx.export.exporter
        assert doge_onnx.export.exporter.ExportReport
        doge_onnx.export("again", "out")
    """
    output = run(textwrap.dedent(EXPORTER) + textwrap.dedent(code))
    assert output == "called with model out\ncalled with again out\n"


def test_export_shows_its_signature():
    package = importlib.import_module("doge_onnx.export")
    assert inspect.signature(package) == inspect.signature(api.export)


def test_the_wrappers_have_the_signatures_of_what_they_call():
    from doge_onnx.export.exporter import export

    assert list(inspect.signature(api.export).parameters.values()) == list(
        inspect.signature(export).parameters.values()
    )


def test_the_version_is_that_of_the_distribution():
    # It is written down in the package alone.
    assert importlib.metadata.version("doge-onnx") == doge_onnx.__version__
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())
    assert project["project"]["dynamic"] == ["version"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "doge_onnx.__version__"}


def test_all_public_names_are_there_and_listed():
    code = """
        import doge_onnx
        names = set(doge_onnx.__all__)
        assert names <= set(dir(doge_onnx))
        print(sorted(name for name in names if getattr(doge_onnx, name, None) is None))
        try:
            doge_onnx.NoSuchName
        except AttributeError as error:
            print(error)
    """
    assert run(code) == "[]\nmodule 'doge_onnx' has no attribute 'NoSuchName'\n"
    assert doge_onnx.Model.generate is not None
    for name in ("Chat", "Completion", "GenerationConfig", "LogitsProcessor", "Model", "Piece"):
        assert name in doge_onnx.__all__
        assert getattr(doge_onnx, name).__name__ == name


# --- who imports whom -------------------------------------------------------------------------


def _layout() -> list[tuple[list[str], list[str]]]:
    """The rows of the table in docs/architecture.md: what is there, and what it imports."""
    table = ARCHITECTURE.read_text(encoding="utf-8").partition("| where | what | imports |\n")[2]
    rows = [line.split("|") for line in table.partition("\n\n")[0].splitlines()[1:]]
    return [tuple(re.findall(r"[\w./*]+", row[cell]) for cell in (1, 3)) for row in rows]


def _imported(path: Path) -> set[str]:
    """What a module imports: files of this package, and names of others, Python's own left out."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.module is not None
            # `from package import module` is an import of the module.
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == PACKAGE.name:
                found.add(_file(parts[1:]))
            elif parts[0] not in sys.stdlib_module_names:
                found.add(parts[0])
    return found


def _file(parts: list[str]) -> str:
    """The file that a dotted name of this package is in; the name may end with one of its names."""
    for end in (len(parts), len(parts) - 1):
        path = PACKAGE.joinpath(*parts[: max(end, 0)])
        for file in (path.with_suffix(".py"), path / "__init__.py"):
            if file.is_file():
                return file.relative_to(PACKAGE).as_posix()
    raise AssertionError(parts)


def _covers(entry: str, name: str) -> bool:
    """Whether an entry of the table stands for a file or a package."""
    if entry.endswith("/"):
        return name.startswith(entry)
    return re.fullmatch(re.escape(entry).replace(r"\*", "[^/]*"), name) is not None


LAYOUT = _layout()
# The imports of all modules of each row, without those from the row itself.
IMPORTS = [
    {
        name
        for path in sorted(PACKAGE.rglob("*.py"))
        if any(_covers(entry, path.relative_to(PACKAGE).as_posix()) for entry in where)
        for name in _imported(path)
        if not any(_covers(entry, name) for entry in where)
    }
    for where, _ in LAYOUT
]


def test_the_layout_has_a_place_for_every_module():
    for path in PACKAGE.rglob("*.py"):
        name = path.relative_to(PACKAGE).as_posix()
        places = [where for where, _ in LAYOUT if any(_covers(entry, name) for entry in where)]
        assert len(places) == 1, (name, places)


@pytest.mark.parametrize("row", range(len(LAYOUT)), ids=[" ".join(row[0]) for row in LAYOUT])
def test_the_layout_says_what_is_imported(row):
    contract = LAYOUT[0][0]
    stated, imported = LAYOUT[row][1], IMPORTS[row].difference(contract)
    assert [name for name in imported if not any(_covers(each, name) for each in stated)] == []
    assert [each for each in stated if not any(_covers(each, name) for name in imported)] == []


def test_packages_of_the_runtime_import_only_those_above_them():
    runtime = [
        (where, imported)
        for (where, _), imported in zip(LAYOUT, IMPORTS, strict=True)
        if where[0].startswith("runtime/")
    ]
    assert len(runtime) == 5
    for place, (_, imported) in enumerate(runtime):
        for below, _ in runtime[place + 1 :]:
            assert [n for n in imported if any(_covers(entry, n) for entry in below)] == []
