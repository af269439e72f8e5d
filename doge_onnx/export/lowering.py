"""The targets of an export: how the operators of the step become ONNX.

The target "ort" turns each of `operators.FUSED` into a fused kernel of ONNX Runtime. The target
"portable" traces the plain bodies into standard operators of an older opset, for other engines.
Knows the schemas and attributes of the operators. Does not know the model (`step`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import onnx
import onnx_ir as ir
import onnxruntime
import torch
from onnxruntime.capi import onnxruntime_pybind11_state
from onnxscript import opset18, opset23
from onnxscript.values import Op, Opset

from doge_onnx.errors import DogeOnnxError
from doge_onnx.export.operators import FUSED, STANDARD, Operators

MICROSOFT = "com.microsoft"

# Any, because onnxscript's annotations allow tensors only, while numbers become constants.
op: Any = opset23
op18: Any = opset18


@dataclass(frozen=True)
class Target:
    """A target: the engines that a graph is made for.

    Attributes:
        operators: Implementation of the operators that the step is built from.
        opset: Version of the standard operators.
        lowerings: Translations of PyTorch operators to ONNX, as `torch.onnx.export` takes them.
        in_place: Whether past and present may share a buffer.
        logits_to_keep: Whether the graph has the input `logits_to_keep`.
        quantized: Whether the target has operators for weights and states of few bits.
        functions: Whether the operators of docs/native.md stand in the graph, as functions.
    """

    operators: Operators
    opset: int
    lowerings: dict[Any, Callable[..., Any]]
    in_place: bool
    logits_to_keep: bool
    quantized: bool
    functions: bool


def find_target(name: str) -> Target:
    """The target of that name.

    Raises:
        DogeOnnxError: There is no target of that name.
    """
    # Not always a string: Optimum's command line passes any JSON value.
    if not isinstance(name, str) or name not in TARGETS:
        raise DogeOnnxError(f"target {name!r} is not known; choose from {', '.join(TARGETS)}")
    return TARGETS[name]


def for_web(chosen: Target) -> Target:
    """The same target without the operators that ONNX Runtime's builds for browsers lack.

    1.  Builds with WebGPU have no GatherBlockQuantized for the CPU, and transformers.js loads such
        a build by default. Five standard nodes replace it in each lookup.
    2.  The RMSNormalization of WebGPU supports one weight for each channel, but not different ones
        for each head. A separate node multiplies those: one more node in each layer.
    """
    if not chosen.in_place:
        return chosen
    plain: dict[Any, Callable[..., Any]] = {
        torch.ops.doge_onnx.rms_norm.default: _lower_rms_norm_plainly,
        torch.ops.doge_onnx.quantized_rows.default: _lower_quantized_rows_plainly,
    }
    return replace(chosen, lowerings=chosen.lowerings | plain)


def require_kernels(*names: str) -> None:
    """Check that the installed ONNX Runtime has CPU kernels for some of its own operators.

    Raises:
        DogeOnnxError: A kernel is missing.
    """
    kernels = onnxruntime_pybind11_state.get_all_opkernel_def()
    here = {k.op_name for k in kernels if k.provider == "CPUExecutionProvider"}
    for name in names:
        if name not in here:
            raise DogeOnnxError(
                f"the installed onnxruntime {onnxruntime.__version__} has no CPU kernel for "
                f"{name}; upgrade it, or choose fp32 for weights and state"
            )


def _contrib(name: str, inputs: int, outputs: int, **attributes: onnx.defs.OpSchema.AttrType) -> Op:
    """Declare a contrib operator of ONNX Runtime, which onnxscript does not know by name.

    The schema gives only the number of inputs and outputs and the types of the attributes. For
    their meaning see ContribOperators.md of ONNX Runtime.
    """
    parameter = onnx.defs.OpSchema.FormalParameter
    optional = onnx.defs.OpSchema.FormalParameterOption.Optional
    # A type variable for each: with a shared one, onnxscript would cast inputs to the same type.
    types = [f"T{index}" for index in range(inputs + outputs)]
    kinds = ("float", "float16", "bfloat16", "int32", "int64", "int8", "uint8")
    every_type = [f"tensor({kind})" for kind in kinds]
    schema = onnx.defs.OpSchema(
        name,
        MICROSOFT,
        1,
        inputs=[parameter(f"input{t}", t, param_option=optional) for t in types[:inputs]],
        outputs=[parameter(f"output{t}", t) for t in types[inputs:]],
        type_constraints=[(t, every_type, "") for t in types],
        attributes=[
            onnx.defs.OpSchema.Attribute(attribute, kind, required=False)
            for attribute, kind in attributes.items()
        ],
    )
    return Op(Opset(MICROSOFT, 1), name, schema)


_INT = onnx.defs.OpSchema.AttrType.INT
_FLOAT = onnx.defs.OpSchema.AttrType.FLOAT
_STRING = onnx.defs.OpSchema.AttrType.STRING
# `accuracy_level` of MatMulNBits: kernels that round activations to 8 bits, block by block. The
# other kernels are many times slower for one row.
_INT8_ACTIVATIONS = 4
_UINT8 = onnx.TensorProto.UINT8

_skip_norm = _contrib("SkipSimplifiedLayerNormalization", 3, 4, epsilon=_FLOAT)
_rotary = _contrib("RotaryEmbedding", 4, 1, num_heads=_INT, rotary_embedding_dim=_INT)
_group_query_attention = _contrib(
    "GroupQueryAttention",
    14,
    3,
    num_heads=_INT,
    kv_num_heads=_INT,
    scale=_FLOAT,
    k_quant_type=_STRING,
    v_quant_type=_STRING,
    kv_cache_bit_width=_INT,
)
_matmul_nbits = _contrib(
    "MatMulNBits", 6, 1, K=_INT, N=_INT, bits=_INT, block_size=_INT, accuracy_level=_INT
)
_quick_gelu = _contrib("QuickGelu", 1, 1, alpha=_FLOAT)
_gather_block_quantized = _contrib(
    "GatherBlockQuantized", 3, 1, bits=_INT, block_size=_INT, gather_axis=_INT, quantize_axis=_INT
)
_fused_matmul = _contrib("FusedMatMul", 2, 1, transB=_INT)


def _lower_rms_norm(x: Any, weight: Any, eps: float) -> Any:
    if x.dtype != ir.DataType.FLOAT and len(weight.shape) > 1:
        # Half precision is for CUDA. It is not known whether the kernel there supports weights for
        # each head, as the CPU's does.
        return _lower_rms_norm_plainly(x, weight, eps)
    return op.RMSNormalization(x, weight, axis=-1, epsilon=eps)


def _lower_rms_norm_plainly(x: Any, weight: Any, eps: float) -> Any:
    if len(weight.shape) == 1:
        return _lower_rms_norm(x, weight, eps)
    ones = _typed_like(weight, op.Constant(value_floats=[1.0] * weight.shape[-1]))
    return op.Mul(op.RMSNormalization(x, ones, axis=-1, epsilon=eps), weight)


def _lower_skip_rms_norm(x: Any, skip: Any, weight: Any, eps: float) -> Any:
    # The second and third outputs are statistics for training.
    normed, _, _, total = _skip_norm(x, skip, weight, epsilon=eps)
    return normed, total


def _lower_rotary_embedding(x: Any, positions: Any, cos: Any, sin: Any, num_heads: int) -> Any:
    return _rotary(
        x, positions, cos, sin, num_heads=num_heads, rotary_embedding_dim=2 * cos.shape[-1]
    )


def _lower_causal_attention(
    query: Any,
    key: Any,
    value: Any,
    past_key: Any,
    past_value: Any,
    lengths: Any,
    total_length: Any,
    num_heads: int,
    num_kv_heads: int,
    bias: Any = None,
    key_scale: Any = None,
    value_scale: Any = None,
) -> Any:
    # Inputs between the lengths and the bias: rotary tables and positions. The step has rotated
    # queries and keys already.
    optional: tuple[Any, ...] = () if bias is None else (None, None, None, bias)
    quantization: dict[str, Any] = {}
    if key_scale is not None:
        # Input between the bias and the scales: a head sink.
        optional = (None, None, None, bias, None, key_scale, value_scale)
        quantization = {
            "k_quant_type": "PER_CHANNEL",
            "v_quant_type": "PER_CHANNEL",
            "kv_cache_bit_width": 8,
        }
    return _group_query_attention(
        query,
        key,
        value,
        past_key,
        past_value,
        lengths,
        total_length,
        *optional,
        num_heads=num_heads,
        kv_num_heads=num_kv_heads,
        # The step has scaled the queries already; the default of the operator would do so again.
        scale=1.0,
        **quantization,
    )


def _lower_all_gates(
    past_key: Any, key: Any, columns: Any, total_length: Any, first: int, count: int
) -> Any:
    _, heads, _, row = past_key.shape
    start, end = [first], op.Constant(value_ints=[first + count])
    # The past may have spare rows at its end.
    past = op.Slice(past_key, start, end, [3])
    new = op.Slice(op.Reshape(key, [0, 0, heads, row]), start, end, [3])
    new = op.Transpose(new, perm=[0, 2, 1, 3])
    length = op.Cast(op.Unsqueeze(total_length, [0]), to=onnx.TensorProto.INT64)
    gates = op.Slice(op.Concat(past, new, axis=2), [0], length, [2])
    index = op.Expand(op.Unsqueeze(columns, [1, 3]), op.Shape(new))
    gates = op.ScatterElements(gates, index, new, axis=2)
    return op.Reshape(op.Transpose(gates, perm=[0, 1, 3, 2]), [0, heads * count, -1])


def _lower_log_sum_exp(x: Any) -> Any:
    return op.ReduceLogSumExp(x, [-1], keepdims=0)


def _lower_project_to_vocabulary(x: Any, embedding: Any) -> Any:
    return _fused_matmul(x, embedding, transB=1)


def _lower_project_to_vocabulary_portably(x: Any, embedding: Any) -> Any:
    # Gemm can transpose. MatMul would need a transposed copy of the embedding in the graph.
    vocab_size, hidden_size = embedding.shape
    rows = op18.Reshape(x, op18.Constant(value_ints=[-1, hidden_size]))
    leading = op18.Shape(x, start=0, end=-1)
    shape = op18.Concat(leading, op18.Constant(value_ints=[vocab_size]), axis=0)
    return op18.Reshape(op18.Gemm(rows, embedding, transB=1), shape)


def _lower_keep_last(x: Any, count: Any) -> Any:
    end = op.Constant(value_ints=[2**62])
    axis = op.Constant(value_ints=[1])
    if x.dtype == ir.DataType.FLOAT:
        # Slice(-count:) is everything for count = 0, as -0 is 0.
        return op.Slice(x, op.Neg(count), end, axis)
    # With Neg, the GPU would compute a number that the host has to wait for in the middle of a
    # step. Arithmetic that begins with a Shape stays on the host.
    length = op.Shape(x, start=1, end=2)
    first = op.Max(op.Sub(length, count), op.Constant(value_ints=[0]))
    return op.Slice(x, op.Mod(first, length), end, axis)


def _lower_new_columns(
    mask: Any, input_ids: Any, past_lengths: Any, numbers: Any, on_device: bool = False
) -> Any:
    axis, zero = op.Constant(value_ints=[1]), op.Constant(value_ints=[0])
    end, length = op.Shape(mask, start=1, end=2), op.Shape(input_ids, start=1, end=2)
    start = op.Sub(end, length)
    batch, shape = op.Shape(mask, start=0, end=1), op.Shape(input_ids)
    total = op.Cast(end, to=onnx.TensorProto.INT32)
    steps = op.Slice(numbers, zero, length, zero)
    if not on_device:
        past = op.Expand(op.Min(start, past_lengths), batch)
        columns = op.Add(op.Unsqueeze(past, axis), steps)
        before = op.CumSum(mask, op.Constant(value_int=1), exclusive=1)
        newest = op.Sub(op.Add(past, length), axis)
        return (
            op.GatherElements(before, columns, axis=1),
            op.GatherElements(mask, columns, axis=1),
            columns,
            op.Cast(newest, to=onnx.TensorProto.INT32),
            op.Squeeze(total),
        )
    # Each step would copy a number from the host to the GPU if the GPU needed it, and a step with
    # such a copy cannot be captured. So column numbers are slices of a table on the GPU.
    last = op.Slice(numbers, start, end, zero)
    columns = op.Min(op.Add(op.Unsqueeze(past_lengths, axis), steps), last)
    columns = op.Expand(columns, shape)
    is_token = op.GatherElements(mask, columns, axis=1)
    # In some versions, CumSum on CUDA computes each sum from the beginning, so it gets the new
    # columns only. Sums of int64 need cuDNN, those of float32 do not.
    first = op.Slice(columns, zero, axis, axis)
    earlier = op.Where(op.Less(op.Slice(numbers, zero, end, zero), first), mask, zero)
    count = op.ReduceSum(op.Cast(earlier, to=onnx.TensorProto.FLOAT), axis, keepdims=1)
    before = op.Add(
        op.Cast(count, to=onnx.TensorProto.INT64),
        op.CumSum(is_token, op.Constant(value_int=1), exclusive=1),
    )
    newest = op.Slice(columns, op.Constant(value_ints=[-1]), op.Constant(value_ints=[2**62]), axis)
    lengths = op.Reshape(op.Cast(newest, to=onnx.TensorProto.INT32), op.Constant(value_ints=[-1]))
    return before, is_token, columns, lengths, op.Squeeze(total)


def _lower_quantized_linear(
    x: Any, codes: Any, scales: Any, bias: Any, in_features: int, bits: int
) -> Any:
    outputs, _, blob = codes.shape
    # Inputs between the scales and the bias: zero points, and an index that is out of use.
    optional = () if bias is None else (None, None, bias)
    return _matmul_nbits(
        x,
        codes,
        scales,
        *optional,
        K=in_features,
        N=outputs,
        bits=bits,
        block_size=blob * 8 // bits,
        accuracy_level=_INT8_ACTIVATIONS,
    )


def _lower_quantized_rows(codes: Any, scales: Any, indices: Any, bits: int) -> Any:
    _, blocks, blob = codes.shape
    size = blob * 8 // bits
    # With three axes, the codes are the same tensor as that of MatMulNBits.
    rows = _gather_block_quantized(
        codes,
        indices,
        op.Unsqueeze(scales, [2]),
        bits=bits,
        block_size=size,
        gather_axis=0,
        quantize_axis=2,
    )
    kept = [0] * len(indices.shape)
    return op.Reshape(rows, op.Constant(value_ints=[*kept, blocks * size]))


def _lower_quantized_rows_plainly(codes: Any, scales: Any, indices: Any, bits: int) -> Any:
    _, blocks, blob = codes.shape
    rows = op.Gather(codes, indices)
    kept = [0] * len(indices.shape)
    if bits == 4:
        four = op.Constant(value=onnx.helper.make_tensor("four", _UINT8, [1], [4]))
        low = op.Constant(value=onnx.helper.make_tensor("low", _UINT8, [1], [15]))
        pairs = [
            op.Unsqueeze(half, [-1])
            for half in (op.BitwiseAnd(rows, low), op.BitShift(rows, four, direction="RIGHT"))
        ]
        shape = op.Constant(value_ints=[*kept, blocks, 2 * blob])
        rows = op.Reshape(op.Concat(*pairs, axis=-1), shape)
    zero = op.Constant(value=onnx.helper.make_tensor("zero", _UINT8, [], [2 ** (bits - 1)]))
    values = op.DequantizeLinear(rows, _typed_like(scales, op.Constant(value_float=1.0)), zero)
    values = op.Mul(values, op.Gather(op.Unsqueeze(scales, [2]), indices))
    return op.Reshape(values, op.Constant(value_ints=[*kept, blocks * blob * 8 // bits]))


def _typed_like(x: Any, number: Any) -> Any:
    return number if x.dtype == ir.DataType.FLOAT else op.CastLike(number, x)


def _lower_silu(x: Any) -> Any:
    # x · sigmoid(1 · x) in one node.
    return _quick_gelu(x, alpha=1.0)


def _lower_softplus(x: Any, beta: float = 1.0, threshold: float = 20.0) -> Any:
    # PyTorch's threshold changes the result by less than rounding does, but its default lowering
    # has two more nodes in each layer.
    return op18.Softplus(x)


def _lower_stable_sort(x: Any, stable: bool, dim: int = -1, descending: bool = False) -> Any:
    # TopK puts equal values in order of their index, so it is stable.
    length = op18.Gather(op18.Shape(x), [dim])
    return op18.TopK(x, length, axis=dim, largest=int(descending))


_PLAIN_LOWERINGS: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.softplus.default: _lower_softplus,
    torch.ops.aten.sort.stable: _lower_stable_sort,
}

TARGETS = {
    "ort": Target(
        operators=FUSED,
        opset=23,
        lowerings={
            **_PLAIN_LOWERINGS,
            torch.ops.aten.silu.default: _lower_silu,
            torch.ops.doge_onnx.rms_norm.default: _lower_rms_norm,
            torch.ops.doge_onnx.skip_rms_norm.default: _lower_skip_rms_norm,
            torch.ops.doge_onnx.rotary_embedding.default: _lower_rotary_embedding,
            torch.ops.doge_onnx.causal_attention.default: _lower_causal_attention,
            torch.ops.doge_onnx.all_gates.default: _lower_all_gates,
            torch.ops.doge_onnx.log_sum_exp.default: _lower_log_sum_exp,
            torch.ops.doge_onnx.project_to_vocabulary.default: _lower_project_to_vocabulary,
            torch.ops.doge_onnx.keep_last.default: _lower_keep_last,
            torch.ops.doge_onnx.new_columns.default: _lower_new_columns,
            torch.ops.doge_onnx.quantized_linear.default: _lower_quantized_linear,
            torch.ops.doge_onnx.quantized_rows.default: _lower_quantized_rows,
        },
        in_place=True,
        logits_to_keep=True,
        quantized=True,
        functions=True,
    ),
    "portable": Target(
        operators=replace(STANDARD, project_to_vocabulary=FUSED.project_to_vocabulary),
        opset=18,
        lowerings={
            **_PLAIN_LOWERINGS,
            torch.ops.doge_onnx.project_to_vocabulary.default: (
                _lower_project_to_vocabulary_portably
            ),
        },
        in_place=False,
        logits_to_keep=False,
        quantized=False,
        functions=False,
    ),
}
