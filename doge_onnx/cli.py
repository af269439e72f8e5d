"""The command line: one thin command per verb.

Knows the options, their help and the exit codes. What a verb does is the library's
business, how its result looks is `cli_output`'s. Whatever is slow to import is imported
inside of the commands, so that --help comes at once.
"""

from __future__ import annotations

import signal
import sys
from enum import StrEnum
from types import FrameType
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

import doge_onnx
from doge_onnx import cli_output
from doge_onnx.errors import DogeOnnxError, InputError

_INTERRUPTED = 130


class _Precision(StrEnum):
    fp32 = "fp32"


class _Target(StrEnum):
    ort = "ort"
    portable = "portable"


class _Verbs(TyperGroup):
    """Ends with one line and an exit code, rather than a traceback, what a user can cause."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run the whole command line."""
        try:
            return super().main(*args, **kwargs)
        except MemoryError:
            cli_output.error("not enough memory")
        # The system's own errors, such as a full disk behind standard output. A closed pipe is
        # none: typer ends quietly, since whoever read the output has had enough.
        except (DogeOnnxError, OSError) as error:
            cli_output.error(str(error))
        raise SystemExit(1)

    def invoke(self, ctx: Any) -> Any:
        """Run the verb that the command line names."""
        try:
            result = super().invoke(ctx)
            # Now, while it can still be reported that this fails.
            sys.stdout.flush()
        except KeyboardInterrupt:
            cli_output.error("interrupted")
            raise typer.Exit(_INTERRUPTED) from None
        return result


app = typer.Typer(
    name="doge-onnx",
    cls=_Verbs,
    help="Export Doge language models to ONNX in recurrent-step form, and run them.",
    epilog="Start with: doge-onnx export SmallDoge/Doge-160M bundle",
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

_Bundle = Annotated[
    str,
    typer.Argument(metavar="BUNDLE", help="Directory that `doge-onnx export` wrote."),
]
_Revision = Annotated[
    str | None,
    typer.Option(
        metavar="REV",
        help="Branch, tag or commit of a model on the Hub. Default: its main branch.",
        show_default=False,
    ),
]


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
    """Hold the options that come before the verb; --version acts on its own."""


@app.command()
def export(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="Checkpoint: a directory, or an id on the Hugging Face Hub such as "
            "SmallDoge/Doge-160M.",
        ),
    ],
    out: Annotated[
        str, typer.Argument(metavar="OUT", help="Directory to write; it must not exist yet.")
    ],
    revision: _Revision = None,
    precision: Annotated[
        _Precision, typer.Option(help="Number format of the weights.")
    ] = _Precision.fp32,
    context_length: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Most tokens that a text may have, prompt included. "
            "Default: what the model was trained for.",
            show_default=False,
        ),
    ] = None,
    target: Annotated[
        _Target,
        typer.Option(
            help="'ort': ONNX Runtime's fused operators, the fastest. 'portable': standard ONNX "
            "operators only, for other engines."
        ),
    ] = _Target.ort,
    verify: Annotated[
        bool,
        typer.Option(help="Compare the result with transformers, and keep it only if both agree."),
    ] = True,
    force: Annotated[
        bool, typer.Option("--force", help="Replace a bundle that is already at OUT.")
    ] = False,
) -> None:
    """Turn a checkpoint into a bundle.

    A bundle is a directory with the ONNX graph and all else that a device needs to run it.
    """
    cli_output.note(f"exporting {model}")
    with cli_output.progress() as progress:
        report = doge_onnx.export(
            model,
            out,
            precision=precision.value,
            context_length=context_length,
            target=target.value,
            verify=verify,
            revision=revision,
            force=force,
            progress=progress,
        )
    cli_output.export_summary(out, report)


@app.command()
def verify(
    bundle: _Bundle,
    reference: Annotated[
        str,
        typer.Option(
            metavar="MODEL",
            help="The checkpoint that the bundle was made from: a directory or a Hub id.",
        ),
    ],
    revision: _Revision = None,
) -> None:
    """Compare a bundle with its checkpoint.

    The reference is transformers in float32, fed one token at a time. Compares the logits of
    a prompt (prefill), of the same prompt token by token (decode) and of a padded batch, then
    greedy continuations. Writes the figures into the bundle's manifest. The exit code is 1 if
    a difference is beyond the tolerance.
    """
    cli_output.note(f"comparing {bundle} with {reference}")
    with cli_output.progress() as progress:
        report = doge_onnx.verify(bundle, reference, revision=revision, progress=progress)
    cli_output.parity(report)
    report.require(bundle)


@app.command()
def generate(
    bundle: _Bundle,
    prompt: Annotated[
        str | None,
        typer.Argument(
            metavar="PROMPT",
            help="Text to continue. '-', or no PROMPT when something is piped in, reads standard "
            "input, without the newline at its end.",
            show_default=False,
        ),
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            min=0,
            metavar="N",
            help="Most tokens to generate. Default: up to the end of the context.",
            show_default=False,
        ),
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(
            min=0,
            metavar="T",
            help="0 always takes the most likely token (greedy); higher is more varied. Default: "
            "what the bundle recommends, else greedy.",
            show_default=False,
        ),
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="K",
            help="Sample from the K most likely tokens. Default: no limit.",
            show_default=False,
        ),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            metavar="P",
            help="Sample from the most likely tokens that have probability P together, above 0 "
            "and at most 1. Default: all.",
            show_default=False,
        ),
    ] = None,
    min_p: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            metavar="P",
            help="Sample from tokens at least P times as likely as the best one, 0 to 1. "
            "Default: all.",
            show_default=False,
        ),
    ] = None,
    repetition_penalty: Annotated[
        float | None,
        typer.Option(
            min=0,
            metavar="R",
            help="Above 1 makes tokens that already occurred less likely; 1.1 is mild. "
            "Default: none.",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            min=0,
            metavar="N",
            help="The same seed gives the same text. Default: another text each time.",
            show_default=False,
        ),
    ] = None,
    stop: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT",
            help="End before this text appears; may be given several times.",
            show_default=False,
        ),
    ] = None,
    logprobs: Annotated[
        bool,
        typer.Option(
            "--logprobs", help="With --json: add the natural log-probability of every token."
        ),
    ] = False,
    json: Annotated[
        bool,
        typer.Option("--json", help="Print one JSON object at the end instead of streaming text."),
    ] = False,
    stats: Annotated[
        bool,
        typer.Option(
            "--stats", help="Add prefill and decode tokens per second; without --json on stderr."
        ),
    ] = False,
    threads: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="CPU threads to use. Default: ONNX Runtime decides.",
            show_default=False,
        ),
    ] = None,
    device: Annotated[str, typer.Option(metavar="NAME", help="Where to run: 'cpu'.")] = "cpu",
    verbose: Annotated[
        bool, typer.Option("--verbose", help="Let ONNX Runtime's warnings through.")
    ] = False,
) -> None:
    """Continue a text.

    The text appears on standard output as it is generated, and nothing else does.
    """
    if logprobs and not json:
        raise typer.BadParameter("it needs --json", param_hint="--logprobs")
    text = _prompt(prompt)
    model = doge_onnx.load(bundle, device=device, threads=threads, verbose=verbose)
    options: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
        "stop": stop,
        "logprobs": logprobs,
    }
    if json:
        cli_output.completion_json(model.generate(text, **options), stats)
        return
    pieces = model.stream(text, **options)
    timings = None
    try:
        for piece in pieces:
            sys.stdout.write(piece)
            sys.stdout.flush()
            timings = piece.timings
    finally:
        # Also after Ctrl-C: what comes next begins on a line of its own.
        sys.stdout.write("\n")
        sys.stdout.flush()
    if stats and timings is not None:
        cli_output.timings(timings)


@app.command()
def info(
    bundle: _Bundle,
    json: Annotated[
        bool, typer.Option("--json", help="Print the manifest as it is, for a program.")
    ] = False,
) -> None:
    """Show what a bundle holds."""
    from pathlib import Path

    from doge_onnx.bundle import read_manifest

    manifest = read_manifest(Path(bundle))
    if json:
        cli_output.json_text(manifest.to_json())
    else:
        cli_output.manifest(manifest)


def _prompt(argument: str | None) -> str:
    """The prompt itself, read from standard input where that was asked for."""
    if argument is not None and argument != "-":
        return argument
    if argument is None and sys.stdin.isatty():
        raise typer.BadParameter(
            "nothing to continue: give a text, '-', or pipe one in", param_hint="PROMPT"
        )
    # Not by way of sys.stdin's own encoding, which is the locale's.
    try:
        text = sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"standard input is not UTF-8 text: {error}") from None
    # What `echo` and editors put at the end is seldom meant as a part of the text.
    return text.removesuffix("\n").removesuffix("\r")


def _end(number: int, _frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)


def main() -> None:
    """Run the command line; the entry point of the `doge-onnx` script."""
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        # As an exception, so that clean-up runs. What `nohup` ignores stays ignored.
        if number is not None and signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, _end)
    cli_output.prepare_streams()
    app(prog_name="doge-onnx")


if __name__ == "__main__":
    main()
