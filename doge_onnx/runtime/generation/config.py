"""The options of generation, as one immutable object.

Knows the valid values and the meaning of each option; the command line and the documentation take
both from here. Does not know what a bundle recommends (`defaults`) or how an option is implemented
(`processors`, `sampling`, `sequence`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, TypedDict, Unpack, cast

from doge_onnx.errors import InputError
from doge_onnx.runtime.generation.option import (
    LogitBias,
    Option,
    decay,
    flag,
    is_bias,
    is_stop,
    is_summand,
    one_or_more_tokens,
    option,
    real,
    sequence_biases,
    token_lists,
    tokens,
    whole,
)

if TYPE_CHECKING:
    from doge_onnx.runtime.generation.processors import LogitsProcessor
    from doge_onnx.runtime.generation.sampling import Sampler


@dataclass(frozen=True, repr=False)
class GenerationConfig:
    """The options of generation; immutable.

    An option that is None follows the bundle's generation_config.json, or else its default.
    Tokens are sampled if the temperature is above 0, or if there is no temperature but one of
    the options that say "sample from". Names and meanings are those of Hugging Face transformers,
    and for the presence and frequency penalties those of OpenAI's API.

    Raises:
        InputError: An option is out of its range, or two options exclude each other.
    """

    max_new_tokens: int | None = field(
        default=None,
        metadata=whole(
            0,
            "Most tokens to generate. The end of the context ends a text before that.",
            "up to the end of the context",
            recommended=True,
        ),
    )
    max_length: int | None = field(
        default=None,
        metadata=whole(
            1,
            "Most tokens of prompt and text together. max_new_tokens takes its place.",
            "the context length",
            recommended=True,
        ),
    )
    min_new_tokens: int | None = field(
        default=None,
        metadata=whole(
            0, "Choose no end-of-text token before this many tokens.", "none", recommended=True
        ),
    )
    min_length: int | None = field(
        default=None,
        metadata=whole(
            0,
            "Choose no end-of-text token before prompt and text have this many tokens. "
            "min_new_tokens takes its place.",
            "none",
            kind=None,
            recommended=True,
        ),
    )
    max_time: float | None = field(
        default=None,
        metadata=real(
            "a finite number, 0 or more",
            lambda x: x >= 0,
            "End a text with the first token after this many seconds of computation.",
            "no limit",
            "S",
            recommended=True,
        ),
    )
    temperature: float | None = field(
        default=None,
        metadata=real(
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
        metadata=whole(
            0,
            "Sample from the K most likely tokens; 0 is no limit.",
            "no limit",
            "K",
            filters=True,
            recommended=True,
        ),
    )
    top_p: float | None = field(
        default=None,
        metadata=real(
            "between 0 and 1",
            lambda x: 0 <= x <= 1,
            "Sample from the most likely tokens that have probability P together, 0 to 1.",
            "all",
            "P",
            filters=True,
            recommended=True,
        ),
    )
    min_p: float | None = field(
        default=None,
        metadata=real(
            "between 0 and 1",
            lambda x: 0 <= x <= 1,
            "Sample from tokens at least P times as likely as the best one, 0 to 1.",
            "all",
            "P",
            filters=True,
            recommended=True,
        ),
    )
    typical_p: float | None = field(
        default=None,
        metadata=real(
            "above 0 and at most 1",
            lambda x: 0 < x <= 1,
            "Sample from the tokens that are about as surprising as expected, until they have "
            "probability P together.",
            "all",
            "P",
            filters=True,
            recommended=True,
        ),
    )
    top_h: float | None = field(
        default=None,
        metadata=real(
            "above 0 and at most 1",
            lambda x: 0 < x <= 1,
            "Sample from the most likely of 100 tokens that have H times their entropy together.",
            "all",
            "H",
            kind=None,
            filters=True,
            recommended=True,
        ),
    )
    epsilon_cutoff: float | None = field(
        default=None,
        metadata=real(
            "0 or more and below 1",
            lambda x: 0 <= x < 1,
            "Sample from tokens that are no less likely than this.",
            "all",
            "P",
            kind=None,
            filters=True,
            recommended=True,
        ),
    )
    eta_cutoff: float | None = field(
        default=None,
        metadata=real(
            "0 or more and below 1",
            lambda x: 0 <= x < 1,
            "Sample from tokens that are no less likely than this, or than its square root by "
            "exp(-entropy), if that is less.",
            "all",
            "P",
            kind=None,
            filters=True,
            recommended=True,
        ),
    )
    repetition_penalty: float | None = field(
        default=None,
        metadata=real(
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
        metadata=real(
            "between -1e30 and 1e30",
            is_summand,
            "Subtracted from the logits of tokens that were generated before.",
            "none",
            "X",
        ),
    )
    frequency_penalty: float | None = field(
        default=None,
        metadata=real(
            "between -1e30 and 1e30",
            is_summand,
            "Subtracted from the logit of a token once for each time that it was generated before.",
            "none",
            "X",
        ),
    )
    encoder_repetition_penalty: float | None = field(
        default=None,
        metadata=real(
            "between 1e-9 and 1e9",
            lambda x: 1e-9 <= x <= 1e9,
            "Above 1 makes tokens of the prompt more likely.",
            "none",
            "R",
            kind=None,
            recommended=True,
        ),
    )
    no_repeat_ngram_size: int | None = field(
        default=None,
        metadata=whole(
            0,
            "Let no N tokens follow each other twice, in prompt and text together.",
            "no limit",
            recommended=True,
        ),
    )
    encoder_no_repeat_ngram_size: int | None = field(
        default=None,
        metadata=whole(
            0,
            "Let no N tokens follow each other that do so in the prompt.",
            "no limit",
            kind=None,
            recommended=True,
        ),
    )
    bad_words_ids: Sequence[Sequence[int]] | None = field(
        default=None,
        metadata=token_lists(
            "Sequences of tokens that are never written. An end-of-text token alone is none.",
            "none",
            recommended=True,
        ),
    )
    suppress_tokens: Sequence[int] | None = field(
        default=None,
        metadata=tokens(
            "Never choose this token: an id, or the text of one token.",
            "none",
            kind=str,
            several=True,
            metavar="TOKEN",
            recommended=True,
        ),
    )
    begin_suppress_tokens: Sequence[int] | None = field(
        default=None,
        metadata=tokens("Do not begin with one of these tokens.", "none", recommended=True),
    )
    logit_bias: Mapping[int, float] | None = field(
        default=None,
        metadata=option(
            "a mapping of token ids to numbers between -1e30 and 1e30",
            is_bias,
            LogitBias,
            "Add BIAS to the logit of the token ID.",
            "none",
            kind=str,
            several=True,
            metavar="ID=BIAS",
            token_ids=iter,
        ),
    )
    sequence_bias: (
        Mapping[tuple[int, ...], float] | Sequence[tuple[Sequence[int], float]] | None
    ) = field(
        default=None,
        metadata=sequence_biases(
            "For each sequence of tokens, what is added to the logit of its last token where the "
            "others have just been written.",
            "none",
            recommended=True,
        ),
    )
    forced_bos_token_id: int | Sequence[int] | None = field(
        default=None,
        metadata=one_or_more_tokens(
            "Begin with this token, if the prompt is a single one.", "none", recommended=True
        ),
    )
    forced_eos_token_id: int | Sequence[int] | None = field(
        default=None,
        metadata=one_or_more_tokens(
            "Make the last token before the limit of the length this one.",
            "none",
            recommended=True,
        ),
    )
    exponential_decay_length_penalty: tuple[int, float] | None = field(
        default=None,
        metadata=decay(
            "(N, R): from the token N on, multiply the logits of end-of-text tokens by a power "
            "of R that grows with each token, upwards if R is above 1.",
            "none",
            recommended=True,
        ),
    )
    remove_invalid_values: bool | None = field(
        default=None,
        metadata=flag(
            "Replace logits that are infinite or not a number.", kind=None, recommended=True
        ),
    )
    seed: int | None = field(
        default=None,
        metadata=whole(0, "The same seed gives the same text.", "another text each time"),
    )
    stop: str | Sequence[str] | None = field(
        default=None,
        metadata=option(
            "a string or several, none of them empty",
            is_stop,
            lambda value: (value,) if isinstance(value, str) else tuple(value),
            "End before this text appears, special tokens included.",
            "none",
            kind=str,
            several=True,
            metavar="TEXT",
            recommended=True,
        ),
    )
    stop_token_ids: int | Sequence[int] | None = field(
        default=None,
        metadata=one_or_more_tokens(
            "End with this token, which is not part of the text: an id, or the text of one token "
            "such as '<|end_of_text|>'.",
            "none besides end-of-text tokens",
            kind=str,
            several=True,
            metavar="TOKEN",
        ),
    )
    ignore_eos: bool | None = field(
        default=None, metadata=flag("Go on behind an end-of-text token of the model.")
    )
    logprobs: bool | None = field(
        default=None,
        metadata=flag(
            "Report the natural logarithm of each token's probability, before options change it."
        ),
    )
    top_logprobs: int | None = field(
        default=None,
        metadata=whole(
            0,
            "Report the N most likely tokens beside each token, and all log-probabilities.",
            "none",
        ),
    )
    processors: Sequence[LogitsProcessor] | None = field(
        default=None,
        metadata=option(
            "a list of logits processors, which are callable",
            lambda value: isinstance(value, Sequence) and all(map(callable, value)),
            tuple,
            "Logits processors of your own, called in this order after those of the other options.",
            "none",
        ),
    )
    sampler: Sampler | None = field(
        default=None,
        metadata=option(
            "callable",
            callable,
            lambda value: value,
            'Chooses tokens in place of temperature and the options that say "sample from".',
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
        for name in ("forced_bos_token_id", "forced_eos_token_id"):
            forced = set(getattr(self, name) or ())
            if forced and forced <= set(self.suppress_tokens or ()):
                raise InputError(f"suppress_tokens rules out all tokens of {name}")

    def __repr__(self) -> str:
        given = (f"{name}={value!r}" for name, value in self.given().items())
        return f"{type(self).__name__}({', '.join(given)})"

    def given(self) -> GenerationOptions:
        """The options that are not None."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return cast(GenerationOptions, {k: v for k, v in values.items() if v is not None})

    def token_ids(self) -> Iterator[tuple[str, int]]:
        """The token ids in all options, each with the name of its option."""
        for entry in fields(self):
            value = getattr(self, entry.name)
            option: Option = entry.metadata["option"]
            if value is not None and option.token_ids is not None:
                yield from ((entry.name, token_id) for token_id in option.token_ids(value))

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
    max_length: int | None
    min_new_tokens: int | None
    min_length: int | None
    max_time: float | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    typical_p: float | None
    top_h: float | None
    epsilon_cutoff: float | None
    eta_cutoff: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    encoder_repetition_penalty: float | None
    no_repeat_ngram_size: int | None
    encoder_no_repeat_ngram_size: int | None
    bad_words_ids: Sequence[Sequence[int]] | None
    suppress_tokens: Sequence[int] | None
    begin_suppress_tokens: Sequence[int] | None
    logit_bias: Mapping[int, float] | None
    sequence_bias: Mapping[tuple[int, ...], float] | Sequence[tuple[Sequence[int], float]] | None
    forced_bos_token_id: int | Sequence[int] | None
    forced_eos_token_id: int | Sequence[int] | None
    exponential_decay_length_penalty: tuple[int, float] | None
    remove_invalid_values: bool | None
    seed: int | None
    stop: str | Sequence[str] | None
    stop_token_ids: int | Sequence[int] | None
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
