"""What the base install is: the wheel in an environment that had nothing in it."""

import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import base_install
import build_library
import pytest

import doge_onnx

pytestmark = pytest.mark.external

PROMPT = "It was a dark and stormy night"
ROOT = Path(__file__).parents[1]
# Whatever is added here, every board has to download.
RUNTIME = {"doge-onnx", "numpy", "onnxruntime", "tokenizers"}
# For chat templates.
OF_CHAT = {"Jinja2", "MarkupSafe"}
# onnxruntime asks for them; the runtime works without.
OF_ONNXRUNTIME = {"flatbuffers", "packaging", "protobuf"}
# tokenizers asks for huggingface_hub; the runtime works without.
OF_TOKENIZERS = {
    *("huggingface_hub", "hf-xet", "filelock", "fsspec", "tqdm", "PyYAML", "typing_extensions"),
    *("pydantic", "pydantic_core", "annotated-types", "typing-inspection"),
    *("httpx2", "httpcore2", "anyio", "h11", "idna", "truststore"),
}
OF_THE_COMMAND_LINE = {
    *("typer", "click", "shellingham", "annotated-doc"),
    *("rich", "Pygments", "markdown-it-py", "mdurl"),
}
# Of a 64-bit Linux; a torch alone would be more.
LARGEST = 270_000_000


@pytest.fixture(scope="module")
def python() -> Path:
    return base_install.environment()


def run(*command: str | Path, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        command,
        capture_output=True,
        encoding="utf-8",
        env=base_install.variables() | {"PYTHONUTF8": "1", "HF_HUB_OFFLINE": "1"},
        check=False,
        timeout=300,
        **options,
    )


def pip(python: Path, *arguments: str) -> str:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python]
    result = run(*command, *arguments)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def command_line(python: Path, tmp_path: Path, *arguments) -> subprocess.CompletedProcess:
    return run(python.parent / "doge-onnx", *arguments, cwd=tmp_path)


def test_the_wheel_holds_the_package_and_nothing_else():
    with zipfile.ZipFile(base_install.wheel()) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    sources = {
        path
        for package in ("doge_onnx", "optimum")
        for path in (ROOT / package).rglob("*")
        if path.suffix in (".py", ".typed")
    }
    kernels = {name for name in names if name.startswith(build_library.PLACE.as_posix())}
    assert len(kernels) == 1
    assert names - kernels == {path.relative_to(ROOT).as_posix() for path in sources}


def test_the_install_has_native_kernels_if_there_is_a_compiler(python, tiny_bundle, tmp_path):
    try:
        build_library.host()
    except build_library.BuildError as error:
        expected = str(error)
    else:
        expected = "doge_onnx ("
    (line,) = kernels_shown(python, tiny_bundle, tmp_path)
    assert expected in line


def test_without_a_compiler_the_install_says_so_and_works(python, tiny_bundle, tmp_path):
    wheel = base_install.wheel("/nonexistent/c++")
    assert wheel.name.endswith("-py3-none-any.whl")
    place = tmp_path / "packages"
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(place)
    (line,) = kernels_shown(python, tiny_bundle, place)
    assert line.split(maxsplit=1)[1] == (
        "ONNX Runtime's, because doge-onnx was installed without native kernels: there is no C++ "
        "compiler (CXX is '/nonexistent/c++')"
    )
    options = ["--max-new-tokens", "5", "--temperature", "0"]
    result = run(python, "-m", "doge_onnx", "generate", tiny_bundle, PROMPT, *options, cwd=place)
    expected = doge_onnx.load(tiny_bundle).generate(PROMPT, max_new_tokens=5, temperature=0)
    assert result.stdout == expected.text + "\n"


def kernels_shown(python: Path, bundle: Path, directory: Path) -> list[str]:
    """The lines of `info` about kernels; a package in the directory comes before others."""
    result = run(python, "-m", "doge_onnx", "info", bundle, cwd=directory)
    assert result.returncode == 0, result.stderr
    return [line for line in result.stdout.splitlines() if line.split()[:1] == ["kernels"]]


def test_exactly_these_packages_come_along(python):
    installed = {entry["name"] for entry in json.loads(pip(python, "list", "--format", "json"))}
    expected = RUNTIME | OF_CHAT | OF_ONNXRUNTIME | OF_TOKENIZERS | OF_THE_COMMAND_LINE
    assert {normal(name) for name in installed} == {normal(name) for name in expected}
    assert installed.isdisjoint({"torch", "onnx", "transformers", "onnxscript", "safetensors"})


def normal(name: str) -> str:
    return name.lower().replace("_", "-")


def test_what_is_installed_fits_together(python):
    assert pip(python, "check").strip() == "No broken requirements found."


def test_the_installed_size(python, capsys):
    library = python.parents[1] / "lib"
    size = base_install.installed_bytes(library)
    with capsys.disabled():
        sys.stdout.write(f"\nthe base install has {size / 1e6:.0f} MB\n")
    assert size < LARGEST


@pytest.mark.parametrize("format", ["onnx", "ort"])
def test_it_generates_the_text_of_the_main_environment(
    format, python, tiny_bundle, tiny_ort, tmp_path
):
    bundle = {"onnx": tiny_bundle, "ort": tiny_ort}[format]
    expected = doge_onnx.load(bundle).generate(PROMPT, max_new_tokens=30, temperature=0)
    options = ["--max-new-tokens", "30", "--temperature", "0"]
    result = command_line(python, tmp_path, "generate", bundle, PROMPT, *options)
    assert (result.returncode, result.stdout, result.stderr) == (0, expected.text + "\n", "")


def test_it_runs_the_code_of_the_wheel(python, tmp_path):
    result = run(python, "-c", "import doge_onnx; print(doge_onnx.__file__)", cwd=tmp_path)
    assert Path(result.stdout.strip()).is_relative_to(python.parents[1] / "lib")


def test_the_commands_of_a_board_work_there(python, tiny_ort, tmp_path):
    info = command_line(python, tmp_path, "info", tiny_ort, "--json")
    assert json.loads(info.stdout)["graph"] == "model.ort"
    options = ["--contexts", "16", "--batches", "1", "--tokens", "2", "--repetitions", "1"]
    bench = command_line(python, tmp_path, "bench", tiny_ort, "--json", *options)
    assert json.loads(bench.stdout)["cells"][0]["bytes_per_step"] > 0


@pytest.mark.parametrize(
    "arguments", [["export", "examples", "out"], ["verify", "bundle", "--reference", "examples"]]
)
def test_other_commands_say_which_extra_they_need(arguments, python, tmp_path):
    result = command_line(python, tmp_path, *arguments)
    assert result.returncode == 1
    last = result.stderr.splitlines()[-1]
    assert re.fullmatch(
        r"error: this needs \w+, which is not installed: pip install 'doge-onnx\[export\]'", last
    )
