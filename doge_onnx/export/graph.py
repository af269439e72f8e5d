"""Traces the step to an ONNX graph and gives it the form of the graph contract (docs/state.md).

Knows the names and axes of inputs and outputs, and what to remove from a traced graph. Does not
know what the model computes (`step`), how operators become ONNX (`lowering`) or where files go
(`exporter`).
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Sequence

import numpy as np
import onnx_ir as ir
import torch

# torch.onnx imports this inside a `try` whose handler imports it again, so that Ctrl-C during the
# import would become an error of torch.
import torch._dynamo
from numpy.typing import NDArray
from onnx_ir.passes.common import RemoveUnusedNodesPass
from torch import nn
from torch.export import Dim

from doge_onnx.export import traced_once
from doge_onnx.export.growing_state import GrowingState
from doge_onnx.export.lowering import MICROSOFT, Target
from doge_onnx.export.step import RecurrentStep
from doge_onnx.export.window_state import WindowState

# ONNX Runtime and most other engines read this version of the file format.
IR_VERSION = 10
TOTAL_LENGTH = "total_sequence_length"
PAST_LENGTHS = "past_lengths"
# The default of `past_lengths`, larger than any length: all sequences end with the mask. A column
# number that is added to it stays below 2^31, because up to 1.31, ONNX Runtime's Min compares int64
# in 32 bits.
NO_LENGTH = 2**30
# Sizes for tracing. All axes stay dynamic, but the tracer would turn 0 and 1 into constants, and a
# window needs at least as many rows as there are new tokens.
_BATCH, _LENGTH, _PAST = 2, 3, 5


def trace(step: RecurrentStep, target: Target) -> ir.Model:
    """Turn a step into an ONNX model whose batch, sequence and past lengths are dynamic.

    Args:
        step: The step, built from the operators of the target.
        target: The target of the export.

    Returns:
        A model with the inputs `input_ids`, `attention_mask`, `position_ids` (window states only)
        and `past_key_values.{i}.key|value`, and the outputs `logits` and `present.{i}.key|value`.
        If the target and the state have them, `logits_to_keep` and `past_lengths` are initializers
        that a caller may override.
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
            # A separate axis, because the default has one element for any batch. If the axis had
            # the name of the batch, ONNX Runtime would reuse memory as if sizes were equal.
            past_lengths = torch.full((_BATCH,), _PAST)
            inputs[PAST_LENGTHS] = (past_lengths, {0: Dim("past_lengths_size")})
    else:
        inputs["attention_mask"] = (torch.ones_like(tokens), token_axes)
        # A copy, because the same tensor for two inputs would become one input.
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
    outputs = ["logits", *(f"present.{i}.{part}" for i, part in pairs)]
    model = _trace(step.eval(), args, axes, names, outputs, target)
    if isinstance(step.state, WindowState):
        traced_once.insert(model, _trace_attention(step.state, target))
    if isinstance(step.state, GrowingState):
        for output in model.graph.outputs[1:]:
            _rename_axis(output, 2, TOTAL_LENGTH)
    if target.logits_to_keep:
        _make_default(model, "logits_to_keep", np.zeros(1, np.int64))
    if PAST_LENGTHS in inputs:
        _make_default(model, PAST_LENGTHS, np.full(1, NO_LENGTH))
    _drop_training_statistics(model)
    _fix_shapes(model, "input_ids")
    if isinstance(step.state, GrowingState) and step.state.frequencies is not None:
        _compute_rotations(model, step.state.frequencies.numpy())
    _drop_traces(model)
    model.ir_version = IR_VERSION
    return model


def _trace_attention(state: WindowState, target: Target) -> ir.Model:
    """Trace the attention of a layer; see `traced_once`."""
    heads = state.heads
    batch, length, rows = Dim("batch_size"), Dim("sequence_length"), Dim("past_sequence_length")
    past = torch.zeros(_BATCH, heads.num_keys, _PAST, heads.row)
    queries, keys = (
        torch.zeros(_BATCH, _LENGTH, count * heads.row)
        for count in (heads.num_queries, heads.num_keys)
    )
    tokens = torch.zeros(_BATCH, _LENGTH, dtype=torch.int64)
    args = [queries, keys, keys.clone(), past, past.clone(), tokens, state.lift.clone()]
    new, old = {0: batch, 1: length}, {0: batch, 2: rows}
    axes = [new, new, new, old, old, new, {}]
    module = traced_once.WindowAttention(state)
    model = _trace(module, args, axes, module.inputs, module.outputs, target)
    _fix_shapes(model, module.inputs[0])
    return model


def _trace(
    module: nn.Module,
    args: Sequence[object],
    axes: Sequence[object],
    inputs: Sequence[str],
    outputs: Sequence[str],
    target: Target,
) -> ir.Model:
    with _quiet(), _interruptible():
        program = torch.onnx.export(
            module,
            tuple(args),
            dynamo=True,
            opset_version=target.opset,
            dynamic_shapes=tuple(axes),
            custom_translation_table=target.lowerings | traced_once.LOWERING,
            input_names=inputs,
            output_names=outputs,
        )
    assert program is not None
    return program.model


def _rename_axis(value: ir.Value, axis: int, name: str) -> None:
    assert value.shape is not None
    dims = list(value.shape)
    dims[axis] = ir.SymbolicDim(name)
    value.shape = ir.Shape(dims)


def _make_default(model: ir.Model, name: str, default: np.ndarray) -> None:
    """Give an input a default value, so that callers need not feed it.

    An initializer with the name of an input is its default. ONNX Runtime then does not list it
    among the inputs, so software that does not know it can run the graph, too.
    """
    value = next(value for value in model.graph.inputs if value.name == name)
    value.const_value = ir.tensor(default, name=name)
    model.graph.register_initializer(value)


def _drop_training_statistics(model: ir.Model) -> None:
    """Remove the outputs of skip norms that nothing reads: mean and variance, for training."""
    for node in model.graph:
        if node.domain == MICROSOFT:
            for output in node.outputs:
                if not output.uses() and not output.is_graph_output():
                    output.name = ""


def _fix_shapes(model: ir.Model, tokens: str) -> None:
    """Let reshapes copy the sizes of batch and sequence, instead of computing a shape.

    The tracer computes every shape as [batch, sequence, ...], with nodes that look both sizes up. A
    constant 0 in a shape means "the size of the same axis of the input", so it does the same
    without nodes if the input begins with these two axes.

    Args:
        model: Is changed.
        tokens: Name of an input whose first axes are the two.
    """
    ids = next(value for value in model.graph.inputs if value.name == tokens)
    assert ids.shape is not None
    batch, length = ids.shape[:2]
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
        # With this attribute of the tracer, 0 would mean an empty axis.
        node.attributes.pop("allowzero", None)
    RemoveUnusedNodesPass()(model)


def _compute_rotations(model: ir.Model, frequencies: NDArray[np.float32]) -> None:
    """Replace the tables of cosines and sines by the few operators that compute them.

    ONNX Runtime runs these operators once, when it loads the graph. The tables would be a tenth of
    the file of a 20M model in 4 bits.

    Args:
        model: Has the initializers `state.cos` and `state.sin`, `[T, D / 2]`.
        frequencies: float32 `[D / 2]`, radians per position.
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
    """Remove the tracer's metadata, which holds source code and paths of this machine."""
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
