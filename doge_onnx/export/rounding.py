"""Choose the codes of a matrix: how its numbers are rounded to few bits.

Knows the error of rounding and how to compensate for it. Knows nothing of models, files or
graphs. Rounding is symmetric, as the fast kernels on Arm require: a number is its code times the
scale of its block, without a zero point.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from doge_onnx.export.matrices import Blocks, pack

# Added to the Hessian, as a part of the inputs' mean square: keeps it invertible when inputs are
# linearly dependent.
_DAMPING = 0.01
# How often all scales and codes are visited again; more changes the loss by less than 1 percent.
_REFINEMENTS = 3
# Number of columns whose errors are passed on together; changes only the speed.
_PANEL = 128
# Scales to try, relative to the one that just reaches the largest number of a block. With 16 steps
# a smaller scale, which clips that number, may lose less; with 256 steps it does not.
TRIED_SCALES = {4: torch.linspace(0.7, 1.05, 15), 8: torch.ones(1)}
# Number of matrix elements in one piece of the search, to bound its memory.
_SEARCHED = 2**22


def nearest(weight: Tensor, bits: int, block_size: int, importance: Tensor | None = None) -> Blocks:
    """Round each number to the nearest code, with the scales of the least squared error.

    Args:
        weight: float32 `[rows, width]`.
        bits: 4 or 8.
        block_size: Numbers that share a scale.
        importance: `[width]`, weights of the squared errors; None for equal ones.
    """
    scales = _search(weight, bits, block_size, importance)
    values = _round(_cut(weight, block_size), scales.unsqueeze(-1), bits)
    return Blocks(pack(values, bits), scales, bits, weight.shape[1])


def compensated(weight: Tensor, bits: int, block_size: int, moments: Tensor) -> Blocks:
    """Round column by column, and let the columns that follow compensate for each error (GPTQ).

    Frantar et al. 2023. Columns are taken in the order of their inputs' power, the largest
    first, and scales are chosen beforehand. Minimises the error of the product with typical
    inputs, not that of the single numbers. With 4 bits, `_refine` then lowers that error further;
    with 8 bits there is next to nothing to gain.

    Args:
        weight: float32 `[rows, width]`.
        bits: 4 or 8.
        block_size: Numbers that share a scale.
        moments: `[width, width]`, sum of x xᵀ over typical inputs x.
    """
    rows, width = weight.shape
    power = moments.diagonal().double()
    order = power.argsort(descending=True, stable=True)
    damping = _DAMPING * power.mean().clamp(min=1e-12)
    # Damped as well, so that a block whose inputs are all 0 gets sensible scales.
    scales = _search(weight, bits, block_size, (power + damping).float())
    damped = moments.double().clone()
    damped.diagonal().add_(damping)
    hessian = damped[order][:, order]
    # An input that is always 0 causes no error to compensate for.
    hessian.diagonal()[power[order] == 0] = 1.0
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    factor = torch.linalg.cholesky(inverse, upper=True).float()

    # Transposed, so that a column is contiguous in memory.
    rest = weight.T[order].clone()
    scale_rows = scales.T[order // block_size]
    values = torch.empty(width, rows)
    for start in range(0, width, _PANEL):
        end = min(start + _PANEL, width)
        errors = torch.empty(end - start, rows)
        for column in range(start, end):
            values[column] = _round(rest[column], scale_rows[column], bits)
            error = (rest[column] - values[column] * scale_rows[column]) / factor[column, column]
            rest[column:end] -= factor[column, column:end].unsqueeze(-1) * error
            errors[column - start] = error
        rest[end:] -= factor[start:end, end:].T @ errors
    unordered = torch.empty_like(values)
    unordered[order] = values
    if bits == 4:
        scales = _refine(weight, unordered, scales, block_size, damped.float(), order)
    return Blocks(pack(_cut(unordered.T, block_size), bits), scales, bits, width)


def _refine(
    weight: Tensor,
    values: Tensor,
    scales: Tensor,
    block_size: int,
    hessian: Tensor,
    order: Tensor,
) -> Tensor:
    """Lower the error of a product by coordinate descent: each scale, then each code, in turns.

    Each step sets one number to its best value while all others stay, so the error never grows.

    Args:
        weight: float32 `[rows, width]`.
        values: `[width, rows]`, signed codes of 4 bits; is changed.
        scales: `[rows, blocks]`.
        block_size: Numbers that share a scale.
        hessian: `[width, width]`, damped moments of the inputs.
        order: `[width]`, the columns in the order in which codes are visited.

    Returns:
        The new scales.
    """
    width = weight.shape[1]
    steps = scales.T.repeat_interleave(block_size, dim=0)[:width].clone()
    error = weight.T - values * steps
    # Half of the derivative of the squared error by each number.
    slope = hessian @ error
    for _ in range(_REFINEMENTS):
        for start in range(0, width, block_size):
            block = slice(start, start + block_size)
            power = (values[block] * (hessian[block, block] @ values[block])).sum(0)
            change = (values[block] * slope[block]).sum(0) / power
            # A block of zeros needs no scale.
            change = torch.where(power > 0, change, 0.0)
            steps[block] += change
            error[block] -= change * values[block]
            slope -= hessian[:, block] @ (change * values[block])
        for panel in order.split(_PANEL):
            inner, inside = hessian[panel][:, panel], slope[panel]
            before, sizes, codes = error[panel], steps[panel], values[panel]
            after = before.clone()
            for column in range(len(panel)):
                best = codes[column] * sizes[column] + inside[column] / inner[column, column]
                code = _round(best, sizes[column], 4)
                code = torch.where(code.isfinite(), code, codes[column])
                change = (codes[column] - code) * sizes[column]
                codes[column] = code
                after[column] += change
                inside += inner[:, column].unsqueeze(-1) * change
            values[panel], error[panel] = codes, after
            slope += hessian[:, panel] @ (after - before)
    return steps[::block_size].T.contiguous()


def _search(weight: Tensor, bits: int, block_size: int, importance: Tensor | None) -> Tensor:
    """The scales `[rows, blocks]` with the least weighted squared error."""
    weights = torch.ones(1, weight.shape[1]) if importance is None else importance.unsqueeze(0)
    weights = _cut(weights, block_size)
    rows = max(1, _SEARCHED // weight.shape[1])
    parts = [_search_part(part, bits, block_size, weights) for part in weight.split(rows)]
    return torch.cat(parts)


def _search_part(weight: Tensor, bits: int, block_size: int, weights: Tensor) -> Tensor:
    cut = _cut(weight, block_size)
    index = cut.abs().argmax(dim=-1, keepdim=True)
    # There is one more step below zero than above. The largest number gets it, whatever its sign,
    # so a scale may be negative.
    reach = cut.gather(-1, index) / -(2 ** (bits - 1))
    reach = torch.where(reach == 0, 1.0, reach)
    best, least = reach, torch.full_like(reach, torch.inf)
    for part in TRIED_SCALES[bits].tolist():
        scale = reach * part
        values = _round(cut, scale, bits)
        # The best scale for these values, by least squares.
        power = (weights * values * values).sum(-1, keepdim=True)
        fitted = (weights * cut * values).sum(-1, keepdim=True) / power
        scale = torch.where(fitted.isfinite() & (fitted != 0), fitted, scale)
        error = cut - _round(cut, scale, bits) * scale
        error = (weights * error * error).sum(-1, keepdim=True)
        better = error < least
        best, least = torch.where(better, scale, best), torch.where(better, error, least)
    return best.squeeze(-1)


def _round(numbers: Tensor, scale: Tensor, bits: int) -> Tensor:
    limit = 2 ** (bits - 1)
    return (numbers / scale).round().clamp(-limit, limit - 1)


def _cut(matrix: Tensor, block_size: int) -> Tensor:
    """`[rows, width]` to `[rows, blocks, block_size]`, the last block filled with zeros."""
    padded = F.pad(matrix, (0, -matrix.shape[1] % block_size))
    blocks: Tensor = padded.unflatten(-1, (-1, block_size))
    return blocks
