"""--precision bf16 and fp16 for the CPU: weights in 16 bits, all else in float32."""

from __future__ import annotations

import checkpoints
import numpy as np
import older_checkpoints
import onnx
import pytest
import torch
from checkpoints import SHAPES, random_ids
from exported import inlined, token_by_token
from safetensors.torch import load_file, save_file

import doge_onnx
from doge_onnx.bundle import GRAPH_NAME
from doge_onnx.errors import CheckpointError, DogeOnnxError
from doge_onnx.export import verify as verifier
from doge_onnx.export.exporter import export

TYPES = {
    "bf16": (onnx.TensorProto.BFLOAT16, torch.bfloat16),
    "fp16": (onnx.TensorProto.FLOAT16, torch.float16),
}
CONFIGS = {
    "small": {},
    "untied, biases": {"tie_word_embeddings": False, **SHAPES["biases"]},
    "mixture": {"is_moe": True, "num_experts": 16, "num_experts_per_tok": 3},
}


@pytest.mark.slow
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("precision", TYPES)
def test_matrices_have_16_bits_and_all_else_32(precision, config, tmp_path):
    kind, _ = TYPES[precision]
    checkpoint = checkpoints.make(tmp_path / "checkpoint", num_hidden_layers=2, **CONFIGS[config])
    made = export(checkpoint, tmp_path / "out", precision=precision)
    # Compared with transformers on rounded weights, to what fp32 is held to.
    assert made.parity.passed
    assert made.parity.tolerance <= 2e-4 * max(made.parity.logit_scale, 1.0)
    manifest = made.manifest
    assert (manifest.device, manifest.precision, manifest.activations, manifest.state.dtype) == (
        "cpu", precision, "float32", "float32",
    )  # fmt: skip
    for tensor in onnx.load(made.path / GRAPH_NAME).graph.initializer:
        small = len(tensor.dims) < 2 or tensor.name.startswith(("state.", "rotation."))
        wide = small or tensor.name.rpartition(".")[0].endswith((".gate", ".router"))
        wide = wide or tensor.name.endswith((".A", ".qk_norm"))
        assert (tensor.data_type == kind) == (not wide), tensor.name


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"kv_cache": "int8"}, {"state": "window"}], ids=str)
def test_every_state_takes_16_bit_weights(options, tmp_path):
    checkpoint = checkpoints.make(tmp_path / "checkpoint", num_hidden_layers=2)
    tensors = load_file(checkpoint / "model.safetensors")
    exact, ours = (
        export(checkpoint, tmp_path / name, precision=name, **options) for name in ("fp32", "bf16")
    )
    assert exact.manifest.state == ours.manifest.state
    ids = random_ids(20)
    logits = [token_by_token(made.path, ids) for made in (exact, ours)]
    scale = np.abs(logits[0]).max()
    assert 0 < np.abs(logits[1] - logits[0]).max() < 0.1 * scale
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())


@pytest.mark.slow
def test_a_checkpoint_in_bf16_loses_nothing(tmp_path):
    checkpoint = checkpoints.make(tmp_path / "checkpoint", num_hidden_layers=2)
    path = checkpoint / "model.safetensors"
    rounded = {name: tensor.bfloat16() for name, tensor in load_file(path).items()}
    save_file(rounded, path, metadata={"format": "pt"})
    exact, ours = (
        export(checkpoint, tmp_path / name, precision=name).path for name in ("fp32", "bf16")
    )
    sizes = [(made / GRAPH_NAME).stat().st_size for made in (exact, ours)]
    assert sizes[1] < 0.75 * sizes[0]
    ids = random_ids(20)
    np.testing.assert_array_equal(token_by_token(ours, ids), token_by_token(exact, ids))


@pytest.mark.slow
def test_older_checkpoints_are_compared_with_their_rounded_weights(tmp_path):
    # Queries are scaled by 1 / sqrt(8) before they are rounded.
    older_checkpoints.make(tmp_path / "checkpoint", "older", num_hidden_layers=2)
    made = export(tmp_path / "checkpoint", tmp_path / "out", precision="bf16")
    assert made.parity.passed
    assert verifier.verify(made.path, tmp_path / "checkpoint").passed


@pytest.mark.slow
def test_casts_are_of_weights_alone(tmp_path):
    # ONNX Runtime computes them once, when it loads the graph, but for looked-up rows.
    checkpoint = checkpoints.make(tmp_path / "checkpoint", num_hidden_layers=2)
    path = export(checkpoint, tmp_path / "out", precision="bf16", verify=False).path
    graph = inlined(path).graph
    weights = {tensor.name for tensor in graph.initializer}
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    casts = [node for node in graph.node if node.op_type == "Cast"]
    from_16_bits = [n for n in casts if types.get(n.input[0]) == onnx.TensorProto.BFLOAT16]
    assert len(from_16_bits) == 2 * 4 + 1
    gathered = {node.output[0] for node in graph.node if node.op_type == "Gather"}
    rest = [node for node in casts if node.input[0] not in weights]
    assert sum(node.input[0] in gathered for node in rest) == 1


def test_a_weight_that_float16_cannot_hold_is_named(tmp_path):
    checkpoint = checkpoints.make(tmp_path / "checkpoint", num_hidden_layers=1)
    path = checkpoint / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = 1e5
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"up_proj\.weight holds 1e\+05, which float16"):
        export(checkpoint, tmp_path / "out", precision="fp16")


@pytest.mark.parametrize("precision", TYPES)
def test_the_ort_format_would_hold_them_in_32_bits(precision, tmp_path):
    with pytest.raises(DogeOnnxError, match="would hold 16-bit weights in float32"):
        doge_onnx.export("nowhere", tmp_path / "out", precision=precision, format="ort")
