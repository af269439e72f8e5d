"""16-bit precisions: which export gets one, and whether a checkpoint fits into float16.

float16 has finer steps, and its largest number is 65504; bfloat16 has the range of float32, and
steps eight times as coarse. Knows which values of a model are rounded to half precision, and how
large they become on a text. `state` knows how a half-precision state is laid out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from doge_onnx.errors import CheckpointError, DogeOnnxError
from doge_onnx.export.checkpoint import Checkpoint
from doge_onnx.export.growing_state import GrowingState
from doge_onnx.export.layer import Experts, Layer
from doge_onnx.export.matrices import Linear
from doge_onnx.export.operators import STANDARD
from doge_onnx.export.state_rows import GATE_RANGES
from doge_onnx.export.step import RecurrentStep
from doge_onnx.manifest import DEVICES

# Element types of weights, and of activations where those are 16 bits, too.
HALVES = {"fp16": "float16", "bf16": "bfloat16"}
_LARGEST = torch.finfo(torch.float16).max
# Other texts may reach larger values than the one that is read here.
_HEADROOM = 2.0
# Weights that stay float32 where activations are float16: the ends of their names.
_WIDE = (".A", ".dt_proj.weight", ".dt_proj.bias", ".router_gate.weight")
# Sequences of the text that go through the model at once.
_BATCH = 4


def default_precision(device: str) -> str:
    """The precision for a device when none is chosen.

    Raises:
        DogeOnnxError: The device is not known.
    """
    if device not in DEVICES:
        raise DogeOnnxError(f"device {device!r} is not known; choose from {', '.join(DEVICES)}")
    return "fp16" if device == "cuda" else "fp32"


def activation_type(precision: str, device: str, target: str, layout: str) -> str:
    """Element type of the activations.

    CUDA's attention takes half precisions only, and WebGPU is fastest with them. The CPU computes
    in float32, so there a half precision is that of the weights alone.
    """
    if precision in HALVES:
        weights_only = (device, target, layout) == ("cpu", "ort", "flat")
        return "float32" if weights_only else HALVES[precision]
    return "float16" if device == "cuda" and precision != "fp32" else "float32"


def weight_type(precision: str, activations: str) -> torch.dtype | None:
    """Element type of matrices if they have 16 bits and activations do not; else None."""
    if precision in HALVES and activations == "float32":
        dtype: torch.dtype = getattr(torch, HALVES[precision])
        return dtype
    return None


def round_weights(checkpoint: Checkpoint, dtype: torch.dtype) -> None:
    """Round the matrices of a checkpoint to 16 bits, and keep them in float32.

    Done before anything is computed from them, so that a step is exactly that of the rounded
    checkpoint.
    """
    for name, tensor in checkpoint.tensors.items():
        if tensor.dim() == 2 and not name.endswith(_WIDE):
            checkpoint.tensors[name] = tensor.to(dtype).to(tensor.dtype)


def made_for(activations: str, device: str) -> str:
    """What an export is for, "cpu" or "cuda", if `device` was asked for: bf16 is for CUDA only."""
    return "cuda" if activations == "bfloat16" else device


def check_weights(checkpoint: Checkpoint) -> None:
    """Check that all weights that become float16 are within its range.

    Raises:
        CheckpointError: A weight is not; the message names it.
    """
    for name, tensor in checkpoint.tensors.items():
        largest = float(tensor.abs().max())
        if not name.endswith(_WIDE) and not largest <= _LARGEST:
            raise CheckpointError(
                f"{name} holds {largest:.4g}, which float16 cannot (it ends at {_LARGEST:.0f}); "
                "choose the precision bf16 or fp32"
            )


@torch.no_grad()
def check_activations(
    checkpoint: Checkpoint, text: Tensor, progress: Callable[[str], None] = lambda _: None
) -> None:
    """Check that all values a model computes for a text fit into float16, with room to spare.

    Args:
        checkpoint: Keeps its tensors.
        text: int64 `[N, S]`, token ids such as the model sees.
        progress: Called with a few words.

    Raises:
        CheckpointError: A value is too large; the message names the first one.
    """
    progress("looking for values that float16 cannot hold")
    watch = _Watch()
    rotate, skip = STANDARD.rotary_embedding, STANDARD.skip_rms_norm

    def rotary_embedding(x: Tensor, *rest: object) -> Tensor:
        heads = step.state.heads
        rows = x.unflatten(-1, (heads.num_rotated, heads.row))
        watch.see(
            "a gate", rows[..., heads.dim : heads.dim + heads.gates], GATE_RANGES["float16"].most
        )
        watch.see("a key or query", rows[..., : heads.dim])
        return rotate(x, *rest)  # type: ignore[arg-type]  # as it was called

    def skip_rms_norm(
        x: Tensor, other: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        normed, total = skip(x, other, weight, eps)
        watch.see("the residual stream", total)
        watch.see("what a norm returns", normed)
        return normed, total

    operators = replace(STANDARD, rotary_embedding=rotary_embedding, skip_rms_norm=skip_rms_norm)
    own = checkpoint.shared()
    state = GrowingState(own, text.shape[1], operators)
    step = RecurrentStep(own, state, operators).eval()
    _attach(watch, step)
    heads = state.heads
    for ids in text.split(_BATCH):
        empty = torch.zeros(len(ids), heads.num_keys, 0, heads.row)
        logits, _ = step((ids, torch.ones_like(ids)), [(empty, empty)] * len(step.layers))
        watch.where = ""
        watch.see("a logit", logits)


def _attach(watch: _Watch, step: RecurrentStep) -> None:
    """Let a watch see the inputs and outputs of a step's layers."""

    def enter(number: int) -> Callable[..., None]:
        def hook(*_: object) -> None:
            watch.where = f" in layer {number}"

        return hook

    def matrix(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
            watch.see(f"the input of {name}", inputs[0])
            watch.see(f"the output of {name}", output)

        return hook

    def neurons(module: Experts) -> None:
        """Watch the input of the experts' activation, which no module returns."""
        entered: list[Tensor] = []

        def enter(_: nn.Module, inputs: tuple[Tensor]) -> None:
            entered[:] = inputs

        def hook(_: nn.Module, inputs: object, rows: Tensor) -> None:
            watch.see("a neuron of the experts", rows @ entered[0].unsqueeze(-1))

        module.register_forward_pre_hook(enter)
        module.down.register_forward_hook(hook)

    for number, layer in enumerate(step.layers):
        assert isinstance(layer, Layer)
        layer.register_forward_pre_hook(enter(number))
        for name, module in layer.named_modules():
            # Gates and the scores of routers are not rounded.
            if isinstance(module, Linear) and not name.endswith((".gate", ".router")):
                module.register_forward_hook(matrix(name))
            if isinstance(module, Experts):
                module.register_forward_hook(matrix("the experts"))
                neurons(module)


class _Watch:
    """Raises an error at the first value that is too large."""

    def __init__(self) -> None:
        self.where = ""

    def see(self, what: str, values: Tensor, limit: float = _LARGEST / _HEADROOM) -> None:
        """Check `values`; `what` is their name in the message.

        Raises:
            CheckpointError: A value is larger than `limit`, or not a number.
        """
        largest = float(values.abs().max())
        # `largest > limit` would be false for NaN.
        if not largest <= limit:
            size = f"{largest:.4g}" if math.isfinite(largest) else "a value that is no number"
            raise CheckpointError(
                f"{what}{self.where} reaches {size} on a text that the model wrote itself; up to "
                f"{limit:.0f} is safe in float16: choose the precision bf16 or fp32"
            )
