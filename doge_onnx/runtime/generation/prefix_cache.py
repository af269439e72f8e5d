"""The prefix cache: keeps the state of one sequence for the next prompt.

Knows how many tokens of a prompt the kept state has seen already. Does not know how the model is
run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from doge_onnx.runtime.engine.runner import Runner
from doge_onnx.runtime.engine.state import State


@dataclass
class PrefixCache:
    """The tokens of a single sequence, and the state after them.

    Attributes:
        tokens: Token ids that were fed.
        state: The state after `tokens`; None if the cache is empty.
    """

    tokens: Sequence[int] = ()
    state: State | None = None

    def take(self, runner: Runner, prompt: Sequence[int]) -> State | None:
        """Take the state after the longest beginning of a prompt that the cache holds.

        The last token of the prompt is never included, because the caller needs its logits. The
        cache is empty afterwards, so that a failed run cannot leave a wrong state in it.

        Args:
            runner: The runner that made the cached state.
            prompt: Token ids, at least one.

        Returns:
            The state, whose length says how many tokens of the prompt it has seen; None if the
            cache does not hold the beginning of the prompt.
        """
        tokens, state = self.tokens, self.state
        self.tokens, self.state = (), None
        known = next(
            (i for i, (a, b) in enumerate(zip(tokens, prompt[:-1], strict=False)) if a != b),
            min(len(tokens), len(prompt) - 1),
        )
        if state is None or known == 0:
            return None
        return state if known == len(tokens) else runner.rewind(state, known)

    def put(self, tokens: Sequence[int], state: State) -> None:
        """Keep the tokens of a sequence and the state after them."""
        self.tokens, self.state = tokens, state
