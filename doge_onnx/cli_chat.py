"""The answers of a conversation: prints them, and lets Ctrl-C end them in a terminal.

Knows signals. Does not know models: an answer is an iterator of pieces.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Generator, Iterator
from types import FrameType
from typing import TYPE_CHECKING

from doge_onnx import cli_output

if TYPE_CHECKING:
    from doge_onnx.runtime.generation.output import Piece


def print_answer(answer: Generator[Piece, None, None], *, interactive: bool) -> None:
    """Print an answer piece by piece.

    Args:
        answer: The answer.
        interactive: Ctrl-C ends the answer, and not the command.
    """
    with (
        contextlib.closing(answer),
        _interruptions(interactive) as interrupted,
        cli_output.growing_text() as write,
    ):
        for piece in answer:
            write(piece.text)
            if interrupted.is_set():
                break


@contextlib.contextmanager
def _interruptions(interactive: bool) -> Iterator[threading.Event]:
    """A context in which Ctrl-C sets an event: an exception in a step would lose the state."""
    interrupted = threading.Event()
    if not interactive:
        yield interrupted
        return

    def note(_number: int, _frame: FrameType | None) -> None:
        interrupted.set()

    previous = signal.signal(signal.SIGINT, note)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, previous)
