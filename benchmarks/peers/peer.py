"""Types that the comparison and its workers share: jobs, and the interface of a runtime.

Imported in every environment, so it needs only the standard library.
"""

from __future__ import annotations

import json
import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

# The same for all models of the comparison, and as in the released ones.
HEAD_DIM = 128
CONTEXT_LENGTH = 2048


@dataclass(frozen=True)
class Shape:
    """Sizes that differ between the released models."""

    hidden: int
    middle: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int


@dataclass(frozen=True)
class Job:
    """One model for one runtime.

    Attributes:
        name: Differs between all jobs of a shape.
        shape: Of the model.
        checkpoint: A Doge checkpoint of that shape, for runtimes that can read it.
        directory: Where models are written; all jobs of the shape share it.
        options: What the runtime's module needs to know about the precision.
        threads: Threads to run with.
        batch: Most sequences at once.
    """

    name: str
    shape: Shape
    checkpoint: Path
    directory: Path
    options: dict[str, Any]
    threads: int
    batch: int

    @property
    def model(self) -> Path:
        """Where the model of this job is."""
        return self.directory / self.name

    def to_json(self) -> str:
        """For a command line."""
        return json.dumps(asdict(self), default=str)

    @classmethod
    def from_json(cls, text: str) -> Job:
        """Read what `to_json` wrote."""
        values = json.loads(text)
        paths = {name: Path(values[name]) for name in ("checkpoint", "directory")}
        return cls(**{**values, **paths, "shape": Shape(**values["shape"])})


@dataclass(frozen=True)
class About:
    """What a loaded model says of itself.

    Attributes:
        versions: Of the libraries that run it.
        note: What else a reader of the figures has to know.
        weight_bytes: Bytes of weights that a decode step reads; None if unknown.
        row_bytes: Bytes of the KV cache that a decode step reads for each token of the
            context; None if unknown.
    """

    versions: dict[str, str]
    note: str = ""
    weight_bytes: int | None = None
    row_bytes: int | None = None


class Peer(Protocol):
    """A loaded model."""

    def about(self) -> About:
        """What there is to know of it."""

    def decode(self, prompts: list[list[int]], tokens: int) -> float:
        """Seconds of a step that gives each sequence one more greedy token.

        The mean over `tokens` steps after the prefill, which gives the first token.
        """

    def prefill(self, prompt: list[int]) -> float:
        """Seconds until the logits after the prompt are there."""


class PeerModule(Protocol):
    """What a module `peer_*` has."""

    def build(self, job: Job) -> None:
        """Write the model."""

    def load(self, job: Job) -> Peer:
        """Load what `build` wrote."""


def random_prompt(length: int, seed: int, vocabulary: int) -> list[int]:
    """Token ids, the same for every runtime; none of them is special."""
    return random.Random(seed).choices(range(2, vocabulary), k=length)
