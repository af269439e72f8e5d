"""What other systems do in another way, shown on this one as far as it goes."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import fake_bundle
import pytest
from environments import interpreter

import doge_onnx
from doge_onnx import cli_output
from doge_onnx.bundle import check_destination, read_manifest
from doge_onnx.errors import BundleError
from doge_onnx.export import exporter
from doge_onnx.measure import bench, memory
from doge_onnx.runtime.engine.threads import usable_cores

# How Windows writes "\n" into a text file that is opened without more words.
WINDOWS_NEWLINE = "\r\n"


@pytest.fixture
def windows_newlines(monkeypatch):
    """Text files get the newlines of Windows, unless whoever opens one says otherwise."""
    opened = io.open

    def write_text(self, data, encoding=None, errors=None, newline=None):
        with opened(self, "w", encoding=encoding, errors=errors, newline=newline or "\r\n") as file:
            return file.write(data)

    monkeypatch.setattr(Path, "write_text", write_text)


def open_files(directory: Path) -> set[str]:
    """Files below a directory that this process has open or mapped."""
    links = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
    opened = {os.readlink(link) for link in links if os.path.islink(link)}
    with open("/proc/self/maps", encoding="utf-8") as maps:
        mapped = {line.split(maxsplit=5)[-1].strip() for line in maps}
    return {path for path in opened | mapped if path.startswith(f"{directory}{os.sep}")}


@pytest.fixture
def strict_rename(monkeypatch):
    """Renaming a directory fails while a file in it is open or mapped, as on Windows."""
    rename = Path.rename

    def checked(self, target):
        if used := open_files(self):
            raise PermissionError(13, f"in use: {sorted(used)}", str(self))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", checked)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="nobody tells what is open")
def test_strict_renames_are_strict(strict_rename, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "file").write_text("x")
    with (tmp_path / "a" / "file").open() as file:
        assert file.read() == "x"
        with pytest.raises(PermissionError, match="in use"):
            (tmp_path / "a").rename(tmp_path / "b")
    (tmp_path / "a").rename(tmp_path / "b")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="nobody tells what is open")
@pytest.mark.parametrize("options", [{}, {"precision": "int8"}, {"format": "ort"}], ids=str)
def test_an_export_has_closed_its_files_before_it_is_put_in_place(
    options, strict_rename, monkeypatch, one_layer, tmp_path
):
    # Weights in a file of their own are mapped as long as a session lives.
    monkeypatch.setattr(exporter, "MAX_EMBEDDED_BYTES", 0)
    for _ in range(2):
        report = doge_onnx.export(one_layer, tmp_path / "out", force=True, **options)
    assert report.path.is_dir()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"format": "ort"}], ids=str)
def test_a_bundle_has_plain_newlines_everywhere(options, windows_newlines, one_layer, tmp_path):
    path = doge_onnx.export(one_layer, tmp_path / "out", verify=False, **options).path
    text = [file for file in path.iterdir() if file.suffix in (".json", ".md", ".config", ".jinja")]
    assert {"doge_onnx.json", "README.md"} <= {file.name for file in text}
    for file in text:
        assert b"\r" not in file.read_bytes(), file.name


@pytest.mark.parametrize("newline", [WINDOWS_NEWLINE, "\n"])
def test_pipes_get_utf_8_and_plain_newlines(newline, monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="cp1252", newline=newline))
    cli_output.prepare_streams()
    sys.stdout.write("Schrödinger 猫\n")
    sys.stdout.flush()
    assert raw.getvalue() == "Schrödinger 猫\n".encode()


@pytest.fixture
def no_linux(monkeypatch):
    """Neither /proc and /sys, nor what Python has on Linux alone, nor on POSIX alone."""
    read_text = Path.read_text

    def checked(self, *args, **options):
        if self.parts[:2] in (("/", "proc"), ("/", "sys")):
            raise FileNotFoundError(2, "there is no such file", str(self))
        return read_text(self, *args, **options)

    monkeypatch.setattr(Path, "read_text", checked)
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setitem(sys.modules, "resource", None)


def test_threads_and_memory_without_what_linux_tells(no_linux):
    assert usable_cores() == 0
    assert memory.peak_memory() is None
    assert bench.default_threads() >= 1


def test_a_bundle_runs_without_what_linux_tells(no_linux, tmp_path):
    model = doge_onnx.load(fake_bundle.write(tmp_path / "bundle"))
    assert len(model.generate("the cat", max_new_tokens=3).token_ids) == 3


def test_a_bundle_is_replaced_where_paths_know_no_mounts(monkeypatch, tmp_path):
    def is_mount(self):
        raise NotImplementedError("Path.is_mount() is unsupported on this system")

    monkeypatch.setattr(Path, "is_mount", is_mount)
    path = fake_bundle.write(tmp_path / "bundle")
    check_destination(path, force=True)
    with pytest.raises(BundleError, match="mount point"):
        check_destination(Path(path.anchor), force=True)


@pytest.mark.parametrize("name", ["SIGHUP", "SIGBREAK"])
def test_the_command_line_starts_without_signals_that_a_system_lacks(name):
    code = (
        f"import signal, sys; signal.__dict__.pop({name!r}, None); sys.argv[1:] = ['--version'];"
        "from doge_onnx import cli; cli.main()"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=False
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == f"doge-onnx {doge_onnx.__version__}\n"


def test_a_manifest_has_plain_newlines(windows_newlines, tmp_path):
    path = fake_bundle.write(tmp_path / "bundle")
    assert read_manifest(path)
    assert b"\r" not in (path / "doge_onnx.json").read_bytes()


@pytest.mark.parametrize(("system", "place"), [("win32", "Scripts"), ("linux", "bin")])
def test_the_interpreter_of_an_environment(system, place, monkeypatch):
    monkeypatch.setattr(sys, "platform", system)
    assert interpreter(Path("environment")).parent == Path("environment", place)
