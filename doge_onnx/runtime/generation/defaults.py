"""What a bundle's own files say about generation.

Knows generation_config.json of transformers: what of it is carried out, and what is not. Does
not know the model or how options are carried out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from doge_onnx.bundle import Bundle
from doge_onnx.errors import BundleError, InputError
from doge_onnx.runtime.generation.config import FILTERS, GenerationConfig

GENERATION_CONFIG_NAME = "generation_config.json"

# Fields of the file that are options here, too.
_TAKEN_OVER = (
    "max_new_tokens",
    "min_new_tokens",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "no_repeat_ngram_size",
)
# Fields that do not change what is generated: bookkeeping, caches, what is returned, how fast.
# Those of beams count if there are beams, which `num_beams` tells.
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
# The value, beside null and false, with which a field changes nothing.
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
_KNOWN = {*_TAKEN_OVER, *_HARMLESS, "do_sample", "eos_token_id"}


def ignored_fields(config: Mapping[str, Any]) -> tuple[str, ...]:
    """What a generation_config.json asks for and this package does not do; sorted names.

    A field that nobody here knows is among them: what it would change cannot be told.
    """
    return tuple(
        sorted(
            name
            for name, value in config.items()
            if name not in _KNOWN
            and value is not None
            and value is not False
            and not (name in _NEUTRAL and value == _NEUTRAL[name])
        )
    )


@dataclass(frozen=True)
class Defaults:
    """What a bundle's own files say about generation.

    Attributes:
        eos_token_ids: Tokens that end a text.
        sample: Whether to sample rather than to take the most likely token.
        recommended: The options that generation_config.json gives.
        ignored: What it asks for and this package does not do; see `ignored_fields`.
    """

    eos_token_ids: frozenset[int] = frozenset()
    sample: bool = False
    recommended: GenerationConfig = field(default_factory=GenerationConfig)
    ignored: tuple[str, ...] = ()

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
        for token_id in eos_ids:
            if not isinstance(token_id, int) or isinstance(token_id, bool) or token_id < 0:
                raise BundleError(f"{origin}: eos_token_id cannot be {eos!r}")
        values = {name: config[name] for name in _TAKEN_OVER if config.get(name) is not None}
        # Files say 0 where they mean no limit, which as an argument is more likely a mistake.
        if values.get("top_k") == 0:
            del values["top_k"]
        try:
            recommended = GenerationConfig(**values)
        except InputError as error:
            raise BundleError(f"{origin / GENERATION_CONFIG_NAME}: {error}") from None
        return cls(
            frozenset(eos_ids),
            config.get("do_sample") is True,
            recommended,
            ignored_fields(config),
        )

    def resolve(self, given: GenerationConfig) -> GenerationConfig:
        """Complete what a caller gives with what the bundle recommends.

        Sampling happens if the caller gives a temperature above 0, or, without any
        temperature, if the caller gives a filter (top_k, top_p, min_p) or the bundle
        recommends it. The bundle's filters then apply where the caller gives none.

        Returns:
            Options whose temperature is a number, or None beside a sampler of the caller's own.
        """
        recommended = self.recommended
        if given.sampler is not None:
            unused = dict.fromkeys(("temperature", *FILTERS))
            return replace(recommended, **unused).merged(**given.given())
        sample = self.sample or any(getattr(given, name) is not None for name in FILTERS)
        if not sample:
            recommended = replace(recommended, temperature=0.0)
        elif recommended.temperature is None:
            recommended = replace(recommended, temperature=1.0)
        return recommended.merged(**given.given())
