"""`push`: what goes up to the Hub, played by a server on this machine, and what does not."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import fake_bundle
import huggingface_hub
import pytest
from hub import FakeHub, isolate, use_endpoint
from typer.testing import CliRunner

import doge_onnx
from doge_onnx import cli
from doge_onnx.bundle import MANIFEST_NAME, read_manifest, seal
from doge_onnx.errors import BundleError, HubError

REPO = "user/doge-onnx"
# The Hub's client calls its HTTP library in a way that is going out of use.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty Hub, with somebody logged in."""
    fake = FakeHub(users={"good": "user"})
    isolate(monkeypatch, tmp_path / "client")
    monkeypatch.setenv("HF_TOKEN", "good")
    with fake.running():
        use_endpoint(monkeypatch, fake.endpoint)
        yield fake


@pytest.fixture
def bundle(tmp_path) -> Path:
    """A bundle without a model card, but quick to make."""
    return fake_bundle.write(tmp_path / "bundle")


def content(directory: Path) -> dict[str, bytes]:
    """The files of a bundle, by their paths in it."""
    names = [*read_manifest(directory).files, MANIFEST_NAME]
    return {name: (directory / name).read_bytes() for name in names}


def uploaded(hub: FakeHub, branch: str = "main", repo: str = REPO) -> dict[str, bytes]:
    files = dict(hub.repositories[repo][branch])
    # What the Hub itself puts into a new repository.
    files.pop(".gitattributes", None)
    return files


def refusal(*arguments, **options) -> str:
    with pytest.raises(HubError) as error:
        doge_onnx.push(*arguments, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


# --- what goes up -----------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["flat", "hub"])
def test_a_bundle_makes_the_round_trip(hub, tiny_bundle, tiny_hub_bundle, layout):
    # The layout of the Hub has the weights in a file beside the graph, and both are links into the
    # cache.
    bundle = tiny_bundle if layout == "flat" else tiny_hub_bundle("fp32")
    said: list[str] = []
    report = doge_onnx.push(bundle, REPO, progress=said.append)
    assert uploaded(hub) == content(bundle)
    assert report.files == {name: len(data) for name, data in content(bundle).items()}
    assert report.url == f"{hub.endpoint}/{REPO}"
    assert report.commit == hub.commit("main")
    # Large files take another way than small ones, and both were taken.
    assert set(hub.objects.values()) < set(uploaded(hub).values())
    assert hub.objects
    assert hub.verified == set(hub.objects)
    assert [commit[:2] for commit in hub.commits] == [(REPO, "main")]
    assert "checking the files" in said
    prompt = "It was a dark and stormy night"
    again, original = (
        doge_onnx.load(path).generate(prompt, max_new_tokens=8) for path in (REPO, bundle)
    )
    assert again.token_ids == original.token_ids


def test_nothing_but_the_files_of_the_manifest_goes_up(hub, bundle):
    expected = content(bundle)
    (bundle / ".secret").write_text("hidden")
    (bundle / "notes.txt").write_text("mine")
    (bundle / ".cache").mkdir()
    (bundle / ".cache" / "x").write_text("x")
    doge_onnx.push(bundle, REPO)
    assert uploaded(hub) == expected


def test_files_in_directories_keep_their_paths(hub, bundle):
    manifest = json.loads((bundle / MANIFEST_NAME).read_text(encoding="utf-8"))
    (bundle / "onnx").mkdir()
    (bundle / manifest["graph"]).rename(bundle / "onnx" / "model.onnx")
    manifest["files"]["onnx/model.onnx"] = manifest["files"].pop(manifest["graph"])
    manifest["graph"] = "onnx/model.onnx"
    (bundle / MANIFEST_NAME).write_text(json.dumps(manifest), encoding="utf-8")
    doge_onnx.push(bundle, REPO)
    assert uploaded(hub) == content(bundle)
    assert "onnx/model.onnx" in uploaded(hub)


def test_what_is_in_the_repository_stays(hub, bundle):
    hub.repositories[REPO] = {"main": {"LICENSE": b"mine", MANIFEST_NAME: b"old"}}
    doge_onnx.push(bundle, REPO)
    assert uploaded(hub) == {"LICENSE": b"mine", **content(bundle)}


def test_pushing_again_is_no_error(hub, bundle):
    for _ in range(2):
        assert doge_onnx.push(bundle, REPO).url == f"{hub.endpoint}/{REPO}"
    assert uploaded(hub) == content(bundle)


def test_a_name_without_an_owner_is_the_users_own(hub, bundle):
    report = doge_onnx.push(bundle, "doge-onnx")
    assert (report.repo, report.url) == (REPO, f"{hub.endpoint}/{REPO}")
    assert uploaded(hub) == content(bundle)


@pytest.mark.parametrize("private", [False, True])
def test_a_new_repository_is_private_where_asked(hub, bundle, private):
    doge_onnx.push(bundle, REPO, private=private)
    assert hub.private == ({REPO} if private else set())


def test_nothing_private_goes_into_a_public_repository(hub, bundle):
    hub.repositories[REPO] = {"main": {}}
    assert f"{REPO} exists and is public" in refusal(bundle, REPO, private=True)
    assert uploaded(hub) == {}
    hub.private.add(REPO)
    doge_onnx.push(bundle, REPO, private=True)
    assert uploaded(hub) == content(bundle)


@pytest.mark.parametrize("exists", [False, True])
def test_a_branch_is_made_where_there_is_none(hub, bundle, exists):
    branches = {"main": {"a": b"1"}} | ({"int4": {"b": b"2"}} if exists else {})
    hub.repositories[REPO] = branches
    report = doge_onnx.push(bundle, REPO, revision="int4")
    kept = {"b": b"2"} if exists else {"a": b"1"}
    assert uploaded(hub, "int4") == {**kept, **content(bundle)}
    assert uploaded(hub) == {"a": b"1"}
    assert report.url == f"{hub.endpoint}/{REPO}/tree/int4"


def test_the_commit_says_what_it_holds_unless_told_otherwise(hub, bundle):
    doge_onnx.push(bundle, REPO)
    doge_onnx.push(bundle, REPO, message="Mine")
    model = read_manifest(bundle).source["model"]
    messages = [message for _, _, message, _ in hub.commits]
    assert messages == [f"Upload {model} in ONNX, fp32", "Mine"]


def test_a_dry_run_asks_nobody_and_needs_no_token(hub, bundle, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    report = doge_onnx.push(bundle, REPO, dry_run=True)
    assert report.files == {name: len(data) for name, data in content(bundle).items()}
    assert report.size == sum(report.files.values())
    assert (report.url, report.commit) == (None, None)
    assert hub.requests == 0


# --- what is refused --------------------------------------------------------------------------


def test_an_altered_bundle_stays_here(hub, bundle):
    graph = bundle / read_manifest(bundle).graph
    data = graph.read_bytes()
    graph.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(BundleError, match="checksum"):
        doge_onnx.push(bundle, REPO)
    graph.unlink()
    with pytest.raises(BundleError, match="lacks"):
        doge_onnx.push(bundle, REPO, dry_run=True)
    assert hub.requests == 0


def test_what_is_no_bundle_stays_here(hub, tmp_path):
    for path in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(BundleError, match="export"):
            doge_onnx.push(path, REPO)
    assert hub.requests == 0


@pytest.mark.parametrize(
    "name",
    ["", "a b", "a/b/c", "../x", "user/", "-x", "user/a--b", "user/x.git", "user/" + "x" * 97],
)
def test_what_can_be_no_repository_is_never_asked_for(hub, bundle, name):
    assert "cannot be the name of a repository" in refusal(bundle, name, dry_run=True)
    assert hub.requests == 0


def test_nobody_is_logged_in(hub, bundle, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    assert "log in with `hf auth login`" in refusal(bundle, REPO)
    assert hub.requests == 0


def test_a_token_that_the_hub_does_not_know(hub, bundle, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "stale")
    message = refusal(bundle, REPO)
    assert message == (
        f"the Hub at {hub.endpoint} does not accept the token: log in again with `hf auth login`"
    )


@pytest.mark.parametrize("exists", [False, True])
def test_a_repository_of_somebody_else(hub, bundle, exists):
    repo = "other/doge-onnx"
    if exists:
        hub.repositories[repo] = {"main": {}}
    message = refusal(bundle, repo)
    assert f"the token may not write to {repo} (you may not " in message
    assert "use one that has write access" in message
    assert not hub.commits


@pytest.mark.parametrize("status", [400, 413, 500])
def test_other_refusals_name_repository_and_endpoint(hub, bundle, status):
    hub.refuse_writing = (status, "")
    message = refusal(bundle, REPO)
    assert f"the Hub at {hub.endpoint} refused the upload to {REPO}, branch main: " in message


def test_metadata_that_the_hub_does_not_take(hub, bundle):
    (bundle / "README.md").write_text("---\nlicense: invalid\n---\n", encoding="utf-8")
    seal(bundle, read_manifest(bundle))
    assert '"license" must be one of [apache-2.0, mit]' in refusal(bundle, REPO)
    assert not hub.commits


def test_a_hub_that_cannot_be_reached(hub, bundle, monkeypatch):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{unused.getsockname()[1]}"
        use_endpoint(monkeypatch, endpoint)
        assert f"the Hub at {endpoint} cannot be reached" in refusal(bundle, REPO)


def test_offline_mode(hub, bundle, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in refusal(bundle, REPO)


def test_without_the_extra_it_says_what_to_install(bundle):
    code = f"""
        import sys
        sys.modules["huggingface_hub"] = None
        import doge_onnx
        try:
            doge_onnx.push({str(bundle)!r}, {REPO!r})
        except doge_onnx.MissingExtraError as error:
            print(error)
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "pip install 'doge-onnx[hub]'" in result.stdout


# --- the command line -------------------------------------------------------------------------


def invoke(*arguments):
    return CliRunner().invoke(cli.app, ["push", *map(str, arguments)])


def test_the_command_prints_what_went_up_and_where_it_is(hub, bundle):
    given = ["--private", "--revision", "int4", "--message", "Mine"]
    result = invoke(bundle, REPO, *given)
    assert result.exit_code == 0, result.output
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    for name, data in content(bundle).items():
        assert f"{name} {len(data) / 1e3:.1f} kB" in lines
    assert lines[-1] == f"url {hub.endpoint}/{REPO}/tree/int4"
    assert hub.private == {REPO}
    assert hub.commits[0][:3] == (REPO, "int4", "Mine")


def test_the_command_can_be_tried_without_uploading(hub, bundle):
    result = invoke(bundle, REPO, "--dry-run")
    assert result.exit_code == 0, result.output
    assert "model.onnx" in result.stdout
    assert result.stderr.splitlines()[-1] == "nothing was uploaded: this is a dry run"
    assert hub.requests == 0


@pytest.mark.parametrize("arguments", [["bundle", "a b"], ["nothing", REPO]])
def test_errors_are_one_line(hub, bundle, monkeypatch, arguments):
    monkeypatch.chdir(bundle.parent)
    result = invoke(*arguments)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in result.stderr


def test_wrong_usage_is_told_from_failure(hub, bundle):
    assert invoke(bundle).exit_code == 2


def test_the_bundle_is_not_changed(hub, bundle, tmp_path):
    before = shutil.copytree(bundle, tmp_path / "before")
    doge_onnx.push(bundle, REPO)
    assert content(bundle) == content(before)


def test_a_name_in_another_locale_is_refused_as_it_was_typed(bundle):
    typed = "us\u00ebr/x".encode().decode("ascii", "surrogateescape")
    result = invoke(bundle, typed, "--dry-run")
    assert result.exit_code == 1
    assert "'us\u00ebr/x'" in result.stderr
