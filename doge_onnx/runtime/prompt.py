"""Makes token ids of what a caller wants continued: text, token ids or messages.

Knows the tokenizer, the chat template and how a text begins. Does not know the model.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from doge_onnx.bundle import Bundle
from doge_onnx.errors import InputError
from doge_onnx.runtime.engine.input_checks import token_matrix
from doge_onnx.runtime.generation.defaults import GENERATION_CONFIG_NAME
from doge_onnx.runtime.text.chat_template import ChatTemplate
from doge_onnx.runtime.text.tokenizer import Tokenizer

# Lists and tuples, not Sequence: a str is a sequence of str, too.
Messages = list[dict[str, Any]] | list[dict[str, str]]
Prompt = str | list[int] | tuple[int, ...] | NDArray[np.integer[Any]] | Messages


@dataclass(frozen=True)
class Rendering:
    """How messages become a prompt; see `ChatTemplate.render`.

    Attributes:
        continue_final_message: Whether the text goes on with the final message, or the name of its
            field that it goes on with.
        variables: Further variables of the chat template.
    """

    continue_final_message: bool | str = False
    variables: Mapping[str, Any] | None = None


class PromptReader:
    """Makes token ids of prompts, with the files of one bundle.

    Args:
        bundle: An opened bundle.
        tokenizer: Its tokenizer; None if it has none.
    """

    def __init__(self, bundle: Bundle, tokenizer: Tokenizer | None) -> None:
        self._bundle = bundle
        self._tokenizer = tokenizer

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer.

        Raises:
            InputError: There is none.
        """
        if self._tokenizer is None:
            raise InputError(
                f"{self._bundle.path} has no tokenizer.json; pass token ids instead of text"
            )
        return self._tokenizer

    @functools.cached_property
    def template(self) -> ChatTemplate:
        """The chat template.

        Raises:
            InputError: There is none.
            BundleError: It cannot be read.
        """
        template = ChatTemplate.read(self._bundle)
        if template is None:
            raise InputError(
                f"{self._bundle.path} has no chat template, so it takes text and no messages; "
                "instruction-tuned models have one"
            )
        return template

    def token_ids(self, prompt: Any, rendering: Rendering) -> list[int]:
        """The token ids of a prompt, at least one; see `Model.generate`.

        Raises:
            InputError: See `Model.generate`.
            BundleError: See `Model.generate`.
        """
        ids: Any
        if not isinstance(prompt, str | list | tuple | np.ndarray) or (
            isinstance(prompt, np.ndarray) and prompt.ndim == 0
        ):
            raise InputError(
                "a prompt must be text, a list of token ids or a list of messages, not "
                f"{type(prompt).__name__}"
            )
        if isinstance(prompt, list | tuple) and any(isinstance(m, Mapping) for m in prompt):
            text = self.template.render(
                prompt,
                continue_final_message=rendering.continue_final_message,
                variables=rendering.variables,
            )
            ids = self.tokenizer.encode(text, add_special_tokens=False)
        elif rendering.continue_final_message or rendering.variables:
            raise InputError(
                "this prompt is no conversation: only a chat template has variables, and only "
                "messages have a final one to continue"
            )
        elif isinstance(prompt, str):
            ids = self.tokenizer.encode(prompt) or self._beginning()
        else:
            ids = prompt
        if len(ids) == 0:
            raise InputError("the prompt is empty; at least one token is needed")
        if all(isinstance(entry, str | list | tuple | np.ndarray) for entry in ids):
            raise InputError("this is a list of prompts; generate_batch takes those")
        size = self._bundle.manifest.vocab_size
        for token_id in ids:
            if isinstance(token_id, bool) or not isinstance(token_id, int | np.integer):
                raise InputError(f"token ids are whole numbers, not {type(token_id).__name__}")
            if token_id >= size and self._tokenizer is not None:
                token = self._tokenizer.token(int(token_id))
                if token is not None:
                    raise InputError(
                        f"the prompt has the token {token!r} ({token_id}), which the tokenizer "
                        f"knows and the model does not: it has {size} tokens"
                    )
        checked: list[int] = token_matrix([ids], size)[0].tolist()
        return checked

    def _beginning(self) -> list[int]:
        """The token that an empty text begins with, as in transformers; empty if there is none."""
        vocabulary = range(self._bundle.manifest.vocab_size)
        for name in (GENERATION_CONFIG_NAME, "config.json"):
            token_id = self._bundle.read_json(name).get("bos_token_id")
            if isinstance(token_id, int) and token_id is not True and token_id in vocabulary:
                return [int(token_id)]
        return []
