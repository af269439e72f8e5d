"""The number of threads that PyTorch uses, for a while.

Knows PyTorch's setting, which belongs to the whole process. Does not know how many threads there
should be (`threads` of the runtime).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from doge_onnx.runtime.engine.threads import preferred_threads


@contextlib.contextmanager
def thread_limit(most: int | None = None) -> Iterator[None]:
    """A context, or a decorator, in which PyTorch uses no more than `most` threads.

    Args:
        most: None for as many as a model would use. PyTorch does not see the quota of a control
            group: alone, it would start a thread for each core of the machine.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(min(threads, most or preferred_threads() or threads))
    try:
        yield
    finally:
        torch.set_num_threads(threads)
