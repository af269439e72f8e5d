"""A conversation in several turns, in which each token is fed to the model only once.

Knows messages, and how the prompt of a turn continues the tokens of the previous turn, whose state
is in a prefix cache. Does not know how templates are rendered (`text.chat_template`) or how an
answer is generated (`generation`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Mapping, Sequence
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
        max_prompt_tokens: int | None,
        system: str | None,
        template_variables: Mapping[str, Any] | None = None,
    ) -> None:
        """Begin a conversation.

        Args:
            runner: Runs the model.
            template: The model's chat template.
            tokenizer: The model's tokenizer.
            begin: Makes the sequence that answers a prompt, from token ids and the number of the
                turn.
            max_prompt_tokens: Most tokens of a prompt, so that an answer still fits; None for no
                limit.
            system: Content of a first message of the role "system"; None for no such message.
            template_variables: Further variables of the template.
        """
        self.messages: list[Message] = []
        if system is not None:
            self.messages.append({"role": "system", "content": system})
        self._runner = runner
        self._template = template
        self._variables = template_variables
        self._tokenizer = tokenizer
        self._begin = begin
        self._max_prompt_tokens = max_prompt_tokens
        self._prefix_cache = PrefixCache()
        self._turns = 0
        self._answering = False
        # The last prompt and its answer: as text, and as the tokens that were fed or generated.
        self._text = ""
        self._tokens: list[int] = []

    def send(self, content: str | list[dict[str, Any]], answer_start: str = "") -> Completion:
        """Send a message and wait for the whole answer; see `stream`."""
        return Completion.join(list(self.stream(content, answer_start)))

    def stream(
        self, content: str | list[dict[str, Any]], answer_start: str = ""
    ) -> Generator[Piece, None, None]:
        """Send a message and get the answer piece by piece.

        When the conversation no longer fits into the context, its oldest turns are dropped, but not
        the system message. If the caller closes the iterator early, the conversation keeps the
        part of the answer that was read.

        Args:
            content: The user's message: text, or a list of parts
                `{"type": "text", "text": ...}`.
            answer_start: Text that the answer begins with. The pieces are what follows it; the
                conversation keeps both.

        Yields:
            One `Piece` for each token, as `Model.stream` does.

        Raises:
            InputError: The message alone is longer than the context, the template refuses the
                conversation, or the last answer has neither ended nor been closed.
            BundleError: The template cannot be compiled or run.
        """
        self._check_ended()
        messages = [*self.messages, {"role": "user", "content": content}]
        if answer_start:
            messages.append({"role": "assistant", "content": answer_start})
        messages, text, ids = self._fit(messages, bool(answer_start))
        if answer_start:
            messages.pop()
            # Where the template trims it, the answer goes on from what is left.
            forms = (answer_start, answer_start.rstrip(), answer_start.strip())
            answer_start = next(filter(text.endswith, forms), answer_start)
        return self._answer(messages, text, self._begin(ids, self._turns), answer_start)

    def _check_ended(self) -> None:
        if self._answering:
            raise InputError("the last answer has not ended; read it to its end, or close it")

    def _answer(
        self,
        messages: list[Message],
        text: str,
        sequence: GeneratedSequence,
        start: str,
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
            self.messages = [*messages, {"role": "assistant", "content": start + answer}]
            tokens = [i for piece in pieces for i in piece.token_ids]
            reason = pieces[-1].finish_reason if pieces else None
            if reason in ("eos", "stop"):
                # The template itself writes the end of the answer.
                tokens.pop()
            self._text, self._tokens = text + answer, sequence.prompt + tokens
            # Some tokens may not be in the text: those of a stop string, which may be special.
            hidden = reason == "stop" and not all(map(self._tokenizer.visible, tokens))
            if hidden or self._tokenizer.decode(tokens) != answer:
                self._text, self._tokens = "", []

    def _fit(self, messages: list[Message], begun: bool) -> tuple[list[Message], str, list[int]]:
        """The messages that fit into the context, their prompt as text, and its token ids.

        Args:
            messages: The conversation.
            begun: Whether the last message is an answer to be continued.
        """
        while True:
            text = self._template.render(
                messages, continue_final_message=begun, variables=self._variables
            )
            ids = self._tokenizer.encode(text, add_special_tokens=False)
            written = len(self._tokens)
            if text.startswith(self._text) and ids[:written] != self._tokens:
                # The model may have written its words as other tokens than the tokenizer would.
                # Those tokens are kept, because the state in the prefix cache is of them.
                rest = self._tokenizer.encode(text[len(self._text) :], add_special_tokens=False)
                ids = self._tokens + rest
            shorter = _without_oldest_turn(messages)
            if (
                self._max_prompt_tokens is None
                or len(ids) <= self._max_prompt_tokens
                or shorter is None
            ):
                return messages, text, ids
            messages = shorter


def _without_oldest_turn(messages: Sequence[Message]) -> list[Message] | None:
    """The messages without the oldest turn, but with the system's; None if one turn is left."""
    users = [number for number, message in enumerate(messages) if message.get("role") == "user"]
    if len(users) < 2:
        return None
    system = [message for message in messages[: users[0]] if message.get("role") == "system"]
    return [*system, *messages[users[1] :]]
