"""How many threads a session has, and how attention is shared out among them."""

from __future__ import annotations

import os
from pathlib import Path

import fake_bundle
import numpy as np
import pytest

import doge_onnx
from doge_onnx.bundle import Bundle
from doge_onnx.runtime.engine import session
from doge_onnx.runtime.engine.session import open_session
from doge_onnx.runtime.engine.threads import preferred_threads, usable_cores


def test_threads_reach_onnx_runtime(tmp_path):
    bundle = Bundle.open(fake_bundle.write(tmp_path / "b"))
    options = open_session(bundle, threads=1).get_session_options()
    assert (options.intra_op_num_threads, options.inter_op_num_threads) == (1, 1)


def test_without_a_number_there_is_a_thread_for_each_usable_core(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    bundle = Bundle.open(fake_bundle.write(tmp_path / "b"))
    options = open_session(bundle).get_session_options()
    assert options.intra_op_num_threads == usable_cores()


def some_system(root: Path, siblings: dict[int, str] | None = None, quota: str = "") -> Path:
    """The files of a system: which processors share a core, and what cpu.max has."""
    for processor, others in (siblings or {}).items():
        topology = root / f"sys/devices/system/cpu/cpu{processor}/topology"
        topology.mkdir(parents=True)
        (topology / "thread_siblings_list").write_text(others + "\n")
    (root / "proc" / "self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text("0::/\n")
    mount = "29 23 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n"
    (root / "proc/self/mountinfo").write_text(mount)
    (root / "sys/fs/cgroup").mkdir(parents=True)
    (root / "sys/fs/cgroup/cpu.max").write_text(quota + "\n")
    return root


@pytest.mark.parametrize(
    ("processors", "siblings", "quota", "expected"),
    [
        ({0, 1, 2, 3}, None, "", 4),
        # Of two cores with two processors each.
        ({0, 1, 2, 3}, {0: "0,2", 1: "1,3", 2: "0,2", 3: "1,3"}, "", 2),
        ({0, 2}, {0: "0,2", 2: "0,2"}, "", 1),
        ({0, 1, 2, 3}, None, "max 100000", 4),
        ({0, 1, 2, 3}, None, "800000 100000", 4),
        ({0, 1, 2, 3}, None, "250000 100000", 2),
        ({0, 1, 2, 3}, None, "50000 100000", 1),
    ],
)
def test_usable_cores(tmp_path, monkeypatch, processors, siblings, quota, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: processors, raising=False)
    assert usable_cores(some_system(tmp_path, siblings, quota)) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("3", 3),
        (" 3 ", 3),
        ("5,2", 5),
        # More than there are, if somebody wants it.
        ("64", 64),
        # More than a system can start.
        ("99999", None),
        ("9" * 5000, None),
        ("0", None),
        ("-1", None),
        ("", None),
        ("many", None),
        ("1.5", None),
        (",2", None),
    ],
)
def test_openmps_variable_comes_before_the_cores(monkeypatch, value, expected):
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    assert preferred_threads() == (usable_cores() if expected is None else expected)


def test_a_number_of_the_caller_comes_before_openmps_variable(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    bundle = Bundle.open(fake_bundle.write(tmp_path / "b"))
    for asked, expected in ((None, 3), (1, 1)):
        options = open_session(bundle, threads=asked).get_session_options()
        assert options.intra_op_num_threads == expected


@pytest.mark.parametrize("threads", [1025, 10**12])
def test_a_number_that_no_system_can_start_is_refused(tmp_path, threads):
    path = fake_bundle.write(tmp_path / "b")
    with pytest.raises(doge_onnx.InputError, match="1024"):
        doge_onnx.load(path, threads=threads)


def test_where_the_system_does_not_say_onnx_runtime_chooses(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert usable_cores() == 0


@pytest.mark.parametrize(
    ("heads", "threads", "dtype", "users", "expected"),
    [
        (2, 2, "float32", None, "1"),
        (2, 1, "float32", None, "1"),
        (2, 3, "float32", None, None),
        (2, 2, "int8", None, None),
        (None, 1, "float32", None, None),
        ("2", 1, "float32", None, None),
        (2, 2, "float32", "0", "0"),
        (2, 2, "int8", "1", "1"),
    ],
)
def test_how_attention_is_computed(tmp_path, monkeypatch, heads, threads, dtype, users, expected):
    name = "ORT_GQA_DISABLE_FLASH_ATTENTION"
    monkeypatch.delenv(name, raising=False)
    if users is not None:
        monkeypatch.setenv(name, users)
    seen = []
    make = session.GraphSession

    def recording(*args, **options):
        seen.append(os.environ.get(name))
        return make(*args, **options)

    monkeypatch.setattr(session, "GraphSession", recording)
    config = {"num_attention_heads": heads}
    doge_onnx.load(fake_bundle.write(tmp_path / "b", config=config, dtype=dtype), threads=threads)
    assert seen == [expected]
    assert os.environ.get(name) == users


def test_both_ways_to_compute_attention_give_the_same(tmp_path):
    ids = np.random.default_rng(0).integers(0, fake_bundle.VOCAB, 200).tolist()
    for name, heads in (("one", 1), ("other", None)):
        path = fake_bundle.write(tmp_path / name, config={"num_attention_heads": heads})
        model = doge_onnx.load(path, threads=1, prefill_chunk=64)
        logits, state = model.forward([ids[:150]], logits="all")
        rest, _ = model.forward([ids[150:]], state, logits="all")
        got = np.concatenate([logits, rest], axis=1)[0]
        np.testing.assert_allclose(got, fake_bundle.reference(ids), atol=1e-2)
