"""Export Doge language models to ONNX in recurrent-step form and run them fast.

Example:
    >>> doge_onnx.export("SmallDoge/Doge-160M", "bundle")
    >>> model = doge_onnx.load("bundle")
    >>> print(model.generate("Once upon a time", max_new_tokens=100).text)
"""

from doge_onnx.api import bench, evaluate, export, load, push, verify
from doge_onnx.errors import (
    BundleError,
    CheckpointError,
    ConfigError,
    DeviceError,
    DogeOnnxError,
    HubError,
    InputError,
    MissingExtraError,
    ParityError,
    QualityError,
)

# `export` is also the name of the subpackage that does the work, and importing that puts it into
# the function's place here. It can be called, and then calls the function: both names work in
# whatever order things are imported. A type checker sees the function.

__version__ = "0.1.0"

__all__ = [
    "BundleError",
    "CheckpointError",
    "ConfigError",
    "DeviceError",
    "DogeOnnxError",
    "HubError",
    "InputError",
    "MissingExtraError",
    "ParityError",
    "QualityError",
    "__version__",
    "bench",
    "evaluate",
    "export",
    "load",
    "push",
    "verify",
]
