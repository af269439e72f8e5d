"""A bundle with a tiny made-up model, written by hand, and the same model in NumPy.

The model is no Doge, but its graph keeps the state contract of a real one: rows of the
cache carry a gate that closes them for padding, positions come from the attention mask,
and every logit depends on every token before it, so that a state which is kept wrongly
changes the result. Both kinds of graph, in place and copying, compute the same.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from doge_onnx.bundle import GRAPH_NAME, seal
from doge_onnx.manifest import ClosedRow, Manifest, StateLayout, WeightsRead

HEADS, ROW, HEAD_DIM, LAYERS = 1, 16, 8, 2
WIDTH = 8
CONTEXT = 300
CLOSED = -1e4
# Of the rows of an int8 state, which so hold numbers up to 25.
INT8_STEP = 0.2
# What the manifest says, whatever the graph has.
WEIGHTS_READ = WeightsRead(whole=1000, per_token=8)
BOS, EOS = "<s>", "</s>"
_MS = "com.microsoft"
_HUGE = np.iinfo(np.int64).max
_NO_LENGTH = 2**30


def tokenizer() -> Tokenizer:
    """A byte-level tokenizer: one token per byte, a few merges, two special tokens."""
    result = Tokenizer(models.BPE())
    result.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    result.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=270,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    result.train_from_iterator(["the cat and the dog and the hat"] * 4, trainer)
    result.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, 0)]
    )
    return result


VOCAB = tokenizer().get_vocab_size()


def weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(7)
    result = {
        "embed": rng.normal(size=(VOCAB, WIDTH)),
        "position": rng.normal(size=(CONTEXT, WIDTH)),
        "head": rng.normal(size=(WIDTH, VOCAB)),
    }
    for layer in range(LAYERS):
        for name in "qkv":
            result[f"{name}{layer}"] = rng.normal(size=(WIDTH, HEAD_DIM)) / 2
        result[f"o{layer}"] = rng.normal(size=(HEAD_DIM, WIDTH))
    return {name: value.astype(np.float32) for name, value in result.items()}


def reference(ids: list[int]) -> np.ndarray:
    """Logits [S, V] of one unpadded sequence, computed without any state."""
    w = {name: value.astype(np.float64) for name, value in weights().items()}
    x = w["embed"][ids] + w["position"][: len(ids)]
    future = np.triu(np.full((len(ids), len(ids)), -np.inf), 1)
    for layer in range(LAYERS):
        q, k, v = (x @ w[f"{name}{layer}"] for name in "qkv")
        scores = q @ k.T + future
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        x = x + shares / shares.sum(-1, keepdims=True) @ v @ w[f"o{layer}"]
    return x @ w["head"]


class _Graph:
    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, np.ndarray] = {}

    def add(self, op: str, inputs: list, output: str | list[str], domain: str = "", **attributes):
        """A node; inputs that are not names are constants."""
        names = [i if isinstance(i, str) else self.constant(i) for i in inputs]
        outputs = [output] if isinstance(output, str) else output
        self.nodes.append(helper.make_node(op, names, outputs, domain=domain, **attributes))
        return output

    def constant(self, value) -> str:
        array = np.asarray(value)
        name = f"c{len(self.constants)}"
        self.constants[name] = array
        return name


def model(in_place: bool = True, keep: bool = True, dtype: str = "float32") -> onnx.ModelProto:
    """The graph; int8 rows are for the one that works in place."""
    g = _Graph()
    int8: dict = {"inputs": [], "attributes": {}}
    if dtype == "int8":
        scale = np.full((1, HEADS, 1, ROW), INT8_STEP, np.float32)
        gate_scale = scale.copy()
        gate_scale[..., HEAD_DIM] = -CLOSED / 127
        int8["inputs"] = ["", "", "", "", "", gate_scale, scale]
        kinds = dict.fromkeys(("k_quant_type", "v_quant_type"), "PER_CHANNEL")
        int8["attributes"] = kinds | {"kv_cache_bit_width": 8}
    g.constants.update(weights())
    # Behind a full sequence stands what it is fed when it has ended.
    g.constants["position"] = np.pad(g.constants["position"], ((0, 1), (0, 0)))
    i64 = lambda *values: np.array(values, np.int64)  # noqa: E731
    g.add("Shape", ["input_ids"], "batch", start=0, end=1)
    g.add("Shape", ["input_ids"], "new", start=1, end=2)
    g.add("Shape", ["attention_mask"], "total", start=1, end=2)
    g.add("Sub", ["total", "new"], "past")
    # Where the new tokens of each row stand: behind its own past, or else at the mask's end.
    if in_place:
        g.constants["past_lengths"] = i64(_NO_LENGTH)
        g.add("Min", ["past", "past_lengths"], "past_each")
    else:
        g.add("Identity", ["past"], "past_each")
    g.add("Expand", ["past_each", "batch"], "past_rows")
    g.add("Unsqueeze", ["past_rows", i64(1)], "past_column")
    g.add("Squeeze", ["new"], "new0")
    g.add("Range", [np.array(0, np.int64), "new0", np.array(1, np.int64)], "numbers")
    g.add("Add", ["past_column", "numbers"], "columns")
    g.add("CumSum", ["attention_mask", np.array(1, np.int64)], "count")
    g.add("GatherElements", ["count", "columns"], "count_new", axis=1)
    g.add("Sub", ["count_new", i64(1)], "before")
    g.add("Max", ["before", i64(0)], "positions")
    g.add("GatherElements", ["attention_mask", "columns"], "mask_new", axis=1)
    g.add("Sub", [i64(1), "mask_new"], "padding")
    g.add("Cast", ["padding"], "padding_f", to=TensorProto.FLOAT)
    g.add("Mul", ["padding_f", np.array(CLOSED, np.float32)], "gate0")
    g.add("Unsqueeze", ["gate0", i64(-1)], "gate")
    g.add("Gather", ["embed", "input_ids"], "x_tokens")
    g.add("Gather", ["position", "positions"], "x_positions")
    x = g.add("Add", ["x_tokens", "x_positions"], "x0")
    g.add("Concat", ["batch", "new", i64(ROW - HEAD_DIM - 1)], "rest_shape", axis=0)
    zero = helper.make_tensor("zero", TensorProto.FLOAT, [1], [0.0])
    g.add("ConstantOfShape", ["rest_shape"], "rest", value=zero)
    g.add("Concat", ["batch", "new", i64(ROW - HEAD_DIM)], "pad_shape", axis=0)
    g.add("ConstantOfShape", ["pad_shape"], "pad", value=zero)
    g.add("Mul", ["gate", np.array(0, np.float32)], "no_gate")
    g.add("Add", ["no_gate", np.array(1, np.float32)], "one")
    g.add("Squeeze", ["total"], "total0")
    g.add("Cast", ["total0"], "total32", to=TensorProto.INT32)
    g.add("Add", ["past_rows", "new"], "ends")
    g.add("Sub", ["ends", i64(1)], "last")
    g.add("Cast", ["last"], "seqlens_k", to=TensorProto.INT32)
    for layer in range(LAYERS):
        for name, extra in (("q", ["one", "rest"]), ("k", ["gate", "rest"]), ("v", ["pad"])):
            g.add("MatMul", [x, f"{name}{layer}"], f"{name}{layer}_raw")
            g.add("Concat", [f"{name}{layer}_raw", *extra], f"{name}{layer}_row", axis=2)
        row = [f"{name}{layer}_row" for name in "qkv"]
        past = [f"past_key_values.{layer}.{kind}" for kind in ("key", "value")]
        present = [f"present.{layer}.{kind}" for kind in ("key", "value")]
        if in_place:
            g.add(
                "GroupQueryAttention",
                [*row, *past, "seqlens_k", "total32", *int8["inputs"]],
                [f"a{layer}_row", *present],
                _MS,
                num_heads=1,
                kv_num_heads=1,
                scale=1.0,
                **int8["attributes"],
            )
        else:
            _attention(g, layer, row, past, present)
        g.add("Slice", [f"a{layer}_row", i64(0), i64(HEAD_DIM), i64(2)], f"a{layer}")
        g.add("MatMul", [f"a{layer}", f"o{layer}"], f"d{layer}")
        x = g.add("Add", [x, f"d{layer}"], f"x{layer + 1}")
    if keep:
        g.constants["logits_to_keep"] = i64(0)
        g.add("Neg", ["logits_to_keep"], "first_kept")
        x = g.add("Slice", [x, "first_kept", i64(_HUGE), i64(1)], "x_kept")
    g.add("MatMul", [x, "head"], "logits")

    def value(name, kind, shape):
        return helper.make_tensor_value_info(name, kind, shape)

    cache = [f"{i}.{kind}" for i in range(LAYERS) for kind in ("key", "value")]
    row_type = TensorProto.INT8 if dtype == "int8" else TensorProto.FLOAT
    inputs = [
        value("input_ids", TensorProto.INT64, ["batch_size", "sequence_length"]),
        value("attention_mask", TensorProto.INT64, ["batch_size", "total_sequence_length"]),
    ]
    for name in cache:
        shape = ["batch_size", HEADS, "past_sequence_length", ROW]
        inputs.append(value(f"past_key_values.{name}", row_type, shape))
    if in_place:
        inputs.append(value("past_lengths", TensorProto.INT64, ["past_lengths_size"]))
    if keep:
        inputs.append(value("logits_to_keep", TensorProto.INT64, [1]))
    outputs = [value("logits", TensorProto.FLOAT, ["batch_size", "positions", VOCAB])]
    for name in cache:
        shape = ["batch_size", HEADS, "present_sequence_length", ROW]
        outputs.append(value(f"present.{name}", row_type, shape))
    return helper.make_model(
        helper.make_graph(
            g.nodes,
            "fake",
            inputs,
            outputs,
            [numpy_helper.from_array(array, name) for name, array in g.constants.items()],
        ),
        opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid(_MS, 1)],
        ir_version=10,
    )


def _attention(g: _Graph, layer: int, row, past, present) -> None:
    """The same attention of standard operators, with a state that is copied."""
    at = f"t{layer}_"
    for tensor, old, new in zip(row[1:], past, present, strict=True):
        g.add("Unsqueeze", [tensor, np.array([1], np.int64)], f"{at}{new}_new")
        g.add("Concat", [old, f"{at}{new}_new"], new, axis=2)
    g.add("Unsqueeze", [row[0], np.array([1], np.int64)], f"{at}q")
    g.add("Transpose", [present[0]], f"{at}k", perm=[0, 1, 3, 2])
    g.add("MatMul", [f"{at}q", f"{at}k"], f"{at}scores")
    zero, one = np.array(0, np.int64), np.array(1, np.int64)
    g.add("Range", [zero, "total0", one], f"{at}columns")
    g.add("Squeeze", ["past"], f"{at}past0")
    g.add("Range", [f"{at}past0", "total0", one], f"{at}rows0")
    g.add("Unsqueeze", [f"{at}rows0", np.array([1], np.int64)], f"{at}rows")
    g.add("Greater", [f"{at}columns", f"{at}rows"], f"{at}future")
    minus = np.array(-np.inf, np.float32)
    g.add("Where", [f"{at}future", minus, f"{at}scores"], f"{at}masked")
    g.add("Softmax", [f"{at}masked"], f"{at}weights", axis=-1)
    g.add("MatMul", [f"{at}weights", present[1]], f"{at}a")
    g.add("Squeeze", [f"{at}a", np.array([1], np.int64)], f"a{layer}_row")


def manifest(in_place: bool = True, **changes) -> Manifest:
    state = {
        "kind": "growing",
        "num_layers": LAYERS,
        "num_heads": HEADS,
        "row_size": ROW,
        "head_dim": HEAD_DIM,
        "dtype": "float32",
        "keep_window_size": CONTEXT,
        "in_place": in_place,
    }
    state |= {name: changes.pop(name) for name in list(changes) if name in state}
    closed = -127 if state["dtype"] == "int8" else CLOSED
    values = {
        "target": "ort" if in_place else "portable",
        "device": "cpu",
        "precision": "fp32",
        "activations": "float32",
        "context_length": CONTEXT,
        "vocab_size": VOCAB,
        "parameters": 0,
        "weights_read": WEIGHTS_READ,
        "graph": GRAPH_NAME,
        "source": {"model": "fake", "revision": None},
        "versions": {},
    }
    layout = StateLayout(**state, closing=ClosedRow((HEAD_DIM,), closed))
    return Manifest(state=layout, **(values | changes))


def write(
    path: Path,
    in_place: bool = True,
    keep: bool = True,
    generation: dict | None = None,
    with_tokenizer: bool = True,
    graph: bytes | None = None,
    config: dict | None = None,
    chat_template: Any = None,
    **changes,
) -> Path:
    """Write a bundle to the new directory `path`; `changes` are to its manifest."""
    path.mkdir()
    if graph is None:
        dtype = "int8" if changes.get("dtype") == "int8" else "float32"
        graph = model(in_place, keep, dtype).SerializeToString()
    (path / GRAPH_NAME).write_bytes(graph)
    config = {"model_type": "doge", "eos_token_id": 1} | (config or {})
    (path / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (path / "generation_config.json").write_text(json.dumps(generation))
    if with_tokenizer:
        tokenizer().save(str(path / "tokenizer.json"))
    if chat_template is not None:
        tokens = {"bos_token": BOS, "eos_token": EOS, "chat_template": chat_template}
        (path / "tokenizer_config.json").write_text(json.dumps(tokens))
    seal(path, manifest(in_place, **changes))
    return path
