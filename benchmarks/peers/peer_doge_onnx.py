"""Bundles of this package."""

from __future__ import annotations

import time
from importlib.metadata import version

from peer import About, Job

import doge_onnx
from doge_onnx.measure.workload import generate_plain


def build(job: Job) -> None:
    """Export the checkpoint."""
    doge_onnx.export(job.checkpoint, job.model, verify=False, **job.options)


def load(job: Job) -> Bundle:
    """Load the bundle."""
    return Bundle(job)


class Bundle:
    """A loaded bundle."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.model = doge_onnx.load(job.model, threads=job.threads)

    def about(self) -> About:
        """What there is to know of it."""
        manifest = self.model.manifest
        return About(
            {name: version(name) for name in ("doge-onnx", "onnxruntime", "numpy")},
            f"its KV cache is in {manifest.state.dtype}",
            manifest.weights_read.step_bytes(1),
            manifest.state.token_bytes,
        )

    def decode(self, prompts: list[list[int]], tokens: int) -> float:
        """Seconds per step that a consumer of the stream waits, or the generation of a batch."""
        if len(prompts) > 1:
            timings = generate_plain(self.model, prompts, 1 + tokens)[0].timings
            return timings.decode_seconds / tokens
        (prompt,) = prompts
        pieces = self.model.stream(prompt, max_new_tokens=1 + tokens, temperature=0.0)
        next(pieces)
        started = time.perf_counter()
        count = sum(1 for _ in pieces)
        seconds = time.perf_counter() - started
        if count != tokens:
            raise RuntimeError(f"{count} tokens instead of {tokens}")
        return seconds / tokens

    def prefill(self, prompt: list[int]) -> float:
        """Seconds for the prompt in one call."""
        started = time.perf_counter()
        self.model.forward([prompt])
        return time.perf_counter() - started
