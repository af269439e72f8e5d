"""Matrices in the forms that a graph may hold, with what they stand for in float64."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from single_node import floats

Array = NDArray[Any]

UNQUANTIZED = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
CODES = [(bits, block) for bits in (8, 4) for block in (16, 32, 64, 128, 256)]
FORMS = [*UNQUANTIZED, *CODES]


def matrix(
    rng: np.random.Generator, form: Any, inputs: int, outputs: int, table: bool = False
) -> tuple[Array, Array | None, dict[str, int], Array]:
    """A random matrix.

    Args:
        rng: Where its numbers are from.
        form: One of `FORMS`: an element type, or bits and block size.
        inputs: K.
        outputs: N.
        table: Whether an unquantized matrix is `[N, K]`.

    Returns:
        The weight, its scales or None, the attributes, and its values in float64 `[K, N]`.
    """
    if form in UNQUANTIZED:
        weight = floats(rng, inputs, outputs).astype(UNQUANTIZED[form])
        values = weight.astype(np.float64)
        return (weight.T.copy() if table else weight), None, {"bits": 0, "block_size": 0}, values
    bits, block = form
    blocks = -(-inputs // block)
    codes = rng.integers(0, 2**bits, (outputs, blocks, block), dtype=np.uint8)
    # The extremes, where sums of pairs overflow first.
    codes[:, :, :4] = rng.choice([0, 2**bits - 1], (outputs, blocks, 4))
    scales = (rng.random((outputs, blocks)) * 0.02 + 0.001).astype(np.float32)
    values = (codes.astype(np.float64) - 2 ** (bits - 1)) * scales[..., np.newaxis]
    values = values.reshape(outputs, -1)[:, :inputs].T
    packed = codes if bits == 8 else codes[..., ::2] | (codes[..., 1::2] << 4)
    return packed, scales, {"bits": bits, "block_size": block}, values
