"""The two sides of a conversation on a terminal or a pipe: lines in, answers out, Ctrl-C between.

Does not know models: an answer is an iterator of pieces of text.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Generator, Iterator
from types import FrameType
from typing import TYPE_CHECKING

from doge_onnx.errors import InputError

if TYPE_CHECKING:
    from doge_onnx.runtime.generation.output import Piece

_PROMPT = "> "


def messages() -> Iterator[str]:
    """What the user says, line by line, until Ctrl-D or the end of the pipe.

    Raises:
        InputError: What is piped in is not UTF-8.
    """
    lines = _typed() if sys.stdin.isatty() else _piped()
    return (line for line in lines if line.strip())


def decode(data: bytes) -> str:
    """Text that was piped in: not by way of sys.stdin's own encoding, which is the locale's.

    Raises:
        InputError: It is not UTF-8.
    """
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"standard input is not UTF-8 text: {error}") from None


def print_answer(answer: Generator[Piece, None, None]) -> None:
    """Print an answer piece by piece, until it ends or Ctrl-C is pressed."""
    with contextlib.closing(answer), _interruptions() as interrupted:
        try:
            for piece in answer:
                sys.stdout.write(piece.text)
                sys.stdout.flush()
                if interrupted.is_set():
                    break
        finally:
            sys.stdout.write("\n")
            sys.stdout.flush()


@contextlib.contextmanager
def _interruptions() -> Iterator[threading.Event]:
    """Note Ctrl-C rather than raise it: in the midst of a step it would cost the state."""
    interrupted = threading.Event()

    def note(_number: int, _frame: FrameType | None) -> None:
        interrupted.set()

    previous = signal.signal(signal.SIGINT, note)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, previous)


def _typed() -> Iterator[str]:
    # Arrow keys and a history of lines, where the system has them.
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - input() uses it once it is imported
    while True:
        try:
            yield input(_PROMPT)
        except KeyboardInterrupt:
            # Gives up the line, as in a shell.
            sys.stdout.write("\n")
        except EOFError:
            sys.stdout.write("\n")
            return


def _piped() -> Iterator[str]:
    return (decode(line).rstrip("\r\n") for line in sys.stdin.buffer)
