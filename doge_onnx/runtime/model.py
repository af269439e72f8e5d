"""A loaded bundle: `forward`, `generate`, `generate_batch`, `stream` and `chat`.

Knows how the parts of the runtime fit together and what a caller may pass. Does not know how a
graph is run (`engine`), how tokens are chosen (`generation`) or how text is made (`text`).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Unpack

import numpy as np
from numpy.typing import ArrayLike, NDArray

from doge_onnx.bundle import Bundle, Manifest
from doge_onnx.errors import InputError
from doge_onnx.runtime.chat import Chat
from doge_onnx.runtime.engine.device import AUTO
from doge_onnx.runtime.engine.input_checks import check_room, check_state, token_mask, token_matrix
from doge_onnx.runtime.engine.runner import Runner
from doge_onnx.runtime.engine.state import State
from doge_onnx.runtime.generation.config import GenerationConfig, GenerationOptions
from doge_onnx.runtime.generation.defaults import Defaults
from doge_onnx.runtime.generation.loop import generate_pieces
from doge_onnx.runtime.generation.output import Completion, Piece
from doge_onnx.runtime.generation.sequence import GeneratedSequence
from doge_onnx.runtime.loader import open_runner
from doge_onnx.runtime.text.chat_template import ChatTemplate
from doge_onnx.runtime.text.tokenizer import Tokenizer

# Lists and tuples, not Sequence: a str is a sequence of str, too.
Messages = list[dict[str, Any]] | list[dict[str, str]]
Prompt = str | list[int] | tuple[int, ...] | NDArray[np.integer[Any]] | Messages

# Percent of the context that a conversation leaves free for the next answer.
_ANSWER_SHARE = 25


def load(
    bundle: str | Path | Bundle,
    device: str = AUTO,
    threads: int | None = None,
    prefill_chunk: int | None = None,
    verbose: bool = False,
    cuda_graph: bool | None = None,
) -> Model:
    """Load a bundle from its path, or one that is open already. See `doge_onnx.load`."""
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    defaults = Defaults.read(opened)
    path = opened.file("tokenizer.json")
    tokenizer = None if path is None else Tokenizer(path)
    runner = open_runner(opened, device, threads, prefill_chunk, verbose, cuda_graph)
    return Model(opened, runner, defaults, tokenizer)


class Model:
    """A language model that is ready to run. Made by `doge_onnx.load`.

    Several threads may use it at once: a run changes nothing but its own state.
    """

    def __init__(
        self, bundle: Bundle, runner: Runner, defaults: Defaults, tokenizer: Tokenizer | None
    ) -> None:
        self._bundle = bundle
        self._runner = runner
        self._defaults = defaults
        self._tokenizer = tokenizer
        # With a window state, a text may have any length.
        self._bounded = bundle.manifest.state.kind != "window"

    @property
    def device(self) -> str:
        """Where the model runs: "cpu" or "cuda"."""
        return self._runner.device

    @property
    def reason_for_cpu(self) -> str | None:
        """Why "auto" chose the CPU, if the bundle or the installation is for CUDA; else None."""
        return self._runner.reason_for_cpu

    @property
    def cuda_graph(self) -> bool:
        """Whether CUDA captures decode steps once and replays them."""
        return self._runner.captures

    @property
    def manifest(self) -> Manifest:
        """The bundle's manifest."""
        return self._bundle.manifest

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer: text to token ids and back.

        Raises:
            InputError: The bundle has no tokenizer.
        """
        if self._tokenizer is None:
            raise InputError(
                f"{self._bundle.path} has no tokenizer.json; pass token ids instead of text"
            )
        return self._tokenizer

    def forward(
        self,
        input_ids: ArrayLike,
        state: State | None = None,
        logits: Literal["last", "all"] = "last",
        attention_mask: ArrayLike | None = None,
    ) -> tuple[NDArray[np.float32], State]:
        """Feed tokens to the model, for prefill and decode alike.

        The logits do not depend on how a text is divided into calls.

        Args:
            input_ids: Token ids `[B, S]`, integers.
            state: The state that an earlier call returned for the same B sequences; None at their
                start. The call does not change it, so it may be continued several times.
            logits: "last" for the last position only, "all" for every position.
            attention_mask: `[B, S]`, for the new ids only: 1 for a token, 0 for padding, which may
                be anywhere. Padding is skipped: no token attends to it, and it takes no position.
                None if there is no padding.

        Returns:
            Logits of the last token of each sequence, float32 `[B, 1, V]`, or of all positions,
            `[B, S, V]`, with zeros where there is no token; and the state after these tokens.

        Raises:
            InputError: An id is outside the vocabulary, a shape or type does not fit, the state is
                of another model or batch size, or a sequence would exceed the context length.
        """
        if logits not in ("last", "all"):
            raise InputError(f"logits must be 'last' or 'all', not {logits!r}")
        ids = token_matrix(input_ids, self.manifest.vocab_size)
        mask = token_mask(attention_mask, ids.shape)
        check_state(state, len(ids), self._runner)
        tokens = list(ids) if mask is None else [r[m] for r, m in zip(ids, mask, strict=True)]
        if self._bounded:
            past: NDArray[np.int64] | int = 0 if state is None else state.lengths
            lengths = past + np.array([len(row) for row in tokens])
            check_room(lengths, self.manifest.context_length)
        rows, state = self._runner.forward(tokens, state, last_only=logits == "last")
        if mask is None:
            return rows[0][np.newaxis] if len(rows) == 1 else np.stack(rows), state
        columns = 1 if logits == "last" else ids.shape[1]
        out = np.zeros((len(ids), columns, self.manifest.vocab_size), np.float32)
        for number, row in enumerate(rows):
            where = mask[number] if logits == "all" else slice(len(row))
            out[number, where] = row
        return out, state

    def generate(
        self,
        prompt: Prompt,
        config: GenerationConfig | None = None,
        **overrides: Unpack[GenerationOptions],
    ) -> Completion:
        """Continue a prompt.

        Args:
            prompt: A text, a list of token ids, or a conversation, which is a list of messages such
                as `[{"role": "user", "content": "Hello"}]` that the bundle's chat template turns
                into a prompt.
            config: Options; None for those of the bundle's generation_config.json. Without any,
                generation is greedy and goes on to the end of the context.
            overrides: Options of `GenerationConfig` that replace those of `config`.

        Raises:
            InputError: The prompt is empty or longer than the context, has ids outside the
                vocabulary, is text and there is no tokenizer, or is a conversation and there is no
                chat template or the template refuses it; or an option is out of its range.
            BundleError: The chat template cannot be read, compiled or run.
        """
        return Completion.join(list(self.stream(prompt, config, **overrides)))

    def generate_batch(
        self,
        prompts: Sequence[Prompt] | NDArray[np.integer[Any]],
        config: GenerationConfig | None = None,
        **overrides: Unpack[GenerationOptions],
    ) -> list[Completion]:
        """Continue several prompts as one batch. Greedily, each gets the tokens it would get alone.

        Weights in int8 or int4 are an exception: their products round activations to 8 bits, so the
        last bit of a sum, which may depend on how many sequences are summed together, can become
        half a percent of a logit. Then two tokens that are nearly as likely may change places.

        Each prompt draws its own random numbers, and the first prompt the same ones as alone.
        All prompts share the caller's logits processors and sampler, which should therefore keep
        nothing from one call to the next.

        Args:
            prompts: See `generate`.
            config: See `generate`.
            overrides: See `generate`.

        Returns:
            A completion for each prompt.

        Raises:
            InputError: See `generate`; the message says which prompt it is about.
            BundleError: See `generate`.
        """
        options = self._options(config, overrides)
        if not isinstance(prompts, list | tuple | np.ndarray) or (
            isinstance(prompts, np.ndarray) and prompts.ndim == 0
        ):
            raise InputError(
                f"prompts must be a list of them, not {type(prompts).__name__}; generate takes one"
            )
        sequences = []
        for number, prompt in enumerate(prompts):
            try:
                sequences.append(self._sequence(prompt, options, number))
            except InputError as error:
                raise InputError(f"prompt {number}: {error}") from None
        pieces: list[list[Piece]] = [[] for _ in sequences]
        for number, piece in generate_pieces(self._runner, sequences):
            pieces[number].append(piece)
        return [Completion.join(each) for each in pieces]

    def stream(
        self,
        prompt: Prompt,
        config: GenerationConfig | None = None,
        **overrides: Unpack[GenerationOptions],
    ) -> Iterator[Piece]:
        """Continue a prompt piece by piece.

        Args:
            prompt: See `generate`.
            config: See `generate`.
            overrides: See `generate`.

        Yields:
            One `Piece` for each token. Its text is empty while a character or a possible stop
            string is incomplete. All texts together are the text that `generate` returns. The last
            piece has a finish_reason.

        Raises:
            InputError: See `generate`; raised by this call, not by the first iteration.
            BundleError: See `generate`.
        """
        sequence = self._sequence(prompt, self._options(config, overrides), 0)
        return (piece for _, piece in generate_pieces(self._runner, [sequence]))

    def chat(
        self,
        system: str | None = None,
        config: GenerationConfig | None = None,
        **overrides: Unpack[GenerationOptions],
    ) -> Chat:
        """Begin a conversation. Each message feeds only the tokens that are new.

        Args:
            system: Content of a system message that begins the conversation; None for no such
                message.
            config: Options of all answers; see `generate`.
            overrides: See `generate`.

        Raises:
            InputError: The bundle has no chat template or no tokenizer, or an option is out of
                its range.
            BundleError: The chat template cannot be read.
        """
        options = self._options(config, overrides)
        context_length = self.manifest.context_length
        answer = context_length * _ANSWER_SHARE // 100
        if options.max_new_tokens is not None:
            answer = min(answer, options.max_new_tokens)
        return Chat(
            self._runner,
            self._chat_template,
            self.tokenizer,
            lambda ids, turn: self._sequence(ids, options, turn),
            context_length - answer if self._bounded else None,
            system,
        )

    def apply_chat_template(self, messages: Messages, add_generation_prompt: bool = True) -> str:
        """Render a conversation as the prompt that `generate` would use, special tokens included.

        Args:
            messages: See `generate`.
            add_generation_prompt: Append the beginning of an answer.

        Raises:
            InputError: The bundle has no chat template, or the template refuses the messages.
            BundleError: The chat template cannot be read, compiled or run.
        """
        return self._chat_template.render(messages, add_generation_prompt)

    @functools.cached_property
    def _chat_template(self) -> ChatTemplate:
        template = ChatTemplate.read(self._bundle)
        if template is None:
            raise InputError(
                f"{self._bundle.path} has no chat template, so it takes text and no messages; "
                "instruction-tuned models have one"
            )
        return template

    def _options(
        self, config: GenerationConfig | None, overrides: GenerationOptions
    ) -> GenerationConfig:
        """The caller's options, checked and completed with what the bundle recommends."""
        if not isinstance(config, GenerationConfig | None):
            raise InputError(f"config must be a GenerationConfig, not {type(config).__name__}")
        given = (config or GenerationConfig()).merged(**overrides)
        for token_id in given.logit_bias or ():
            if token_id >= self.manifest.vocab_size:
                raise InputError(
                    f"logit_bias has token id {token_id}, and the vocabulary has "
                    f"{self.manifest.vocab_size} tokens"
                )
        return self._defaults.resolve(given)

    def _sequence(
        self, prompt: Prompt, options: GenerationConfig, number: int
    ) -> GeneratedSequence:
        """Make the sequence of one prompt.

        Args:
            prompt: See `generate`.
            options: Complete options; see `_options`.
            number: Number of the prompt in its batch.
        """
        ids = self._prompt_ids(prompt)
        context_length = self.manifest.context_length
        room = context_length - len(ids)
        if room < 0 and self._bounded:
            raise InputError(
                f"the prompt has {len(ids)} tokens, more than the context length of "
                f"{context_length}"
            )
        wanted = options.max_new_tokens
        if self._bounded:
            wanted = room if wanted is None else min(wanted, room)
        elif wanted is None:
            # Without this, only an end-of-text token would end the text.
            wanted = context_length
        return GeneratedSequence(
            ids, wanted, options, self._defaults.eos_token_ids, self._tokenizer, number
        )

    def _prompt_ids(self, prompt: Any) -> list[int]:
        ids: Any
        if isinstance(prompt, str):
            ids = self.tokenizer.encode(prompt) if prompt else []
        elif not isinstance(prompt, list | tuple | np.ndarray) or (
            isinstance(prompt, np.ndarray) and prompt.ndim == 0
        ):
            raise InputError(
                "a prompt must be text, a list of token ids or a list of messages, not "
                f"{type(prompt).__name__}"
            )
        elif not isinstance(prompt, np.ndarray) and any(isinstance(m, Mapping) for m in prompt):
            text = self._chat_template.render(prompt)
            ids = self.tokenizer.encode(text, add_special_tokens=False)
        else:
            ids = prompt
        if len(ids) == 0:
            raise InputError("the prompt is empty; at least one token is needed")
        if all(isinstance(entry, str | list | tuple | np.ndarray) for entry in ids):
            raise InputError("this is a list of prompts; generate_batch takes those")
        for token_id in ids:
            if isinstance(token_id, bool) or not isinstance(token_id, int | np.integer):
                raise InputError(f"token ids are whole numbers, not {type(token_id).__name__}")
            if token_id >= self.manifest.vocab_size and self._tokenizer is not None:
                token = self._tokenizer.token(int(token_id))
                if token is not None:
                    raise InputError(
                        f"the prompt has the token {token!r} ({token_id}), which the tokenizer "
                        f"knows and the model does not: it has {self.manifest.vocab_size} tokens"
                    )
        checked: list[int] = token_matrix([ids], self.manifest.vocab_size)[0].tolist()
        return checked
