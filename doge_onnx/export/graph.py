"""Gives the graph of a step the form of the graph contract (docs/state.md).

Knows the names and axes of inputs and outputs, and which of them have defaults. Does not know what
the model computes (`step`), how it becomes a graph (`assembly`) or where files go (`exporter`).
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import Tensor

from doge_onnx.export.assembly import BATCH, LENGTH, assemble, drop_training_statistics
from doge_onnx.export.growing_state import GrowingState
from doge_onnx.export.lowering import Target
from doge_onnx.export.step import RecurrentStep

# ONNX Runtime and most other engines read this version of the file format.
IR_VERSION = 10
PAST_LENGTH, TOTAL_LENGTH = "past_sequence_length", "total_sequence_length"
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
    state, layers = step.state, range(len(step.layers))
    inputs: list[tuple[Tensor, ir.Value]] = []

    def feed(name: str, tensor: Tensor, *axes: str | int) -> Tensor:
        dtype = ir.tensor_adapters.from_torch_dtype(tensor.dtype)
        value = ir.Value(name=name, shape=ir.Shape(axes), type=ir.TensorType(dtype))
        inputs.append((tensor, value))
        return tensor

    tokens = (BATCH, LENGTH)
    fed = [feed("input_ids", torch.zeros(_BATCH, _LENGTH, dtype=torch.int64), *tokens)]
    dtype, activations, rows = torch.float32, "float32", PAST_LENGTH
    if isinstance(state, GrowingState):
        dtype, activations, rows = getattr(torch, state.dtype), state.activations, TOTAL_LENGTH
        # No tokens, so that all positions are within the rotary tables, however short these are.
        mask = torch.zeros(_BATCH, _PAST + _LENGTH, dtype=torch.int64)
        fed.append(feed("attention_mask", mask, BATCH, TOTAL_LENGTH))
        if target.in_place:
            # A separate axis, because the default has one element for any batch. If the axis had
            # the name of the batch, ONNX Runtime would reuse memory as if sizes were equal.
            lengths = torch.full((_BATCH,), _PAST)
            fed.append(feed(PAST_LENGTHS, lengths, "past_lengths_size"))
    else:
        fed.append(feed("attention_mask", torch.ones_like(fed[0]), *tokens))
        fed.append(feed("position_ids", torch.zeros_like(fed[0]), *tokens))
    heads = state.heads

    def past(name: str) -> Tensor:
        tensor = torch.zeros(_BATCH, heads.num_keys, _PAST, heads.row, dtype=dtype)
        return feed(name, tensor, BATCH, heads.num_keys, PAST_LENGTH, heads.row)

    parts = ("key", "value")
    pasts = [tuple(past(f"past_key_values.{i}.{part}") for part in parts) for i in layers]
    args: list[object] = [tuple(fed), pasts]
    if target.logits_to_keep:
        args.append(feed("logits_to_keep", torch.zeros(1, dtype=torch.int64), 1))
    functions = target.functions and activations == "float32"
    model = assemble(step.eval(), args, inputs, target, functions)
    logits, *present = model.graph.outputs
    _describe(logits, "logits", torch.float32, *tokens, step.head.size)
    for output, name in zip(
        present, (f"present.{i}.{part}" for i in layers for part in parts), strict=True
    ):
        _describe(output, name, dtype, BATCH, heads.num_keys, rows, heads.row)
    if target.logits_to_keep:
        _make_default(model, "logits_to_keep", np.zeros(1, np.int64))
    if isinstance(state, GrowingState) and target.in_place:
        _make_default(model, PAST_LENGTHS, np.full(1, NO_LENGTH))
    drop_training_statistics(model.graph)
    if isinstance(state, GrowingState) and state.frequencies is not None:
        _compute_rotations(model, state.frequencies.numpy())
    model.ir_version = IR_VERSION
    return model


def _describe(value: ir.Value, name: str, dtype: torch.dtype, *axes: str | int) -> None:
    value.name, value.shape = name, ir.Shape(axes)
    value.dtype = ir.tensor_adapters.from_torch_dtype(dtype)


def _make_default(model: ir.Model, name: str, default: np.ndarray) -> None:
    """Give an input a default value, so that callers need not feed it.

    An initializer with the name of an input is its default. ONNX Runtime then does not list it
    among the inputs, so software that does not know it can run the graph, too.
    """
    value = next(value for value in model.graph.inputs if value.name == name)
    value.const_value = ir.tensor(default, name=name)
    model.graph.register_initializer(value)


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
