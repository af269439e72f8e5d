"""The operators of the recurrent step for which ONNX Runtime has fused kernels.

Each has one body in plain PyTorch, which defines its result. `FUSED` wraps the bodies as custom
operators that the tracer does not look into, so that `lowering` can turn each into one node.
`STANDARD` holds the bodies themselves, which are traced to standard ONNX. Both give the same
results in eager mode. Does not know weights or the structure of layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root mean square norm over the last axis (Zhang & Sennrich 2019).

    Statistics and scaling use float32 or wider, whatever the type of `x`.

    Args:
        x: `[..., D]`.
        weight: `[D]`, or `[N, D]` for N heads with different weights.
        eps: Added to the mean square.

    Returns:
        `[..., D]`.
    """
    wide = x.to(wider(x.dtype))
    normed: Tensor = weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps))
    return normed.to(x.dtype)


def _skip_rms_norm(x: Tensor, skip: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Add two streams and normalise the sum.

    Args:
        x: `[B, S, H]`.
        skip: `[B, S, H]`.
        weight: `[H]`.
        eps: As in `rms_norm`.

    Returns:
        `rms_norm(x + skip)` and `x + skip`, both `[B, S, H]`.
    """
    total = x + skip
    return _rms_norm(total, weight, eps), total


def _rotary_embedding(
    x: Tensor, positions: Tensor, cos: Tensor, sin: Tensor, num_heads: int
) -> Tensor:
    """Rotate the leading channels of each head by its position (Su et al. 2021).

    The rotate-half form: channel i is paired with channel i + R/2. Channels from R on are
    passed through.

    Args:
        x: `[B, S, num_heads * W]`, W >= R.
        positions: int64 `[B, S]`, row of the tables for each token.
        cos: `[T, R/2]`.
        sin: `[T, R/2]`.
        num_heads: Number of heads in the last axis of `x`.

    Returns:
        Like `x`.
    """
    batch, length, width = x.shape
    heads = x.view(batch, length, num_heads, width // num_heads)
    half = cos.shape[-1]
    cos, sin = (F.embedding(positions, table).unsqueeze(2) for table in (cos, sin))
    left, right = heads[..., :half], heads[..., half : 2 * half]
    rotated = [left * cos - right * sin, right * cos + left * sin, heads[..., 2 * half :]]
    return torch.cat(rotated, dim=-1).view(batch, length, width)


def _causal_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    past_key: Tensor,
    past_value: Tensor,
    lengths: Tensor,
    total_length: Tensor,
    num_heads: int,
    num_kv_heads: int,
    bias: Tensor | None = None,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Grouped-query attention over the past and the new tokens, without scaling.

    Scores and their softmax use float32 or wider, whatever the type of `query`.

    Query head h reads key/value head h // (num_heads / num_kv_heads) (Ainslie et al. 2023). In the
    fused operator, the past may have spare rows after its `total_length - S` valid ones and may
    share its memory with the present. The body here takes valid rows only.

    Args:
        query: `[B, S, num_heads * W]`, already scaled.
        key: `[B, S, num_kv_heads * W]`.
        value: `[B, S, num_kv_heads * W]`.
        past_key: `[B, num_kv_heads, P, W]`.
        past_value: `[B, num_kv_heads, P, W]`.
        lengths: int32 `[B]`, P + S - 1 for each sequence.
        total_length: int32 scalar, P + S. In the fused operator it may be larger, up to the rows of
            the buffer; if it equals S, there is no past.
        num_heads: Number of query heads.
        num_kv_heads: Number of key/value heads.
        bias: `[B, num_heads, S, P + S]`, added to the scores.
        key_scale: `[1, num_kv_heads, 1, W]`. With it, past and present are int8, and an int8 key
            times this is the key.
        value_scale: The same for values.

    Returns:
        The attention output `[B, S, num_heads * W]`, and the present key and value
        `[B, num_kv_heads, P + S, W]`.
    """
    batch, length, _ = query.shape
    group = num_heads // num_kv_heads
    new_key, new_value = _split_heads(key, num_kv_heads), _split_heads(value, num_kv_heads)
    if key_scale is not None and value_scale is not None:
        new_key, new_value = _to_int8(new_key, key_scale), _to_int8(new_value, value_scale)
    present_key = torch.cat([past_key, new_key], dim=2)
    present_value = torch.cat([past_value, new_value], dim=2)
    keys, values = present_key, present_value
    if key_scale is not None and value_scale is not None:
        keys, values = keys * key_scale, values * value_scale
    wide = wider(query.dtype)
    keys, values = keys.to(wide), values.to(wide)
    queries = _split_heads(query, num_heads).unflatten(1, (num_kv_heads, group)).to(wide)
    scores = queries @ keys.unsqueeze(2).transpose(-1, -2)
    if bias is not None:
        scores = scores + bias.unflatten(1, (num_kv_heads, group))
    columns = torch.arange(present_key.shape[2], device=query.device)
    rows = torch.arange(length, device=query.device).unsqueeze(-1) + past_key.shape[2]
    scores = scores.masked_fill(columns > rows, -math.inf)
    output = torch.softmax(scores, dim=-1) @ values.unsqueeze(2)
    output = output.flatten(1, 2).transpose(1, 2).reshape(batch, length, -1)
    return output.to(query.dtype), present_key, present_value


def wider(dtype: torch.dtype) -> torch.dtype:
    """The type for values that must not be rounded to half precision: float32 or wider."""
    return torch.promote_types(dtype, torch.float32)


def _all_gates(
    past_key: Tensor,
    key: Tensor,
    columns: Tensor | None,
    total_length: Tensor,
    first: int,
    count: int,
) -> Tensor:
    """The gates of all keys, past and new, each in the column of its token.

    Args:
        past_key: `[B, num_kv_heads, P, W]`; may have spare rows as in `causal_attention`.
        key: `[B, S, num_kv_heads * W]`.
        columns: int64 `[B, S]`, the columns of the new tokens; None for the last S columns.
        total_length: T as an int32 scalar.
        first: The first gate channel.
        count: Number of gate channels.

    Returns:
        `[B, num_kv_heads * count, T]`; columns without a token hold arbitrary values.
    """
    channels = slice(first, first + count)
    new = _split_heads(key, past_key.shape[1])[..., channels]
    every = torch.cat([past_key[..., channels], new], dim=2)
    if columns is not None:
        index = columns[:, None, :, None].expand(new.shape)
        every = every[:, :, : int(total_length)].scatter(2, index, new)
    return every.transpose(2, 3).flatten(1, 2)


def _to_int8(x: Tensor, scale: Tensor) -> Tensor:
    return (x / scale).round().clamp(-128, 127).to(torch.int8)


def _log_sum_exp(x: Tensor) -> Tensor:
    """log(e^a + e^b) of pairs (a, b), with the same bits wherever the pair is in a tensor.

    ONNX Runtime's Softplus and Log compute four elements at once, and the remaining elements with
    another formula. So a token's gates would depend on its place in a step: the logits of a row
    would depend on its batch, and equal tokens would not be equal for a window. Here no pair
    depends on another.

    Args:
        x: `[..., 2]`, of which the first element is 0.

    Returns:
        `[...]`, which is softplus of the second element.
    """
    return -torch.log_softmax(x, dim=-1)[..., 0]


def _split_heads(x: Tensor, num_heads: int) -> Tensor:
    """`[B, S, N * W]` to `[B, N, S, W]`."""
    heads: Tensor = x.unflatten(-1, (num_heads, -1))
    return heads.transpose(1, 2)


def _project_to_vocabulary(x: Tensor, embedding: Tensor) -> Tensor:
    """Multiply by the transpose of an embedding matrix, so that head and embedding share a tensor.

    Args:
        x: `[B, S, H]`.
        embedding: `[V, H]`.

    Returns:
        `[B, S, V]`.
    """
    return x @ embedding.transpose(0, 1)


def _keep_last(x: Tensor, count: Tensor) -> Tensor:
    """The last `count` positions of a sequence; all of them for 0.

    Args:
        x: `[B, S, H]`.
        count: int64 `[1]`.

    Returns:
        `[B, count or S, H]`.
    """
    kept = int(count)
    # A custom operator may not return its own input.
    return x[:, -kept:].clone()


def _new_columns(
    mask: Tensor,
    input_ids: Tensor,
    past_lengths: Tensor | None = None,
    numbers: Tensor | None = None,
    on_device: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The positions and columns of the new tokens, and the lengths that attention needs.

    Args:
        mask: int64 `[B, T]`, 1 for a token, 0 for padding.
        input_ids: int64 `[B, S]`; only its shape matters.
        past_lengths: int64 `[B]` or `[1]`, P of each sequence: its new tokens are in the columns P
            to P + S - 1 of the mask, and the columns after those have no meaning yet. With None, or
            a number above T - S, the new tokens are in the last S columns: P = T - S.
        numbers: int64 `[N]`, N >= T, the numbers 0 to N - 1; needed with `past_lengths` only.
        on_device: Whether the fused operator must not copy a number from the host to a GPU, so that
            CUDA can capture it.

    Returns:
        For each new id: the number of tokens before it, 1 if it is a token or 0 for padding, and
        its column, all int64 `[B, S]` (columns `[1, S]` without `past_lengths`). For each
        sequence: P + S - 1, int32 `[B]`. And T, an int32 scalar.
    """
    batch, total = mask.shape
    length = input_ids.shape[1]
    before = mask.cumsum(dim=1) - mask
    last = torch.arange(length, device=mask.device) + (total - length)
    if past_lengths is None:
        columns = last.unsqueeze(0)
        before, is_token = (x.index_select(1, last) for x in (before, mask))
    else:
        given = past_lengths.unsqueeze(1) + torch.arange(length, device=mask.device)
        columns = torch.minimum(given, last).expand(batch, length).contiguous()
        before, is_token = (x.gather(1, columns) for x in (before, mask))
    return (
        before,
        is_token,
        columns,
        columns[:, -1].to(torch.int32).expand(batch).clone(),
        torch.full((), total, dtype=torch.int32, device=mask.device),
    )


def _quantized_linear(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    in_features: int,
    bits: int,
) -> Tensor:
    """Multiply by a quantized matrix and add a bias.

    ONNX Runtime's kernel also rounds `x` to 8 bits, in blocks of the same size; the body here does
    not.

    Args:
        x: `[..., in_features]`.
        codes: uint8 `[outputs, blocks, block_size * bits / 8]`: each code is
            `value + 2^(bits - 1)`. A byte holds two 4-bit codes, the first in the lower half.
        scales: `[outputs, blocks]`, one for each block.
        bias: `[outputs]`, or None.
        in_features: Length of a row without the padding of its last block.
        bits: Bits of a code, 4 or 8.

    Returns:
        `[..., outputs]`.
    """
    weight = dequantize(codes, scales, bits)[:, :in_features].to(x.dtype)
    return F.linear(x, weight, bias)


def _quantized_rows(codes: Tensor, scales: Tensor, indices: Tensor, bits: int) -> Tensor:
    """Look up rows of a quantized matrix.

    Args:
        codes: uint8 `[rows, blocks, block_size * bits / 8]`, as for `quantized_linear`.
        scales: `[rows, blocks]`, one for each block.
        indices: int64 `[...]`, the numbers of the rows.
        bits: Bits of a code, 4 or 8.

    Returns:
        `[..., blocks * block_size]`.
    """
    rows: Tensor = dequantize(codes[indices.flatten()], scales[indices.flatten()], bits)
    return rows.view(*indices.shape, -1)


def dequantize(codes: Tensor, scales: Tensor, bits: int) -> Tensor:
    """The values of quantized codes, `[rows, blocks * block_size]`; see `quantized_linear`."""
    if bits == 4:
        codes = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(-2)
    values: Tensor = (codes.to(scales.dtype) - 2 ** (bits - 1)) * scales.unsqueeze(-1)
    return values.flatten(1)


@dataclass(frozen=True)
class Operators:
    """One implementation of each operator; the fields are the functions above."""

    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    skip_rms_norm: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
    rotary_embedding: Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]
    causal_attention: Callable[..., tuple[Tensor, Tensor, Tensor]]
    all_gates: Callable[[Tensor, Tensor, Tensor | None, Tensor, int, int], Tensor]
    log_sum_exp: Callable[[Tensor], Tensor]
    project_to_vocabulary: Callable[[Tensor, Tensor], Tensor]
    keep_last: Callable[[Tensor, Tensor], Tensor]
    new_columns: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]
    quantized_linear: Callable[[Tensor, Tensor, Tensor, Tensor | None, int, int], Tensor]
    quantized_rows: Callable[[Tensor, Tensor, Tensor, int], Tensor]


STANDARD = Operators(
    rms_norm=_rms_norm,
    skip_rms_norm=_skip_rms_norm,
    rotary_embedding=_rotary_embedding,
    causal_attention=_causal_attention,
    all_gates=_all_gates,
    log_sum_exp=_log_sum_exp,
    project_to_vocabulary=_project_to_vocabulary,
    keep_last=_keep_last,
    new_columns=_new_columns,
    quantized_linear=_quantized_linear,
    quantized_rows=_quantized_rows,
)


def opaque(name: str, body: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """Make a custom operator that the tracer does not look into.

    Args:
        name: Of the operator, in `torch.ops.doge_onnx`.
        body: What it computes.
        fake: Takes the same arguments, and returns tensors of the right shapes.
    """
    operator = torch.library.custom_op(f"doge_onnx::{name}", body, mutates_args=())
    operator.register_fake(fake)
    return operator


def _attention_shapes(
    query: Tensor, key: Tensor, value: Tensor, past_key: Tensor, past_value: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, past, width = past_key.shape
    present = (batch, heads, past + query.shape[1], width)
    return torch.empty_like(query), past_key.new_empty(present), past_value.new_empty(present)


FUSED = Operators(
    rms_norm=opaque("rms_norm", _rms_norm, lambda x, *_: torch.empty_like(x)),
    skip_rms_norm=opaque(
        "skip_rms_norm",
        _skip_rms_norm,
        lambda x, *_: (torch.empty_like(x), torch.empty_like(x)),
    ),
    rotary_embedding=opaque(
        "rotary_embedding", _rotary_embedding, lambda x, *_: torch.empty_like(x)
    ),
    causal_attention=opaque("causal_attention", _causal_attention, _attention_shapes),
    # The length is in a tensor, because the past may have spare rows: a size of its own.
    all_gates=opaque(
        "all_gates",
        _all_gates,
        lambda past_key, key, columns, total_length, first, count: key.new_empty(
            key.shape[0], past_key.shape[1] * count, torch.library.get_ctx().new_dynamic_size(min=2)
        ),
    ),
    log_sum_exp=opaque("log_sum_exp", _log_sum_exp, lambda x: x.new_empty(x.shape[:-1])),
    project_to_vocabulary=opaque(
        "project_to_vocabulary",
        _project_to_vocabulary,
        lambda x, embedding: x.new_empty(*x.shape[:-1], embedding.shape[0]),
    ),
    # The traced length is that of the default, 0 for all. The graph reads the tensor.
    keep_last=opaque("keep_last", _keep_last, lambda x, _: torch.empty_like(x)),
    new_columns=opaque(
        "new_columns",
        _new_columns,
        lambda mask, ids, *_: (
            torch.empty_like(ids),
            torch.empty_like(ids),
            torch.empty_like(ids),
            mask.new_empty(mask.shape[0], dtype=torch.int32),
            mask.new_empty((), dtype=torch.int32),
        ),
    ),
    quantized_linear=opaque(
        "quantized_linear",
        _quantized_linear,
        lambda x, codes, *_: x.new_empty(*x.shape[:-1], codes.shape[0]),
    ),
    quantized_rows=opaque(
        "quantized_rows",
        _quantized_rows,
        lambda codes, scales, indices, bits: scales.new_empty(
            *indices.shape, codes.shape[1] * codes.shape[2] * 8 // bits
        ),
    ),
)
