"""float16 and bfloat16: what they lose, what they refuse, and what stays float32."""

from __future__ import annotations

import shutil
from pathlib import Path

import checkpoints
import numpy as np
import older_checkpoints
import onnx
import onnxruntime
import pytest
import torch
from checkpoints import SHAPES, random_ids, reference_logits, rope
from conftest import TINY_CHECKPOINT
from exported import token_by_token
from onnx import TensorProto
from safetensors.torch import load_file, save_file
from stepping import fresh_text

import doge_onnx
from doge_onnx.errors import (
    BundleError,
    CheckpointError,
    DeviceError,
    DogeOnnxError,
    ParityError,
)
from doge_onnx.export import checkpoint as checkpoint_reader
from doge_onnx.export import half
from doge_onnx.export import verify as verifier
from doge_onnx.export.eager import EagerModel
from doge_onnx.export.state_rows import GATE_RANGES, HalfRows
from doge_onnx.export.verify import RELATIVE_TOLERANCES
from doge_onnx.runtime.engine.device import missing_for_cuda
from doge_onnx.runtime.text.tokenizer import Tokenizer

pytestmark = pytest.mark.slow

HALVES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def assert_near(ours, truth, dtype: str) -> None:
    """Within the tolerance that an export in that type is held to."""
    truth = np.asarray(truth)
    limit = RELATIVE_TOLERANCES[dtype] * max(float(np.abs(truth).max()), 1.0)
    assert np.abs(np.asarray(ours) - truth).max() <= limit


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("shape", ["small", "biases", "untied", "everything at once"])
def test_the_step_in_pytorch_is_near_transformers(shape, dtype, tmp_path):
    directory = checkpoints.make(tmp_path, **SHAPES[shape])
    ids = random_ids(24)
    model = EagerModel(checkpoint_reader.read(directory), 64, HALVES[dtype])
    assert_near(model.logits(ids), reference_logits(directory, ids), dtype)


@pytest.fixture(scope="module")
def rich(tmp_path_factory) -> Path:
    """Several gates in a group of heads, and experts."""
    directory = tmp_path_factory.mktemp("rich") / "checkpoint"
    older_checkpoints.make(
        directory, "older", is_moe=True, num_experts=16, num_experts_per_tok=3,
        num_hidden_layers=2,
    )  # fmt: skip
    return directory


@pytest.mark.parametrize("dtype", HALVES)
def test_older_mixtures_are_near_themselves_in_float64(rich, dtype):
    checkpoint = checkpoint_reader.read(rich)
    ids = random_ids(24, checkpoint.config.vocab_size)
    truth = EagerModel(checkpoint, 64, torch.float64).logits(ids)
    assert_near(EagerModel(checkpoint, 64, HALVES[dtype]).logits(ids), truth, dtype)


@pytest.fixture(scope="module")
def tiny_fp16(tmp_path_factory):
    """examples/doge-tiny for CUDA, compared with transformers on this machine."""
    out = tmp_path_factory.mktemp("half") / "bundle"
    return doge_onnx.export(TINY_CHECKPOINT, out, device="cuda")


def test_an_export_for_cuda_is_fp16_and_compared(tiny_fp16):
    manifest, parity = tiny_fp16.manifest, tiny_fp16.parity
    assert (manifest.precision, manifest.activations) == ("fp16", "float16")
    assert manifest.device == "cuda"
    assert (manifest.state.dtype, manifest.state.item_size) == ("float16", 2)
    assert not manifest.quantized
    assert parity is not None
    assert parity.passed
    assert parity.tolerance == RELATIVE_TOLERANCES["float16"] * parity.logit_scale
    # Seen is a twentieth of what is allowed: the model is small, and trained.
    assert parity.max_abs_diff < parity.tolerance / 5
    card = (tiny_fp16.path / "README.md").read_text()
    assert "\n- fp16\n" in card
    assert "| `past_key_values.{i}.key`, `.value` | float16 |" in card


def test_verify_holds_fp16_to_its_tolerance(tiny_fp16, monkeypatch):
    assert verifier.verify(tiny_fp16.path, TINY_CHECKPOINT, device="cpu").device == "cpu"
    monkeypatch.setitem(verifier.RELATIVE_TOLERANCES, "float16", 1e-5)
    assert not verifier.verify(tiny_fp16.path, TINY_CHECKPOINT).passed


def test_greedy_texts_are_those_of_fp32_but_for_near_ties(tiny_fp16, tiny_bundle):
    exact, rounded = doge_onnx.load(tiny_bundle), doge_onnx.load(tiny_fp16.path)
    prompt = Tokenizer(tiny_bundle / "tokenizer.json").encode("It was a dark")
    ids = exact.generate(prompt, max_new_tokens=64).token_ids
    truth, _ = exact.forward([prompt + ids[:-1]], logits="all")
    ours, _ = rounded.forward([prompt + ids[:-1]], logits="all")
    ties = 0
    for row, other in zip(truth[0, len(prompt) - 1 :], ours[0, len(prompt) - 1 :], strict=True):
        if row.argmax() != other.argmax():
            ties += 1
            assert np.sort(row)[-1] - row[other.argmax()] < 0.05
    assert len(ids) == 64
    assert ties <= 3


def _types(graph: onnx.GraphProto) -> dict[str, int]:
    """Element type of each value of a graph."""
    values = (*graph.input, *graph.output, *graph.value_info)
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    return types | {tensor.name: tensor.data_type for tensor in graph.initializer}


@pytest.mark.parametrize("dtype", [TensorProto.FLOAT16, TensorProto.BFLOAT16])
def test_types_of_the_graph(dtype, tiny_fp16, rich, make_bundle):
    if dtype == TensorProto.FLOAT16:
        graph = onnx.load(tiny_fp16.path / "model.onnx").graph
    else:
        made = make_bundle(rich, device="cuda", precision="bf16", verify=False)
        graph = onnx.load(made.path / "model.onnx").graph
    types = _types(graph)
    for value in (*graph.input, *graph.output):
        if value.name.startswith(("past_key_values", "present")):
            assert types[value.name] == dtype
    assert types["logits"] == TensorProto.FLOAT
    wide, matrices = [], 0
    for node in graph.node:
        kinds = {types[name] for name in node.input if types.get(name) in (1, 10, 16)}
        if node.op_type in ("Softplus", "Exp", "Softmax", "TopK"):
            # Gates, and which experts take part.
            assert kinds == {TensorProto.FLOAT}
        elif node.op_type in ("MatMul", "FusedMatMul"):
            weight = node.input[1]
            matrices += kinds == {dtype}
            if kinds == {TensorProto.FLOAT}:
                wide.append(weight.rpartition(".weight")[0].rpartition(".")[2])
        elif node.op_type in ("RMSNormalization", "SkipSimplifiedLayerNormalization"):
            assert kinds == {dtype}
            # Statistics are float32: by default in the one, and always in the other.
            stash = [a.i for a in node.attribute if a.name == "stash_type"]
            assert stash in ([], [TensorProto.FLOAT])
    assert set(wide) == ({"gate"} if dtype == TensorProto.FLOAT16 else {"gate", "router"})
    assert matrices > len(wide)
    assert sum(i.data_type == dtype for i in graph.initializer) > 10


def test_bf16_is_exported_but_not_run_on_a_cpu(tmp_path):
    report = doge_onnx.export(TINY_CHECKPOINT, tmp_path / "b", device="cuda", precision="bf16")
    if report.parity is None:
        assert "bf16, for which ONNX Runtime has no kernels on the CPU" in report.unchecked
    assert report.manifest.state.dtype == "bfloat16"
    with pytest.raises(DeviceError, match="needs CUDA, or an export in fp16 or fp32"):
        doge_onnx.load(report.path, device="cpu")
    with pytest.raises(DeviceError, match="no kernels on the CPU"):
        verifier.verify(report.path, TINY_CHECKPOINT, device="cpu")


def test_a_quantized_bundle_in_bf16_is_kept_where_nothing_can_run_it(one_layer, tmp_path):
    options = {"device": "cuda", "precision": "bf16", "kv_cache": "int8", "context_length": 32}
    if missing_for_cuda() is None:
        pytest.skip("this machine has CUDA")
    report = doge_onnx.export(one_layer, tmp_path / "b", **options)
    assert (report.quality, report.manifest.state.dtype) == (None, "int8")
    assert "no kernels on the CPU" in report.unchecked
    # A limit that cannot be looked at is refused before there is any work.
    with pytest.raises(DeviceError, match="a loss in bf16 can be measured on CUDA only, and the "):
        doge_onnx.export("nowhere", tmp_path / "c", max_kl=1.0, **options)


def break_split(monkeypatch, change) -> None:
    """Let `change` make other coarse gates, of those that are closed or of the others."""
    split = HalfRows.split

    def broken(rows, gates, dtype):
        coarse, fine = split(rows, gates, dtype)
        closed = coarse < GATE_RANGES["float16"].closed / 2
        return change(coarse, closed, rows.share == 1), fine

    monkeypatch.setattr(HalfRows, "split", broken)


def test_the_tolerance_of_fp16_does_not_pass_wrong_gates(one_layer, monkeypatch, tmp_path):
    def halved(coarse, closed, is_key):
        return torch.where(is_key & ~closed, coarse / 2, coarse)

    break_split(monkeypatch, halved)
    with pytest.raises(ParityError):
        doge_onnx.export(one_layer, tmp_path / "b", device="cuda", precision="fp16")


def run_graph(path: Path, ids: list[list[int]], mask: list[list[int]]) -> np.ndarray:
    """Logits `[B, S, V]` of a graph that is fed padding, as other software feeds it."""
    session = onnxruntime.InferenceSession(path / "model.onnx")
    feeds = {"input_ids": np.array(ids), "attention_mask": np.array(mask)}
    for entry in session.get_inputs()[2:]:
        _, heads, _, row = entry.shape
        feeds[entry.name] = np.zeros((len(ids), heads, 0, row), np.float16)
    return session.run(["logits"], feeds)[0]


@pytest.mark.parametrize("broken", [False, True])
def test_padding_in_a_graph_of_fp16_is_closed(broken, one_layer, monkeypatch, tmp_path):
    if broken:
        break_split(monkeypatch, lambda coarse, closed, _: torch.where(closed, 0, coarse))
    path = doge_onnx.export(
        one_layer, tmp_path / "b", device="cuda", precision="fp16", verify=False
    ).path
    ids = random_ids(9)
    alone = run_graph(path, [ids], [[1] * 9])[0]
    beside = run_graph(path, [[7] * 5 + ids], [[0] * 5 + [1] * 9])[0, 5:]
    limit = RELATIVE_TOLERANCES["float16"] * np.abs(alone).max()
    assert (np.abs(beside - alone).max() > limit) == broken


@pytest.fixture(scope="module")
def gated(tmp_path_factory) -> Path:
    """A checkpoint whose gates go up to 15000, and whose window is short."""
    directory = tmp_path_factory.mktemp("gated") / "checkpoint"
    older_checkpoints.make(
        directory, "native", A=2.4, dt_scale=3.0, num_hidden_layers=2, keep_window_size=12
    )
    return directory


def test_large_gates_and_padding_fit(gated, make_bundle):
    checkpoint = checkpoint_reader.read(gated)
    ids = fresh_text(30, checkpoint.config.vocab_size)
    exact = EagerModel(checkpoint, 30, torch.float64).logits(ids)
    ours = EagerModel(checkpoint, 30, torch.float16).logits(ids)
    assert_near(ours, exact, "float16")
    path = make_bundle(gated, device="cuda", precision="fp16", verify=False, context_length=30).path
    np.testing.assert_allclose(token_by_token(path, ids), exact, atol=0.3)
    # Beside others, a text is what it is alone: a closed gate is below all others, and no number
    # becomes infinite on the way, even in rows that see padding only.
    alone = run_graph(path, [ids[:4]], [[1] * 4])
    padded = [[ids[-1]] * 8 + ids[:4], ids[:12]]
    beside = run_graph(path, padded, [[0] * 8 + [1] * 4, [1] * 12])
    assert np.isfinite(beside).all()
    assert_near(beside[0, -4:], alone[0], "float16")


def test_a_gate_keeps_twice_the_bits_of_a_channel(gated):
    checkpoint = checkpoint_reader.read(gated)
    ids = torch.tensor([fresh_text(12, checkpoint.config.vocab_size)])
    keys = []
    for dtype in (torch.float64, torch.float16):
        model = EagerModel(checkpoint, 12, dtype)
        _, past = model.advance(ids, None)
        dim = model.state.heads.dim
        channels = past[0][0][..., dim : dim + model.state.heads.gate_channels]
        keys.append(channels.double().sum(-1))
    # In the first layer, they are of the same inputs but for the rounding of those.
    coarse = keys[0].half().double()
    assert (keys[1] - keys[0]).abs().max() / keys[0].abs().max() < 1e-2
    rest = past[0][0][..., dim + 1].double()
    assert rest.abs().max() > 0
    assert (rest.abs() <= coarse.abs() * 2.0**-10).all()


def _with(directory: Path, out: Path, change) -> Path:
    shutil.copytree(directory, out)
    path = out / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    return out


OVERFLOWS = {
    "a weight": (
        lambda t: t["model.layers.0.mlp.up_proj.weight"].view(-1)[5:6].fill_(1e5),
        r"layers\.0\.mlp\.up_proj\.weight holds 1e\+05, which float16 cannot",
    ),
    "the stream": (
        lambda t: (
            t["model.embed_tokens.weight"].mul_(2e3),
            t["model.layers.0.input_residual"].fill_(6e4),
        ),
        r"the residual stream in layer 0 reaches .*bf16 or fp32",
    ),
    "a product": (
        lambda t: t["model.layers.0.mlp.up_proj.weight"].mul_(2e4),
        r"the (in|out)put of feed_forward\.\w+ in layer 0 reaches .*bf16 or fp32",
    ),
    "a gate": (
        lambda t: t["model.layers.0.self_attn.A"].fill_(30.0),
        r"a gate in layer 0 reaches .*up to 30000 is safe in float16",
    ),
}


@pytest.mark.parametrize("name", OVERFLOWS)
def test_what_does_not_fit_is_refused_by_name(name, one_layer, tmp_path):
    change, message = OVERFLOWS[name]
    directory = _with(one_layer, tmp_path / "large", change)
    with pytest.raises(CheckpointError, match=message):
        doge_onnx.export(directory, tmp_path / "out", device="cuda", precision="fp16", verify=False)
    assert not (tmp_path / "out").exists()
    # bfloat16 has the range of float32.
    checkpoint = checkpoint_reader.read(directory)
    assert np.isfinite(EagerModel(checkpoint, 8, torch.bfloat16).logits([3, 4, 5])).all()


def test_neurons_of_experts_that_do_not_fit_are_refused(tmp_path):
    mixture = checkpoints.make(
        tmp_path / "c", num_hidden_layers=1, is_moe=True, num_experts=16, num_experts_per_tok=3
    )

    def scale(tensors):
        # Together they do no harm, and each weight fits.
        tensors["model.layers.0.mlp.down_embed.weight"].mul_(1e4)
        tensors["model.layers.0.mlp.up_embed.weight"].mul_(1e-5)

    directory = _with(mixture, tmp_path / "large", scale)
    with pytest.raises(CheckpointError, match="a neuron of the experts in layer 0 reaches"):
        doge_onnx.export(directory, tmp_path / "out", device="cuda", precision="fp16", verify=False)


def test_gates_beyond_the_calibration_text_saturate(one_layer, tmp_path):
    directory = _with(one_layer, tmp_path / "large", OVERFLOWS["a gate"][0])
    model = EagerModel(checkpoint_reader.read(directory), 8, torch.float16)
    assert np.isfinite(model.logits([3, 4, 5])).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layout": "hub", "precision": "fp16", "state": "window"}, "a window state is fp32"),
        ({"device": "cuda", "state": "window"}, "choose the precision fp32"),
        ({"device": "cuda", "precision": "bf16", "kv_cache": "fp32"}, "bfloat16, too, or int8"),
        ({"device": "cuda", "precision": "fp32"}, "takes fp16 and bf16, not fp32"),
        ({"device": "tpu"}, "device 'tpu' is not known; choose from cpu, cuda"),
        ({"precision": "fp16", "max_kl": 1.0}, "nothing is quantized"),
    ],
)
def test_what_does_not_go_together_is_refused_early(options, message, tmp_path):
    with pytest.raises(DogeOnnxError, match=message):
        doge_onnx.export("nowhere", tmp_path / "out", **options)


def test_which_activations_go_with_what():
    assert [half.default_precision(device) for device in half.DEVICES] == ["fp32", "fp16"]
    found = {
        (precision, device): half.activation_type(precision, device, "ort", "flat")
        for precision in ("fp32", "fp16", "bf16", "int4")
        for device in half.DEVICES
    }
    assert found == {
        ("fp32", "cpu"): "float32",
        ("fp32", "cuda"): "float32",
        ("fp16", "cpu"): "float32",
        ("fp16", "cuda"): "float16",
        ("bf16", "cpu"): "float32",
        ("bf16", "cuda"): "bfloat16",
        ("int4", "cpu"): "float32",
        ("int4", "cuda"): "float16",
    }
    # For WebGPU, and for engines of standard ONNX.
    assert half.activation_type("fp16", "cpu", "ort", "hub") == "float16"
    assert half.activation_type("fp16", "cpu", "portable", "flat") == "float16"


def test_int4_with_fp16_activations_loses_little_more(tmp_path):
    directory = checkpoints.make(tmp_path / "c", num_hidden_layers=2, **rope("dynamic", 4.0))
    losses = [
        doge_onnx.export(directory, tmp_path / device, precision="int4", device=device).quality
        for device in half.DEVICES
    ]
    assert losses[1].mean_kl < 1.2 * losses[0].mean_kl + 1e-3
    manifest = doge_onnx.load(tmp_path / "cuda").manifest
    assert manifest.quantized
    with pytest.raises(BundleError, match="is quantized"):
        verifier.verify(tmp_path / "cuda", directory)


def test_closed_gates_fit_their_type():
    for dtype, limits in GATE_RANGES.items():
        finite = torch.finfo(getattr(torch, dtype)).max
        assert limits.closed + limits.most < 0
        assert -finite < limits.closed
        assert limits.most < finite
