"""The arguments and options of the commands: the type, limits and help of each.

Knows how options are written on the command line. Errors in them are wrong usage, with an exit code
of its own; the library checks all values once more. Does not know what the options do. Those of
generation are taken from the fields of `GenerationConfig`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Iterator
from dataclasses import fields
from enum import StrEnum
from types import GenericAlias
from typing import Annotated, Any

import typer

from doge_onnx import cli_input
from doge_onnx.runtime.engine.threads import MOST_THREADS
from doge_onnx.runtime.generation.config import GenerationConfig
from doge_onnx.runtime.generation.option import Option

# Options whose values are token ids, which the command line also takes as the text of a token.
NAMED_TOKENS = {"stop_token_ids": "--stop-token", "suppress_tokens": "--suppress-token"}
# Options that add to the report beside the text, which only the JSON output has.
REPORTED = ("logprobs", "top_logprobs")


class Precisions(StrEnum):
    """Values of --precision."""

    fp32 = "fp32"
    fp16 = "fp16"
    bf16 = "bf16"
    int8 = "int8"
    int4 = "int4"


class KVCaches(StrEnum):
    """Values of --kv-cache."""

    fp32 = "fp32"
    int8 = "int8"


class Devices(StrEnum):
    """Values of --device in commands that run a bundle."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class ExportDevices(StrEnum):
    """Values of --device in `export`."""

    cpu = "cpu"
    cuda = "cuda"


class Roundings(StrEnum):
    """Values of --rounding."""

    gptq = "gptq"
    nearest = "nearest"


class Targets(StrEnum):
    """Values of --target."""

    ort = "ort"
    portable = "portable"


class States(StrEnum):
    """Values of --state."""

    growing = "growing"
    window = "window"


class Layouts(StrEnum):
    """Values of --layout."""

    flat = "flat"
    hub = "hub"


class Formats(StrEnum):
    """Values of --format."""

    onnx = "onnx"
    ort = "ort"


def generation_options(
    without: Collection[str] = (),
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A decorator that replaces a command's parameter `options` by the options of generation.

    The command is called with one dict of the options that the user gave.

    Args:
        without: Names of options to leave out.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        added = list(_generation_parameters(without))
        names = [parameter.name for parameter in added]

        @functools.wraps(command)
        def run(**arguments: Any) -> None:
            given = {name: _value(name, arguments.pop(name)) for name in names}
            options = {name: value for name, value in given.items() if value is not None}
            command(**arguments, options=options)

        signature = inspect.signature(command, eval_str=True)
        parameters: list[inspect.Parameter] = []
        for parameter in signature.parameters.values():
            parameters += added if parameter.name == "options" else [parameter]
        keyword_only = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in parameters]
        vars(run)["__signature__"] = signature.replace(parameters=keyword_only)
        return run

    return decorate


def _generation_parameters(without: Collection[str]) -> Iterator[inspect.Parameter]:
    for entry in fields(GenerationConfig):
        option: Option = entry.metadata["option"]
        if option.kind is None or entry.name in without:
            continue
        info = typer.Option(
            flag(entry.name),
            metavar=option.metavar,
            help=_help(entry.name, option),
            callback=_checker(entry.name, option),
            parser=cli_input.text if option.kind is str else None,
        )
        kind: Any = GenericAlias(list, option.kind) if option.several else option.kind
        yield inspect.Parameter(
            entry.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[kind | None, info],
        )


def flag(name: str) -> str:
    """The flag of an option of the library: `top_k` becomes `--top-k`."""
    return NAMED_TOKENS.get(name, f"--{name.replace('_', '-')}")


def _help(name: str, option: Option) -> str:
    words = [option.help]
    if name in REPORTED:
        words.append("Needs --json.")
    if option.several:
        words.append("May be given several times.")
    if option.kind is not bool:
        words.append(f"Default: {option.default}.")
    return " ".join(words)


def _checker(name: str, option: Option) -> Callable[[Any], Any]:
    """A callback for typer that refuses values that are not valid for the option."""

    def check(given: Any) -> Any:
        value = _value(name, given)
        # Texts of tokens become ids when there is a tokenizer.
        if value is not None and name not in NAMED_TOKENS and not option.valid(value):
            raise typer.BadParameter(f"it must be {option.words}, not {value!r}")
        return given

    return check


def _value(name: str, given: Any) -> Any:
    """The value of an option as the library takes it; None if it is not given."""
    if given is None or given == []:
        return None
    return _biases(given) if name == "logit_bias" else given


def _biases(entries: list[str]) -> dict[int, float]:
    biases = {}
    for entry in entries:
        token_id, _, bias = entry.partition("=")
        try:
            biases[int(token_id)] = float(bias)
        except ValueError:
            raise typer.BadParameter(f"{entry!r} is not ID=BIAS, such as 42=-1.5") from None
    return biases


class Counts(tuple[int, ...]):
    """The value of --contexts and --batches: positive whole numbers, separated by commas."""

    @classmethod
    def parse(cls, text: str) -> Counts:
        """Parse the numbers from the command line.

        Raises:
            typer.BadParameter: The text is not a list of positive whole numbers.
        """
        try:
            counts = cls(int(part) for part in text.split(","))
        except ValueError:
            counts = cls()
        if not counts or min(counts) < 1:
            raise typer.BadParameter(f"{text!r} is not a list of positive numbers, such as 16,512")
        return counts


Bundle = Annotated[
    str,
    typer.Argument(
        metavar="BUNDLE",
        help="Directory that `doge-onnx export` wrote, or the id of a bundle on the Hugging Face "
        "Hub such as user/model.",
    ),
]
BundleRevision = Annotated[
    str | None,
    typer.Option(
        "--revision",
        metavar="REV",
        help="Branch, tag or commit of a BUNDLE on the Hub. Default: its main branch.",
    ),
]
ReferenceRevision = Annotated[
    str | None,
    typer.Option(
        metavar="REV",
        help="Branch, tag or commit of a reference on the Hub. Default: its main branch.",
    ),
]
Revision = Annotated[
    str | None,
    typer.Option(
        metavar="REV", help="Branch, tag or commit of a model on the Hub. Default: its main branch."
    ),
]
Adapter = Annotated[
    str | None,
    typer.Option(
        metavar="DIR",
        help="LoRA adapter in the format of PEFT that is merged into the checkpoint, in float32: a "
        "directory, or an id on the Hub.",
    ),
]
Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="Checkpoint: a directory, or an id on the Hugging Face Hub such as "
        "SmallDoge/Doge-160M.",
    ),
]
Out = Annotated[
    str, typer.Argument(metavar="OUT", help="Directory to write; it must not exist yet.")
]
IgnoreConfigField = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME",
        help="Export without this field of config.json, such as 'my_field' or "
        "'rope_parameters.my_field'. One that is not understood is refused otherwise, as it may "
        "change what the model computes. May be given several times.",
    ),
]
Precision = Annotated[
    Precisions | None,
    typer.Option(
        help="Number format of the weights. 'int8' is a quarter of the size and hard to tell from "
        "'fp32'; 'int4' is smaller still, with a first layer and a head in int8. 'fp16' and 'bf16' "
        "are half of the size; 'bf16' is what most checkpoints are stored in, so it loses nothing. "
        "Default: fp32, or fp16 for CUDA."
    ),
]
KVCache = Annotated[
    KVCaches | None,
    typer.Option(
        help="Number format of the state. 'int8' takes a quarter of the memory and decodes long "
        "contexts faster, but reads prompts more slowly. Default: that of the activations."
    ),
]
ExportDevice = Annotated[
    ExportDevices,
    typer.Option(
        help="What the graph is made for. With 'cuda', activations are fp16 (bf16 with that "
        "precision), also beside int8 and int4 weights."
    ),
]
BlockSize = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="For experts: quantized weights that share a scale, a power of 2 from 16 to 256. "
        "Larger is smaller, faster and less exact. Default: what suits each matrix.",
    ),
]
Rounding = Annotated[
    Roundings | None,
    typer.Option(
        help="For experts: 'gptq' makes up for the error of each weight in the others, with a "
        "text that the model writes; 'nearest' is quicker and less exact. Default: gptq.",
    ),
]
ContextLength = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="N",
        help="Most tokens that a text may have, prompt included. "
        "Default: what the model was trained for.",
    ),
]
Target = Annotated[
    Targets,
    typer.Option(
        help="'ort': ONNX Runtime's fused operators, the fastest. 'portable': standard ONNX "
        "operators only, for other engines."
    ),
]
State = Annotated[
    States,
    typer.Option(
        help="'growing': one row for each token, up to the context length. 'window': as many rows "
        "as the model's keep window has keys, for texts of any length."
    ),
]
Layout = Annotated[
    Layouts,
    typer.Option(
        help="'flat': the graph is model.onnx, beside the other files. 'hub': it is "
        "onnx/model.onnx, onnx/model_quantized.onnx (int8) or onnx/model_q4.onnx (int4), where "
        "transformers.js looks for it."
    ),
]
Format = Annotated[
    Formats,
    typer.Option(
        help="Of the graph's file. 'ort' is ONNX Runtime's own, which its builds for phones and "
        "small boards read; with it comes the list of operators that such a build needs."
    ),
]
Verify = Annotated[
    bool,
    typer.Option(
        help="Compare the result with transformers, and keep it only if both agree. Where "
        "something is quantized, measure what that lost, for about a minute."
    ),
]
Force = Annotated[bool, typer.Option("--force", help="Replace a bundle that is already at OUT.")]
Reference = Annotated[
    str,
    typer.Option(
        metavar="MODEL",
        help="The checkpoint that the bundle was made from: a directory or a Hub id.",
    ),
]
EvalReference = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL|BUNDLE",
        help="What to compare with: another bundle, or a checkpoint; a directory or a Hub id.",
    ),
]
EvalText = Annotated[
    str | None,
    typer.Option(
        metavar="FILE",
        help="Text to measure on, in UTF-8. Newlines of Windows are read as those of Unix. "
        "Default: one that the reference writes, or else the "
        "bundle.",
    ),
]
MaxTokens = Annotated[
    int | None,
    typer.Option(min=2, metavar="N", help="Most tokens of the text to read. Default: 8192."),
]
Window = Annotated[
    int | None,
    typer.Option(
        min=2,
        metavar="N",
        help="Cut the text into pieces of N tokens, each read on its own. Default: 512, or 256 "
        "of a text that a model writes.",
    ),
]
EvalSeed = Annotated[
    int | None,
    typer.Option(
        min=0, metavar="N", help="Of a text that a model writes. Default: always the same one."
    ),
]
MaxKL = Annotated[
    float | None,
    typer.Option(
        "--max-kl",
        min=0,
        metavar="X",
        help="Fail if the mean KL divergence, in nats per token, is above X. Default: no limit.",
    ),
]
JsonQuality = Annotated[
    bool, typer.Option("--json", help="Print the figures as one JSON object, for a program.")
]
Prompt = Annotated[
    str | None,
    typer.Argument(
        parser=cli_input.text,
        metavar="PROMPT",
        help="Text to continue. '-', or no PROMPT when something is piped in, reads standard "
        "input, without the newline at its end. A text that begins with '-' goes behind '--'.",
    ),
]
StopEscape = Annotated[
    bool,
    typer.Option(
        "--stop-escape",
        help="In --stop, let \\n be a newline, \\r a carriage return, \\t a tab, \\\\ a backslash "
        "and \\uXXXX the character of that number.",
    ),
]
AsChat = Annotated[
    bool,
    typer.Option(
        "--chat",
        help="Make PROMPT a user's message, in the words of the bundle's chat template. "
        "For instruction-tuned models.",
    ),
]
System = Annotated[
    str | None,
    typer.Option(
        parser=cli_input.text,
        metavar="TEXT",
        help="What the model is told before the conversation. Default: nothing.",
    ),
]
AnswerStart = Annotated[
    str | None,
    typer.Option(
        parser=cli_input.text,
        metavar="TEXT",
        help="Let the answer begin with TEXT, which the output then continues. Needs --chat. "
        "Default: nothing.",
    ),
]
TemplateVariable = Annotated[
    list[str] | None,
    typer.Option(
        parser=cli_input.text,
        metavar="NAME=VALUE",
        help="A variable of the chat template, such as enable_thinking=false. VALUE is JSON, or "
        "else text. May be given several times.",
    ),
]
JsonCompletion = Annotated[
    bool,
    typer.Option("--json", help="Print one JSON object at the end instead of streaming text."),
]
Stats = Annotated[
    bool,
    typer.Option(
        "--stats", help="Add prefill and decode tokens per second; without --json on stderr."
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=MOST_THREADS,
        metavar="N",
        help="CPU threads to use. Default: the number in OMP_NUM_THREADS, or else one for each "
        "core that this process may use.",
    ),
]
PrefillChunk = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="N",
        help="Prompt tokens that go through the model at once: fewer need less memory. The text "
        "depends on it only where 'Batches and chunks' in docs/limits.md says so. Default: a "
        "number that is fast.",
    ),
]
Device = Annotated[
    Devices,
    typer.Option(
        help="Where to run. 'auto' takes CUDA if it is installed and can run the bundle, and else "
        "the CPU."
    ),
]
CudaGraph = Annotated[
    bool | None,
    typer.Option(
        "--cuda-graph/--no-cuda-graph",
        help="Let CUDA capture decode steps once and replay them. Default: where that works.",
    ),
]
Native = Annotated[
    bool,
    typer.Option(
        "--native/--no-native",
        help="Let this package's own kernels run on the CPU, where they can, or leave all to ONNX "
        "Runtime.",
    ),
]
Verbose = Annotated[bool, typer.Option("--verbose", help="Let ONNX Runtime's warnings through.")]
JsonManifest = Annotated[
    bool, typer.Option("--json", help="Print the manifest as one JSON object, for a program.")
]
Contexts = Annotated[
    Counts | None,
    typer.Option(
        parser=Counts.parse,
        metavar="N,N,...",
        help="Lengths of the prompts, in tokens. Default: 16,512,1900.",
    ),
]
Batches = Annotated[
    Counts | None,
    typer.Option(
        parser=Counts.parse,
        metavar="N,N,...",
        help="Numbers of sequences that run side by side. Default: 1,8.",
    ),
]
DecodeSteps = Annotated[
    int | None,
    typer.Option(
        min=1, metavar="N", help="Decode steps after each prompt, in each repetition. Default: 16."
    ),
]
Repetitions = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", help="How often each figure is measured. Default: 3."),
]
JsonBench = Annotated[
    bool, typer.Option("--json", help="Print all figures as one JSON object, for a program.")
]
Repo = Annotated[
    str,
    typer.Argument(
        parser=cli_input.text,
        metavar="REPO",
        help="Repository on the Hugging Face Hub, such as user/model; created if it does not "
        "exist.",
    ),
]
Private = Annotated[
    bool,
    typer.Option(
        "--private", help="Make a new repository private; one that exists has to be so already."
    ),
]
Branch = Annotated[
    str | None,
    typer.Option(
        "--revision",
        metavar="BRANCH",
        help="Branch to upload to; created if it does not exist. Default: main.",
    ),
]
Message = Annotated[
    str | None,
    typer.Option(
        parser=cli_input.text,
        metavar="TEXT",
        help="Message of the commit. Default: says what the bundle holds.",
    ),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Only check the bundle and print what would be uploaded.")
]
