"""Convert an ONNX file to ONNX Runtime's own format, and list the operators that it needs.

Knows how to make ONNX Runtime write that format without anything that depends on this machine.
Does not know what is in the graph.
"""

from __future__ import annotations

import logging
from pathlib import Path

import onnxruntime as ort

from doge_onnx.errors import BundleError, DogeOnnxError
from doge_onnx.manifest import ORT_SUFFIX

OPERATORS_NAME = "required_operators.config"
# Offsets in a flatbuffer have 31 bits, and the format has no external weights.
MAX_BYTES = 2**31 - 1
_ERROR = 3


def check_size(size: int) -> None:
    """Raise DogeOnnxError if a graph with about `size` bytes of weights does not fit."""
    if size > MAX_BYTES:
        raise DogeOnnxError(
            f"the ORT format holds at most 2 GB, and these weights need about {size / 1e9:.1f} GB; "
            "choose another precision, or the format onnx"
        )


def convert(graph: Path) -> Path:
    """Replace an ONNX file with one in ONNX Runtime's own format, which has all weights inside.

    Also writes a list of the operators and their element types beside it, in the form that ONNX
    Runtime's build script reads.

    Args:
        graph: The ONNX file. It is deleted; its external weights are no longer needed.

    Returns:
        The new file, in the same directory.

    Raises:
        BundleError: ONNX Runtime cannot load the graph or write the file.
    """
    out = graph.with_suffix(ORT_SUFFIX)
    options = ort.SessionOptions()
    options.log_severity_level = _ERROR
    options.optimized_model_filepath = str(out)
    # The next level chooses memory layouts for this machine's processor. All CPUs have kernels for
    # the nodes that this level fuses. ONNX Runtime's "runtime" style, which leaves fusions to the
    # loading session, is for accelerators that compile nodes, and the loader has to enable it.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.add_session_config_entry("session.save_model_format", "ORT")
    # Packing weights for this machine's kernels would not be part of the file anyway.
    options.add_session_config_entry("session.disable_prepacking", "1")
    try:
        ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    except MemoryError:
        raise
    # The exceptions of ONNX Runtime share no base class but this one.
    except Exception as error:
        reason = " ".join(str(error).split())
        raise BundleError(f"ONNX Runtime cannot write the ORT format: {reason}") from error
    _list_operators(out)
    graph.unlink()
    return out


def _list_operators(graph: Path) -> None:
    # The import configures logging for the whole process, unless logging is configured already,
    # and then logs a line for every file.
    handler = logging.NullHandler()
    logging.getLogger().addHandler(handler)
    try:
        from onnxruntime.tools.ort_format_model import create_config_from_models
    finally:
        logging.getLogger().removeHandler(handler)
    logging.getLogger("ort_format_model.utils").setLevel(logging.WARNING)
    path = graph.with_name(OPERATORS_NAME)
    create_config_from_models([graph], path, enable_type_reduction=True)
    # The list holds the file's path, which is a scratch directory of this machine.
    text = path.read_text(encoding="utf-8").replace(str(graph), graph.name)
    path.write_text(text, encoding="utf-8", newline="\n")
