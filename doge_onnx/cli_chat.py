"""A conversation on a terminal or a pipe: reads messages, prints answers, handles Ctrl-C.

Knows terminals and pipes. Does not know models: an answer is an iterator of pieces.
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
    """The user's messages, one for each line, until Ctrl-D or the end of the pipe.

    Raises:
        InputError: The piped text is not UTF-8.
    """
    lines = _typed() if sys.stdin.isatty() else _piped()
    return (line for line in lines if line.strip())


def decode(data: bytes) -> str:
    """Decode piped text as UTF-8, whatever the encoding of the locale.

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
    """A context in which Ctrl-C sets an event: an exception in a step would lose the state."""
    interrupted = threading.Event()

    def note(_number: int, _frame: FrameType | None) -> None:
        interrupted.set()

    previous = signal.signal(signal.SIGINT, note)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, previous)


def _typed() -> Iterator[str]:
    # Gives arrow keys and a history of lines, if the system has readline.
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - input() uses it once it is imported
    while True:
        try:
            yield input(_PROMPT)
        except KeyboardInterrupt:
            # Ctrl-C discards the line, as in a shell.
            sys.stdout.write("\n")
        except EOFError:
            sys.stdout.write("\n")
            return


def _piped() -> Iterator[str]:
    return (decode(line).rstrip("\r\n") for line in sys.stdin.buffer)
