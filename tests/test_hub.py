"""Fetching checkpoints from the Hub, played by a server on this machine."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path

import huggingface_hub
import pytest
from hub import FakeHub, isolate, use_endpoint

from doge_onnx.errors import CheckpointError
from doge_onnx.export.checkpoint import find, read
from doge_onnx.export.exporter import export

WEIGHTS = "model.safetensors"
MODEL = "SmallDoge/Doge-20M"
FILES = {
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "README.md",
}
UNWANTED = (
    ".gitattributes",
    "configuration_doge.py",
    "modeling_doge.py",
    "optimizer.pt",
    "pytorch_model.bin",
    "training_args.bin",
    "checkpoint-100/config.json",
    "checkpoint-100/model.safetensors",
    "onnx/model.onnx",
)


@pytest.fixture
def hub(tmp_path, monkeypatch, original):
    """A Hub with one model and nothing in the local cache."""
    # No two alike: the Hub's cache fetches equal files once.
    files = {name: json.dumps({"name": name}).encode() for name in FILES}
    for name in ("config.json", WEIGHTS):
        files[name] = (original / name).read_bytes()
    unwanted = {name: f"{name} is not to be fetched".encode() for name in UNWANTED}
    fake = FakeHub(repositories={MODEL: {"main": {**files, **unwanted}}})
    isolate(monkeypatch, tmp_path)
    with fake.running():
        use_endpoint(monkeypatch, fake.endpoint)
        yield fake


def hub_refusal(model: str = MODEL, revision: str | None = None) -> str:
    with pytest.raises(CheckpointError) as error:
        find(model, revision)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_only_the_files_of_a_model_are_fetched(hub, original):
    source = find(MODEL)
    assert set(hub.fetched) == FILES
    assert (source.model, source.revision) == (MODEL, hub.commit("main"))
    assert {path.name for path in source.directory.iterdir()} == FILES
    assert read(source.directory).tensors.keys() == read(original).tensors.keys()


@pytest.mark.slow
def test_the_card_of_an_export_names_what_it_was_made_from(hub, tmp_path):
    files = hub.repositories[MODEL]["main"]
    files["README.md"] = b"---\nlicense: apache-2.0\nlanguage: en\n---\n# Doge\n"
    # It is none.
    del files["tokenizer.json"]
    path = export(MODEL, tmp_path / "bundle", verify=False).path
    shown = huggingface_hub.metadata_load(path / "README.md")
    assert shown["base_model"] == MODEL
    assert shown["license"] == "apache-2.0"
    assert shown["language"] == "en"
    assert hub.commit("main") in (path / "README.md").read_text(encoding="utf-8")


def test_shards_and_their_index_are_fetched(hub, sharded_original):
    names = {path.name for path in sharded_original.iterdir()}
    hub.repositories[MODEL]["main"] = {
        name: (sharded_original / name).read_bytes() for name in names
    }
    source = find(MODEL)
    assert set(hub.fetched) == names
    assert read(source.directory).parameters == read(sharded_original).parameters


def test_the_cache_is_used(hub):
    first = find(MODEL)
    hub.fetched.clear()
    assert find(MODEL) == first
    assert not hub.fetched


@pytest.mark.parametrize("as_commit", [False, True], ids=["branch", "commit"])
def test_a_revision_is_honoured(hub, as_commit):
    other = {**hub.repositories[MODEL]["main"], "tokenizer.json": b'{"other": 1}'}
    hub.repositories[MODEL]["step-1000"] = other
    revision = hub.commit("step-1000") if as_commit else "step-1000"
    source = find(MODEL, revision)
    assert source.revision == hub.commit("step-1000")
    assert (source.directory / "tokenizer.json").read_bytes() == b'{"other": 1}'


def test_an_empty_revision(hub):
    assert f"revision of {MODEL} is empty" in hub_refusal(revision="")


def test_an_unknown_revision(hub):
    assert hub_refusal(revision="v9") == f"{MODEL} has no revision v9 on the Hub"


def test_an_unknown_model(hub):
    message = hub_refusal("SmallDoge/Doge-21M")
    assert "neither a directory here nor a model on the Hub" in message
    assert "SmallDoge/Doge-21M" in message


@pytest.mark.parametrize("where", ["refuse_listing", "refuse_files"])
def test_a_gated_model(hub, where):
    # The Hub lists the files of a gated model, but does not give them away.
    setattr(hub, where, (403, "GatedRepo"))
    message = hub_refusal()
    assert f"{MODEL} is gated" in message
    assert "hf auth login" in message


@pytest.mark.parametrize("where", ["refuse_listing", "refuse_files"])
def test_a_refused_token(hub, where):
    setattr(hub, where, (401, ""))
    message = hub_refusal()
    assert message.startswith(f"the Hub at {hub.endpoint} refused {MODEL}: ")
    assert "401" in message


@pytest.mark.parametrize("status", [403, 500, 503])
def test_other_refusals_name_model_and_endpoint(hub, status):
    hub.refuse_listing = (status, "")
    message = hub_refusal(revision="main")
    assert f"{MODEL} at revision main" in message
    assert hub.endpoint in message
    assert str(status) in message


def test_a_model_that_is_in_the_cache_survives_a_refusal(hub):
    source = find(MODEL)
    hub.refuse_listing = (503, "")
    assert find(MODEL) == source


def test_a_hub_that_cannot_be_reached(hub, monkeypatch):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{unused.getsockname()[1]}"
        use_endpoint(monkeypatch, endpoint)
        message = hub_refusal()
    assert f"the Hub at {endpoint} cannot be reached" in message


def test_offline_mode_uses_the_cache(hub, monkeypatch):
    source = find(MODEL)
    hub.requests = 0
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert find(MODEL) == source
    assert find(MODEL, hub.commit("main")) == source
    assert "SmallDoge/Doge-60M" in hub_refusal("SmallDoge/Doge-60M")
    assert "revision v9" in hub_refusal(revision="v9")
    assert hub.requests == 0


@pytest.mark.parametrize(
    "model",
    ["no/such/directory", "./here", "a model", "x/..", "-x", "a//b", "x!/y", "a:b"],
)
def test_what_can_be_no_model_is_never_asked_for(hub, model):
    assert "neither a directory nor the id" in hub_refusal(model)
    assert hub.requests == 0


def test_a_file_is_no_model(hub, original):
    assert "neither a directory nor the id" in hub_refusal(str(original / WEIGHTS))
    assert hub.requests == 0


def test_a_directory_comes_before_the_hub(hub, original, tmp_path, monkeypatch):
    shutil.copytree(original, tmp_path / MODEL)
    monkeypatch.chdir(tmp_path)
    source = find(MODEL)
    assert (source.directory, source.model, source.revision) == (Path(MODEL), "Doge-20M", None)
    assert hub.requests == 0


def test_a_directory_has_no_revisions(original):
    assert "only models of the Hub have a revision" in hub_refusal(str(original), "main")
