"""The command line: one thin command per verb.

Knows the verbs and the exit codes, which docs/command-line.md explains. Does not know how a verb
is carried out (`api`), what its options mean (`cli_options`) or how its result looks
(`cli_output`). Slow modules are imported inside the commands, so that --help is fast.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup

import doge_onnx
from doge_onnx import api, cli_chat, cli_input, cli_options, cli_output, cli_values
from doge_onnx.bundle import Bundle, read_manifest
from doge_onnx.errors import DogeOnnxError, ParityError, QualityError

# Exit codes. 2, for wrong usage, is typer's.
_FAILED, _DIFFERS, _INTERRUPTED, _PIPE_CLOSED = 1, 3, 130, 141


class _Verbs(TyperGroup):
    """Ends an error that a user can cause with one line and an exit code, not a traceback."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run the whole command line."""
        code = _FAILED
        if " " in kwargs.get("prog_name", ""):
            # Shells complete a command by its name, which `python -m` does not have.
            self.params = [each for each in self.params if "completion" not in (each.name or "")]
        try:
            return super().main(*args, **kwargs)
        except SystemExit as end:
            # A closed pipe is no error: typer ends quietly, because the reader needs no more.
            if not isinstance(end.__context__, BrokenPipeError):
                raise
            code = _PIPE_CLOSED
        except (ParityError, QualityError) as error:
            code = _DIFFERS
            cli_output.error(str(error))
        except DogeOnnxError as error:
            cli_output.error(str(error))
        except MemoryError:
            cli_output.error("not enough memory")
        # Errors of the system, such as a full disk behind standard output.
        except OSError as error:
            cli_output.error(str(error))
        cli_output.drop_unwritable()
        raise SystemExit(code)

    def invoke(self, ctx: Any) -> Any:
        """Run the verb that the command line names."""
        try:
            result = super().invoke(ctx)
            # Flushed here, where a failure can still be reported.
            sys.stdout.flush()
        except KeyboardInterrupt:
            cli_output.error("interrupted")
            raise typer.Exit(_INTERRUPTED) from None
        return result


class _Continues(TyperCommand):
    """A verb with a prompt, which may begin with a dash as an option does."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the arguments; a mistake about an option comes with a hint."""
        try:
            return super().parse_args(ctx, args)
        except Exception as error:
            # typer does not export the classes of mistakes about options.
            if hasattr(error, "option_name") and hasattr(error, "message"):
                words = error.message.rstrip(".")
                error.message = f"{words}; a prompt that begins with '-' goes behind '--'"
            raise


app = typer.Typer(
    name="doge-onnx",
    cls=_Verbs,
    help="Export Doge language models to ONNX in recurrent-step form, and run them.",
    epilog="Start with: doge-onnx export SmallDoge/Doge-160M bundle",
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"doge-onnx {doge_onnx.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version and exit.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    """Define the options that come before the verb; --version has a callback of its own."""


@app.command()
def export(
    model: cli_options.Model,
    out: cli_options.Out,
    revision: cli_options.Revision = None,
    adapter: cli_options.Adapter = None,
    precision: cli_options.Precision = None,
    kv_cache: cli_options.KVCache = None,
    context_length: cli_options.ContextLength = None,
    target: cli_options.Target = cli_options.Targets.ort,
    device: cli_options.ExportDevice = cli_options.ExportDevices.cpu,
    state: cli_options.State = cli_options.States.growing,
    layout: cli_options.Layout = cli_options.Layouts.flat,
    format: cli_options.Format = cli_options.Formats.onnx,
    block_size: cli_options.BlockSize = None,
    rounding: cli_options.Rounding = None,
    verify: cli_options.Verify = True,
    max_kl: cli_options.MaxKL = None,
    ignore_config_field: cli_options.IgnoreConfigField = None,
    force: cli_options.Force = False,
) -> None:
    """Turn a checkpoint into a bundle.

    A bundle is a directory with the ONNX graph and everything else that a device needs to run it.
    """
    cli_output.note(f"exporting {model}")
    with cli_output.progress() as progress:
        report = doge_onnx.export(
            model,
            out,
            precision=None if precision is None else precision.value,
            kv_cache=None if kv_cache is None else kv_cache.value,
            context_length=context_length,
            target=target.value,
            device=device.value,
            state=state.value,
            layout=layout.value,
            format=format.value,
            block_size=block_size,
            rounding=None if rounding is None else rounding.value,
            verify=verify,
            max_kl=max_kl,
            revision=revision,
            adapter=adapter,
            ignore_config_fields=ignore_config_field or (),
            force=force,
            progress=progress,
        )
    cli_output.export_summary(out, report)


@app.command()
def verify(
    bundle: cli_options.Bundle,
    reference: cli_options.Reference,
    revision: cli_options.BundleRevision = None,
    reference_revision: cli_options.ReferenceRevision = None,
    adapter: cli_options.Adapter = None,
    device: cli_options.Device = cli_options.Devices.auto,
) -> None:
    """Compare a bundle with its checkpoint.

    The reference is transformers in float32, fed one token at a time. Compares the logits of a
    prompt (prefill), of the same prompt token by token (decode) and of a padded batch, then greedy
    continuations. Writes the figures into the bundle's manifest, if that can be written. The exit
    code is 3 if a difference exceeds the tolerance.
    """
    cli_output.note(f"comparing {bundle} with {reference}")
    with cli_output.progress() as progress:
        report = doge_onnx.verify(
            bundle,
            reference,
            device=device.value,
            revision=revision,
            reference_revision=reference_revision,
            adapter=adapter,
            progress=progress,
        )
    cli_output.parity(report)
    if report.unrecorded is not None:
        cli_output.note(f"warning: the figures are not kept: {report.unrecorded}")
    report.require(bundle)


@app.command("eval")
def evaluate(
    bundle: cli_options.Bundle,
    reference: cli_options.EvalReference = None,
    text: cli_options.EvalText = None,
    revision: cli_options.BundleRevision = None,
    reference_revision: cli_options.ReferenceRevision = None,
    adapter: cli_options.Adapter = None,
    max_tokens: cli_options.MaxTokens = None,
    window: cli_options.Window = None,
    seed: cli_options.EvalSeed = None,
    max_kl: cli_options.MaxKL = None,
    device: cli_options.Device = cli_options.Devices.auto,
    json: cli_options.JsonQuality = False,
) -> None:
    """Measure the quality of a bundle.

    Prints the perplexity of a text. With a reference, also prints how much the bundle differs from
    it: the mean KL divergence, how often both find the same token most likely, and by how much the
    reference prefers its own token where they disagree. Does not change the bundle. The exit code
    is 3 if the mean KL divergence is above --max-kl.
    """
    if max_kl is not None and reference is None:
        raise typer.BadParameter("it needs --reference", param_hint="--max-kl")
    cli_output.note(f"evaluating {bundle}")
    with cli_output.progress() as progress:
        report = doge_onnx.evaluate(
            bundle,
            reference,
            text,
            window=window,
            max_tokens=max_tokens,
            seed=seed,
            device=device.value,
            revision=revision,
            reference_revision=reference_revision,
            adapter=adapter,
            progress=progress,
        )
    if json:
        cli_output.quality_json(report)
    else:
        cli_output.quality(report)
    if max_kl is not None:
        report.require(max_kl, bundle)


@app.command(cls=_Continues)
@cli_options.generation_options()
def generate(
    bundle: cli_options.Bundle,
    prompt: cli_options.Prompt = None,
    chat: cli_options.AsChat = False,
    system: cli_options.System = None,
    answer_start: cli_options.AnswerStart = None,
    template_variable: cli_options.TemplateVariable = None,
    *,
    options: dict[str, Any],
    stop_escape: cli_options.StopEscape = False,
    json: cli_options.JsonCompletion = False,
    stats: cli_options.Stats = False,
    revision: cli_options.BundleRevision = None,
    threads: cli_options.Threads = None,
    prefill_chunk: cli_options.PrefillChunk = None,
    device: cli_options.Device = cli_options.Devices.auto,
    cuda_graph: cli_options.CudaGraph = None,
    native: cli_options.Native = True,
    verbose: cli_options.Verbose = False,
) -> None:
    """Continue a text, or with --chat answer a message.

    Writes the text, and nothing else, to standard output as it is generated. Options that are not
    given follow the bundle's generation_config.json, or else the defaults below.
    """
    for name in cli_options.REPORTED:
        if options.get(name) and not json:
            raise typer.BadParameter("it needs --json", param_hint=cli_options.flag(name))
    for name, value in (
        ("system", system),
        ("answer_start", answer_start),
        ("template_variable", template_variable),
    ):
        if value and not chat:
            raise typer.BadParameter("it needs --chat", param_hint=cli_options.flag(name))
    if stop_escape:
        options = cli_values.with_escapes(options)
    text: Any = _prompt(prompt)
    if chat:
        before = [] if system is None else [{"role": "system", "content": system}]
        text = [*before, {"role": "user", "content": text}]
        options |= _variables(template_variable)
    if answer_start is not None:
        text.append({"role": "assistant", "content": answer_start})
        options["continue_final_message"] = True
    model = _load(bundle, revision, device, threads, prefill_chunk, verbose, cuda_graph, native)
    options = cli_values.with_token_ids(options, model)
    if json:
        cli_output.completion_json(model.generate(text, **options), stats)
        return
    timings = None
    pieces = model.stream(text, **options)
    with cli_output.growing_text() as write:
        for piece in pieces:
            write(piece.text)
            timings = piece.timings
    if stats and timings is not None:
        cli_output.timings(timings)


@app.command()
@cli_options.generation_options(without=cli_options.REPORTED)
def chat(
    bundle: cli_options.Bundle,
    system: cli_options.System = None,
    template_variable: cli_options.TemplateVariable = None,
    *,
    options: dict[str, Any],
    stop_escape: cli_options.StopEscape = False,
    revision: cli_options.BundleRevision = None,
    threads: cli_options.Threads = None,
    prefill_chunk: cli_options.PrefillChunk = None,
    device: cli_options.Device = cli_options.Devices.auto,
    cuda_graph: cli_options.CudaGraph = None,
    native: cli_options.Native = True,
    verbose: cli_options.Verbose = False,
) -> None:
    """Talk with an instruction-tuned model.

    Each line that you type or pipe in is a message, and a line that ends in a backslash goes on in
    the next one. Lines pasted into a terminal are one message where Python has GNU readline. The
    answers appear on standard output. In a terminal, Ctrl-C ends an answer and Ctrl-D the
    conversation. The model remembers the whole conversation up to the context length, and then
    forgets the oldest turns.
    """
    if stop_escape:
        options = cli_values.with_escapes(options)
    model = _load(bundle, revision, device, threads, prefill_chunk, verbose, cuda_graph, native)
    options = cli_values.with_token_ids(options, model)
    conversation = model.chat(system, **options, **_variables(template_variable))
    for message in cli_input.messages():
        known = len(conversation.messages)
        answer = conversation.stream(message)
        cli_chat.print_answer(answer, interactive=sys.stdin.isatty())
        if len(conversation.messages) < known + 2:
            cli_output.note("(the oldest turns no longer fit and are forgotten)")


@app.command()
def bench(
    bundle: cli_options.Bundle,
    contexts: cli_options.Contexts = None,
    batches: cli_options.Batches = None,
    tokens: cli_options.DecodeSteps = None,
    repetitions: cli_options.Repetitions = None,
    threads: cli_options.Threads = None,
    device: cli_options.Device = cli_options.Devices.auto,
    cuda_graph: cli_options.CudaGraph = None,
    native: cli_options.Native = True,
    revision: cli_options.BundleRevision = None,
    json: cli_options.JsonBench = False,
) -> None:
    """Measure how fast a bundle runs on this machine.

    Runs prompts of several lengths, alone and in batches. Measures the time to the first token,
    prefill, decode, and the share of the machine's read bandwidth that a decode step uses (MBU);
    the bandwidth is measured in the same run. Measures load time and peak memory in fresh
    processes. Each figure is the median of the repetitions. The defaults take a minute or two for a
    model of 160 million parameters.
    """
    cli_output.note(f"measuring {bundle}")
    with cli_output.progress() as progress:
        report = doge_onnx.bench(
            bundle,
            contexts=contexts,
            batches=batches,
            tokens=tokens,
            repetitions=repetitions,
            threads=threads,
            device=device.value,
            cuda_graph=cuda_graph,
            native=native,
            revision=revision,
            progress=progress,
        )
    if json:
        cli_output.bench_json(report)
    else:
        cli_output.bench(report)


@app.command()
def info(
    bundle: cli_options.Bundle,
    revision: cli_options.BundleRevision = None,
    json: cli_options.JsonManifest = False,
) -> None:
    """Show what a bundle holds.

    Of a bundle on the Hub, the graph and its weights are not fetched.
    """
    from doge_onnx.runtime.engine.kernels import choose_kernels
    from doge_onnx.runtime.text_ends import TextEnds

    found = api.find_bundle(bundle, revision, weights=False)
    opened = found if isinstance(found, Bundle) else Bundle(Path(found), read_manifest(Path(found)))
    ends, kernels = TextEnds.read(opened), choose_kernels(opened.manifest)
    if json:
        cli_output.manifest_json(opened, ends, kernels)
    else:
        cli_output.manifest(opened, ends, kernels)


@app.command()
def push(
    bundle: cli_options.Bundle,
    repo: cli_options.Repo,
    private: cli_options.Private = False,
    revision: cli_options.Branch = None,
    message: cli_options.Message = None,
    dry_run: cli_options.DryRun = False,
) -> None:
    """Upload a bundle to the Hugging Face Hub.

    Compares all files of the bundle with their checksums, then uploads them, and nothing else of
    the directory, in one commit. Other files in the repository stay; files of the same name are
    replaced. Needs a token with write access: `hf auth login`, or the variable HF_TOKEN.
    """
    cli_output.note(f"pushing {bundle} to {repo}")
    report = doge_onnx.push(
        bundle,
        repo,
        private=private,
        revision=revision,
        message=message,
        dry_run=dry_run,
        # Lines and not a spinner, because the Hub's client draws progress bars.
        progress=lambda step: cli_output.note(f"  {step}"),
    )
    cli_output.push(report)


def _load(
    bundle: str,
    revision: str | None,
    device: cli_options.Devices,
    threads: int | None,
    prefill_chunk: int | None,
    verbose: bool,
    cuda_graph: bool | None,
    native: bool,
) -> Any:
    model = doge_onnx.load(
        bundle,
        device=device.value,
        threads=threads,
        prefill_chunk=prefill_chunk,
        verbose=verbose,
        cuda_graph=cuda_graph,
        native=native,
        revision=revision,
    )
    if model.reason_for_cpu is not None:
        cli_output.note(f"(this runs on the CPU: {model.reason_for_cpu})")
    return model


def _prompt(argument: str | None) -> str:
    """The prompt: the argument, or standard input if the argument is "-" or missing."""
    if argument is not None and argument != "-":
        return argument
    if argument is None and sys.stdin.isatty():
        raise typer.BadParameter(
            "nothing to continue: give a text, '-', or pipe one in", param_hint="PROMPT"
        )
    return cli_input.piped()


def _variables(entries: list[str] | None) -> dict[str, Any]:
    """The option of the library for variables of the chat template, if there are any."""
    try:
        found = cli_input.variables(entries or ())
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--template-variable") from None
    return {"template_variables": found} if found else {}


def _end(number: int, _frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)


def main(name: str = "doge-onnx") -> None:
    """Run the command line; the entry point of the `doge-onnx` script.

    Args:
        name: What the user called, for the lines about usage.
    """
    # SIGBREAK exists on Windows only: Ctrl-Break, or a console that is closed.
    for signal_name in ("SIGTERM", "SIGHUP", "SIGBREAK"):
        number = getattr(signal, signal_name, None)
        # The handler raises an exception, so that clean-up runs. What `nohup` ignores stays so.
        if number is not None and signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, _end)
    cli_output.prepare_streams()
    app(prog_name=name)


if __name__ == "__main__":
    main()
