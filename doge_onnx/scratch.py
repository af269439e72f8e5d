"""Directories that stand beside a place until they are complete and can take it.

Knows how such a directory is named, who owns it, and which ones a killed process has left. Does not
know what is in it. The owner holds a lock that the system releases however its process ends, so
neither a process id that is used again nor a process on another machine is mistaken for it. Where
a file system has no locks, nothing that was left is removed.
"""

from __future__ import annotations

import contextlib
import errno
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

UNFINISHED = "part"
REPLACED = "old"
_LOCK = ".lock"
# What a file system without locks answers.
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL)


@contextlib.contextmanager
def parents(place: Path) -> Iterator[None]:
    """Make the missing directories above `place`; if the block fails, remove them again.

    Raises:
        OSError: One of them cannot be made.
    """
    made: list[Path] = []
    try:
        missing = [each for each in place.parents if not each.is_dir()]
        for each in reversed(missing):
            # Another process may be as far.
            with contextlib.suppress(FileExistsError):
                each.mkdir()
                made.append(each)
        yield
    except BaseException:
        for each in reversed(made):
            # Not empty: somebody else uses it by now.
            with contextlib.suppress(OSError):
                each.rmdir()
        raise


@contextlib.contextmanager
def beside(place: Path) -> Iterator[Path]:
    """Yield a new directory beside `place`, and remove it in the end if it is still there.

    Raises:
        OSError: It cannot be made.
    """
    path = _unused(place, UNFINISHED)
    with _owned(path):
        try:
            path.mkdir()
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)


def replace(path: Path, place: Path) -> None:
    """Rename `path` to `place`; what was there is removed only once the new one is in place.

    Raises:
        OSError: One of them cannot be renamed; `place` is then as it was.
    """
    if not place.exists():
        path.rename(place)
        return
    retired = _unused(place, REPLACED)
    with _owned(retired):
        try:
            place.rename(retired)
            path.rename(place)
        except BaseException:
            if retired.exists() and not place.exists():
                retired.rename(place)
            raise
        shutil.rmtree(retired, ignore_errors=True)


def remove_abandoned(place: Path, kind: str) -> None:
    """Remove the directories beside `place` that no living process owns.

    Args:
        place: What they were to become, or were.
        kind: `UNFINISHED` or `REPLACED`.
    """
    from filelock import FileLock, Timeout

    try:
        found = list(place.parent.iterdir())
    # It may be written, but not listed.
    except OSError:
        return
    for path in found:
        name = path.name.removesuffix(_LOCK)
        if not _is_beside(place, name, kind):
            continue
        path = path.with_name(name)
        lock = _lock_file(path)
        try:
            with FileLock(lock, blocking=False):
                shutil.rmtree(path, ignore_errors=True)
                # While it is held: a new owner cannot come, since no name is used twice.
                lock.unlink(missing_ok=True)
        # Its owner lives, the system has no locks here, or this is another user's.
        except (Timeout, OSError, NotImplementedError):
            continue


def _is_beside(place: Path, name: str, kind: str) -> bool:
    start, end = f".{place.name}.", f".{kind}"
    middle = name[len(start) : len(name) - len(end)]
    return (
        name.startswith(start)
        and name.endswith(end)
        and len(middle) == 8
        and set(middle) <= set("0123456789abcdef")
    )


def _unused(place: Path, kind: str) -> Path:
    """A name that is free, on the same disk as `place`."""
    return place.parent / f".{place.name}.{secrets.token_hex(4)}.{kind}"


def _lock_file(path: Path) -> Path:
    return path.with_name(path.name + _LOCK)


@contextlib.contextmanager
def _owned(path: Path) -> Iterator[None]:
    """Hold the lock of a directory, which must not exist yet."""
    from filelock import FileLock

    lock = _lock_file(path)
    held = FileLock(lock, blocking=False)
    try:
        held.acquire()
    # Without locks, work goes on; only nobody can tell later whose the directory was.
    except NotImplementedError:
        pass
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    try:
        yield
    finally:
        held.release()
        lock.unlink(missing_ok=True)
