"""Measures quality: how well a bundle predicts a text, and how much it differs from a reference.

Knows perplexity, KL divergence and agreement on the most likely token, and how to get a text to
measure them on: from a file, or written by a model. Does not know whether the reference is another
bundle or a checkpoint in PyTorch (`export.quality`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from doge_onnx import text_files
from doge_onnx.bundle import Bundle
from doge_onnx.errors import InputError, QualityError
from doge_onnx.runtime.generation.defaults import Defaults
from doge_onnx.runtime.generation.sampling import make_sampler
from doge_onnx.runtime.model import load
from doge_onnx.runtime.text.tokenizer import Tokenizer

DEFAULT_SEED = 20250611
DEFAULT_TOKENS = 8192
# Tokens of a window in the text of a file, and in a text that a model writes, which takes a decode
# step for each token.
FILE_WINDOW = 512
SAMPLE_WINDOW = 256
# Sequences that are sampled at once, so that a step reads the weights once for all of them.
_ROWS = 16
# Positions whose logits are converted to float64 at once.
_CHUNK = 64
# Characters to read from a file for each token that is needed: on average, tokens have fewer.
_CHARACTERS_PER_TOKEN = 32

Floats = NDArray[np.float64]
_State = TypeVar("_State")


class Scorer(Protocol):
    """The interface of a language model that an evaluation needs.

    Attributes:
        description: Name of the model, for a person.
        vocab_size: Token ids are in `range(vocab_size)`.
        context_length: Most tokens that a text may have; None for no limit.
    """

    description: str
    vocab_size: int
    context_length: int | None

    def logits(self, ids: list[int]) -> NDArray[np.float32]:
        """Logits, float32 `[S, V]`, of a text of S tokens."""

    def sample(self, seed: int, rows: int, length: int, first_row: int = 0) -> NDArray[np.int64]:
        """Texts that the model writes, int64 `[rows, length]`; see `sample_text`."""


class BundleScorer:
    """A bundle, run by ONNX Runtime on a device; see `doge_onnx.load`.

    Raises:
        DeviceError: The device is missing or cannot run the bundle.
        BundleError: The bundle is incomplete, altered, too new, or cannot be run.
    """

    def __init__(self, bundle: str | Path | Bundle, device: str = "auto") -> None:
        self._bundle = Bundle.open(bundle)
        self._model = load(self._bundle, device)
        manifest = self._bundle.manifest
        self._never = Defaults.read(self._bundle).eos_token_ids
        self.description = f"{self._bundle.name} ({manifest.precision})"
        self.kernels = self._model.kernels.instructions
        self.vocab_size = manifest.vocab_size
        self.ignored_fields = manifest.ignored_fields
        self.context_length = None if manifest.state.kind == "window" else manifest.context_length

    def logits(self, ids: list[int]) -> NDArray[np.float32]:
        """Logits, float32 `[S, V]`, of a text of S tokens.

        Raises:
            InputError: An id is outside the vocabulary, or the text is longer than the context.
        """
        logits, _ = self._model.forward([ids], logits="all")
        text: NDArray[np.float32] = logits[0]
        return text

    def sample(self, seed: int, rows: int, length: int, first_row: int = 0) -> NDArray[np.int64]:
        """Texts that the bundle writes, int64 `[rows, length]`; see `sample_text`."""

        def step(tokens: NDArray[np.int64], state: Any) -> tuple[NDArray[np.float32], Any]:
            logits, state = self._model.forward(tokens[:, np.newaxis], state)
            return logits[:, 0], state

        bos = self._bundle.read_json("config.json").get("bos_token_id")
        if not isinstance(bos, int) or not 0 <= bos < self.vocab_size:
            bos = None
        numbers = range(first_row, first_row + rows)
        return sample_text(step, bos, self._never, self.vocab_size, seed, numbers, length)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text.

        Raises:
            InputError: The bundle has no tokenizer.
            BundleError: The tokenizer cannot be read.
        """
        path = self._bundle.file("tokenizer.json")
        if path is None:
            raise InputError(
                f"{self._bundle.path} has no tokenizer.json and cannot read a text; without one, "
                "the model is evaluated on a text that it writes"
            )
        return Tokenizer(path).encode(text)


def sample_text(
    step: Callable[[NDArray[np.int64], _State | None], tuple[NDArray[np.float32], _State]],
    bos: int | None,
    never: Collection[int],
    vocab_size: int,
    seed: int,
    rows: range,
    length: int,
) -> NDArray[np.int64]:
    """Let a model write texts at temperature 1, without filters: samples of its own distribution.

    Each row draws its own random numbers. So all texts differ, and a row is the same text whatever
    other rows are written with it, except for rounding.

    Args:
        step: Takes the last token of each sequence, int64 `[B]`, and the state before it (None at
            first). Returns logits `[B, V]`, which may be changed, and the next state.
        bos: The token that texts begin with; None for a random token in each.
        never: Tokens that are never chosen: those that end a text, because models are not used on
            what follows the end of a text.
        vocab_size: V.
        seed: Seed of all rows.
        rows: Numbers of the rows.
        length: Tokens of each text, including the first.

    Returns:
        Token ids, int64 `[B, length]`.

    Raises:
        QualityError: The logits are not finite.
    """
    generators = [np.random.default_rng([seed, row]) for row in rows]
    samplers = [make_sampler(rng, temperature=1.0) for rng in generators]
    banned = [token_id for token_id in never if token_id < vocab_size]
    texts = np.empty((len(rows), length), np.int64)
    texts[:, 0] = [rng.integers(vocab_size) if bos is None else bos for rng in generators]
    state: _State | None = None
    for position in range(1, length):
        logits, state = step(texts[:, position - 1], state)
        if not np.isfinite(logits).all():
            raise QualityError("a model whose logits are not finite numbers writes no text")
        logits[:, banned] = -np.inf
        texts[:, position] = [sample(row) for sample, row in zip(samplers, logits, strict=True)]
    return texts


@dataclass(frozen=True)
class QualityReport:
    """How well a bundle predicts a text, and how much it differs from its reference.

    Without a reference, all figures of the comparison are None.

    Attributes:
        tokens: Number of predictions that were scored: all tokens of the text but the first of each
            window.
        perplexity: Perplexity of the bundle.
        reference_perplexity: Perplexity of the reference.
        mean_kl: Mean of KL(reference || bundle) over the predictions, in nats.
        max_kl: Largest KL(reference || bundle) of a prediction, in nats.
        top1_agreement: Share of predictions for which both find the same token most likely, 0 to 1.
        disagreements: Number of predictions for which they do not.
        top2_gap_median: Where they disagree: the difference of the reference's logits of its first
            and its second choice, median. None if they never disagree.
        top2_gap_max: The same, maximum.
        choice_gap_median: Where they disagree: the difference of the reference's logits of its own
            and of the bundle's choice, median. None if they never disagree.
        choice_gap_max: The same, maximum.
        window: Most tokens in the text of a prediction, the predicted token included.
        text: Source of the text, for a person.
        seed: Seed of a text that a model wrote; None for the text of a file.
        reference: Name of the reference, for a person.
        kernels: Instruction set of this package's kernels, such as "avx2", with which the bundle
            ran; None if it ran with those of ONNX Runtime, which round activations where weights
            are quantized.
    """

    tokens: int
    perplexity: float
    reference_perplexity: float | None
    mean_kl: float | None
    max_kl: float | None
    top1_agreement: float | None
    disagreements: int | None
    top2_gap_median: float | None
    top2_gap_max: float | None
    choice_gap_median: float | None
    choice_gap_max: float | None
    window: int
    text: str
    seed: int | None
    reference: str | None
    kernels: str | None

    def require(self, max_kl: float, name: str) -> None:
        """Check that the mean KL divergence is a number and at most `max_kl` nats per token.

        Args:
            max_kl: The limit, in nats per token.
            name: Name of the bundle, for the error message.

        Raises:
            QualityError: The mean KL divergence is above the limit, NaN or unknown.
        """
        # Not `>`, which is false for NaN.
        if self.mean_kl is None or not self.mean_kl <= max_kl:
            measured = "unknown" if self.mean_kl is None else f"{self.mean_kl:.3g} nats per token"
            raise QualityError(
                f"{name} is too far from {self.reference or 'a reference'}: mean KL divergence "
                f"{measured}, allowed {max_kl:g}"
            )

    def as_dict(self) -> dict[str, Any]:
        """The figures as the manifest holds them; None for those that are not finite."""
        return {
            name: None if isinstance(value, float) and not np.isfinite(value) else value
            for name, value in asdict(self).items()
        }


@dataclass(frozen=True)
class Text:
    """A text to evaluate models on, cut into windows.

    Attributes:
        windows: Token ids of each window, in order; at least two in the first.
        window: Most tokens of a window.
        description: Source of the text, for a person.
        seed: Seed of a text that a model writes; else None.
    """

    windows: Iterable[list[int]]
    window: int
    description: str
    seed: int | None = None


def evaluate(
    bundle: BundleScorer,
    reference: Scorer | None = None,
    text: str | Path | None = None,
    *,
    window: int | None = None,
    max_tokens: int | None = None,
    seed: int | None = None,
    max_seconds: float | None = None,
    min_tokens: int = 0,
    progress: Callable[[str], None] | None = None,
) -> QualityReport:
    """Measure the quality of a bundle. The options must have passed `check_options`.

    Args:
        bundle: The bundle.
        reference: The model to compare with; None for the perplexity alone.
        text: A file of UTF-8 text. With None the reference, or without one the bundle, writes the
            text.
        window: Tokens of the pieces into which the text is cut; each piece is read on its own. At
            most the context length. None for `FILE_WINDOW`, or `SAMPLE_WINDOW` if a model writes
            the text.
        max_tokens: Most tokens of the text; None for `DEFAULT_TOKENS`.
        seed: Seed of a text that a model writes; None for `DEFAULT_SEED`.
        max_seconds: Begin no window after this time, if `min_tokens` have been read.
        min_tokens: Fewest tokens to read, however long it takes. One window is always read.
        progress: Called with a few words when a step begins.

    Raises:
        InputError: The reference has another vocabulary, or the text cannot be read or has fewer
            than two tokens.
        QualityError: The model that should write the text cannot.
    """
    report = progress or (lambda _: None)
    if reference is not None and reference.vocab_size != bundle.vocab_size:
        raise InputError(
            f"{reference.description} has a vocabulary of {reference.vocab_size} tokens, "
            f"{bundle.description} one of {bundle.vocab_size}: they cannot be compared"
        )
    models: list[Scorer] = [bundle] if reference is None else [bundle, reference]
    limits = [model.context_length for model in models if model.context_length is not None]
    window = min([window or (SAMPLE_WINDOW if text is None else FILE_WINDOW), *limits])
    if window < 2:
        raise InputError("with a context length of 1 there is nothing to predict")
    max_tokens = max_tokens or DEFAULT_TOKENS
    if text is None:
        report("sampling a text and reading it")
        seed = DEFAULT_SEED if seed is None else seed
        chosen = sampled_text(reference or bundle, seed, window, max_tokens)
    else:
        report("reading the text")
        chosen = file_text(Path(text), bundle.encode, window, max_tokens)
    return score(bundle, reference, chosen, max_seconds, min_tokens)


def check_options(window: int | None, max_tokens: int | None, seed: int | None) -> None:
    """Check the options of an evaluation, before a model is loaded.

    Raises:
        InputError: An option is out of its range.
    """
    options = (
        ("window", window, 2, 2**20),
        ("max_tokens", max_tokens, 2, 2**40),
        ("seed", seed, 0, None),
    )
    for name, value, least, most in options:
        if value is not None and (
            isinstance(value, bool) or not isinstance(value, int) or value < least
        ):
            raise InputError(f"{name} must be a whole number, {least} or more, not {value!r}")
        if value is not None and most is not None and value > most:
            raise InputError(f"{name} must be at most {most}, not {value}")


def sampled_text(source: Scorer, seed: int, window: int, max_tokens: int) -> Text:
    """A text that a model writes: as many windows as fit into `max_tokens`, but at least one.

    The model writes some windows at a time, when the evaluation asks for them.

    Args:
        source: The model.
        seed: Seed of all windows.
        window: Most tokens of a window.
        max_tokens: Most tokens of the text.
    """
    length = min(window, max_tokens)

    def windows() -> Iterator[list[int]]:
        count = max_tokens // length
        for first in range(0, count, _ROWS):
            texts = source.sample(seed, min(_ROWS, count - first), length, first)
            yield from texts.tolist()

    return Text(windows(), length, f"sampled from {source.description}", seed)


def file_text(path: Path, encode: Callable[[str], list[int]], window: int, max_tokens: int) -> Text:
    """The first `max_tokens` tokens of a file.

    Args:
        path: The file, in UTF-8. A byte order mark is no part of the text, and newlines of Windows
            are read as those of Unix.
        encode: Converts text to token ids.
        window: Most tokens of a window.
        max_tokens: Most tokens of the text.

    Raises:
        InputError: The file cannot be read, is not UTF-8, or has fewer than two tokens.
    """
    try:
        content = text_files.read(path, _CHARACTERS_PER_TOKEN * max_tokens)
    # ValueError: what is not UTF-8, and a file name that the system does not allow.
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path}: {error}") from None
    ids = encode(content)[:max_tokens]
    if len(ids) < 2:
        raise InputError(f"{path} has less than two tokens: there is nothing to predict")
    windows = [ids[start : start + window] for start in range(0, len(ids), window)]
    return Text(windows, window, str(path))


def score(
    bundle: BundleScorer,
    reference: Scorer | None,
    text: Text,
    max_seconds: float | None = None,
    min_tokens: int = 0,
) -> QualityReport:
    """Compute the figures of a text, window by window, with one or both models; see `evaluate`."""
    started = time.monotonic()
    losses: list[Floats] = []
    comparisons: list[_Comparison] = []
    read = 0
    for ids in text.windows:
        ours = bundle.logits(ids)
        theirs = None if reference is None else reference.logits(ids)
        targets = np.array(ids[1:])
        for start in range(0, len(targets), _CHUNK):
            chunk = slice(start, min(start + _CHUNK, len(targets)))
            log_probabilities = _log_softmax(ours[chunk])
            losses.append(_losses(log_probabilities, targets[chunk]))
            if theirs is not None:
                comparisons.append(
                    _compare(ours[chunk], log_probabilities, theirs[chunk], targets[chunk])
                )
        read += len(ids)
        late = max_seconds is not None and time.monotonic() - started >= max_seconds
        if late and read >= min_tokens:
            break
    compared = _join(comparisons) if comparisons else None
    return QualityReport(
        tokens=sum(map(len, losses)),
        perplexity=_perplexity(np.concatenate(losses)),
        reference_perplexity=None if compared is None else _perplexity(compared.losses),
        mean_kl=None if compared is None else float(compared.kl.mean()),
        max_kl=None if compared is None else float(compared.kl.max()),
        top1_agreement=None if compared is None else 1 - len(compared.top2_gaps) / len(compared.kl),
        disagreements=None if compared is None else len(compared.top2_gaps),
        top2_gap_median=None if compared is None else _median(compared.top2_gaps),
        top2_gap_max=None if compared is None else _max(compared.top2_gaps),
        choice_gap_median=None if compared is None else _median(compared.choice_gaps),
        choice_gap_max=None if compared is None else _max(compared.choice_gaps),
        window=text.window,
        text=text.description,
        seed=text.seed,
        reference=None if reference is None else reference.description,
        kernels=bundle.kernels,
    )


class _Comparison(NamedTuple):
    """Figures of N predictions, of which the models disagree about D; all float64.

    Attributes:
        losses: Negative log-probabilities of the reference, in nats, `[N]`.
        kl: KL(reference || bundle), in nats, `[N]`.
        top2_gaps: See `QualityReport.top2_gap_median`, `[D]`.
        choice_gaps: See `QualityReport.choice_gap_median`, `[D]`.
    """

    losses: Floats
    kl: Floats
    top2_gaps: Floats
    choice_gaps: Floats


def _compare(
    ours: NDArray[np.float32],
    our_log_probabilities: Floats,
    theirs: NDArray[np.float32],
    targets: NDArray[np.int64],
) -> _Comparison:
    """Compare the predictions of N positions.

    Args:
        ours: Logits of the bundle, `[N, V]`.
        our_log_probabilities: Their log-softmax, `[N, V]`.
        theirs: Logits of the reference, `[N, V]`.
        targets: The tokens of the text, `[N]`.
    """
    log_probabilities = _log_softmax(theirs)
    kl = (np.exp(log_probabilities) * (log_probabilities - our_log_probabilities)).sum(axis=-1)
    chosen, best = ours.argmax(axis=-1), theirs.argmax(axis=-1)
    rows = np.flatnonzero(chosen != best)
    top2_gaps = choice_gaps = np.empty(0)
    if len(rows):
        second, first = np.partition(theirs[rows], -2, axis=-1)[:, -2:].astype(np.float64).T
        top2_gaps, choice_gaps = first - second, first - theirs[rows, chosen[rows]]
    return _Comparison(_losses(log_probabilities, targets), kl, top2_gaps, choice_gaps)


def _join(parts: list[_Comparison]) -> _Comparison:
    return _Comparison(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def _log_softmax(logits: NDArray[np.float32]) -> Floats:
    shifted = logits.astype(np.float64)
    # Logits that are NaN or infinite give figures that are NaN, without a warning for each.
    with np.errstate(invalid="ignore"):
        shifted -= shifted.max(axis=-1, keepdims=True)
        shifted -= np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return shifted


def _losses(log_probabilities: Floats, targets: NDArray[np.int64]) -> Floats:
    losses: Floats = -log_probabilities[np.arange(len(targets)), targets]
    return losses


def _perplexity(losses: Floats) -> float:
    with np.errstate(over="ignore"):
        return float(np.exp(losses.mean()))


def _median(values: Floats) -> float | None:
    return float(np.median(values)) if len(values) else None


def _max(values: Floats) -> float | None:
    return float(values.max()) if len(values) else None
