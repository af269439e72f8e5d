"""Runs single operators of the native library, as models of one node.

Knows how a model is made and run. Does not know what an operator computes (`references`).
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

Array = NDArray[Any]
Outputs = dict[str, int]

FLOAT, INT8, INT32, INT64 = (
    TensorProto.FLOAT,
    TensorProto.INT8,
    TensorProto.INT32,
    TensorProto.INT64,
)


class Node:
    """A model of one node of the domain `doge_onnx`.

    Args:
        library: The native library.
        op: Name of the operator.
        inputs: Its inputs in order, None for one that is missing.
        attributes: Its attributes.
        outputs: Name and element type of its outputs.
        threads: Threads of the session.
        constants: Names of the inputs that are constants of the graph, which may be of any type.
    """

    def __init__(
        self,
        library: Path,
        op: str,
        inputs: dict[str, Array | None],
        attributes: dict[str, Any],
        outputs: Outputs,
        threads: int = 2,
        constants: Collection[str] = (),
    ) -> None:
        names = [name if value is not None else "" for name, value in inputs.items()]
        given = {name: value for name, value in inputs.items() if value is not None}
        self.inputs = {name: value for name, value in given.items() if name not in constants}
        tensors = [numpy_helper.from_array(given[name], name) for name in constants]
        self.outputs = outputs
        values = [
            helper.make_tensor_value_info(
                name, helper.np_dtype_to_tensor_dtype(value.dtype), [None] * value.ndim
            )
            for name, value in self.inputs.items()
        ]
        # Some outputs have the names of inputs.
        results = [
            helper.make_tensor_value_info(f"out_{name}", kind, None)
            for name, kind in outputs.items()
        ]
        node = helper.make_node(
            op, names, [result.name for result in results], domain="doge_onnx", **attributes
        )
        graph = helper.make_graph([node], "graph", values, results, tensors)
        opsets = [helper.make_opsetid("", 23), helper.make_opsetid("doge_onnx", 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 4
        options.register_custom_ops_library(str(library))
        self.session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, ["CPUExecutionProvider"]
        )

    def run(self, **changed: Array) -> dict[str, Array]:
        """Run it with its inputs, some of them changed.

        Returns:
            The outputs by name.
        """
        results = self.session.run(None, self.inputs | changed)
        return dict(zip(self.outputs, results, strict=True))

    def run_in_place(self, **shared: str) -> dict[str, Array]:
        """Run it with outputs in the memory of inputs: the input's name by the output's."""
        binding = self.session.io_binding()
        values = {n: onnxruntime.OrtValue.ortvalue_from_numpy(v) for n, v in self.inputs.items()}
        for name, value in values.items():
            binding.bind_ortvalue_input(name, value)
        for name in self.outputs:
            if name in shared:
                binding.bind_ortvalue_output(f"out_{name}", values[shared[name]])
            else:
                binding.bind_output(f"out_{name}")
        self.session.run_with_iobinding(binding)
        results = binding.get_outputs()
        return {n: r.numpy() for n, r in zip(self.outputs, results, strict=True)}


@contextmanager
def instruction_set(name: str) -> Iterator[None]:
    """Let new sessions use the kernels of an instruction set."""
    os.environ["DOGE_ONNX_INSTRUCTIONS"] = name
    try:
        yield
    finally:
        del os.environ["DOGE_ONNX_INSTRUCTIONS"]


def floats(rng: np.random.Generator, *shape: int) -> Array:
    """Normally distributed numbers in float32."""
    return rng.standard_normal(shape).astype(np.float32)
