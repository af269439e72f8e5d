"""Lets Optimum export and run Doge models; needs the extra "optimum".

`command` lets `optimum-cli export onnx` make bundles, and `modeling` has the class that runs them
through transformers' `generate`. Modules are imported when they are used, because `optimum-cli`
imports this package at every start.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from doge_onnx.optimum.modeling import ORTDogeForCausalLM

__all__ = ["ORTDogeForCausalLM"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from doge_onnx.optimum import modeling
    except ImportError as error:
        # The package is not installed; a package that only lacks a name is another error.
        if (error.name or "").partition(".")[0] not in ("optimum", "torch", "transformers"):
            raise
        from doge_onnx.errors import MissingExtraError

        raise MissingExtraError(
            f"this needs {error.name}, which is not installed: pip install 'doge-onnx[optimum]'"
        ) from error
    return getattr(modeling, name)
