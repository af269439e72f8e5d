"""The YAML block at the top of a model card, which tells the Hub what a model is.

Knows which fields a bundle takes over from its checkpoint's own card, and which it writes itself.
The checkpoint's card is an untrusted file: its YAML is parsed but never turned into objects, and
a field is taken only if its name is known and its value is plain text of the right form.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator
from typing import Any

import yaml
from huggingface_hub import ModelCardData

from doge_onnx.export.checkpoint import CARD_NAME, Source
from doge_onnx.export.model_config import DogeConfig
from doge_onnx.manifest import Manifest

# The block stands at the beginning of a card; the longest ones have some ten kilobytes.
_MAX_BYTES = 128 * 2**10
_MAX_ITEMS = 200
_STRING_TAG = "tag:yaml.org,2002:str"
_WEB_ADDRESS = r"https?://[^\s<>\"]{1,500}"
# Fields that hold for the bundle as well, and the pattern of a value.
_INHERITED = {
    "license": r"[A-Za-z][\w.+-]{0,99}",
    "license_name": r"[A-Za-z0-9][\w.+-]{0,99}",
    "license_link": rf"{_WEB_ADDRESS}|[A-Za-z0-9][\w.-]{{0,99}}",
    "language": r"[A-Za-z]{2,12}(-[A-Za-z0-9]{2,8})*",
    "datasets": r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?",
}
# The Hub accepts one value for these, and also a list for the others.
_SINGLE = ("license_name", "license_link")

Metadata = dict[str, str | list[str]]


def inherited(source: Source, progress: Callable[[str], None] = lambda _: None) -> Metadata:
    """The fields of a checkpoint's own card that hold for a bundle: license, language, datasets.

    Never fails: if the card cannot be read, the result is empty and `progress` gets the reason.
    """
    path = source.directory / CARD_NAME
    if not path.is_file():
        return {}
    try:
        with path.open("rb") as stream:
            text = stream.read(_MAX_BYTES).decode("utf-8-sig", errors="replace")
        fields = dict(_text_fields(_block(text)))
    # RecursionError: brackets nested deeper than any card's.
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        progress(f"the model card of {source.model} says nothing of a license: {reason}")
        return {}
    link = fields.get("license_link")
    if isinstance(link, str) and not re.fullmatch(_WEB_ADDRESS, link):
        # A file beside the checkpoint's card, which the bundle does not have.
        del fields["license_link"]
        if source.revision is not None:
            root = f"https://huggingface.co/{source.model}"
            fields["license_link"] = f"{root}/blob/{source.revision}/{link}"
    return fields


def _block(text: str) -> str:
    """The lines between the first two `---`, or "" if the text does not begin with `---`.

    Raises:
        ValueError: The block does not end within the bytes that were read.
    """
    lines = text.lstrip().splitlines()
    if not lines or lines[0].rstrip() != "---":
        return ""
    for number, line in enumerate(lines[1:], start=1):
        if line.rstrip() == "---":
            return "\n".join(lines[1:number])
    raise ValueError(f"its metadata does not end within {_MAX_BYTES} bytes")


def _text_fields(block: str) -> Iterator[tuple[str, str | list[str]]]:
    """Known fields of a YAML mapping that hold text, or lists of texts, of the right form.

    Reads YAML's nodes: tags create no objects, and aliases do not multiply nodes.
    """
    root = yaml.compose(block, yaml.SafeLoader)
    if not isinstance(root, yaml.MappingNode):
        return
    for key, value in root.value:
        if not isinstance(key, yaml.ScalarNode) or key.value not in _INHERITED:
            continue
        name = key.value
        items = value.value if isinstance(value, yaml.SequenceNode) else [value]
        texts = [
            item.value
            for item in items[:_MAX_ITEMS]
            if isinstance(item, yaml.ScalarNode)
            # In a card `no` is the Norwegian language; in YAML it is a boolean.
            and (item.tag == _STRING_TAG or (name, item.value) == ("language", "no"))
            and re.fullmatch(_INHERITED[name], item.value)
        ]
        if not isinstance(value, yaml.SequenceNode) and texts:
            yield name, texts[0]
        elif texts and name not in _SINGLE:
            yield name, texts


def compose(
    source: Source,
    config: DogeConfig,
    manifest: Manifest,
    tools: Collection[str],
    taken_over: Metadata,
    conversational: bool = False,
) -> str:
    """The block of a bundle's card, without the lines of dashes around it.

    Args:
        source: Where the checkpoint came from.
        config: Its config.
        manifest: The bundle's, with its list of files.
        tools: The Hub's tags of other tools that load the bundle.
        taken_over: The fields that `inherited` found.
        conversational: Whether the model has a chat template.
    """
    tags = ["onnx", "onnxruntime", "doge", *tools, manifest.precision]
    if config.is_moe:
        tags.append("moe")
    if conversational:
        tags.append("conversational")
    fields: dict[str, Any] = dict(taken_over)
    # The name of a local directory is no id of the Hub.
    if source.revision is not None:
        fields["base_model"] = source.model
        if manifest.quantized:
            fields["base_model_relation"] = "quantized"
    # The Hub shows code for models of libraries that it knows.
    fields["library_name"] = "transformers.js" if "transformers.js" in tools else "doge-onnx"
    fields["pipeline_tag"] = "text-generation"
    fields["tags"] = tags
    return ModelCardData(**fields).to_yaml(original_order=list(fields))
