"""The graph's input `past_lengths`, fed by hand: each row of a batch has a length of its own.

With onnxruntime alone, since the contract is for whoever runs the graph (docs/formats.md). The
truth is what the same graph computes without the input. Each text has a batch for that, of nothing
but its copies, so that products with weights have as many rows and are equal to the last bit.
"""

from __future__ import annotations

import numpy as np
import older_checkpoints
import onnxruntime as ort
import pytest
from stepping import random_text

CAPACITY = 40
VOCABULARY = older_checkpoints.SMALL["vocab_size"]
# What is in rows that nothing was written to.
JUNK = 9
TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int8)": np.int8}

PLAIN = {"layout": "native", "num_hidden_layers": 1}
# Each row is longer than this.
NARROW = PLAIN | {"keep_window_size": 6}
MIXTURE = PLAIN | {"is_moe": True, "num_experts": 16, "num_experts_per_tok": 3}
OLDER = {"layout": "older", "num_hidden_layers": 1, "attention_bias": True, "mlp_bias": True}
INT8_STATE = {"kv_cache": "int8"}
CUDA = {"device": "cuda"}


def weights(precision):
    return {"precision": precision, "rounding": "nearest"}


# Checkpoints and options of the export.
KINDS = {
    "fp32": ({"layout": "native"}, {}),
    "int8 state": (PLAIN, INT8_STATE),
    "int8 weights": (PLAIN, weights("int8")),
    "int4 weights": (PLAIN, weights("int4")),
    "mixture": (MIXTURE, {}),
    "older": (OLDER, {}),
    "past the window": (NARROW, {}),
    "past the window, older": (OLDER | {"keep_window_size": 6}, {}),
    "fp16": ({"layout": "native"}, CUDA),
    "fp16, int8 state": (PLAIN, CUDA | INT8_STATE),
    "fp16, int4 weights": (PLAIN, CUDA | weights("int4")),
    "fp16, mixture": (MIXTURE, CUDA),
    "fp16, older": (OLDER, CUDA),
    "fp16, past the window": (NARROW, CUDA),
}


class Graph:
    """The graph of a bundle, fed by hand."""

    def __init__(self, path):
        self._session = ort.InferenceSession(path / "model.onnx")
        self._past = [entry for entry in self._session.get_inputs() if "past" in entry.name]

    def rows(self, batch, count):
        """A state of junk."""
        _, heads, _, width = self._past[0].shape
        dtype = TYPES[self._past[0].type]
        return [np.full((batch, heads, count, width), JUNK, dtype) for _ in self._past]

    def run(self, ids, mask, state):
        """Logits and the next state, without `past_lengths`."""
        feeds = {"input_ids": np.array(ids), "attention_mask": mask}
        feeds |= {entry.name: rows for entry, rows in zip(self._past, state, strict=True)}
        logits, *state = self._session.run(None, feeds)
        return logits, state

    def run_in_place(self, ids, mask, buffers, past_lengths):
        """Logits; what is written to the state goes to `buffers`."""
        binding = self._session.io_binding()
        inputs = {"input_ids": np.array(ids), "attention_mask": mask}
        if past_lengths is not None:
            inputs["past_lengths"] = np.array(past_lengths, np.int64)
        inputs |= {entry.name: rows for entry, rows in zip(self._past, buffers, strict=True)}
        for name, array in inputs.items():
            where = ("cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
            binding.bind_input(name, *where)
            if name.startswith("past_key_values"):
                binding.bind_output(name.replace("past_key_values", "present"), *where)
        binding.bind_output("logits", "cpu")
        self._session.run_with_iobinding(binding)
        (logits,) = (value for value in binding.get_outputs() if len(value.shape()) == 3)
        return logits.numpy()

    def copies(self, text, batch, cut):
        """Logits after each token from the index `cut` on, and all rows, of a batch of one text.

        Without `past_lengths`: the text up to `cut`, and then one token at a time.
        """
        ids = np.tile(np.array(text), (batch, 1))
        logits, state = self.run(ids[:, :cut], ones(batch, cut), self.rows(batch, 0))
        every = [logits[0, -1:]]
        for end in range(cut + 1, len(text) + 1):
            logits, state = self.run(ids[:, end - 1 : end], ones(batch, end), state)
            every.append(logits[0])
        return np.concatenate(every), [rows[0] for rows in state]


def ones(batch, columns):
    return np.ones((batch, columns), np.int64)


@pytest.fixture(scope="module", params=KINDS)
def graph(request, make_bundle, tmp_path_factory):
    fields, options = KINDS[request.param]
    checkpoint = tmp_path_factory.mktemp("checkpoint")
    older_checkpoints.make(checkpoint, seed=3, **fields)
    return Graph(make_bundle(checkpoint, verify=False, context_length=CAPACITY, **options).path)


# How many tokens of each row are there before the steps, and how many steps follow.
LENGTHS, STEPS = (12, 1, 7), 4


@pytest.fixture
def texts():
    return [random_text(n + STEPS, VOCABULARY, seed=n) for n in LENGTHS]


@pytest.fixture
def alone(graph, texts):
    """What each text gets alone: logits `[1 + STEPS, V]`, and its rows."""
    pairs = zip(texts, LENGTHS, strict=True)
    return [graph.copies(text, len(texts), length) for text, length in pairs]


@pytest.fixture
def buffers(graph, alone):
    """A buffer with the rows of all texts but for the steps, and junk behind them."""
    tensors = graph.rows(len(alone), CAPACITY)
    for row, (length, (_, state)) in enumerate(zip(LENGTHS, alone, strict=True)):
        for tensor, rows in zip(tensors, state, strict=True):
            tensor[row, :, :length] = rows[:, :length]
    return tensors


def check_rows(buffers, alone, more):
    """Check that a buffer has the rows of each text, `more` behind LENGTHS, and junk behind."""
    for row, (length, (_, state)) in enumerate(zip(LENGTHS, alone, strict=True)):
        for tensor, rows in zip(buffers, state, strict=True):
            end = length + more
            np.testing.assert_array_equal(tensor[row, :, :end], rows[:, :end])
            np.testing.assert_array_equal(tensor[row, :, end:], JUNK)


# A mask may have as many columns as the buffer has rows, or just those that are needed.
@pytest.mark.parametrize("columns", [CAPACITY, max(LENGTHS) + STEPS])
def test_each_row_gets_what_it_gets_alone(graph, texts, alone, buffers, columns):
    lengths = np.array(LENGTHS)
    for step in range(STEPS):
        ids = [[text[length]] for text, length in zip(texts, lengths, strict=True)]
        logits = graph.run_in_place(ids, ones(3, columns), buffers, lengths)
        lengths += 1
        for got, (truth, _) in zip(logits, alone, strict=True):
            np.testing.assert_array_equal(got[0], truth[1 + step])
        check_rows(buffers, alone, step + 1)


def test_columns_behind_the_new_tokens_may_hold_anything(graph, texts, alone, buffers):
    mask = ones(3, CAPACITY)
    for row, length in enumerate(LENGTHS):
        mask[row, length + 1 :] = np.arange(CAPACITY - length - 1) % 2
    ids = [[text[length]] for text, length in zip(texts, LENGTHS, strict=True)]
    logits = graph.run_in_place(ids, mask, buffers, LENGTHS)
    for got, (truth, _) in zip(logits, alone, strict=True):
        np.testing.assert_array_equal(got[0], truth[1])


def test_lengths_that_are_wrong_or_left_out_show(graph, texts, alone, buffers):
    # Otherwise everything above would pass with a graph that does not look at them.
    ids = [[text[length]] for text, length in zip(texts, LENGTHS, strict=True)]
    for lengths in (None, [max(LENGTHS)], [length - 1 for length in LENGTHS]):
        logits = graph.run_in_place(ids, ones(3, max(LENGTHS) + 1), buffers, lengths)
        for row in (1, 2):
            truth = alone[row][0][1]
            assert np.abs(logits[row, 0] - truth).max() > 0.05 * np.abs(truth).max()


def test_a_sequence_at_its_start_stands_beside_others(graph, texts, alone, buffers):
    # Its only token has nothing before it, whatever is in its rows.
    ids = [[text[length]] for text, length in zip(texts, LENGTHS, strict=True)]
    ids[0] = [texts[0][0]]
    logits = graph.run_in_place(ids, ones(3, CAPACITY), buffers, [0, *LENGTHS[1:]])
    first, _ = graph.copies(texts[0][:1], 3, 1)
    np.testing.assert_allclose(logits[0], first, atol=2e-2 * np.abs(first).max())
    for row in (1, 2):
        np.testing.assert_array_equal(logits[row, 0], alone[row][0][1])


def test_one_length_serves_any_batch(graph):
    batch = np.array([random_text(9, VOCABULARY, seed=seed) for seed in range(3)])
    truth, state = graph.run(batch[:, :8], ones(3, 8), graph.rows(3, 0))
    buffers = graph.rows(3, CAPACITY)
    for tensor, rows in zip(buffers, state, strict=True):
        tensor[:, :, :8] = rows
    truth, rows = graph.run(batch[:, 8:], ones(3, 9), state)
    for lengths in ([8], [8, 8, 8]):
        logits = graph.run_in_place(batch[:, 8:], ones(3, CAPACITY), buffers, lengths)
        np.testing.assert_array_equal(logits, truth)
        for tensor, expected in zip(buffers, rows, strict=True):
            np.testing.assert_array_equal(tensor[:, :, :9], expected)
    # And so do numbers beyond the end: the tokens are the last ones of the mask.
    logits = graph.run_in_place(batch[:, 8:], ones(3, 9), buffers, [2**31 - 1])
    np.testing.assert_array_equal(logits, truth)


def test_several_tokens_of_one_sequence_go_behind_its_past(graph):
    text = random_text(16, VOCABULARY)
    _, state = graph.run([text[:9]], ones(1, 9), graph.rows(1, 0))
    truth, rows = graph.run([text[9:]], ones(1, 16), state)
    buffers = graph.rows(1, CAPACITY)
    for tensor, past in zip(buffers, state, strict=True):
        tensor[:, :, :9] = past
    logits = graph.run_in_place([text[9:]], ones(1, CAPACITY), buffers, [9])
    np.testing.assert_array_equal(logits, truth)
    for tensor, expected in zip(buffers, rows, strict=True):
        np.testing.assert_array_equal(tensor[:, :, :16], expected)
        np.testing.assert_array_equal(tensor[:, :, 16:], JUNK)


def test_sequences_at_their_start_are_filled_up_on_the_right(graph, texts, alone):
    prompts = [text[:length] for text, length in zip(texts, LENGTHS, strict=True)]
    longest = max(LENGTHS)
    ids = [prompt + [0] * (longest - len(prompt)) for prompt in prompts]
    buffers = graph.rows(3, CAPACITY)
    logits = graph.run_in_place(ids, ones(3, longest), buffers, [0, 0, 0])
    for got, length, (truth, _) in zip(logits, LENGTHS, alone, strict=True):
        np.testing.assert_allclose(got[length - 1], truth[0], atol=2e-2 * np.abs(truth).max())
    # The next step writes over what filled them up.
    ids = [[text[length]] for text, length in zip(texts, LENGTHS, strict=True)]
    logits = graph.run_in_place(ids, ones(3, CAPACITY), buffers, LENGTHS)
    for got, (truth, _) in zip(logits, alone, strict=True):
        np.testing.assert_allclose(got[0], truth[1], atol=2e-2 * np.abs(truth).max())


def test_padding_and_lengths_go_together(graph):
    # As other software has it: padding inside of the rows that are there.
    ids = np.array([random_text(12, VOCABULARY, seed=seed) for seed in range(3)])
    mask = ones(3, CAPACITY)
    mask[0, :4] = mask[1, :2] = mask[2, 5:7] = 0
    _, state = graph.run(ids[:, :8], mask[:, :8], graph.rows(3, 0))
    buffers = graph.rows(3, CAPACITY)
    for tensor, rows in zip(buffers, state, strict=True):
        tensor[:, :, :8] = rows
    for column in range(8, 12):
        new = ids[:, column : column + 1]
        truth, state = graph.run(new, mask[:, : column + 1], state)
        logits = graph.run_in_place(new, mask, buffers, [column])
        np.testing.assert_array_equal(logits, truth)
