"""The public functions.

Each imports what does the work when it is called, so that `import doge_onnx` costs
nothing and the base install does not need what only `export` needs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from doge_onnx.errors import MissingExtraError

if TYPE_CHECKING:
    from doge_onnx.export.exporter import ExportReport
    from doge_onnx.export.verify import ParityReport
    from doge_onnx.runtime.model import Model

_EXPORT_EXTRA = {
    "torch",
    "onnx",
    "onnx_ir",
    "onnxscript",
    "safetensors",
    "huggingface_hub",
    "transformers",
}


def load(
    bundle: str | Path,
    device: str = "cpu",
    threads: int | None = None,
    prefill_chunk: int | None = None,
    verbose: bool = False,
) -> Model:
    """Load a bundle and make it ready to run.

    Args:
        bundle: The directory that `export` wrote.
        device: "cpu".
        threads: Threads that one operator may use; None lets ONNX Runtime decide.
        prefill_chunk: Most tokens of a prompt that go through the graph at once; None is a
            number that is good for speed and memory. The result does not depend on it.
        verbose: Let the warnings of ONNX Runtime through.

    Raises:
        BundleError: The bundle is incomplete, altered, too new, or cannot be run.
        InputError: An unknown device, or a number of threads below 1.
    """
    from doge_onnx.runtime import model

    return model.load(bundle, device, threads, prefill_chunk, verbose)


def export(
    model: str | Path,
    out: str | Path,
    *,
    precision: str = "fp32",
    context_length: int | None = None,
    target: str = "ort",
    state: str = "growing",
    verify: bool = True,
    revision: str | None = None,
    force: bool = False,
    progress: Callable[[str], None] | None = None,
) -> ExportReport:
    """Turn a Doge checkpoint into a bundle.

    Args:
        model: A directory with a checkpoint, or its id on the Hugging Face Hub.
        out: Directory to write; it appears when it is complete, or not at all.
        precision: Of the weights: "fp32".
        context_length: Most tokens of one sequence; None is what the model was trained for.
        target: "ort" for ONNX Runtime's fused operators, "portable" for standard ones.
        state: "growing" for a state with a row for every token, "window" for one that has as
            many rows as the model's window has keys, however long the text gets.
        verify: Compare the result with the reference and record the figures.
        revision: Branch, tag or commit on the Hub.
        force: Replace a bundle that is at `out`.
        progress: Called with a line of text when a long step begins.

    Raises:
        DogeOnnxError: The checkpoint cannot be read or is not supported, `out` cannot be
            written, or the graph differs from the reference; see the children of the class.
    """
    with _export_extra():
        from doge_onnx.export import exporter

        return exporter.export(
            model,
            out,
            precision=precision,
            context_length=context_length,
            target=target,
            state=state,
            verify=verify,
            revision=revision,
            force=force,
            progress=progress,
        )


def verify(
    bundle: str | Path,
    reference: str | Path,
    *,
    revision: str | None = None,
    progress: Callable[[str], None] | None = None,
) -> ParityReport:
    """Compare a bundle with the checkpoint that it was made from, run by transformers.

    Args:
        bundle: The directory that `export` wrote.
        reference: A directory with the checkpoint, or its id on the Hugging Face Hub.
        revision: Branch, tag or commit on the Hub.
        progress: Called with a line of text when a long step begins.

    Raises:
        DogeOnnxError: One of the two cannot be read; see the children of the class.
    """
    with _export_extra():
        from doge_onnx.export import verify as verifier

        return verifier.verify(bundle, reference, revision=revision, progress=progress)


@contextlib.contextmanager
def _export_extra() -> Iterator[None]:
    """Say what to install if an import fails for want of the export extra."""
    try:
        yield
    except ImportError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _EXPORT_EXTRA:
            raise
        raise MissingExtraError(
            f"this needs {package}, which is not installed: pip install 'doge-onnx[export]'"
        ) from error
