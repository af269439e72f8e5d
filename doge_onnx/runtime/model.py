"""A loaded bundle: `forward`, `generate`, `stream` and `chat`.

Knows how the parts of the runtime fit together and what a caller may pass. The parts
themselves are elsewhere: sessions, steps and states, options, sampling, text, chat templates.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from doge_onnx.bundle import Bundle, Manifest
from doge_onnx.errors import InputError
from doge_onnx.runtime.chat import Chat
from doge_onnx.runtime.engine.device import AUTO
from doge_onnx.runtime.engine.input_checks import check_room, check_state, token_mask, token_matrix
from doge_onnx.runtime.engine.loader import open_runner
from doge_onnx.runtime.engine.runner import Runner
from doge_onnx.runtime.engine.state import State
from doge_onnx.runtime.generation.config import Defaults, Options
from doge_onnx.runtime.generation.loop import Row
from doge_onnx.runtime.generation.output import Completion, Piece, Transcript, generate_pieces
from doge_onnx.runtime.generation.sampling import Sampler, greedy, make_sampler, repetition_penalty
from doge_onnx.runtime.text.chat_template import ChatTemplate
from doge_onnx.runtime.text.tokenizer import TextStream, Tokenizer

# Lists and tuples rather than any sequence: a str is a sequence of str, too.
Messages = list[dict[str, Any]] | list[dict[str, str]]
Prompt = str | list[int] | tuple[int, ...] | NDArray[np.integer[Any]] | Messages
Prompts = list[str] | list[list[int]] | tuple[str | list[int], ...] | list[Messages]

# Of a context, what an answer in a conversation shall have at least, in hundredths.
_ANSWER_SHARE = 25


def load(
    bundle: str | Path,
    device: str = AUTO,
    threads: int | None = None,
    prefill_chunk: int | None = None,
    verbose: bool = False,
    cuda_graph: bool | None = None,
) -> Model:
    """Load a bundle. See `doge_onnx.load`."""
    opened = Bundle.open(bundle)
    defaults = Defaults.read(opened)
    path = opened.file("tokenizer.json")
    tokenizer = None if path is None else Tokenizer(path)
    runner = open_runner(opened, device, threads, prefill_chunk, verbose, cuda_graph)
    return Model(opened, runner, defaults, tokenizer)


class Model:
    """A language model that is ready to run. Made by `doge_onnx.load`.

    May be used from several threads: all that a run changes is in its states.
    """

    def __init__(
        self, bundle: Bundle, runner: Runner, defaults: Defaults, tokenizer: Tokenizer | None
    ) -> None:
        self._bundle = bundle
        self._runner = runner
        self._defaults = defaults
        self._tokenizer = tokenizer
        # A state of constant size has no end of the context.
        self._bounded = bundle.manifest.state.kind != "window"

    @property
    def device(self) -> str:
        """Where the model runs: "cpu" or "cuda"."""
        return self._runner.device

    @property
    def reason_for_cpu(self) -> str | None:
        """Why the device "auto" is the CPU, where the bundle or the installation is for CUDA."""
        return self._runner.reason_for_cpu

    @property
    def cuda_graph(self) -> bool:
        """Whether CUDA captures decode steps once and replays them."""
        return self._runner.captures

    @property
    def manifest(self) -> Manifest:
        """What the bundle says of itself."""
        return self._bundle.manifest

    def forward(
        self,
        input_ids: ArrayLike,
        state: State | None = None,
        logits: Literal["last", "all"] = "last",
        attention_mask: ArrayLike | None = None,
    ) -> tuple[NDArray[np.float32], State]:
        """Feed tokens to the model; prefill and decode alike.

        However a text is cut into calls, the logits are the same.

        Args:
            input_ids: Token ids `[B, S]`, whole numbers.
            state: The state that an earlier call returned, of the same B sequences, or
                None at their start. It is not changed: it may be continued again.
            logits: "last" for the last position only, "all" for every one.
            attention_mask: `[B, S]`, 1 for a token and 0 for padding, wherever that is, for the
                new ids alone: the state remembers what it was for the earlier ones. Padding is
                left out: nothing ever attends to it, and it is no position. None: no padding.

        Returns:
            Logits, float32 `[B, 1, V]`, those of the last token of each sequence, or `[B, S, V]`;
            0 where a sequence has no token. And the state after these tokens.

        Raises:
            InputError: Ids outside of the vocabulary, shapes or types that do not fit, a
                state that does not fit, or more tokens than the context length.
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
        rows, state = self._runner.feed(tokens, state, last_only=logits == "last")
        if mask is None:
            return rows[0][np.newaxis] if len(rows) == 1 else np.stack(rows), state
        columns = 1 if logits == "last" else ids.shape[1]
        out = np.zeros((len(ids), columns, self.manifest.vocab_size), np.float32)
        for number, row in enumerate(rows):
            where = mask[number] if logits == "all" else slice(len(row))
            out[number, where] = row
        return out, state

    @overload
    def generate(
        self,
        prompt: Prompt,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
        logprobs: bool = False,
    ) -> Completion: ...

    @overload
    def generate(
        self,
        prompt: Prompts,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
        logprobs: bool = False,
    ) -> list[Completion]: ...

    def generate(
        self,
        prompt: Prompt | Prompts,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
        logprobs: bool = False,
    ) -> Completion | list[Completion]:
        """Continue a prompt, or a batch of them.

        Options that are None follow the bundle's generation_config.json; where that says
        nothing, generation is greedy and goes on to the end of the context. A temperature
        above 0, or one of top_k, top_p and min_p without any temperature, means sampling.

        Args:
            prompt: A str or the ids of its tokens is one prompt, and so is a conversation: a
                list of messages, `[{"role": "user", "content": "Hello"}]`, which the bundle's
                chat template makes a prompt of. A list of prompts is a batch. Greedily, each
                prompt of a batch gets what it would get alone.
            max_new_tokens: Most tokens to generate. The end of the context ends a text
                before that.
            temperature: Divides the logits; 0 is greedy.
            top_k: Sample from the k most likely tokens.
            top_p: Sample from the most likely tokens that have this probability together.
            min_p: Sample from tokens at least this many times as likely as the best.
            repetition_penalty: Above 1 makes tokens of the prompt and the text less likely.
            seed: The same seed gives the same text. Each prompt of a batch draws numbers
                of its own, the first one those that it would draw alone.
            stop: A string, or several, that end the text; it ends before them.
            logprobs: Also return the log-probability of each token.

        Returns:
            One completion, or for a batch a list with one for each prompt.

        Raises:
            InputError: An empty prompt, one longer than the context, ids outside of the
                vocabulary, text without a tokenizer, messages without a chat template or that
                it refuses, or an option out of its range.
            BundleError: The chat template is no good.
        """
        options = self._defaults.resolve(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
            stop=stop,
            logprobs=logprobs,
        )
        batch = _is_batch(prompt)
        prompts: Sequence[Any] = prompt if batch else [prompt]  # type: ignore[assignment]
        transcripts = []
        for row, one in enumerate(prompts):
            try:
                transcripts.append(self._transcript(one, options, row))
            except InputError as error:
                raise InputError(f"prompt {row}: {error}" if batch else str(error)) from None
        pieces: list[list[Piece]] = [[] for _ in prompts]
        for row, piece in generate_pieces(self._runner, transcripts, options.logprobs):
            pieces[row].append(piece)
        completions = [Completion.join(row_pieces) for row_pieces in pieces]
        return completions if batch else completions[0]

    def stream(
        self,
        prompt: Prompt,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
        logprobs: bool = False,
    ) -> Iterator[Piece]:
        """Continue one prompt piece by piece; the options are those of `generate`.

        Yields:
            One `Piece`, a str, per token; it is empty while a character or what could
            become a stop string is incomplete. Together they are the text that `generate`
            returns. The last one has the finish_reason.

        Raises:
            InputError: See `generate`; raised by this call, not by the first iteration.
        """
        options = self._defaults.resolve(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
            stop=stop,
            logprobs=logprobs,
        )
        if _is_batch(prompt):
            raise InputError("stream takes one prompt; pass a batch to generate")
        transcript = self._transcript(prompt, options, 0)
        return (p for _, p in generate_pieces(self._runner, [transcript], options.logprobs))

    def chat(
        self,
        system: str | None = None,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
    ) -> Chat:
        """Begin a conversation, of which each turn feeds what is new in it and no more.

        `system` is what the model is told before the conversation; None is nothing. The options
        are those of `generate`, for all answers.

        Raises:
            InputError: The bundle has no chat template or no tokenizer, or an option is out of
                its range.
            BundleError: The chat template is no good.
        """
        options = self._defaults.resolve(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
            stop=stop,
            logprobs=False,
        )
        context_length = self.manifest.context_length
        answer = context_length * _ANSWER_SHARE // 100
        if options.max_new_tokens is not None:
            answer = min(answer, options.max_new_tokens)
        return Chat(
            self._runner,
            self._chat_template,
            self._text_tokenizer,
            lambda ids, turn: self._transcript(ids, options, turn),
            context_length - answer if self._bounded else None,
            system,
        )

    def apply_chat_template(self, messages: Messages, add_generation_prompt: bool = True) -> str:
        """The prompt that `generate` makes of a conversation, as text with its special tokens.

        Args:
            messages: See `generate`.
            add_generation_prompt: End with what an answer begins with.

        Raises:
            InputError: The bundle has no chat template, or the template refuses the messages.
            BundleError: The chat template is no good.
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

    @property
    def _text_tokenizer(self) -> Tokenizer:
        if self._tokenizer is None:
            raise InputError(
                f"{self._bundle.path} has no tokenizer.json; pass token ids instead of text"
            )
        return self._tokenizer

    def _transcript(self, prompt: Any, options: Options, row: int) -> Transcript:
        """Everything that one prompt needs to run."""
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
            # Nothing but an end-of-text token would end the text.
            wanted = context_length
        penalty = options.repetition_penalty
        return Transcript(
            Row(
                prompt=ids,
                max_new_tokens=wanted,
                sampler=_sampler(options, row),
                processors=() if penalty is None else (repetition_penalty(penalty),),
                candidates=1 if options.temperature == 0 else options.top_k,
            ),
            self._defaults.eos_token_ids,
            None if self._tokenizer is None else TextStream(self._tokenizer, ids),
            options.stop,
        )

    def _prompt_ids(self, prompt: Any) -> list[int]:
        if isinstance(prompt, str):
            tokenizer = self._text_tokenizer
            ids = tokenizer.encode(prompt) if prompt else []
        elif _is_conversation(prompt):
            text = self.apply_chat_template(prompt)
            ids = self._text_tokenizer.encode(text, add_special_tokens=False)
        else:
            ids = list(prompt)
        if not ids:
            raise InputError("the prompt is empty; at least one token is needed")
        for token_id in ids:
            if isinstance(token_id, bool) or not isinstance(token_id, int | np.integer):
                raise InputError(f"token ids are whole numbers, not {type(token_id).__name__}")
        checked: list[int] = token_matrix([ids], self.manifest.vocab_size)[0].tolist()
        return checked


def _is_batch(prompt: Any) -> bool:
    """Whether a prompt is really a list of prompts; whether it is a valid one shows later.

    Raises:
        InputError: It is no list, array or text.
    """
    if isinstance(prompt, str):
        return False
    if not isinstance(prompt, list | tuple | np.ndarray) or (
        isinstance(prompt, np.ndarray) and prompt.ndim == 0
    ):
        raise InputError(
            "a prompt must be text, a list of token ids or a list of messages, not "
            f"{type(prompt).__name__}"
        )
    return len(prompt) > 0 and all(isinstance(p, str | list | tuple | np.ndarray) for p in prompt)


def _is_conversation(prompt: Any) -> bool:
    """Whether a prompt is messages; whether they are valid ones shows later."""
    return isinstance(prompt, list | tuple) and any(isinstance(m, Mapping) for m in prompt)


def _sampler(options: Options, row: int) -> Sampler:
    if options.temperature == 0:
        return greedy
    rng = np.random.default_rng(None if options.seed is None else [options.seed, row])
    return make_sampler(rng, options.temperature, options.top_k, options.top_p, options.min_p)
