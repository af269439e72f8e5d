"""Decode steps of fixed shapes: what a graph makes of them, and when they are replayed.

A session of the CPU captures nothing and ignores who asks for it, so that here it stands for one
that does. What CUDA does is in test_cuda.py, and what each row of a batch gets in
test_row_lengths.py.
"""

from __future__ import annotations

import dataclasses
import re
import weakref
from concurrent.futures import ThreadPoolExecutor

import checkpoints
import numpy as np
import pytest
from capturing import Capturing, capturing
from runners import model_on, on_device

import doge_onnx
from doge_onnx.bundle import Bundle
from doge_onnx.errors import (
    BundleError,
    CaptureError,
    DeviceError,
    InputError,
    NotEnoughMemoryError,
)
from doge_onnx.runtime import loader
from doge_onnx.runtime.cuda import graph_replay
from doge_onnx.runtime.cuda.device_memory import DeviceMemory
from doge_onnx.runtime.cuda.executor import PROCESS_LOCK
from doge_onnx.runtime.cuda.runner import CudaGrowingRunner
from doge_onnx.runtime.engine import device as devices
from doge_onnx.runtime.engine import state
from doge_onnx.runtime.loader import open_runner

# Greedy, and no token ends a text.
ENDLESS = {"ignore_eos": True, "temperature": 0}


@pytest.fixture(scope="module")
def half_checkpoint(tmp_path_factory):
    return checkpoints.make(tmp_path_factory.mktemp("half") / "checkpoint", num_hidden_layers=2)


@pytest.fixture(scope="module")
def half_bundle(half_checkpoint, make_bundle):
    return make_bundle(half_checkpoint, device="cuda", verify=False).path


def usual(path):
    return doge_onnx.load(path, device="cpu")


def tokens_of(texts):
    return [text.token_ids for text in texts]


@pytest.mark.parametrize(
    ("fault", "problem"),
    [
        (None, None),
        ("does nothing", "the logits of a replayed step differ by nan"),
        ("captures lengths", "the logits of a replayed step differ by [0-9]"),
        ("captures ids", "the logits of a replayed step differ by [0-9]"),
        ("loses a row", "the logits of a step of fixed shapes differ by [0-9]"),
    ],
)
def test_a_replay_is_looked_at_before_it_is_used(half_bundle, fault, problem):
    session = Capturing(half_bundle, fault)
    runner = on_device(half_bundle, session=session, capture=True)
    model = model_on(half_bundle, runner)
    with PROCESS_LOCK:
        found = runner.use_static_steps(capture=True)
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
    model, _, session = capturing(half_bundle)
    assert model.cuda_graph
    other = usual(half_bundle)
    expected = other.generate([3, 4, 5], max_new_tokens=12, **ENDLESS).token_ids
    assert model.generate([3, 4, 5], max_new_tokens=12, **ENDLESS).token_ids == expected
    # The prompt, four steps as usual, and the rest.
    assert session.runs == [-1] * 5 + [1] * 7
    # Another text of other lengths: the tensors are the same, with what was in them.
    del session.runs[:]
    text = model.generate([6, 7], max_new_tokens=9, **ENDLESS).token_ids
    assert text == other.generate([6, 7], max_new_tokens=9, **ENDLESS).token_ids
    assert session.runs == [-1] + [1] * 8
    # Of two sequences it is another graph; and so it is while a state is kept.
    for prompts, number in (([[3], [4]], 2), ([[3]], 1)):
        del session.runs[:]
        model.generate_batch(prompts, max_new_tokens=12, **ENDLESS)
        assert max(session.runs) == number
    # The buffer is kept, so that nothing of it may be written anew.
    _, state = model.forward([[3, 4, 5]])
    del session.runs[:]
    model.generate([3], max_new_tokens=12, **ENDLESS)
    assert max(session.runs) == 3
    again, _ = model.forward([[6]], state)
    np.testing.assert_array_equal(again, other.forward([[6]], other.forward([[3, 4, 5]])[1])[0])


def test_what_a_text_leaves_behind_changes_no_other(half_bundle):
    model, _, _ = capturing(half_bundle)
    other = usual(half_bundle)
    rng = np.random.default_rng(0)
    for _ in range(6):
        lengths = rng.integers(1, 20, int(rng.integers(1, 4)))
        prompts = [rng.integers(0, 97, length).tolist() for length in lengths]
        count = int(rng.integers(1, 30))
        texts = [each.generate_batch(prompts, max_new_tokens=count) for each in (model, other)]
        assert tokens_of(texts[0]) == tokens_of(texts[1])


def test_a_sequence_that_has_ended_keeps_its_place_and_grows_no_more(half_bundle):
    model, runner, session = capturing(half_bundle)
    prompts = [[3, 4], [5], [6, 7, 8]]
    _, state = runner.forward([np.array(prompt) for prompt in prompts], None, last_only=True)
    decode = runner.decode(state)
    decode.step([7, 8, 9])
    decode.remove([1])
    assert decode.rows == [0, 2]
    del session.lengths[:]
    rows = [decode.step(ids, None)[1].copy() for ids in ([3, 4], [5, 6])]
    assert session.lengths == [[3, 2, 4], [4, 2, 5]]
    alone, _ = model.forward([[6, 7, 8, 9, 4, 6]], logits="all")
    np.testing.assert_allclose(rows, alone[0, 4:], atol=0.02)


def test_a_capture_that_fails_later_on_is_done_without(half_bundle):
    model, _, session = capturing(half_bundle)
    options = {"max_new_tokens": 12, **ENDLESS}
    expected = usual(half_bundle).generate([3, 4], **options).token_ids
    session.fault = "raises"
    assert model.generate([3, 4], **options).token_ids == expected
    assert session.runs == [-1] * 5 + [1] + [-1] * 7
    # What failed is not tried again, and not kept; another text may be luckier.
    del session.runs[:]
    session.fault = None
    assert model.generate([3, 4], **options).token_ids == expected
    assert session.runs == [-1] * 5 + [2] * 7


def test_a_short_text_beside_a_full_one_goes_on(half_bundle):
    model, _, _ = capturing(half_bundle)
    prompts = [[3] * (model.manifest.context_length - 2), [4, 5]]
    texts = [
        each.generate_batch(prompts, max_new_tokens=40, **ENDLESS)
        for each in (model, usual(half_bundle))
    ]
    assert tokens_of(texts[0]) == tokens_of(texts[1])
    assert [len(text.token_ids) for text in texts[0]] == [2, 40]


def test_graphs_are_limited_and_states_that_nobody_uses_are_let_go(half_bundle, monkeypatch):
    monkeypatch.setattr(graph_replay, "MAX_GRAPHS", 2)
    model, _, session = capturing(half_bundle)

    def graph(batch):
        """Which graph a text replays, 0 for none; and whether it was there before."""
        del session.runs[:]
        model.generate_batch([[3]] * batch, max_new_tokens=8, **ENDLESS)
        return max(0, *session.runs), session.runs.count(-1) == 1

    assert [graph(batch) for batch in (1, 2, 3)] == [(1, False), (2, False), (3, False)]
    assert [graph(batch) for batch in (1, 2, 3)] == [(1, True), (2, True), (3, True)]
    # The state of the last text is kept whatever its size, and of the others what fits.
    size = model.manifest.state.token_bytes * model.manifest.context_length
    monkeypatch.setattr(graph_replay, "MAX_FREE_BYTES", size)
    assert graph(3) == (3, True)
    assert graph(1) == (1, True)
    # A second graph for a shape that was let go, and no third; others have theirs.
    assert graph(2) == (4, False)
    assert graph(1) == (1, True)
    assert graph(3) == (5, False)
    assert graph(2) == (0, False)
    assert graph(3) == (5, True)


def test_buffers_come_in_few_sizes_where_steps_are_captured(half_bundle, monkeypatch):
    _, captured, _ = capturing(half_bundle)
    context_length = Bundle.open(half_bundle).manifest.context_length

    def capacity(runner, count, most=None):
        ids = np.ones(count, np.int64)
        _, after = runner.forward([ids], None, last_only=True, max_tokens=most)
        return after.buffer.capacity

    assert capacity(captured, 2, 7) == context_length
    assert capacity(open_runner(Bundle.open(half_bundle), "cpu"), 2, 7) == 7
    # Nothing follows a full text.
    assert capacity(captured, context_length) == context_length
    # There is room for the first step after a prompt.
    monkeypatch.setattr(state, "FIRST_CAPACITY", 8)
    assert [capacity(captured, count) for count in (7, 8)] == [8, 16]


def test_threads_take_turns(half_bundle):
    # The session itself looks whether the lock is held.
    model, _, session = capturing(half_bundle)
    options = {"max_new_tokens": 20, **ENDLESS}
    expected = model.generate([3, 4], **options).token_ids
    with ThreadPoolExecutor(3) as pool:
        texts = list(pool.map(lambda _: model.generate([3, 4], **options), range(3)))
    assert tokens_of(texts) == [expected] * 3
    # ONNX Runtime keeps something for each thread that it sees: this one, and one for the others.
    assert len(session.threads) == 2


@pytest.fixture
def cuda(monkeypatch):
    """Pretend that there is CUDA; returns which sessions are opened, by whether they capture."""
    made = []

    def pretend(fault=None, error=None):
        def opened(bundle, device, threads, verbose, capture):
            if error is not None:
                raise error
            made.append(capture)
            if capture and fault == "refuses":
                raise CaptureError("the host takes part in its steps")
            return Capturing(bundle.path, fault)

        monkeypatch.setattr(loader, "open_session", opened)
        return made

    monkeypatch.setattr(loader, "DeviceMemory", lambda device: DeviceMemory("cpu"))
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
    for path, reason in (
        (narrow, "it sorts the gates of all keys"),
        (plain, "export it again for the device cuda"),
    ):
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
    monkeypatch.setattr(state, "FIRST_CAPACITY", 8)
    model, runner, session = capturing(half_bundle)
    # Two at the same time leave two sets of tensors.
    streams = [model.stream([9, 8], max_new_tokens=5, **ENDLESS) for _ in range(2)]
    for _ in range(2):
        for stream in streams:
            next(stream)
    for stream in streams:
        stream.close()
    earlier = set(session.places)
    assert len(earlier) == 2
    del stream, streams
    results = []
    for each in (runner, open_runner(Bundle.open(half_bundle), "cpu")):
        _, start = each.forward([np.array([3, 4, 5])], None, last_only=True)
        first, one = each.forward([np.array([6])], start, last_only=True)
        second, other = each.forward([np.array([7])], start, last_only=True)
        results.append((first[0], second[0], one, other))
    ours, truth = results
    assert {after.buffer.tensors[0].address for after in ours[2:]} == earlier
    np.testing.assert_array_equal(ours[0], truth[0])
    np.testing.assert_array_equal(ours[1], truth[1])


def test_the_beginning_of_a_long_state_is_continued_in_as_many_rows(half_bundle, monkeypatch):
    monkeypatch.setattr(state, "FIRST_CAPACITY", 8)
    _, runner, _ = capturing(half_bundle)
    results = []
    for each in (runner, open_runner(Bundle.open(half_bundle), "cpu")):
        _, whole = each.forward([np.arange(3, 23)], None, last_only=True)
        start = each.rewind(whole, 3)
        logits, longer = each.forward([np.array([7])], start, last_only=True)
        results.append((logits[0], longer))
    (ours, _), (truth, longer) = results
    assert longer.buffer.capacity == 8
    np.testing.assert_array_equal(ours, truth)


def test_what_is_wrong_with_a_bundle_is_not_taken_for_a_capture(half_bundle, cuda):
    for error in (
        InputError("threads must be ..."),
        BundleError("broken"),
        DeviceError("no kernel"),
    ):
        cuda(error=error)
        with pytest.raises(type(error), match=str(error)):
            doge_onnx.load(half_bundle, device="cuda", cuda_graph=True)


def test_who_asks_for_a_graph_without_cuda_is_told_what_is_missing(half_bundle, monkeypatch):
    monkeypatch.setattr(devices, "missing_for_cuda", lambda: "install something")
    with pytest.raises(DeviceError, match="CUDA graphs need CUDA: install something"):
        doge_onnx.load(half_bundle, device="auto", cuda_graph=True)


class ScarceMemory(DeviceMemory):
    """Memory for so many rows of states and no more, those of all sequences together."""

    def __init__(self, rows):
        super().__init__("cpu")
        self.rows, self.used = rows, 0

    def empty(self, shape, dtype):
        rows = shape[0] * shape[2] if len(shape) == 4 else 0
        if self.used + rows > self.rows:
            raise RuntimeError("Failed to allocate memory")
        tensor = super().empty(shape, dtype)
        self.used += rows
        weakref.finalize(tensor.value, self._release, rows)
        return tensor

    def _release(self, rows):
        self.used -= rows


def test_memory_that_is_kept_for_later_is_given_up_when_there_is_no_more(half_bundle):
    bundle = Bundle.open(half_bundle)
    tensors = 2 * bundle.manifest.state.num_layers
    memory = ScarceMemory(5 * tensors * bundle.manifest.context_length)
    session = Capturing(half_bundle)
    runner = CudaGrowingRunner(session, bundle.manifest, memory, capture=True)
    with PROCESS_LOCK:
        assert runner.use_static_steps(capture=True) is None
    model, other = model_on(half_bundle, runner), usual(half_bundle)
    # The states of one and of two sequences are kept when a text of three needs a place.
    for batch in (1, 2, 3):
        texts = [each.generate_batch([[3]] * batch, max_new_tokens=9) for each in (model, other)]
        assert tokens_of(texts[0]) == tokens_of(texts[1])
    with pytest.raises(NotEnoughMemoryError, match="Failed to allocate"):
        model.generate_batch([[3]] * 6, max_new_tokens=2)


@pytest.mark.parametrize("seed", range(8))
def test_whatever_is_done_in_whatever_order_is_what_the_cpu_does(half_bundle, monkeypatch, seed):
    # Buffers grow often, and are used again by texts of all kinds.
    monkeypatch.setattr(state, "FIRST_CAPACITY", 4)
    model, _, session = capturing(half_bundle)
    pair = model, usual(half_bundle)
    rng = np.random.default_rng(seed)
    states, streams = [(None, None)], []

    def tokens(count):
        return rng.integers(0, 97, int(count)).tolist()

    for _ in range(30):
        match rng.integers(4):
            case 0:
                prompts = [tokens(n) for n in rng.integers(1, 12, rng.integers(1, 4))]
                options = [{}, {"temperature": 1.0, "top_k": 5, "seed": 1}, {"logprobs": True}]
                # Some of them end before others do.
                chosen = {"max_new_tokens": int(rng.integers(1, 40)), **rng.choice(options)}
                texts = [each.generate_batch(prompts, **chosen) for each in pair]
                assert texts[0] == [replace_timings(a, b) for a, b in zip(*texts, strict=True)]
            case 1:
                ids = [tokens(rng.integers(1, 6))]
                before = states[rng.integers(len(states))]
                if before[0] is not None and before[0].lengths.max() > 40:
                    continue
                results = [
                    each.forward(ids, state) for each, state in zip(pair, before, strict=True)
                ]
                np.testing.assert_allclose(results[0][0], results[1][0], atol=0.02)
                states.append((results[0][1], results[1][1]))
                del states[1:-4]
            case 2:
                prompt = tokens(rng.integers(1, 9))
                options = {"max_new_tokens": 30, **ENDLESS}
                streams.append([each.stream(prompt, **options) for each in pair])
                if len(streams) > 3:
                    # Left behind, and not closed.
                    del streams[0]
            case 3:
                for ours, others in streams:
                    for _ in range(rng.integers(1, 8)):
                        one, other = next(ours, None), next(others, None)
                        assert (one is None) == (other is None)
                        assert one is None or one.token_ids == other.token_ids
    assert max(session.runs) > 3


def replace_timings(ours, truth):
    """A completion with the timings of another one."""
    return dataclasses.replace(truth, timings=ours.timings)
