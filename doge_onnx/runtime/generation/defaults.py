"""The defaults of generation that a bundle's files recommend.

Knows the generation_config.json of transformers: which of its fields this package implements and
which it ignores. Does not know the model or how options are implemented.
"""

from __future__ import annotations

from collections.abc import Mapping
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
    "assistant_lookbehind",
    "bos_token_id",
    "cache_config",
    "cache_implementation",
    "compile_config",
    "continuous_batching_config",
    "decoder_start_token_id",
    "disable_compile",
    "early_stopping",
    "is_assistant",
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
    "remove_invalid_values",
    "renormalize_logits",
    "return_dict_in_generate",
    "return_legacy_cache",
    "speculation_type",
    "target_lookbehind",
    "transformers_version",
    "use_cache",
    "use_mtp",
}
# For each field, the value that changes nothing; null and false change nothing in any field.
_NEUTRAL: dict[str, Any] = {
    "bad_words_ids": [],
    "begin_suppress_tokens": [],
    "diversity_penalty": 0,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1,
    "epsilon_cutoff": 0,
    "eta_cutoff": 0,
    "force_words_ids": [],
    "guidance_scale": 1,
    "max_length": 20,
    "min_length": 0,
    "num_beam_groups": 1,
    "num_beams": 1,
    "num_return_sequences": 1,
    "penalty_alpha": 0,
    "sequence_bias": [],
    "stop_strings": [],
    "suppress_tokens": [],
    "top_h": 1,
    "typical_p": 1,
}
_KNOWN = {*option_names("recommended"), *_HARMLESS, "do_sample", "eos_token_id"}


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
    """

    eos_token_ids: frozenset[int] = frozenset()
    sample: bool = False
    recommended: GenerationConfig = field(default_factory=GenerationConfig)
    ignored: tuple[str, ...] = ()

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
        names = option_names("recommended")
        values = {name: config[name] for name in names if config.get(name) is not None}
        # In these files 0 means no limit. From a caller, 0 is more likely a mistake.
        if values.get("top_k") == 0:
            del values["top_k"]
        try:
            recommended = GenerationConfig(**values)
        except InputError as error:
            raise BundleError(f"{origin / GENERATION_CONFIG_NAME}: {error}") from None
        return cls(
            frozenset(eos_ids),
            bool(sample),
            recommended,
            ignored_fields(config),
        )

    def resolve(self, given: GenerationConfig) -> GenerationConfig:
        """Complete the caller's options with what the bundle recommends.

        Tokens are sampled if the caller gives a temperature above 0. Without a temperature, they
        are sampled if the caller gives a filter (top_k, top_p or min_p) or the bundle recommends
        sampling. The bundle's filters then apply unless the caller gives them.

        Returns:
            Options whose temperature is a number, or None if the caller brings a sampler.
        """
        recommended = self.recommended
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
