"""The public functions.

Each imports what does the work when it is called, so that `import doge_onnx` costs
nothing and the base install does not need what only `export` needs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from doge_onnx.bundle import is_bundle
from doge_onnx.errors import InputError, MissingExtraError

if TYPE_CHECKING:
    from doge_onnx.export.exporter import ExportReport
    from doge_onnx.export.verify import ParityReport
    from doge_onnx.hub import PushReport
    from doge_onnx.measure.bench import BenchReport
    from doge_onnx.measure.evaluate import QualityReport, Scorer
    from doge_onnx.runtime.model import Model

# What the extras bring, all together.
_OPTIONAL = {
    "torch",
    "onnx",
    "onnx_ir",
    "onnxscript",
    "safetensors",
    "huggingface_hub",
    "transformers",
    "yaml",
}


def load(
    bundle: str | Path,
    device: str = "auto",
    threads: int | None = None,
    prefill_chunk: int | None = None,
    verbose: bool = False,
    cuda_graph: bool | None = None,
) -> Model:
    """Load a bundle and make it ready to run.

    Args:
        bundle: The directory that `export` wrote.
        device: "cpu" or "cuda", or "auto": CUDA where it is and the bundle is made for it.
        threads: Threads that one operator may use; None is one for each physical core that this
            process may use.
        prefill_chunk: Most tokens of a prompt that go through the graph at once; None is a
            number that is good for speed and memory. The result does not depend on it.
        verbose: Let the warnings of ONNX Runtime through.
        cuda_graph: Whether CUDA captures decode steps once and replays them, which saves the time
            to launch their kernels. None is where the bundle allows it and the first steps, which
            are then run both ways, agree.

    Raises:
        BundleError: The bundle is incomplete, altered, too new, or cannot be run.
        DeviceError: The device is not there, lacks a library, or cannot run the bundle or capture
            its steps.
        InputError: An unknown device, a number of threads or tokens below 1, or a `cuda_graph` that
            is none of the three.
    """
    from doge_onnx.runtime import model

    return model.load(bundle, device, threads, prefill_chunk, verbose, cuda_graph)


def export(
    model: str | Path,
    out: str | Path,
    *,
    precision: str | None = None,
    kv_cache: str | None = None,
    context_length: int | None = None,
    target: str = "ort",
    device: str = "cpu",
    state: str = "growing",
    layout: str = "flat",
    format: str = "onnx",
    block_size: int | None = None,
    rounding: str | None = None,
    verify: bool = True,
    max_kl: float | None = None,
    revision: str | None = None,
    force: bool = False,
    progress: Callable[[str], None] | None = None,
) -> ExportReport:
    """Turn a Doge checkpoint into a bundle.

    Args:
        model: A directory with a checkpoint, or its id on the Hugging Face Hub.
        out: Directory to write; it appears when it is complete, or not at all.
        precision: Of the weights: "fp32", "fp16", "bf16", "int8" or "int4". None is "fp32", or
            "fp16" where the device is "cuda".
        kv_cache: Of the state: "fp32" or "int8". None is what the activations have.
        context_length: Most tokens of one sequence; None is what the model was trained for.
        target: "ort" for ONNX Runtime's fused operators, "portable" for standard ones.
        device: What the graph is made for, "cpu" or "cuda". With "cuda", activations are fp16
            or bf16, also beside quantized weights.
        state: "growing" for a state with a row for every token, "window" for one that has as
            many rows as the model's window has keys, however long the text gets.
        layout: "flat" for a graph beside the other files, "hub" for the directory and the name
            by which transformers.js finds it.
        format: Of the graph's file: "onnx", or "ort" for ONNX Runtime's own, which its builds for
            phones and small boards read; with it comes the list of operators that they need.
        block_size: For experts: how many quantized weights share a scale, a power of 2 from
            16 to 256; None is what suits each matrix.
        rounding: For experts: "gptq" or "nearest"; None is "gptq".
        verify: Compare the result with the reference and record the figures. Where something is
            quantized, they say what that lost.
        max_kl: Most that quantization may lose: mean KL divergence in nats per token. None is
            no limit.
        revision: Branch, tag or commit on the Hub.
        force: Replace a bundle that is at `out`.
        progress: Called with a line of text when a long step begins.

    Raises:
        DogeOnnxError: The checkpoint cannot be read or is not supported, `out` cannot be
            written, or the graph differs from the reference; see the children of the class.
    """
    with _extra("export"):
        from doge_onnx.export import exporter

        return exporter.export(
            model,
            out,
            precision=precision,
            kv_cache=kv_cache,
            context_length=context_length,
            target=target,
            device=device,
            state=state,
            layout=layout,
            format=format,
            block_size=block_size,
            rounding=rounding,
            verify=verify,
            max_kl=max_kl,
            revision=revision,
            force=force,
            progress=progress,
        )


def verify(
    bundle: str | Path,
    reference: str | Path,
    *,
    device: str = "auto",
    revision: str | None = None,
    progress: Callable[[str], None] | None = None,
) -> ParityReport:
    """Compare a bundle with the checkpoint that it was made from, run by transformers.

    Args:
        bundle: The directory that `export` wrote.
        reference: A directory with the checkpoint, or its id on the Hugging Face Hub.
        device: "auto", "cpu" or "cuda"; see `load`.
        revision: Branch, tag or commit on the Hub.
        progress: Called with a line of text when a long step begins.

    Raises:
        DogeOnnxError: One of the two cannot be read; see the children of the class.
    """
    with _extra("export"):
        from doge_onnx.export import verify as verifier

        return verifier.verify(
            bundle, reference, device=device, revision=revision, progress=progress
        )


def evaluate(
    bundle: str | Path,
    reference: str | Path | None = None,
    text: str | Path | None = None,
    *,
    window: int | None = None,
    max_tokens: int | None = None,
    seed: int | None = None,
    device: str = "auto",
    revision: str | None = None,
    progress: Callable[[str], None] | None = None,
) -> QualityReport:
    """Measure how well a bundle predicts a text, and how far it is from a reference.

    Args:
        bundle: The directory that `export` wrote. It is not changed.
        reference: What it is compared with: another bundle, or a checkpoint, which is a
            directory or an id on the Hugging Face Hub. None measures the perplexity alone.
        text: A file of UTF-8 text. None lets the reference, or else the bundle, write one.
        window: The text is cut into pieces of this many tokens, each of which is read on its
            own. Never more than the context length; None is a size that is good for most.
        max_tokens: Most tokens of the text; None is 8192.
        seed: Of a text that is sampled; None is always the same one.
        device: Of bundles: "auto", "cpu" or "cuda"; see `load`.
        revision: Branch, tag or commit of a reference on the Hub.
        progress: Called with a line of text when a long step begins.

    Raises:
        DogeOnnxError: One of the two or the text cannot be read, they do not fit together, or
            an option is out of its range; see the children of the class. Only a checkpoint
            needs the export extra.
    """
    from doge_onnx.measure import evaluate as evaluator

    evaluator.check_options(window, max_tokens, seed)
    begin = progress or (lambda _: None)
    local = reference is None or is_bundle(reference)
    if revision is not None and local:
        raise InputError("only a reference on the Hub has a revision")
    scorer = evaluator.BundleScorer(bundle, device)
    other: Scorer | None = None
    if reference is not None:
        begin("loading the reference")
        if local:
            other = evaluator.BundleScorer(reference, device)
        else:
            length = window or evaluator.FILE_WINDOW
            if scorer.context_length is not None:
                length = min(length, scorer.context_length)
            with _extra("export"):
                from doge_onnx.export import quality

                other = quality.open_checkpoint(
                    reference, length, revision=revision, progress=progress
                )
    return evaluator.evaluate(
        scorer,
        other,
        text,
        window=window,
        max_tokens=max_tokens,
        seed=seed,
        progress=progress,
    )


def bench(
    bundle: str | Path,
    *,
    contexts: Sequence[int] | None = None,
    batches: Sequence[int] | None = None,
    tokens: int | None = None,
    repetitions: int | None = None,
    threads: int | None = None,
    device: str = "auto",
    cuda_graph: bool | None = None,
    progress: Callable[[str], None] | None = None,
) -> BenchReport:
    """Measure how fast a bundle runs on this machine, and how much memory it needs.

    Args:
        bundle: The directory that `export` wrote.
        contexts: Lengths of the prompts, in tokens; None is 16, 512 and 1900. What does not
            fit into the context length is left out.
        batches: Numbers of sequences that run side by side; None is 1 and 8. All contexts are
            measured with each.
        tokens: Decode steps after each prompt, in each repetition; None is 16.
        repetitions: How often each figure is measured; None is 3.
        threads: Threads that one operator may use; None is one for each core that may be used.
        device: "auto", "cpu" or "cuda"; see `load`.
        cuda_graph: See `load`.
        progress: Called with a line of text when a step begins.

    Raises:
        BundleError: The bundle is incomplete, altered, too new, or cannot be run.
        InputError: A number below 1, or no context that fits.
    """
    from doge_onnx.measure import bench as benchmark

    return benchmark.bench(
        bundle,
        contexts=contexts,
        batches=batches,
        tokens=tokens,
        repetitions=repetitions,
        threads=threads,
        device=device,
        cuda_graph=cuda_graph,
        progress=progress,
    )


def push(
    bundle: str | Path,
    repo: str,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
    dry_run: bool = False,
    progress: Callable[[str], None] | None = None,
) -> PushReport:
    """Upload a bundle to the Hugging Face Hub, in one commit.

    The files of the bundle go up, after their checksums were compared, and nothing else of its
    directory. What is in the repository already stays, unless it has the same name.

    Args:
        bundle: The directory that `export` wrote.
        repo: The repository, such as "user/model"; it is created if it does not exist.
        private: Make a new repository private. One that exists must be private already.
        revision: The branch; it is created if it does not exist. None is the main one.
        message: Of the commit; None says what the bundle holds.
        dry_run: Only check the bundle and report what would be uploaded.
        progress: Called with a line of text when a step begins.

    Raises:
        BundleError: There is no bundle, or it is incomplete, altered or too new.
        HubError: The name is not valid, there is no token or it may not write there, or the Hub
            cannot be reached.
        MissingExtraError: huggingface_hub is not installed.
    """
    with _extra("hub"):
        from doge_onnx import hub

        return hub.push(
            bundle,
            repo,
            private=private,
            revision=revision,
            message=message,
            dry_run=dry_run,
            progress=progress,
        )


@contextlib.contextmanager
def _extra(name: str) -> Iterator[None]:
    """Say what to install if an import fails for want of an extra."""
    try:
        yield
    except ImportError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _OPTIONAL:
            raise
        raise MissingExtraError(
            f"this needs {package}, which is not installed: pip install 'doge-onnx[{name}]'"
        ) from error
