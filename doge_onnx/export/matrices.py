"""The matrices of a step: a linear map, a table of rows, and an embedding that is a head too.

Each exists in floating point and in quantized blocks, and both forms have the same interface: the
numbers or codes are its `weight`. Knows how
matrices are stored and which operators multiply them. Does not know how codes are chosen
(`rounding`), or which matrix gets which form (`quantize`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from doge_onnx.export.operators import Operators


def _constant(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.contiguous(), requires_grad=False)


class Linear(nn.Module):
    """x W + b with W as `[inputs, outputs]`: one MatMul, without a transpose before it."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = _constant(weight)
        self.bias = None if bias is None else _constant(bias)

    @property
    def width(self) -> int:
        """Number of inputs."""
        return self.weight.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        """`[..., inputs]` to `[..., outputs]`."""
        product = x @ self.weight.to(x.dtype)
        return product if self.bias is None else product + self.bias


class Rows(nn.Module):
    """A matrix `[rows, width]` that is looked up by row."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = _constant(weight)

    @property
    def width(self) -> int:
        """Length of a row."""
        return self.weight.shape[1]

    def forward(self, indices: Tensor) -> Tensor:
        """int64 `[...]` to `[..., width]`, in the type of the weights."""
        return F.embedding(indices, self.weight)


class Embedding(Rows):
    """The embedding of all tokens, which is also the head if the two are tied."""

    def __init__(self, weight: Tensor, operators: Operators) -> None:
        super().__init__(weight)
        self.ops = operators

    def project(self, x: Tensor) -> Tensor:
        """`[..., width]` to `[..., rows]`."""
        return self.ops.project_to_vocabulary(x, self.weight.to(x.dtype))


@dataclass(frozen=True)
class Blocks:
    """Codes and scales of a matrix `[rows, width]` whose rows are cut into blocks.

    Attributes:
        codes: uint8 `[rows, blocks, block_size * bits / 8]`; see `operators.quantized_linear`.
        scales: float32 `[rows, blocks]`.
        bits: 4 or 8.
        width: Length of a row without the padding of its last block.
    """

    codes: Tensor
    scales: Tensor
    bits: int
    width: int


class _Blocks(nn.Module):
    def __init__(self, blocks: Blocks, operators: Operators) -> None:
        super().__init__()
        self.ops = operators
        self.weight = nn.Buffer(blocks.codes.contiguous())
        self.scales = nn.Buffer(blocks.scales.contiguous())
        self.bits, self.width = blocks.bits, blocks.width

    @property
    def block_size(self) -> int:
        """Number of codes that share a scale."""
        return self.weight.shape[2] * 8 // self.bits


class QuantizedLinear(_Blocks):
    """Stands in for `Linear`; its rows are the outputs."""

    def __init__(self, blocks: Blocks, bias: Tensor | None, operators: Operators) -> None:
        super().__init__(blocks, operators)
        self.bias = None if bias is None else _constant(bias)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., inputs]` to `[..., outputs]`."""
        return self.ops.quantized_linear(
            x, self.weight, self.scales, self.bias, self.width, self.bits
        )


class QuantizedRows(_Blocks):
    """Stands in for `Rows`."""

    def forward(self, indices: Tensor) -> Tensor:
        """int64 `[...]` to `[..., width]`."""
        rows: Tensor = self.ops.quantized_rows(self.weight, self.scales, indices, self.bits)
        return rows if rows.shape[-1] == self.width else rows[..., : self.width]


class QuantizedEmbedding(QuantizedRows):
    """Stands in for `Embedding`: one copy of the codes, looked up and multiplied."""

    def project(self, x: Tensor) -> Tensor:
        """`[..., width]` to `[..., rows]`."""
        return self.ops.quantized_linear(x, self.weight, self.scales, None, self.width, self.bits)


def pack(values: Tensor, bits: int) -> Tensor:
    """Pack signed values into codes.

    Args:
        values: `[rows, blocks, block_size]`, whole numbers from -2^(bits - 1) to
            2^(bits - 1) - 1.
        bits: 4 or 8.

    Returns:
        uint8 `[rows, blocks, block_size * bits / 8]`.
    """
    codes: Tensor = (values + 2 ** (bits - 1)).to(torch.uint8)
    if bits == 4:
        codes = codes[..., ::2] | (codes[..., 1::2] << 4)
    return codes
