"""Decode steps of fixed shapes: what a graph makes of them, and when they are replayed.

A session of the CPU captures nothing and ignores who asks for it, so that here it stands for one
that does. What CUDA does is in test_cuda.py.
"""

from __future__ import annotations

import dataclasses
import re
import threading
from unittest import mock

import checkpoints
import numpy as np
import onnxruntime as ort
import pytest

import doge_onnx
from doge_onnx.errors import BundleError, CaptureError, DeviceError, InputError
from doge_onnx.runtime.cuda import graph_replay as fixed
from doge_onnx.runtime.cuda import lock as turns
from doge_onnx.runtime.cuda.device_memory import DeviceMemory
from doge_onnx.runtime.cuda.runner import CudaGrowingRunner
from doge_onnx.runtime.engine import device as devices
from doge_onnx.runtime.engine import loader as loading
from doge_onnx.runtime.engine.session import PAST_LENGTH
from doge_onnx.runtime.generation.defaults import Defaults

CAPACITY = 24
# Greedy, and no token ends a text.
ENDLESS = Defaults()


@pytest.fixture(scope="module")
def half_checkpoint(tmp_path_factory):
    return checkpoints.make(tmp_path_factory.mktemp("half") / "checkpoint", num_hidden_layers=2)


@pytest.fixture(scope="module")
def half_bundle(half_checkpoint, make_bundle):
    return make_bundle(half_checkpoint, device="cuda", verify=False).path


class Graph:
    """The graph of a bundle, fed by hand."""

    def __init__(self, path):
        self.session = ort.InferenceSession(path / "model.onnx")
        self.heads, self.row = self.session.get_inputs()[2].shape[1::2]
        self.layers = len(self.session.get_outputs()) // 2

    def run(self, ids, mask, state, **options):
        """Logits and the next state, whose tensors have a row for each column of `mask`."""
        names = [
            f"past_key_values.{i}.{part}" for i in range(self.layers) for part in ("key", "value")
        ]
        feeds = {"input_ids": ids, "attention_mask": mask} | dict(zip(names, state, strict=True))
        logits, *state = self.session.run(None, feeds | options)
        return logits, state

    def rows(self, batch, count, dtype):
        """A state of zeros."""
        shape = (batch, self.heads, count, self.row)
        return [np.zeros(shape, dtype) for _ in range(2 * self.layers)]


@pytest.mark.parametrize("options", [{}, {"kv_cache": "int8"}, {"precision": "int4"}])
@pytest.mark.parametrize(("batch", "padded"), [(1, False), (3, True)])
def test_a_mask_may_be_longer_than_what_is_there(
    options, batch, padded, half_checkpoint, make_bundle
):
    if "precision" in options:
        options = options | {"rounding": "nearest"}
    graph = Graph(make_bundle(half_checkpoint, device="cuda", verify=False, **options).path)
    dtype = np.int8 if "kv_cache" in options else np.float16
    rng = np.random.default_rng(batch)
    ids = rng.integers(0, 97, (batch, 12))
    mask = np.ones((batch, CAPACITY), np.int64)
    if padded:
        mask[0, :4] = mask[1, :2] = mask[2, 9:11] = 0
    truth, state = graph.run(ids[:, :7], mask[:, :7], graph.rows(batch, 0, dtype))
    # What a longer mask says of tokens to come does not count.
    buffers = graph.rows(batch, CAPACITY, dtype)
    for buffer, rows in zip(buffers, state, strict=True):
        buffer[:, :, :7] = rows
        buffer[:, :, 7:] = 9
    for position in range(7, 12):
        new = ids[:, position : position + 1]
        truth, state = graph.run(new, mask[:, : position + 1], state)
        past = np.array([position])
        ours, buffers = graph.run(new, mask, buffers, **{PAST_LENGTH: past})
        np.testing.assert_array_equal(ours, truth)
        for buffer, rows in zip(buffers, state, strict=True):
            np.testing.assert_array_equal(buffer[:, :, : position + 1], rows)


def test_several_tokens_may_be_fed_before_the_end_of_a_mask(half_bundle):
    graph = Graph(half_bundle)
    ids, mask = np.arange(3, 15)[np.newaxis], np.ones((1, CAPACITY), np.int64)
    mask[0, :2] = 0
    truth, _ = graph.run(ids, mask[:, :12], graph.rows(1, 0, np.float16))
    _, state = graph.run(ids[:, :7], mask[:, :7], graph.rows(1, 0, np.float16))
    buffers = graph.rows(1, CAPACITY, np.float16)
    for buffer, rows in zip(buffers, state, strict=True):
        buffer[:, :, :7] = rows
    ours, _ = graph.run(ids[:, 7:], mask, buffers, **{PAST_LENGTH: np.array([7])})
    np.testing.assert_allclose(ours, truth[:, 7:], atol=0.02)


class Capturing:
    """A session of the CPU that captures runs as CUDA would, with a fault of choice.

    Attributes:
        runs: The graph id of each run; -1 for ordinary ones.
    """

    def __init__(self, session, fault=None):
        self._session, self.fault = session, fault
        self.step = None
        self.runs: list[int] = []
        self.threads: set[int] = set()
        self.captured: dict[int, np.ndarray] = {}

    def __getattr__(self, name):
        return getattr(self._session, name)

    def run_with_iobinding(self, binding, options=None):
        assert turns.EXCLUSIVE._is_owned()
        self.threads.add(threading.get_ident())
        number = int(options.get_run_config_entry("gpu_graph_id"))
        replayed = number in self.captured
        self.runs.append(number)
        fixed_shapes = self.step is not None and binding is self.step._binding
        if self.fault == "loses a row" and fixed_shapes:
            past = self.step._past.value.numpy()
            self.step._past.value.update_inplace(np.maximum(past - 1, 0))
        if self.fault == "sees padding" and fixed_shapes:
            self.step._mask.value.update_inplace(np.ones_like(self.step._seen))
        if number == -1:
            self._session.run_with_iobinding(binding)
            return
        if self.fault == "raises":
            raise RuntimeError("x CUDA failure 901: operation failed ; GPU=0")
        if self.fault == "out of memory":
            raise RuntimeError("Failed to allocate memory")
        if self.fault == "does nothing" and replayed:
            return
        step = self.step
        past = step._past.value.numpy().copy()
        if self.fault == "captures lengths":
            # As if they had been numbers of the host.
            step._past.value.update_inplace(self.captured.setdefault(number, past))
        self.captured.setdefault(number, past)
        self._session.run_with_iobinding(binding)
        step._past.value.update_inplace(past)


def capturing(path, fault=None):
    """A model whose steps are captured, and its session."""
    model = doge_onnx.load(path, device="cpu")
    session = Capturing(model._runner._session, fault)
    runner = CudaGrowingRunner(session, model.manifest, DeviceMemory("cpu"), capture=True)
    new = runner._fixed._new

    def watched(tensors):
        session.step = new(tensors)
        return session.step

    runner._fixed._new = watched
    model._runner = runner
    return model, session


@pytest.mark.parametrize(
    ("fault", "problem"),
    [
        (None, None),
        ("does nothing", "the logits of a replayed step differ by nan"),
        ("captures lengths", "the logits of a replayed step differ by [0-9]"),
        ("loses a row", "the logits of a step of fixed shapes differ by [0-9]"),
        ("sees padding", "the logits of a step of fixed shapes differ by [0-9]"),
    ],
)
def test_a_replay_is_looked_at_before_it_is_used(half_bundle, fault, problem):
    model, session = capturing(half_bundle, fault)
    with turns.EXCLUSIVE:
        found = model._runner.check_fixed_steps()
    assert found is None if problem is None else re.match(problem, found)
    assert model.cuda_graph == (problem is None)
    # With a mask that grows, and with one that does not, twice.
    assert session.runs[:3] == [-1, -1, 1]
    if found is None:
        # What was captured is there for the first text.
        del session.runs[:]
        model.generate([3], max_new_tokens=8)
        assert session.runs[-1] == 1


def test_steps_are_replayed_after_some_and_what_was_captured_is_used_again(half_bundle):
    model, session = capturing(half_bundle)
    assert model.cuda_graph
    usual = doge_onnx.load(half_bundle, device="cpu")
    options = {"max_new_tokens": 12}
    expected = usual.generate([3, 4, 5], **options).token_ids
    assert model.generate([3, 4, 5], **options).token_ids == expected
    # The prompt, four steps as usual, and the rest.
    assert session.runs == [-1] * 5 + [1] * 7
    # Another text of other lengths: the tensors are the same, with what was in them.
    del session.runs[:]
    other = model.generate([6, 7], max_new_tokens=9).token_ids
    assert other == usual.generate([6, 7], max_new_tokens=9).token_ids
    assert session.runs == [-1] + [1] * 8
    # Of two sequences it is another graph; and so it is while a state is kept.
    for prompts, number in (([[3], [4]], 2), ([[3]], 1)):
        del session.runs[:]
        model.generate_batch(prompts, **options)
        assert max(session.runs) == number
    # The buffer is kept, so that nothing of it may be written anew.
    _, state = model.forward([[3, 4, 5]])
    del session.runs[:]
    model.generate([3], **options)
    assert max(session.runs) == 3
    again, _ = model.forward([[6]], state)
    np.testing.assert_array_equal(again, usual.forward([[6]], usual.forward([[3, 4, 5]])[1])[0])


def test_what_a_text_leaves_behind_changes_no_other(half_bundle):
    model, _ = capturing(half_bundle)
    usual = doge_onnx.load(half_bundle, device="cpu")
    rng = np.random.default_rng(0)
    for _ in range(6):
        lengths = rng.integers(1, 20, int(rng.integers(1, 4)))
        prompts = [rng.integers(0, 97, length).tolist() for length in lengths]
        count = int(rng.integers(1, 30))
        ours = model.generate_batch(prompts, max_new_tokens=count)
        expected = usual.generate_batch(prompts, max_new_tokens=count)
        assert [t.token_ids for t in ours] == [t.token_ids for t in expected]


def test_a_sequence_that_has_ended_is_fed_padding(half_bundle):
    model, session = capturing(half_bundle)
    _, state = model.forward([[3, 4], [5, 6]])
    decoder = model._runner.decoder(state)
    decoder.tokens[:] = [[7], [8]]
    decoder.step(None)
    for mask in ([[1], [0]], [[1], [0]]):
        decoder.step(np.array(mask))
    seen = session.step._mask.value.numpy()
    assert seen[0].all()
    assert seen[1, :3].all()
    assert not seen[1, 3:].any()


def test_a_capture_that_fails_later_on_is_done_without(half_bundle):
    model, session = capturing(half_bundle, "raises")
    usual = doge_onnx.load(half_bundle, device="cpu")
    for each in (model, usual):
        each._defaults = ENDLESS
    expected = usual.generate([3, 4], max_new_tokens=12).token_ids
    assert model.generate([3, 4], max_new_tokens=12).token_ids == expected
    assert session.runs == [-1] * 5 + [1] + [-1] * 7
    # What failed is not tried again, and not kept; another text may be luckier.
    del session.runs[:]
    session.fault = None
    assert model.generate([3, 4], max_new_tokens=12).token_ids == expected
    assert session.runs == [-1] * 5 + [2] * 7


def test_a_short_text_beside_a_full_one_goes_on(half_bundle):
    model, _ = capturing(half_bundle)
    usual = doge_onnx.load(half_bundle, device="cpu")
    for each in (model, usual):
        each._defaults = ENDLESS
    # With its padding it has more columns than the context has tokens.
    prompts = [[3] * (model.manifest.context_length - 2), [4, 5]]
    texts = [each.generate_batch(prompts, max_new_tokens=40) for each in (model, usual)]
    assert [t.token_ids for t in texts[0]] == [t.token_ids for t in texts[1]]
    assert [len(t.token_ids) for t in texts[0]] == [2, 40]


def test_graphs_are_limited_and_states_that_nobody_uses_are_let_go(half_bundle, monkeypatch):
    monkeypatch.setattr(fixed, "_MOST_GRAPHS", 2)
    model, session = capturing(half_bundle)
    steps = model._runner._fixed

    def replays(batch):
        del session.runs[:]
        model.generate_batch([[3]] * batch, max_new_tokens=8)
        return max(session.runs) > 0

    assert [replays(batch) for batch in (1, 2, 3)] == [True] * 3
    assert [s.tensors[0].shape[0] for s in steps._free] == [1, 2, 3]
    one = sum(t.value.tensor_size_in_bytes() for t in steps._free[0].tensors)
    monkeypatch.setattr(fixed, "_MOST_FREE", one)
    # The state of the last text is kept whatever its size, and of the others what fits.
    assert replays(3)
    assert replays(1)
    assert [s.tensors[0].shape[0] for s in steps._free] == [3, 1]
    # A second graph for the shape that was let go, and no third; others have theirs.
    assert replays(2)
    assert replays(1)
    assert [s.tensors[0].shape[0] for s in steps._free] == [2, 1]
    assert replays(3)
    steps.let_go()
    assert [replays(batch) for batch in (3, 2, 1, 4)] == [False, False, True, True]


def test_buffers_come_in_few_sizes_where_steps_are_captured(half_bundle, monkeypatch):
    captured, _ = capturing(half_bundle)
    usual = doge_onnx.load(half_bundle, device="cpu")
    capacities = []
    for model in (captured, usual):
        _, state = model._runner.step(np.array([[3, 4]]), None, None, True, follow=5)
        capacities.append(state.buffer.capacity)
    context_length = model.manifest.context_length
    assert capacities == [context_length, 7]
    capacity = captured._runner._capacity
    # Nothing follows a full text, and a mask has no more columns than the graph can number.
    assert capacity(context_length, None) == context_length
    assert capacity(context_length + 1, None) == capacity(2 * context_length, None)
    assert capacity(2 * context_length, None) == 2 * context_length
    # There is room for the first step after a prompt.
    monkeypatch.setattr("doge_onnx.runtime.engine.state._FIRST_CAPACITY", 8)
    assert [capacity(rows, None) for rows in (7, 8)] == [8, 16]


def test_threads_take_turns(half_bundle):
    # The session itself looks whether the lock is held.
    model, session = capturing(half_bundle)
    expected = model.generate([3, 4], max_new_tokens=20).token_ids
    texts = []
    threads = [
        threading.Thread(
            target=lambda: texts.append(model.generate([3, 4], max_new_tokens=20).token_ids)
        )
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == [expected] * 3
    # ONNX Runtime keeps something for each thread that it sees: this one, and one for the others.
    assert len(session.threads) == 2


@pytest.fixture
def cuda(monkeypatch):
    """Pretend that there is CUDA; returns what is loaded there, by whether it captures."""
    made = []

    def pretend(fault=None):
        def runner(bundle, threads, chunk, verbose, capture):
            made.append(capture)
            if capture and fault == "refuses":
                raise CaptureError("the host takes part in its steps")
            model, session = capturing(bundle.path, fault)
            if not capture:
                memory = DeviceMemory("cpu")
                model._runner = CudaGrowingRunner(session, model.manifest, memory)
            return model._runner

        monkeypatch.setattr(loading, "_runner", runner)
        return made

    monkeypatch.setattr(devices, "missing_for_cuda", lambda: None)
    return pretend


def test_steps_are_captured_where_that_works(half_bundle, cuda):
    made = cuda()
    assert doge_onnx.load(half_bundle, device="cuda").cuda_graph
    assert doge_onnx.load(half_bundle, device="auto", cuda_graph=True).cuda_graph
    assert made == [True, True]
    assert not doge_onnx.load(half_bundle, device="cuda", cuda_graph=False).cuda_graph
    assert made == [True, True, False]


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("captures lengths", "the logits of a replayed step differ by"),
        ("loses a row", "the logits of a step of fixed shapes differ by"),
        ("raises", "CUDA failure 901: operation failed"),
        ("refuses", "the host takes part in its steps"),
        ("out of memory", "Failed to allocate memory"),
    ],
)
def test_where_it_does_not_work_it_is_left_out_or_told(half_bundle, cuda, fault, reason):
    made = cuda(fault)
    model = doge_onnx.load(half_bundle, device="cuda")
    assert not model.cuda_graph
    assert made == [True, False]
    for device in ("cuda", "auto"):
        with pytest.raises(
            DeviceError, match=f"in a CUDA graph: {reason}.*run it without$"
        ) as info:
            doge_onnx.load(half_bundle, device=device, cuda_graph=True)
        assert "\n" not in str(info.value)


def test_bundles_that_cannot_be_captured_are_not_tried(
    half_checkpoint, make_bundle, cuda, tmp_path
):
    made = cuda()
    checkpoint = checkpoints.make(tmp_path / "checkpoint", keep_window_size=16)
    narrow = make_bundle(checkpoint, device="cuda", verify=False).path
    plain = make_bundle(half_checkpoint, target="portable", verify=False).path
    for path, reason in ((narrow, "in its window"), (plain, "export it again for the device cuda")):
        del made[:]
        with pytest.raises(DeviceError, match=reason):
            doge_onnx.load(path, device="cuda", cuda_graph=True)
        assert made == []
    with pytest.raises(DeviceError, match="need CUDA: the device is to be the CPU"):
        doge_onnx.load(plain, device="cpu", cuda_graph=True)
    with pytest.raises(InputError, match="cuda_graph must be True, False or None, not 'yes'"):
        doge_onnx.load(plain, cuda_graph="yes")


def test_a_state_that_is_continued_twice_is_copied_to_where_an_earlier_text_was(
    half_bundle, monkeypatch
):
    monkeypatch.setattr("doge_onnx.runtime.engine.state._FIRST_CAPACITY", 8)
    model, _ = capturing(half_bundle)
    usual = doge_onnx.load(half_bundle, device="cpu")
    # Two at the same time leave two sets of tensors.
    streams = [model.stream([9, 8], max_new_tokens=5) for _ in range(2)]
    for _ in range(2):
        for stream in streams:
            next(stream)
    for stream in streams:
        stream.close()
    assert len(model._runner._fixed._free) == 2
    kept = []
    for each in (model, usual):
        _, state = each.forward([[3, 4, 5]])
        each.first, one = each.forward([[6]], state)
        each.second, other = each.forward([[7]], state)
        kept += [one, other]
    assert not model._runner._fixed._free
    np.testing.assert_array_equal(model.first, usual.first)
    np.testing.assert_array_equal(model.second, usual.second)


def test_the_beginning_of_a_long_state_is_continued_in_as_many_rows(half_bundle, monkeypatch):
    monkeypatch.setattr("doge_onnx.runtime.engine.state._FIRST_CAPACITY", 8)
    model, _ = capturing(half_bundle)
    usual = doge_onnx.load(half_bundle, device="cpu")
    ids = np.arange(3, 23)
    for each in (model, usual):
        _, state = each.forward([ids])
        start = each._runner.rewind(state, 3)
        each.logits, longer = each.forward([[7]], start)
    assert longer.buffer.capacity == 8
    np.testing.assert_array_equal(model.logits, usual.logits)


def test_what_is_wrong_with_a_bundle_is_not_taken_for_a_capture(half_bundle, cuda, monkeypatch):
    made = cuda()
    for error in (
        InputError("threads must be ..."),
        BundleError("broken"),
        DeviceError("no kernel"),
    ):
        monkeypatch.setattr(loading, "_runner", mock.Mock(side_effect=error))
        with pytest.raises(type(error), match=str(error)):
            doge_onnx.load(half_bundle, device="cuda", cuda_graph=True)
    assert made == []


def test_who_asks_for_a_graph_without_cuda_is_told_what_is_missing(half_bundle, monkeypatch):
    monkeypatch.setattr(devices, "missing_for_cuda", lambda: "install something")
    with pytest.raises(DeviceError, match="CUDA graphs need CUDA: install something"):
        doge_onnx.load(half_bundle, device="auto", cuda_graph=True)


def test_memory_that_is_kept_for_later_is_given_up_when_there_is_no_more(half_bundle, monkeypatch):
    model, _ = capturing(half_bundle)
    model.generate_batch([[3]] * 2, max_new_tokens=2)
    free, empty = model._runner._fixed._free, DeviceMemory.empty
    assert free

    def scarce(memory, shape, dtype):
        if free and len(shape) == 4 and shape[2]:
            raise RuntimeError("Failed to allocate memory")
        return empty(memory, shape, dtype)

    monkeypatch.setattr(DeviceMemory, "empty", scarce)
    ours = model.generate_batch([[3]] * 3, max_new_tokens=9)
    usual = doge_onnx.load(half_bundle, device="cpu").generate_batch([[3]] * 3, max_new_tokens=9)
    assert [t.token_ids for t in ours] == [t.token_ids for t in usual]
    monkeypatch.setattr(DeviceMemory, "empty", mock.Mock(side_effect=RuntimeError("no more")))
    model._runner._fixed.let_go()
    with pytest.raises(RuntimeError, match="no more"):
        model.generate_batch([[3]] * 4, max_new_tokens=2)


@pytest.mark.parametrize("seed", range(8))
def test_whatever_is_done_in_whatever_order_is_what_the_cpu_does(half_bundle, monkeypatch, seed):
    # Buffers grow often, and are used again by texts of all kinds, that nothing ends early.
    monkeypatch.setattr("doge_onnx.runtime.engine.state._FIRST_CAPACITY", 4)
    model, session = capturing(half_bundle)
    pair = model, doge_onnx.load(half_bundle, device="cpu")
    for each in pair:
        each._defaults = ENDLESS
    rng = np.random.default_rng(seed)
    states, streams = [(None, None)], []

    def tokens(count):
        return rng.integers(0, 97, int(count)).tolist()

    for _ in range(30):
        match rng.integers(4):
            case 0:
                prompts = [tokens(n) for n in rng.integers(1, 12, rng.integers(1, 4))]
                options = [{}, {"temperature": 1.0, "top_k": 5, "seed": 1}, {"logprobs": True}]
                chosen = {"max_new_tokens": int(rng.integers(1, 40)), **rng.choice(options)}
                texts = [each.generate_batch(prompts, **chosen) for each in pair]
                assert texts[0] == [replace_timings(a, b) for a, b in zip(*texts, strict=True)]
            case 1:
                ids = [tokens(rng.integers(1, 6))]
                before = states[rng.integers(len(states))]
                if before[0] is not None and before[0].length > 40:
                    continue
                results = [
                    each.forward(ids, state) for each, state in zip(pair, before, strict=True)
                ]
                np.testing.assert_allclose(results[0][0], results[1][0], atol=0.02)
                states.append((results[0][1], results[1][1]))
                del states[1:-4]
            case 2:
                prompt = tokens(rng.integers(1, 9))
                streams.append([each.stream(prompt, max_new_tokens=30) for each in pair])
                if len(streams) > 3:
                    # Left behind, and not closed.
                    del streams[0]
            case 3:
                for ours, usual in streams:
                    for _ in range(rng.integers(1, 8)):
                        one, other = next(ours, None), next(usual, None)
                        assert (one is None) == (other is None)
                        assert one is None or one.token_ids == other.token_ids
    assert max(session.runs) > 3


def replace_timings(ours, usual):
    """A completion with the timings of another one."""
    return dataclasses.replace(usual, timings=ours.timings)
