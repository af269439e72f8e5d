"""The defaults of generation that a bundle's files recommend.

Knows the generation_config.json of transformers: which of its fields this package implements and
which it ignores. Does not know the model or how options are implemented.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from doge_onnx.bundle import Bundle
from doge_onnx.errors import BundleError, InputError
from doge_onnx.runtime.generation.config import GenerationConfig, option_names
from doge_onnx.runtime.generation.token_ids import split_by_vocabulary

GENERATION_CONFIG_NAME = "generation_config.json"
# Where the model is not known.
_LARGE_VOCABULARY = 2**31

# Fields that do not change which tokens are generated: bookkeeping, caches, speed, what is
# returned. Those about beams matter only with several beams, which `num_beams` reports.
_HARMLESS = {
    "_commit_hash",
    "_from_model_config",
    "assistant_confidence_threshold",
    "assistant_early_exit",
    "assistant_ensemble_weight",
    "assistant_lookbehind",
    "bos_token_id",
    "cache_config",
    "cache_implementation",
    "compile_config",
    "continuous_batching_config",
    "decoder_start_token_id",
    "disable_compile",
    "early_stopping",
    "length_penalty",
    "low_memory",
    "max_cache_len",
    "max_matching_ngram_size",
    "num_assistant_tokens",
    "num_assistant_tokens_schedule",
    "output_attentions",
    "output_hidden_states",
    "output_logits",
    "output_scores",
    "pad_token_id",
    "prefill_chunk_size",
    "prompt_lookup_num_tokens",
    # Does not change which token is the most likely, or how likely each is to be drawn.
    "renormalize_logits",
    "return_dict_in_generate",
    "return_legacy_cache",
    "speculation_type",
    "target_lookbehind",
    "transformers_version",
    "use_cache",
    "use_mtp",
}
# For each field that is not done, the value that changes nothing. Null and false never do.
_NEUTRAL: dict[str, Any] = {
    "constraints": [],
    "diversity_penalty": 0,
    "force_words_ids": [],
    "forced_decoder_ids": [],
    "generation_kwargs": {},
    "guidance_scale": 1,
    "num_beam_groups": 1,
    "num_beams": 1,
    "num_return_sequences": 1,
    "penalty_alpha": 0,
}
# Fields that have another name as an option.
_RENAMED = {"stop_strings": "stop"}
_OPTIONS = {name: name for name in option_names("recommended") if name != "stop"} | _RENAMED
_KNOWN = {*_OPTIONS, *_HARMLESS, "do_sample", "eos_token_id"}
# Fields that matter only where tokens are sampled.
_OF_SAMPLING = {"temperature", *option_names("filters")}
# Lists of tokens that are never chosen. Files have -1 in them, or ids beyond the vocabulary.
_RULED_OUT = {"begin_suppress_tokens", "suppress_tokens"}
# Values that `GenerationConfig` refuses and transformers runs with, as if they were not there.
_WITHOUT_EFFECT: dict[str, Callable[[Any], bool]] = {
    "encoder_no_repeat_ngram_size": lambda value: value <= 0,
    "epsilon_cutoff": lambda value: not 0 < value < 1,
    "eta_cutoff": lambda value: not 0 < value < 1,
    "min_length": lambda value: value <= 0,
    "min_new_tokens": lambda value: value <= 0,
    "no_repeat_ngram_size": lambda value: value <= 0,
    "stop_strings": lambda value: value == "",
    "top_p": lambda value: value >= 1,
    "typical_p": lambda value: value >= 1,
}
# What transformers samples from where its file has no `top_k`. Releases before 5 leave it out of
# the files that they write, because it is their default; later ones fill it in.
_TOP_K = 50
# The `max_length` that releases of transformers before 5 fill in; they do not take it for a limit.
_MAX_LENGTH_FILLED_IN = 20


def ignored_fields(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the fields that ask for something this package does not implement, sorted.

    Fields that this package does not know are among them, because they could change anything.

    Args:
        config: The content of a generation_config.json.
    """
    return tuple(
        sorted(
            name
            for name, value in config.items()
            if name not in _KNOWN
            and value is not None
            and value is not False
            and not (name in _NEUTRAL and value is not True and value == _NEUTRAL[name])
        )
    )


@dataclass(frozen=True)
class Defaults:
    """The defaults of generation that a bundle's files recommend.

    Attributes:
        eos_token_ids: Tokens that end a text.
        sample: Whether to sample rather than take the most likely token.
        recommended: The options that generation_config.json sets.
        ignored: Fields that this package does not implement; see `ignored_fields`.
        without_effect: Fields and values that make no sense and change nothing, such as
            "top_k: -1" where nothing is sampled.
    """

    eos_token_ids: frozenset[int] = frozenset()
    sample: bool = False
    recommended: GenerationConfig = field(default_factory=GenerationConfig)
    ignored: tuple[str, ...] = ()
    without_effect: tuple[str, ...] = ()

    @classmethod
    def read(cls, bundle: Bundle) -> Defaults:
        """Read generation_config.json; end-of-text ids that it lacks come from config.json.

        Raises:
            BundleError: An option in one of the files has an invalid value.
        """
        generation = bundle.read_json(GENERATION_CONFIG_NAME)
        vocab_size = bundle.manifest.vocab_size
        return cls.parse(generation, bundle.read_json("config.json"), bundle.path, vocab_size)

    @classmethod
    def parse(
        cls,
        config: dict[str, Any],
        model_config: dict[str, Any],
        origin: Path,
        vocab_size: int = _LARGE_VOCABULARY,
    ) -> Defaults:
        """Read the defaults from the contents of both files.

        Args:
            config: Content of generation_config.json.
            model_config: Content of config.json.
            origin: Directory of the two files, for error messages.
            vocab_size: Of the model. Tokens that it lacks end no text.

        Raises:
            BundleError: An option has an invalid value.
        """
        eos = config.get("eos_token_id")
        if eos is None:
            eos = model_config.get("eos_token_id")
        try:
            eos_ids, _ = split_by_vocabulary(eos, vocab_size)
        except ValueError as error:
            raise BundleError(f"{origin}: eos_token_id: {error}") from None
        sample = config.get("do_sample")
        if not isinstance(sample, bool | None):
            raise BundleError(
                f"{origin / GENERATION_CONFIG_NAME}: do_sample must be true or false, not "
                f"{sample!r}"
            )
        try:
            recommended, without_effect = _recommended(config, bool(sample), vocab_size)
        except InputError as error:
            raise BundleError(f"{origin / GENERATION_CONFIG_NAME}: {error}") from None
        return cls(
            frozenset(eos_ids),
            bool(sample),
            recommended,
            ignored_fields(config),
            without_effect,
        )

    def resolve(self, given: GenerationConfig) -> GenerationConfig:
        """Complete the caller's options with what the bundle recommends.

        Tokens are sampled if the caller gives a temperature above 0. Without a temperature, they
        are sampled if the caller gives a filter, such as top_k, or the bundle recommends sampling.
        The bundle's filters then apply unless the caller gives them. A caller's limit of the whole
        length replaces the bundle's limit of new tokens.

        Returns:
            Options whose temperature is a number, or None if the caller brings a sampler.
        """
        recommended = self.recommended
        for whole, new in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
            if getattr(given, whole) is not None:
                recommended = replace(recommended, **{new: None})
        if given.sampler is not None:
            unused = dict.fromkeys(("temperature", *option_names("filters")))
            return replace(recommended, **unused).merged(**given.given())
        sample = self.sample or any(
            getattr(given, name) is not None for name in option_names("filters")
        )
        if not sample:
            recommended = replace(recommended, temperature=0.0)
        elif recommended.temperature is None:
            recommended = replace(recommended, temperature=1.0)
        return recommended.merged(**given.given())


def _recommended(
    config: Mapping[str, Any], sample: bool, vocab_size: int
) -> tuple[GenerationConfig, tuple[str, ...]]:
    """The options that a generation_config.json sets, and what in it has no effect.

    Args:
        config: Its content.
        sample: Whether it asks for sampling.
        vocab_size: Of the model.

    Raises:
        InputError: A value that has an effect is invalid.
    """
    values: dict[str, Any] = {}
    without_effect: list[str] = []
    for name, option in _OPTIONS.items():
        value: Any = config.get(name)
        if value is None or value is False:
            continue
        if name in _RULED_OUT and isinstance(value, list):
            without_effect += [f"{name}: {i}" for i in value if _is_outside(i, vocab_size)]
            value = tuple(i for i in value if not _is_outside(i, vocab_size))
        try:
            replace(GenerationConfig(), **{option: value})
        except InputError:
            if not _changes_nothing(name, value, sample):
                raise
            without_effect.append(f"{name}: {json.dumps(value)}")
            continue
        values[option] = value
    if values.get("max_length") == _MAX_LENGTH_FILLED_IN and _before_5(config):
        del values["max_length"]
    # A file without any of these leaves sampling to the caller. Null is what releases before 5
    # write for "no limit".
    if "top_k" not in config and (sample or values.keys() & _OF_SAMPLING):
        values["top_k"] = _TOP_K
    recommended = GenerationConfig(**values)
    for name, token_id in recommended.token_ids():
        if not _is_outside(token_id, vocab_size):
            continue
        if name in ("forced_bos_token_id", "forced_eos_token_id"):
            raise InputError(f"{name} is {token_id}, and the vocabulary has {vocab_size} tokens")
        without_effect.append(f"{name}: {token_id}")
    return recommended, tuple(without_effect)


def _is_outside(token_id: object, vocab_size: int) -> bool:
    """Whether a whole number is no token id of the vocabulary."""
    if not isinstance(token_id, int) or isinstance(token_id, bool):
        return False
    return not 0 <= token_id < vocab_size


def _changes_nothing(name: str, value: Any, sample: bool) -> bool:
    if name in _OF_SAMPLING and not sample:
        return True
    try:
        return name in _WITHOUT_EFFECT and _WITHOUT_EFFECT[name](value)
    # Not a number, for example.
    except TypeError:
        return False


def _before_5(config: Mapping[str, Any]) -> bool:
    major = str(config.get("transformers_version", "")).partition(".")[0]
    return major.isdecimal() and int(major) < 5
