"""Chat templates: turn the messages of a conversation into the prompt that a model was tuned on.

Knows which parts of Jinja a template of the Hugging Face Hub may use, and renders the same text as
transformers. Does not know tokens or the model.

A template is an untrusted program. It runs in Jinja's sandbox, on plain data: it cannot reach
files, the network or Python's objects. Every loop is finite, range() gives at most 100,000 numbers,
recursion stops at Python's limit, and both the size of products and powers and the length of the
output are limited. A hostile template can still take much time, because loops can be nested, and
much memory: neither is limited here.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from doge_onnx import text_files
from doge_onnx.bundle import Bundle
from doge_onnx.errors import BundleError, InputError, MissingExtraError

if TYPE_CHECKING:
    import jinja2

_FILE_NAME = "chat_template.jinja"
_CONFIG_NAME = "tokenizer_config.json"
_TOKENS = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
# Names for what a model thought before its answer; each template has one of them.
_REASONING = ("reasoning_content", "thinking", "reasoning")
# Variables that a template gets in another way.
_RESERVED = ("messages", "add_generation_prompt", "continue_final_message")
# Marks where the final message ends; as in transformers, so that its space is trimmed with what is
# before it.
_MARK = "CONTINUE_FINAL_MESSAGE_TAG "
# Most bits of a product or power in a template: more than any template needs.
_MAX_BITS = 10_000
# Most characters that a template may write: more than fit into any context.
_MAX_SIZE = 16_000_000


def special_tokens(bundle: Bundle) -> dict[str, str]:
    """The special tokens that a bundle's files name, by name such as "eos_token".

    Raises:
        BundleError: A file does not hold a JSON object.
    """
    config = bundle.read_json(_CONFIG_NAME)
    if "added_tokens_decoder" not in config:
        # An older tokenizer, whose special tokens are in a file of their own.
        config |= bundle.read_json("special_tokens_map.json")
    tokens = {}
    for name in _TOKENS:
        token = config.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            tokens[name] = token
    return tokens


class ChatTemplate:
    """A bundle's chat template: renders a conversation as the prompt that its model expects."""

    def __init__(self, source: str, tokens: Mapping[str, str], origin: Path) -> None:
        """Make a template.

        Args:
            source: The template, in Jinja.
            tokens: Special tokens that the template may use, by variable name such as `bos_token`.
            origin: The template's file, for error messages.
        """
        self._source = source
        self._tokens = dict(tokens)
        self._origin = origin

    @classmethod
    def read(cls, bundle: Bundle) -> ChatTemplate | None:
        """Read the template from a bundle's files; None if there is none.

        Raises:
            BundleError: A file cannot be read, the template is not text, or there are several and
                none has the name "default".
        """
        config = bundle.read_json(_CONFIG_NAME)
        path = bundle.file(_FILE_NAME)
        if path is None:
            path = bundle.path / _CONFIG_NAME
            source = _default(config.get("chat_template"), path)
        else:
            try:
                source = text_files.read(path)
            except (OSError, ValueError) as error:
                raise BundleError(f"cannot read {path}: {error}") from None
        if source is None:
            return None
        return cls(source, special_tokens(bundle), path)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool | None = None,
        continue_final_message: bool | str = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """Render a conversation as text.

        Special tokens are spelled out in the text, including the one that begins a text if the
        template writes it. So a tokenizer has to parse them, and must not add others.

        A content may be a list of parts, `{"type": "text", "text": ...}`, which the template gets
        as it stands. Where the template cannot take it (it fails, or writes the list or nothing),
        it gets the texts of the parts, joined without anything between them.

        Args:
            messages: Dicts with a "role" and a "content". The template may use further fields.
            add_generation_prompt: Append the beginning of an answer. None for yes, unless the final
                message is continued.
            continue_final_message: End the text behind the content of the final message, so that
                it can be continued; a str is the field to continue in place of the content.
            variables: Further variables for the template, by name. They may replace special tokens.
                Those that it does not use have no effect.

        Raises:
            InputError: There are no messages, they have another form, or the template refuses them
                or leaves out what is to be continued; a variable is not plain data or has the name
                of one that is given anyway; or a final message is to be continued and an answer
                begun.
            BundleError: The template is not valid Jinja, writes too much, or does something that
                the sandbox forbids.
            MissingExtraError: Jinja is not installed.
        """
        if add_generation_prompt is None:
            add_generation_prompt = not continue_final_message
        elif add_generation_prompt and continue_final_message:
            raise InputError(
                "continue_final_message and add_generation_prompt exclude each other: the final "
                "message is continued, or a new answer begins"
            )
        given = {
            **self._tokens,
            "tools": None,
            "documents": None,
            **_plain_variables(variables or {}),
            "add_generation_prompt": bool(add_generation_prompt),
        }
        field = "content" if continue_final_message is True else continue_final_message
        return self._continued(self._readable(_plain(messages), given), field, given)

    def _readable(
        self, messages: list[dict[str, Any]], variables: Mapping[str, Any]
    ) -> list[dict[str, Any]]:
        """The messages, with their parts joined if the template cannot take them."""
        joined = [_joined(message) for message in messages]
        if joined == messages:
            return messages
        try:
            text = self._written({**variables, "messages": messages})
        except (InputError, BundleError):
            return joined
        return messages if _shows(text, messages) else joined

    def _continued(
        self, messages: list[dict[str, Any]], field: str | bool, variables: Mapping[str, Any]
    ) -> str:
        """Render messages, up to the end of a field of the last one if `field` is its name."""
        if not isinstance(field, str):
            return self._written({**variables, "messages": messages})
        fields = [name for name in _REASONING if messages[-1].get(name) == messages[-1].get(field)]
        fields = fields if field in _REASONING else [field]
        if messages[-1].get(field) is None or not any(name in self._source for name in fields):
            raise InputError(
                f"the final message cannot be continued: it has no {field!r}, or the chat template "
                "does not use it"
            )
        last, final = _marked(messages[-1], fields)
        text = self._written({**variables, "messages": [*messages[:-1], last]})
        where = text.rfind(_MARK.strip())
        if where < 0 or final.strip() not in text:
            raise InputError(
                f"{self._origin}: the chat template leaves out a part of the final message, which "
                "so cannot be continued"
            )
        # A template that trims a content takes the space from the end of the mark, too.
        kept = text.startswith(_MARK, where)
        return text[:where] if kept else text[:where].rstrip()

    def _written(self, variables: Mapping[str, Any]) -> str:
        """What the template writes."""
        template = self._template
        import jinja2

        pieces: list[str] = []
        room = _MAX_SIZE
        try:
            for piece in template.generate(variables):
                pieces.append(piece)
                room -= len(piece)
                if room < 0:
                    break
        except jinja2.exceptions.SecurityError as error:
            raise BundleError(
                f"{self._origin}: the sandbox stops the chat template: {_reason(error)}"
            ) from None
        except jinja2.TemplateError as error:
            raise InputError(
                f"{self._origin}: the chat template refuses this: {_reason(error)}"
            ) from None
        # Any exception: a template can make Python raise all kinds, such as TypeError or KeyError.
        except Exception as error:
            raise InputError(
                f"{self._origin}: the chat template fails with these messages: {_reason(error)}"
            ) from None
        if room < 0:
            raise BundleError(
                f"{self._origin}: the chat template writes more than {_MAX_SIZE} characters"
            )
        return "".join(pieces)

    @functools.cached_property
    def _template(self) -> jinja2.Template:
        try:
            import jinja2
        except ImportError:
            raise MissingExtraError(
                "chat templates need jinja2, which is not installed: pip install jinja2"
            ) from None
        try:
            return _environment().from_string(self._source)
        except jinja2.TemplateSyntaxError as error:
            raise BundleError(
                f"{self._origin}: the chat template is no valid Jinja, line {error.lineno}: "
                f"{_reason(error)}"
            ) from None
        except RecursionError:
            raise BundleError(f"{self._origin}: the chat template is nested too deeply") from None
        # Jinja compiles a template to Python, which limits nested loops and the digits of a number.
        except Exception as error:
            raise BundleError(
                f"{self._origin}: Python cannot compile the chat template: {_reason(error)}"
            ) from None


def _reason(error: Exception) -> str:
    """The message of an error in one line: a template may have written it over several."""
    return " ".join(str(error).split()) or type(error).__name__


def _default(templates: Any, origin: Path) -> str | None:
    """The template itself, or the one named "default" of several.

    Args:
        templates: The field `chat_template` of tokenizer_config.json.
        origin: Its file, for error messages.

    Raises:
        BundleError: The template is not text, or none of several has the name "default".
    """
    if isinstance(templates, list):
        named = {
            entry.get("name"): entry.get("template")
            for entry in templates
            if isinstance(entry, dict)
        }
        if "default" not in named:
            raise BundleError(
                f"{origin}: none of the chat templates has the name 'default'; there are "
                f"{sorted(map(str, named))}"
            )
        templates = named["default"]
    if templates is not None and not isinstance(templates, str):
        raise BundleError(f"{origin}: chat_template is no text")
    return templates


def _plain(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A copy of the messages that holds only JSON types, so that no object reaches the template.

    Raises:
        InputError: There are no messages, or they have another form.
    """
    if not messages:
        raise InputError("a conversation needs at least one message")
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise InputError(f"message {number} is no dict with a role and a content: {message!r}")
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str):
            raise InputError(f"message {number} needs a 'role' that is text, not {role!r}")
        if isinstance(content, list | tuple):
            _check_parts(content, number)
        # An answer may have tool calls in place of a content.
        elif not isinstance(content, str) and not (content is None and "tool_calls" in message):
            raise InputError(
                f"message {number} needs a 'content' that is text or a list of parts, not "
                f"{content!r}"
            )
    # As in transformers, a field that is None counts as missing.
    plain: list[dict[str, Any]] = _as_json(
        [{k: v for k, v in m.items() if v is not None} for m in messages], "messages"
    )
    return [_with_reasoning(message) for message in plain]


def _check_parts(parts: Sequence[Any], number: int) -> None:
    """Raise InputError if a part of the content of message `number` is no text."""
    for part in parts:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind is None:
            raise InputError(
                f"message {number} needs a 'content' that is text or a list of parts such as "
                f"{{'type': 'text', 'text': 'Hello'}}, and {part!r} is none"
            )
        if kind != "text":
            raise InputError(f"message {number} has a part of the type {kind!r}; a Doge reads text")
        if not isinstance(part.get("text"), str):
            raise InputError(f"message {number} has a part without a 'text': {part!r}")


def _plain_variables(variables: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a caller's variables that holds only JSON types.

    Raises:
        InputError: One has a reserved name, no name, or another type.
    """
    if not isinstance(variables, Mapping) or not all(isinstance(name, str) for name in variables):
        raise InputError(f"template variables are a dict by name, not {variables!r}")
    for name in _RESERVED:
        if name in variables:
            raise InputError(f"{name!r} is no free template variable: it has a parameter")
    plain: dict[str, Any] = _as_json(variables, "template variables")
    return plain


def _as_json(value: Any, what: str) -> Any:
    try:
        return json.loads(json.dumps(value, default=_mapping))
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"{what} must hold nothing but text and numbers: {error}") from None


def _mapping(value: Any) -> Any:
    """A mapping that is no dict as one."""
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{type(value).__name__} is neither")


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """A message whose reasoning is found under each name that templates have for it."""
    reasoning = next((message[name] for name in _REASONING if name in message), None)
    if reasoning is None:
        return message
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _joined(message: dict[str, Any]) -> dict[str, Any]:
    """A message whose content is the text of its parts."""
    content = message.get("content")
    if not isinstance(content, list):
        return message
    return {**message, "content": "".join(part["text"] for part in content)}


def _shows(text: str, messages: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a rendered text holds all parts of the contents, and no list as Python prints it."""
    contents = [m["content"] for m in messages if isinstance(m.get("content"), list)]
    return all(
        str(content) not in text and all(part["text"].strip() in text for part in content)
        for content in contents
    )


def _marked(message: dict[str, Any], fields: Sequence[str]) -> tuple[dict[str, Any], str]:
    """A message with a mark at the end of some fields of equal value, and their text before it.

    Raises:
        InputError: They hold no text.
    """
    value = message[fields[0]]
    if isinstance(value, list) and value and isinstance(value[-1], dict) and "text" in value[-1]:
        text = value[-1]["text"]
        marked: Any = [*value[:-1], {**value[-1], "text": text + _MARK}]
    elif isinstance(value, str):
        text, marked = value, value + _MARK
    else:
        raise InputError(f"the final message has no text in {fields[0]!r} to continue")
    return {**message, **dict.fromkeys(fields, marked)}, text


def _environment() -> jinja2.Environment:
    """A sandboxed environment of Jinja, set up as in transformers."""
    import jinja2
    import jinja2.ext
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """The tag `generation`, which marks answers for training. Rendering ignores it."""

        tags = {"generation"}  # noqa: RUF012 - typed so in the base class

        def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body).set_lineno(line)

    class Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
        """Also refuses huge products and powers, which Python computes without an interrupt."""

        intercepted_binops = frozenset({"*", "**"})

        def call_binop(
            self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any
        ) -> Any:
            if isinstance(left, int) and isinstance(right, int):
                bits = left.bit_length() * (abs(right) if operator == "**" else 1)
                if max(bits, right.bit_length()) > _MAX_BITS:
                    raise jinja2.exceptions.SecurityError(f"a number of more than {_MAX_BITS} bits")
            return super().call_binop(context, operator, left, right)

    environment = Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes characters that are special in HTML.
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> None:
    import jinja2

    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def parse(source: str) -> jinja2.nodes.Template:
    """The syntax tree of a template, which is not run.

    Raises:
        jinja2.TemplateSyntaxError: It is no valid Jinja.
    """
    return _environment().parse(source)
