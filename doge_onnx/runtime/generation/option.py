"""What an option of generation is: its valid values, how it is kept, and what describes it.

Knows kinds of values, such as whole numbers, biases and lists of token ids. Does not know which
options there are (`config`).
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

# Added to logits, which are float32: sums of larger numbers would overflow.
LARGEST_SUMMAND = 1e30


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
        recommended: Whether generation_config.json has it, under the same name but for `stop`.
        token_ids: Returns the token ids in a stored value; None if the option has none.
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
    token_ids: Callable[[Any], Iterable[int]] | None = None


def option(*arguments: Any, **keywords: Any) -> dict[str, Option]:
    """The metadata of a field, from the attributes of an `Option`."""
    return {"option": Option(*arguments, **keywords)}


def whole(
    least: int, help: str, default: str, metavar: str = "N", kind: type | None = int, **more: bool
) -> dict[str, Option]:
    """A whole number, `least` or more."""
    return option(
        f"a whole number, {least} or more",
        lambda value: _is_whole(value) and value >= least,
        int,
        help,
        default,
        kind=kind,
        metavar=metavar,
        **more,
    )


def real(
    words: str,
    accept: Callable[[float], bool],
    help: str,
    default: str,
    metavar: str,
    kind: type | None = float,
    **more: bool,
) -> dict[str, Option]:
    """A finite number that `accept` accepts."""
    return option(
        words,
        lambda value: _is_real(value) and accept(float(value)),
        float,
        help,
        default,
        kind=kind,
        metavar=metavar,
        **more,
    )


def flag(help: str, kind: type | None = bool, **more: bool) -> dict[str, Option]:
    """True or False."""
    return option("True or False", _is_bool, bool, help, "no", kind=kind, **more)


def tokens(help: str, default: str, **more: Any) -> dict[str, Option]:
    """A list of token ids."""
    return option(
        "a list of token ids, which are whole numbers, 0 or more",
        _is_tokens,
        _ids,
        help,
        default,
        token_ids=iter,
        **more,
    )


def one_or_more_tokens(help: str, default: str, **more: Any) -> dict[str, Option]:
    """A token id, or a list of them."""
    return option(
        "a token id or several, which are whole numbers, 0 or more",
        lambda value: _is_token(value) or _is_tokens(value),
        lambda value: _ids([value] if _is_token(value) else value),
        help,
        default,
        token_ids=iter,
        **more,
    )


def token_lists(help: str, default: str, **more: Any) -> dict[str, Option]:
    """A list of lists of token ids."""
    return option(
        "a list of lists of token ids, none of them empty",
        lambda value: (
            _is_list(value) and all(_is_tokens(entry) and len(entry) > 0 for entry in value)
        ),
        lambda value: tuple(map(_ids, value)),
        help,
        default,
        token_ids=lambda value: (token_id for entry in value for token_id in entry),
        **more,
    )


def sequence_biases(help: str, default: str, **more: Any) -> dict[str, Option]:
    """Biases of token sequences: a mapping, or the list of pairs that JSON has in its place."""
    return option(
        "a mapping of token ids (a tuple of them) to numbers below 1e30, or a list of such pairs",
        _is_sequence_biases,
        # A sequence that is there twice has its last bias.
        lambda value: tuple({_ids(key): float(bias) for key, bias in _pairs(value)}.items()),
        help,
        default,
        token_ids=lambda value: (token_id for key, _ in value for token_id in key),
        **more,
    )


def decay(help: str, default: str, **more: Any) -> dict[str, Option]:
    """A pair of a number of tokens and a factor."""
    return option(
        "a pair of a whole number and a number above 0",
        lambda value: (
            _is_list(value)
            and len(value) == 2
            and _is_whole(value[0])
            and _is_real(value[1])
            and value[1] > 0
        ),
        lambda value: (int(value[0]), float(value[1])),
        help,
        default,
        **more,
    )


def is_stop(value: Any) -> bool:
    """Whether a value is a string or several, none of them empty."""
    entries = [value] if isinstance(value, str) else value
    return isinstance(entries, Sequence) and all(isinstance(e, str) and e for e in entries)


def is_bias(value: Any) -> bool:
    """Whether a value maps token ids to finite numbers that a logit has room for."""
    return isinstance(value, Mapping) and all(
        _is_token(token_id) and is_summand(bias) for token_id, bias in value.items()
    )


def is_summand(value: object) -> bool:
    """Whether a value is a number that can be added to a logit."""
    return _is_real(value) and abs(float(cast(float, value))) <= LARGEST_SUMMAND


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


def _is_bool(value: object) -> bool:
    return isinstance(value, bool)


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _is_token(value: Any) -> bool:
    return _is_whole(value) and bool(value >= 0)


def _is_tokens(value: Any) -> bool:
    return _is_list(value) and all(map(_is_token, value))


def _ids(value: Iterable[Any]) -> tuple[int, ...]:
    return tuple(map(int, value))


def _pairs(value: Any) -> Iterable[Any]:
    return value.items() if isinstance(value, Mapping) else value


def _is_sequence_biases(value: Any) -> bool:
    if not isinstance(value, Mapping) and not _is_list(value):
        return False
    return all(
        _is_list(pair)
        and len(pair) == 2
        and _is_tokens(pair[0])
        and len(pair[0]) > 0
        # Minus infinity rules the last token out.
        and (pair[1] == -math.inf or is_summand(pair[1]))
        for pair in _pairs(value)
    )
