"""Builds a graph from the pieces of a step, each of which is traced once.

The tracer takes seconds for all layers of a small model, and minutes for those of a large one. So
only one piece of each structure is traced, and the chain of pieces is taken from one run of the
step. Where the target has the operators of docs/native.md, a piece becomes a node that calls a
function; elsewhere, a copy of the function's body. Knows tracing, functions and copies. Does not
know which inputs and outputs a graph has (`graph`) or what the pieces compute.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

# torch.onnx imports this inside a `try` whose handler imports it again, so that Ctrl-C during the
# import would become an error of torch.
import torch._dynamo
from onnx_ir.passes.common import CommonSubexpressionEliminationPass, RemoveUnusedNodesPass
from onnx_ir.tensor_adapters import TorchTensor
from torch import Tensor, nn
from torch.export import Dim

from doge_onnx.export.lowering import MICROSOFT, Target
from doge_onnx.export.piece import Piece, prefix_of
from doge_onnx.export.step import RecurrentStep

DOMAIN = "doge_onnx"
BATCH, LENGTH = "batch_size", "sequence_length"
_TOKENS = {0: BATCH, 1: LENGTH}
_PAST = {0: BATCH, 2: "past_sequence_length"}
# The axes of the pieces' inputs whose sizes a graph must not fix. Those that are missing here have
# the axes of tokens.
_AXES: dict[str, dict[int, str]] = {
    "attention_mask": {0: BATCH, 1: "total_sequence_length"},
    "past_lengths": {0: "past_lengths_size"},
    "past_key": _PAST,
    "past_value": _PAST,
    "cos": {0: "rotations"},
    "sin": {0: "rotations"},
    "lengths": {0: BATCH},
    "total_length": {},
    "logits_to_keep": {},
}


@dataclass(frozen=True)
class _Call:
    """One call of a piece: the tensors that it was given and that it returned, by name."""

    path: str
    piece: Piece
    given: dict[str, Tensor]
    results: dict[str, Tensor]


@dataclass(frozen=True)
class _Body:
    """The nodes of a traced piece, and the names of its inputs (weights among them) and outputs."""

    nodes: list[ir.Node]
    inputs: dict[ir.Value, str]
    outputs: dict[ir.Value, str]


@dataclass(frozen=True)
class _Traced:
    """The bodies of a step's pieces, by their structures."""

    bodies: list[tuple[object, _Body]]
    opsets: dict[str, int]

    def body_of(self, piece: Piece) -> _Body:
        structure = piece.structure()
        return next(body for known, body in self.bodies if known == structure)


def assemble(
    step: RecurrentStep,
    args: Sequence[object],
    inputs: Sequence[tuple[Tensor, ir.Value]],
    target: Target,
    functions: bool,
) -> ir.Model:
    """Build the graph of a step.

    Args:
        step: The step, built from the operators of the target.
        args: Arguments of the step, to run it once.
        inputs: The tensors in `args`, each with the graph's input that it stands for.
        target: The target of the export.
        functions: Whether pieces become calls of functions. If the pieces of two layers do not fit
            the same function, the later ones become copies of their bodies.

    Returns:
        A model with these inputs, whose outputs are the logits, and the key and value of each
        layer. Outputs have no shapes.
    """
    calls, (logits, present) = _record(step, args)
    traced = _trace(calls, target)
    graph = ir.Graph(
        [value for _, value in inputs], [], nodes=[], opset_imports=traced.opsets, name="step"
    )
    names = {
        id(tensor): name for name, tensor in chain(step.named_parameters(), step.named_buffers())
    }
    values = {id(tensor): value for tensor, value in inputs}

    def find(tensor: Tensor) -> ir.Value:
        if id(tensor) not in values:
            name = names[id(tensor)]
            values[id(tensor)] = _initializer(graph, name, TorchTensor(tensor.detach(), name=name))
        return values[id(tensor)]

    made: dict[str, tuple[_Body, ir.Function]] = {}
    for call in calls:
        piece, body = call.piece, traced.body_of(call.piece)
        given = {name: find(tensor) for name, tensor in (call.given | piece.weights()).items()}
        results = {
            name: ir.Value(name=f"{call.path}/{name}", type=value.type, shape=value.shape)
            for value, name in body.outputs.items()
        }
        operator = piece.operator if functions else None
        if operator is not None and operator not in made:
            made[operator] = body, _function(operator, piece, body, traced.opsets)
        if operator is not None and made[operator][0] is body:
            graph.append(_call(operator, piece, given, results))
        else:
            graph.extend(_copies(graph, body, given, results, f"{call.path}/body/"))
        values |= {id(call.results[name]): value for name, value in results.items()}
    graph.outputs.extend(values[id(tensor)] for tensor in (logits, *chain(*present)))
    if made:
        graph.opset_imports[DOMAIN] = 1
    model = ir.Model(graph, ir_version=10, functions=[function for _, function in made.values()])
    _unify_sizes(graph, graph.inputs)
    # What is the same in every layer, such as shapes.
    CommonSubexpressionEliminationPass()(model)
    RemoveUnusedNodesPass()(model)
    return model


def _record(step: RecurrentStep, args: Sequence[object]) -> tuple[list[_Call], Any]:
    """Run a step, and note what its pieces are given and return."""
    calls: list[_Call] = []
    paths = {module: path for path, module in step.named_modules()}

    def note(piece: nn.Module, positional: Any, named: Any, output: Any) -> None:
        assert isinstance(piece, Piece)
        given = _signature(piece).bind(*positional, **named).arguments
        results = output if isinstance(output, tuple) else (output,)
        calls.append(
            _Call(
                paths[piece],
                piece,
                {name: tensor for name, tensor in given.items() if tensor is not None},
                {
                    name: tensor
                    for name, tensor in zip(piece.outputs, results, strict=False)
                    if tensor is not None
                },
            )
        )

    hooks = [
        module.register_forward_hook(note, with_kwargs=True)
        for module in paths
        if isinstance(module, Piece)
    ]
    try:
        with torch.no_grad():
            returned = step(*args)
    finally:
        for hook in hooks:
            hook.remove()
    return calls, returned


def _signature(piece: Piece) -> inspect.Signature:
    return inspect.signature(piece.forward)


class _Pieces(nn.Module):
    """Pieces side by side, so that one run of the tracer does for all of them.

    Weights are inputs, not parameters: the tracer would compute what depends on parameters alone,
    and so put the weights of one layer into the function of all.
    """

    def __init__(self, calls: list[_Call]) -> None:
        super().__init__()
        self.pieces = nn.ModuleList(call.piece for call in calls)
        self._calls = calls

    def forward(self, tensors: list[list[Tensor]], weights: list[list[Tensor]]) -> list[Tensor]:
        results: list[Tensor] = []
        for call, given, own in zip(self._calls, tensors, weights, strict=True):
            named = dict(zip(call.given, given, strict=True))
            output = torch.func.functional_call(
                call.piece,
                dict(zip(_weight_paths(call.piece), own, strict=True)),
                (),
                {name: named.get(name) for name in _signature(call.piece).parameters},
            )
            results.extend(output if isinstance(output, tuple) else (output,))
        return [tensor for tensor in results if tensor is not None]


def _weight_paths(piece: Piece) -> dict[str, tuple[str, Tensor]]:
    """For the path of each weight in a piece, its name among the inputs, and the weight."""
    names = {id(tensor): name for name, tensor in piece.weights().items()}
    return {
        path: (names[id(tensor)], tensor)
        for path, tensor in chain(piece.named_parameters(), piece.named_buffers())
        if id(tensor) in names
    }


def _trace(calls: list[_Call], target: Target) -> _Traced:
    """Trace one piece of each structure."""
    chosen: list[tuple[object, _Call]] = []
    for call in calls:
        structure = call.piece.structure()
        if all(structure != known for known, _ in chosen):
            chosen.append((structure, call))
    first = [call for _, call in chosen]
    weights = [_weight_paths(call.piece) for call in first]
    # Copies, because the same tensor for two inputs would become one input.
    tensors = [[tensor.clone() for tensor in call.given.values()] for call in first]
    own = [[tensor.clone() for _, tensor in found.values()] for found in weights]
    axes = [_dynamic_axes(call, number) for number, call in enumerate(first)]
    with _quiet(), _interruptible():
        program = torch.onnx.export(
            _Pieces(first).eval(),
            (tensors, own),
            dynamo=True,
            opset_version=target.opset,
            dynamic_shapes=(axes, [[{} for _ in found] for found in weights]),
            custom_translation_table=target.lowerings,
        )
    assert program is not None
    model = program.model
    forgotten = [name for name in model.graph.initializers if name.startswith("pieces.")]
    assert not forgotten, f"{forgotten} must be among the weights of their pieces"
    _common_names(model.graph)
    _fix_shapes(model)
    drop_training_statistics(model.graph)
    inputs, outputs = iter(model.graph.inputs), iter(model.graph.outputs)
    given = [{next(inputs): name for name in call.given} for call in first]
    for known, found in zip(given, weights, strict=True):
        known |= {next(inputs): name for name, _ in found.values()}
    bodies: list[tuple[object, _Body]] = []
    for (structure, call), known in zip(chosen, given, strict=True):
        results = {next(outputs): name for name in call.results}
        nodes = _needed(results)
        # Whole numbers are positions, which all layers share.
        _unify_sizes(nodes, sorted(known, key=lambda value: value.dtype != ir.DataType.INT64))
        bodies.append((structure, _Body(nodes, known, results)))
    return _Traced(bodies, dict(model.graph.opset_imports))


def _dynamic_axes(call: _Call, number: int) -> list[dict[int, Any]]:
    """The dynamic axes of what a piece is given.

    Their sizes have other names in each piece: else a piece would look up a size in another's
    input. `_common_names` takes the numbers away again.
    """
    sizes: dict[str, Any] = {}
    return [
        {
            axis: sizes.setdefault(size, Dim(f"{size}_{number}"))
            for axis, size in _AXES.get(name, _TOKENS).items()
        }
        for name in call.given
    ]


def _common_names(graph: ir.Graph) -> None:
    sizes = "|".join({size for axes in (_TOKENS, *_AXES.values()) for size in axes.values()})
    numbered = re.compile(rf"\b({sizes})_\d+\b")
    for value in (*graph.inputs, *chain(*(node.outputs for node in graph))):
        if value.shape is not None:
            value.shape = ir.Shape(
                [
                    numbered.sub(r"\1", dim.value)
                    if isinstance(dim, ir.SymbolicDim) and dim.value is not None
                    else dim
                    for dim in value.shape
                ]
            )


def _unify_sizes(nodes: Iterable[ir.Node], inputs: Iterable[ir.Value]) -> None:
    """Look each size up in the first of some inputs that has it.

    The tracer looks a size up in any tensor that has it. If all layers read it from the same
    tensor, it is computed once.
    """
    places: dict[object, tuple[ir.Value, int]] = {}
    for value in inputs:
        for axis, dim in enumerate(value.shape or ()):
            if not isinstance(dim, int):
                places.setdefault(dim, (value, axis))
    for node in nodes:
        start, end = (node.attributes.get_int(name, -1) for name in ("start", "end"))
        looked_up = node.inputs[0] if node.op_type == "Shape" else None
        if looked_up is None or looked_up.shape is None or start < 0 or end != start + 1:
            continue
        if (place := places.get(looked_up.shape[start])) is not None:
            value, axis = place
            node.replace_input_with(0, value)
            node.attributes["start"] = ir.AttrInt64("start", axis)
            node.attributes["end"] = ir.AttrInt64("end", axis + 1)


def _needed(outputs: Iterable[ir.Value]) -> list[ir.Node]:
    """The nodes that compute these values, in order."""
    found: set[ir.Node] = set()
    wanted = [value.producer() for value in outputs]
    while wanted:
        node = wanted.pop()
        if node is not None and node not in found:
            found.add(node)
            wanted.extend(value.producer() for value in node.inputs if value is not None)
    graph = next(iter(found)).graph
    assert graph is not None
    return [node for node in graph if node in found]


def _call(
    operator: str, piece: Piece, given: dict[str, ir.Value], results: dict[str, ir.Value]
) -> ir.Node:
    attributes = ir.convenience.convert_attributes(piece.attributes())
    return ir.Node(
        DOMAIN,
        operator,
        [given.get(name) for name in piece.inputs],
        attributes,
        outputs=list(results.values()),
    )


def _function(operator: str, piece: Piece, body: _Body, opsets: dict[str, int]) -> ir.Function:
    """The function of an operator, with the nodes of a traced piece of it as its body.

    The forms of matrices are attributes of the body's products, too, so that layers may have
    different ones.
    """
    inputs = {name: ir.Value(name=name) for name in piece.inputs}
    # An output needs another name than an input.
    outputs = {
        name: ir.Value(name=f"next_{name}" if name in inputs else name)
        for name in body.outputs.values()
    }
    graph = ir.Graph(list(inputs.values()), list(outputs.values()), nodes=[], opset_imports=opsets)
    constants: dict[ir.Value, ir.Value] = {}

    def constant(value: ir.Value) -> ir.Value:
        if value not in constants:
            node = ir.node("Constant", [], {"value": value.const_value})
            node.outputs[0].name = f"constant_{len(constants)}"
            graph.append(node)
            constants[value] = node.outputs[0]
        return constants[value]

    for node in _copied(body, inputs, outputs, constant, "body/"):
        graph.append(node)
    forms = {prefix_of(name): inputs[name] for name in piece.parts().products}
    for node in graph:
        if node.op_type == "MatMulNBits":
            prefix = next(prefix for prefix, value in forms.items() if value is node.inputs[1])
            for name in ("bits", "block_size"):
                node.attributes[name] = ir.RefAttr(name, prefix + name, ir.AttributeType.INT)
    attributes = [
        ir.Attr(attribute.name, attribute.type, None)
        for attribute in ir.convenience.convert_attributes(piece.attributes())
    ]
    return ir.Function(DOMAIN, operator, graph=graph, attributes=attributes)


def _copies(
    graph: ir.Graph,
    body: _Body,
    given: dict[str, ir.Value],
    results: dict[str, ir.Value],
    prefix: str,
) -> list[ir.Node]:
    """Copies of a body's nodes, which share the body's constants."""

    def constant(value: ir.Value) -> ir.Value:
        assert value.const_value is not None
        name = f"constant.{value.name}"
        if name not in graph.initializers:
            _initializer(graph, name, value.const_value)
        return graph.initializers[name]

    return list(_copied(body, given, results, constant, prefix))


def _copied(
    body: _Body,
    given: dict[str, ir.Value],
    results: dict[str, ir.Value],
    constant: Callable[[ir.Value], ir.Value],
    prefix: str,
) -> Iterator[ir.Node]:
    """Copy the nodes of a body.

    Args:
        body: What to copy.
        given: The values that stand for its inputs.
        results: The values that stand for its outputs.
        constant: Returns the value that stands for one of its constants.
        prefix: What the names of new values begin with.
    """
    copied = {value: given[name] for value, name in body.inputs.items()}
    made = {value: results[name] for value, name in body.outputs.items()}
    for node in body.nodes:
        inputs: list[ir.Value | None] = []
        for value in node.inputs:
            if value is not None and value not in copied:
                copied[value] = constant(value)
            inputs.append(None if value is None else copied[value])
        outputs: list[ir.Value] = []
        for value in node.outputs:
            name = f"{prefix}{value.name}" if value.name else ""
            outputs.append(
                made.get(value) or ir.Value(name=name, type=value.type, shape=value.shape)
            )
            copied[value] = outputs[-1]
        yield ir.Node(node.domain, node.op_type, inputs, node.attributes.values(), outputs=outputs)


def _initializer(graph: ir.Graph, name: str, tensor: ir.TensorProtocol) -> ir.Value:
    value = ir.Value(name=name, const_value=tensor)
    value.dtype, value.shape = tensor.dtype, ir.Shape(tensor.shape.numpy())
    graph.register_initializer(value)
    return value


def drop_training_statistics(graph: ir.Graph) -> None:
    """Remove the outputs of skip norms that nothing reads: mean and variance, for training."""
    for node in graph:
        if node.domain == MICROSOFT:
            for output in node.outputs:
                if not output.uses() and not output.is_graph_output():
                    output.name = ""


def _fix_shapes(model: ir.Model) -> None:
    """Let reshapes copy the sizes of batch and sequence, instead of computing a shape.

    The tracer computes every shape as [batch, sequence, ...], with nodes that look both sizes up. A
    constant 0 in a shape means "the size of the same axis of the input", so it does the same
    without nodes if the input begins with these two axes.
    """
    tokens = [ir.SymbolicDim(BATCH), ir.SymbolicDim(LENGTH)]
    zeros: dict[tuple[int, ...], ir.Value] = {}
    for node in list(model.graph):
        if node.op_type != "Reshape":
            continue
        data, shape = node.inputs
        parts = None if shape is None else shape.producer()
        if data is None or data.shape is None or parts is None or parts.op_type != "Concat":
            continue
        result = node.outputs[0].shape
        if result is None or len(data.shape) < 2 or list(data.shape[:2]) != tokens:
            continue
        rest = [dim for dim in result[2:] if isinstance(dim, int)]
        if list(result[:2]) != tokens or len(rest) + 2 != len(result):
            continue
        sizes = (0, 0, *rest)
        if sizes not in zeros:
            name = "_".join(["shape", *map(str, rest)])
            zeros[sizes] = ir.Value(name=name, const_value=ir.tensor(np.array(sizes), name=name))
            model.graph.register_initializer(zeros[sizes])
        node.replace_input_with(1, zeros[sizes])
        # With this attribute of the tracer, 0 would mean an empty axis.
        node.attributes.pop("allowzero", None)
    RemoveUnusedNodesPass()(model)


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Raise KeyboardInterrupt on Ctrl-C: torch's exporter wraps it in an error of its own."""
    try:
        yield
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, KeyboardInterrupt):
                raise KeyboardInterrupt from None
            cause = cause.__cause__ or cause.__context__
        raise


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the tracer's output, which is meant for its developers."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
