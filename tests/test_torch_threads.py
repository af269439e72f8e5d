"""How many threads PyTorch uses while a checkpoint is exported or compared."""

from __future__ import annotations

import fake_bundle
import pytest
import torch
from conftest import TINY_CHECKPOINT

import doge_onnx
from doge_onnx.export.torch_threads import thread_limit


class EnoughError(Exception):
    """Ends a task as soon as it has begun."""


@pytest.fixture
def three_threads():
    """PyTorch as on a machine with three cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("most", "expected"), [(1, 1), (2, 2), (3, 3), (8, 3)])
def test_a_limit_lowers_the_number_and_gives_it_back(three_threads, most, expected):
    seen = []

    @thread_limit(most)
    def fail():
        seen.append(torch.get_num_threads())
        raise EnoughError

    with pytest.raises(EnoughError):
        fail()
    assert seen == [expected]
    assert torch.get_num_threads() == 3


@pytest.mark.parametrize("verb", ["export", "verify"])
def test_the_verbs_keep_to_the_number_of_a_model(three_threads, monkeypatch, tmp_path, verb):
    seen = []

    def progress(_):
        seen.append(torch.get_num_threads())
        raise EnoughError

    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    bundle = fake_bundle.write(tmp_path / "b")
    calls = {
        "export": (doge_onnx.export, TINY_CHECKPOINT, tmp_path / "new"),
        "verify": (doge_onnx.verify, bundle, TINY_CHECKPOINT),
    }
    function, *arguments = calls[verb]
    with pytest.raises(EnoughError):
        function(*arguments, progress=progress)
    assert seen == [2]
    assert torch.get_num_threads() == 3
