"""A sequence that is being generated: logits in, tokens and pieces out, until it ends.

Knows everything about one sequence and nothing about the others of its batch. Does not run the
model: the generation loop (`loop`) asks for a token, feeds it, and goes on until `finish_reason` is
set.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from doge_onnx.errors import InputError
from doge_onnx.runtime.engine.runner import TopLogits
from doge_onnx.runtime.generation.config import GenerationConfig
from doge_onnx.runtime.generation.output import FinishReason, Piece, Timings, TokenLogprob
from doge_onnx.runtime.generation.processors import make_processors
from doge_onnx.runtime.generation.sampling import (
    candidates,
    largest,
    log_probabilities,
    sampler_of,
)
from doge_onnx.runtime.text.stops import StopFinder
from doge_onnx.runtime.text.tokenizer import TextStream, Tokenizer


class GeneratedSequence:
    """One sequence: its prompt, how its tokens are chosen, and when it ends.

    Attributes:
        prompt: Token ids, at least one.
        max_new_tokens: Most tokens to generate.
        candidates: How many of the largest logits `choose` needs, besides those equal to the
            smallest of them; None for all.
        cached_tokens: How many tokens of the prompt the prefix cache held, so that they were not
            fed. The generation loop sets it.
    """

    def __init__(
        self,
        prompt: list[int],
        max_new_tokens: int,
        options: GenerationConfig,
        eos_token_ids: Collection[int] = frozenset(),
        tokenizer: Tokenizer | None = None,
        number: int = 0,
    ) -> None:
        """Begin a sequence.

        Args:
            prompt: Token ids, at least one.
            max_new_tokens: Most tokens to generate; replaces the value in `options`.
            options: Options completed by `Defaults.resolve`.
            eos_token_ids: Tokens that end a text.
            tokenizer: Turns tokens into text; with None, pieces have no text.
            number: Number of the sequence in its batch; each draws its own random numbers.
        """
        self.prompt = prompt
        self.max_new_tokens = max_new_tokens
        self.cached_tokens = 0
        self._eos_token_ids = frozenset() if options.ignore_eos else frozenset(eos_token_ids)
        self._stop_token_ids = frozenset(cast(tuple[int, ...], options.stop_token_ids or ()))
        self._max_seconds = math.inf if options.max_time is None else options.max_time
        self._processors = make_processors(
            options, prompt, max_new_tokens, self._eos_token_ids | self._stop_token_ids
        )
        self._sampler = sampler_of(options, number)
        self._top_logprobs = options.top_logprobs or 0
        self._logprobs = bool(options.logprobs or self._top_logprobs)
        # Processors and a caller's sampler may write into the logits that they are given.
        self._copies = bool(self._processors) or options.sampler is not None
        self.candidates = None
        if not self._copies and not self._logprobs:
            self.candidates = candidates(options)
        self._tokens = _Tokens(prompt)
        self._tokenizer = tokenizer
        self._text = None if tokenizer is None else TextStream(tokenizer, prompt)
        self._stops = StopFinder(options.stop or ())
        self._chosen = _Chosen(0, None, None)
        self._generated = 0
        self._prefill_seconds = 0.0
        self._decode_seconds = 0.0
        self._finish_reason: FinishReason | None = None

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why the sequence has ended; None while it goes on."""
        return self._finish_reason

    def choose(self, logits: NDArray[np.float32] | TopLogits) -> int:
        """Choose the next token.

        Args:
            logits: All logits, float32 `[V]`, or only the `candidates` largest. Not changed.

        Raises:
            InputError: The options leave no token to choose from, or a processor or sampler of the
                caller returns something invalid.
        """
        if isinstance(logits, TopLogits):
            token_id = int(logits.ids[self._sampler(logits.logits)])
            self._chosen = _Chosen(token_id, None, None)
        else:
            token_id = self._sample(self._processed(logits))
            self._chosen = self._report(logits, token_id)
        self._tokens.append(token_id)
        return token_id

    def accept(self, seconds: float) -> Piece:
        """Make the piece of the token that was just chosen. The sequence may end with it.

        Args:
            seconds: How long the step that led to this token took.
        """
        token_id = self._chosen.token_id
        self._generated += 1
        if self._generated == 1:
            self._prefill_seconds = seconds
        else:
            self._decode_seconds += seconds
        seconds_so_far = self._prefill_seconds + self._decode_seconds
        if token_id in self._eos_token_ids:
            self._finish_reason = "eos"
        elif token_id in self._stop_token_ids:
            self._finish_reason = "stop"
        elif self._generated == self.max_new_tokens or seconds_so_far > self._max_seconds:
            self._finish_reason = "length"
        text = self._new_text(token_id, ended=self._finish_reason in ("eos", "stop"))
        # A stop string goes before all other reasons: the text ends before this token.
        if self._stops.found:
            self._finish_reason = "stop"
        logprob, top = self._chosen.logprob, self._chosen.top
        return Piece(
            text,
            (token_id,),
            None if logprob is None else (logprob,),
            None if top is None else (top,),
            self._finish_reason,
            None if self._finish_reason is None else self._timings(),
        )

    def _new_text(self, token_id: int, ended: bool) -> str:
        """The text that is certain with a new token.

        Args:
            token_id: The token.
            ended: Whether the token ends the text, and is no part of it.
        """
        if self._text is None or self._tokenizer is None:
            return ""
        text = ""
        if not ended:
            text += self._stops.push(self._text.push(token_id))
        if self._finish_reason is not None:
            text += self._stops.push(self._text.flush())
        if not self._tokenizer.visible(token_id):
            # Stop strings may name special tokens, which the text does not have.
            name = self._tokenizer.token(token_id) or ""
            text += self._stops.push(self._text.held + name, hidden=True)
            if self._stops.found:
                text += self._text.flush()
        if self._finish_reason is not None:
            text += self._stops.flush()
        return text

    def no_room(self) -> Piece:
        """End a sequence whose `max_new_tokens` is 0; returns its only piece."""
        self._finish_reason = "length"
        return Piece(
            "",
            (),
            () if self._logprobs else None,
            () if self._top_logprobs else None,
            self._finish_reason,
            self._timings(),
        )

    def _processed(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        if not self._copies:
            return logits
        scores = logits.copy()
        for process in self._processors:
            scores = process(self._tokens.view(), scores)
            if (
                not isinstance(scores, np.ndarray)
                or scores.shape != logits.shape
                or scores.dtype.kind != "f"
            ):
                raise InputError(
                    f"a logits processor must return numbers of shape {list(logits.shape)}, not "
                    f"{_form(scores)}"
                )
            if not scores.flags.writeable:
                scores = scores.copy()
        largest_score = scores.max()
        if largest_score == -np.inf:
            raise InputError("no token is left to choose from: the options rule out all of them")
        if not np.isfinite(largest_score):
            raise InputError(
                "a logits processor returned a logit that is not a number, or infinite"
            )
        return scores

    def _sample(self, scores: NDArray[np.float32]) -> int:
        token_id = self._sampler(scores)
        if isinstance(token_id, int | np.integer) and 0 <= token_id < len(scores):
            return int(token_id)
        raise InputError(
            f"a sampler must return a token id, 0 to {len(scores) - 1}, not {token_id!r}"
        )

    def _report(self, logits: NDArray[np.float32], token_id: int) -> _Chosen:
        """The chosen token with the log-probabilities that the options ask for."""
        if not self._logprobs:
            return _Chosen(token_id, None, None)
        distribution = log_probabilities(logits)
        top = None
        if self._top_logprobs:
            ids = largest(distribution, self._top_logprobs).tolist()
            top = tuple(TokenLogprob(i, float(distribution[i])) for i in ids)
        return _Chosen(token_id, float(distribution[token_id]), top)

    def _timings(self) -> Timings:
        return Timings(
            prompt_tokens=len(self.prompt),
            prefill_seconds=self._prefill_seconds,
            generated_tokens=self._generated,
            decode_seconds=self._decode_seconds,
            cached_tokens=self.cached_tokens,
        )


class _Chosen(NamedTuple):
    token_id: int
    logprob: float | None
    top: tuple[TokenLogprob, ...] | None


class _Tokens:
    """A growing list of token ids, in one array that doubles when it is full."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self._array = np.array(tokens, np.int64)
        self._count = len(tokens)

    def append(self, token_id: int) -> None:
        if self._count == len(self._array):
            self._array = np.concatenate([self._array, np.empty_like(self._array)])
        self._array[self._count] = token_id
        self._count += 1

    def view(self) -> NDArray[np.int64]:
        """All token ids so far, int64, as a read-only view."""
        view = self._array[: self._count]
        view.flags.writeable = False
        return view


def _form(value: object) -> str:
    if not isinstance(value, np.ndarray):
        return type(value).__name__
    return f"{value.dtype.name} of shape {list(value.shape)}"
