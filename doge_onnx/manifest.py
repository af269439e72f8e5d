"""The manifest of a bundle, `doge_onnx.json`: what a reader must know of the other files.

Knows the fields and what may be in them. Does not know the directory (`bundle`) or what is inside
the graph; imports nothing but the standard library, so that both halves of the package share it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from doge_onnx.errors import BundleError

FORMAT_VERSION = 5
# What a bundle can be made for.
DEVICES = ("cpu", "cuda")
# ONNX Runtime tells its own format by this end of a file's name.
ORT_SUFFIX = ".ort"
# Of float32 and bfloat16.
_LARGEST = 3.38e38
# More than any disk holds.
_MOST_BYTES = 2**50


@dataclass(frozen=True)
class ClosedRow:
    """What makes a key one that no query attends to: padding, or a free row.

    Attributes:
        channels: Channels of a key row. The others may hold anything finite.
        value: What each of these channels holds then, in the element type of the state: of int8,
            the code itself.
    """

    channels: tuple[int, ...]
    value: float


@dataclass(frozen=True)
class WeightsRead:
    """Bytes of weights that a decode step reads.

    Attributes:
        whole: Of the weights that each step reads from end to end. An embedding that is also the
            head is one of them.
        per_token: Of the rows that each new token looks up: embeddings and experts. Tokens that
            share rows read less.
    """

    whole: int
    per_token: int

    def step_bytes(self, batch: int) -> int:
        """Bytes that a step with one new token for each of `batch` sequences reads."""
        return self.whole + batch * self.per_token


@dataclass(frozen=True)
class StateLayout:
    """What a step carries over: one key and one value tensor per layer.

    Attributes:
        kind: "growing": one row per token seen, `[batch, num_heads, tokens, row_size]`.
            "window": at most `keep_window_size` rows, in any order; a free row is closed, and
            zero in its other channels.
        num_layers: Number of key/value pairs.
        num_heads: Heads of each tensor.
        row_size: Channels of one row: head_dim, the gate channels, and zeros up to a
            multiple that the attention kernel takes.
        head_dim: Channels of a row that hold the key or value itself; the gate follows.
        dtype: Name of the element type: NumPy's, or "bfloat16", which NumPy lacks.
        keep_window_size: Number of keys, those with the largest gates, that one query
            attends to; None for all.
        in_place: Whether past and present may be one buffer with spare rows, which the
            graph then extends without copying it.
        closing: What closes a row.
    """

    kind: str
    num_layers: int
    num_heads: int
    row_size: int
    head_dim: int
    dtype: str
    keep_window_size: int | None
    in_place: bool
    closing: ClosedRow

    @property
    def item_size(self) -> int:
        """Bytes of one element."""
        return {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}[self.dtype]

    @property
    def token_bytes(self) -> int:
        """Bytes of a row of all tensors together."""
        return 2 * self.num_layers * self.num_heads * self.row_size * self.item_size


@dataclass(frozen=True)
class Manifest:
    """The content of `doge_onnx.json`.

    Attributes:
        target: "ort" (ONNX Runtime's fused operators) or "portable" (standard ones only).
        device: "cpu" or "cuda": what the bundle was made for. It may run on the other, too.
        precision: Of the weights, for example "fp32".
        activations: Element type that the graph computes in, named like that of the state.
        context_length: Most tokens that one sequence may have, prompt included.
        vocab_size: Token ids are in `range(vocab_size)`.
        parameters: Number of weights of the checkpoint, tied ones counted once.
        weights_read: Bytes of weights that a decode step reads.
        state: Shape and element type of the recurrent state.
        graph: Which of the files is the graph; external weights are in the same directory.
        source: Where the checkpoint came from: "model" and "revision".
        versions: Versions of this package and of the libraries that made the bundle.
        parity: Figures of the comparison with the reference, or None if none was made.
        quality: Figures of the evaluation of a quantized bundle, or None if none was made.
        files: Size and SHA-256 of every file of the bundle but the manifest itself.
        format_version: Version of this format.
    """

    target: str
    device: str
    precision: str
    activations: str
    context_length: int
    vocab_size: int
    parameters: int
    weights_read: WeightsRead
    state: StateLayout
    graph: str
    source: dict[str, str | None]
    versions: dict[str, str]
    parity: dict[str, Any] | None = None
    quality: dict[str, Any] | None = None
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    @property
    def ort_format(self) -> bool:
        """Whether the graph is of ONNX Runtime's own format, which has all weights inside."""
        return self.graph.endswith(ORT_SUFFIX)

    @property
    def quantized(self) -> bool:
        """Whether weights or state are whole numbers of few bits, with scales."""
        return self.precision not in ("fp32", "fp16", "bf16") or self.state.dtype == "int8"

    def to_json(self) -> str:
        """The manifest as it stands in the file."""
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str, origin: Path) -> Manifest:
        """Parse a manifest; `origin` is the file that error messages name.

        Raises:
            BundleError: It is not JSON, its format is another one than this version reads, or
                a field is missing, of the wrong type or out of its range.
        """
        try:
            raw = json.loads(text)
        # RecursionError: brackets nested deeper than any manifest's.
        except (ValueError, RecursionError) as error:
            raise BundleError(f"{origin} is not valid JSON ({error}); export again") from None
        if not isinstance(raw, dict):
            raise BundleError(f"{origin} does not hold a JSON object; export again")
        version = raw.get("format_version")
        if not isinstance(version, int) or isinstance(version, bool) or version < 1:
            raise BundleError(f"{origin} has no format_version; it is not a bundle's manifest")
        if version > FORMAT_VERSION:
            raise BundleError(
                f"{origin} has format version {version}, newer than the {FORMAT_VERSION} that "
                "this doge-onnx reads; upgrade doge-onnx"
            )
        if version < FORMAT_VERSION:
            raise BundleError(
                f"{origin} has format version {version}, which this doge-onnx no longer reads; "
                "export again"
            )
        manifest: Manifest = _parse(cls, raw, origin)
        state = manifest.state
        for owner, name in (
            (manifest, "context_length"),
            (manifest, "vocab_size"),
            (state, "num_layers"),
            (state, "num_heads"),
            (state, "row_size"),
            (state, "head_dim"),
        ):
            if getattr(owner, name) < 1:
                raise BundleError(f"{origin}: field {name!r} is not positive; export again")
        window = state.keep_window_size
        if state.kind == "window" if window is None else window < 1:
            raise BundleError(
                f"{origin}: field 'keep_window_size' cannot be {window!r} in a state of the kind "
                f"{state.kind!r}; export again"
            )
        for name in ("whole", "per_token"):
            if not 0 <= getattr(manifest.weights_read, name) <= _MOST_BYTES:
                raise BundleError(f"{origin}: field {name!r} is no number of bytes; export again")
        if manifest.device not in DEVICES:
            raise BundleError(
                f"{origin}: field 'device' is {manifest.device!r}, not one of "
                f"{', '.join(DEVICES)}; export again"
            )
        _check_closing(state, origin)
        return manifest


# Annotations are strings here (`from __future__ import annotations`), and these are all of them.
_FIELD_TYPES: dict[str, type | tuple[type, ...]] = {
    "str": str,
    "int": int,
    "int | None": (int, type(None)),
    "float": (int, float),
    "bool": bool,
    "tuple[int, ...]": list,
    "ClosedRow": dict,
    "WeightsRead": dict,
    "StateLayout": dict,
    "dict[str, str]": dict,
    "dict[str, str | None]": dict,
    "dict[str, dict[str, Any]]": dict,
    "dict[str, Any] | None": (dict, type(None)),
}
# Fields that are objects themselves.
_PARTS: dict[str, type[Any]] = {
    part.__name__: part for part in (ClosedRow, WeightsRead, StateLayout)
}


def _parse(cls: type[Any], raw: Mapping[str, Any], origin: Path) -> Any:
    """A dataclass out of parsed JSON, each field checked for its type; unknown ones are ignored."""
    values: dict[str, Any] = {}
    for entry in fields(cls):
        if entry.name not in raw:
            raise BundleError(f"{origin} lacks the field {entry.name!r}; export again")
        value, kind = raw[entry.name], str(entry.type)
        expected = _FIELD_TYPES[kind]
        if not isinstance(value, expected) or (isinstance(value, bool) and expected is not bool):
            raise BundleError(f"{origin}: field {entry.name!r} cannot be {value!r}; export again")
        if kind in _PARTS:
            value = _parse(_PARTS[kind], raw[entry.name], origin)
        values[entry.name] = tuple(value) if kind == "tuple[int, ...]" else value
    return cls(**values)


def _check_closing(state: StateLayout, origin: Path) -> None:
    """Raise BundleError unless a key row has the channels that close it, and can hold the value."""
    channels, value = state.closing.channels, state.closing.value
    if not channels or not all(
        isinstance(channel, int) and state.head_dim <= channel < state.row_size
        for channel in channels
    ):
        raise BundleError(
            f"{origin}: field 'channels' cannot be {list(channels)!r} in rows of "
            f"{state.row_size}; export again"
        )
    largest = 127 if state.dtype == "int8" else _LARGEST
    # Not `>`, which is false of NaN.
    if not -largest <= value < 0:
        raise BundleError(
            f"{origin}: field 'value' cannot be {value!r} in a state of {state.dtype}; export again"
        )
