"""Trace the step and bring the graph into the form that bundles promise.

Knows names, axes and what must not be left in a graph; not what the model computes
(`step`), nor which operators there are (`lowering`), nor where files go (`exporter`).
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator

import numpy as np
import onnx_ir as ir
import torch

# torch.onnx imports this inside of a `try` whose handler imports it again: an interrupt in
# between would come out as an error of torch's.
import torch._dynamo
from numpy.typing import NDArray
from onnx_ir.passes.common import RemoveUnusedNodesPass
from torch.export import Dim

from doge_onnx.export.growing_state import GrowingState
from doge_onnx.export.lowering import MICROSOFT, Target
from doge_onnx.export.step import RecurrentStep

# ONNX Runtime and most other engines read this version of the file format.
IR_VERSION = 10
TOTAL_LENGTH = "total_sequence_length"
PAST_LENGTHS = "past_lengths"
# Its default, above any length: then the tokens of all sequences end with the mask. The columns
# behind it are still below 2^31: up to 1.31, ONNX Runtime's Min compares int64 in 32 bits.
NO_LENGTH = 2**30
# Any lengths will do, as all axes stay dynamic, but 0 and 1 would be taken for constants; and
# a window must have rows for the new tokens.
_BATCH, _LENGTH, _PAST = 2, 3, 5


def trace(step: RecurrentStep, target: Target) -> ir.Model:
    """Turn a step into an ONNX model whose batch, sequence and past lengths are dynamic.

    Args:
        step: Built from the target's operators.
        target: What the graph is for.

    Returns:
        A model with inputs `input_ids`, `attention_mask`, for a window state `position_ids`,
        and `past_key_values.{i}.key|value`, and outputs `logits` and `present.{i}.key|value`.
        `logits_to_keep` and `past_lengths`, where the target and the state have them, are
        initializers that a caller may override.
    """
    layers = range(len(step.layers))
    pairs = [(i, part) for i in layers for part in ("key", "value")]
    batch, length, past = Dim("batch_size"), Dim("sequence_length"), Dim("past_sequence_length")
    tokens, token_axes = torch.zeros(_BATCH, _LENGTH, dtype=torch.int64), {0: batch, 1: length}
    inputs = {"input_ids": (tokens, token_axes)}
    if isinstance(step.state, GrowingState):
        mask = torch.ones(_BATCH, _PAST + _LENGTH, dtype=torch.int64)
        inputs["attention_mask"] = (mask, {0: batch, 1: Dim(TOTAL_LENGTH)})
        if target.in_place:
            # An axis of its own, since the default has one element and serves any batch: under the
            # name of the batch, ONNX Runtime would take both for equally large and share memory.
            past_lengths = torch.full((_BATCH,), _PAST)
            inputs[PAST_LENGTHS] = (past_lengths, {0: Dim("past_lengths_size")})
    else:
        inputs["attention_mask"] = (torch.ones_like(tokens), token_axes)
        # One tensor for two inputs would become one input.
        inputs["position_ids"] = (tokens.clone(), token_axes)
    heads = step.state.heads
    dtype = torch.float32
    if isinstance(step.state, GrowingState):
        dtype = getattr(torch, step.state.dtype)
    state = torch.zeros(_BATCH, heads.num_keys, _PAST, heads.row, dtype=dtype)
    state_axes = {0: batch, 2: past}
    args: list[object] = [
        tuple(value for value, _ in inputs.values()),
        [(state.clone(), state.clone()) for _ in layers],
    ]
    axes: list[object] = [
        tuple(axis for _, axis in inputs.values()),
        [(state_axes, state_axes) for _ in layers],
    ]
    names = [*inputs, *(f"past_key_values.{i}.{part}" for i, part in pairs)]
    if target.logits_to_keep:
        args.append(torch.zeros(1, dtype=torch.int64))
        axes.append({})
        names.append("logits_to_keep")
    with _quiet(), _interruptible():
        program = torch.onnx.export(
            step.eval(),
            tuple(args),
            dynamo=True,
            opset_version=target.opset,
            dynamic_shapes=tuple(axes),
            custom_translation_table=target.lowerings,
            input_names=names,
            output_names=["logits", *(f"present.{i}.{part}" for i, part in pairs)],
        )
    assert program is not None
    model = program.model
    if isinstance(step.state, GrowingState):
        for output in model.graph.outputs[1:]:
            _rename_axis(output, 2, TOTAL_LENGTH)
    if target.logits_to_keep:
        _make_default(model, "logits_to_keep", np.zeros(1, np.int64))
    if PAST_LENGTHS in inputs:
        _make_default(model, PAST_LENGTHS, np.full(1, NO_LENGTH))
    _drop_training_statistics(model)
    _fix_shapes(model)
    if isinstance(step.state, GrowingState) and step.state.frequencies is not None:
        _compute_rotations(model, step.state.frequencies.numpy())
    _drop_traces(model)
    model.ir_version = IR_VERSION
    return model


def _rename_axis(value: ir.Value, axis: int, name: str) -> None:
    assert value.shape is not None
    dims = list(value.shape)
    dims[axis] = ir.SymbolicDim(name)
    value.shape = ir.Shape(dims)


def _make_default(model: ir.Model, name: str, default: np.ndarray) -> None:
    """Give an input a value for callers that do not feed it.

    Such an input is an initializer with the input's name; ONNX Runtime does not list it among
    the inputs, so software that knows nothing of it runs the graph all the same.
    """
    value = next(value for value in model.graph.inputs if value.name == name)
    value.const_value = ir.tensor(default, name=name)
    model.graph.register_initializer(value)


def _drop_training_statistics(model: ir.Model) -> None:
    """Leave out the mean and variance that skip norms could return: nothing reads them."""
    for node in model.graph:
        if node.domain == MICROSOFT:
            for output in node.outputs:
                if not output.uses() and not output.is_graph_output():
                    output.name = ""


def _fix_shapes(model: ir.Model) -> None:
    """Let reshapes keep batch and sequence as they are, rather than put a shape together.

    The tracer spells every shape out as [batch, sequence, ...]; 0 means the same without the
    nodes that look both up. It means the axis at the same place, so both have to be there.
    """
    ids = next(value for value in model.graph.inputs if value.name == "input_ids")
    assert ids.shape is not None
    batch, length = ids.shape
    zeros: dict[tuple[int, ...], ir.Value] = {}
    for node in list(model.graph):
        if node.op_type != "Reshape":
            continue
        data, shape = node.inputs
        parts = None if shape is None else shape.producer()
        if data is None or data.shape is None or parts is None or parts.op_type != "Concat":
            continue
        result = node.outputs[0].shape
        if result is None or len(data.shape) < 2 or list(data.shape[:2]) != [batch, length]:
            continue
        rest = [dim for dim in result[2:] if isinstance(dim, int)]
        if list(result[:2]) != [batch, length] or len(rest) + 2 != len(result):
            continue
        sizes = (0, 0, *rest)
        if sizes not in zeros:
            name = "_".join(["shape", *map(str, rest)])
            zeros[sizes] = ir.Value(name=name, const_value=ir.tensor(np.array(sizes), name=name))
            model.graph.register_initializer(zeros[sizes])
        node.replace_input_with(1, zeros[sizes])
        # The tracer asks for 0 to mean a size of none.
        node.attributes.pop("allowzero", None)
    RemoveUnusedNodesPass()(model)


def _compute_rotations(model: ir.Model, frequencies: NDArray[np.float32]) -> None:
    """Replace the tables of cosines and sines by the few operators that compute them.

    ONNX Runtime does that once, as it loads the graph. In the file of a 20M model in 4 bits the
    tables would be a tenth of all.

    Args:
        model: With the initializers `state.cos` and `state.sin`, `[T, D / 2]`.
        frequencies: `[D / 2]`, radians per position.
    """
    cos = model.graph.initializers["state.cos"]
    assert cos.shape is not None
    length = cos.shape[0]
    assert isinstance(length, int)
    assert cos.dtype is not None
    positions, wavelengths = (
        ir.Value(name=f"rotation.{name}", const_value=ir.tensor(table, name=f"rotation.{name}"))
        for name, table in (
            ("positions", np.arange(length, dtype=np.float32)[:, np.newaxis]),
            ("frequencies", frequencies[np.newaxis]),
        )
    )
    angles = ir.node("Mul", [positions, wavelengths])
    nodes = [angles]
    for kind in ("Cos", "Sin"):
        table = model.graph.initializers.pop(f"state.{kind.lower()}")
        nodes.append(ir.node(kind, [angles.outputs[0]]))
        if cos.dtype != ir.DataType.FLOAT:
            nodes.append(ir.node("Cast", [nodes[-1].outputs[0]], {"to": cos.dtype}))
        table.replace_all_uses_with(nodes[-1].outputs[0])
    for value in (positions, wavelengths):
        model.graph.register_initializer(value)
    model.graph.insert_before(model.graph[0], nodes)


def _drop_traces(model: ir.Model) -> None:
    """Remove what the tracer noted: it repeats source code and paths of this machine."""
    for node in model.graph:
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.metadata_props.clear()


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Let Ctrl-C out: the exporter takes it for a failure of its own and wraps it."""
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
    """Keep the tracer's progress and remarks, meant for its developers, off the terminal."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
