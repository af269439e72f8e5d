"""The Doge checkpoint in transformers, in float32 and with its default attention."""

from __future__ import annotations

import time
from importlib.metadata import version
from typing import Any

import torch
import transformers
from peer import About, Job
from transformers.generation.streamers import BaseStreamer


def build(job: Job) -> None:
    """Nothing: the checkpoint is there."""


def load(job: Job) -> Checkpoint:
    """Load the checkpoint."""
    return Checkpoint(job)


class Checkpoint:
    """A loaded checkpoint."""

    def __init__(self, job: Job) -> None:
        torch.set_num_threads(job.threads)
        model: Any = transformers.DogeForCausalLM.from_pretrained(
            job.checkpoint, dtype=torch.float32
        )
        self.model = model.eval()

    def about(self) -> About:
        """What there is to know of it."""
        return About(
            {name: version(name) for name in ("transformers", "torch")},
            f"its attention is {self.model.config._attn_implementation}, by default",
        )

    @torch.no_grad()
    def decode(self, prompts: list[list[int]], tokens: int) -> float:
        """Seconds per step of `generate`."""
        clock = Clock()
        self.model.generate(
            torch.tensor(prompts),
            attention_mask=torch.ones(len(prompts), len(prompts[0]), dtype=torch.int64),
            max_new_tokens=1 + tokens,
            do_sample=False,
            streamer=clock,
        )
        # The prompt itself comes first, then the token that prefill makes.
        _, first, *rest = clock.times
        if len(rest) != tokens:
            raise RuntimeError(f"{len(rest)} tokens instead of {tokens}")
        return (rest[-1] - first) / tokens

    @torch.no_grad()
    def prefill(self, prompt: list[int]) -> float:
        """Seconds for the prompt, computing the last logits only."""
        started = time.perf_counter()
        self.model(torch.tensor([prompt]), logits_to_keep=1)
        return time.perf_counter() - started


class Clock(BaseStreamer):
    """Notes when each piece of a text arrives."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        """A token, or the prompt."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """The text is complete."""
