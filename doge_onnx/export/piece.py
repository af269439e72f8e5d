"""A piece of the step that is one node of a graph: an operator of docs/native.md.

Knows how a piece names its tensors and attributes, and where its weights are. Does not know what
the pieces compute (`step`, `layer`) or how they become nodes (`assembly`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from doge_onnx.export.matrices import Linear, QuantizedLinear, QuantizedRows, Rows

Matrix = Linear | QuantizedLinear | Rows | QuantizedRows
Attributes = dict[str, int | float | str]


@dataclass(frozen=True)
class Parts:
    """The weights and numbers of a piece, by the names of its operator.

    Attributes:
        products: Matrices that are multiplied. The form of a quantized one (bits, block size) may
            differ from layer to layer.
        tables: Matrices that are looked up by row.
        plain: Other weights; None for one that the model lacks.
        attributes: Numbers and names that the operator needs, without the forms of matrices.
    """

    products: dict[str, Matrix]
    tables: dict[str, Matrix]
    plain: dict[str, Tensor | None]
    attributes: Attributes


class Piece(nn.Module):
    """A module that becomes one node.

    The parameters of `forward` have the names that the operator's inputs have; those that are not
    parameters of `forward` are weights. `forward` returns a tensor, or a tuple of the operator's
    outputs.

    Attributes:
        operator: Its name in docs/native.md; None for one whose operators always stand in the
            graph themselves.
        inputs: Names of all inputs, in their order.
        outputs: Names of all outputs, in their order.
    """

    operator: ClassVar[str | None] = None
    inputs: ClassVar[tuple[str, ...]]
    outputs: ClassVar[tuple[str, ...]]

    def parts(self) -> Parts:
        """The weights and numbers of this piece."""
        raise NotImplementedError

    def weights(self) -> dict[str, Tensor]:
        """All weights that this piece has, by the name of the input."""
        parts = self.parts()
        found = dict(parts.plain)
        for name, matrix in {**parts.products, **parts.tables}.items():
            prefix = prefix_of(name)
            found[name] = matrix.weight
            if isinstance(matrix, QuantizedLinear | QuantizedRows):
                found[prefix + "scales"] = matrix.scales
            if isinstance(matrix, Linear | QuantizedLinear):
                found[prefix + "bias"] = matrix.bias
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def attributes(self) -> Attributes:
        """All attributes of the node."""
        parts = self.parts()
        # Tables of one piece have the same form.
        return {
            **parts.attributes,
            **next((_form("", table) for table in parts.tables.values()), {}),
            **_forms(parts),
        }

    def forms(self) -> Attributes:
        """The attributes in which pieces of the same structure may differ."""
        return _forms(self.parts())

    def structure(self) -> object:
        """Pieces with the same structure can be calls of one function: equal if so."""
        parts = self.parts()
        products = {
            name: (matrix.weight.dtype, matrix.weight.shape[0], matrix.width)
            for name, matrix in parts.products.items()
        }
        others = {
            name: (tensor.dtype, tuple(tensor.shape))
            for name, tensor in self.weights().items()
            if name not in products and not name.endswith("scales")
        }
        quantized = {name for name in self.weights() if name.endswith("scales")}
        forms = self.forms()
        attributes = {name: value for name, value in self.attributes().items() if name not in forms}
        return type(self), products, others, quantized, attributes


def prefix_of(matrix: str) -> str:
    """What the names of a matrix's scales, bias and attributes begin with."""
    return "" if matrix in ("weight", "table") else f"{matrix}_"


def _forms(parts: Parts) -> Attributes:
    forms: Attributes = {}
    for name, matrix in parts.products.items():
        forms |= _form(prefix_of(name), matrix)
    return forms


def _form(prefix: str, matrix: Matrix) -> Attributes:
    if not isinstance(matrix, QuantizedLinear | QuantizedRows):
        return {f"{prefix}bits": 0, f"{prefix}block_size": 0}
    return {f"{prefix}bits": matrix.bits, f"{prefix}block_size": matrix.block_size}
