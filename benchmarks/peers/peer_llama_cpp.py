"""llama.cpp, with a Qwen3 of the same shape and random weights."""

from __future__ import annotations

import contextlib
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from typing import Any

import gguf
import numpy as np
import xllamacpp
from peer import CONTEXT_LENGTH, HEAD_DIM, About, Job

FILE_TYPES = {
    "F32": gguf.LlamaFileType.ALL_F32,
    "BF16": gguf.LlamaFileType.MOSTLY_BF16,
    "Q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
    "Q4_0": gguf.LlamaFileType.MOSTLY_Q4_0,
}


def build(job: Job) -> None:
    """Write the GGUF file."""
    shape, kind = job.shape, job.options["type"]
    writer = gguf.GGUFWriter(job.model, "qwen3")
    with contextlib.closing(writer):
        writer.add_file_type(FILE_TYPES[kind])
        writer.add_context_length(CONTEXT_LENGTH)
        writer.add_embedding_length(shape.hidden)
        writer.add_block_count(shape.layers)
        writer.add_feed_forward_length(shape.middle)
        writer.add_head_count(shape.heads)
        writer.add_head_count_kv(shape.kv_heads)
        writer.add_key_length(HEAD_DIM)
        writer.add_value_length(HEAD_DIM)
        writer.add_rope_freq_base(10000.0)
        writer.add_layer_norm_rms_eps(1e-6)
        writer.add_vocab_size(shape.vocabulary)
        # Prompts are token ids, but a file without a tokenizer does not load.
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("qwen2")
        writer.add_token_list([f"<t{i}>" for i in range(shape.vocabulary)])
        writer.add_token_types([gguf.TokenType.NORMAL] * shape.vocabulary)
        writer.add_token_merges(["< t"])
        writer.add_bos_token_id(0)
        writer.add_eos_token_id(1)
        add_tensors(writer, job, gguf.GGMLQuantizationType[kind])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()


def add_tensors(writer: Any, job: Job, kind: gguf.GGMLQuantizationType) -> None:
    """Random weights; without an output matrix, the embedding is tied."""
    hidden, middle = job.shape.hidden, job.shape.middle
    queries, keys = HEAD_DIM * job.shape.heads, HEAD_DIM * job.shape.kv_heads
    rng = np.random.default_rng(0)

    def matrix(name: str, rows: int, columns: int) -> None:
        values = 0.02 * rng.standard_normal((rows, columns), dtype=np.float32)
        writer.add_tensor(f"{name}.weight", gguf.quants.quantize(values, kind), raw_dtype=kind)

    def norm(name: str, size: int) -> None:
        writer.add_tensor(f"{name}.weight", np.ones(size, dtype=np.float32))

    matrix("token_embd", job.shape.vocabulary, hidden)
    norm("output_norm", hidden)
    for layer in range(job.shape.layers):
        block = f"blk.{layer}"
        norm(f"{block}.attn_norm", hidden)
        norm(f"{block}.attn_q_norm", HEAD_DIM)
        norm(f"{block}.attn_k_norm", HEAD_DIM)
        norm(f"{block}.ffn_norm", hidden)
        matrix(f"{block}.attn_q", queries, hidden)
        matrix(f"{block}.attn_k", keys, hidden)
        matrix(f"{block}.attn_v", keys, hidden)
        matrix(f"{block}.attn_output", hidden, queries)
        matrix(f"{block}.ffn_gate", middle, hidden)
        matrix(f"{block}.ffn_up", middle, hidden)
        matrix(f"{block}.ffn_down", hidden, middle)


def load(job: Job) -> Server:
    """Load the file."""
    return Server(job)


class Server:
    """A llama.cpp server in this process."""

    def __init__(self, job: Job) -> None:
        parameters = xllamacpp.CommonParams()
        parameters.model.path = str(job.model)
        # The context is divided among the sequences.
        parameters.n_ctx = CONTEXT_LENGTH * job.batch
        parameters.n_parallel = job.batch
        parameters.cpuparams.n_threads = job.threads
        parameters.cpuparams_batch.n_threads = job.threads
        # It would keep the KV caches of earlier prompts.
        parameters.cache_ram_mib = 0
        self.parameters = parameters
        self.server = xllamacpp.Server(parameters)

    def about(self) -> About:
        """What there is to know of it."""
        cache = gguf.GGMLQuantizationType(int(self.parameters.cache_type_k)).name
        flash = {-1: "'auto', which turns it on", 0: "off", 1: "on"}
        return About(
            {name: version(name) for name in ("xllamacpp", "gguf")},
            f"a Qwen3 of the same shape; by default its KV cache is in {cache} and its flash "
            f"attention is {flash[int(self.parameters.flash_attn_type)]}; the wheel is built with "
            f"{features()}",
        )

    def decode(self, prompts: list[list[int]], tokens: int) -> float:
        """Seconds per step by the server's own clock."""
        with ThreadPoolExecutor(len(prompts)) as pool:
            answers = list(pool.map(lambda prompt: self._complete(prompt, 1 + tokens), prompts))
        for timings in answers:
            if timings["predicted_n"] != 1 + tokens:
                raise RuntimeError(f"{timings['predicted_n']} tokens instead of {1 + tokens}")
        # From the first token to the last, of the sequence that had the others beside it longest.
        return min(float(timings["predicted_ms"]) for timings in answers) / 1e3 / tokens

    def prefill(self, prompt: list[int]) -> float:
        """Seconds for the prompt by the server's own clock."""
        return float(self._complete(prompt, 1)["prompt_ms"]) / 1e3

    def _complete(self, prompt: list[int], tokens: int) -> dict[str, Any]:
        answer = self.server.handle_completions(
            {
                "prompt": prompt,
                "n_predict": tokens,
                "ignore_eos": True,
                "cache_prompt": False,
                "temperature": 0.0,
                # Greedy, without the samplers that sort the vocabulary for nothing.
                "top_k": 1,
                "samplers": ["top_k"],
            }
        )
        timings: dict[str, Any] = answer["timings"]
        if timings["prompt_n"] != len(prompt):
            raise RuntimeError(f"{timings['prompt_n']} tokens of a prompt of {len(prompt)}")
        return timings


def features() -> str:
    """Instruction sets that the library was built for."""
    fields = xllamacpp.get_system_info().split(":", 1)[-1].split("|")
    return ", ".join(name.strip() for name, _, on in (f.partition("=") for f in fields) if on)
