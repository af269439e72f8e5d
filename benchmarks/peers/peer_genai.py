"""onnxruntime-genai and its model builder, with a Qwen3 of the same shape and random weights."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnxruntime_genai
from peer import CONTEXT_LENGTH, HEAD_DIM, About, Job


def build(job: Job) -> None:
    """Write a Qwen3 checkpoint, unless another precision did, and run the builder on it."""
    checkpoint = job.directory / "qwen3"
    if not checkpoint.exists():
        random_qwen3(checkpoint, job)
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder"]
    command += ["-i", str(checkpoint), "-o", str(job.model), "-c", str(job.directory / "cache")]
    command += ["-p", job.options["precision"], "-e", "cpu"]
    # Without this, it computes logits for every token of a prompt, as no other runtime here does.
    command += ["--extra_options", "prune_lm_head=true"]
    subprocess.run(command, check=True)


def random_qwen3(path: Path, job: Job) -> None:
    """Write a checkpoint of the job's shape."""
    import tokenizers
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=job.shape.vocabulary,
        hidden_size=job.shape.hidden,
        intermediate_size=job.shape.middle,
        num_hidden_layers=job.shape.layers,
        num_attention_heads=job.shape.heads,
        num_key_value_heads=job.shape.kv_heads,
        head_dim=HEAD_DIM,
        max_position_embeddings=CONTEXT_LENGTH,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    # Prompts are token ids, but the builder needs a tokenizer.
    tokens = {f"<{i}>": i for i in range(job.shape.vocabulary)}
    words = tokenizers.models.WordLevel(tokens, unk_token="<0>")
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(words)
    ).save_pretrained(path)
    transformers.Qwen3ForCausalLM(config).save_pretrained(path)


def load(job: Job) -> Model:
    """Load what the builder wrote."""
    return Model(job)


class Model:
    """A loaded model."""

    def __init__(self, job: Job) -> None:
        config = onnxruntime_genai.Config(str(job.model))
        session = {"intra_op_num_threads": job.threads, "inter_op_num_threads": 1}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": session}}}))
        self.model = onnxruntime_genai.Model(config)

    def about(self) -> About:
        """What there is to know of it."""
        return About(
            {name: version(name) for name in ("onnxruntime-genai", "onnxruntime")},
            "a Qwen3 of the same shape, made by its builder with -e cpu, the precision as -p, and "
            "prune_lm_head=true; its KV cache is in float32",
        )

    def decode(self, prompts: list[list[int]], tokens: int) -> float:
        """Seconds per step of the loop that its documentation shows."""
        generator = self._generator(len(prompts[0]) + 1 + tokens, len(prompts))
        generator.append_tokens(np.array(prompts, np.int32))
        # Only chooses from the logits of the prompt.
        generator.generate_next_token()
        generator.get_next_tokens()
        count = 0
        started = time.perf_counter()
        while not generator.is_done():
            generator.generate_next_token()
            generator.get_next_tokens()
            count += 1
        seconds = time.perf_counter() - started
        if count != tokens:
            raise RuntimeError(f"{count} tokens instead of {tokens}")
        return seconds / tokens

    def prefill(self, prompt: list[int]) -> float:
        """Seconds for the prompt."""
        generator = self._generator(len(prompt) + 1)
        ids = np.array([prompt], np.int32)
        started = time.perf_counter()
        generator.append_tokens(ids)
        return time.perf_counter() - started

    def _generator(self, length: int, batch: int = 1) -> onnxruntime_genai.Generator:
        parameters = onnxruntime_genai.GeneratorParams(self.model)
        # The least length keeps the end-of-text token away.
        parameters.set_search_options(
            do_sample=False, min_length=length, max_length=length, batch_size=batch
        )
        return onnxruntime_genai.Generator(self.model, parameters)
