"""Batches of sequences with unequal lengths: each gets what it gets alone, in every runner.

Fed at random: several tokens or none, states that are continued twice, sequences that end in any
order. The truth of the made-up models is the one without a state, that of int8 rows each sequence
alone. `test_row_lengths_of_exports` does the same with exported bundles.
"""

from __future__ import annotations

import fake_bundle
import numpy as np
import pytest
from fake_bundle import CONTEXT, VOCAB, reference
from feeding import feed_at_random
from runners import PassingSession, WatchedSession, model_on, on_device, on_host

import doge_onnx
from doge_onnx.bundle import Bundle
from doge_onnx.runtime.cuda.runner import CudaCopyingRunner
from doge_onnx.runtime.engine import state as states
from doge_onnx.runtime.engine.io_names import PAST_LENGTHS
from doge_onnx.runtime.loader import open_runner

TOLERANCE = 2e-2  # logits are up to 300

# Changes to the bundle, and what runs it.
KINDS = {
    "in place": ({}, None),
    "in place, all logits": ({"keep": False}, None),
    "int8": ({"dtype": "int8"}, None),
    "copying": ({"in_place": False}, None),
    "device": ({}, on_device),
    "device, all logits": ({"keep": False}, on_device),
    "device, int8": ({"dtype": "int8"}, on_device),
    "device, copying": (
        {"in_place": False},
        lambda path, chunk: on_device(path, CudaCopyingRunner, chunk),
    ),
}


@pytest.fixture(params=KINDS)
def make(request, tmp_path):
    """Makes runners of one kind, by their chunk."""
    changes, new = KINDS[request.param]
    path = fake_bundle.write(tmp_path / "b", with_tokenizer=False, **changes)

    def runner(chunk):
        return (
            open_runner(Bundle.open(path), "cpu", chunk=chunk)
            if new is None
            else new(path, chunk=chunk)
        )

    return runner


@pytest.fixture
def truth(make, request):
    """Logits `[S, V]` of a text alone."""
    if "int8" not in request.node.callspec.params["make"]:
        return reference
    runner = make(chunk=CONTEXT)
    return lambda ids: runner.forward([np.array(ids)], None, last_only=False)[0][0]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("chunk", [16, 256])
def test_whatever_is_fed_each_sequence_gets_what_it_gets_alone(
    make, truth, chunk, seed, monkeypatch
):
    # Buffers grow in the middle of everything.
    monkeypatch.setattr(states, "FIRST_CAPACITY", 8)
    feed_at_random(make(chunk), truth, VOCAB, CONTEXT, TOLERANCE, seed)


@pytest.mark.parametrize("chunk", [1, 2, 3])
def test_small_chunks_feed_every_token_once(make, truth, chunk):
    runner = make(chunk)
    for length in range(1, 8):
        text = np.arange(length)
        logits, state = runner.forward([text], None, last_only=False)
        assert state.lengths.tolist() == [length]
        np.testing.assert_allclose(logits[0], truth(text.tolist()), atol=TOLERANCE)


class Forgetful(PassingSession):
    """A session that is not told how long its rows are."""

    def io_binding(self):
        return _Forgetful(self.session.io_binding())

    def run_with_iobinding(self, binding, options=None):
        self.session.run_with_iobinding(binding.real, options)


class _Forgetful:
    def __init__(self, binding):
        self.real = binding

    def __getattr__(self, name):
        return getattr(self.real, name)

    def bind_input(self, name, *where):
        if name != PAST_LENGTHS:
            self.real.bind_input(name, *where)


@pytest.mark.parametrize("new", [on_host, on_device])
def test_without_the_lengths_this_would_fail(new, tmp_path):
    path = fake_bundle.write(tmp_path / "b", with_tokenizer=False)
    for seed in range(3):
        runner = new(path, session=Forgetful(path))
        with pytest.raises(AssertionError):
            feed_at_random(runner, reference, VOCAB, CONTEXT, TOLERANCE, seed)


def test_states_tell_the_length_of_each_sequence(make):
    runner = make(chunk=16)
    prompts = [np.arange(20), np.arange(3), np.arange(0), np.arange(7)]
    logits, state = runner.forward(prompts, None, last_only=False)
    assert state.lengths.tolist() == [20, 3, 0, 7]
    assert [rows.shape for rows in logits] == [(20, VOCAB), (3, VOCAB), (0, VOCAB), (7, VOCAB)]
    assert repr(state) == "State(batch_size=4, lengths=[20, 3, 0, 7])"
    more = [np.arange(0), np.arange(2), np.arange(1), np.arange(0)]
    logits, longer = runner.forward(more, state, last_only=True)
    assert longer.lengths.tolist() == [20, 5, 1, 7]
    assert state.lengths.tolist() == [20, 3, 0, 7]
    assert [len(rows) for rows in logits] == [0, 1, 1, 0]


# Sequences that reach the end of the context one after another, and one that goes on.
ROOM, STEPS = (3, 6, 6), 12


def _unequal_prompts():
    rng = np.random.default_rng(5)
    return [*(rng.integers(2, VOCAB, CONTEXT - n).tolist() for n in ROOM), [9, 8]]


def _generate(path, runner):
    """Generate, and check that each prompt gets what it gets alone."""
    prompts, options = _unequal_prompts(), {"max_new_tokens": STEPS, "ignore_eos": True}
    texts = model_on(path, runner).generate_batch(prompts, **options)
    alone = doge_onnx.load(path, device="cpu")
    for prompt, text in zip(prompts, texts, strict=True):
        assert text.token_ids == alone.generate(prompt, **options).token_ids
    assert [len(text.token_ids) for text in texts] == [*ROOM, STEPS]


def test_a_sequence_that_ends_leaves_the_batch(tmp_path):
    path = fake_bundle.write(tmp_path / "b", with_tokenizer=False)
    session = WatchedSession(path)
    _generate(path, on_host(path, session))
    # The first token of each comes from its prompt.
    assert session.batches[-(STEPS - 1) :] == [4] * 2 + [3] * 3 + [1] * 6


def test_on_a_device_a_sequence_that_ends_keeps_its_place(tmp_path):
    path = fake_bundle.write(tmp_path / "b", with_tokenizer=False)
    session = WatchedSession(path)
    _generate(path, on_device(path, session=session, chunk=256))
    assert session.batches[-(STEPS - 1) :] == [4] * (STEPS - 1)


def test_where_tokens_end_together_a_sequence_that_ends_is_fed_padding(tmp_path):
    path = fake_bundle.write(tmp_path / "b", with_tokenizer=False, in_place=False)
    _generate(path, open_runner(Bundle.open(path), "cpu"))


def test_neighbours_of_like_length_are_fed_together(tmp_path):
    path = fake_bundle.write(tmp_path / "b", with_tokenizer=False)
    session = WatchedSession(path)
    runner = on_host(path, session)
    rng = np.random.default_rng(1)

    def feed(*counts, state=None):
        del session.batches[:]
        tokens = [rng.integers(0, VOCAB, count) for count in counts]
        logits, after = runner.forward(tokens, state, last_only=False)
        if state is None:
            for ids, rows in zip(tokens, logits, strict=True):
                np.testing.assert_allclose(rows, reference(ids), atol=TOLERANCE)
        return after, list(session.batches)

    assert feed(5, 5, 5)[1] == [3]
    state, batches = feed(5, 8, 7)
    assert batches == [3]
    # What is filled up would cost more than a run of its own.
    assert feed(3, 4, 150, 100)[1] == [2, 1, 1]
    # The kernel takes several sequences behind a past with one token each only.
    assert feed(1, 1, 1, state=state)[1] == [3]
    assert feed(2, 1, 3, state=state)[1] == [1, 1, 1]


def test_one_full_sequence_does_not_end_the_others(make):
    model_rows = [np.arange(CONTEXT) % VOCAB, np.array([7, 8])]
    runner = make(chunk=256)
    _, state = runner.forward(model_rows, None, last_only=True)
    session = runner.decode(state)
    session.remove([0])
    text = [7, 8]
    for token in (5, 6, 9):
        (scores,) = session.step([token])
        text.append(token)
        truth = runner.forward([np.array(text)], None, last_only=True)[0][0]
        np.testing.assert_allclose(scores, truth[0], atol=TOLERANCE)


@pytest.mark.parametrize("leaving", [[0], [1, 0], [2]])
def test_who_leaves_moves_no_rows_of_older_states(make, leaving):
    runner = make(chunk=16)
    texts = [[3, 4, 5], [6], [7, 8, 9, 10]]

    def feed(tokens, state):
        return runner.forward([np.array(ids) for ids in tokens], state, last_only=True)

    _, older = feed(texts, None)
    # The newer one has the same buffer; what is fed to the older one after that has another.
    _, newer = feed([[11], [12], [13]], older)
    truth, _ = feed([[5], [6], [7]], older)
    session = runner.decode(newer)
    session.remove(leaving)
    session.step([14] * len(session.rows))
    logits, _ = feed([[5], [6], [7]], older)
    for got, expected in zip(logits, truth, strict=True):
        np.testing.assert_array_equal(got, expected)
