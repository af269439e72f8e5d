"""Generation options: what a caller gives, completed by what the bundle recommends.

Knows generation_config.json and the valid range of every option. Does not know the
model or how options are carried out.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from doge_onnx.bundle import Bundle
from doge_onnx.errors import BundleError, InputError

GENERATION_CONFIG_NAME = "generation_config.json"


def _whole(value: Any, least: int) -> bool:
    # The abstract classes cover NumPy's numbers, and a bool is a number only by history.
    return isinstance(value, numbers.Integral) and not _is_bool(value) and int(value) >= least


def _real(value: Any, accept: Callable[[float], bool]) -> bool:
    if not isinstance(value, numbers.Real) or _is_bool(value):
        return False
    return math.isfinite(value) and accept(float(value))


def _is_bool(value: object) -> bool:
    return isinstance(value, bool)


# What an option may be: a test, and the words for it.
_RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "max_new_tokens": (lambda v: _whole(v, 0), "a whole number, 0 or more"),
    "temperature": (lambda v: _real(v, lambda x: x >= 0), "a finite number, 0 or more"),
    "top_k": (lambda v: _whole(v, 1), "a whole number, 1 or more"),
    "top_p": (lambda v: _real(v, lambda x: 0 < x <= 1), "above 0 and at most 1"),
    "min_p": (lambda v: _real(v, lambda x: 0 <= x <= 1), "between 0 and 1"),
    "repetition_penalty": (lambda v: _real(v, lambda x: x > 0), "a finite number above 0"),
    "seed": (lambda v: _whole(v, 0), "a whole number, 0 or more"),
}
_IN_FILE = _RANGES.keys() - {"seed"}


@dataclass(frozen=True)
class Options:
    """How to choose tokens and when to end, with nothing left open.

    Attributes:
        max_new_tokens: Most tokens to generate; None is up to the end of the context.
        temperature: 0 is greedy.
        top_k: None is off, as for the other filters.
        repetition_penalty: None is off.
        seed: None is a fresh one for every run.
        stop: Strings that end a text.
        logprobs: Whether to report log-probabilities.
    """

    max_new_tokens: int | None
    temperature: float
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    seed: int | None
    stop: tuple[str, ...]
    logprobs: bool


@dataclass(frozen=True)
class Defaults:
    """What a bundle's own files say about generation.

    Attributes:
        eos_token_ids: Tokens that end a text.
        sample: Whether to sample rather than to take the most likely token.
        values: Options that the files give, by name.
    """

    eos_token_ids: frozenset[int]
    sample: bool
    values: dict[str, Any]

    @classmethod
    def read(cls, bundle: Bundle) -> Defaults:
        """Read generation_config.json, and for the end-of-text ids config.json after it.

        Raises:
            BundleError: One of the files holds an option that makes no sense.
        """
        generation = bundle.read_json(GENERATION_CONFIG_NAME)
        return cls.parse(generation, bundle.read_json("config.json"), bundle.path)

    @classmethod
    def parse(cls, config: dict[str, Any], model_config: dict[str, Any], origin: Path) -> Defaults:
        """Take them from the contents of both files; `origin` is their directory.

        Raises:
            BundleError: An option makes no sense.
        """
        eos = config.get("eos_token_id")
        if eos is None:
            eos = model_config.get("eos_token_id")
        eos_ids = [] if eos is None else eos if isinstance(eos, list) else [eos]
        if not all(_whole(token_id, 0) for token_id in eos_ids):
            raise BundleError(f"{origin}: eos_token_id cannot be {eos!r}")
        values = {name: config[name] for name in _IN_FILE if config.get(name) is not None}
        # Files say 0 where they mean no limit, which as an argument is more likely a mistake.
        if values.get("top_k") == 0:
            del values["top_k"]
        if values.get("repetition_penalty") == 1:
            del values["repetition_penalty"]
        for name, value in values.items():
            if problem := _problem(name, value):
                raise BundleError(f"{origin / GENERATION_CONFIG_NAME}: {problem}")
        return cls(frozenset(eos_ids), config.get("do_sample") is True, values)

    def resolve(
        self,
        *,
        max_new_tokens: int | None,
        temperature: float | None,
        top_k: int | None,
        top_p: float | None,
        min_p: float | None,
        repetition_penalty: float | None,
        seed: int | None,
        stop: str | Sequence[str] | None,
        logprobs: bool,
    ) -> Options:
        """Check a caller's options and fill in those that are None.

        Sampling happens if the caller gives a temperature above 0, or, without any
        temperature, if the caller gives a filter (top_k, top_p, min_p) or the bundle
        recommends it. The bundle's filters then apply where the caller gives none.

        Raises:
            InputError: An option is out of its range.
        """
        given = {
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "min_p": min_p,
            "repetition_penalty": repetition_penalty,
            "seed": seed,
        }
        for name, value in given.items():
            if value is not None and (problem := _problem(name, value)):
                raise InputError(problem)
        chosen = self.values | {name: value for name, value in given.items() if value is not None}
        filtered = not (top_k is None and top_p is None and min_p is None)
        if temperature is None:
            sample = self.sample or filtered
            temperature = chosen.get("temperature", 1.0) if sample else 0.0
        return Options(
            max_new_tokens=chosen.get("max_new_tokens"),
            temperature=float(temperature),
            top_k=chosen.get("top_k"),
            top_p=chosen.get("top_p"),
            min_p=chosen.get("min_p"),
            repetition_penalty=chosen.get("repetition_penalty"),
            seed=seed,
            stop=_stop_strings(stop),
            logprobs=logprobs,
        )


def _problem(name: str, value: Any) -> str | None:
    valid, words = _RANGES[name]
    return None if valid(value) else f"{name} must be {words}, not {value!r}"


def _stop_strings(stop: str | Sequence[str] | None) -> tuple[str, ...]:
    if stop is None:
        return ()
    if not isinstance(stop, Iterable):
        raise InputError(f"stop must be a string or several, not {stop!r}")
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    for entry in stops:
        if not isinstance(entry, str) or not entry:
            raise InputError(f"stop must be made of strings that are not empty, not {entry!r}")
    return stops
