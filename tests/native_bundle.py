"""The made-up model of `fake_bundle` with a fused operator that this package has a kernel for.

The operator is a function whose body is wrong on purpose: it doubles the embedding. So logits tell
whether the kernel ran or the body.
"""

from __future__ import annotations

from pathlib import Path

import fake_bundle
import numpy as np
from onnx import helper, numpy_helper

_DOMAIN = "doge_onnx"


def write(path: Path, **changes) -> Path:
    """Write the bundle to the new directory `path`; `changes` are to its manifest."""
    model = fake_bundle.model()
    graph = model.graph
    (lookup,) = (node for node in graph.node if "x_tokens" in node.output)
    inputs = ["input_ids", "embed", "", "norm"]
    sizes = {"bits": 0, "block_size": 0, "epsilon": 1e-6}
    lookup.CopyFrom(
        helper.make_node("Embed", inputs, ["h_tokens", "x_tokens"], domain=_DOMAIN, **sizes)
    )
    norm = np.ones(fake_bundle.WIDTH, np.float32)
    graph.initializer.append(numpy_helper.from_array(norm, "norm"))
    body = [
        helper.make_node("Gather", ["table", "ids"], ["row"]),
        helper.make_node("Add", ["row", "row"], ["x"]),
        helper.make_node("Mul", ["x", "norm"], ["h"]),
    ]
    model.functions.append(
        helper.make_function(
            _DOMAIN,
            "Embed",
            ["ids", "table", "scales", "norm"],
            ["h", "x"],
            body,
            [helper.make_opsetid("", 21)],
            attributes=list(sizes),
        )
    )
    model.opset_import.append(helper.make_opsetid(_DOMAIN, 1))
    values = {"native_operators": True} | changes
    return fake_bundle.write(path, graph=model.SerializeToString(), **values)
