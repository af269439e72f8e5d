"""Stop strings in a text that grows piece by piece.

Knows strings, some of which are hidden: they are part of the text in which stop strings are looked
for, but not of the text that is returned. Does not know tokens.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopFinder:
    """Ends a text before its first stop string, however the text is cut into pieces.

    The first stop string is the one that is complete first; if several end at the same place, the
    longest of them.

    Attributes:
        found: Whether the text has ended.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        """Begin a text that ends before any of `stops`, none of which is empty."""
        self.found = False
        self._stops = stops
        # What may be the beginning of a stop string: all of it, and where it is hidden.
        self._held = ""
        self._hidden: list[bool] = []

    def push(self, text: str, hidden: bool = False) -> str:
        """Add text; returns the text, but for hidden parts, that is certainly before any stop.

        Args:
            text: What follows the text so far.
            hidden: Whether it is only looked at, such as a special token.
        """
        if self.found:
            return ""
        if not self._stops:
            return "" if hidden else text
        self._held += text
        self._hidden += [hidden] * len(text)
        held = self._held
        matches = [
            (start + len(stop), start) for stop in self._stops if (start := held.find(stop)) >= 0
        ]
        if matches:
            self.found = True
            before = self._release(min(matches)[1])
            self._held, self._hidden = "", []
            return before
        return self._release(len(held) - max(_overlap(held, stop) for stop in self._stops))

    def flush(self) -> str:
        """Return the text held back, which did not become a stop string."""
        return self._release(len(self._held))

    def _release(self, end: int) -> str:
        """Drop the first `end` characters that are held, and return those that are not hidden."""
        shown = "".join(
            char
            for char, hidden in zip(self._held[:end], self._hidden[:end], strict=True)
            if not hidden
        )
        self._held, self._hidden = self._held[end:], self._hidden[end:]
        return shown


def _overlap(text: str, stop: str) -> int:
    """Length of the longest suffix of `text` that is a proper prefix of `stop`."""
    return next(
        size for size in range(min(len(stop) - 1, len(text)), -1, -1) if text.endswith(stop[:size])
    )
