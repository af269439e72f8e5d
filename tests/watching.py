"""What a model is given and chooses, seen by a logits processor."""

from __future__ import annotations


class Watcher:
    """A logits processor that changes nothing and remembers all token ids of each call."""

    def __init__(self):
        self.seen: list[list[int]] = []

    def __call__(self, tokens, logits):
        self.seen.append(tokens.tolist())
        return logits


class Fault(Watcher):
    """One that raises an error in one of its calls, once."""

    def __init__(self, error: BaseException, call: int):
        super().__init__()
        self.error = error
        self.call = call

    def __call__(self, tokens, logits):
        super().__call__(tokens, logits)
        if len(self.seen) == self.call:
            raise self.error
        return logits


def prompt_ids(model, prompt) -> list[int]:
    """The token ids that a model makes of a prompt."""
    watcher = Watcher()
    model.generate(prompt, max_new_tokens=1, processors=[watcher])
    return watcher.seen[0]
