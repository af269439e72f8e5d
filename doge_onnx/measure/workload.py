"""The workload of a measurement: random prompts of given lengths, and a given number of steps.

Does not know what is measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from doge_onnx.runtime.generation.config import GenerationConfig
from doge_onnx.runtime.generation.output import Completion
from doge_onnx.runtime.model import Model

# Greedy whatever the bundle recommends, and nothing ends a text, so that each run has the number of
# steps that the caller asked for, and no logits processor.
_PLAIN = GenerationConfig(
    temperature=0,
    min_new_tokens=0,
    max_time=1e9,
    repetition_penalty=1,
    encoder_repetition_penalty=1,
    no_repeat_ngram_size=0,
    encoder_no_repeat_ngram_size=0,
    bad_words_ids=(),
    suppress_tokens=(),
    begin_suppress_tokens=(),
    sequence_bias=(),
    forced_bos_token_id=(),
    forced_eos_token_id=(),
    remove_invalid_values=False,
    stop=(),
    ignore_eos=True,
)


@dataclass(frozen=True)
class Spread:
    """Median, minimum and maximum of a figure that was measured several times."""

    median: float
    min: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of at least one value."""
        return cls(float(np.median(values)), float(min(values)), float(max(values)))


class Cell(NamedTuple):
    """One measurement: a batch of `batch` prompts of `context` tokens each."""

    context: int
    batch: int


def random_prompts(cell: Cell, vocab_size: int) -> list[list[int]]:
    """Token ids `[batch, context]`; the same for each call with the same cell."""
    ids: list[list[int]] = np.random.default_rng(cell).integers(0, vocab_size, cell[::-1]).tolist()
    return ids


def generate_plain(model: Model, prompts: list[list[int]], count: int) -> list[Completion]:
    """Generate `count` tokens greedily, or fewer if the context ends, whatever the bundle says."""
    return model.generate_batch(prompts, _PLAIN, max_new_tokens=count)
