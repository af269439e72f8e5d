"""The ids of special tokens in a config.json or a generation_config.json.

Knows that a file may name a token that the model has not: transformers runs with an id of -1, which
then never occurs. Does not know what the tokens mean.
"""

from __future__ import annotations

from typing import Any


def split_by_vocabulary(value: Any, vocab_size: int) -> tuple[list[int], list[int]]:
    """Read the value of a field that names a token, or several of them.

    Args:
        value: A token id, a list of them, or None for no token.
        vocab_size: Token ids of the model are in `range(vocab_size)`.

    Returns:
        The ids that the model has, and those that it has not, which never occur in a text.

    Raises:
        ValueError: The value is something else.
    """
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(each, int) and not isinstance(each, bool) for each in ids):
        raise ValueError(f"{value!r} is not the id of a token")
    known = [each for each in ids if 0 <= each < vocab_size]
    return known, [each for each in ids if not 0 <= each < vocab_size]
