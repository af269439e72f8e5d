"""Read by `optimum-cli` at every start: teaches it to export a Doge.

Optimum finds plugins by the name of this directory, which several packages share. So there must
be no `__init__.py` here or above.
"""

from typing import Any

from doge_onnx.optimum.command import plug_in

plug_in()

# Commands of its own; it changes one that is there.
REGISTER_COMMANDS: list[Any] = []
