"""Export Doge language models to ONNX in recurrent-step form and run them fast.

Example:
    >>> doge_onnx.export("SmallDoge/Doge-160M", "bundle")
    >>> model = doge_onnx.load("bundle")
    >>> print(model.generate("Once upon a time", max_new_tokens=100).text)
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

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
    NotEnoughMemoryError,
    ParityError,
    QualityError,
)

if TYPE_CHECKING:
    from doge_onnx.runtime.chat import Chat
    from doge_onnx.runtime.engine.kernels import Kernels
    from doge_onnx.runtime.engine.state import State
    from doge_onnx.runtime.generation.config import GenerationConfig, GenerationOptions
    from doge_onnx.runtime.generation.output import (
        Completion,
        FinishReason,
        Piece,
        Timings,
        TokenLogprob,
    )
    from doge_onnx.runtime.generation.processors import LogitsProcessor
    from doge_onnx.runtime.generation.sampling import Sampler
    from doge_onnx.runtime.model import Model
    from doge_onnx.runtime.prompt import Prompt
    from doge_onnx.runtime.text.tokenizer import Tokenizer

# `export` is also the name of the subpackage that does the work, and importing that puts it into
# the function's place here. It can be called, and then calls the function: both names work in
# whatever order things are imported. A type checker sees the function.

__version__ = "0.1.0"

# ONNX Runtime reads this while it is imported, and without it leaves an identifier of the machine
# and a database in the home directory. Processes that are started from here inherit it.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

# Imported when it is first asked for, since it needs numpy and onnxruntime.
_MODULES = {
    "Chat": "doge_onnx.runtime.chat",
    "Completion": "doge_onnx.runtime.generation.output",
    "FinishReason": "doge_onnx.runtime.generation.output",
    "GenerationConfig": "doge_onnx.runtime.generation.config",
    "GenerationOptions": "doge_onnx.runtime.generation.config",
    "Kernels": "doge_onnx.runtime.engine.kernels",
    "LogitsProcessor": "doge_onnx.runtime.generation.processors",
    "Model": "doge_onnx.runtime.model",
    "Piece": "doge_onnx.runtime.generation.output",
    "Prompt": "doge_onnx.runtime.prompt",
    "Sampler": "doge_onnx.runtime.generation.sampling",
    "State": "doge_onnx.runtime.engine.state",
    "Timings": "doge_onnx.runtime.generation.output",
    "TokenLogprob": "doge_onnx.runtime.generation.output",
    "Tokenizer": "doge_onnx.runtime.text.tokenizer",
}

__all__ = [
    "BundleError",
    "Chat",
    "CheckpointError",
    "Completion",
    "ConfigError",
    "DeviceError",
    "DogeOnnxError",
    "FinishReason",
    "GenerationConfig",
    "GenerationOptions",
    "HubError",
    "InputError",
    "Kernels",
    "LogitsProcessor",
    "MissingExtraError",
    "Model",
    "NotEnoughMemoryError",
    "ParityError",
    "Piece",
    "Prompt",
    "QualityError",
    "Sampler",
    "State",
    "Timings",
    "TokenLogprob",
    "Tokenizer",
    "__version__",
    "bench",
    "evaluate",
    "export",
    "load",
    "push",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
