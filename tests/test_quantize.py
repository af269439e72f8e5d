"""Bundles with quantized weights and states, from small random checkpoints of odd shapes."""

import collections
from dataclasses import replace

import checkpoints
import numpy as np
import older_checkpoints
import onnx
import pytest
import torch
from checkpoints import SHAPES
from conftest import TINY_CHECKPOINT
from exported import inlined
from stepping import row

import doge_onnx
from doge_onnx import cli_output
from doge_onnx.bundle import GRAPH_NAME, MANIFEST_NAME, read_manifest
from doge_onnx.errors import DogeOnnxError, QualityError
from doge_onnx.export import checkpoint as checkpoint_reader
from doge_onnx.export import exporter, lowering, quality
from doge_onnx.export.exporter import export
from doge_onnx.export.growing_state import GrowingState
from doge_onnx.export.operators import STANDARD
from doge_onnx.export.quantize import RECIPES, quantize, recipe_for
from doge_onnx.export.state_rows import CLOSED_GATE, Int8Rows
from doge_onnx.export.step import RecurrentStep

pytestmark = pytest.mark.slow

MOE = {"is_moe": True, "num_experts": 49, "num_experts_per_tok": 5, "num_hidden_layers": 2}
# Widths that no block divides, biases, a head of its own; mixtures; a group of three.
ODD = {
    "everything at once": SHAPES["everything at once"],
    "small": SHAPES["small"],
    "mixture": MOE,
    "wide": {"hidden_size": 200, "intermediate_size": 130, "head_dim": 40, "num_hidden_layers": 2},
}
LENGTH = 24
# Of two experts that score almost the same, another one may be chosen.
LARGEST = {"mixture": 0.2}


@pytest.fixture(scope="module")
def make_checkpoint(tmp_path_factory):
    made = {}

    def get(name):
        if name not in made:
            made[name] = checkpoints.make(
                tmp_path_factory.mktemp("odd") / "checkpoint", **ODD[name]
            )
        return made[name]

    return get


@pytest.fixture(scope="module")
def tiny_int8(tmp_path_factory):
    out = tmp_path_factory.mktemp("tiny") / "int8"
    return export(TINY_CHECKPOINT, out, precision="int8", kv_cache="int8")


@pytest.fixture(scope="module")
def tiny_int4(tmp_path_factory):
    return export(TINY_CHECKPOINT, tmp_path_factory.mktemp("tiny") / "int4", precision="int4")


def text_of(vocab_size: int, length: int = LENGTH, seed: int = 3) -> list[int]:
    return checkpoints.random_ids(length, vocab_size, seed)


def eager_logits(directory, precision, text, ids) -> torch.Tensor:
    """The quantized step as PyTorch runs it: its inputs are not rounded to 8 bits."""
    checkpoint = checkpoint_reader.read(directory)
    state = GrowingState(checkpoint, 64, STANDARD)
    step = RecurrentStep(checkpoint, state, STANDARD).eval()
    quantize(step, recipe_for(precision, None, None, checkpoint.config), text)
    empty = torch.zeros(1, state.heads.num_keys, 0, state.heads.row)
    past = [(empty, empty)] * checkpoint.config.num_hidden_layers
    return step((row(ids), torch.ones(1, len(ids), dtype=torch.int64)), past)[0][0].detach()


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("precision", RECIPES)
def test_the_graph_computes_what_the_quantized_step_does(
    name, precision, make_checkpoint, tmp_path, monkeypatch
):
    directory = make_checkpoint(name)
    vocab_size = checkpoint_reader.read(directory).config.vocab_size
    text = torch.tensor([text_of(vocab_size, 64, seed) for seed in range(8)])
    monkeypatch.setattr(exporter, "calibration_text", lambda *_: text)
    export(directory, tmp_path / "out", precision=precision, verify=False)
    ids = text_of(vocab_size)
    ours = doge_onnx.load(tmp_path / "out").forward([ids], logits="all")[0][0]
    expected = eager_logits(directory, precision, text, ids)
    # Inputs rounded to 8 bits change the logits by 1 percent; swapped halves of a byte, by all.
    difference = (torch.from_numpy(ours) - expected).square().mean().sqrt()
    assert difference < LARGEST.get(name, 0.03) * expected.square().mean().sqrt()


@pytest.mark.parametrize("name", ODD)
def test_eight_bits_lose_little_and_four_bits_more(name, make_checkpoint):
    directory = make_checkpoint(name)
    vocab_size = checkpoint_reader.read(directory).config.vocab_size
    text = torch.tensor([text_of(vocab_size, 64, seed) for seed in range(8)])
    ids = text_of(vocab_size)
    exact = eager_logits(directory, "fp32", None, ids)
    scale = exact.square().mean().sqrt()
    losses = [
        float((eager_logits(directory, precision, text, ids) - exact).square().mean().sqrt())
        for precision in ("int8", "int4")
    ]
    assert 0 < losses[0] < LARGEST.get(name, 0.03) * scale
    assert losses[0] < losses[1] < 0.7 * scale


def test_embedding_and_head_are_one_table(tiny_int8):
    graph = onnx.load(tiny_int8.path / GRAPH_NAME).graph
    # Of floats and codes: there are as many numbers of columns.
    kinds = (onnx.TensorProto.FLOAT, onnx.TensorProto.UINT8)
    tables = [i for i in graph.initializer if i.dims[:1] == [4096] and i.data_type in kinds]
    assert sorted(i.data_type for i in tables) == [onnx.TensorProto.FLOAT, onnx.TensorProto.UINT8]
    codes = next(i.name for i in tables if i.data_type == onnx.TensorProto.UINT8)
    users = {node.op_type for node in graph.node if codes in node.input}
    assert users == {"Embed", "ProjectToVocabulary"}


@pytest.mark.parametrize("precision", RECIPES)
def test_no_large_matrix_stays_float(precision, make_checkpoint, tmp_path):
    export(make_checkpoint("mixture"), tmp_path / "out", precision=precision, verify=False)
    graph = onnx.load(tmp_path / "out" / GRAPH_NAME).graph
    floats = {
        i.name: tuple(i.dims)
        for i in graph.initializer
        if i.data_type == onnx.TensorProto.FLOAT and len(i.dims) == 2 and "scales" not in i.name
    }
    # Gates and routers, where a few bits would choose other keys and experts.
    assert {name.split(".")[-2] for name in floats if name.startswith("layers.")} == {
        "gate",
        "router",
        # A and the norms of queries and keys.
        "project",
    }
    tables = [i for i in graph.initializer if i.dims and i.dims[0] == MOE["num_experts"]]
    kinds = collections.Counter(i.data_type for i in tables)
    assert kinds[onnx.TensorProto.UINT8] == kinds[onnx.TensorProto.FLOAT] == 4


def test_a_layer_has_no_nodes_that_need_not_be_there(tiny_int8, tiny_bundle):
    for path, most in ((tiny_int8.path, 28), (tiny_bundle, 24)):
        nodes = inlined(path).graph.node
        counts = collections.Counter(node.op_type for node in nodes)
        layers = counts["GroupQueryAttention"]
        assert layers == 4
        assert len(nodes) <= most * layers + 30
        # Shapes are put together once, and nothing is cut or padded in a layer.
        assert counts["Shape"] <= 4
        assert counts["Slice"] == 2
        assert counts["Concat"] == layers
        assert counts["Where"] == counts["Transpose"] == 0
        # Columns and lengths, once for all layers.
        assert (counts["Min"], counts["Cast"]) == (1, 2)


@pytest.mark.parametrize("target", ["weights", "state"])
def test_every_state_takes_quantized_weights(target, tmp_path):
    options = {"keep_window_size": 12, "num_hidden_layers": 2}
    directory = checkpoints.make(tmp_path / "checkpoint", **options)
    state = "window" if target == "state" else "growing"
    exact, ours = (
        export(directory, tmp_path / precision, precision=precision, state=state, verify=False)
        for precision in ("fp32", "int8")
    )
    ids = text_of(97, 11)
    expected, found = (doge_onnx.load(r.path).forward([ids])[0] for r in (exact, ours))
    assert np.abs(found - expected).max() < 0.05 * np.abs(expected).max()


def test_older_checkpoints_quantize_too(tmp_path):
    directory = older_checkpoints.make(tmp_path / "older").directory
    logits = []
    for precision, kv_cache in (("fp32", "fp32"), ("int8", "int8")):
        out = tmp_path / precision
        export(directory, out, precision=precision, kv_cache=kv_cache, verify=False)
        logits.append(doge_onnx.load(out).forward([text_of(61)], logits="all")[0])
    difference = np.sqrt(np.square(logits[0] - logits[1]).mean())
    assert 0 < difference < 0.05 * np.sqrt(np.square(logits[0]).mean())


def test_an_int8_state_goes_on_exactly_where_it_was(tiny_int8):
    model = doge_onnx.load(tiny_int8.path)
    assert model.manifest.state.dtype == "int8"
    ids = text_of(4096, 40)
    whole, _ = model.forward([ids], logits="all")
    _, state = model.forward([ids[:13]])
    rest, _ = model.forward([ids[13:]], state, logits="all")
    # What is rounded from one to the other side of a step differs by one step.
    assert np.abs(rest[0] - whole[0, 13:]).max() < 0.05 * np.abs(whole).max()
    again, _ = model.forward([ids[13:]], state, logits="all")
    np.testing.assert_array_equal(again, rest)


def test_nothing_attends_to_padding_of_an_int8_state(tiny_int8):
    model = doge_onnx.load(tiny_int8.path)
    ids = text_of(4096, 9)
    alone, _ = model.forward([ids])
    padded = [[7] * 5 + ids, text_of(4096, 14, seed=1)]
    mask = [[0] * 5 + [1] * 9, [1] * 14]
    batch, _ = model.forward(padded, attention_mask=mask)
    assert np.abs(batch[0] - alone[0]).max() < 0.02 * np.abs(alone).max()


def test_gates_keep_their_precision_in_int8(tmp_path):
    directory = checkpoints.make(tmp_path / "checkpoint", num_hidden_layers=1)
    heads = GrowingState(checkpoint_reader.read(directory), 64, STANDARD, "int8").heads
    assert heads.row % 16 == 0
    rows = Int8Rows(heads, CLOSED_GATE)
    largest = torch.ones(heads.num_keys, heads.dim)
    rows.set_ranges(largest, largest, gate=6.0)
    gates = torch.full((1, 500, heads.num_rotated, 1), 2.0)
    gates[:, :, heads.num_queries :] = torch.linspace(0, 40, 500)[None, :, None, None]
    parts = torch.cat(rows.split(gates, torch.float32), dim=-1)
    assert (parts[:, :, : heads.num_queries] == 1).all()
    keys = parts[:, :, heads.num_queries :]
    steps = rows.key_scale[0, :, 0, heads.dim : heads.dim + 2]
    kept = ((keys / steps).round().clamp(-128, 127) * steps).sum(-1)
    error = (kept - gates[:, :, heads.num_queries :, 0]).abs().max()
    # A single channel that reaches as far would be off by 0.19.
    assert error < 1e-3


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_the_loss_is_small_and_written_down(name, tiny_int8, tiny_int4):
    report, kl, agreement = {"int8": (tiny_int8, 6e-4, 0.98), "int4": (tiny_int4, 9e-3, 0.92)}[name]
    lost = report.quality
    assert lost.mean_kl < kl
    assert lost.top1_agreement > agreement
    assert report.parity is None
    manifest = read_manifest(report.path)
    assert manifest.precision == name
    assert manifest.quality["mean_kl"] == lost.mean_kl
    assert manifest.parity is None
    assert "KL" in (report.path / "README.md").read_text(encoding="utf-8")
    doge_onnx.load(report.path)


def test_sizes_are_what_the_bits_promise(tiny_int8, tiny_int4):
    for report, limit in ((tiny_int8, 1.2), (tiny_int4, 0.85)):
        graph = sum(path.stat().st_size for path in report.path.glob("model.onnx*"))
        # A graph of 3.4 million weights weighs as much in names and shapes as a large one.
        assert graph - 60_000 < limit * report.manifest.parameters


def test_a_loss_beyond_the_limit_leaves_nothing_behind(tmp_path):
    directory = checkpoints.make(tmp_path / "checkpoint", num_hidden_layers=1)
    with pytest.raises(QualityError, match="1e-09"):
        export(directory, tmp_path / "out", precision="int4", max_kl=1e-9)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_a_notable_loss_is_mentioned(tiny_int4, capsys):
    cli_output.export_summary("out", tiny_int4)
    assert "warning" not in capsys.readouterr().err
    notable = replace(tiny_int4, quality=replace(tiny_int4.quality, mean_kl=0.25))
    cli_output.export_summary("out", notable)
    assert "warning: 0.250 nats" in capsys.readouterr().err


def test_a_loss_that_is_no_number_is_no_success(tmp_path, original, monkeypatch):
    measure = quality.measure
    monkeypatch.setattr(
        quality, "measure", lambda *a, **k: replace(measure(*a, **k), mean_kl=float("nan"))
    )
    with pytest.raises(QualityError):
        export(original, tmp_path / "out", precision="int8")
    assert not list(tmp_path.iterdir())


def test_a_loss_that_cannot_be_measured_is_refused_early(tmp_path, original):
    steps = []
    with pytest.raises(DogeOnnxError, match="context length of 1"):
        export(
            original, tmp_path / "out", precision="int8", context_length=1, progress=steps.append
        )
    assert "building the recurrent step" not in steps
    options = {"rounding": "nearest", "verify": False}
    export(original, tmp_path / "out", precision="int8", context_length=1, **options)


def test_keys_fit_the_int8_state_at_every_position(tmp_path):
    directory = checkpoints.make(
        tmp_path / "checkpoint", num_hidden_layers=1, head_dim=32, attention_bias=True
    )
    checkpoint = checkpoint_reader.read(directory)
    state = GrowingState(checkpoint, 64, STANDARD, "int8")
    step = RecurrentStep(checkpoint, state, STANDARD).eval()
    ids = torch.tensor([text_of(97, 8)])
    quantize(step, None, ids)
    attention = step.layers[0].attention
    reach = attention.int8_rows.key_scale[0, :, 0, :32] * 127
    # The same tokens, wherever they stand.
    seen = []
    attention.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1]))
    mask = torch.ones(1, 64, dtype=torch.int64)
    for start in range(0, 56, 8):
        tokens = state.tokens(ids, mask[:, : start + 8])
        past = torch.zeros(1, state.heads.num_keys, start, state.heads.row, dtype=torch.int8)
        step.layers[0](*step.embed(ids), tokens, past, past)
    keys = torch.cat(seen, dim=1).unflatten(-1, (state.heads.num_keys, -1))[..., :32]
    assert keys.shape[1] == 56
    assert (keys.abs() <= reach * 1.0001).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "int3"}, "'int3' is not known; choose from fp32, fp16, bf16, int8, int4"),
        ({"precision": "int8", "block_size": 48}, "48 does not fit.*choose from 16, 32, 64"),
        ({"precision": "int8", "block_size": 128}, "128 does not fit; for a hidden size of 48"),
        ({"block_size": 32}, "for quantized weights"),
        ({"rounding": "gptq"}, "for quantized weights"),
        ({"precision": "int4", "rounding": "up"}, "'up' is not known; choose from gptq, nearest"),
        ({"precision": "int8", "target": "portable"}, "target ort"),
        ({"kv_cache": "int4"}, "'int4' is not known; choose from fp32, int8"),
        ({"kv_cache": "int8", "state": "window"}, "window state is fp32"),
        ({"kv_cache": "int8", "context_length": 4096}, "at most 2048"),
        ({"max_kl": 0.1}, "nothing is quantized"),
        ({"precision": "int8", "max_kl": 0.1, "verify": False}, "not measured"),
        ({"precision": "int8", "max_kl": -1.0}, "0 or more"),
        ({"precision": "int8", "max_kl": "0.1"}, "0 or more"),
    ],
)
def test_what_does_not_fit_is_refused_before_any_work(options, message, tmp_path, original):
    with pytest.raises(DogeOnnxError, match=message):
        export(original, tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


def test_a_missing_kernel_is_named(tmp_path, original, monkeypatch):
    monkeypatch.setattr(lowering.onnxruntime_pybind11_state, "get_all_opkernel_def", lambda: [])
    with pytest.raises(DogeOnnxError, match="no CPU kernel for MatMulNBits; upgrade"):
        export(original, tmp_path / "out", precision="int8")


def test_an_expert_can_choose_block_and_rounding(tmp_path, original):
    out = tmp_path / "out"
    export(original, out, precision="int4", block_size=16, rounding="nearest", verify=False)
    graph = onnx.load(out / GRAPH_NAME).graph
    shapes = {i.name: i.dims[-1] for i in graph.initializer if i.name.endswith(".weight")}
    assert shapes["layers.1.feed_forward.down.weight"] == 8
    assert (out / MANIFEST_NAME).is_file()
