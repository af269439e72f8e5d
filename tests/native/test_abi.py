"""The small header of ONNX Runtime's C interface, held against the installed ONNX Runtime.

It declares functions by their position in a table. Each is called here, in an operator that reports
what it saw: a wrong position would crash, fail or report something else.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import build_library
import numpy as np
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

ATTRIBUTES = {
    "integer": -(2**40),
    "real": 2.5,
    "text": "seventeen letters",
    "element": "float",
    "rounds": 0,
    "fail": 0,
}
NAMES = (
    *("inputs", "second input", "rank", "rows", "columns", "element type", "first byte"),
    *("integer", "real", "letters", "found an attribute that is not there", "parallel"),
)
TYPES = {
    "float": TensorProto.FLOAT,
    "uint8": TensorProto.UINT8,
    "int8": TensorProto.INT8,
    "int32": TensorProto.INT32,
    "int64": TensorProto.INT64,
    "float16": TensorProto.FLOAT16,
    "double": TensorProto.DOUBLE,
    "bfloat16": TensorProto.BFLOAT16,
}


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    try:
        source = Path(__file__).with_name("abi_check.cc")
        return build_library.build(tmp_path_factory.mktemp("abi"), sources=[source])
    except build_library.BuildError as error:
        pytest.skip(str(error))


def run(library, x, second=None, kind=TensorProto.FLOAT, **attributes) -> dict[str, int]:
    """The report of the operator for an input that is first cast to an element type."""
    given = {"x": x} | ({} if second is None else {"second": second})
    names = ["cast", *(["second"] if second is not None else [""])]
    nodes = [
        helper.make_node("Cast", ["x"], ["cast"], to=kind),
        helper.make_node("Check", names, ["out"], domain="abi_check", **ATTRIBUTES | attributes),
    ]
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, value.shape)
        for name, value in given.items()
    ]
    outputs = [helper.make_tensor_value_info("out", TensorProto.INT64, [16])]
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("abi_check", 1)]
    graph = helper.make_graph(nodes, "g", inputs, outputs)
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.register_custom_ops_library(str(library))
    session = ort.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    return dict(zip(NAMES, session.run(None, given)[0].tolist(), strict=False))


def test_every_function_is_where_the_header_says(library):
    assert run(library, np.full((3, 5), 2, np.float32)) == {
        "inputs": 2,
        "second input": 0,
        "rank": 2,
        "rows": 3,
        "columns": 5,
        "element type": 1,
        "first byte": 0,
        "integer": -(2**40),
        "real": 2500,
        "letters": 17,
        "found an attribute that is not there": 0,
        "parallel": 2**40 - 1,
    }


def test_the_version_is_that_of_the_installed_runtime(library):
    # Loaded here, too: ONNX Runtime unloads what no session needs.
    loaded = ctypes.CDLL(str(library))
    run(library, np.zeros((1, 1), np.float32))
    loaded.version.restype = ctypes.c_char_p
    assert loaded.version().decode() == ort.__version__


def test_an_optional_input_that_is_there(library):
    report = run(library, np.zeros((1, 2), np.float32), second=np.zeros(1, np.float32))
    assert report["second input"] == 1


@pytest.mark.parametrize("name", TYPES)
def test_element_types_have_the_numbers_of_the_header(name, library):
    report = run(library, np.full((1, 1), 2, np.float32), kind=TYPES[name], element=name)
    assert report["element type"] == 1
    assert report["first byte"] == {"uint8": 2, "int8": 2, "int32": 2, "int64": 2}.get(name, 0)


@pytest.mark.parametrize(("code", "name"), [(1, "Fail"), (2, "InvalidArgument")])
def test_errors_have_the_codes_of_the_header(code, name, library):
    with pytest.raises(Exception, match="as it was asked to") as caught:
        run(library, np.zeros((1, 1), np.float32), fail=code)
    assert type(caught.value).__name__ == name


def test_what_is_released_is_gone(library):
    pages = Path("/proc/self/statm")
    if not pages.exists():
        pytest.skip("this system does not show the memory of a process")
    x = np.zeros((1, 1), np.float32)
    before = resident(pages)
    run(library, x, rounds=300_000)
    # A shape or a status that stays has 60 bytes or more.
    assert resident(pages) - before < 300_000 * 16


def resident(pages: Path) -> int:
    """Bytes of memory that this process has."""
    return int(pages.read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
