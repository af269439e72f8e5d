"""Quality: how well a bundle predicts a text, and how far it is from a reference.

Knows perplexity, KL divergence and agreement on the most likely token, and where the text
that they are measured on comes from: a file, or the reference itself, which writes one.
Does not know what the reference is: another bundle, or a checkpoint in PyTorch
(`export.quality`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from doge_onnx.bundle import Bundle
from doge_onnx.errors import InputError, QualityError
from doge_onnx.runtime.generation.defaults import Defaults
from doge_onnx.runtime.generation.sampling import make_sampler
from doge_onnx.runtime.model import load
from doge_onnx.runtime.text.tokenizer import Tokenizer

DEFAULT_SEED = 20250611
DEFAULT_TOKENS = 8192
# Tokens of a window of a file, and of a text that a model writes, which costs a step for each.
FILE_WINDOW = 512
SAMPLE_WINDOW = 256
# Sequences that are sampled at once: the weights are read once for all of them.
_ROWS = 16
# Positions whose logits are float64 at the same time.
_CHUNK = 64
# Of a file no more is read than the tokens that are wanted can have.
_CHARACTERS_PER_TOKEN = 32

Floats = NDArray[np.float64]
_State = TypeVar("_State")


class Scorer(Protocol):
    """A language model, as an evaluation sees it.

    Attributes:
        description: What it is, for a person.
        vocab_size: Token ids are in `range(vocab_size)`.
        context_length: Most tokens that a text may have; None if there is no end.
    """

    description: str
    vocab_size: int
    context_length: int | None

    def logits(self, ids: list[int]) -> NDArray[np.float32]:
        """Logits `[S, V]` of a text of S tokens."""

    def sample(self, seed: int, rows: int, length: int, first_row: int = 0) -> NDArray[np.int64]:
        """Texts `[rows, length]`; see `sample_text`."""


class BundleScorer:
    """A bundle, run by ONNX Runtime on a device; see `doge_onnx.load`.

    Raises:
        DeviceError: It cannot be run there.
        BundleError: The bundle is incomplete, altered, too new, or cannot be run.
    """

    def __init__(self, bundle: str | Path | Bundle, device: str = "auto") -> None:
        self._bundle = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
        self._model = load(self._bundle, device)
        manifest = self._bundle.manifest
        self._never = Defaults.read(self._bundle).eos_token_ids
        self.description = f"{self._bundle.path} ({manifest.precision})"
        self.vocab_size = manifest.vocab_size
        self.context_length = None if manifest.state.kind == "window" else manifest.context_length

    def logits(self, ids: list[int]) -> NDArray[np.float32]:
        """Logits `[S, V]` of a text of S tokens.

        Raises:
            InputError: An id is outside of the vocabulary, or the text is too long.
        """
        logits, _ = self._model.forward([ids], logits="all")
        text: NDArray[np.float32] = logits[0]
        return text

    def sample(self, seed: int, rows: int, length: int, first_row: int = 0) -> NDArray[np.int64]:
        """Texts `[rows, length]` that the bundle writes; see `sample_text`."""

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
            BundleError: Its tokenizer cannot be read.
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
    """Let a model write texts, at temperature 1 and without filters: what it believes in.

    Every row draws numbers of its own, so that all texts are different and a row is the same
    text, but for rounding, whatever rows are written beside it.

    Args:
        step: From the last token of each sequence, int64 `[B]`, and the state before it (None
            at first) to logits `[B, V]`, which may be changed, and the next state.
        bos: The token that texts begin with; None for a random one in each.
        never: Tokens that are not chosen, those that end a text: what stands behind an end
            belongs to no text, and models are not used there.
        vocab_size: V.
        seed: Of all rows.
        rows: Numbers of the rows.
        length: Tokens of each text, the first one included.

    Returns:
        Token ids `[B, length]`.

    Raises:
        QualityError: Logits are not finite.
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
    """How well a bundle predicts a text, and how far it is from its reference.

    What compares is None without a reference.

    Attributes:
        tokens: Predictions that were scored: all tokens of the text but each window's first.
        perplexity: Of the bundle.
        reference_perplexity: Of the reference.
        mean_kl: Mean of KL(reference || bundle) over the predictions, in nats.
        max_kl: The largest of them.
        top1_agreement: Share of predictions with the same most likely token, 0 to 1.
        disagreements: Number of the others.
        top2_gap_median: By how much the reference prefers its first choice to its second, in
            logits, where the two disagree; None where they never do.
        top2_gap_max: Likewise.
        choice_gap_median: By how much the reference prefers its choice to the bundle's.
        choice_gap_max: Likewise.
        window: Most tokens that a prediction sees, itself included.
        text: Where the text comes from.
        seed: Of a text that was sampled, else None.
        reference: What the bundle was compared with.
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

    def require(self, max_kl: float, name: str) -> None:
        """Raise QualityError if the mean KL divergence is above `max_kl`, or is no number.

        `name` is the bundle in its message.
        """
        # Not `>`, which is false of NaN.
        if self.mean_kl is None or not self.mean_kl <= max_kl:
            measured = "unknown" if self.mean_kl is None else f"{self.mean_kl:.3g} nats per token"
            raise QualityError(
                f"{name} is too far from {self.reference or 'a reference'}: mean KL divergence "
                f"{measured}, allowed {max_kl:g}"
            )

    def as_dict(self) -> dict[str, Any]:
        """The figures as they stand in the manifest; None for one that is not a number."""
        return {
            name: None if isinstance(value, float) and not np.isfinite(value) else value
            for name, value in asdict(self).items()
        }


@dataclass(frozen=True)
class Text:
    """What an evaluation reads.

    Attributes:
        windows: Token ids, read one after another; at least two in the first.
        window: Most tokens of one.
        description: Where it comes from.
        seed: If it is sampled.
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
    """Measure the quality of a bundle.

    Options are those that pass `check_options`.

    Args:
        bundle: What is measured.
        reference: What it is compared with; None measures the perplexity alone.
        text: A file of UTF-8 text. None lets the reference, or else the bundle, write one.
        window: The text is cut into pieces of this many tokens, each of which is read on its
            own. Never more than the context length; None is a size that is good for most.
        max_tokens: Most tokens of the text; None is `DEFAULT_TOKENS`.
        seed: Of a text that is sampled; None is `DEFAULT_SEED`.
        max_seconds: No window is begun after that time, if `min_tokens` have been read.
        min_tokens: Least tokens of the text, however long it takes; there is always a window.
        progress: Called with a few words whenever a step begins.

    Raises:
        InputError: The reference has another vocabulary, the text cannot be read or has less
            than two tokens.
        QualityError: The model that is to write the text cannot.
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
    """Check the options of an evaluation, before anything large is loaded.

    Raises:
        InputError: One is out of its range.
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
    """A text that `source` writes, as many windows as fit into `max_tokens`, but at least one.

    It is written while it is read, some windows at a time.
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

    Raises:
        InputError: The file cannot be read, is not UTF-8, or has less than two tokens.
    """
    try:
        with path.open(encoding="utf-8", newline="") as stream:
            content = stream.read(_CHARACTERS_PER_TOKEN * max_tokens)
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text: {error}") from None
    # ValueError: a name that the system does not take.
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path}: {error}") from None
    ids = encode(content)[:max_tokens]
    if len(ids) < 2:
        raise InputError(f"{path} has less than two tokens: there is nothing to predict")
    windows = [ids[start : start + window] for start in range(0, len(ids), window)]
    return Text(windows, window, str(path))


def score(
    bundle: Scorer,
    reference: Scorer | None,
    text: Text,
    max_seconds: float | None = None,
    min_tokens: int = 0,
) -> QualityReport:
    """Read a text with one or both models, window by window; see `evaluate`."""
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
    )


class _Comparison(NamedTuple):
    """Figures of some predictions.

    Attributes:
        losses: Of the reference, `[N]`.
        kl: `[N]`.
        top2_gaps: One for each disagreement.
        choice_gaps: Likewise.
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
    """Compare the predictions of some positions; all arrays but `targets` are `[N, V]`."""
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
    # Logits that are no numbers make figures that are none, without a warning for each.
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
