"""Export from end to end: the graph, its results on both targets, and what else a bundle holds.

Tracing takes seconds, so a few bundles serve many tests.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import checkpoints
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from checkpoints import SHAPES, assert_close, random_ids, reference_logits
from exported import CONTEXT, TOKENIZER_FILES, inlined, token_by_token, tree
from onnx import numpy_helper

import doge_onnx
from doge_onnx.bundle import GRAPH_NAME, MANIFEST_NAME, WEIGHTS_NAME, Bundle
from doge_onnx.errors import (
    BundleError,
    CheckpointError,
    ConfigError,
    DogeOnnxError,
    InputError,
)
from doge_onnx.export import exporter
from doge_onnx.export.exporter import export

pytestmark = pytest.mark.slow

# The graph.


def test_inputs_and_outputs_are_those_of_the_contract(each):
    state, target = each.manifest.state, each.manifest.target
    row = ["batch_size", state.num_heads, "past_sequence_length", state.row_size]
    inputs = {
        "input_ids": ["batch_size", "sequence_length"],
        "attention_mask": ["batch_size", "total_sequence_length"],
    }
    outputs = {"logits": ["batch_size", "sequence_length", each.manifest.vocab_size]}
    for layer in range(state.num_layers):
        for part in ("key", "value"):
            inputs[f"past_key_values.{layer}.{part}"] = row
            outputs[f"present.{layer}.{part}"] = [*row[:2], "total_sequence_length", row[3]]

    session = onnxruntime.InferenceSession(each.path / GRAPH_NAME)
    assert [(i.name, i.shape) for i in session.get_inputs()] == list(inputs.items())
    assert [(o.name, o.shape) for o in session.get_outputs()] == list(outputs.items())
    types = {i.name: i.type for i in (*session.get_inputs(), *session.get_outputs())}
    assert types.pop("input_ids") == types.pop("attention_mask") == "tensor(int64)"
    assert set(types.values()) == {"tensor(float)"}
    # The inputs beside these have defaults, so nobody has to know of them.
    overridable = {i.name for i in session.get_overridable_initializers()}
    assert overridable == ({"logits_to_keep", "past_lengths"} if target == "ort" else set())


def test_the_state_has_the_shape_that_the_config_implies(main, second):
    state = main.manifest.state
    assert (state.num_layers, state.num_heads, state.head_dim, state.row_size) == (2, 2, 8, 16)
    state = second.manifest.state
    assert (state.num_layers, state.num_heads, state.head_dim, state.row_size) == (3, 1, 12, 16)


def test_the_graph_is_valid_onnx(each):
    onnx.checker.check_model(each.path / GRAPH_NAME, full_check=True)


def test_a_portable_graph_has_standard_operators_only(each):
    model = each.graph()
    domains = {node.domain for node in model.graph.node}
    domains |= {node.domain for function in model.functions for node in function.node}
    domains |= {entry.domain for entry in model.opset_import}
    if each.manifest.target == "portable":
        assert domains == {""}
    else:
        assert domains == {"", "com.microsoft", "doge_onnx"}


def test_a_graph_for_onnx_runtime_uses_its_fused_attention(main):
    counts = Counter(node.op_type for node in inlined(main.path).graph.node)
    assert counts["GroupQueryAttention"] == 2
    assert counts["RotaryEmbedding"] == 2
    # One norm begins, every other one is fused with the sum before it; and q/k norms.
    assert counts["SkipSimplifiedLayerNormalization"] == 4
    assert counts["Softmax"] == 0


def test_every_weight_is_there_once(each):
    arrays = [numpy_helper.to_array(tensor) for tensor in each.graph().graph.initializer]
    large = [array for array in arrays if array.size > 100]
    contents = Counter(array.tobytes() for array in large)
    contents.update(array.T.tobytes() for array in large if array.ndim == 2)
    # A square matrix is its own size transposed; no content may come up a second time.
    assert max(contents.values()) == 1

    config = json.loads((each.checkpoint / "config.json").read_text())
    matrix = sorted((config["vocab_size"], config["hidden_size"]))
    copies = [array for array in large if sorted(array.shape) == matrix]
    assert len(copies) == (1 if config["tie_word_embeddings"] else 2)
    # Nothing is stored as anything larger than float32, or spread out by constant folding.
    size = (each.path / GRAPH_NAME).stat().st_size
    assert size < 1.5 * 4 * each.manifest.parameters


def test_a_small_model_is_one_file(main):
    assert not (main.path / WEIGHTS_NAME).exists()


def test_nothing_of_this_machine_is_in_a_bundle(each):
    traces = [
        str(each.checkpoint.parent),
        str(each.path.parent),
        str(Path(doge_onnx.__file__).parent),
        str(Path(torch.__file__).parent),
        "site-packages",
        '.py", line',
    ]
    for path in each.path.iterdir():
        content = path.read_bytes()
        for trace in traces:
            assert trace.encode() not in content, f"{trace} in {path.name}"


# Its results.


def test_prefill_is_transformers_token_by_token(each):
    ids = random_ids(CONTEXT if each.manifest.context_length == CONTEXT else 40, seed=1)
    logits, _ = doge_onnx.load(each.path).forward([ids], logits="all")
    assert_close(logits[0], reference_logits(each.checkpoint, ids))


def test_decode_is_transformers_token_by_token(each):
    ids = random_ids(CONTEXT if each.manifest.context_length == CONTEXT else 40, seed=2)
    assert_close(token_by_token(each.path, ids), reference_logits(each.checkpoint, ids))


def test_a_padded_batch_gives_what_each_row_gives_alone(each):
    prompts = [random_ids(length, seed=length) for length in (25, 3, 12)]
    ids = [[7] * (25 - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (25 - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    model = doge_onnx.load(each.path)
    logits, state = model.forward(ids, attention_mask=mask, logits="all")
    following, _ = model.forward([[1], [2], [3]], state)
    for row, prompt in enumerate(prompts):
        truth = reference_logits(each.checkpoint, [*prompt, row + 1])
        assert_close(logits[row, -len(prompt) :], truth[:-1])
        assert_close(following[row], truth[-1:])


def test_the_graph_needs_nothing_but_onnx_runtime(each):
    # The loop that somebody writes who has read nothing but the model card.
    state = each.manifest.state
    session = onnxruntime.InferenceSession(each.path / GRAPH_NAME)
    layers = range(state.num_layers)
    names = [f"past_key_values.{i}.{part}" for i in layers for part in ("key", "value")]
    empty = np.zeros((1, state.num_heads, 0, state.row_size), np.float32)
    past = dict.fromkeys(names, empty)
    ids, pieces, seen = random_ids(20, seed=5), [], 0
    for size in (7, 1, 1, 8, 3):
        seen += size
        feed = {
            "input_ids": np.array([ids[seen - size : seen]]),
            "attention_mask": np.ones((1, seen), np.int64),
            **past,
        }
        logits, *present = session.run(None, feed)
        assert {tensor.shape for tensor in present} == {(1, state.num_heads, seen, state.row_size)}
        past = dict(zip(names, present, strict=True))
        pieces.append(logits[0])
    assert_close(np.concatenate(pieces), reference_logits(each.checkpoint, ids))


def test_fewer_logits_can_be_asked_for(main):
    state = main.manifest.state
    session = onnxruntime.InferenceSession(main.path / GRAPH_NAME)
    feed = {
        "input_ids": np.array([random_ids(6)]),
        "attention_mask": np.ones((1, 6), np.int64),
    }
    for entry in session.get_inputs()[2:]:
        feed[entry.name] = np.zeros((1, state.num_heads, 0, state.row_size), np.float32)
    everything = session.run(["logits"], feed)[0]
    assert everything.shape[1] == 6
    for count in (1, 4):
        (some,) = session.run(["logits"], {**feed, "logits_to_keep": np.array([count])})
        np.testing.assert_allclose(some, everything[:, -count:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "shape", ["one KV head", "every head a KV head", "many groups", "tanh gelu", "biases"]
)
def test_other_shapes(shape, tmp_path):
    shape = {**SHAPES[shape], "num_hidden_layers": 1, "tie_word_embeddings": False}
    directory = checkpoints.make(tmp_path / "checkpoint", **shape)
    path = export(directory, tmp_path / "out", verify=False).path
    ids = random_ids(20)
    truth = reference_logits(directory, ids)
    assert_close(doge_onnx.load(path).forward([ids], logits="all")[0][0], truth)
    assert_close(token_by_token(path, ids), truth)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_sharded_checkpoints(dtype, tmp_path, monkeypatch):
    # Together with weights in a file of their own: each is one more export otherwise.
    monkeypatch.setattr(exporter, "MAX_EMBEDDED_BYTES", 0)
    directory = checkpoints.make(
        tmp_path / "checkpoint",
        num_hidden_layers=1,
        dtype=dtype,
        max_shard_size="20KB" if dtype == torch.bfloat16 else None,
    )
    path = export(directory, tmp_path / "out", verify=False).path
    ids = random_ids(20)
    assert_close(token_by_token(path, ids), reference_logits(directory, ids))

    manifest = Bundle.open(path).manifest
    assert manifest.files[WEIGHTS_NAME]["size"] > 4 * 97 * 48
    assert manifest.files[GRAPH_NAME]["size"] < 4 * 97 * 48
    model = onnx.load(path / GRAPH_NAME, load_external_data=False)
    places = [
        {entry.key: entry.value for entry in tensor.external_data}
        for tensor in model.graph.initializer
        if tensor.external_data
    ]
    assert {place["location"] for place in places} == {WEIGHTS_NAME}
    # A whole number of cache lines begins with one.
    sizes = [(int(place["offset"]) % 64, int(place["length"]) % 64) for place in places]
    assert [offset for offset, size in sizes if size == 0]
    assert not any(offset for offset, size in sizes if size == 0)
    # Copied to another place, it still works.
    moved = path.rename(tmp_path / "moved")
    assert_close(token_by_token(moved, ids[:3]), reference_logits(directory, ids[:3]))


# What else is in a bundle.


def test_the_manifest_says_what_was_done(main, main_checkpoint):
    manifest = main.manifest
    assert (manifest.target, manifest.precision) == ("ort", "fp32")
    assert (manifest.context_length, manifest.vocab_size) == (CONTEXT, 97)
    assert manifest.parameters == checkpoints.reference(main_checkpoint).num_parameters()
    assert manifest.source == {"model": "tiny-doge", "revision": None}
    assert manifest.versions["torch"] == torch.__version__
    assert manifest.versions["onnxruntime"] == onnxruntime.__version__
    assert manifest.versions["doge-onnx"] == doge_onnx.__version__
    assert (manifest.state.kind, manifest.state.dtype) == ("growing", "float32")
    assert manifest.state.in_place
    assert manifest == Bundle.open(main.path).manifest
    assert main.report.path == main.path
    assert main.report.size == sum(path.stat().st_size for path in main.path.iterdir())


def test_a_portable_state_is_not_kept_in_place(second):
    manifest = second.manifest
    assert manifest.state.in_place == (manifest.target == "ort")


def test_without_an_option_the_context_is_the_trained_one(second):
    assert second.manifest.context_length == 64


def test_the_context_length_is_a_limit(main):
    model = doge_onnx.load(main.path)
    _, state = model.forward([random_ids(CONTEXT)])
    with pytest.raises(InputError, match=str(CONTEXT)):
        model.forward([[1]], state)


def test_the_files_of_a_bundle(main, main_checkpoint):
    files = tree(main.path)
    copied = {"config.json", "generation_config.json", *TOKENIZER_FILES}
    assert set(files) == copied | {GRAPH_NAME, MANIFEST_NAME, "genai_config.json", "README.md"}
    for name in copied:
        assert files[name] == (main_checkpoint / name).read_bytes()


def test_a_checkpoint_without_a_tokenizer(second):
    assert not set(tree(second.path)) & set(TOKENIZER_FILES)


def test_the_config_for_onnxruntime_genai(main):
    # It rejects every key that it does not know, so this is all of it.
    assert json.loads((main.path / "genai_config.json").read_text()) == {
        "model": {
            "type": "decoder",
            "vocab_size": 97,
            "context_length": CONTEXT,
            "bos_token_id": 0,
            "eos_token_id": [1],
            "pad_token_id": 2,
            "decoder": {
                "filename": "model.onnx",
                "session_options": {"provider_options": []},
                "num_attention_heads": 6,
                "num_hidden_layers": 2,
                "num_key_value_heads": 2,
                "head_size": 16,
                "hidden_size": 48,
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {
            "do_sample": False,
            "temperature": 1.0,
            "top_k": 0,
            "top_p": 1.0,
            "repetition_penalty": 1.0,
            "max_length": CONTEXT,
            "past_present_share_buffer": True,
        },
    }


def test_the_card_describes_the_graph(each):
    card = (each.path / "README.md").read_text()
    state = each.manifest.state
    shape = f"[batch_size, {state.num_heads}, past_sequence_length, {state.row_size}]"
    assert shape in card
    assert f"{each.manifest.parameters:,} parameters" in card
    assert f"{each.manifest.context_length} tokens" in card
    portable = each.manifest.target == "portable"
    assert ("any engine that runs standard ONNX" in card) == portable


def test_an_export_can_be_repeated_bit_by_bit(one_layer, tmp_path):
    first, again = (
        tree(export(one_layer, tmp_path / name, verify=False).path) for name in ("a", "b")
    )
    assert first == again


# What goes wrong.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "tensorrt"}, "target 'tensorrt' is not known; choose from ort, portable"),
        ({"target": {}}, "target {} is not known"),
        ({"precision": "int3"}, "precision 'int3' is not known; choose from fp32"),
        ({"context_length": 0}, "context length 0 is not a positive whole number"),
        ({"context_length": -5}, "context length -5"),
        ({"context_length": 10**9}, "context length 1000000000 is more than"),
        ({"state": "frozen"}, "state 'frozen' is not known; choose from growing, window"),
        ({"revision": "main"}, "only models of the Hub have a revision"),
    ],
)
def test_options_that_make_no_sense(options, message, one_layer, tmp_path):
    with pytest.raises(DogeOnnxError) as error:
        export(one_layer, tmp_path / "bundle", **options)
    assert message in str(error.value)
    assert not list(tmp_path.iterdir())


def refuse_to_trace(*_):
    raise AssertionError("this must be found out before the slow part")


def test_what_is_wrong_with_a_checkpoint_is_found_before_tracing(one_layer, tmp_path, monkeypatch):
    monkeypatch.setattr(exporter, "trace", refuse_to_trace)
    broken = Path(shutil.copytree(one_layer, tmp_path / "broken"))
    (broken / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="truncated or corrupted"):
        export(broken, tmp_path / "bundle")
    checkpoints.edit_config(broken, num_key_value_heads=4)
    with pytest.raises(ConfigError, match="num_key_value_heads"):
        export(broken, tmp_path / "bundle")
    with pytest.raises(CheckpointError, match="neither a directory"):
        export(tmp_path / "missing", tmp_path / "bundle")
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


@pytest.mark.parametrize("name", ["tokenizer.json", "generation_config.json"])
def test_a_broken_side_file_is_found_before_tracing(name, one_layer, tmp_path, monkeypatch):
    monkeypatch.setattr(exporter, "trace", refuse_to_trace)
    source = Path(shutil.copytree(one_layer, tmp_path / "checkpoint"))
    (source / name).write_text("{")
    with pytest.raises(CheckpointError, match=rf"checkpoint/{name}"):
        export(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_destination_is_checked_before_the_checkpoint_is_read(tmp_path):
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "precious").write_text("content")
    for force, message in ((False, "exists"), (True, "force replaces bundles only")):
        with pytest.raises(BundleError, match=message):
            export(tmp_path / "no checkpoint", tmp_path / "bundle", force=force)
    assert (tmp_path / "bundle" / "precious").read_text() == "content"


def test_room_on_the_disk_is_checked_before_tracing(one_layer, tmp_path, monkeypatch):
    monkeypatch.setattr(exporter, "trace", refuse_to_trace)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(BundleError, match="no room in"):
        export(one_layer, tmp_path / "bundle")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_export_that_is_stopped_leaves_what_was_there(error, main, one_layer, tmp_path):
    shutil.copytree(main.path, tmp_path / "bundle")
    before = tree(tmp_path / "bundle")

    def stop(step: str) -> None:
        if "tracing" in step:
            # It has begun to write by now.
            assert len(list(tmp_path.glob(".bundle.*.part"))) == 1
            raise error

    with pytest.raises(error):
        export(one_layer, tmp_path / "bundle", force=True, progress=stop)
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    assert tree(tmp_path / "bundle") == before


def test_an_export_takes_the_place_of_another(main, one_layer, tmp_path):
    shutil.copytree(main.path, tmp_path / "bundle")
    steps: list[str] = []
    report = export(one_layer, tmp_path / "bundle", force=True, verify=False, progress=steps.append)
    assert Bundle.open(tmp_path / "bundle").manifest.source["model"] == "checkpoint"
    assert "tokenizer.json" not in tree(tmp_path / "bundle")
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    # Every slow step is announced, in the order in which they happen.
    announced = [
        next(i for i, step in enumerate(steps) if word in step)
        for word in ("reading", "tracing", "writing", "checking")
    ]
    assert announced == sorted(announced)
    assert report.seconds > 0


def test_an_interrupt_that_the_tracer_wraps_is_still_an_interrupt(one_layer, tmp_path, monkeypatch):
    def interrupted(*_, **__):
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt as error:
            raise RuntimeError("the tracer failed") from error

    monkeypatch.setattr(torch.onnx, "export", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export(one_layer, tmp_path / "bundle")
    assert not list(tmp_path.iterdir())


def test_a_window_bundle_describes_its_own_graph(one_layer, tmp_path):
    path = export(one_layer, tmp_path / "bundle", state="window", verify=False).path
    inputs = {entry.name for entry in onnx.load(path / GRAPH_NAME).graph.input}
    card = (path / "README.md").read_text()
    assert "position_ids" in inputs
    assert "`position_ids` | int64 |" in card
    assert "total_sequence_length" not in card
    assert not (path / "genai_config.json").exists()


def test_a_full_text_does_not_end_a_shorter_one_beside_it(main):
    model = doge_onnx.load(main.path, device="cpu")
    full, short = random_ids(CONTEXT), random_ids(5, seed=1)
    alone = model.generate(short, max_new_tokens=4).token_ids
    assert model.generate_batch([full, short], max_new_tokens=4)[1].token_ids == alone
    # More padded columns at once than the context has positions.
    ids, mask = np.zeros((1, CONTEXT + 9), np.int64), np.zeros((1, CONTEXT + 9), np.int64)
    ids[0, -5:], mask[0, -5:] = short, 1
    padded, _ = model.forward(ids, attention_mask=mask)
    np.testing.assert_allclose(padded, model.forward([short])[0], atol=1e-4)
