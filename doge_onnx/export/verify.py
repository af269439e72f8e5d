"""`verify`: compare the logits of a bundle with those of its checkpoint.

The reference is transformers in float32 with eager attention, fed one token at a time. If the
bundle's weights have 16 bits, the reference's are rounded likewise. Its
forward of several tokens may differ from that (dynamic RoPE past the trained context, the routing
of experts); then the token-by-token result counts. transformers cannot run other generations and,
below 5.0, experts. Their reference is this package's own step in PyTorch in float64: that checks
the graph and the runtime, and the tests check the step itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from torch import Tensor

from doge_onnx import text_files
from doge_onnx.bundle import Bundle, write_parity
from doge_onnx.errors import BundleError, CheckpointError, ParityError
from doge_onnx.export import checkpoint as checkpoints
from doge_onnx.export import half
from doge_onnx.export.checkpoint import Checkpoint, Source
from doge_onnx.export.eager import EagerModel, Past
from doge_onnx.export.model_config import CONFIG_NAME, DogeConfig
from doge_onnx.export.quiet import quiet_transformers
from doge_onnx.export.torch_threads import thread_limit
from doge_onnx.manifest import Manifest
from doge_onnx.runtime.model import Model, load

# Relative to the largest logit. fp32 kernels differ from the reference in the order of their sums:
# 1e-6 was seen on trained weights, and 8e-5 on 24 layers of random ones. An A that is wrong by one
# percent in one layer of a trained model gives 4e-4. Half precisions round weights, activations
# and state: half a step of float16 is 2^-11, of bfloat16 2^-8. docs/cuda.md has the differences
# that were seen in half precision, and their cause.
RELATIVE_TOLERANCES = {"float32": 2e-4, "float16": 2e-2, "bfloat16": 1.6e-1}
# Long enough to fill several tiles of every kernel, short enough for a 320M model on two cores.
_PROMPT = 96
# Tokens beyond the trained context or the window that a prompt has, if these are short.
_PAST_LIMIT = 16
_MAX_PROMPT = 300
_GREEDY = 24
_SEED = 20250117
# Optimum needs transformers below 5.0, where experts fail: they pass a tuple to a dropout.
_BELOW_5 = int(transformers.__version__.partition(".")[0]) < 5

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
        device: Where the bundle ran, "cpu" or "cuda".
        unrecorded: Why the bundle's manifest could not take the figures; None if it did.
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
    device: str
    unrecorded: str | None = None

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
        """The figures as they stand in the manifest; None for one that is not a number."""
        figures = {"passed": self.passed, "max_abs_diff": self.max_abs_diff, **asdict(self)}
        del figures["unrecorded"]
        return {
            name: None if isinstance(value, float) and not np.isfinite(value) else value
            for name, value in figures.items()
        }


@thread_limit()
def verify(
    bundle: str | Path | Bundle,
    reference: str | Path,
    *,
    device: str = "auto",
    reference_revision: str | None = None,
    adapter: str | Path | None = None,
    progress: Callable[[str], None] | None = None,
) -> ParityReport:
    """Compare a bundle with its checkpoint, and put the figures into the bundle's manifest.

    If the manifest cannot be written, the report says so.

    Args:
        bundle: A bundle.
        reference: The checkpoint: a directory, or the id of a model on the Hub.
        device: Where the bundle runs: "auto", "cpu" or "cuda".
        reference_revision: Branch, tag or commit of a reference on the Hub.
        adapter: The adapter that was merged into the checkpoint, if there was one.
        progress: Called with a few words whenever a step begins.

    Returns:
        The figures. Whether they pass is the report's `passed`; its `require` raises.

    Raises:
        BundleError: The bundle is incomplete, altered or too new, or it is quantized.
        DeviceError: It cannot be run on the device.
        CheckpointError: The checkpoint cannot be read, or is not of the bundle's shape.
    """
    opened = Bundle.open(bundle)
    if opened.manifest.quantized:
        raise BundleError(
            f"{opened.name} is quantized, and so differs from its checkpoint; evaluate it with "
            f"{reference} as the reference, which measures by how much"
        )
    source = checkpoints.find(reference, reference_revision, adapter)
    report = compare(opened, source, progress or (lambda _: None), device)
    try:
        write_parity(opened, parity_figures(report, source))
    except BundleError as error:
        # The figures took minutes, and a bundle may well be on a disk that is only read.
        return replace(report, unrecorded=str(error))
    return report


def parity_figures(report: ParityReport, source: Source) -> dict[str, Any]:
    """What a manifest says of a comparison with the checkpoint `source`."""
    return report.as_dict() | {"checkpoint": source.model, "revision": source.revision}


def compare(
    bundle: Bundle, source: Source, progress: Callable[[str], None], device: str = "auto"
) -> ParityReport:
    """Compare a bundle, or a draft of one, with its checkpoint; see `verify`."""
    model = load(bundle, device)
    progress("loading the reference")
    reference, config, room = _open_reference(source, model.manifest)
    progress("running the reference")
    # Steps of one token are many small operators: a second thread mostly waits. At 160M a step
    # takes 0.1 s with one thread, and on a busy machine five to ten times as long with two.
    with thread_limit(1):
        truths = [
            _run_reference(reference, prompt, min(_GREEDY, room - len(prompt) + 1), config)
            for prompt in _prompts(config, room)
        ]
    longest = truths[0]
    scale = float(np.abs(longest.logits).max())
    tolerance = RELATIVE_TOLERANCES[model.manifest.activations] * max(scale, 1.0)
    progress("comparing prefill and decode")
    prefill, _ = model.forward([longest.prompt], logits="all")
    decoded = _decode(model, longest.prompt)
    progress("comparing a batch")
    batch = _batch_difference(model, truths)
    progress("comparing greedy continuations")
    return ParityReport(
        prefill=_difference(prefill[0], longest.logits),
        decode=_difference(decoded, longest.logits),
        batch=batch,
        greedy_matched=sum(_greedy_matches(model, truth, tolerance) for truth in truths),
        greedy_total=sum(len(truth.choices) for truth in truths),
        logit_scale=scale,
        tolerance=tolerance,
        tokens=len(longest.prompt),
        reference=reference.description,
        device=model.device,
    )


@dataclass(frozen=True)
class _Truth:
    """The reference's results for one prompt.

    Attributes:
        prompt: Token ids.
        logits: `[S, V]`, of each position of the prompt.
        choices: For each token of the greedy continuation, the logits `[V]` that it was
            chosen from, and the token.
    """

    prompt: list[int]
    logits: Array
    choices: list[tuple[Array, int]]


def _run_reference(
    reference: _Reference, prompt: list[int], count: int, config: DogeConfig
) -> _Truth:
    """Run a prompt and a greedy continuation of `count` tokens.

    If the text becomes longer than the window, only tokens that it does not hold yet are
    chosen; see `_prompts` for the reason.
    """
    window = config.keep_window_size
    fresh_only = window is not None and len(prompt) + count > window
    if fresh_only:
        count = min(count, config.vocab_size - len(prompt))
    reference.start()
    logits = np.stack([reference.step(token) for token in prompt])
    row, used = logits[-1].copy(), list(prompt)
    choices: list[tuple[Array, int]] = []
    while len(choices) < count:
        if fresh_only:
            row[used] = -np.inf
        choices.append((row, int(row.argmax())))
        used.append(choices[-1][1])
        if len(choices) < count:
            row = reference.step(used[-1])
    return _Truth(prompt, logits, choices)


class _Reference(Protocol):
    """A model that is fed one token at a time."""

    description: str

    def start(self) -> None:
        """Begin a new text."""

    def step(self, token: int) -> Array:
        """Logits `[V]` after one more token."""


def _open_reference(source: Source, manifest: Manifest) -> tuple[_Reference, DogeConfig, int]:
    """The reference, its config, and how many tokens a text of the comparison may have."""
    directory = source.directory
    checkpoint = checkpoints.read_source(source, ignore=manifest.ignored_fields)
    rounded = half.weight_type(manifest.precision, manifest.activations)
    if rounded is not None:
        # What rounding the weights loses is not an error of the graph.
        half.round_weights(checkpoint, rounded)
    config = checkpoint.config
    asked = (config.vocab_size, config.num_hidden_layers)
    got = (manifest.vocab_size, manifest.state.num_layers)
    if asked != got:
        raise CheckpointError(
            f"{directory} has a vocabulary of {asked[0]} and {asked[1]} layers, the bundle "
            f"{got[0]} and {got[1]}: they are not the same model"
        )
    room = _MAX_PROMPT + _GREEDY
    if manifest.state.kind != "window":
        room = manifest.context_length
    if not checkpoint.is_native or (config.is_moe and _BELOW_5):
        return _Step(checkpoint, room, rounded), config, room
    if config.keep_window_size is not None and _has_equal_gates(checkpoint):
        # transformers drops an arbitrary one of equal gates from the window.
        room = min(room, config.keep_window_size)
    # Where transformers finds the tensors by itself, what this package reads is checked as well.
    tensors = None if checkpoint.as_saved and rounded is None else checkpoint.tensors
    del checkpoint
    return _Transformers(directory, config, tensors), config, room


def _has_equal_gates(checkpoint: Checkpoint) -> bool:
    """Whether a layer's gates are all 1, as before training, or may underflow to 0."""
    decays = [value for name, value in checkpoint.tensors.items() if name.endswith(".A")]
    return any(bool(((decay == 0) | (decay < -30)).any()) for decay in decays)


class _Transformers:
    """The reference implementation.

    Args:
        directory: The checkpoint.
        config: Its config.
        tensors: Its tensors by canonical name, where they differ from those in the directory.
    """

    description = f"transformers {transformers.__version__}, float32, eager"

    def __init__(
        self, directory: Path, config: DogeConfig, tensors: dict[str, Tensor] | None
    ) -> None:
        # It refuses a padding token that the vocabulary lacks.
        told: dict[str, Any] = {"pad_token_id": config.pad_token_id}
        # Versions below 5.0 do not read the RoPE fields that newer ones write.
        if _BELOW_5:
            rope = config.rope
            scaling = {"rope_type": rope.kind, "factor": rope.factor}
            told |= {"rope_theta": rope.theta, "rope_scaling": scaling}
        options: dict[str, Any] = {"attn_implementation": "eager", "dtype": torch.float32}
        try:
            with quiet_transformers():
                # transformers itself reads no JSON with a byte order mark, so it gets the content.
                fields = text_files.read_json(directory / CONFIG_NAME)
                theirs = transformers.DogeConfig.from_dict({**fields, **told})
                if tensors is None:
                    model = transformers.DogeForCausalLM.from_pretrained(
                        directory,
                        config=theirs,
                        generation_config=transformers.GenerationConfig(),
                        local_files_only=True,
                        use_safetensors=True,
                        **options,
                    )
                else:
                    model = transformers.AutoModelForCausalLM.from_config(theirs, **options)
                    _fill(model, tensors)
                self._model = model.eval()
        # It raises no more specific class, for values that are not what it expects among others.
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise CheckpointError(f"transformers cannot read {directory}: {reason}") from error

    @torch.no_grad()
    def start(self) -> None:
        # After a long text, dynamic RoPE keeps the longer wavelengths; a short input resets them.
        self._model(torch.zeros(1, 1, dtype=torch.int64), use_cache=False)
        self._cache = transformers.DynamicCache()

    @torch.no_grad()
    def step(self, token: int) -> Array:
        # By position, since the parameter has another name from transformers 5.24 on.
        output = self._model(torch.tensor([[token]]), None, None, self._cache)
        logits: Tensor = output.logits
        row: Array = logits[0, -1].numpy()
        return row


def _fill(model: torch.nn.Module, tensors: dict[str, Tensor]) -> None:
    """Give a model of transformers the tensors of a checkpoint, by canonical name."""
    named = {
        name if name.startswith("lm_head.") else f"model.{name}": tensor
        for name, tensor in tensors.items()
    }
    found = model.load_state_dict(named, strict=False)
    # A head that is tied to the embedding is filled with it.
    missing = [name for name in found.missing_keys if name != "lm_head.weight"]
    if missing or found.unexpected_keys:
        raise CheckpointError(
            "transformers has other tensors than the checkpoint: "
            f"{missing or found.unexpected_keys}"
        )


class _Step:
    """This package's own step, run by PyTorch."""

    description = "the step in PyTorch, float64 (transformers cannot run this checkpoint)"

    def __init__(
        self, checkpoint: Checkpoint, context_length: int, rounded: torch.dtype | None
    ) -> None:
        self._model = EagerModel(checkpoint, context_length, torch.float64, matrices=rounded)

    def start(self) -> None:
        self._past: Past | None = None

    def step(self, token: int) -> Array:
        logits, self._past = self._model.advance(torch.tensor([[token]]), self._past)
        row: Array = logits[0, -1].float().numpy()
        return row


def _prompts(config: DogeConfig, room: int) -> list[list[int]]:
    """Three random prompts of unequal length; the longest leaves room for a continuation.

    No token stands twice in a prompt: in the first layer equal tokens have equal gates, and the
    reference drops an arbitrary one of them from the window.
    """
    longest = _PROMPT
    for limit in (config.max_position_embeddings, config.keep_window_size):
        if limit is not None and limit + _PAST_LIMIT <= _MAX_PROMPT:
            longest = max(longest, limit + _PAST_LIMIT)
    longest = max(1, min(longest, room - _GREEDY, config.vocab_size))
    rng = np.random.default_rng(_SEED)
    lengths = [longest, max(1, longest // 2), max(1, longest // 5)]
    return [rng.permutation(config.vocab_size)[:length].tolist() for length in lengths]


def _decode(model: Model, ids: Sequence[int]) -> Array:
    rows, state = [], None
    for token in ids:
        logits, state = model.forward([[token]], state)
        rows.append(logits[0, 0])
    return np.stack(rows)


def _batch_difference(model: Model, truths: list[_Truth]) -> float:
    """Feed all prompts as one left-padded batch, the last tokens one at a time."""
    steps = min(4, min(len(truth.prompt) for truth in truths) - 1)
    heads = [truth.prompt[: len(truth.prompt) - steps] for truth in truths]
    width = max(len(head) for head in heads)
    ids = np.array([[0] * (width - len(head)) + head for head in heads])
    mask = np.array([[0] * (width - len(head)) + [1] * len(head) for head in heads])
    logits, state = model.forward(ids, attention_mask=mask, logits="all")
    rows = [logits]
    for step in range(steps, 0, -1):
        logits, state = model.forward([[truth.prompt[-step]] for truth in truths], state)
        rows.append(logits)
    batch = np.concatenate(rows, axis=1)
    differences = [
        _difference(row[-len(truth.prompt) :], truth.logits)
        for row, truth in zip(batch, truths, strict=True)
    ]
    return float(np.max(differences))


def _greedy_matches(model: Model, truth: _Truth, tolerance: float) -> int:
    """Number of greedy choices that are the reference's.

    The bundle is fed the reference's choices, so that a tie does not end the comparison.
    """
    logits, state = model.forward([truth.prompt])
    matched = 0
    for index, (row, token) in enumerate(truth.choices, start=1):
        chosen = int(np.where(np.isneginf(row), -np.inf, logits[0, 0]).argmax())
        matched += bool(row[token] - row[chosen] <= tolerance)
        if index < len(truth.choices):
            logits, state = model.forward([[token]], state)
    return matched


def _difference(ours: Array, truth: Array) -> float:
    return float(np.abs(ours - truth).max())
