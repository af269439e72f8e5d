"""Write the generated parts of docs/: the help of all commands, the API, the manifest's fields.

    python tools/documentation.py

Knows how docstrings and help become Markdown. Their text is in the code; a test checks that the
pages are up to date.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import doge_onnx
from doge_onnx import api, cli, errors, hub, manifest
from doge_onnx.export import exporter, verify
from doge_onnx.measure import bench, evaluate, start_up, workload
from doge_onnx.runtime import chat as conversation
from doge_onnx.runtime import model
from doge_onnx.runtime.engine import kernels, state
from doge_onnx.runtime.generation import config as options
from doge_onnx.runtime.generation import output as completion
from doge_onnx.runtime.generation import processors, sampling
from doge_onnx.runtime.generation.option import Option
from doge_onnx.runtime.text import tokenizer

DOCS = Path(__file__).resolve().parent.parent / "docs"
# As wide as a narrow terminal, whatever the real one is.
HELP_WIDTH = 80
SIGNATURE_WIDTH = 88
NOTE = "<!-- Written by `make docs`: change the code instead. -->\n"
BEGIN, END = "<!-- manifest: begin -->\n", "<!-- manifest: end -->\n"

FUNCTIONS = (api.export, api.load, api.verify, api.evaluate, api.bench, api.push)
CLASSES: dict[str, tuple[type, ...]] = {
    "A loaded model": (
        model.Model,
        conversation.Chat,
        options.GenerationConfig,
        completion.Completion,
        completion.Piece,
        completion.TokenLogprob,
        completion.Timings,
        tokenizer.Tokenizer,
        processors.LogitsProcessor,
        sampling.Sampler,
        state.State,
        kernels.Kernels,
    ),
    "Reports": (
        exporter.ExportReport,
        verify.ParityReport,
        evaluate.QualityReport,
        bench.BenchReport,
        bench.CellReport,
        start_up.StartReport,
        bench.LeftOut,
        workload.Spread,
        hub.PushReport,
    ),
    "The manifest": (
        manifest.Manifest,
        manifest.StateLayout,
        manifest.ClosedRow,
        manifest.WeightsRead,
    ),
}
# Names for annotations, which have no docstring.
TYPES = {
    "Prompt": "what `Model.generate` continues: text, token ids or messages.",
    "GenerationOptions": "the fields of `GenerationConfig` as keyword arguments, a `TypedDict`.",
    "FinishReason": 'why a text ended: "eos", "stop" or "length".',
}
# Names without an underscore that only the package itself uses.
INTERNAL = {
    "Completion.join",
    "GenerationConfig.given",
    "GenerationConfig.token_ids",
    "Manifest.from_json",
    "Spread.of",
    "State.belongs_to",
    "Tokenizer.visible",
}
_SECTION = re.compile(r"^(Args|Attributes|Returns|Yields|Raises|Example):$")
_TITLES = {"Args": "Arguments", "Attributes": "Attributes", "Raises": "Raises"}


def pages() -> dict[Path, str]:
    """The text that each page should have, by its path."""
    formats = DOCS / "formats.md"
    before, rest = formats.read_text(encoding="utf-8").split(BEGIN)
    after = rest.split(END)[1]
    return {
        DOCS / "commands.md": commands(),
        DOCS / "api.md": library(),
        formats: f"{before}{BEGIN}{manifest_fields()}{END}{after}",
    }


def commands() -> str:
    """The page with the help of each command, as `--help` prints it."""
    from typer.main import get_command

    group: Any = get_command(cli.app)
    top = group.context_class(
        group, info_name="doge-onnx", terminal_width=HELP_WIDTH, **group.context_settings
    )
    parts = [
        f"# Commands\n\n{NOTE}\nWhat `--help` prints. [command-line](command-line.md) has "
        "what all share.\n",
        _help("doge-onnx", group, top),
    ]
    for name, command in group.commands.items():
        context = command.context_class(
            command, info_name=name, parent=top, terminal_width=HELP_WIDTH
        )
        parts.append(_help(f"doge-onnx {name}", command, context))
    return "\n".join(parts)


def _help(title: str, command: Any, context: Any) -> str:
    lines = (line.rstrip() for line in command.get_help(context).splitlines())
    return f"## {title}\n\n```text\n" + "\n".join(lines) + "\n```\n"


def library() -> str:
    """The page of the Python API, made from docstrings."""
    summary, _, example = (doge_onnx.__doc__ or "").partition("\n\nExample:\n")
    code = "\n".join(line.strip().removeprefix(">>> ") for line in example.strip().splitlines())
    parts = [
        f"# Python API\n\n{NOTE}\n{summary.strip()}\n\n"
        f"```python\nimport doge_onnx\n\n{code}\n```\n\nAll of this is typed. Names that are not "
        "here may change at any time. Classes of a loaded model are in `doge_onnx`, too.\n",
        "## Functions\n",
    ]
    parts += [
        function_section(f"doge_onnx.{function.__name__}", function) for function in FUNCTIONS
    ]
    for title, classes in CLASSES.items():
        parts.append(f"## {title}\n")
        parts += [part for entry in classes for part in _class(entry)]
    parts.append("## Types\n")
    parts.append("\n".join(f"- `{name}`: {words}" for name, words in TYPES.items()) + "\n")
    parts.append("## Errors\n\nAll are in `doge_onnx`, and children of `DogeOnnxError`.\n")
    found = [(name, entry) for name, entry in vars(errors).items() if name in doge_onnx.__all__]
    parts.append("\n".join(f"- `{name}`: {inspect.getdoc(entry)}" for name, entry in found) + "\n")
    return "\n".join(parts)


def function_section(name: str, function: Any, level: str = "###") -> str:
    """A function as Markdown: a heading, the signature and the docstring.

    Args:
        name: Name in the heading; its last part is that of the signature.
        function: The function.
        level: Mark of the heading.
    """
    signature = _signature(name.rpartition(".")[2], function)
    return f"{level} {name}\n\n```python\n{signature}\n```\n\n{_docstring(function)}"


def _class(entry: type) -> Iterator[str]:
    types = {
        name: kind if isinstance(kind, str) else getattr(kind, "__name__", str(kind))
        for name, kind in inspect.get_annotations(entry).items()
    }
    words = _docstring(entry, types)
    if entry is options.GenerationConfig:
        words += _options()
    elif dataclasses.is_dataclass(entry) and "Attributes:" not in words:
        words += (
            "\nAttributes: " + ", ".join(f"`{n}` (`{kind}`)" for n, kind in types.items()) + ".\n"
        )
    yield f"### {entry.__name__}\n\n{words}"
    for name, member in vars(entry).items():
        full = f"{entry.__name__}.{name}"
        if (name.startswith("_") and name != "__call__") or full in INTERNAL:
            continue
        if isinstance(member, property):
            kind = inspect.get_annotations(member.fget)["return"] if member.fget else ""
            yield f"#### {full}\n\n`{kind}`. {_docstring(member)}"
        elif inspect.isfunction(member):
            yield function_section(full, member, "####")


def _options() -> str:
    """The options of generation as the attributes of their class."""
    items = []
    for field in dataclasses.fields(options.GenerationConfig):
        option: Option = field.metadata["option"]
        items.append(
            f"- `{field.name}` (`{field.type}`): {option.help} {_capitalized(option.words)}. "
            f"Default: {option.default}.\n"
        )
    return "\nAttributes:\n\n" + "".join(items)


def _capitalized(words: str) -> str:
    return words[0].upper() + words[1:]


def _signature(name: str, function: Any) -> str:
    """The signature on one line or, if that is too long, with one parameter per line."""
    signature = inspect.signature(function)
    shown, keyword_only = [], False
    for parameter in signature.parameters.values():
        if parameter.name == "self":
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and not keyword_only:
            keyword_only = True
            shown.append("*")
        stars = "**" if parameter.kind is parameter.VAR_KEYWORD else ""
        text = f"{stars}{parameter.name}: {parameter.annotation}"
        if parameter.default is not parameter.empty:
            default = parameter.default
            text += f" = {json.dumps(default) if isinstance(default, str) else default}"
        shown.append(text)
    line = f"{name}({', '.join(shown)}) -> {signature.return_annotation}"
    if len(line) <= SIGNATURE_WIDTH:
        return line
    body = "".join(f"    {text},\n" for text in shown)
    return f"{name}(\n{body}) -> {signature.return_annotation}"


def _docstring(entry: Any, types: dict[str, str] | None = None) -> str:
    """A docstring as Markdown; `types` are those of attributes."""
    section = ""
    paragraphs: list[str] = []
    items: list[str] = []
    blocks: list[str] = []

    def finish() -> None:
        text = "\n".join(paragraphs).strip()
        if section in _TITLES:
            blocks.append(f"{_TITLES[section]}:\n")
            blocks.append("\n".join(items) + "\n")
        elif section in ("Returns", "Yields"):
            blocks.append(f"{section}: {text}\n")
        elif text:
            blocks.append(f"{text}\n")

    for line in (inspect.getdoc(entry) or "").splitlines():
        if found := _SECTION.match(line):
            finish()
            section, paragraphs, items = found.group(1), [], []
        elif section in _TITLES and (item := re.match(r"^    (\w+): (.*)$", line)):
            name, text = item.groups()
            kind = f" (`{types[name]}`)" if types and name in types else ""
            items.append(f"- `{name}`{kind}: {text}")
        elif section in _TITLES and line:
            items[-1] += f" {line.strip()}"
        else:
            paragraphs.append(line.strip() if section else line)
    finish()
    return "\n".join(blocks)


def manifest_fields() -> str:
    """The fields of the manifest and of the objects in it."""
    lines = [
        "<!-- Written by `make docs`, too. -->\n",
        f"This is version {manifest.FORMAT_VERSION} of the format.\n",
    ]
    lines += ["| field | type | |", "|---|---|---|"]
    for entry, prefix in (
        (manifest.Manifest, ""),
        (manifest.WeightsRead, "weights_read."),
        (manifest.StateLayout, "state."),
        (manifest.ClosedRow, "state.closing."),
    ):
        words = dict(re.findall(r"^- `(\w+)`: (.*)$", _docstring(entry), flags=re.MULTILINE))
        for field in dataclasses.fields(entry):
            kind = str(field.type).replace("|", "\\|")
            lines.append(f"| `{prefix}{field.name}` | `{kind}` | {words[field.name]} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write the pages."""
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8", newline="\n")
        print(path)


if __name__ == "__main__":
    main()
