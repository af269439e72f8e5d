"""Checks the arguments of `Model.forward` and converts them to arrays.

Knows token ids, masks, states and the limits of the model. Does not know text or how the graph is
run.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from doge_onnx.errors import InputError
from doge_onnx.runtime.engine.state import State


def token_matrix(input_ids: ArrayLike, vocab_size: int) -> NDArray[np.int64]:
    """Token ids as a C-contiguous int64 array `[B, S]`.

    Raises:
        InputError: `input_ids` is not a matrix of whole numbers, is empty, or holds an id that is
            not in `range(vocab_size)`.
    """
    ids = _integers(input_ids, "input_ids")
    if ids.ndim == 1 and ids.size:
        raise InputError(
            "input_ids must be [batch_size, sequence_length]; for one sequence pass [ids]"
        )
    if ids.size == 0:
        raise InputError("input_ids is empty; at least one token id is needed")
    if ids.ndim != 2:
        raise InputError(
            f"input_ids must be [batch_size, sequence_length], not of shape {list(ids.shape)}"
        )
    outside = (ids < 0) | (ids >= vocab_size)
    if outside.any():
        row, column = np.argwhere(outside)[0]
        raise InputError(
            f"token id {ids[row, column]} in row {row}, position {column} is outside the "
            f"vocabulary of {vocab_size} ids (0 to {vocab_size - 1})"
        )
    return np.ascontiguousarray(ids, np.int64)


def token_mask(attention_mask: ArrayLike | None, shape: tuple[int, ...]) -> NDArray[np.bool] | None:
    """The mask of the new ids as bool of `shape`, True for a token; None if there is no mask.

    Raises:
        InputError: The mask has another shape, holds a value other than 0 and 1, or no 1.
    """
    if attention_mask is None:
        return None
    mask = _integers(attention_mask, "attention_mask", booleans=True)
    if mask.shape != shape:
        raise InputError(
            f"attention_mask is for the new tokens and must have the shape of input_ids, "
            f"{list(shape)}, not {list(mask.shape)}"
        )
    if ((mask != 0) & (mask != 1)).any():
        raise InputError("attention_mask must hold 1 for a token and 0 for padding only")
    if not mask.any():
        raise InputError("attention_mask holds no 1: at least one token is needed")
    return mask.astype(bool)


def check_room(lengths: NDArray[np.int64], context_length: int) -> None:
    """Check that sequences of `lengths` tokens, int64 `[B]`, fit into the context.

    Raises:
        InputError: A sequence is longer than the context.
    """
    longest = int(lengths.max())
    if longest > context_length:
        raise InputError(
            f"row {int(lengths.argmax())} would have {longest} tokens, more than the context "
            f"length of {context_length}"
        )


def check_state(state: State | None, batch: int, owner: object) -> None:
    """Check that the runner `owner` can continue `state` with `batch` sequences.

    Raises:
        InputError: `state` is not a state, comes from another model, or has another batch size.
    """
    if state is None:
        return
    if not isinstance(state, State):
        raise InputError(f"state must come from an earlier forward, not be {type(state).__name__}")
    if not state.belongs_to(owner):
        raise InputError("this state was made by another model; it cannot be continued here")
    if state.batch_size != batch:
        raise InputError(
            f"this state is of {state.batch_size} sequences, but input_ids has {batch} rows"
        )


def _integers(value: ArrayLike, name: str, booleans: bool = False) -> NDArray[Any]:
    """`value` as an array of integers, or of bools too if `booleans`.

    Raises:
        InputError: It holds something else, or its rows have unequal lengths.
    """
    try:
        array = np.asarray(value)
    except (ValueError, OverflowError):  # rows of unequal length
        raise InputError(f"{name} must be a matrix; its rows have unequal lengths") from None
    if array.size and array.dtype.kind not in ("iub" if booleans else "iu"):
        raise InputError(f"{name} must hold whole numbers, not {array.dtype.name}")
    return array
