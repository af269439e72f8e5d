"""What ONNX Runtime raises while it runs a graph is an error of this package, for every caller."""

from __future__ import annotations

import fake_bundle
import numpy as np
import onnxruntime as ort
import pytest
import runners
from chat_templates import PLAIN
from commands import assert_one_line_error, invoke
from onnx import numpy_helper
from onnxruntime.capi import onnxruntime_pybind11_state as bindings

import doge_onnx
from doge_onnx.errors import BundleError, DeviceError, NotEnoughMemoryError
from doge_onnx.runtime.cuda.executor import DeviceExecutor
from doge_onnx.runtime.cuda.runner import CudaCopyingRunner, CudaGrowingRunner
from doge_onnx.runtime.engine import state
from doge_onnx.runtime.engine.graph_session import GraphSession, run_error
from doge_onnx.runtime.engine.kernels import Kernels

# Positions of the table that the damaged graph still has.
LEFT = 5
WORDS = "ONNX Runtime cannot run .*model.onnx: .*damaged"


def damaged(path, in_place=True):
    """A bundle whose graph loads, and fails behind its first positions."""
    graph = fake_bundle.model(in_place)
    for tensor in graph.graph.initializer:
        if tensor.name == "position":
            table = numpy_helper.to_array(tensor)[:LEFT]
            tensor.CopyFrom(numpy_helper.from_array(table, tensor.name))
    return fake_bundle.write(path, in_place, graph=graph.SerializeToString())


@pytest.mark.parametrize("in_place", [True, False], ids=["in place", "copying"])
def test_a_graph_that_fails_as_it_runs_is_an_error_of_the_bundle(tmp_path, in_place):
    path = damaged(tmp_path / "b", in_place)
    model = doge_onnx.load(path)
    _, full = model.forward([[1] * LEFT])
    for call in (
        lambda: model.forward([[1] * (LEFT + 1)]),
        lambda: model.forward([[1]], full),
        lambda: model.generate([1, 2], max_new_tokens=9),
        lambda: model.generate_batch([[1], [2]], max_new_tokens=9),
        lambda: list(model.stream([1, 2], max_new_tokens=9)),
        lambda: doge_onnx.evaluate(path, max_tokens=64, window=32),
    ):
        with pytest.raises(BundleError, match=WORDS) as caught:
            call()
        assert str(tmp_path) in str(caught.value)
        assert "\n" not in str(caught.value)
    # The failed step did not change it.
    model.forward([[1] * LEFT])


def test_a_graph_that_fails_as_it_runs_is_one_line(tmp_path):
    path = damaged(tmp_path / "b")
    assert_one_line_error(invoke("generate", path, "the cat and the dog"), str(path), "damaged")
    assert_one_line_error(invoke("bench", path, "--contexts", 16, "--batches", 1), str(path))


@pytest.mark.parametrize(
    ("kind", "in_place"), [(CudaGrowingRunner, True), (CudaCopyingRunner, False)]
)
def test_a_graph_that_fails_on_a_device_is_an_error_of_the_bundle(tmp_path, kind, in_place):
    path = damaged(tmp_path / "b", in_place)
    runner = runners.on_device(path, kind)
    full = runner.forward([np.ones(LEFT, np.int64)], None, last_only=True)[1]
    with pytest.raises(BundleError, match=WORDS):
        runner.decode(full).step([1])


@pytest.mark.parametrize(
    ("error", "expected", "words"),
    [
        (MemoryError(), NotEnoughMemoryError, "not enough memory to run it"),
        (MemoryError("std::bad_alloc"), NotEnoughMemoryError, "shorter"),
        (
            bindings.RuntimeException("Failed to allocate memory for requested buffer of size 9"),
            NotEnoughMemoryError,
            "requested buffer",
        ),
        (
            bindings.Fail("CUDA failure 2: out of memory ; GPU=0"),
            NotEnoughMemoryError,
            "not enough memory",
        ),
        (
            bindings.Fail("CUDA failure 700: an illegal memory access was encountered ; GPU=0"),
            DeviceError,
            "CUDA cannot run it: .*illegal memory access",
        ),
        (bindings.EPFail("in two\nlines"), BundleError, "in two lines"),
        (RuntimeError(), BundleError, "RuntimeError"),
    ],
)
def test_each_failure_says_what_it_means(error, expected, words):
    found = run_error("run it", error)
    assert type(found) is expected
    assert isinstance(found, doge_onnx.DogeOnnxError)
    with pytest.raises(expected, match=words):
        raise found


def test_memory_that_is_lacking_is_a_memory_error_as_well(tmp_path, monkeypatch):
    model = doge_onnx.load(fake_bundle.write(tmp_path / "b"))

    def exhausted(*_):
        raise bindings.RuntimeException("Failed to allocate memory for requested buffer")

    monkeypatch.setattr(ort.InferenceSession, "run_with_iobinding", exhausted)
    with pytest.raises(MemoryError, match="feed the prompt in smaller chunks"):
        model.generate("the cat", max_new_tokens=1)
    result = invoke("generate", tmp_path / "b", "the cat")
    assert_one_line_error(result, "not enough memory to run", str(tmp_path))


def no_memory(*_):
    raise MemoryError("Unable to allocate 4 GiB")


@pytest.mark.parametrize("allocate", ["zeros", "empty"])
def test_memory_for_a_state_or_for_logits_is_memory_as_well(tmp_path, monkeypatch, allocate):
    model = doge_onnx.load(fake_bundle.write(tmp_path / "b"))
    with monkeypatch.context() as patches:
        # In the place of a limit for this process, which would hold for all tests.
        patches.setattr(np, allocate, no_memory)
        for call in (
            lambda: model.forward([[1]]),
            lambda: model.generate("the cat", max_new_tokens=1),
        ):
            with pytest.raises(NotEnoughMemoryError, match=r"model\.onnx.*Unable to allocate"):
                call()
    assert model.generate("the cat", max_new_tokens=1).token_ids


def test_a_state_that_grows_needs_memory_too(tmp_path, monkeypatch):
    monkeypatch.setattr(state, "FIRST_CAPACITY", 4)
    model = doge_onnx.load(fake_bundle.write(tmp_path / "b", chat_template=PLAIN))
    # A conversation does not tell at its beginning how long it will be.
    pieces = model.chat(max_new_tokens=200).stream("the cat")
    next(pieces)
    monkeypatch.setattr(np, "zeros", no_memory)
    with pytest.raises(NotEnoughMemoryError, match=r"model\.onnx.*Unable to allocate"):
        list(pieces)


def test_what_the_device_cannot_do_is_an_error_and_what_this_package_does_wrong_is_a_bug():
    def fail(error):
        raise error

    executor = DeviceExecutor(few_threads=False)
    with pytest.raises(NotEnoughMemoryError):
        executor.run(fail, bindings.RuntimeException("Failed to allocate memory"))
    for error in (BundleError("as it is"), TypeError("a bug"), KeyboardInterrupt()):
        with pytest.raises(type(error)) as caught:
            executor.run(fail, error)
        assert caught.value is error


def test_a_name_that_is_not_utf8_is_named(tmp_path):
    with pytest.raises(BundleError, match="not UTF-8"):
        GraphSession(tmp_path / "caf\udce9.onnx", ort.SessionOptions(), Kernels(None))
