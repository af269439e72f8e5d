"""What a generated text looks like to the caller: pieces, completions, timings.

Plain values that can be copied and pickled. Does not know how they come about (`sequence`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

FinishReason = Literal["eos", "stop", "length"]


@dataclass(frozen=True)
class Timings:
    """How long one run took, in seconds of model and sampling; a batch shares them.

    Attributes:
        prompt_tokens: Tokens of this sequence's prompt.
        prefill_seconds: From the prompt to the first token.
        generated_tokens: Tokens of this sequence that were generated.
        decode_seconds: From the first token to the last.
        cached_tokens: Tokens of the prompt that a state held already, so that they were not fed.
    """

    prompt_tokens: int
    prefill_seconds: float
    generated_tokens: int
    decode_seconds: float
    cached_tokens: int = 0

    @property
    def prefill_tokens_per_second(self) -> float | None:
        """Prompt tokens that were fed per second; None if nothing was generated."""
        if not self.prefill_seconds:
            return None
        return (self.prompt_tokens - self.cached_tokens) / self.prefill_seconds

    @property
    def decode_tokens_per_second(self) -> float | None:
        """Tokens per second after the first, which prefill made; None if there are none."""
        return (self.generated_tokens - 1) / self.decode_seconds if self.decode_seconds else None


@dataclass(frozen=True)
class TokenLogprob:
    """A token that might have come at some place of a text.

    Attributes:
        token_id: The token.
        logprob: Natural logarithm of its probability under the model's own distribution.
    """

    token_id: int
    logprob: float


@dataclass(frozen=True)
class Piece:
    """What one generated token adds to a text.

    Attributes:
        text: The text that became certain with the token; it may be empty.
        token_ids: Tokens generated since the last piece: one, or none if there was no
            room for any.
        logprobs: Their natural log-probabilities, or None if not asked for.
        top_logprobs: For each of them, the most likely tokens at its place, the most likely
            first; None if not asked for.
        finish_reason: Of the last piece: "eos", "stop" or "length"; otherwise None.
        timings: Of the last piece; otherwise None.
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...] | None = None
    top_logprobs: tuple[tuple[TokenLogprob, ...], ...] | None = None
    finish_reason: FinishReason | None = None
    timings: Timings | None = None


@dataclass(frozen=True)
class Completion:
    """A generated text.

    Attributes:
        text: Without special tokens, ending before the stop string if there was one.
        token_ids: All generated tokens, also the end-of-text token or those of the stop
            string, if that ended the text: prompt and these are what the model has seen.
        finish_reason: "eos" (an end-of-text token), "stop" (a stop string) or "length"
            (max_new_tokens or the end of the context).
        prompt_tokens: Number of tokens of the prompt.
        logprobs: Natural log-probability of each token under the model's own
            distribution, before any option changes it; None if not asked for.
        top_logprobs: For each token, the most likely tokens at its place under the same
            distribution, the most likely first; None if not asked for.
        timings: How long it took.
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    prompt_tokens: int
    logprobs: list[float] | None
    top_logprobs: list[tuple[TokenLogprob, ...]] | None
    timings: Timings

    @classmethod
    def join(cls, pieces: Sequence[Piece]) -> Completion:
        """The completion that all pieces of one sequence add up to."""
        last = pieces[-1]
        if last.finish_reason is None or last.timings is None:
            raise ValueError("the last piece of a completion is missing")
        return cls(
            text="".join(piece.text for piece in pieces),
            token_ids=[i for piece in pieces for i in piece.token_ids],
            finish_reason=last.finish_reason,
            prompt_tokens=last.timings.prompt_tokens,
            logprobs=None
            if last.logprobs is None
            else [value for piece in pieces for value in piece.logprobs or ()],
            top_logprobs=None
            if last.top_logprobs is None
            else [tokens for piece in pieces for tokens in piece.top_logprobs or ()],
            timings=last.timings,
        )
