"""Turns checkpoints into bundles; its modules need the extra "export" (torch, onnx and others).

Imports none of these itself. When this package is imported, it replaces the function
`doge_onnx.export` as an attribute of `doge_onnx`; it can be called like that function.
"""

import sys
from types import ModuleType

from doge_onnx import api


class _CallableModule(ModuleType):
    __call__ = staticmethod(api.export)
    # Where `inspect.signature` and `help` look for the parameters.
    __wrapped__ = staticmethod(api.export)


sys.modules[__name__].__class__ = _CallableModule
