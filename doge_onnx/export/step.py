"""The recurrent step of a model: new tokens and a state in, logits and the next state out.

Plain PyTorch, which runs without ONNX, so that tests can compare it with transformers. It is a
chain of `Piece`s, and does nothing between them. Knows what comes before and after the layers. Does
not know what a layer computes (`layer`) or how the pieces become a graph (`assembly`).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from doge_onnx.export.attention import State
from doge_onnx.export.checkpoint import Checkpoint
from doge_onnx.export.growing_state import GrowingState
from doge_onnx.export.layer import Layer, constant, take_linear
from doge_onnx.export.matrices import (
    Embedding,
    Linear,
    QuantizedEmbedding,
    QuantizedLinear,
    Rows,
)
from doge_onnx.export.operators import Operators, wider
from doge_onnx.export.piece import Parts, Piece
from doge_onnx.export.state_rows import HalfRows, Int8Rows


class RecurrentStep(nn.Module):
    """One step of a Doge model.

    Args:
        checkpoint: Config and weights. Its tensors are moved into this module, so that memory never
            holds a large model twice.
        state: The layout of the state.
        operators: Implementation of the operators, `FUSED` or `STANDARD`.
    """

    def __init__(self, checkpoint: Checkpoint, state: State, operators: Operators) -> None:
        super().__init__()
        config, weights = checkpoint.config, checkpoint.tensors
        self.ops = operators
        self.state = state
        table = Embedding(weights.pop("embed_tokens.weight"), operators)
        norm = constant(weights.pop("layers.0.input_layernorm.weight"))
        self.embed = Embed(table, norm, config.rms_norm_eps, operators)
        self.layers = nn.ModuleList(
            Layer(checkpoint, number, state, operators)
            for number in range(config.num_hidden_layers)
        )
        # A tied head is the embedding itself: one tensor here, and one in the graph.
        matrix: Embedding | Linear = table
        if not config.tie_word_embeddings:
            matrix = Linear(*take_linear(weights, "lm_head"))
        self.head = ProjectToVocabulary(matrix, operators)

    def forward(
        self,
        inputs: tuple[Tensor, ...],
        past: list[tuple[Tensor, Tensor]],
        logits_to_keep: Tensor | None = None,
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Feed S >= 1 new tokens to each sequence.

        Args:
            inputs: The arguments of `state.tokens`, of which the first are the token ids, int64
                `[B, S]`.
            past: Key and value of each layer, in the shape of the state.
            logits_to_keep: int64 `[1]`, the number of last positions to compute logits for; None
                or 0 for all.

        Returns:
            Logits `[B, S, V]`, and the present key and value of each layer.
        """
        tokens = self.state.tokens(*inputs)
        h, x = self.embed(inputs[0])
        present: list[tuple[Tensor, Tensor]] = []
        for layer, (past_key, past_value) in zip(self.layers, past, strict=True):
            h, x, key, value = layer(h, x, tokens, past_key, past_value)
            present.append((key, value))
        return self.head(h, logits_to_keep), present

    def halve(self) -> RecurrentStep:
        """Convert weights and activations to half precision: `state.activations`.

        Gates from W_dt on, routers, and the splitting and scaling of rows stay float32. They cost
        little, and a rounded gate or router would choose another key or expert.
        """
        assert isinstance(self.state, GrowingState)
        dtype = getattr(torch, self.state.activations)
        for path, module in self.named_modules():
            if isinstance(module, HalfRows | Int8Rows) or path.endswith((".gate", ".router")):
                continue
            tensors = [
                *module.named_parameters(recurse=False),
                *module.named_buffers(recurse=False),
            ]
            for name, tensor in tensors:
                if tensor.is_floating_point() and name not in ("A", "limits"):
                    tensor.data = tensor.data.to(dtype)
        return self

    def shorten(self, dtype: torch.dtype) -> RecurrentStep:
        """Store the matrices in 16 bits; all that is computed stays float32.

        Norms, gates, routers, scales and biases stay float32: they are small.
        """
        for path, module in self.named_modules():
            if isinstance(module, Linear | Rows) and not path.endswith((".gate", ".router")):
                module.weight.data = module.weight.data.to(dtype)
        return self


class Embed(Piece):
    """The embedding of tokens, and the norm before the first layer.

    Args:
        table: The embedding.
        norm: Weight of the norm, `[H]`.
        eps: Of the norm.
        operators: Implementation of the operators.
    """

    operator = "Embed"
    inputs = ("input_ids", "table", "scales", "norm")
    outputs = ("h", "x")

    def __init__(
        self, table: Embedding, norm: nn.Parameter, eps: float, operators: Operators
    ) -> None:
        super().__init__()
        self.ops = operators
        self.table: Embedding | QuantizedEmbedding = table
        self.norm, self.eps = norm, eps

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """int64 `[B, S]` to the normed stream and the stream, `[B, S, H]`."""
        x = self.table(input_ids).to(self.norm.dtype)
        return self.ops.rms_norm(x, self.norm, self.eps), x

    def parts(self) -> Parts:
        """See `Piece`."""
        return Parts({}, {"table": self.table}, {"norm": self.norm}, {"epsilon": self.eps})


class ProjectToVocabulary(Piece):
    """The head: logits of the last positions.

    Args:
        matrix: The embedding if the head is tied to it, else a matrix of its own.
        operators: Implementation of the operators.
    """

    operator = "ProjectToVocabulary"
    inputs = ("h", "logits_to_keep", "weight", "scales", "bias")
    outputs = ("logits",)

    def __init__(self, matrix: Embedding | Linear, operators: Operators) -> None:
        super().__init__()
        self.ops = operators
        self.matrix: Embedding | Linear | QuantizedEmbedding | QuantizedLinear = matrix

    @property
    def size(self) -> int:
        """Number of tokens of the vocabulary."""
        rows = isinstance(self.matrix, Embedding | QuantizedEmbedding | QuantizedLinear)
        return self.matrix.weight.shape[0 if rows else 1]

    def forward(self, h: Tensor, logits_to_keep: Tensor | None) -> Tensor:
        """See `RecurrentStep.forward`."""
        if logits_to_keep is not None:
            h = self.ops.keep_last(h, logits_to_keep)
        if isinstance(self.matrix, Embedding | QuantizedEmbedding):
            logits = self.matrix.project(h)
        else:
            logits = self.matrix(h)
        return logits.to(wider(logits.dtype))

    def parts(self) -> Parts:
        """See `Piece`."""
        transposed = int(isinstance(self.matrix, Embedding))
        return Parts({"weight": self.matrix}, {}, {}, {"transposed": transposed})
