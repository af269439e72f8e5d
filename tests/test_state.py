"""`forward`: logits and states, for both kinds of graph, against a model without a state."""

from __future__ import annotations

import fake_bundle
import numpy as np
import pytest
from fake_bundle import CONTEXT, VOCAB, reference
from runners import WatchedSession, model_on, on_host

import doge_onnx
from doge_onnx.bundle import Bundle
from doge_onnx.errors import InputError
from doge_onnx.runtime.engine.state import Buffer, buffer_capacity
from doge_onnx.runtime.loader import open_runner

TOLERANCE = 1e-3  # logits are up to 300


@pytest.fixture(scope="module", params=["in_place", "in_place_all_logits", "copying"])
def model(request, tmp_path_factory):
    return _load(
        tmp_path_factory.mktemp("bundle") / "b",
        in_place=request.param != "copying",
        keep=request.param == "in_place",
    )


@pytest.fixture(scope="module")
def in_place(tmp_path_factory):
    return _load(tmp_path_factory.mktemp("bundle") / "b")


def _load(path, **options):
    return doge_onnx.load(fake_bundle.write(path, with_tokenizer=False, **options))


def _ids(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, VOCAB, count).tolist()


def _close(logits, expected) -> None:
    np.testing.assert_allclose(logits, expected, atol=TOLERANCE, rtol=0)


def _addresses(state) -> list[int]:
    return [tensor.ctypes.data for tensor in state.buffer.tensors]


def test_shapes_and_types(model):
    ids = _ids(5)
    last, state = model.forward([ids])
    everything, _ = model.forward(np.array([ids], np.int32), logits="all")
    assert last.shape == (1, 1, VOCAB)
    assert everything.shape == (1, 5, VOCAB)
    assert last.dtype == everything.dtype == np.float32
    _close(everything[0], reference(ids))
    _close(last[0, 0], reference(ids)[-1])
    assert (state.batch_size, state.lengths.tolist()) == (1, [5])
    assert state.lengths.dtype == np.int64


@pytest.mark.parametrize("cuts", [[1] * 12, [12], [5, 1, 1, 5], [1, 10, 1]])
def test_a_text_may_be_cut_anywhere(model, cuts):
    ids = _ids(12)
    state, position, rows = None, 0, []
    for size in cuts:
        logits, state = model.forward([ids[position : position + size]], state, logits="all")
        rows.append(logits[0])
        position += size
    _close(np.concatenate(rows), reference(ids))


def test_logits_belong_to_the_caller(model):
    first, state = model.forward([_ids(4)])
    kept = first.copy()
    first_all, state_all = model.forward([_ids(4)], logits="all")
    kept_all = first_all.copy()
    for token in _ids(5, seed=1):
        _, state = model.forward([[token]], state)
        _, state_all = model.forward([[token]], state_all, logits="all")
    np.testing.assert_array_equal(first, kept)
    np.testing.assert_array_equal(first_all, kept_all)


def test_the_ids_of_the_caller_are_only_read(model):
    ids = np.array([[5]])
    _, state = model.forward(ids)
    model.forward([[6]], state)
    assert ids.tolist() == [[5]]


def test_a_state_can_be_continued_more_than_once(model):
    start = _ids(6)
    _, state = model.forward([start])
    ends = [_ids(5, seed) for seed in (1, 2, 3)]
    # Both branches are continued in turn, so that one would overwrite the other.
    states = [state, state, state]
    for step in range(5):
        for branch, end in enumerate(ends):
            logits, states[branch] = model.forward([[end[step]]], states[branch])
            _close(logits[0, 0], reference(start + end[: step + 1])[-1])
    logits, _ = model.forward([ends[0]], state, logits="all")
    _close(logits[0], reference(start + ends[0])[6:])


def test_nobody_can_change_the_lengths_of_a_state(model):
    ids = _ids(7)
    _, state = model.forward([ids[:6]])
    with pytest.raises(ValueError, match="read-only"):
        state.lengths[0] = 1
    logits, _ = model.forward([ids[6:]], state)
    _close(logits[0, 0], reference(ids)[-1])


def test_a_batch_of_unequal_prompts_with_padding_anywhere(model):
    a, b, c = _ids(7, 1), _ids(3, 2), _ids(5, 3)
    ids = [a, [0] * 4 + b, [9] * 2 + c]
    mask = [[1] * 7, [0] * 4 + [1] * 3, [0] * 2 + [1] * 5]
    logits, state = model.forward(ids, logits="all", attention_mask=mask)
    for row, prompt in zip(logits, (a, b, c), strict=True):
        _close(row[-len(prompt) :], reference(prompt))
        assert not row[: -len(prompt)].any()
    # A turn of several tokens after a past, again of unequal lengths: padding in the middle.
    d, e, f = _ids(4, 4), _ids(2, 5), _ids(1, 6)
    ids = [d, [5, 5, *e], [0, 0, 0, *f]]
    mask = np.array([[1, 1, 1, 1], [0, 0, 1, 1], [0, 0, 0, 1]])
    logits, state = model.forward(ids, state, logits="all", attention_mask=mask)
    for row, past, new in zip(logits, (a, b, c), (d, e, f), strict=True):
        _close(row[-len(new) :], reference(past + new)[len(past) :])
    # Padding behind the tokens and between them.
    ids, mask = [[*d, 0], [*e, 0, 0, 0], [3, *f, 0, 0, 1]], [[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]]
    mask.append([1, 1, 0, 0, 1])
    logits, longer = model.forward(ids, state, logits="all", attention_mask=mask)
    last, _ = model.forward(ids, state, attention_mask=mask)
    rows = [([*a, *d], d), ([*b, *e], e), ([*c, *f], [3, *f, 1])]
    for got, end, real, (past, new) in zip(logits, last, mask, rows, strict=True):
        real = np.array(real, bool)
        truth = reference(past + new)[len(past) :]
        _close(got[real], truth)
        assert not got[~real].any()
        # The last of them is the last token, wherever that stands.
        _close(end[0], truth[-1])
    assert longer.lengths.tolist() == [15, 7, 9]
    # One token each, one row taking a rest.
    last, state = model.forward([[1], [2], [3]], state, attention_mask=[[True], [False], [True]])
    _close(last[0, 0], reference([*a, *d, 1])[-1])
    assert not last[1].any()
    last, state = model.forward([[4], [4], [4]], state)
    _close(last[1, 0], reference([*b, *e, 4])[-1])
    _close(last[2, 0], reference([*c, *f, 3, 4])[-1])
    assert state.lengths.tolist() == [13, 6, 8]


def test_several_tokens_after_a_past_extend_a_batch_in_place(in_place):
    prompts = [_ids(4, 1), _ids(4, 2)]
    more = [_ids(3, 3), _ids(3, 4)]
    _, state = in_place.forward(prompts)
    last, after = in_place.forward(more, state)
    assert _addresses(after) == _addresses(state)
    assert last.shape == (2, 1, VOCAB)
    for row, prompt, new in zip(last, prompts, more, strict=True):
        _close(row[0], reference(prompt + new)[-1])


def test_nothing_of_the_cache_is_copied_per_token(in_place):
    ids = _ids(CONTEXT)
    _, state = in_place.forward([ids[:3]])
    addresses = [_addresses(state)]
    for position in range(3, CONTEXT):
        before = [t[:, :, :position].copy() for t in state.buffer.tensors]
        logits, state = in_place.forward([ids[position : position + 1]], state)
        if _addresses(state) != addresses[-1]:
            addresses.append(_addresses(state))
        for old, tensor in zip(before, state.buffer.tensors, strict=True):
            np.testing.assert_array_equal(old, tensor[:, :, :position])
            # The graph itself wrote the new row, and no other.
            assert tensor[:, :, position].any()
            assert not tensor[:, :, position + 1 :].any()
    _close(logits[0, 0], reference(ids)[-1])
    # 256 rows at first, then as many as the context has.
    assert len(addresses) == 2
    assert state.buffer.capacity == CONTEXT


def test_an_old_state_outlives_the_growth_of_its_buffer(in_place):
    ids = _ids(258)
    _, full = in_place.forward([ids[:256]])
    grown, after = in_place.forward([ids[256:257]], full)
    again, _ = in_place.forward([ids[256:257]], full)
    assert full.buffer.capacity == 256
    assert after.buffer is not full.buffer
    np.testing.assert_array_equal(grown, again)
    _close(grown[0, 0], reference(ids[:257])[-1])


@pytest.mark.parametrize(
    ("rows", "context", "expected"),
    [
        (1, 2048, 256),
        (256, 2048, 256),
        (257, 2048, 512),
        (1025, 2048, 2048),
        (2049, 2048, 2049),
        (1, 100, 100),
        (101, 100, 101),
        (1030, 1100, 1100),
        (1101, 1100, 1101),
    ],
)
def test_capacity_doubles_up_to_the_context(rows, context, expected):
    assert buffer_capacity(rows, context) == expected


@pytest.mark.parametrize(
    ("rows", "context", "most", "expected"),
    [
        (16, 2048, 48, 48),
        (16, 2048, 2016, 256),
        (512, 2048, 2048, 1024),
        (512, 2048, 512, 512),
        (2048, 2048, 2048, 2048),
        # Room for a step after a prompt, unless none follows.
        (256, 2048, 257, 257),
        (256, 2048, 600, 512),
        (300, 300, 300, 300),
    ],
)
def test_capacity_is_no_more_than_will_be_needed(rows, context, most, expected):
    assert buffer_capacity(rows, context, most) == expected


def test_rows_can_be_claimed_once_and_only_at_the_end():
    def lengths(*values):
        return np.array(values, np.int64)

    buffer = Buffer([], 8, lengths(2, 1))
    assert buffer.claim(lengths(2, 1), 5)
    # From there on they are somebody's, and before there, too.
    assert not buffer.claim(lengths(2, 1), 3)
    assert not buffer.claim(lengths(4, 4), 6)
    buffer.release(lengths(5, 3))
    # Both must end where the rows do, and there must be room.
    assert not buffer.claim(lengths(5, 2), 6)
    assert not buffer.claim(lengths(5, 3), 9)
    assert buffer.claim(lengths(5, 3), 8)
    buffer.release(lengths(5, 3))
    assert buffer.claim(lengths(5, 3), 6)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_step_that_fails_leaves_the_old_state_as_it_was(tmp_path, error):
    path = fake_bundle.write(tmp_path / "b", with_tokenizer=False)
    session = WatchedSession(path)
    model = model_on(path, on_host(path, session))
    start, end = _ids(6), _ids(3, 1)
    _, state = model.forward([start])
    addresses = _addresses(state)

    def fail():
        # What a run that is interrupted half-way may leave behind.
        for tensor in state.buffer.tensors:
            tensor[:, :, 6:9] = 1e9
        raise error

    session.hook = fail
    with pytest.raises(error):
        model.forward([end], state)
    session.hook = lambda: None
    logits, after = model.forward([end], state, logits="all")
    _close(logits[0], reference(start + end)[6:])
    assert _addresses(after) == addresses


def test_a_state_without_tokens_of_a_row_is_finite(model):
    logits, state = model.forward([_ids(2), [0, 0]], attention_mask=[[1, 1], [0, 0]])
    assert state.lengths.tolist() == [2, 0]
    assert not logits[1].any()
    logits, _ = model.forward([[7], [8]], state)
    _close(logits[1, 0], reference([8])[-1])


def test_a_text_may_fill_the_context_but_no_more(model):
    ids = _ids(CONTEXT)
    _, state = model.forward([ids[:-1]])
    _, state = model.forward([ids[-1:]], state)
    with pytest.raises(InputError, match="301 tokens, more than the context length of 300"):
        model.forward([[1]], state)
    with pytest.raises(InputError, match="row 1 would have 301 tokens"):
        model.forward([[0] * 301] * 2, attention_mask=[[0] + [1] * 300, [1] * 301])
    # Padding takes no place in the context, however much of it there is.
    logits, state = model.forward([[0] * 600 + [5]], attention_mask=[[0] * 600 + [1]])
    _close(logits[0, 0], reference([5])[-1])
    assert state.lengths.tolist() == [1]


def test_a_full_row_does_not_keep_others_from_going_on(model):
    full, short = _ids(CONTEXT), _ids(3, 1)
    padding = [0] * (CONTEXT - 3)
    _, state = model.forward(
        [full, padding + short], attention_mask=[[1] * CONTEXT, [*padding, 1, 1, 1]]
    )
    for token in (7, 8):
        logits, state = model.forward([[0], [token]], state, attention_mask=[[0], [1]])
        short.append(token)
        _close(logits[1, 0], reference(short)[-1])
        assert not logits[0].any()
    assert state.lengths.tolist() == [CONTEXT, 5]


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([[1, 2], [3, VOCAB]], f"token id {VOCAB} in row 1, position 1 .* {VOCAB} ids"),
        ([[1, -1]], "token id -1 in row 0, position 1"),
        ([[2**70]], "whole numbers"),
        ([[1.0]], "whole numbers, not float64"),
        ([[True]], "whole numbers, not bool"),
        ([["a"]], "whole numbers"),
        ([1, 2], r"for one sequence pass \[ids\]"),
        ([[[1]]], r"not of shape \[1, 1, 1\]"),
        (5, r"not of shape \[\]"),
        ([], "empty"),
        ([[]], "empty"),
        (np.zeros((0, 4), int), "empty"),
        ([[1], [1, 2]], "unequal"),
        (None, "whole numbers"),
    ],
)
def test_wrong_ids_are_refused(in_place, ids, message):
    with pytest.raises(InputError, match=message):
        in_place.forward(ids)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ([[1]], r"\[1, 2\], not \[1, 1\]"),
        ([1, 1], r"\[1, 2\], not \[2\]"),
        ([[1, 2]], "1 for a token and 0 for padding"),
        ([[1, -1]], "1 for a token and 0 for padding"),
        ([[1.0, 0.5]], "whole numbers"),
        ([[0, 0]], "holds no 1: at least one token is needed"),
    ],
)
def test_wrong_masks_are_refused(in_place, mask, message):
    with pytest.raises(InputError, match=message):
        in_place.forward([[1, 2]], attention_mask=mask)


def test_wrong_states_are_refused(in_place, tmp_path):
    _, state = in_place.forward([[1], [2]])
    with pytest.raises(InputError, match="of 2 sequences, but input_ids has 1 rows"):
        in_place.forward([[1]], state)
    _, foreign = _load(tmp_path / "b").forward([[1]])
    with pytest.raises(InputError, match="another model"):
        in_place.forward([[1]], foreign)
    with pytest.raises(InputError, match="not be tuple"):
        in_place.forward([[1]], (1, 2))
    with pytest.raises(InputError, match="'last' or 'all'"):
        in_place.forward([[1]], logits="first")


def test_a_prompt_in_chunks_moves_no_rows(tmp_path):
    path = fake_bundle.write(tmp_path / "b", with_tokenizer=False)
    session = WatchedSession(path)
    model = model_on(path, on_host(path, session, chunk=10))
    ids = _ids(280)
    logits, state = model.forward([ids])
    assert len(session.batches) == 28
    assert session.bound == 1
    assert state.buffer.capacity == CONTEXT
    _close(logits[0, 0], reference(ids)[-1])


def test_generating_and_feeding_do_not_disturb_each_other(in_place):
    start, end = _ids(6), _ids(5, 1)
    _, state = in_place.forward([start])
    pieces = in_place.stream(start, max_new_tokens=20)
    tokens = []
    # A step of each in turn, of states that have the same tokens.
    for position, token in enumerate(end):
        tokens += next(pieces).token_ids
        logits, state = in_place.forward([[token]], state)
        _close(logits[0, 0], reference(start + end[: position + 1])[-1])
    tokens += [token for piece in pieces for token in piece.token_ids]
    assert tokens == in_place.generate(start, max_new_tokens=20).token_ids
    logits, _ = in_place.forward([[7]], state)
    _close(logits[0, 0], reference([*start, *end, 7])[-1])


@pytest.fixture(scope="module")
def runner(tmp_path_factory):
    path = fake_bundle.write(tmp_path_factory.mktemp("bundle") / "b", with_tokenizer=False)
    return open_runner(Bundle.open(path), "cpu")


def _feed(runner, ids, state=None):
    logits, state = runner.forward([np.array(ids)], state, last_only=False)
    return logits[0], state


def test_a_decode_session_leaves_older_states_as_they_were(runner):
    start, end = _ids(6), _ids(5, 1)
    _, state = _feed(runner, start)
    first, after = _feed(runner, end[:1], state)
    session = runner.decode(after)
    branch = [3, 4, 5]
    for position, token in enumerate(branch):
        (scores,) = session.step([token])
        _close(scores, reference([*start, end[0], *branch[: position + 1]])[-1])
        # The older state is continued while the session has the rest of its buffer.
        logits, _ = _feed(runner, end, state)
        _close(logits, reference(start + end)[6:])
    np.testing.assert_array_equal(first, _feed(runner, end[:1], state)[0])


def test_a_decode_session_of_a_state_that_was_continued_copies_it(runner):
    start = _ids(6)
    _, state = _feed(runner, start)
    _, other = _feed(runner, [9], state)
    (scores,) = runner.decode(state).step([5])
    _close(scores, reference([*start, 5])[-1])
    logits, _ = _feed(runner, [8], other)
    _close(logits[0], reference([*start, 9, 8])[-1])


def test_the_state_of_a_decode_session_that_has_ended_is_continued_in_its_place(runner):
    start = _ids(6)
    _, state = _feed(runner, start)
    session = runner.decode(state)
    for token in (3, 4):
        session.step([token])
    after = session.end()
    assert after.lengths.tolist() == [8]
    logits, longer = _feed(runner, [5, 6], after)
    _close(logits, reference([*start, 3, 4, 5, 6])[8:])
    assert _addresses(longer) == _addresses(after)
    # One that never did a step gives back what it was given.
    again = runner.decode(longer).end()
    assert again.lengths.tolist() == [10]
    _close(_feed(runner, [7], again)[0][0], reference([*start, 3, 4, 5, 6, 7])[-1])


@pytest.fixture(scope="module")
def int8(tmp_path_factory):
    path = tmp_path_factory.mktemp("bundle") / "b"
    return doge_onnx.load(fake_bundle.write(path, with_tokenizer=False, dtype="int8"))


def test_rows_of_int8(int8):
    ids = _ids(CONTEXT)
    _, state = int8.forward([ids[:3]])
    for position in range(3, CONTEXT):
        logits, state = int8.forward([ids[position : position + 1]], state)
        tensors = state.buffer.tensors
        assert all(tensor.dtype == np.int8 for tensor in tensors)
        assert all(tensor[:, :, position].any() for tensor in tensors)
        assert not any(tensor[:, :, position + 1 :].any() for tensor in tensors)
    # However the text is cut, the rows are the same, and so are the logits.
    whole, _ = int8.forward([ids], logits="all")
    np.testing.assert_allclose(logits, whole[:, -1:], atol=TOLERANCE)
    likeness = [
        np.corrcoef(row, expected)[0, 1]
        for row, expected in zip(whole[0], reference(ids), strict=True)
    ]
    assert np.mean(likeness) > 0.9


def test_states_of_int8_have_value_semantics(int8):
    start = _ids(6)
    _, state = int8.forward([start])
    first, after = int8.forward([[3]], state)
    second, _ = int8.forward([[4]], state)
    again, _ = int8.forward([[3]], state)
    np.testing.assert_array_equal(first, again)
    assert (first != second).any()
    token = int(first.argmax())
    expected, _ = int8.forward([[token]], after)
    out = int8.generate([*start, 3], max_new_tokens=2).token_ids
    assert out == [token, int(expected.argmax())]


def test_padding_is_left_out_of_int8(int8):
    alone, state = int8.forward([[5, 6, 7]])
    logits, padded = int8.forward([[0, 5, 6, 7]], attention_mask=[[0, 1, 1, 1]])
    np.testing.assert_allclose(logits, alone, atol=TOLERANCE)
    np.testing.assert_allclose(
        int8.forward([[8]], padded)[0], int8.forward([[8]], state)[0], atol=TOLERANCE
    )
