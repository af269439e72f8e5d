"""What ends a bundle's texts, and what its generation_config.json asks for in vain.

Knows the files of a bundle that say so, for people who look at it. Does not run the model.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

from doge_onnx.bundle import Bundle
from doge_onnx.errors import BundleError
from doge_onnx.runtime.generation.defaults import Defaults
from doge_onnx.runtime.text.chat_template import special_tokens
from doge_onnx.runtime.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class EndToken:
    """A token that ends a text.

    Attributes:
        id: Its id.
        text: As the tokenizer spells it; None if it does not know the id, or there is none.
    """

    id: int
    text: str | None


@dataclass(frozen=True)
class TextEnds:
    """What ends a bundle's texts.

    Attributes:
        tokens: Those that end a text, by generation_config.json or config.json.
        stop: Strings that end a text, by generation_config.json.
        other: The tokenizer's own token for the end of a text, if it is none of `tokens`.
        defaults: All that the files recommend.
    """

    tokens: tuple[EndToken, ...]
    stop: tuple[str, ...]
    other: EndToken | None
    defaults: Defaults

    @classmethod
    def read(cls, bundle: Bundle) -> TextEnds:
        """Read them from the files of a bundle.

        Raises:
            BundleError: A file that recommends options has an invalid value.
        """
        defaults = Defaults.read(bundle)
        tokenizer, path = None, bundle.file("tokenizer.json")
        # What a bundle holds is shown even if one of its files is damaged.
        with contextlib.suppress(BundleError):
            tokenizer = None if path is None else Tokenizer(path)

        def token(token_id: int) -> EndToken:
            return EndToken(token_id, None if tokenizer is None else tokenizer.token(token_id))

        other = None
        own = special_tokens(bundle).get("eos_token")
        if own is not None and tokenizer is not None:
            own_id = tokenizer.token_id(own)
            if own_id is not None and own_id not in defaults.eos_token_ids:
                other = token(own_id)
        return cls(
            tuple(map(token, sorted(defaults.eos_token_ids))),
            tuple(defaults.recommended.stop or ()),
            other,
            defaults,
        )
