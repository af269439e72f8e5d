"""Read by `optimum-cli` at every start: teaches it to export a Doge.

Optimum finds plugins in this directory, which several packages share as a namespace. So neither
it nor its parents may have an `__init__.py`.
"""

from typing import Any

from doge_onnx.optimum.command import plug_in

plug_in()

# No new commands: the plugin changes an existing one.
REGISTER_COMMANDS: list[Any] = []
