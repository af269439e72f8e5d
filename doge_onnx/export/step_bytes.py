"""Counts the bytes of weights that a graph reads in a decode step.

Knows which inputs of which operators are tables, of which a step reads only some rows. Does not
know what the weights mean, and does not count the rows of the state, which a step reads as well.
"""

from __future__ import annotations

import math

import onnx_ir as ir

from doge_onnx.manifest import WeightsRead

# For each operator, the inputs of which it reads only some rows: embeddings, experts and their
# scales, rotary tables, and the numbers of new columns. Another input says which rows.
_TABLES = {
    "Positions": {3},
    "Embed": {1, 2},
    "ProjectHeads": {10, 11},
    "Experts": {3, 4, 5, 6},
    "Slice": {0},
    "Gather": {0},
    "GatherBlockQuantized": {0, 2, 3},
    "RotaryEmbedding": {2, 3},
    "GroupQueryAttention": {7, 8},
}
# For each operator, the input with the indices of the rows. The other operators read one row for
# each token.
_INDICES = {"Gather": 1, "GatherBlockQuantized": 1}


def weights_read(model: ir.Model) -> WeightsRead:
    """Count the bytes of weights that a decode step of `model` reads.

    Must be called before the model is saved. ONNX Runtime computes once, when it loads the graph,
    what depends on weights alone. A node that looks up rows in such a result counts as one that
    looks them up in the weight itself.
    """
    weights = [value for value in model.graph.initializers.values() if not value.is_graph_input()]
    constants = set(weights)
    for node in model.graph:
        if all(value is None or value in constants for value in node.inputs):
            constants.update(node.outputs)
    whole = per_token = 0
    for weight in weights:
        assert weight.const_value is not None
        size, shape = weight.const_value.nbytes, weight.const_value.shape.numpy()
        rows = _rows_per_token(weight, constants)
        if rows is None:
            whole += size
        else:
            per_token += rows * size // (shape[0] if shape else 1)
    return WeightsRead(whole, per_token)


def _rows_per_token(value: ir.Value, constants: set[ir.Value]) -> int | None:
    """How many rows of a constant each token looks up; None if a node reads all of it."""
    most = 0
    for node, number in value.uses():
        if node.outputs[0] in constants:
            rows = _rows_per_token(node.outputs[0], constants)
        elif number in _TABLES.get(node.op_type, ()):
            rows = _looked_up(node)
        else:
            rows = None
        if rows is None:
            return None
        most = max(most, rows)
    return most


def _looked_up(node: ir.Node) -> int:
    """How many rows of a table an operator looks up for each token."""
    if node.op_type == "Experts":
        return node.attributes["experts_per_token"].as_int()
    if node.op_type not in _INDICES:
        return 1
    indices = node.inputs[_INDICES[node.op_type]]
    assert indices is not None
    assert indices.shape is not None
    # The axes of batch and sequence have names; axes with a number belong to each token.
    return math.prod(size for size in indices.shape if isinstance(size, int))
