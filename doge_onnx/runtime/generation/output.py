"""The results of generation: pieces, completions and timings.

Knows only plain values that can be copied and pickled. Does not know how they are made
(`sequence`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

FinishReason = Literal["eos", "stop", "length"]


@dataclass(frozen=True)
class Timings:
    """How long a generation took: wall time in seconds, which all sequences of a batch share.

    Counts the model and the choice of tokens, but not the time that the caller spends between two
    pieces.

    Attributes:
        prompt_tokens: Tokens of this sequence's prompt.
        prefill_seconds: From the prompt to the first token.
        generated_tokens: Tokens that were generated for this sequence.
        decode_seconds: From the first token to the last.
        cached_tokens: Tokens of the prompt that the prefix cache held, so that they were not fed.
    """

    prompt_tokens: int
    prefill_seconds: float
    generated_tokens: int
    decode_seconds: float
    cached_tokens: int = 0

    @property
    def prefill_tokens_per_second(self) -> float | None:
        """Prompt tokens fed per second; None if nothing was generated."""
        if not self.prefill_seconds:
            return None
        return (self.prompt_tokens - self.cached_tokens) / self.prefill_seconds

    @property
    def decode_tokens_per_second(self) -> float | None:
        """Tokens per second after the first, which the prefill gives; None if there are none."""
        return (self.generated_tokens - 1) / self.decode_seconds if self.decode_seconds else None


@dataclass(frozen=True)
class TokenLogprob:
    """A candidate for one position of a text.

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
        text: The text that is certain now; may be empty while a character or a possible stop
            string is incomplete.
        token_ids: Tokens generated since the previous piece: one, or none if `max_new_tokens` is
            0 or the prompt fills the context.
        logprobs: Natural log-probability of each of these tokens; None if not asked for.
        top_logprobs: For each of these tokens, the most likely tokens at its position, most likely
            first; None if not asked for.
        finish_reason: "eos", "stop" or "length" in the last piece, None in all others.
        timings: Set in the last piece, None in all others.
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
        text: The text, without special tokens. A stop string that ended it is left out.
        token_ids: All generated tokens, including the end-of-text token, the stop token, or the
            tokens of the stop string, that ended the text.
        finish_reason: "eos" (an end-of-text token), "stop" (a stop string or a stop token) or
            "length" (a limit: max_new_tokens, max_length, max_time or the end of the context).
        prompt_tokens: Number of tokens of the prompt.
        logprobs: Natural log-probability of each token under the model's own distribution, before
            any option changes it; None if not asked for.
        top_logprobs: For each token, the most likely tokens at its position under the same
            distribution, most likely first; None if not asked for.
        timings: How long the generation took.
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
        """Join all pieces of one sequence, in order.

        Raises:
            ValueError: The last piece is missing.
        """
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
