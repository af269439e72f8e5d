"""A checkpoint run by PyTorch, without a graph: a reference to compare bundles with.

Knows how to run the recurrent step and how to sample texts with it. Does not know what is
compared (`verify`, `quality`).
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from doge_onnx.export.checkpoint import Checkpoint
from doge_onnx.export.growing_state import GrowingState
from doge_onnx.export.operators import STANDARD
from doge_onnx.export.step import RecurrentStep
from doge_onnx.export.torch_threads import thread_limit
from doge_onnx.measure.evaluate import sample_text

# Key and value of each layer.
Past = list[tuple[Tensor, Tensor]]


class EagerModel:
    """The recurrent step of a checkpoint, with a growing state.

    Args:
        checkpoint: Keeps its tensors; this model shares them if it needs them as they are.
        context_length: Most tokens that a text may have.
        dtype: Of weights and state.
        name: Of the model in `description`.
        matrices: Element type that matrices are rounded to; None to leave them as they are.

    Attributes:
        description: Name, engine and element type, for a person.
        vocab_size: Token ids are in `range(vocab_size)`.
        context_length: As given.
        state: How a row of its state is laid out.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        context_length: int,
        dtype: torch.dtype = torch.float32,
        name: str = "the checkpoint",
        matrices: torch.dtype | None = None,
    ) -> None:
        checkpoint = checkpoint.shared()
        config = checkpoint.config
        self.description = f"{name} in PyTorch, {str(dtype).removeprefix('torch.')}"
        self.vocab_size = config.vocab_size
        self.context_length: int | None = context_length
        self._layers = config.num_hidden_layers
        self._bos, self._never = config.bos_token_id, config.eos_token_ids
        self._dtype = dtype
        half = dtype in (torch.float16, torch.bfloat16)
        rows = str(dtype).removeprefix("torch.") if half else "float32"
        self.state = GrowingState(checkpoint, context_length, STANDARD, rows, rows)
        step = RecurrentStep(checkpoint, self.state, STANDARD)
        if matrices is not None:
            step.shorten(matrices)
        self._step = (step.halve() if half else step.to(dtype)).eval()

    @torch.no_grad()
    def advance(self, ids: Tensor, past: Past | None) -> tuple[Tensor, Past]:
        """Feed S new tokens to each of B sequences.

        Args:
            ids: int64 `[B, S]`.
            past: The state that an earlier call returned, or None at the start.

        Returns:
            Logits `[B, S, V]`, and the next state.
        """
        batch, length = ids.shape
        if past is None:
            heads = self.state.heads
            empty = torch.zeros(batch, heads.num_keys, 0, heads.row, dtype=self._dtype)
            past = [(empty, empty)] * self._layers
        mask = torch.ones(batch, past[0][0].shape[2] + length, dtype=torch.int64)
        logits, present = self._step((ids, mask), past)
        return logits, present

    @thread_limit()
    def logits(self, ids: list[int]) -> NDArray[np.float32]:
        """Logits `[S, V]` of a text of S tokens."""
        logits, _ = self.advance(torch.tensor([ids]), None)
        text: NDArray[np.float32] = logits[0].float().numpy()
        return text

    def sample(self, seed: int, rows: int, length: int, first_row: int = 0) -> NDArray[np.int64]:
        """Texts `[rows, length]` that the model writes; see `sample_text`."""

        def step(tokens: NDArray[np.int64], past: Past | None) -> tuple[NDArray[np.float32], Past]:
            logits, past = self.advance(torch.tensor(tokens[:, np.newaxis]), past)
            return logits[:, 0].float().numpy(), past

        numbers = range(first_row, first_row + rows)
        # The operators of such steps are so small that a second thread saves little. On a busy
        # machine the two wait for each other, and a step takes ten times as long, at 160M three to
        # fifteen times.
        with thread_limit(1):
            return sample_text(step, self._bos, self._never, self.vocab_size, seed, numbers, length)
