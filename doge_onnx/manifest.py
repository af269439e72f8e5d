"""The manifest of a bundle, `doge_onnx.json`, which describes the other files.

Knows the fields and their valid values. Does not know the directory (`bundle`) or the content of
the graph. Imports only the standard library, because both halves of the package share it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from doge_onnx.errors import BundleError

FORMAT_VERSION = 6
# Devices that a bundle can be made for.
DEVICES = ("cpu", "cuda")
# ONNX Runtime recognizes files of its own format by this suffix.
ORT_SUFFIX = ".ort"
# Largest finite value of float32 and bfloat16, rounded down.
_LARGEST = 3.38e38
# More than any disk holds.
_MOST_BYTES = 2**50


@dataclass(frozen=True)
class ClosedRow:
    """The values that close a key row, so that no query attends to it: padding, or a free row.

    Attributes:
        channels: Channels of the row that hold `value`. The others may hold any finite value.
        value: The value in these channels, in the element type of the state; for int8, the stored
            integer.
    """

    channels: tuple[int, ...]
    value: float


@dataclass(frozen=True)
class WeightsRead:
    """Bytes of weights that a decode step reads.

    Attributes:
        whole: Bytes of the weights that each step reads completely. An embedding that is also the
            head is one of them.
        per_token: Bytes of the rows that each new token looks up: embeddings and experts. Tokens
            that look up the same rows read less.
    """

    whole: int
    per_token: int

    def step_bytes(self, batch: int) -> int:
        """Bytes of weights that a step with one new token for each of `batch` sequences reads."""
        return self.whole + batch * self.per_token


@dataclass(frozen=True)
class StateLayout:
    """Shape and element type of the state: one key and one value tensor for each layer.

    Attributes:
        kind: "growing": one row for each token, `[batch, num_heads, tokens, row_size]`.
            "window": at most `keep_window_size` rows, in any order; a free row is closed, and its
            other channels are zero.
        num_layers: Number of key/value pairs.
        num_heads: Heads of each tensor.
        row_size: Channels of a row: head_dim, the gate channels, and zeros up to a multiple that
            the attention kernel supports.
        head_dim: Channels of a row that hold the key or value itself; the gates follow.
        dtype: Name of the element type: NumPy's, or "bfloat16", which NumPy lacks.
        keep_window_size: Number of keys that a query attends to, those with the largest gates;
            None for all keys.
        in_place: Whether past and present may be the same buffer with spare rows, which the graph
            then extends without a copy.
        closing: The values that close a row.
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
        """Bytes of one row of all tensors together."""
        return 2 * self.num_layers * self.num_heads * self.row_size * self.item_size


@dataclass(frozen=True)
class Manifest:
    """The content of `doge_onnx.json`.

    Attributes:
        target: "ort" (ONNX Runtime's fused operators) or "portable" (standard ones only).
        device: "cpu" or "cuda": the device that the bundle was made for. It may run on the other,
            too.
        precision: Precision of the weights, for example "fp32".
        activations: Element type that the graph computes in; named like that of the state.
        context_length: Most tokens that one sequence may have, prompt included.
        vocab_size: Token ids are in `range(vocab_size)`.
        parameters: Number of weights of the checkpoint, tied ones counted once.
        weights_read: Bytes of weights that a decode step reads.
        state: Shape and element type of the recurrent state.
        graph: Path of the graph in the bundle; external weights are in the same directory.
        source: The checkpoint: "model" and "revision".
        versions: Versions of this package and of the libraries that made the bundle.
        parity: Figures of the comparison with the reference; None if there was none.
        quality: Figures of the evaluation of a quantized bundle; None if there was none.
        native_operators: Whether the graph has fused operators that this package's own kernels can
            run (docs/native.md).
        ignored_fields: Fields of config.json that the bundle was made without, since its maker
            asked for that.
        notes: What the export had to say about the checkpoint's files, a sentence each.
        files: Size in bytes and SHA-256 of every file of the bundle but the manifest.
        format_version: Version of the bundle format.
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
    native_operators: bool = False
    ignored_fields: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    @property
    def ort_format(self) -> bool:
        """Whether the graph is in ONNX Runtime's own format, which holds all weights itself."""
        return self.graph.endswith(ORT_SUFFIX)

    @property
    def quantized(self) -> bool:
        """Whether weights or state are integers of few bits with scales."""
        return self.precision not in ("fp32", "fp16", "bf16") or self.state.dtype == "int8"

    def to_json(self) -> str:
        """The manifest as the text of its file."""
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str, origin: Path) -> Manifest:
        """Parse a manifest.

        Args:
            text: Content of the file.
            origin: The file, for error messages.

        Raises:
            BundleError: The text is not JSON, this version does not read its format version, or a
                field is missing, of the wrong type or out of its range.
        """
        try:
            raw = json.loads(text)
        # RecursionError: brackets that are nested too deeply.
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
        for name in ("ignored_fields", "notes"):
            value = list(getattr(manifest, name))
            if not all(isinstance(text, str) for text in value):
                raise BundleError(f"{origin}: field {name!r} cannot be {value!r}; export again")
        _check_closing(state, origin)
        return manifest


# All annotations of the fields, which are strings (`from __future__ import annotations`), and the
# types that JSON has for them.
_FIELD_TYPES: dict[str, type | tuple[type, ...]] = {
    "str": str,
    "int": int,
    "int | None": (int, type(None)),
    "float": (int, float),
    "bool": bool,
    "tuple[int, ...]": list,
    "tuple[str, ...]": list,
    "ClosedRow": dict,
    "WeightsRead": dict,
    "StateLayout": dict,
    "dict[str, str]": dict,
    "dict[str, str | None]": dict,
    "dict[str, dict[str, Any]]": dict,
    "dict[str, Any] | None": (dict, type(None)),
}
# Fields that are JSON objects with fields of their own.
_PARTS: dict[str, type[Any]] = {
    part.__name__: part for part in (ClosedRow, WeightsRead, StateLayout)
}


def _parse(cls: type[Any], raw: Mapping[str, Any], origin: Path) -> Any:
    """Make a dataclass from a JSON object; fields that the dataclass lacks are ignored.

    Raises:
        BundleError: A field is missing or of the wrong type.
    """
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
        values[entry.name] = tuple(value) if isinstance(value, list) else value
    return cls(**values)


def _check_closing(state: StateLayout, origin: Path) -> None:
    """Check that a key row has the channels that close it, and can hold their value.

    Raises:
        BundleError: It has not, or cannot.
    """
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
    # Not `>`, which is false for NaN.
    if not -largest <= value < 0:
        raise BundleError(
            f"{origin}: field 'value' cannot be {value!r} in a state of {state.dtype}; export again"
        )
