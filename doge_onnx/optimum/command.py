"""`optimum-cli export onnx`, for a Doge: makes a bundle, as `doge-onnx export` does.

Optimum traces the model of transformers, which gives wrong graphs here: below 5.0 that model
attends to future tokens or fails, and a trace makes its window a constant. Optimum has no
interface for another exporter. A plugin may add commands, but the name `onnx` is taken; so this
module wraps that command, and passes on every model that is not a Doge.
"""

from __future__ import annotations

import functools
import inspect
import json
from pathlib import Path
from typing import Any

import doge_onnx
from doge_onnx.bundle import is_bundle
from doge_onnx.errors import DogeOnnxError
from doge_onnx.export.model_config import CONFIG_NAME, MODEL_TYPES

_TASKS = ("auto", "text-generation-with-past", "causal-lm-with-past")
# Options that a bundle cannot fulfil, by their names in the parsed arguments. Options that only
# say how Optimum traces, such as the shapes of example inputs, are ignored.
_REFUSED = {
    "opset": "--opset",
    "device": "--device",
    "optimize": "--optimize",
    "monolith": "--monolith",
    "variant": "--variant",
    "atol": "--atol",
    "no_dynamic_axes": "--no-dynamic-axes",
    "slim": "--slim",
    "cache_dir": "--cache_dir",
}
_OWN_PARAMETERS = ("model", "out", "revision", "force", "progress")


def plug_in() -> None:
    """Let `optimum-cli export onnx` make bundles of Doge checkpoints."""
    try:
        from optimum.commands.export.onnx import ONNXExportCommand
    except ImportError:
        # Optimum without optimum-onnx lacks this command; its other commands must still work.
        return
    optimums_own = ONNXExportCommand.run

    @functools.wraps(optimums_own)
    def run(command: Any) -> None:
        if _is_doge(command.args.model, command.args.cache_dir):
            _export(command.args, command.parser)
        else:
            optimums_own(command)

    ONNXExportCommand.run = run


def export_options() -> set[str]:
    """Names of the keyword arguments of `doge_onnx.export` that describe the bundle."""
    return set(inspect.signature(doge_onnx.export).parameters).difference(_OWN_PARAMETERS)


def _is_doge(model: str, cache_dir: str) -> bool:
    """Whether the config of a directory, or of a model of the Hub, is a Doge's."""
    from huggingface_hub import hf_hub_download

    try:
        path = Path(model, CONFIG_NAME)
        if not Path(model).is_dir():
            path = Path(hf_hub_download(model, CONFIG_NAME, cache_dir=cache_dir))
        return bool(json.loads(path.read_text(encoding="utf-8"))["model_type"] in MODEL_TYPES)
    # Optimum itself reports what is wrong with a model that is not known to be a Doge.
    except Exception:
        return False


def _export(args: Any, parser: Any) -> None:
    """Export the checkpoint that the parsed `args` of `optimum-cli export onnx` name.

    Exits as `doge-onnx` does: with code 2 for wrong usage, 1 for a failure.
    """
    from doge_onnx import cli_output

    if args.task not in _TASKS:
        parser.error(
            f"--task {args.task}: the graph of a Doge always has its state as input and output; "
            "use --task text-generation-with-past"
        )
    for name, option in _REFUSED.items():
        if getattr(args, name) != parser.get_default(name):
            parser.error(f"{option} does not apply to a Doge, which doge-onnx exports its own way")
    options = {} if args.model_kwargs is None else args.model_kwargs
    if not isinstance(options, dict):
        parser.error("--model-kwargs must be a JSON object")
    known = export_options()
    if unknown := sorted(options.keys() - known):
        parser.error(
            f"--model-kwargs: {unknown[0]!r} is not known for a Doge; choose from "
            f"{', '.join(sorted(known))}"
        )
    if args.dtype is not None and options.setdefault("precision", args.dtype) != args.dtype:
        parser.error(f"--dtype {args.dtype} contradicts the precision that --model-kwargs names")
    output = args.output.absolute()
    if output.is_dir() and any(output.iterdir()) and not is_bundle(output):
        parser.error(f"{args.output} holds files that are not of a bundle; choose another place")
    cli_output.note(f"exporting {args.model} with doge-onnx")
    try:
        with cli_output.progress() as progress:
            # An earlier bundle is replaced, as Optimum overwrites its own files.
            report = doge_onnx.export(args.model, output, force=True, progress=progress, **options)
    except (DogeOnnxError, OSError) as error:
        cli_output.error(str(error))
        raise SystemExit(1) from None
    cli_output.export_summary(str(args.output), report)
