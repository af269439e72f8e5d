"""Turns checkpoints into bundles: needs torch, onnx and what else the extra "export" brings.

Imports none of that itself. Can be called like the function `doge_onnx.export`, whose place
in the package it takes when it is imported.
"""

import sys
from types import ModuleType

from doge_onnx import api


class _CallableModule(ModuleType):
    __call__ = staticmethod(api.export)
    # Where `inspect.signature` and `help` look for the parameters.
    __wrapped__ = staticmethod(api.export)


sys.modules[__name__].__class__ = _CallableModule
