"""The options of generation, as one immutable object.

Knows the valid values and the meaning of each option; the command line and the documentation take
both from here. Does not know what a bundle recommends (`defaults`) or how an option is implemented
(`processors`, `sampling`, `sequence`).
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, TypedDict, Unpack, cast

from doge_onnx.errors import InputError

if TYPE_CHECKING:
    from doge_onnx.runtime.generation.processors import LogitsProcessor
    from doge_onnx.runtime.generation.sampling import Sampler

# Added to logits, which are float32: sums of larger numbers would overflow.
_LARGEST_SUMMAND = 1e30


class LogitBias(Mapping[int, float]):
    """An immutable mapping from token ids to the number that is added to the token's logit."""

    def __init__(self, biases: Mapping[int, float]) -> None:
        """Copy `biases`."""
        self._biases = {int(token_id): float(bias) for token_id, bias in biases.items()}

    def __getitem__(self, token_id: int) -> float:
        return self._biases[token_id]

    def __iter__(self) -> Iterator[int]:
        return iter(self._biases)

    def __len__(self) -> int:
        return len(self._biases)

    def __hash__(self) -> int:
        return hash(frozenset(self._biases.items()))

    def __repr__(self) -> str:
        return repr(self._biases)


@dataclass(frozen=True)
class Option:
    """Describes a field of `GenerationConfig`.

    Attributes:
        words: The condition for a value, as error messages say it.
        valid: Returns whether a value is valid.
        store: Converts a valid value to the one that the object keeps.
        help: What the option does.
        default: What happens if neither the caller nor the bundle sets the option.
        kind: Type of one value on the command line; None if the command line lacks the option.
        several: Whether the command line accepts the option several times.
        metavar: Name of a value in the help of the command line.
        filters: Whether the option leaves only some tokens to sample from. It asks for sampling if
            no temperature is given, and `sampling.FILTERS` has what it keeps.
        recommended: Whether generation_config.json has it under the same name.
    """

    words: str
    valid: Callable[[Any], bool]
    store: Callable[[Any], Any]
    help: str
    default: str
    kind: type | None = None
    several: bool = False
    metavar: str | None = None
    filters: bool = False
    recommended: bool = False


def _option(*arguments: Any, **keywords: Any) -> dict[str, Option]:
    return {"option": Option(*arguments, **keywords)}


# `numbers` covers NumPy's types too. Python counts bools as numbers; these options do not.
def _is_whole(value: object) -> bool:
    return isinstance(value, numbers.Integral) and not _is_bool(value)


def _is_real(value: object) -> bool:
    if not isinstance(value, numbers.Real) or _is_bool(value):
        return False
    try:
        return math.isfinite(value)
    # A whole number that no float is large enough for.
    except OverflowError:
        return False


def _is_summand(value: object) -> bool:
    return _is_real(value) and abs(float(cast(float, value))) <= _LARGEST_SUMMAND


def _is_bool(value: object) -> bool:
    return isinstance(value, bool)


def _whole(
    least: int, help: str, default: str, metavar: str = "N", **more: bool
) -> dict[str, Option]:
    return _option(
        f"a whole number, {least} or more",
        lambda value: _is_whole(value) and value >= least,
        int,
        help,
        default,
        kind=int,
        metavar=metavar,
        **more,
    )


def _real(
    words: str,
    accept: Callable[[float], bool],
    help: str,
    default: str,
    metavar: str,
    **more: bool,
) -> dict[str, Option]:
    return _option(
        words,
        lambda value: _is_real(value) and accept(float(value)),
        float,
        help,
        default,
        kind=float,
        metavar=metavar,
        **more,
    )


def _flag(help: str) -> dict[str, Option]:
    return _option("True or False", _is_bool, bool, help, "no", kind=bool)


def _is_stop(value: Any) -> bool:
    entries = [value] if isinstance(value, str) else value
    return isinstance(entries, Sequence) and all(isinstance(e, str) and e for e in entries)


def _is_bias(value: Any) -> bool:
    return isinstance(value, Mapping) and all(
        _is_whole(token_id) and token_id >= 0 and _is_summand(bias)
        for token_id, bias in value.items()
    )


@dataclass(frozen=True, repr=False)
class GenerationConfig:
    """The options of generation; immutable.

    An option that is None follows the bundle's generation_config.json, or else its default.
    Tokens are sampled if the temperature is above 0, or if there is no temperature but one of
    top_k, top_p and min_p. Names and meanings are those of Hugging Face transformers, and for the
    presence and frequency penalties those of OpenAI's API.

    Raises:
        InputError: An option is out of its range, or two options exclude each other.
    """

    max_new_tokens: int | None = field(
        default=None,
        metadata=_whole(
            0,
            "Most tokens to generate. The end of the context ends a text before that.",
            "up to the end of the context",
            recommended=True,
        ),
    )
    min_new_tokens: int | None = field(
        default=None,
        metadata=_whole(
            0, "Choose no end-of-text token before this many tokens.", "none", recommended=True
        ),
    )
    temperature: float | None = field(
        default=None,
        metadata=_real(
            "a finite number, 0 or more",
            lambda x: x >= 0,
            "0 always takes the most likely token (greedy); higher is more varied.",
            "greedy, or 1 where a filter asks for sampling",
            "T",
            recommended=True,
        ),
    )
    top_k: int | None = field(
        default=None,
        metadata=_whole(
            1,
            "Sample from the K most likely tokens.",
            "no limit",
            "K",
            filters=True,
            recommended=True,
        ),
    )
    top_p: float | None = field(
        default=None,
        metadata=_real(
            "above 0 and at most 1",
            lambda x: 0 < x <= 1,
            "Sample from the most likely tokens that have probability P together, above 0 and at "
            "most 1.",
            "all",
            "P",
            filters=True,
            recommended=True,
        ),
    )
    min_p: float | None = field(
        default=None,
        metadata=_real(
            "between 0 and 1",
            lambda x: 0 <= x <= 1,
            "Sample from tokens at least P times as likely as the best one, 0 to 1.",
            "all",
            "P",
            filters=True,
            recommended=True,
        ),
    )
    repetition_penalty: float | None = field(
        default=None,
        metadata=_real(
            "between 1e-9 and 1e9",
            lambda x: 1e-9 <= x <= 1e9,
            "Above 1 makes tokens of the prompt and the text less likely; 1.1 is mild.",
            "none",
            "R",
            recommended=True,
        ),
    )
    presence_penalty: float | None = field(
        default=None,
        metadata=_real(
            "between -1e30 and 1e30",
            _is_summand,
            "Subtracted from the logits of tokens that were generated before.",
            "none",
            "X",
        ),
    )
    frequency_penalty: float | None = field(
        default=None,
        metadata=_real(
            "between -1e30 and 1e30",
            _is_summand,
            "Subtracted from the logit of a token once for each time that it was generated before.",
            "none",
            "X",
        ),
    )
    no_repeat_ngram_size: int | None = field(
        default=None,
        metadata=_whole(
            0,
            "Let no N tokens follow each other twice, in prompt and text together.",
            "no limit",
            recommended=True,
        ),
    )
    logit_bias: Mapping[int, float] | None = field(
        default=None,
        metadata=_option(
            "a mapping of token ids to numbers between -1e30 and 1e30",
            _is_bias,
            LogitBias,
            "Add BIAS to the logit of the token ID.",
            "none",
            kind=str,
            several=True,
            metavar="ID=BIAS",
        ),
    )
    seed: int | None = field(
        default=None,
        metadata=_whole(0, "The same seed gives the same text.", "another text each time"),
    )
    stop: str | Sequence[str] | None = field(
        default=None,
        metadata=_option(
            "a string or several, none of them empty",
            _is_stop,
            lambda value: (value,) if isinstance(value, str) else tuple(value),
            "End before this text appears.",
            "none",
            kind=str,
            several=True,
            metavar="TEXT",
        ),
    )
    ignore_eos: bool | None = field(
        default=None, metadata=_flag("Go on behind an end-of-text token.")
    )
    logprobs: bool | None = field(
        default=None,
        metadata=_flag(
            "Report the natural logarithm of each token's probability, before options change it."
        ),
    )
    top_logprobs: int | None = field(
        default=None,
        metadata=_whole(
            0,
            "Report the N most likely tokens beside each token, and all log-probabilities.",
            "none",
        ),
    )
    processors: Sequence[LogitsProcessor] | None = field(
        default=None,
        metadata=_option(
            "a list of logits processors, which are callable",
            lambda value: isinstance(value, Sequence) and all(map(callable, value)),
            tuple,
            "Logits processors of your own, called in this order after those of the other options.",
            "none",
        ),
    )
    sampler: Sampler | None = field(
        default=None,
        metadata=_option(
            "callable",
            callable,
            lambda value: value,
            "Chooses tokens in place of temperature, top_k, top_p and min_p.",
            "none",
        ),
    )

    def __post_init__(self) -> None:
        for entry in fields(self):
            value = getattr(self, entry.name)
            if value is None:
                continue
            option: Option = entry.metadata["option"]
            if not option.valid(value):
                raise InputError(f"{entry.name} must be {option.words}, not {value!r}")
            object.__setattr__(self, entry.name, option.store(value))
        for name in ("temperature", *option_names("filters")):
            if self.sampler is not None and getattr(self, name) is not None:
                raise InputError(f"a sampler replaces {name}; give one of the two")

    def __repr__(self) -> str:
        given = (f"{name}={value!r}" for name, value in self.given().items())
        return f"{type(self).__name__}({', '.join(given)})"

    def given(self) -> GenerationOptions:
        """The options that are not None."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return cast(GenerationOptions, {k: v for k, v in values.items() if v is not None})

    def merged(self, **overrides: Unpack[GenerationOptions]) -> GenerationConfig:
        """A copy with some options replaced; an override that is None changes nothing.

        Raises:
            InputError: There is no option of a name, an option is out of its range, or two options
                exclude each other.
        """
        known = [entry.name for entry in fields(self)]
        if unknown := sorted(overrides.keys() - set(known)):
            raise InputError(f"there is no option {unknown[0]!r}; there are {', '.join(known)}")
        given: dict[str, Any] = {k: v for k, v in overrides.items() if v is not None}
        return replace(self, **given) if given else self


class GenerationOptions(TypedDict, total=False):
    """The fields of `GenerationConfig`, as keyword arguments."""

    max_new_tokens: int | None
    min_new_tokens: int | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    no_repeat_ngram_size: int | None
    logit_bias: Mapping[int, float] | None
    seed: int | None
    stop: str | Sequence[str] | None
    ignore_eos: bool | None
    logprobs: bool | None
    top_logprobs: int | None
    processors: Sequence[LogitsProcessor] | None
    sampler: Sampler | None


def option_names(flag: str) -> list[str]:
    """Names of the options whose description has a flag: "filters" or "recommended"."""
    return [
        entry.name for entry in fields(GenerationConfig) if getattr(entry.metadata["option"], flag)
    ]
