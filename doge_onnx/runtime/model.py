"""A loaded bundle: `forward`, `generate`, `generate_batch`, `stream` and `chat`.

Knows how the parts of the runtime fit together and what a caller may pass. Does not know how a
graph is run (`engine`), how tokens are chosen (`generation`) or how text is made (`text`).
"""

from __future__ import annotations

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
from doge_onnx.runtime.engine.kernels import Kernels
from doge_onnx.runtime.engine.runner import Runner
from doge_onnx.runtime.engine.state import State
from doge_onnx.runtime.generation.config import GenerationConfig, GenerationOptions
from doge_onnx.runtime.generation.defaults import Defaults
from doge_onnx.runtime.generation.loop import generate_pieces
from doge_onnx.runtime.generation.output import Completion, Piece
from doge_onnx.runtime.generation.sequence import GeneratedSequence
from doge_onnx.runtime.loader import open_runner
from doge_onnx.runtime.prompt import Messages, Prompt, PromptReader, Rendering
from doge_onnx.runtime.text.tokenizer import Tokenizer

# Percent of the context that a conversation leaves free for the next answer.
_ANSWER_SHARE = 25


def load(
    bundle: str | Path | Bundle,
    device: str = AUTO,
    threads: int | None = None,
    prefill_chunk: int | None = None,
    verbose: bool = False,
    cuda_graph: bool | None = None,
    native: bool = True,
) -> Model:
    """Load a bundle from its path, or one that is open already. See `doge_onnx.load`."""
    opened = Bundle.open(bundle)
    defaults = Defaults.read(opened)
    path = opened.file("tokenizer.json")
    tokenizer = None if path is None else Tokenizer(path)
    runner = open_runner(opened, device, threads, prefill_chunk, verbose, cuda_graph, native)
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
        self._prompts = PromptReader(bundle, tokenizer)
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
    def kernels(self) -> Kernels:
        """Which kernels run the model: this package's own, or ONNX Runtime's and why."""
        return self._runner.kernels

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
        return self._prompts.tokenizer

    def forward(
        self,
        input_ids: ArrayLike,
        state: State | None = None,
        logits: Literal["last", "all"] = "last",
        attention_mask: ArrayLike | None = None,
    ) -> tuple[NDArray[np.float32], State]:
        """Feed tokens to the model, for prefill and decode alike.

        However a text is divided into calls, the logits are the same but for rounding, and mostly
        to the last bit: docs/limits.md says when.

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
        *,
        continue_final_message: bool | str = False,
        template_variables: Mapping[str, Any] | None = None,
        **overrides: Unpack[GenerationOptions],
    ) -> Completion:
        """Continue a prompt.

        Args:
            prompt: A text, a list of token ids, or a conversation, which is a list of messages such
                as `[{"role": "user", "content": "Hello"}]` that the bundle's chat template turns
                into a prompt. A content may be a list of text parts; see `apply_chat_template`. An
                empty text is the token that the tokenizer, or else the model's configuration, says
                texts begin with.
            config: Options; None for those of the bundle's generation_config.json. Without any,
                generation is greedy and goes on to the end of the context.
            continue_final_message: Continue the final message of a conversation, such as an answer
                that you begin, in place of a new answer; see `apply_chat_template`.
            template_variables: Further variables of the chat template, such as
                `{"enable_thinking": False}`; see `apply_chat_template`.
            overrides: Options of `GenerationConfig` that replace those of `config`.

        Raises:
            InputError: The prompt has no tokens or more than the context, has ids outside the
                vocabulary, is text and there is no tokenizer, or is a conversation and there is no
                chat template or the template refuses it; or an option is out of its range.
            BundleError: The chat template cannot be read, compiled or run.
        """
        pieces = self.stream(
            prompt,
            config,
            continue_final_message=continue_final_message,
            template_variables=template_variables,
            **overrides,
        )
        return Completion.join(list(pieces))

    def generate_batch(
        self,
        prompts: Sequence[Prompt] | NDArray[np.integer[Any]],
        config: GenerationConfig | None = None,
        *,
        continue_final_message: bool | str = False,
        template_variables: Mapping[str, Any] | None = None,
        **overrides: Unpack[GenerationOptions],
    ) -> list[Completion]:
        """Continue several prompts as one batch. Each gets what it would get alone.

        On a CPU, with a growing state of the target "ort" and weights in fp32 or int8, it gets the
        same logits to the last bit. With int4 weights, in fp16, with other states and targets and
        on a GPU, rounding depends on the batch: two tokens that are nearly as likely may then
        change places, in int4 more often than in the others; docs/limits.md has figures.

        Each prompt draws its own random numbers, from the seed and its index: the first prompt
        those that it draws alone, and every prompt the same ones whatever the others are.
        All prompts share the caller's logits processors and sampler, which should therefore keep
        nothing from one call to the next.

        Args:
            prompts: See `generate`.
            config: See `generate`.
            continue_final_message: See `generate`.
            template_variables: See `generate`.
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
        rendering = Rendering(continue_final_message, template_variables)
        sequences = []
        for number, prompt in enumerate(prompts):
            try:
                ids = self._prompts.token_ids(prompt, rendering)
                sequences.append(self._sequence(ids, options, number))
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
        *,
        continue_final_message: bool | str = False,
        template_variables: Mapping[str, Any] | None = None,
        **overrides: Unpack[GenerationOptions],
    ) -> Iterator[Piece]:
        """Continue a prompt piece by piece.

        Args:
            prompt: See `generate`.
            config: See `generate`.
            continue_final_message: See `generate`.
            template_variables: See `generate`.
            overrides: See `generate`.

        Yields:
            One `Piece` for each token. Its text is empty while a character or a possible stop
            string is incomplete. All texts together are the text that `generate` returns. The last
            piece has a finish_reason.

        Raises:
            InputError: See `generate`; raised by this call, not by the first iteration.
            BundleError: See `generate`.
        """
        options = self._options(config, overrides)
        rendering = Rendering(continue_final_message, template_variables)
        sequence = self._sequence(self._prompts.token_ids(prompt, rendering), options, 0)
        return (piece for _, piece in generate_pieces(self._runner, [sequence]))

    def chat(
        self,
        system: str | None = None,
        config: GenerationConfig | None = None,
        *,
        template_variables: Mapping[str, Any] | None = None,
        **overrides: Unpack[GenerationOptions],
    ) -> Chat:
        """Begin a conversation. Each message feeds only the tokens that are new.

        Args:
            system: Content of a system message that begins the conversation; None for no such
                message.
            config: Options of all answers; see `generate`.
            template_variables: See `generate`.
            overrides: See `generate`.

        Raises:
            InputError: The bundle has no chat template or no tokenizer, or an option is out of
                its range.
            BundleError: The chat template cannot be read.
        """
        options = self._options(config, overrides)
        longest = self._longest(options)
        room = None
        if longest is not None:
            answer = longest * _ANSWER_SHARE // 100
            if options.max_new_tokens is not None:
                answer = min(answer, options.max_new_tokens)
            room = longest - answer
        return Chat(
            self._runner,
            self._prompts.template,
            self.tokenizer,
            lambda ids, turn: self._sequence(ids, options, turn),
            room,
            system,
            template_variables,
        )

    def apply_chat_template(
        self,
        messages: Messages,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool | str = False,
        template_variables: Mapping[str, Any] | None = None,
    ) -> str:
        """Render a conversation as the prompt that `generate` would use, special tokens included.

        The text is that of transformers. Where a template takes text only and a content is a list
        of parts, the template gets the texts of the parts, joined without anything between them.

        Args:
            messages: Dicts with a "role" and a "content", which is text or a list of parts
                `{"type": "text", "text": ...}`.
            add_generation_prompt: Append the beginning of an answer. None for yes, unless the final
                message is continued.
            continue_final_message: End the text behind the content of the final message, so that
                it can be continued; a str is the field to continue in place of the content. As in
                transformers, space at its end is left out where the template leaves it out.
            template_variables: Further variables of the template, such as
                `{"enable_thinking": False}`. They may replace special tokens such as `bos_token`.
                Those that the template does not use have no effect.

        Raises:
            InputError: The bundle has no chat template, or the template refuses the messages or
                leaves out what is to be continued; a part is not text; a variable is not plain data
                or is named as one that is given anyway; or a final message is to be continued and
                an answer begun.
            BundleError: The chat template cannot be read, compiled or run.
        """
        return self._prompts.template.render(
            messages, add_generation_prompt, continue_final_message, template_variables
        )

    def _options(
        self, config: GenerationConfig | None, overrides: GenerationOptions
    ) -> GenerationConfig:
        """The caller's options, checked and completed with what the bundle recommends."""
        if not isinstance(config, GenerationConfig | None):
            raise InputError(f"config must be a GenerationConfig, not {type(config).__name__}")
        given = (config or GenerationConfig()).merged(**overrides)
        for name, token_id in given.token_ids():
            if token_id >= self.manifest.vocab_size:
                raise InputError(
                    f"{name} has token id {token_id}, and the vocabulary has "
                    f"{self.manifest.vocab_size} tokens"
                )
        options = self._defaults.resolve(given)
        if options.stop and self._tokenizer is None:
            raise InputError(
                f"stop strings need text, and {self._bundle.path} has no tokenizer.json; use "
                "stop_token_ids, or stop=[] for none"
            )
        return options

    def _longest(self, options: GenerationConfig) -> int | None:
        """Most tokens that prompt and text may have together; None if there is no limit."""
        limits = [self.manifest.context_length] if self._bounded else []
        if options.max_length is not None and options.max_new_tokens is None:
            limits.append(options.max_length)
        return min(limits, default=None)

    def _sequence(
        self, ids: list[int], options: GenerationConfig, number: int
    ) -> GeneratedSequence:
        """Make the sequence of one prompt.

        Args:
            ids: Token ids of the prompt.
            options: Complete options; see `_options`.
            number: Number of the prompt in its batch.
        """
        context_length = self.manifest.context_length
        longest = self._longest(options)
        if longest is not None and len(ids) > longest:
            limit = f"the context length of {context_length}"
            if longest != context_length or not self._bounded:
                limit = f"max_length, which is {longest}"
            raise InputError(f"the prompt has {len(ids)} tokens, more than {limit}")
        wanted = options.max_new_tokens
        if longest is not None:
            room = longest - len(ids)
            wanted = room if wanted is None else min(wanted, room)
        elif wanted is None:
            # Without this, only an end-of-text token would end the text.
            wanted = context_length
        return GeneratedSequence(
            ids, wanted, options, self._defaults.eos_token_ids, self._tokenizer, number
        )
