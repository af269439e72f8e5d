"""Prints the output of the commands: results to stdout, everything else to stderr.

Knows how manifests, comparisons, measurements and completions look, for a person and as JSON. Does
not know options and computes nothing.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from doge_onnx import text_files
from doge_onnx.bundle import Bundle

if TYPE_CHECKING:
    from rich.status import Status

    from doge_onnx.export.exporter import ExportReport
    from doge_onnx.export.verify import ParityReport
    from doge_onnx.hub import PushReport
    from doge_onnx.manifest import Manifest
    from doge_onnx.measure.bench import BenchReport
    from doge_onnx.measure.evaluate import QualityReport
    from doge_onnx.measure.workload import Spread
    from doge_onnx.runtime.engine.kernels import Kernels
    from doge_onnx.runtime.generation.output import Completion, Timings
    from doge_onnx.runtime.text_ends import EndToken, TextEnds

# With NO_COLOR, rich leaves colours out but not bold and dim, which are codes for a terminal, too.
_CODES: Literal["auto"] | None = None if os.environ.get("NO_COLOR") else "auto"
_stdout = Console(highlight=False, markup=False, color_system=_CODES)
_stderr = Console(highlight=False, markup=False, color_system=_CODES, stderr=True)
# Mean KL divergence, in nats per token, above which an export prints a warning.
_NOTABLE_KL = 0.05


def prepare_streams() -> None:
    """Use UTF-8 and plain newlines for pipes and files, on every system.

    A terminal keeps its own encoding and newlines.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        # The process that starts a command may have closed its streams.
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 - open until the end
    if isinstance(sys.stdin, io.TextIOWrapper):
        # What is typed may be UTF-8 though the locale says something else.
        sys.stdin.reconfigure(errors="surrogateescape")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            encoding, newline = (None, None) if stream.isatty() else ("utf-8", "\n")
            # A file name may hold bytes that are not text, and a terminal may lack a character.
            stream.reconfigure(encoding=encoding, newline=newline, errors="backslashreplace")


def drop_unwritable() -> None:
    """Discard output that cannot be written, or Python would report the error again at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def note(words: str) -> None:
    """Print a line on stderr that says what the command does."""
    _stderr.print(Text(_printable(words), style="dim"), soft_wrap=True)


def error(message: str) -> None:
    """Print an error as one line on stderr, even if the message has several lines."""
    line = Text.assemble(("error:", "bold red"), " ", _printable(message.replace("\n", " ")))
    _stderr.print(line, soft_wrap=True)


@contextlib.contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """A context whose value is a function that a long task calls when each step begins.

    On a terminal, it shows the step beside a spinner; elsewhere, it prints a line for each step.
    """
    status: Status | None = None
    spinner = "dots" if _stderr.encoding.startswith("utf") else "line"
    # FORCE_COLOR makes rich take a pipe for a terminal.
    moves = sys.stderr.isatty() and not _stderr.is_dumb_terminal

    def begin(step: str) -> None:
        nonlocal status
        if not moves:
            note(f"  {step}")
        elif status is None:
            # Starts with the first step, because a download before it draws its own progress bar.
            status = _stderr.status(escape(step), spinner=spinner)
            status.start()
        else:
            status.update(escape(step))

    try:
        yield begin
    finally:
        if status is not None:
            status.stop()


@contextlib.contextmanager
def growing_text() -> Iterator[Callable[[str], None]]:
    """A context whose value prints a piece of a text at once; in the end, the line ends.

    After an error or Ctrl-C, the line ends only if it had begun.
    """
    begun = False

    def write(piece: str) -> None:
        nonlocal begun
        begun = True
        sys.stdout.write(piece)
        sys.stdout.flush()

    try:
        yield write
    except BaseException:
        if begun:
            write("\n")
        raise
    write("\n")


def export_summary(out: str, report: ExportReport) -> None:
    """Print the summary of an export."""
    for sentence in report.manifest.notes:
        note(f"note: {sentence}")
    rows: dict[str, object] = {
        "bundle": out,
        "size": _megabytes(report.size),
        "parameters": report.manifest.parameters,
        "context": _context(report.manifest),
        "parity": "not checked" if report.unchecked is None else f"not checked: {report.unchecked}",
        "took": f"{report.seconds:.1f} s",
    }
    if report.parity is not None:
        rows["parity"] = (
            f"differs by {report.parity.max_abs_diff:.1e} at most, tolerance "
            f"{report.parity.tolerance:.1e}; greedy match {_greedy(report.parity)}"
        )
    if report.quality is not None:
        lost = report.quality
        # A quantized bundle cannot have parity, so its loss is shown instead.
        del rows["parity"]
        rows["lost"] = (
            f"KL divergence {lost.mean_kl:.2g} nats per token, top-1 agreement "
            f"{lost.top1_agreement:.1%} (on {lost.tokens:,} tokens that the checkpoint wrote)"
        )
        if lost.mean_kl is not None and lost.mean_kl > _NOTABLE_KL:
            note(f"warning: {lost.mean_kl:.3f} nats per token are much to lose; try int8, or fp32")
    _print_rows(rows)


def _context(shown: Manifest) -> str:
    if shown.state.kind == "window":
        return "no end"
    return f"{shown.context_length:,} tokens"


def parity(report: ParityReport) -> None:
    """Print the figures of a comparison with the reference."""
    _print_rows(
        {
            "reference": report.reference,
            "device": report.device,
            "prefill": f"{report.prefill:.1e}",
            "decode": f"{report.decode:.1e}",
            "batch": f"{report.batch:.1e}",
            "maximum absolute difference": f"{report.max_abs_diff:.1e}",
            "tolerance": f"{report.tolerance:.1e} (largest logit {report.logit_scale:.1f})",
            "greedy match": _greedy(report),
        }
    )


def quality(report: QualityReport) -> None:
    """Print the figures of an evaluation."""
    rows: dict[str, object] = {
        "text": report.text if report.seed is None else f"{report.text}, seed {report.seed}",
        "tokens": f"{report.tokens:,} in windows of {report.window:,}",
        "perplexity": f"{report.perplexity:.4g}",
    }
    if report.reference_perplexity is not None:
        change = report.perplexity / report.reference_perplexity - 1
        rows |= {
            "reference": report.reference,
            "perplexity of the reference": f"{report.reference_perplexity:.4g} ({change:+.2%})",
            "mean KL divergence": f"{report.mean_kl:.3g} nats per token",
            "largest KL divergence": f"{report.max_kl:.3g} nats",
            "top-1 agreement": f"{report.top1_agreement:.2%}",
            "disagreements": report.disagreements,
        }
    if report.disagreements:
        rows |= {
            "  top-1/top-2 gap": _gap(report.top2_gap_median, report.top2_gap_max),
            "  gap to the bundle's choice": _gap(report.choice_gap_median, report.choice_gap_max),
        }
    _print_rows(rows)


def _gap(median: float | None, largest: float | None) -> str:
    return f"{median:.3g} in the median, {largest:.3g} at most (logits of the reference)"


def quality_json(report: QualityReport) -> None:
    """Print the figures of an evaluation as one JSON object."""
    json_text(json.dumps(report.as_dict(), ensure_ascii=False))


def manifest(bundle: Bundle, ends: TextEnds, kernels: Kernels) -> None:
    """Print a bundle's manifest for a person, and what ends a text.

    Args:
        bundle: Whose manifest it is.
        ends: Of the same bundle.
        kernels: Which would run it on the CPU of this machine.
    """
    shown = bundle.manifest
    state = shown.state
    if bundle.repo is not None:
        _print_section("Hub", {"repository": bundle.repo, "revision": bundle.commit})
    row = f"{state.num_heads} heads x {state.row_size} channels ({state.head_dim} + gates + rest)"
    _print_section(
        "Model",
        {
            "source": shown.source.get("model"),
            "revision": shown.source.get("revision"),
            **({"adapter": adapter} if (adapter := shown.source.get("adapter")) else {}),
            "parameters": shown.parameters,
            "vocabulary": f"{shown.vocab_size:,} tokens",
            "context": _context(shown),
        },
    )
    _print_section(
        "Graph",
        {
            "file": shown.graph,
            "target": shown.target,
            "made for": shown.device,
            "precision": shown.precision,
            "activations": shown.activations,
            "state": f"{state.kind}, {state.num_layers} layers, {state.dtype}",
            "key or value row": row,
            "keep window (keys)": state.keep_window_size,
            "updated in place": state.in_place,
            "kernels": kernels,
        },
    )
    parity = shown.parity or {"checked": False}
    _print_section("Parity", _spaced(parity))
    if shown.quality is not None:
        _print_section("Quality", _spaced(shown.quality))
    if shown.notes:
        _print_section("Notes", {str(n): text for n, text in enumerate(shown.notes, start=1)})
    _print_section("Generation", dict(_generation(ends)))
    _print_section("Made with", shown.versions)
    sizes = {
        name: entry.get("size") if isinstance(entry, dict) else None
        for name, entry in shown.files.items()
    }
    _print_section(
        "Files",
        {name: _megabytes(size) if isinstance(size, int) else None for name, size in sizes.items()},
    )


def _generation(ends: TextEnds) -> Iterator[tuple[str, str]]:
    yield "ends a text", ", ".join(map(_token, ends.tokens)) or "no token"
    if ends.other is not None:
        yield "does not, but the tokenizer says so", _token(ends.other)
    if ends.stop:
        yield "ends before", ", ".join(map(repr, ends.stop))
    if ends.defaults.ignored:
        yield "asked for, not done", ", ".join(ends.defaults.ignored)
    if ends.defaults.without_effect:
        yield "without effect", ", ".join(ends.defaults.without_effect)


def _token(token: EndToken) -> str:
    return str(token.id) if token.text is None else f"{token.id} {token.text}"


def manifest_json(bundle: Bundle, ends: TextEnds, kernels: Kernels) -> None:
    """Print a manifest as JSON; see `manifest`."""
    fields = json.loads(bundle.manifest.to_json()) | {
        "end_tokens": [asdict(token) for token in ends.tokens],
        "stop_strings": list(ends.stop),
        "other_end_token": None if ends.other is None else asdict(ends.other),
        "ignored_generation_options": list(ends.defaults.ignored),
        "generation_options_without_effect": list(ends.defaults.without_effect),
        "kernels": asdict(kernels),
        "hub": {"repository": bundle.repo, "revision": bundle.commit} if bundle.repo else None,
    }
    json_text(json.dumps(fields, indent=2, ensure_ascii=False))


def push(report: PushReport) -> None:
    """Print which files were uploaded, or would be, and to which address."""
    _print_section("Files", {name: _megabytes(size) for name, size in report.files.items()})
    _print_rows(
        {
            "size": _megabytes(report.size),
            "repository": report.repo,
            "branch": report.revision,
            "message": report.message,
            "url": report.url,
        }
    )
    if report.url is None:
        note("nothing was uploaded: this is a dry run")


def bench(report: BenchReport) -> None:
    """Print the speed of a bundle."""
    start = report.start
    peak = "unknown"
    if start.peak_memory_bytes is not None:
        peak = (
            f"{_megabytes(round(start.peak_memory_bytes.median))}, "
            f"{start.peak_to_file:.2f} times the files"
        )
    _print_section(
        "Bundle",
        {
            "precision": report.precision,
            "state": report.state,
            "graph and weights": _megabytes(report.file_bytes),
        },
    )
    _print_section(
        "Machine",
        {
            "processor": f"{report.machine['processor']}, {report.machine['cores']} cores",
            "device": report.device + (", with a CUDA graph" if report.cuda_graph else ""),
            "kernels": report.kernels,
            "threads": report.threads,
            "read bandwidth": f"{report.read_bytes_per_second / 1e9:.1f} GB/s",
        },
    )
    _print_section(
        "Fresh process, files in the cache",
        {
            "imports": _seconds(start.import_seconds),
            "load": _seconds(start.load_seconds),
            "first token, imports and load included": _seconds(start.first_token_seconds),
            f"peak memory, context {start.context}": peak,
        },
    )
    _stdout.print(Text("Speed", style="bold"))
    # At most 80 columns, the width that rich assumes for a pipe.
    table = Table(box=None, pad_edge=False, header_style="cyan")
    for header in (
        "\ncontext",
        "\nbatch",
        "first token\nms",
        "prefill\ntok/s",
        "decode\ntok/s",
        "decode\nmin to max",
        "read\nMB/tok",
        "\nMBU",
    ):
        table.add_column(header, justify="right", no_wrap=True)
    for cell in report.cells:
        decode = cell.decode_tokens_per_second
        table.add_row(
            f"{cell.context:,}",
            f"{cell.batch:,}",
            _figure(1e3 * cell.first_token_seconds.median),
            _figure(cell.prefill_tokens_per_second.median),
            _figure(decode.median),
            f"{_figure(decode.min)} - {_figure(decode.max)}",
            _figure(cell.bytes_per_token / 1e6),
            f"{cell.mbu:.0%}",
        )
    _stdout.print(table)
    for left_out in report.left_out:
        note(f"left out: context {left_out.context:,}: {left_out.reason}")
    if any(cell.mbu > 1 for cell in report.cells):
        note("MBU above 100%: the processor's caches hold a part of what a step reads")


def bench_json(report: BenchReport) -> None:
    """Print the speed of a bundle as one JSON object."""
    json_text(json.dumps(report.as_dict(), ensure_ascii=False))


def _figure(value: float) -> str:
    return f"{value:.1f}" if value < 1000 else f"{value:,.0f}"


def _seconds(spread: Spread) -> str:
    return f"{spread.median:.2f} s ({spread.min:.2f} - {spread.max:.2f})"


def json_text(text: str) -> None:
    """Print JSON unchanged, with one newline at the end."""
    sys.stdout.write(text.rstrip("\n") + "\n")


def completion_json(completion: Completion, stats: bool) -> None:
    """Print a completion as one JSON object."""
    fields: dict[str, Any] = {
        "text": completion.text,
        "token_ids": completion.token_ids,
        "finish_reason": completion.finish_reason,
        "prompt_tokens": completion.prompt_tokens,
    }
    if completion.logprobs is not None:
        fields["logprobs"] = completion.logprobs
    if completion.top_logprobs is not None:
        fields["top_logprobs"] = [
            [asdict(token) for token in tokens] for tokens in completion.top_logprobs
        ]
    if stats:
        timings = completion.timings
        fields["stats"] = {
            "generated_tokens": timings.generated_tokens,
            "prefill_seconds": timings.prefill_seconds,
            "decode_seconds": timings.decode_seconds,
            "prefill_tokens_per_second": timings.prefill_tokens_per_second,
            "decode_tokens_per_second": timings.decode_tokens_per_second,
        }
    json_text(json.dumps(fields, ensure_ascii=False))


def timings(measured: Timings) -> None:
    """Print tokens per second on stderr, one line for prefill and one for decode."""
    for name, tokens, seconds, rate in (
        (
            "prefill",
            measured.prompt_tokens,
            measured.prefill_seconds,
            measured.prefill_tokens_per_second,
        ),
        (
            "decode",
            # The prefill gives the first token.
            max(measured.generated_tokens - 1, 0),
            measured.decode_seconds,
            measured.decode_tokens_per_second,
        ),
    ):
        speed = "" if rate is None else f", {rate:.1f} tokens/s"
        note(f"{name}: {tokens} tokens in {seconds:.3f} s{speed}")


def _print_section(title: str, rows: Mapping[str, object]) -> None:
    _stdout.print(Text(title, style="bold"))
    _print_rows({f"  {name}": value for name, value in rows.items()})


def _spaced(figures: Mapping[str, object]) -> dict[str, object]:
    return {name.replace("_", " "): value for name, value in figures.items()}


def _print_rows(rows: Mapping[str, object]) -> None:
    # Not a table of rich, which would cut or fold long paths, in a pipe too.
    width = max(map(len, rows), default=0)
    for name, value in rows.items():
        line = Text.assemble((name.ljust(width), "cyan"), "  ", _words(value))
        _stdout.print(line, soft_wrap=True)


def _printable(text: str) -> str:
    """A text with control characters escaped: a file may hold commands for the terminal."""
    # The name of a file, in a locale that is not UTF-8.
    with contextlib.suppress(ValueError):
        text = text_files.repair(text)
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )


def _words(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else _printable(str(value))


def _megabytes(size: int) -> str:
    # The smallest files of a bundle have a few hundred bytes.
    return f"{size / 1e6:.1f} MB" if size >= 100_000 else f"{size / 1e3:.1f} kB"


def _greedy(report: ParityReport) -> str:
    return f"{report.greedy_matched}/{report.greedy_total} tokens"
