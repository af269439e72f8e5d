"""Traces the attention of a window state once, and puts a copy of it into each layer.

The tracer takes seconds for the hundred operators of one layer's attention, and would take minutes
for all layers of a large model. So in the step it is one operator, which becomes a node without a
kernel (`LOWERING`), and `insert` replaces each of these nodes by a subgraph. Knows how subgraphs
are copied. Does not know how a model is traced (`graph`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx
import onnx_ir as ir
import torch
from onnxscript.values import Op, Opset
from torch import Tensor, nn

from doge_onnx.export.window_attention import attend_to_window
from doge_onnx.export.window_state import WindowState

_DOMAIN, _NAME = "doge_onnx", "WindowAttention"
# Tensors that go into it and come out of it.
_INPUTS = ("q", "k", "v", "past_key", "past_value", "positions", "lift")
_OUTPUTS = ("out", "key", "value")


def _placeholder() -> Op:
    parameter = onnx.defs.OpSchema.FormalParameter
    schema = onnx.defs.OpSchema(
        _NAME,
        _DOMAIN,
        1,
        inputs=[parameter(name, f"T_{name}") for name in _INPUTS],
        outputs=[parameter(name, f"T_{name}") for name in _OUTPUTS],
        type_constraints=[
            (f"T_{name}", ["tensor(float)", "tensor(double)", "tensor(int64)"], "")
            for name in (*_INPUTS, *_OUTPUTS)
        ],
    )
    return Op(Opset(_DOMAIN, 1), _NAME, schema)


_window_attention = _placeholder()


def _lower(*arguments: Any, **sizes: int) -> Any:
    # Sizes are constants of the subgraph.
    return _window_attention(*arguments[: len(_INPUTS)])


# The lowering of the operator, as `torch.onnx.export` takes it.
LOWERING: dict[Any, Callable[..., Any]] = {torch.ops.doge_onnx.window_attention.default: _lower}


class WindowAttention(nn.Module):
    """The attention of a layer without its weights, to be traced.

    Args:
        state: The state of the step.
    """

    inputs = _INPUTS
    outputs = _OUTPUTS

    def __init__(self, state: WindowState) -> None:
        super().__init__()
        self._sizes = state.sizes

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        past_key: Tensor,
        past_value: Tensor,
        positions: Tensor,
        lift: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `attend_to_window`."""
        return attend_to_window(q, k, v, past_key, past_value, positions, lift, *self._sizes)


def insert(model: ir.Model, attention: ir.Model) -> None:
    """Replace each node without a kernel by a copy of the graph of `WindowAttention`.

    All copies share its constants, which become the model's, and what does not depend on a layer.
    """
    for name, value in list(attention.graph.initializers.items()):
        attention.graph.initializers.pop(name)
        value.name = f"window_attention.{name}"
        model.graph.register_initializer(value)
    nodes = [node for node in model.graph if (node.domain, node.op_type) == (_DOMAIN, _NAME)]
    common = _common_nodes(attention.graph, nodes)
    copied: dict[ir.Value | None, ir.Value | None] = {}
    for number, node in enumerate(nodes):
        copied.update(zip(attention.graph.inputs, node.inputs, strict=True))
        copies = [
            _copy(original, copied, f"layer_{number}.")
            for original in attention.graph
            if number == 0 or original not in common
        ]
        results = [copied[value] for value in attention.graph.outputs]
        ir.convenience.replace_nodes_and_values(
            model.graph, node, [node], copies, node.outputs, [r for r in results if r is not None]
        )
    model.opset_imports.pop(_DOMAIN, None)


def _common_nodes(attention: ir.Graph, places: list[ir.Node]) -> set[ir.Node]:
    """The nodes whose results are the same in each of the places.

    Those are shapes, since all layers have the same ones, and what is computed from them, from
    constants and from inputs that all layers share.
    """
    known = {
        value
        for value, *given in zip(attention.inputs, *(node.inputs for node in places), strict=True)
        if len(set(given)) == 1
    }
    common: set[ir.Node] = set()
    for node in attention:
        if node.op_type == "Shape" or all(
            value is None or value in known or value.const_value is not None
            for value in node.inputs
        ):
            common.add(node)
            known.update(node.outputs)
    return common


def _copy(node: ir.Node, copied: dict[ir.Value | None, ir.Value | None], prefix: str) -> ir.Node:
    """Copy a node whose inputs are copied already, and note the copies of its outputs."""
    outputs = [
        ir.Value(name=f"{prefix}{value.name}", type=value.type, shape=value.shape)
        for value in node.outputs
    ]
    copied.update(zip(node.outputs, outputs, strict=True))
    return ir.Node(
        node.domain,
        node.op_type,
        [copied.get(value, value) for value in node.inputs],
        node.attributes.values(),
        outputs=outputs,
        version=node.version,
    )
