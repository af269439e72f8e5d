"""Runners of every kind for a bundle, models that run on them, and a look at what is fed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from doge_onnx.bundle import Bundle
from doge_onnx.runtime.cuda.device_memory import DeviceMemory
from doge_onnx.runtime.cuda.runner import CudaGrowingRunner
from doge_onnx.runtime.engine.growing_runner import GrowingRunner
from doge_onnx.runtime.engine.runner import Runner
from doge_onnx.runtime.engine.session import open_session
from doge_onnx.runtime.generation.defaults import Defaults
from doge_onnx.runtime.model import Model


class PassingSession:
    """The session of a bundle, for children that do more than that when the graph runs."""

    def __init__(self, path: Path) -> None:
        self.session = open_session(Bundle.open(path))

    def __getattr__(self, name):
        return getattr(self.session, name)


class WatchedSession(PassingSession):
    """The session of a bundle with a state that is extended in place, and what it is fed.

    Attributes:
        batches: Number of sequences of each run.
        bound: How many sets of state tensors it was bound to.
        hook: Called before each run, and may raise what the run shall.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.batches: list[int] = []
        self.bound = 0
        self.hook: Callable[[], None] = lambda: None

    def io_binding(self):
        self.bound += 1
        return self.session.io_binding()

    def run_with_iobinding(self, binding, options=None):
        self.hook()
        self.session.run_with_iobinding(binding, options)
        # Of all outputs, logits alone have three axes.
        (shape,) = (value.shape() for value in binding.get_outputs() if len(value.shape()) == 3)
        self.batches.append(shape[0])


def on_host(path: Path, session=None, **options) -> GrowingRunner:
    """A runner for a bundle with a state that is extended in place, maybe on another session."""
    bundle = Bundle.open(path)
    session = open_session(bundle) if session is None else session
    return GrowingRunner(session, bundle.manifest, **options)


def on_device(path: Path, kind=CudaGrowingRunner, chunk: int = 4, session=None, **options):
    """A runner whose state is in the memory of a device, which is the CPU.

    Args:
        path: Of the bundle.
        kind: Class of the runner.
        chunk: Most tokens of a sequence that go through the graph at once.
        session: In the place of the usual one.
        options: Others of that class.
    """
    bundle = Bundle.open(path)
    session = open_session(bundle) if session is None else session
    return kind(session, bundle.manifest, DeviceMemory("cpu"), chunk, **options)


def model_on(path: Path, runner: Runner) -> Model:
    """A model without a tokenizer, on a runner of one's own."""
    bundle = Bundle.open(path)
    return Model(bundle, runner, Defaults.read(bundle), None)
