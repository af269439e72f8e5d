"""What a sequence was fed, and the state after it, from one run to the next.

Knows how much of a prompt a state has already. Does not know what runs the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from doge_onnx.runtime.engine.runner import Runner
from doge_onnx.runtime.engine.state import State


@dataclass
class PrefixCache:
    """The last run of a single sequence.

    Attributes:
        tokens: Token ids that it was fed.
        state: The state after them; None if there are none.
    """

    tokens: Sequence[int] = ()
    state: State | None = None

    def take(self, runner: Runner, prompt: Sequence[int]) -> State | None:
        """The state after the first tokens of a prompt, as many as are known.

        The last token is never among them: its logits are wanted. What is taken is gone from
        here, so that a run which fails leaves nothing half-right behind.
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
        """Remember a run for the next one."""
        self.tokens, self.state = tokens, state
