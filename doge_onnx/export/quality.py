"""The loss of a bundle against its checkpoint: the evaluation with PyTorch as reference.

Knows how to open a checkpoint as a reference, and how much text an export can afford.
`measure.evaluate` knows what is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path

from doge_onnx.bundle import Bundle
from doge_onnx.export import checkpoint as checkpoints
from doge_onnx.export.checkpoint import Checkpoint
from doge_onnx.export.eager import EagerModel
from doge_onnx.measure.evaluate import (
    DEFAULT_TOKENS,
    SAMPLE_WINDOW,
    BundleScorer,
    QualityReport,
    evaluate,
)

MAX_SECONDS = 60.0
# Tokens times weights: two cores sample that much and read it twice in less than MAX_SECONDS.
_WORK = 6e11
# The fewest tokens that still tell a good export from a bad one.
_MIN_TOKENS = 4 * SAMPLE_WINDOW


def open_checkpoint(
    reference: str | Path,
    context_length: int,
    *,
    revision: str | None = None,
    adapter: str | Path | None = None,
    ignore: Collection[str] = (),
    progress: Callable[[str], None] | None = None,
) -> EagerModel:
    """Read a checkpoint as the reference of an evaluation.

    Args:
        reference: A directory, or the id of a model on the Hub.
        context_length: Most tokens that a text may have.
        revision: Branch, tag or commit of a model on the Hub.
        adapter: An adapter to merge into it.
        ignore: Fields of its config to do without; see `DogeConfig.from_file`.
        progress: Called with a few words whenever a step begins.

    Raises:
        ConfigError: The config makes no sense, or is not a Doge model's.
        CheckpointError: The checkpoint cannot be found, fetched or read.
    """
    source = checkpoints.find(reference, revision, adapter)
    checkpoint = checkpoints.read_source(source, progress or (lambda _: None), ignore)
    return EagerModel(checkpoint, context_length, name=source.model)


def affordable_tokens(parameters: int) -> int:
    """Tokens of the text that an export can afford to write and to read.

    Args:
        parameters: Number of weights of the model; larger ones get less text.
    """
    return min(max(round(_WORK / parameters), _MIN_TOKENS), DEFAULT_TOKENS)


def measure(
    bundle: str | Path | Bundle,
    checkpoint: Checkpoint,
    *,
    max_seconds: float = MAX_SECONDS,
    progress: Callable[[str], None] | None = None,
) -> QualityReport:
    """Compare a bundle with its checkpoint on a text that the checkpoint writes.

    Args:
        bundle: A bundle, or a draft of one.
        checkpoint: With all its tensors, which it keeps.
        max_seconds: About how long reading and writing may take. Larger models get less text, but
            enough to tell a good export from a bad one.
        progress: Called with a few words whenever a step begins.

    Raises:
        BundleError: The bundle is incomplete, altered, or cannot be run.
        QualityError: The checkpoint's logits are not finite.
    """
    return evaluate(
        BundleScorer(bundle),
        EagerModel(checkpoint, SAMPLE_WINDOW),
        max_tokens=affordable_tokens(checkpoint.parameters),
        max_seconds=max_seconds,
        min_tokens=_MIN_TOKENS,
        progress=progress,
    )
