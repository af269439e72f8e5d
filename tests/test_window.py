"""More text than the window has keys: in a state that grows, and in one of constant size."""

from __future__ import annotations

import numpy as np
import older_checkpoints
import oracle
import pytest
import torch
from checkpoints import assert_close
from stepping import Growing, Window, each, fresh_text, pad, random_text, row

import doge_onnx

pytestmark = pytest.mark.slow

STATES = {"growing": Growing, "window": Window}
DYNAMIC = {"rope_type": "dynamic", "factor": 3.0, "rope_theta": 1e4}
# Many tokens, so that a long text can do without any of them twice.
WIDE = 331
# A token by itself, then four, and so on.
ALTERNATING = [cut for start in range(0, 300, 5) for cut in (start + 1, start + 5)][:-1]
FEW = [5, 6, 15, 16, 17, 33, 34, 35, 36, 90, 150, 151, 203]


@pytest.fixture(params=STATES.values(), ids=STATES.keys())
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def long_text(tmp_path_factory):
    """Models by their window, with a text and the truth."""
    known = {}

    def get(window):
        if window not in known:
            model = older_checkpoints.make(
                tmp_path_factory.mktemp("long"),
                "native",
                seed=1,
                # Nine gate channels: vectorised kernels treat the last few of an odd number
                # differently.
                num_key_value_heads=3,
                vocab_size=WIDE,
                keep_window_size=window,
                max_position_embeddings=100,
                rope_parameters=DYNAMIC,
            )
            ids = fresh_text(320, WIDE, seed=window)
            known[window] = model, ids, model.logits(ids)
        return known[window]

    return get


@pytest.mark.parametrize("cuts", [[], FEW, ALTERNATING], ids=["one", "few", "alternating"])
@pytest.mark.parametrize("window", [16, 64])
def test_hundreds_of_tokens(window, cuts, kind, long_text):
    model, ids, truth = long_text(window)
    assert_close(kind(model.directory).run(row(ids), cuts=cuts)[0], truth)


@pytest.mark.parametrize("window", [1, 2, 33])
def test_odd_windows(window, kind, long_text):
    model, ids, truth = long_text(window)
    assert_close(kind(model.directory, "standard").run(row(ids), cuts=FEW)[0], truth)


@pytest.mark.parametrize("length", [15, 16, 17])
def test_at_the_border(length, kind, long_text):
    model, ids, truth = long_text(16)
    step = kind(model.directory)
    assert_close(step.run(row(ids[:length]))[0], truth[:length])
    assert_close(step.run(row(ids[:length]), cuts=[length - 1])[0], truth[:length])


def test_the_window_matters(long_text):
    # Otherwise everything above would pass without one.
    model, ids, truth = long_text(64)
    endless = {**model.config, "keep_window_size": None}
    without = oracle.logits(endless, model.tensors, ids)
    np.testing.assert_array_equal(without[:64], truth[:64])
    assert np.abs(without[100:] - truth[100:]).max(axis=1).min() > 1e-2


@pytest.mark.parametrize("first_rows", [0, 1, 10, 15])
@pytest.mark.parametrize("cuts", [[], [1, 4, 9, 10, 21, 22, 60]], ids=["one", "few"])
def test_free_rows_are_added_as_they_are_needed(first_rows, cuts, long_text):
    model, ids, truth = long_text(16)
    step = Window(model.directory, first_rows=first_rows)
    assert_close(step.run(row(ids[:80]), cuts=cuts)[0], truth[:80])


@pytest.mark.parametrize("vocab_size", [12, 40])
@pytest.mark.parametrize(
    "cuts", [[], FEW, ALTERNATING, each(100)], ids=["one", "few", "alternating", "each, then one"]
)
def test_of_equal_gates_the_latest_stay(vocab_size, cuts, kind, tmp_path):
    # In the first layer a token's gate depends on the token alone, so texts are full of them;
    # and they have to be equal to the last bit in steps of any length.
    model = older_checkpoints.make(
        tmp_path, "native", seed=1, vocab_size=vocab_size, keep_window_size=24
    )
    ids = random_text(300, vocab_size, seed=2)
    assert_close(kind(tmp_path).run(row(ids), cuts=cuts)[0], model.logits(ids))


@pytest.mark.parametrize("A", [0.0, -3000.0])
@pytest.mark.parametrize(
    "cuts", [[], [3, 15, 16, 17, 18, 40], each(60)], ids=["one", "few", "each"]
)
def test_all_gates_equal(A, cuts, kind, tmp_path):
    # 0: a model that was never trained, all gates are 1. -3000: all but a few underflow to 0.
    # Either way the latest keys stay.
    model = older_checkpoints.make(tmp_path, "native", seed=1, A=A, keep_window_size=16)
    ids = random_text(60, 61, seed=2)
    assert_close(kind(tmp_path).run(row(ids), cuts=cuts)[0], model.logits(ids))


def test_some_gates_underflow(kind, tmp_path):
    # Zeros compete with zeros, and lose against the few gates that are not.
    model = older_checkpoints.make(
        tmp_path, "native", seed=5, A=-3000.0, dt_scale=2.5, keep_window_size=16
    )
    ids = random_text(120, 61, seed=2)
    reader = oracle.Oracle(model.config, model.tensors)
    truth = np.array([reader.step(token) for token in ids])
    assert reader.margin > 3e-6
    open_gates = [np.count_nonzero([gate.value for gate in gates]) for gates in reader.gates]
    assert all(0 < count < 16 for count in open_gates)
    for cuts in ([], [3, 15, 16, 17, 40]):
        assert_close(kind(tmp_path).run(row(ids), cuts=cuts)[0], truth)


def test_the_rows_are_those_of_the_kept_keys(long_text):
    model, ids, _ = long_text(33)
    reader = oracle.Oracle(model.config, model.tensors)
    for token in ids:
        reader.step(token)
    heads, state = _final_state(Window(model.directory), ids)
    for layer, (key, _) in enumerate(state):
        kept = reader.window(oracle.Gate.stack(reader.gates[layer]), layer)
        for head, positions in enumerate(kept):
            assert sorted(key[0, head, :, heads.dim + 1].tolist()) == sorted(positions + 1.0)


def test_ties_are_told_apart_at_any_position(tmp_path):
    # Sixteen million tokens on, positions one apart are still different numbers.
    older_checkpoints.make(tmp_path, "native", A=0.0, keep_window_size=16)
    far = 2**24 - 70
    heads, state = _final_state(Window(tmp_path), random_text(64, 61), far)
    for key, _ in state:
        for stamps in key[0, ..., heads.dim + 1].tolist():
            assert sorted(stamps) == [far + number for number in range(49, 65)]


@torch.no_grad()
def _final_state(window, ids, first_position=0):
    """The layout of the state and the state after `ids`, in steps of 7."""
    state = window.free_rows(1, window.rows)
    positions = torch.arange(len(ids)).unsqueeze(0) + first_position
    for start in range(0, len(ids), 7):
        tokens = row(ids)[:, start : start + 7]
        inputs = (tokens, torch.ones_like(tokens), positions[:, start : start + 7])
        _, state = window.step(inputs, state)
    return window.state.heads, state


@pytest.mark.parametrize("cuts", [[], [50, 51, 52, 95, 96]], ids=["one", "few"])
def test_a_padded_batch_past_window_and_trained_context(cuts, kind, long_text):
    model, ids, _ = long_text(16)
    texts = [ids[:150], ids[200:203], ids[100:200], ids[10:60]]
    padded, mask = pad(texts)
    logits = kind(model.directory).run(padded, mask, cuts)
    assert logits.isfinite().all()
    for got, text in zip(logits, texts, strict=True):
        assert_close(got[-len(text) :], model.logits(text))


@pytest.mark.parametrize("cuts", [[], [1, 7, 8, 30, 31, 125]], ids=["one", "few"])
def test_padding_in_the_middle_is_as_if_it_were_not_there(cuts, kind, long_text):
    model, ids, _ = long_text(16)
    gaps = [[0, 1, 2, 6, 30, *range(110, 126), 139], [20, *range(40, 70)]]
    texts = [ids[:118], ids[150:259]]
    padded, mask = pad(texts, gaps)
    logits = kind(model.directory).run(padded, mask, cuts)
    for got, real, text in zip(logits, mask.bool(), texts, strict=True):
        assert_close(got[real], model.logits(text))


def test_more_padding_than_rows(kind, long_text):
    model, ids, truth = long_text(16)
    padded, mask = pad([ids[:30]], [range(100)])
    logits = kind(model.directory).run(padded, mask, cuts=[90, 99, 101])
    assert_close(logits[0, 100:], truth[:30])


TARGETS = [("ort", "growing"), ("ort", "window"), ("portable", "growing"), ("portable", "window")]


@pytest.fixture(scope="module", params=TARGETS, ids="-".join)
def path(request, long_text, make_bundle):
    target, state = request.param
    options = {"target": target, "state": state, "context_length": 400, "verify": False}
    return make_bundle(long_text(16)[0].directory, **options).path


@pytest.fixture(scope="module")
def bundle(path):
    return doge_onnx.load(path)


def run_bundle(bundle, ids, mask=None, cuts=()):
    """Logits `[B, S, V]` of `ids`, one call of `forward` for each piece."""
    ids = np.asarray(ids)
    mask = np.ones_like(ids) if mask is None else np.asarray(mask)
    rows, state = [], None
    pieces = zip(np.split(ids, list(cuts), axis=1), np.split(mask, list(cuts), axis=1), strict=True)
    for piece, real in pieces:
        logits, state = bundle.forward(piece, state, logits="all", attention_mask=real)
        rows.append(logits)
    return np.concatenate(rows, axis=1)


@pytest.mark.parametrize("cuts", [[], FEW, each(320)], ids=["one", "few", "each"])
def test_bundle_hundreds_of_tokens(cuts, bundle, long_text):
    _, ids, truth = long_text(16)
    assert_close(run_bundle(bundle, [ids], cuts=cuts)[0], truth)


@pytest.mark.parametrize(("vocab_size", "seed"), [(20, 0), (40, 4)])
def test_bundle_repeated_tokens(vocab_size, seed, bundle, long_text):
    # These texts did tell when equal tokens had gates that differed in their last bits.
    model, _, _ = long_text(16)
    ids = random_text(300, vocab_size, seed=seed)
    truth = model.logits(ids)
    for cuts in ([], FEW, ALTERNATING):
        assert_close(run_bundle(bundle, [ids], cuts=cuts)[0], truth)


@pytest.mark.parametrize("cuts", [[], [50, 51, 52, 95, 96]], ids=["one", "few"])
def test_bundle_padded_batch(cuts, bundle, long_text):
    model, ids, _ = long_text(16)
    texts = [ids[:150], ids[200:203], ids[100:200]]
    padded, mask = pad(texts)
    for got, text in zip(run_bundle(bundle, padded, mask, cuts), texts, strict=True):
        assert_close(got[-len(text) :], model.logits(text))


def test_bundle_padding_in_the_middle(bundle, long_text):
    model, ids, _ = long_text(16)
    texts = [ids[:118], ids[150:259]]
    padded, mask = pad(texts, [[0, 1, 2, 6, 30, *range(110, 126), 139], [20, *range(40, 70)]])
    logits = run_bundle(bundle, padded, mask, cuts=[7, 8, 31])
    for got, real, text in zip(logits, mask.bool().numpy(), texts, strict=True):
        assert_close(got[real], model.logits(text))


def test_a_state_can_be_continued_more_than_once(bundle, long_text):
    # Though a window's rows are overwritten in place.
    model, ids, truth = long_text(16)
    _, state = bundle.forward([ids[:40]])
    for ending in (ids[40:60], ids[100:103], ids[200:230]):
        logits, _ = bundle.forward([ending], state, logits="all")
        assert_close(logits[0], model.logits(ids[:40] + ending)[40:])
    logits, _ = bundle.forward([ids[40:80]], state, logits="all")
    assert_close(logits[0], truth[40:80])


def greedy(model, ids, count):
    """The oracle's greedy continuation; none of its choices may be close."""
    reader, out = oracle.Oracle(model.config, model.tensors), []
    for token in ids:
        scores = reader.step(token)
    for _ in range(count):
        out.append(int(scores.argmax()))
        first, second = np.sort(scores)[-2:][::-1]
        assert first - second > 1e-3
        scores = reader.step(out[-1])
    assert reader.margin > 3e-6
    return out


def test_generate_and_stream(bundle, long_text):
    model, ids, _ = long_text(16)
    prompts = [ids[:50], ids[60:65], ids[70:140]]
    truths = [greedy(model, prompt, 20) for prompt in prompts]
    assert not any(model.config["eos_token_id"] in truth for truth in truths)
    one = bundle.generate(prompts[0], max_new_tokens=20, temperature=0)
    assert one.token_ids == truths[0]
    batch = bundle.generate_batch(prompts, max_new_tokens=20, temperature=0)
    assert [completion.token_ids for completion in batch] == truths
    pieces = list(bundle.stream(prompts[2], max_new_tokens=20, temperature=0))
    assert [token for piece in pieces for token in piece.token_ids] == truths[2]


def test_a_prompt_in_chunks(path, long_text):
    _, ids, truth = long_text(16)
    chunked = doge_onnx.load(path, prefill_chunk=7)
    logits, state = chunked.forward([ids[:200]], logits="all")
    assert_close(logits[0], truth[:200])
    last, _ = chunked.forward([ids[200:300]], state)
    assert_close(last[0, 0], truth[299])
