"""What a loaded bundle computes, in pieces and in a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
from checkpoints import assert_close
from numpy.typing import NDArray
from stepping import fresh_text, pad

from doge_onnx import Model


def in_pieces(model: Model, ids: list[int], cuts: Iterable[int]) -> NDArray[np.float32]:
    """Logits `[S, V]` of a text that is fed in pieces, which end at `cuts`."""
    rows, state = [], None
    for piece in np.split(np.array([ids]), list(cuts), axis=1):
        logits, state = model.forward(piece, state, logits="all")
        rows.append(logits[0])
    return np.concatenate(rows)


def assert_batch_close(
    model: Model, truth: Callable[[list[int]], NDArray[np.floating]], vocab_size: int
) -> None:
    """Feed three unequal texts as a batch, the last tokens one by one, and compare the logits.

    Args:
        model: What is looked at.
        truth: Logits `[S, V]` of one text.
        vocab_size: Of its tokens.
    """
    texts = [fresh_text(length, vocab_size, seed=length) for length in (48, 10, 33)]
    ids, mask = (tensor.numpy() for tensor in pad([text[:-3] for text in texts]))
    logits, state = model.forward(ids, attention_mask=mask, logits="all")
    rows = [logits]
    for column in (-3, -2, -1):
        logits, state = model.forward([[text[column]] for text in texts], state)
        rows.append(logits)
    for got, text in zip(np.concatenate(rows, axis=1), texts, strict=True):
        assert_close(got[-len(text) :], truth(text))
