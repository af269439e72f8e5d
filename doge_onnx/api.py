"""The public functions of the package.

Knows their signatures and which extras they need. Each function imports its implementation when it
is called, so that `import doge_onnx` is fast and the base installation does not need the packages
of the extras.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from doge_onnx.bundle import Bundle, is_bundle
from doge_onnx.errors import InputError, MissingExtraError

if TYPE_CHECKING:
    from doge_onnx.export.exporter import ExportReport
    from doge_onnx.export.verify import ParityReport
    from doge_onnx.hub import PushReport
    from doge_onnx.measure.bench import BenchReport
    from doge_onnx.measure.evaluate import QualityReport, Scorer
    from doge_onnx.runtime.model import Model

# Packages that the extras install.
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
    revision: str | None = None,
    native: bool = True,
) -> Model:
    """Load a bundle and make it ready to run.

    Args:
        bundle: The directory that `export` wrote, or the id of a bundle on the Hugging Face Hub,
            such as "user/model", which is fetched into the Hub's cache.
        device: "cpu", "cuda" or "auto". "auto" is CUDA if it is installed and can run the bundle,
            and else the CPU.
        threads: Threads that one operator may use; None for the number in
            OMP_NUM_THREADS, or else one for each physical core that this process may use.
        prefill_chunk: Most tokens of a prompt in one run of the graph; None for a number that suits
            the device. From 3 on, the logits depend on it no more than on a batch, see
            `Model.generate_batch`: mostly not at all.
        verbose: Show the warnings of ONNX Runtime.
        cuda_graph: Whether CUDA captures decode steps once and replays them, which saves the time
            to launch their kernels. None for yes if the bundle allows it and a check of a few
            steps, captured and not, finds the same results.
        revision: Branch, tag or commit of a bundle on the Hub; None for its main branch.
        native: Whether this package's own kernels run, where they can; see `Model.kernels`. False
            leaves all to ONNX Runtime.

    Raises:
        BundleError: The bundle is incomplete, altered, too new, or cannot be run.
        HubError: There is no such bundle on the Hub, or it cannot be fetched.
        MissingExtraError: It is not a directory, and huggingface_hub is not installed.
        DeviceError: The device is missing, lacks a library, or cannot run the bundle or capture its
            steps.
        InputError: There is no device of that name, a number of threads or tokens is below 1, or
            `cuda_graph` or `native` is not one of the values above; or DOGE_ONNX_INSTRUCTIONS names
            an instruction set that this machine lacks.
    """
    from doge_onnx.runtime import model

    found = find_bundle(bundle, revision)
    return model.load(found, device, threads, prefill_chunk, verbose, cuda_graph, native)


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
    adapter: str | Path | None = None,
    ignore_config_fields: Collection[str] = (),
    force: bool = False,
    progress: Callable[[str], None] | None = None,
) -> ExportReport:
    """Turn a Doge checkpoint into a bundle.

    Args:
        model: A directory with a checkpoint, or its id on the Hugging Face Hub.
        out: Directory to write. It appears only when it is complete.
        precision: Precision of the weights: "fp32", "fp16", "bf16", "int8" or "int4". None for
            "fp32", or for "fp16" if the device is "cuda".
        kv_cache: Precision of the state: "fp32" or "int8". None for that of the activations.
        context_length: Most tokens of one sequence; None for the length that the model was trained
            for.
        target: "ort" for ONNX Runtime's fused operators, "portable" for standard operators.
        device: The device that the graph is made for, "cpu" or "cuda". With "cuda", activations are
            fp16 or bf16, even if weights are quantized.
        state: "growing" for a state with one row for each token, "window" for a state with at most
            as many rows as the model's window has keys, however long the text is.
        layout: "flat" for a graph next to the other files, "hub" for the directory and the file
            name that transformers.js expects.
        format: Format of the graph's file: "onnx", or "ort" for ONNX Runtime's own format, which
            its builds for phones and small boards read. "ort" also writes the list of operators
            that such a build needs.
        block_size: For experts: how many quantized weights share a scale, a power of 2 from 16 to
            256. None for a size that suits each matrix.
        rounding: For experts: "gptq" or "nearest". None for "gptq".
        verify: Compare the result with the reference and record the figures. If something is
            quantized, measure how much quality is lost.
        max_kl: Most that quantization may lose: mean KL divergence in nats per token. None for no
            limit.
        revision: Branch, tag or commit on the Hub.
        adapter: A LoRA adapter in the format of PEFT, a directory or its id on the Hub. It is
            merged into the checkpoint, in float32, before anything is rounded.
        ignore_config_fields: Names of fields of config.json to export without, such as "my_field"
            or "rope_parameters.my_field". A field that is not understood is refused otherwise, as
            it may change what the model computes.
        force: Replace a bundle that exists at `out`.
        progress: Called with a line of text when a long step begins.

    Raises:
        DogeOnnxError: The checkpoint cannot be read or is not supported, `out` cannot be written,
            or the graph differs from the reference; see the subclasses.
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
            adapter=adapter,
            ignore_config_fields=ignore_config_fields,
            force=force,
            progress=progress,
        )


def verify(
    bundle: str | Path,
    reference: str | Path,
    *,
    device: str = "auto",
    revision: str | None = None,
    reference_revision: str | None = None,
    adapter: str | Path | None = None,
    progress: Callable[[str], None] | None = None,
) -> ParityReport:
    """Compare a bundle with its checkpoint, which transformers runs.

    Args:
        bundle: See `load`. Its manifest gets the figures, unless it comes from the Hub.
        reference: A directory with the checkpoint, or its id on the Hugging Face Hub.
        device: "auto", "cpu" or "cuda"; see `load`.
        revision: Branch, tag or commit of a bundle on the Hub.
        reference_revision: Branch, tag or commit of a reference on the Hub.
        adapter: The adapter that was merged into the checkpoint, if there was one; see `export`.
        progress: Called with a line of text when a long step begins.

    Raises:
        DogeOnnxError: The bundle or the checkpoint cannot be read; see the subclasses.
    """
    with _extra("export"):
        from doge_onnx.export import verify as verifier

        return verifier.verify(
            find_bundle(bundle, revision),
            reference,
            device=device,
            reference_revision=reference_revision,
            adapter=adapter,
            progress=progress,
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
    reference_revision: str | None = None,
    adapter: str | Path | None = None,
    progress: Callable[[str], None] | None = None,
) -> QualityReport:
    """Measure how well a bundle predicts a text, and how much it differs from a reference.

    Only a checkpoint as reference needs the export extra.

    Args:
        bundle: See `load`. It is not changed.
        reference: The model to compare with: another bundle, or a checkpoint, which is a directory
            or an id on the Hugging Face Hub. None for the perplexity alone.
        text: A file of UTF-8 text. With None the reference, or without one the bundle, writes the
            text.
        window: Tokens of the pieces into which the text is cut; each piece is read on its own. At
            most the context length. None for 512, or 256 if a model writes the text.
        max_tokens: Most tokens of the text; None for 8192.
        seed: Seed of a text that a model writes; None for a constant.
        device: Device of bundles: "auto", "cpu" or "cuda"; see `load`.
        revision: Branch, tag or commit of a bundle on the Hub.
        reference_revision: Branch, tag or commit of a reference on the Hub.
        adapter: An adapter to merge into the reference, a checkpoint; see `export`.
        progress: Called with a line of text when a long step begins.

    Raises:
        DogeOnnxError: The bundle, the reference or the text cannot be read, the two models have
            different vocabularies, or an option is out of its range; see the subclasses.
    """
    from doge_onnx.measure import evaluate as evaluator

    evaluator.check_options(window, max_tokens, seed)
    begin = progress or (lambda _: None)
    other_bundle = _reference_bundle(reference, reference_revision)
    if adapter is not None and (reference is None or other_bundle is not None):
        raise InputError("only a checkpoint as reference takes an adapter")
    scorer = evaluator.BundleScorer(find_bundle(bundle, revision), device)
    other: Scorer | None = None
    if reference is not None:
        begin("loading the reference")
        if other_bundle is not None:
            other = evaluator.BundleScorer(other_bundle, device)
        else:
            length = window or evaluator.FILE_WINDOW
            if scorer.context_length is not None:
                length = min(length, scorer.context_length)
            with _extra("export"):
                from doge_onnx.export import quality

                other = quality.open_checkpoint(
                    reference,
                    length,
                    revision=reference_revision,
                    adapter=adapter,
                    ignore=scorer.ignored_fields,
                    progress=progress,
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
    native: bool = True,
    revision: str | None = None,
    progress: Callable[[str], None] | None = None,
) -> BenchReport:
    """Measure how fast a bundle runs on this machine, and how much memory it needs.

    Args:
        bundle: See `load`.
        contexts: Lengths of the prompts, in tokens; None for 16, 512 and 1900. Lengths that do not
            fit into the context are left out.
        batches: Batch sizes, each of which is measured with all contexts; None for 1 and 8.
        tokens: Decode steps after each prompt, in each repetition; None for 16.
        repetitions: How often each figure is measured; None for 3.
        threads: Threads that one operator may use; None for the number in
            OMP_NUM_THREADS, or else one for each physical core that this process may use.
        device: "auto", "cpu" or "cuda"; see `load`.
        cuda_graph: See `load`.
        native: See `load`.
        revision: Branch, tag or commit of a bundle on the Hub.
        progress: Called with a line of text when a step begins.

    Raises:
        BundleError: The bundle is incomplete, altered, too new, or cannot be run.
        InputError: A number is below 1, or no context fits.
    """
    from doge_onnx.measure import bench as benchmark

    return benchmark.bench(
        find_bundle(bundle, revision),
        contexts=contexts,
        batches=batches,
        tokens=tokens,
        repetitions=repetitions,
        threads=threads,
        device=device,
        cuda_graph=cuda_graph,
        native=native,
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

    Compares the checksums of the bundle's files, then uploads these files and nothing else of the
    directory. Other files in the repository stay; files of the same name are replaced.

    Args:
        bundle: See `load`.
        repo: The repository, such as "user/model"; it is created if it does not exist.
        private: Make a new repository private. An existing one must be private already.
        revision: The branch; it is created if it does not exist. None for the main branch.
        message: Message of the commit; None for one that says what the bundle holds.
        dry_run: Only check the bundle and report which files would be uploaded.
        progress: Called with a line of text when a step begins.

    Raises:
        BundleError: There is no bundle, or it is incomplete, altered or too new.
        HubError: The name is not valid, there is no token or it has no write access, or the Hub
            cannot be reached.
        MissingExtraError: huggingface_hub is not installed.
    """
    with _extra("hub"):
        from doge_onnx import hub

        return hub.push(
            find_bundle(bundle),
            repo,
            private=private,
            revision=revision,
            message=message,
            dry_run=dry_run,
            progress=progress,
        )


def find_bundle(
    bundle: str | Path, revision: str | None = None, *, weights: bool = True
) -> str | Path | Bundle:
    """What `bundle` stands for: a place on this machine, or a bundle fetched from the Hub.

    Args:
        bundle: A directory, which comes first, or an id on the Hub with its owner.
        revision: Branch, tag or commit on the Hub.
        weights: Whether to fetch the graph and its weights, too.

    Returns:
        `bundle` itself, which nobody has looked at, or the bundle of the Hub, whose files were
        checked.

    Raises:
        InputError: A place on this machine has no revision.
        HubError: See `load`.
        BundleError: See `load`.
        MissingExtraError: See `load`.
    """
    if not _may_be_on_hub(bundle):
        if revision is not None:
            raise InputError(
                f"{bundle} is not the id of a bundle on the Hub, and nothing else has a revision"
            )
        return bundle
    try:
        with _extra("hub"):
            from doge_onnx import hub_bundles
    except MissingExtraError as error:
        raise MissingExtraError(f"{bundle} is not a directory; on the Hub, {error}") from error
    return hub_bundles.fetch(str(bundle), revision, weights=weights)


def _reference_bundle(
    reference: str | Path | None, revision: str | None
) -> str | Path | Bundle | None:
    """A reference that is a bundle, here or on the Hub; None if it is not."""
    on_hub = reference is not None and _may_be_on_hub(reference)
    if reference is None or is_bundle(reference):
        if revision is not None:
            raise InputError("only a reference on the Hub has a revision")
        return reference
    if on_hub:
        with contextlib.suppress(MissingExtraError), _extra("hub"):
            from doge_onnx import hub_bundles

            if hub_bundles.holds_bundle(str(reference), revision):
                return hub_bundles.fetch(str(reference), revision)
    return None


def _may_be_on_hub(place: str | Path) -> bool:
    """Whether a text is the id of a repository with its owner, and no place on this machine."""
    named = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(place)) is not None
    return named and not os.path.lexists(place)


@contextlib.contextmanager
def _extra(name: str) -> Iterator[None]:
    """A context that turns the failed import of an extra's package into MissingExtraError."""
    try:
        yield
    except ImportError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _OPTIONAL:
            raise
        raise MissingExtraError(
            f"this needs {package}, which is not installed: pip install 'doge-onnx[{name}]'"
        ) from error
