"""Loading bundles: what is refused before anything runs."""

from __future__ import annotations

import shutil
import subprocess
import sys
import textwrap

import fake_bundle
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import doge_onnx
from doge_onnx.bundle import seal
from doge_onnx.errors import BundleError, InputError
from doge_onnx.runtime.engine.external_data import external_files


def _external(location: str, name: str = "w") -> onnx.TensorProto:
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[4])
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", "0"), ("length", "16")):
        tensor.external_data.add(key=key, value=value)
    return tensor


def _model_with(tensor: onnx.TensorProto, where: str = "initializer") -> onnx.ModelProto:
    model = fake_bundle.model()
    graph = model.graph
    if where == "initializer":
        graph.initializer.append(tensor)
    elif where == "constant":
        graph.node.append(helper.make_node("Constant", [], ["unused"], value=tensor))
    elif where == "subgraph":
        inner = helper.make_graph([], "inner", [], [], [tensor])
        graph.node.append(
            helper.make_node("If", ["x"], ["y"], then_branch=inner, else_branch=inner)
        )
    elif where == "sparse":
        sparse = onnx.SparseTensorProto(values=tensor, dims=[4])
        graph.sparse_initializer.append(sparse)
    elif where == "function":
        node = helper.make_node("Constant", [], ["unused"], value=tensor)
        model.functions.append(
            helper.make_function("d", "f", [], ["unused"], [node], model.opset_import)
        )
    return model


@pytest.mark.parametrize("where", ["initializer", "constant", "subgraph", "sparse", "function"])
def test_external_data_is_found_wherever_a_tensor_can_be(tmp_path, where):
    path = tmp_path / "model.onnx"
    path.write_bytes(_model_with(_external("weights.bin"), where).SerializeToString())
    assert external_files(path) == {"weights.bin"}


def test_embedded_weights_are_not_taken_for_external_ones(tmp_path):
    # Bytes that read like external data, inside of a tensor's own data.
    inside = _external("../secret").SerializeToString()
    tensor = TensorProto(name="w", data_type=TensorProto.UINT8, dims=[len(inside)], raw_data=inside)
    path = tmp_path / "model.onnx"
    path.write_bytes(_model_with(tensor).SerializeToString())
    assert external_files(path) == set()


@pytest.mark.parametrize(
    "content",
    [b"", b"not an onnx file", b"\xff" * 64, b"\x3a\x05ab", b"\x3a\x02\x08"],
    ids=["empty", "text", "ones", "truncated", "truncated-number"],
)
def test_what_is_no_model_is_refused(tmp_path, content):
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(BundleError, match=r"model\.onnx is not a readable ONNX model"):
        external_files(path)


@pytest.mark.parametrize("location", ["../outside.bin", "/etc/hostname", "unlisted.bin", "a/b.bin"])
def test_weights_outside_of_the_bundle_are_refused(tmp_path, location):
    (tmp_path / "outside.bin").write_bytes(bytes(16))
    graph = _model_with(_external(location)).SerializeToString()
    path = fake_bundle.write(tmp_path / "b", graph=graph)
    (path / "unlisted.bin").write_bytes(bytes(16))
    with pytest.raises(BundleError, match="not one of the files"):
        doge_onnx.load(path)


def _with_weights_beside(path):
    """A bundle with external weights, not sealed yet."""
    path.mkdir()
    onnx.save(
        fake_bundle.model(),
        path / "model.onnx",
        save_as_external_data=True,
        location="model.onnx_data",
        size_threshold=100,
    )
    return path


def test_weights_in_a_listed_file_are_loaded(tmp_path):
    path = _with_weights_beside(tmp_path / "b")
    seal(path, fake_bundle.manifest())
    assert external_files(path / "model.onnx") == {"model.onnx_data"}
    logits, _ = doge_onnx.load(path).forward([[3, 4]], logits="all")
    np.testing.assert_allclose(logits[0], fake_bundle.reference([3, 4]), atol=1e-3)


def test_a_link_that_leads_out_of_the_bundle_is_refused(tmp_path):
    path = _with_weights_beside(tmp_path / "b")
    (path / "model.onnx_data").rename(tmp_path / "outside")
    (path / "model.onnx_data").symlink_to(tmp_path / "outside")
    seal(path, fake_bundle.manifest())
    with pytest.raises(BundleError, match="cannot load"):
        doge_onnx.load(path)


@pytest.mark.parametrize("domain", ["com.microsoft", ""])
def test_a_kernel_that_is_not_there_is_a_reason_to_upgrade(tmp_path, domain):
    model = fake_bundle.model()
    model.graph.node[0].op_type = "NotYetAnOperator"
    model.graph.node[0].domain = domain
    path = fake_bundle.write(tmp_path / "b", graph=model.SerializeToString())
    with pytest.raises(BundleError, match=r"lacks a kernel.*upgrade.*the target portable"):
        doge_onnx.load(path)


def test_a_graph_that_onnx_runtime_refuses_gives_one_line(tmp_path):
    model = fake_bundle.model()
    model.graph.node[0].op_type = "NoSuchOperator"
    path = fake_bundle.write(tmp_path / "b", graph=model.SerializeToString())
    with pytest.raises(BundleError, match=r"ONNX Runtime cannot load .*NoSuchOp") as caught:
        doge_onnx.load(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "spiral"}, "does not know the state kind 'spiral'"),
        ({"dtype": "float8"}, "does not know the state dtype 'float8'"),
        ({"kind": "window", "dtype": "int8"}, "a window state has rows of float32, not of int8"),
        ({"num_layers": 3}, r"lacks the input 'past_key_values\.2\.key'"),
        ({"num_layers": 1}, r"has the input 'past_key_values\.1\.key'"),
        ({"num_heads": 2}, r"input 'past_key_values\.0\.key' is tensor\(float\)"),
        ({"row_size": 24}, r"input 'past_key_values\.0\.key' is tensor\(float\)"),
        ({"vocab_size": 5}, "output 'logits' is"),
    ],
)
def test_a_manifest_that_does_not_fit_its_graph_is_refused(tmp_path, change, message):
    path = fake_bundle.write(tmp_path / "b", **change)
    with pytest.raises(BundleError, match=message):
        doge_onnx.load(path)


def test_a_graph_that_cannot_be_told_the_lengths_of_its_rows_is_refused(tmp_path):
    model = fake_bundle.model()
    # As an initializer alone it is a number that nobody can change.
    (entry,) = (entry for entry in model.graph.input if entry.name == "past_lengths")
    model.graph.input.remove(entry)
    path = fake_bundle.write(tmp_path / "b", graph=model.SerializeToString())
    with pytest.raises(BundleError, match="lacks the input 'past_lengths' that its manifest"):
        doge_onnx.load(path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "tpu"}, "device 'tpu' is not known; choose from: auto, cpu, cuda"),
        ({"threads": 0}, "threads must be a positive whole number, at most 1024, not 0"),
        ({"threads": 1.5}, r"not 1\.5"),
        ({"threads": True}, "not True"),
    ],
)
def test_wrong_options_are_refused(tmp_path, options, message):
    path = fake_bundle.write(tmp_path / "b")
    with pytest.raises(InputError, match=message):
        doge_onnx.load(path, **options)


@pytest.mark.parametrize("name", ["model.onnx", "tokenizer.json", "config.json"])
def test_an_altered_file_is_named_whatever_else_it_leads_to(tmp_path, name):
    path = fake_bundle.write(tmp_path / "b")
    content = (path / name).read_bytes()
    # One that cannot even be read, and one that works as well as before.
    spaced = content.replace(b" ", b"\t", 1)
    for altered in (b"\xff" * len(content), spaced):
        (path / name).write_bytes(altered)
        with pytest.raises(BundleError, match=rf"{name} differs from the checksum"):
            doge_onnx.load(path)


def test_a_missing_file_is_named(tmp_path):
    path = fake_bundle.write(tmp_path / "b")
    (path / "tokenizer.json").unlink()
    with pytest.raises(BundleError, match=r"lacks tokenizer\.json"):
        doge_onnx.load(path)
    shutil.rmtree(path)
    with pytest.raises(BundleError, match="not a directory"):
        doge_onnx.load(path)


def test_onnx_runtime_is_quiet_unless_asked(tmp_path):
    model = fake_bundle.model()
    # ONNX Runtime warns of an initializer that nothing uses.
    unused = TensorProto(name="unused_weight", data_type=TensorProto.FLOAT, dims=[1])
    unused.float_data.append(1)
    model.graph.initializer.append(unused)
    path = fake_bundle.write(tmp_path / "b", graph=model.SerializeToString())
    code = f"import doge_onnx; doge_onnx.load({str(path)!r}, verbose=%s)"
    quiet, loud = (
        subprocess.run(
            [sys.executable, "-c", code % verbose], capture_output=True, text=True, check=True
        ).stderr
        for verbose in (False, True)
    )
    assert quiet == ""
    assert "unused_weight" in loud


def test_telemetry_is_switched_off_before_a_session_exists(tmp_path):
    path = fake_bundle.write(tmp_path / "b")
    code = f"""
        import onnxruntime
        calls = []
        onnxruntime.disable_telemetry_events = lambda: calls.append("off")
        session = onnxruntime.InferenceSession
        begin = session.__init__
        session.__init__ = lambda *a, **k: calls.append("session") or begin(*a, **k)
        import doge_onnx
        doge_onnx.load({str(path)!r})
        assert calls == ["off", "session"], calls
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)
