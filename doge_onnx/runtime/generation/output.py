"""What a generated sequence looks like to the caller: pieces, completions, timings.

Knows when a sequence ends (end-of-text token, stop string, length) and joins tokens with
their text. Does not know the model or how tokens are chosen.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Literal, Self

from doge_onnx.runtime.engine.runner import Runner
from doge_onnx.runtime.generation.loop import Memory, Row, generate_steps
from doge_onnx.runtime.text.tokenizer import StopFinder, TextStream

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


class Piece(str):
    """The text that one generated token made certain; it may be empty.

    Attributes:
        token_ids: Tokens generated since the last piece: one, or none if there was no
            room for any.
        logprobs: Their natural log-probabilities, or None if not asked for.
        finish_reason: Of the last piece: "eos", "stop" or "length"; otherwise None.
        timings: Of the last piece; otherwise None.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...] | None
    finish_reason: FinishReason | None
    timings: Timings | None

    def __new__(
        cls,
        text: str,
        token_ids: tuple[int, ...],
        logprobs: tuple[float, ...] | None = None,
        finish_reason: FinishReason | None = None,
        timings: Timings | None = None,
    ) -> Self:
        """A string with what is known of its tokens."""
        piece = super().__new__(cls, text)
        piece.token_ids = token_ids
        piece.logprobs = logprobs
        piece.finish_reason = finish_reason
        piece.timings = timings
        return piece


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
        timings: How long it took.
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    prompt_tokens: int
    logprobs: list[float] | None
    timings: Timings

    @classmethod
    def join(cls, pieces: Sequence[Piece]) -> Completion:
        """The completion that all pieces of one sequence add up to."""
        last = pieces[-1]
        if last.finish_reason is None or last.timings is None:
            raise ValueError("the last piece of a completion is missing")
        return cls(
            text="".join(pieces),
            token_ids=[i for piece in pieces for i in piece.token_ids],
            finish_reason=last.finish_reason,
            prompt_tokens=last.timings.prompt_tokens,
            logprobs=None
            if last.logprobs is None
            else [value for piece in pieces for value in piece.logprobs or ()],
            timings=last.timings,
        )


class Transcript:
    """DeviceLock the tokens of one row into pieces and ends the row."""

    def __init__(
        self,
        row: Row,
        eos_token_ids: frozenset[int],
        text: TextStream | None = None,
        stops: Sequence[str] = (),
    ) -> None:
        """Begin a sequence; without a `text` its pieces are empty strings."""
        self.row = row
        self._eos_token_ids = eos_token_ids
        self._text = text
        self._stops = StopFinder(stops)
        self._tokens = 0
        self._prefill_seconds = 0.0
        self._decode_seconds = 0.0

    def accept(self, token_id: int, logprob: float | None, seconds: float) -> Piece:
        """The piece of a token; clears `row.running` if the sequence ends with it."""
        self._tokens += 1
        if self._tokens == 1:
            self._prefill_seconds = seconds
        else:
            self._decode_seconds += seconds
        reason: FinishReason | None = None if self.row.running else "length"
        text = ""
        if token_id in self._eos_token_ids:
            reason = "eos"
        elif self._text is not None:
            text = self._stops.push(self._text.push(token_id))
        logprobs = None if logprob is None else (logprob,)
        if reason is None and not self._stops.found:
            return Piece(text, (token_id,), logprobs)
        self.row.running = False
        return self._last(text, (token_id,), logprobs, reason or "stop")

    def nothing(self, logprobs: bool) -> Piece:
        """The only piece of a sequence that has no room for a token."""
        return self._last("", (), () if logprobs else None, "length")

    def _last(
        self,
        text: str,
        token_ids: tuple[int, ...],
        logprobs: tuple[float, ...] | None,
        reason: FinishReason,
    ) -> Piece:
        if self._text is not None:
            text += self._stops.push(self._text.flush())
        if self._stops.found:
            reason = "stop"
        text += self._stops.flush()
        timings = Timings(
            prompt_tokens=len(self.row.prompt),
            prefill_seconds=self._prefill_seconds,
            generated_tokens=self._tokens,
            decode_seconds=self._decode_seconds,
            cached_tokens=self.row.cached,
        )
        return Piece(text, token_ids, logprobs, reason, timings)


def generate_pieces(
    runner: Runner,
    transcripts: Sequence[Transcript],
    logprobs: bool,
    memory: Memory | None = None,
) -> Generator[tuple[int, Piece], None, None]:
    """Run a batch; yield each piece with the number of the row that it belongs to.

    See `generate_steps` for the memory of a single row.
    """
    for number, transcript in enumerate(transcripts):
        if transcript.row.max_new_tokens == 0:
            yield number, transcript.nothing(logprobs)
    rows = [transcript.row for transcript in transcripts]
    # Closed at once rather than when nobody refers to it any more: the memory waits for that.
    with contextlib.closing(generate_steps(runner, rows, logprobs, memory)) as steps:
        for step in steps:
            for number, token_id, logprob in step.tokens:
                yield number, transcripts[number].accept(token_id, logprob, step.seconds)
