"""Precisions: how many bits each matrix of a step gets, and calibration with a text.

Runs a calibration text through the layers of a step, collects the inputs of each matrix, and
replaces float32 matrices with quantized ones; sets the ranges of an int8 state in the same way.
Knows the recipes and the reasons for them. Does not know how numbers are rounded (`rounding`),
or where the text comes from (`exporter`).

Embedding and tied head share one table. Norms, residual scales, gates and the routers of
mixtures stay float32: they are small, and the wrong key or expert costs more than a few bits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from doge_onnx.errors import DogeOnnxError
from doge_onnx.export import rounding
from doge_onnx.export.growing_state import GrowingState
from doge_onnx.export.layer import Layer
from doge_onnx.export.matrices import (
    Blocks,
    Embedding,
    Linear,
    QuantizedEmbedding,
    QuantizedLinear,
    QuantizedRows,
    Rows,
)
from doge_onnx.export.model_config import DogeConfig
from doge_onnx.export.step import RecurrentStep

ROUNDINGS = ("gptq", "nearest")
BLOCK_SIZES = (16, 32, 64, 128, 256)
# Number of calibration sequences that go through a layer at once.
_BATCH = 8


@dataclass(frozen=True)
class Form:
    """How a matrix is stored: bits of a code, and number of codes that share a scale."""

    bits: int
    block_size: int


@dataclass(frozen=True)
class Recipe:
    """A precision: the form of each matrix.

    Attributes:
        name: The name that users choose it by.
        body: Matrices of all layers except the first, without `output` and `down`.
        output: The output's matrix of attention.
        down: The second matrix of MLPs: its inputs have the largest outliers, and the kernels
            round inputs in the same blocks as weights.
        first: Matrices of the first layer, whose errors pass through all others.
        head: Embedding and head.
        experts: Tables of single-neuron experts.
        rounding: "gptq" or "nearest".
    """

    name: str
    body: Form
    output: Form
    down: Form
    first: Form
    head: Form
    experts: Form
    rounding: str = "gptq"


RECIPES = {
    "int8": Recipe(
        name="int8",
        body=Form(8, 64),
        output=Form(8, 64),
        down=Form(8, 16),
        first=Form(8, 16),
        head=Form(8, 32),
        experts=Form(8, 32),
    ),
    "int4": Recipe(
        name="int4",
        body=Form(4, 64),
        output=Form(4, 128),
        down=Form(4, 32),
        first=Form(8, 256),
        head=Form(8, 256),
        experts=Form(4, 32),
    ),
}
PRECISIONS = ("fp32", "fp16", "bf16", *RECIPES)


def check_choices(precision: str, block_size: int | None, rounding: str | None) -> None:
    """Check the options that do not depend on the model.

    Raises:
        DogeOnnxError: One of them is not known, or does not fit the precision.
    """
    if precision not in PRECISIONS:
        raise DogeOnnxError(
            f"precision {precision!r} is not known; choose from {', '.join(PRECISIONS)}"
        )
    if precision not in RECIPES:
        for name, value in (("block size", block_size), ("rounding", rounding)):
            if value is not None:
                raise DogeOnnxError(
                    f"a {name} is for quantized weights; choose the precision "
                    f"{' or '.join(RECIPES)}"
                )
    if rounding is not None and rounding not in ROUNDINGS:
        raise DogeOnnxError(
            f"rounding {rounding!r} is not known; choose from {', '.join(ROUNDINGS)}"
        )


def recipe_for(
    precision: str, block_size: int | None, rounding: str | None, config: DogeConfig
) -> Recipe | None:
    """The recipe of a precision with the user's changes; None if the precision has no recipe.

    Args:
        precision: One of `PRECISIONS`.
        block_size: Of the matrices of the layers; None for the recipe's own.
        rounding: One of `ROUNDINGS`; None for the recipe's own.
        config: The model's.

    Raises:
        DogeOnnxError: The block does not fit the model.
    """
    recipe = RECIPES.get(precision)
    if recipe is None:
        return None
    if rounding is not None:
        recipe = replace(recipe, rounding=rounding)
    if block_size is not None:
        sizes = [size for size in BLOCK_SIZES if size <= _power_of_two(config.hidden_size)]
        if block_size not in sizes or not isinstance(block_size, int):
            raise DogeOnnxError(
                f"block size {block_size!r} does not fit; for a hidden size of "
                f"{config.hidden_size} choose from {', '.join(map(str, sizes))}"
            )
        sized = {
            name: replace(getattr(recipe, name), block_size=block_size)
            for name in ("body", "output", "down", "first")
        }
        recipe = replace(recipe, **sized)
    return recipe


@torch.no_grad()
def quantize(
    step: RecurrentStep,
    recipe: Recipe | None,
    text: Tensor | None,
    progress: Callable[[str], None] = lambda _: None,
) -> None:
    """Quantize the matrices of a step in place, and set the ranges of an int8 state.

    Works layer by layer, so that the float32 weights of a layer are freed once it is quantized.

    Args:
        step: Is changed.
        recipe: None leaves the weights as they are.
        text: int64 `[N, S]`, token ids of typical texts. None rounds to nearest; an int8 state
            needs a text.
        progress: Called with a few words before each layer.
    """
    walk = None if text is None else _Walk(step, text)
    compensates = recipe is not None and recipe.rounding == "gptq"
    for index, layer in enumerate(step.layers):
        assert isinstance(layer, Layer)
        progress(f"quantizing layer {index + 1} of {len(step.layers)}")
        linears = _linears(layer) if compensates else []
        with _Moments(linears) as moments, _Ranges(layer) as ranges:
            if walk is not None:
                walk.through(layer)
        if recipe is not None:
            _quantize_layer(layer, recipe, recipe.first if index == 0 else None, moments.sums)
        ranges.fix()
    if recipe is not None:
        progress("quantizing embedding and head")
        sums = walk.end_moments() if walk is not None and compensates else None
        _quantize_ends(step, recipe, sums)


class _Walk:
    """The calibration text on its way through the layers."""

    def __init__(self, step: RecurrentStep, text: Tensor) -> None:
        self._step = step
        window = step.state.window
        if window is not None and not isinstance(step.state, GrowingState):
            # A window state needs a free row for each token.
            text = text[:, :window]
        self._batches = [self._start(step, ids) for ids in text.split(_BATCH)]

    @staticmethod
    def _start(step: RecurrentStep, ids: Tensor) -> list[Any]:
        heads, mask = step.state.heads, torch.ones_like(ids)
        if isinstance(step.state, GrowingState):
            tokens = step.state.tokens(ids, mask)
            past = torch.zeros(len(ids), heads.num_keys, 0, heads.row)
            return [*step.embed(ids), tokens, past, past]
        positions = torch.arange(ids.shape[1]).expand_as(ids)
        key = torch.zeros(len(ids), heads.num_keys, ids.shape[1], heads.row)
        value = torch.zeros_like(key)
        closing = step.state.closing
        key[..., closing.channels] = closing.value
        return [*step.embed(ids), step.state.tokens(ids, mask, positions), key, value]

    def through(self, layer: Layer) -> None:
        for batch in self._batches:
            batch[0], batch[1], _, _ = layer(*batch)

    def end_moments(self) -> Tensor:
        """Sum of x xᵀ over the inputs x of the head."""
        total = torch.zeros(())
        for h, *_ in self._batches:
            total = total + _outer(h)
        return total


def _outer(x: Tensor) -> Tensor:
    rows = x.flatten(0, -2)
    return rows.T @ rows


class _Moments:
    """A context that adds up x xᵀ over the inputs x of some linear maps."""

    def __init__(self, linears: list[Linear]) -> None:
        self._linears = linears
        self.sums: dict[nn.Module, Tensor] = {}

    def __enter__(self) -> _Moments:
        self._hooks = [linear.register_forward_pre_hook(self._add) for linear in self._linears]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _add(self, module: nn.Module, inputs: tuple[Tensor]) -> None:
        self.sums[module] = self.sums.get(module, torch.zeros(())) + _outer(inputs[0])


class _Ranges:
    """A context that notes the largest keys, values and gates of a layer with int8 rows."""

    def __init__(self, layer: Layer) -> None:
        self._layer = layer
        heads = layer.attention.heads
        self._key = torch.zeros(heads.num_keys, heads.dim)
        self._value = torch.zeros_like(self._key)
        self._gate = 0.0

    def __enter__(self) -> _Ranges:
        self._hook = None
        if self._layer.int8_rows is not None:
            self._hook = self._layer.attention.register_forward_pre_hook(self._watch)
        return self

    def __exit__(self, *_: object) -> None:
        if self._hook is not None:
            self._hook.remove()

    def _watch(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        _, k, v, *_ = inputs
        heads = self._layer.attention.heads
        keys, values = (x.flatten(0, 1).unflatten(-1, (heads.num_keys, -1)) for x in (k, v))
        # The length of each pair of channels, which rotation keeps. The largest value of a single
        # channel would be too small: other positions rotate the pair further into that channel.
        left, right = keys[..., : heads.dim].chunk(2, dim=-1)
        reach = torch.hypot(left, right).amax(0)
        self._key = torch.maximum(self._key, torch.cat([reach, reach], dim=-1))
        self._value = torch.maximum(self._value, values[..., : heads.dim].abs().amax(0))
        parts = keys[..., heads.dim : heads.dim + heads.gate_channels].unflatten(-1, (2, -1))
        self._gate = max(self._gate, float(parts.sum(-2).abs().max()))

    def fix(self) -> None:
        """Set the layer's steps to the ranges that were seen."""
        if self._layer.int8_rows is not None:
            self._layer.int8_rows.set_ranges(self._key, self._value, self._gate)


def _places(layer: Layer) -> dict[str, nn.Module]:
    """The large linear maps of a layer, by attribute, and the modules that hold them.

    A mixture's experts are tables and not among them; they multiply the input of the MLP.
    """
    return {
        "qkv": layer.project,
        "output": layer.attention,
        "gate_up": layer.feed_forward,
        "down": layer.feed_forward,
    }


def _linears(layer: Layer) -> list[Linear]:
    return [getattr(owner, name) for name, owner in _places(layer).items()]


def _quantize_layer(
    layer: Layer, recipe: Recipe, first: Form | None, moments: dict[nn.Module, Tensor]
) -> None:
    experts = layer.experts
    if experts is not None:
        seen = moments.get(layer.feed_forward.gate_up)
        experts.down = _quantized_rows(experts.down, recipe, seen, layer)
        experts.up = _quantized_rows(experts.up, recipe, None, layer)
    for name, owner in _places(layer).items():
        linear = getattr(owner, name)
        form = first or {"output": recipe.output, "down": recipe.down}.get(name, recipe.body)
        blocks = _blocks(linear.weight.T, form, moments.get(linear))
        setattr(owner, name, QuantizedLinear(blocks, linear.bias, layer.ops))


def _quantized_rows(
    rows: Rows | QuantizedRows, recipe: Recipe, moments: Tensor | None, layer: Layer
) -> QuantizedRows:
    assert isinstance(rows, Rows)
    form = _dividing(recipe.experts, rows.weight.shape[1])
    return QuantizedRows(_blocks(rows.weight, form, moments), layer.ops)


def _quantize_ends(step: RecurrentStep, recipe: Recipe, moments: Tensor | None) -> None:
    table, head = step.embed.table, step.head.matrix
    assert isinstance(table, Embedding)
    form = _dividing(recipe.head, table.weight.shape[1])
    tied = head is table
    blocks = _blocks(table.weight, form, moments if tied else None)
    step.embed.table = QuantizedEmbedding(blocks, step.ops)
    if tied:
        step.head.matrix = step.embed.table
        return
    assert isinstance(head, Linear)
    blocks = _blocks(head.weight.T, recipe.head, moments)
    step.head.matrix = QuantizedLinear(blocks, head.bias, step.ops)


def _blocks(weight: Tensor, form: Form, moments: Tensor | None) -> Blocks:
    size = min(form.block_size, _power_of_two(weight.shape[1]))
    if moments is None:
        return rounding.nearest(weight, form.bits, size)
    return rounding.compensated(weight, form.bits, size, moments)


def _dividing(form: Form, width: int) -> Form:
    """The form with the largest block size that divides `width`, if there is one.

    A row with padding would have to be cut after each look-up.
    """
    sizes = [size for size in BLOCK_SIZES if size <= form.block_size and width % size == 0]
    return replace(form, block_size=max(sizes)) if sizes else form


def _power_of_two(width: int) -> int:
    """The smallest block that holds a whole row."""
    return max(BLOCK_SIZES[0], 1 << (width - 1).bit_length())
