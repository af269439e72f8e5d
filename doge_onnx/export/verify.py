"""`verify`: show that a bundle computes what transformers computes.

The reference is transformers in float32 with eager attention, fed one token at a time:
where its own multi-token forward differs from that (dynamic RoPE past the trained context),
the token-by-token result is the truth. Knows both models' interfaces; builds neither.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from torch import Tensor

from doge_onnx import bundle
from doge_onnx.errors import CheckpointError, ParityError
from doge_onnx.export import checkpoint as checkpoints
from doge_onnx.runtime.model import Model, load

# Of the largest logit. fp32 kernels differ from the reference in the order of their sums:
# seen are up to 1e-5 of it; a wrong gate, mask or position shows from 1e-2.
RELATIVE_TOLERANCE = 2e-4
# Long enough to fill several tiles of every kernel, short enough for a 320M model on two cores.
_PROMPT = 96
# Where the trained context is short, the rotation past it is checked too.
_PAST_TRAINED = 16
_MAX_PROMPT = 300
_GREEDY = 24
_SEED = 20250117

Array = NDArray[Any]


@dataclass(frozen=True)
class ParityReport:
    """How far a bundle is from the reference.

    Attributes:
        prefill: Largest absolute difference of the logits of a prompt taken in one step.
        decode: The same for the prompt taken one token at a time.
        batch: The same for a left-padded batch of unequal prompts and decode steps after it,
            against each prompt alone.
        greedy_matched: Greedily chosen tokens that are the reference's. One whose two best
            candidates are closer than the tolerance counts as matched either way.
        greedy_total: Greedily chosen tokens that were compared.
        logit_scale: Largest absolute logit of the reference.
        tolerance: Largest difference that passes.
        tokens: Length of the prompt.
        reference: What the bundle was compared with.
    """

    prefill: float
    decode: float
    batch: float
    greedy_matched: int
    greedy_total: int
    logit_scale: float
    tolerance: float
    tokens: int
    reference: str

    @property
    def max_abs_diff(self) -> float:
        """The largest of the differences."""
        # max() would drop a NaN that is not in the first place.
        return float(np.max([self.prefill, self.decode, self.batch]))

    @property
    def passed(self) -> bool:
        """Whether all differences are within the tolerance and every greedy token matches."""
        return self.max_abs_diff <= self.tolerance and self.greedy_matched == self.greedy_total

    def require(self, name: str) -> None:
        """Raise ParityError if the comparison failed; `name` is the bundle in its message."""
        if not self.passed:
            raise ParityError(
                f"{name} differs from {self.reference}: maximum absolute difference "
                f"{self.max_abs_diff:.2e} (tolerance {self.tolerance:.2e}), greedy match "
                f"{self.greedy_matched}/{self.greedy_total}"
            )

    def as_dict(self) -> dict[str, Any]:
        """The figures as they stand in the manifest."""
        return {"passed": self.passed, "max_abs_diff": self.max_abs_diff, **asdict(self)}


def verify(
    bundle_path: str | Path,
    reference: str | Path,
    *,
    revision: str | None = None,
    progress: Callable[[str], None] | None = None,
) -> ParityReport:
    """Compare a bundle with its checkpoint, and put the figures into the bundle's manifest.

    Args:
        bundle_path: A bundle.
        reference: The checkpoint: a directory, or the id of a model on the Hub.
        revision: Branch, tag or commit of a model on the Hub.
        progress: Called with a few words whenever a step begins.

    Returns:
        The figures. Whether they pass is the report's `passed`; its `require` raises.

    Raises:
        BundleError: The bundle is incomplete, altered or too new.
        CheckpointError: The checkpoint cannot be read, or is not of the bundle's shape.
    """
    source = checkpoints.find(reference, revision)
    report = compare(Path(bundle_path), source.directory, progress or (lambda _: None))
    bundle.write_parity(Path(bundle_path), report.as_dict())
    return report


def compare(directory: Path, checkpoint: Path, progress: Callable[[str], None]) -> ParityReport:
    """Compare the bundle in `directory` with the checkpoint; see `verify`."""
    model = load(directory)
    progress("loading the reference")
    reference = _Reference(checkpoint, model)
    prompts = _prompts(model, reference.trained_context)
    progress("comparing prefill and decode")
    truth = reference.logits(prompts[0])
    prefill, _ = model.forward([prompts[0]], logits="all")
    decoded = _decode(model, prompts[0])
    progress("comparing a batch")
    batch = _batch_difference(model, reference, prompts)
    progress("comparing greedy continuations")
    scale = float(np.abs(truth).max())
    tolerance = RELATIVE_TOLERANCE * max(scale, 1.0)
    greedy = [_greedy_matches(model, reference, prompt, tolerance) for prompt in prompts]
    return ParityReport(
        prefill=_difference(prefill[0], truth),
        decode=_difference(decoded, truth),
        batch=batch,
        greedy_matched=sum(matched for matched, _ in greedy),
        greedy_total=sum(total for _, total in greedy),
        logit_scale=scale,
        tolerance=tolerance,
        tokens=len(prompts[0]),
        reference=f"transformers {transformers.__version__}, float32, eager",
    )


class _Reference:
    """A transformers model that is fed one token at a time."""

    def __init__(self, directory: Path, model: Model) -> None:
        checkpoint = checkpoints.read(directory)
        self.trained_context = checkpoint.config.max_position_embeddings
        asked = (checkpoint.config.vocab_size, checkpoint.config.num_hidden_layers)
        got = (model.manifest.vocab_size, model.manifest.state.num_layers)
        if asked != got:
            raise CheckpointError(
                f"{directory} has a vocabulary of {asked[0]} and {asked[1]} layers, the bundle "
                f"{got[0]} and {got[1]}: they are not the same model"
            )
        del checkpoint
        with _quiet_transformers():
            self._model = transformers.DogeForCausalLM.from_pretrained(
                directory,
                attn_implementation="eager",
                dtype=torch.float32,
                local_files_only=True,
                use_safetensors=True,
            ).eval()

    @torch.no_grad()
    def logits(self, ids: Sequence[int]) -> Array:
        """Logits `[S, V]` of every position."""
        cache = self._fresh_cache()
        return np.stack([self._step(token, cache) for token in ids])

    @torch.no_grad()
    def continue_greedily(self, ids: Sequence[int], count: int) -> Array:
        """Logits `[count, V]` that choose each of `count` greedy tokens after `ids`."""
        cache = self._fresh_cache()
        for token in ids:
            row = self._step(token, cache)
        rows = [row]
        while len(rows) < count:
            rows.append(self._step(int(rows[-1].argmax()), cache))
        return np.stack(rows)

    def _fresh_cache(self) -> Any:
        # Once dynamic RoPE has grown, the module keeps the longer wave lengths; a short input
        # makes it forget them.
        self._model(torch.zeros(1, 1, dtype=torch.int64), use_cache=False)
        return transformers.DynamicCache()

    def _step(self, token: int, cache: Any) -> Array:
        logits: Tensor = self._model(torch.tensor([[token]]), past_key_values=cache).logits
        return logits[0, -1].numpy()


def _prompts(model: Model, trained_context: int) -> list[list[int]]:
    """Three random prompts of unequal length; the longest leaves room for what follows it."""
    longest = _PROMPT
    if trained_context + _PAST_TRAINED <= _MAX_PROMPT:
        longest = max(longest, trained_context + _PAST_TRAINED)
    longest = max(1, min(longest, model.manifest.context_length - _GREEDY))
    rng = np.random.default_rng(_SEED)
    lengths = [longest, max(1, longest // 2), max(1, longest // 5)]
    return [rng.integers(0, model.manifest.vocab_size, length).tolist() for length in lengths]


def _decode(model: Model, ids: Sequence[int]) -> Array:
    rows, state = [], None
    for token in ids:
        logits, state = model.forward([[token]], state)
        rows.append(logits[0, 0])
    return np.stack(rows)


def _batch_difference(model: Model, reference: _Reference, prompts: list[list[int]]) -> float:
    """Feed all prompts as one left-padded batch, the last tokens one at a time."""
    steps = min(4, min(len(prompt) for prompt in prompts) - 1)
    heads = [prompt[: len(prompt) - steps] for prompt in prompts]
    width = max(len(head) for head in heads)
    ids = np.array([[0] * (width - len(head)) + head for head in heads])
    mask = np.array([[0] * (width - len(head)) + [1] * len(head) for head in heads])
    logits, state = model.forward(ids, attention_mask=mask, logits="all")
    rows = [logits]
    for step in range(steps, 0, -1):
        logits, state = model.forward([[prompt[-step]] for prompt in prompts], state)
        rows.append(logits)
    batch = np.concatenate(rows, axis=1)
    return max(
        _difference(row[-len(prompt) :], reference.logits(prompt))
        for row, prompt in zip(batch, prompts, strict=True)
    )


def _greedy_matches(
    model: Model, reference: _Reference, prompt: list[int], tolerance: float
) -> tuple[int, int]:
    """Tokens of a greedy continuation that match, and how many were compared.

    The bundle is fed the reference's choices, so that a tie does not end the comparison.
    """
    count = min(_GREEDY, model.manifest.context_length - len(prompt) + 1)
    truth = reference.continue_greedily(prompt, count)
    matched = 0
    logits, state = model.forward([prompt])
    for index, row in enumerate(truth):
        chosen = int(logits[0, 0].argmax())
        matched += bool(row.max() - row[chosen] <= tolerance)
        if index + 1 < count:
            logits, state = model.forward([[int(row.argmax())]], state)
    return matched, count


def _difference(ours: Array, truth: Array) -> float:
    return float(np.abs(ours - truth).max())


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Keep transformers' own progress bar and remarks off the terminal."""
    level = transformers.logging.get_verbosity()
    bars = transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)
        if bars:
            transformers.logging.enable_progress_bar()
