"""A conversation in several turns, of which the model reads each token once.

Knows messages and how the prompt of a turn goes on from the tokens of the one before, whose
state is kept. Does not know templates (`chat`) or how an answer comes about.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Sequence
from typing import Any

from doge_onnx.errors import InputError
from doge_onnx.runtime.engine.runner import Runner
from doge_onnx.runtime.generation.loop import generate_pieces
from doge_onnx.runtime.generation.output import Completion, Piece
from doge_onnx.runtime.generation.prefix_cache import PrefixCache
from doge_onnx.runtime.generation.sequence import GeneratedSequence
from doge_onnx.runtime.text.chat_template import ChatTemplate
from doge_onnx.runtime.text.tokenizer import Tokenizer

Message = dict[str, Any]


class Chat:
    """A conversation with a model. Made by `Model.chat`.

    Attributes:
        messages: The conversation so far: dicts with a "role" ("system", "user", "assistant")
            and a "content". It may be changed between two turns.
    """

    def __init__(
        self,
        runner: Runner,
        template: ChatTemplate,
        tokenizer: Tokenizer,
        begin: Callable[[list[int], int], GeneratedSequence],
        most_tokens: int | None,
        system: str | None,
    ) -> None:
        """Begin a conversation.

        Args:
            runner: Runs the model.
            template: The model's.
            tokenizer: The model's.
            begin: Makes the sequence that answers a prompt; the number is that of the turn.
            most_tokens: Of a prompt, so that an answer still fits; None is no limit.
            system: What a first message of the role "system" says; None is no such message.
        """
        self.messages: list[Message] = []
        if system is not None:
            self.messages.append({"role": "system", "content": system})
        self._runner = runner
        self._template = template
        self._tokenizer = tokenizer
        self._begin = begin
        self._most_tokens = most_tokens
        self._prefix_cache = PrefixCache()
        self._turns = 0
        self._answering = False
        # The last prompt and its answer, as text and as the tokens that the model wrote.
        self._text = ""
        self._tokens: list[int] = []

    def send(self, content: str) -> Completion:
        """Say something and wait for the answer; see `stream`."""
        return Completion.join(list(self.stream(content)))

    def stream(self, content: str) -> Generator[Piece, None, None]:
        """Say something and get the answer piece by piece.

        When the conversation no longer fits into the context, its oldest turns are forgotten, but
        not what the system said. An answer that is not read to its end, because its iterator is
        closed, stands as far as it was read.

        Args:
            content: What the user says.

        Yields:
            One `Piece` per token, as `Model.stream` does.

        Raises:
            InputError: The message alone is longer than the context, the template refuses the
                conversation, or the last answer has neither ended nor been closed.
            BundleError: The template is no good.
        """
        self._check_ended()
        messages = [*self.messages, {"role": "user", "content": content}]
        messages, text, ids = self._fit(messages)
        return self._answer(messages, text, self._begin(ids, self._turns))

    def _check_ended(self) -> None:
        if self._answering:
            raise InputError("the last answer has not ended; read it to its end, or close it")

    def _answer(
        self, messages: list[Message], text: str, sequence: GeneratedSequence
    ) -> Generator[Piece, None, None]:
        # Another answer may have begun since the caller asked for this one.
        self._check_ended()
        self._answering = True
        pieces: list[Piece] = []
        try:
            run = generate_pieces(self._runner, [sequence], self._prefix_cache)
            with contextlib.closing(run):
                for _, piece in run:
                    pieces.append(piece)
                    yield piece
        finally:
            self._answering = False
            self._turns += 1
            answer = "".join(piece.text for piece in pieces)
            self.messages = [*messages, {"role": "assistant", "content": answer}]
            tokens = [i for piece in pieces for i in piece.token_ids]
            if pieces and pieces[-1].finish_reason == "eos":
                # The template writes down in its own way that the answer has ended.
                tokens.pop()
            self._text, self._tokens = text + answer, sequence.prompt + tokens
            if self._tokenizer.decode(tokens) != answer:
                # Not all of it is in the text, such as a stop string.
                self._text, self._tokens = "", []

    def _fit(self, messages: list[Message]) -> tuple[list[Message], str, list[int]]:
        """The messages that fit, their prompt, and its tokens."""
        while True:
            text = self._template.render(messages)
            ids = self._tokenizer.encode(text, add_special_tokens=False)
            written = len(self._tokens)
            if text.startswith(self._text) and ids[:written] != self._tokens:
                # A model may cut its words into other tokens than a tokenizer would. What it has
                # read stays as it is.
                rest = self._tokenizer.encode(text[len(self._text) :], add_special_tokens=False)
                ids = self._tokens + rest
            shorter = _without_oldest_turn(messages)
            if self._most_tokens is None or len(ids) <= self._most_tokens or shorter is None:
                return messages, text, ids
            messages = shorter


def _without_oldest_turn(messages: Sequence[Message]) -> list[Message] | None:
    """The messages from the second of the user's on, after the system's; None for the last turn."""
    users = [number for number, message in enumerate(messages) if message.get("role") == "user"]
    if len(users) < 2:
        return None
    system = [message for message in messages[: users[0]] if message.get("role") == "system"]
    return [*system, *messages[users[1] :]]
