"""Bundles on the Hub, played by a server on this machine: every verb takes the id of one."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
from pathlib import Path

import fake_bundle
import huggingface_hub
import pytest
from commands import assert_one_line_error, invoke
from fresh_python import run
from hub import FakeHub, isolate, use_endpoint

import doge_onnx
from doge_onnx.bundle import MANIFEST_NAME, read_manifest, write_parity
from doge_onnx.errors import BundleError, ConfigError, HubError, InputError
from doge_onnx.hub_bundles import fetch
from doge_onnx.measure import bench as benchmark

REPO = "user/doge-onnx"
GRAPH = "model.onnx"
# The command line's options that make each verb quick.
QUICK = {
    "generate": ["the", "--max-new-tokens", "2"],
    "chat": ["--max-new-tokens", "2"],
    "info": [],
    "eval": ["--text", "text", "--max-tokens", "20"],
    "bench": ["--contexts", "4", "--batches", "1", "--tokens", "2", "--repetitions", "1"],
    "push": ["user/copy", "--dry-run"],
}


@pytest.fixture
def bundle(tmp_path) -> Path:
    return fake_bundle.write(tmp_path / "bundle", chat_template="{{ messages[-1].content }}")


def content(directory: Path) -> dict[str, bytes]:
    """The files of a bundle, and one beside them that is none of it."""
    names = [*read_manifest(directory).files, MANIFEST_NAME]
    return {name: (directory / name).read_bytes() for name in names} | {"pytorch_model.bin": b"x"}


@pytest.fixture
def hub(tmp_path, monkeypatch, bundle):
    """A Hub with a bundle on two branches, nothing in the cache, and an empty current directory."""
    other = fake_bundle.write(tmp_path / "other", context_length=100)
    fake = FakeHub(repositories={REPO: {"main": content(bundle), "short": content(other)}})
    isolate(monkeypatch, tmp_path)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with fake.running():
        use_endpoint(monkeypatch, fake.endpoint)
        yield fake


def cached(tmp_path: Path, name: str, hub: FakeHub, branch: str = "main") -> Path:
    folder = tmp_path / "cache" / f"models--{REPO.replace('/', '--')}"
    return folder / "snapshots" / hub.commit(branch) / name


def refusal(*arguments, error=HubError, **options) -> str:
    with pytest.raises(error) as caught:
        doge_onnx.load(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def offline(monkeypatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


# --- what is fetched --------------------------------------------------------------------------


def test_a_bundle_is_loaded_by_its_id(hub, bundle):
    texts = [doge_onnx.load(b).generate("the cat", max_new_tokens=5).text for b in (REPO, bundle)]
    assert texts[0] == texts[1]
    # The manifest first, and nothing that it does not list.
    assert hub.fetched[0] == MANIFEST_NAME
    assert sorted(hub.fetched) == sorted([*read_manifest(bundle).files, MANIFEST_NAME])


@pytest.mark.parametrize("as_commit", [False, True], ids=["branch", "commit"])
def test_a_revision_is_honoured(hub, as_commit):
    revision = hub.commit("short") if as_commit else "short"
    assert doge_onnx.load(REPO, revision=revision).manifest.context_length == 100
    assert doge_onnx.load(REPO).manifest.context_length == fake_bundle.CONTEXT


def test_what_is_in_the_cache_is_not_fetched_again(hub):
    doge_onnx.load(REPO)
    hub.fetched.clear()
    doge_onnx.load(REPO)
    assert hub.fetched == []


@pytest.mark.parametrize(
    ("status", "code"), [(503, ""), (401, ""), (403, "GatedRepo"), (404, "RepoNotFound")]
)
def test_a_refusal_does_not_keep_from_the_cache(hub, status, code):
    doge_onnx.load(REPO)
    hub.refuse_listing = (status, code)
    doge_onnx.load(REPO)


def test_a_new_commit_is_fetched(hub, bundle):
    doge_onnx.load(REPO)
    hub.repositories[REPO]["main"] = hub.repositories[REPO]["short"]
    moved = hashlib.sha1(b"moved").hexdigest()
    hub.commit = lambda revision: moved if revision == "main" else FakeHub.commit(revision)
    assert doge_onnx.load(REPO).manifest.context_length == 100


def test_a_directory_comes_before_the_hub(hub, bundle):
    shutil.copytree(bundle, REPO)
    doge_onnx.load(REPO)
    assert hub.requests == 0
    assert "nothing else has a revision" in refusal(REPO, revision="main", error=InputError)
    # Even one that is no bundle.
    (Path(REPO) / MANIFEST_NAME).unlink()
    assert "is not a bundle" in refusal(REPO, error=BundleError)
    assert hub.requests == 0


@pytest.mark.parametrize("place", ["nothing", "no/such/directory", "./a/b", "/a/b", "a//b", "a/"])
def test_what_can_be_no_id_is_never_asked_for(hub, place):
    assert "is not a directory" in refusal(place, error=BundleError)
    assert hub.requests == 0


# --- without the Hub --------------------------------------------------------------------------


def test_offline_mode_uses_the_cache(hub, monkeypatch):
    doge_onnx.load(REPO)
    hub.requests = 0
    offline(monkeypatch)
    doge_onnx.load(REPO)
    doge_onnx.load(REPO, revision=hub.commit("main"))
    for arguments in ({"revision": "short"}, {"revision": "v9"}):
        assert "offline mode (HF_HUB_OFFLINE) is on" in refusal(REPO, **arguments)
    assert hub.requests == 0


def test_a_cache_without_the_weights_is_told_offline(hub, monkeypatch):
    assert invoke("info", REPO).exit_code == 0
    offline(monkeypatch)
    assert invoke("info", REPO).exit_code == 0
    assert "offline mode" in refusal(REPO)


def test_a_hub_that_cannot_be_reached(hub, monkeypatch):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{unused.getsockname()[1]}"
        use_endpoint(monkeypatch, endpoint)
        assert f"the Hub at {endpoint} cannot be reached" in refusal(REPO)
        use_endpoint(monkeypatch, hub.endpoint)
        doge_onnx.load(REPO)
        use_endpoint(monkeypatch, endpoint)
        doge_onnx.load(REPO)


def test_without_the_extra_it_says_what_to_install():
    code = """
        import doge_onnx
        try:
            doge_onnx.load("user/doge-onnx")
        except doge_onnx.MissingExtraError as error:
            print(error)
    """
    message = run(code, blocked={"huggingface_hub"})
    assert message.startswith("user/doge-onnx is not a directory; ")
    assert "pip install 'doge-onnx[hub]'" in message


# --- what is refused --------------------------------------------------------------------------


def test_an_unknown_repository_or_revision(hub):
    message = refusal("user/other")
    assert message.startswith("user/other is neither a directory here nor a model on the Hub")
    assert refusal(REPO, revision="v9") == f"{REPO} has no revision v9 on the Hub"


@pytest.mark.parametrize("where", ["refuse_listing", "refuse_files"])
def test_a_gated_repository(hub, where):
    setattr(hub, where, (403, "GatedRepo"))
    assert f"{REPO} is gated" in refusal(REPO)


@pytest.mark.parametrize(("where", "status"), [("files", 401), ("listing", 401), ("listing", 500)])
def test_other_refusals_name_repository_and_endpoint(hub, where, status):
    setattr(hub, f"refuse_{where}", (status, ""))
    message = refusal(REPO)
    assert message.startswith(f"the Hub at {hub.endpoint} refused {REPO}: ")
    assert str(status) in message


def test_a_checkpoint_is_to_be_exported_first(hub):
    del hub.repositories[REPO]["main"][MANIFEST_NAME]
    message = refusal(REPO)
    assert message.startswith(f"{REPO} on the Hub is no bundle: it has no {MANIFEST_NAME}")
    assert f"`doge-onnx export {REPO} bundle`" in message


def test_a_file_that_is_missing_on_the_hub(hub):
    del hub.repositories[REPO]["main"][GRAPH]
    assert f"lacks {GRAPH}, which its {MANIFEST_NAME} lists" in refusal(REPO)


@pytest.mark.parametrize("change", [lambda data: data + b"x", lambda data: data[:-1] + b"x"])
def test_a_file_that_is_damaged_on_the_hub(hub, change):
    files = hub.repositories[REPO]["main"]
    files[GRAPH] = change(files[GRAPH])
    message = refusal(REPO)
    assert message.startswith(f"{GRAPH} of {REPO} on the Hub")
    assert "is not the file that its" in message


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a\\b", "onnx/../../x", "C:x"])
def test_no_path_of_a_manifest_leads_outside(hub, name):
    files = hub.repositories[REPO]["main"]
    manifest = json.loads(files[MANIFEST_NAME])
    manifest["files"][name] = {"size": 1, "sha256": "0" * 64}
    files[MANIFEST_NAME] = json.dumps(manifest).encode()
    assert "which is no file of a bundle" in refusal(REPO, error=BundleError)
    assert hub.fetched == [MANIFEST_NAME]


def test_a_file_that_is_damaged_in_the_cache_is_fetched_again(hub, tmp_path, monkeypatch):
    doge_onnx.load(REPO)
    path = cached(tmp_path, GRAPH, hub)
    data = path.read_bytes()
    path.resolve().write_bytes(data[:-1] + b"x")
    with monkeypatch.context() as patch:
        offline(patch)
        message = refusal(REPO)
    assert message.startswith(f"{path}, in the Hub's cache, is damaged")
    hub.fetched.clear()
    doge_onnx.load(REPO)
    assert hub.fetched == [GRAPH]
    assert path.read_bytes() == data


# --- the command line -------------------------------------------------------------------------


@pytest.mark.parametrize("verb", QUICK)
def test_every_verb_takes_an_id(hub, verb, monkeypatch):
    def measure_start(path, *_):
        assert path.is_dir()
        return dict.fromkeys(("import_seconds", "load_seconds", "first_token_seconds"), 1.0) | {
            "peak_memory_bytes": 1
        }

    # In place of a process of its own, which takes seconds.
    monkeypatch.setattr(benchmark, "measure_start", measure_start)
    Path("text").write_text("the cat and the dog and the hat")
    result = invoke(verb, REPO, *QUICK[verb], input="the\n")
    assert result.exit_code == 0, result.output
    assert MANIFEST_NAME in hub.fetched
    # All but the one that goes to a revision.
    if verb != "push":
        result = invoke(verb, REPO, *QUICK[verb], "--revision", "v9", input="the\n")
        assert_one_line_error(result, f"{REPO} has no revision v9")


def test_info_shows_the_commit_and_fetches_no_weights(hub):
    result = invoke("info", REPO, "--revision", "short")
    assert result.exit_code == 0, result.output
    lines = [line.split() for line in result.stdout.splitlines()]
    assert lines[:3] == [["Hub"], ["repository", REPO], ["revision", hub.commit("short")]]
    assert GRAPH not in hub.fetched
    shown = json.loads(invoke("info", REPO, "--json").stdout)
    assert shown["hub"] == {"repository": REPO, "revision": hub.commit("main")}


def test_info_of_a_directory_says_nothing_of_the_hub(hub, bundle):
    assert "Hub" not in invoke("info", bundle).stdout
    assert json.loads(invoke("info", bundle, "--json").stdout)["hub"] is None


def test_a_reference_may_be_a_bundle_of_the_hub(hub, bundle):
    text = Path("text")
    text.write_text("the cat and the dog and the hat")
    report = doge_onnx.evaluate(
        bundle, REPO, text, reference_revision="short", max_tokens=20, window=10
    )
    assert report.mean_kl == pytest.approx(0, abs=1e-6)
    assert report.reference == f"{REPO} (fp32)"
    with pytest.raises(InputError, match="only a reference on the Hub has a revision"):
        doge_onnx.evaluate(bundle, bundle, text, reference_revision="short")


def test_a_reference_that_is_no_bundle_is_a_checkpoint(hub, bundle):
    del hub.repositories[REPO]["main"][MANIFEST_NAME]
    # Its config is none of a checkpoint.
    with pytest.raises(ConfigError):
        doge_onnx.evaluate(bundle, REPO)


def test_the_cache_stays_as_it_was_fetched(hub, tmp_path):
    found = fetch(REPO)
    with pytest.raises(BundleError, match="in the Hub's cache"):
        write_parity(found, {"passed": True})
    assert sorted(os.listdir(found.path)) == sorted([*found.manifest.files, MANIFEST_NAME])
