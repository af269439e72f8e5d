"""What is imported when: the base install has no torch, and `import doge_onnx` costs nothing."""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path

import fake_bundle
import pytest

import doge_onnx
from doge_onnx import api
from doge_onnx.errors import MissingExtraError

PACKAGE = Path(doge_onnx.__file__).parent
RUNTIME_MODULES = sorted(
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
    for half in ("runtime", "measure")
    for path in (PACKAGE / half).rglob("*.py")
    if path.stem != "__init__"
)
BLOCK = """
    import sys

    class Block:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] in {blocked!r}:
                raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

    sys.meta_path.insert(0, Block())
"""
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


def _run(code: str, blocked: set[str] | None = None) -> str:
    prelude = textwrap.dedent(BLOCK).format(blocked=blocked) if blocked else ""
    return subprocess.run(
        [sys.executable, "-c", prelude + textwrap.dedent(code)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout


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
    assert _run(code, blocked=EXTRA) == "3\n"


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
    assert "pip install jinja2" in _run(code, blocked=EXTRA)


def test_the_package_alone_imports_nothing_heavy():
    heavy = EXTRA | {"numpy", "onnxruntime", "tokenizers"}
    code = "import doge_onnx; print(doge_onnx.__version__, 'Model' in dir(doge_onnx))"
    assert _run(code, blocked=heavy) == f"{doge_onnx.__version__} True\n"


@pytest.mark.parametrize("call", ["export('model', 'out')", "verify('bundle', 'model')"])
def test_a_missing_extra_says_what_to_install(call):
    code = f"""
        import doge_onnx
        try:
            doge_onnx.{call}
        except doge_onnx.MissingExtraError as error:
            print(error)
    """
    assert "pip install 'doge-onnx[export]'" in _run(code, blocked={"torch", "transformers"})


def test_another_import_error_is_a_bug_and_stays_one():
    with pytest.raises(ImportError) as caught, api._extra("export"):
        importlib.import_module("doge_onnx.no_such_module")
    assert not isinstance(caught.value, MissingExtraError)


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
    output = _run(textwrap.dedent(EXPORTER) + textwrap.dedent(code))
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
    assert _run(code) == "[]\nmodule 'doge_onnx' has no attribute 'NoSuchName'\n"
    assert doge_onnx.Model.generate is not None
    for name in ("Chat", "Completion", "GenerationConfig", "LogitsProcessor", "Model", "Piece"):
        assert name in doge_onnx.__all__
        assert getattr(doge_onnx, name).__name__ == name
