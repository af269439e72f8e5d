"""The fixed texts that a chat template writes, found in its syntax tree; nothing is run.

Knows Jinja's syntax tree. Does not know tokens.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

import jinja2
from jinja2 import nodes

from doge_onnx.runtime.text.chat_template import parse

# What a part of a text may become that depends on the messages: the role in `<|{{ role }}|>`.
_ROLES = ("user", "assistant", "system")
# Names in a condition that holds only if there are tools or documents, which this package never
# gives to a template.
_NEVER_GIVEN = re.compile(r"tool|document|function")
# Forms that only special tokens have. Others, such as [INST] or <think>, are plain text in many
# templates.
_SPECIAL = re.compile(
    r"<\|[^<>|{}\s]{1,64}\|>|<\uff5c[^<>\uff5c{}]{1,64}\uff5c>|</?s>|<(?:bos|eos|pad|(?:start|end)_of_[a-z]+)>"
)


def written(source: str) -> frozenset[str]:
    """The fixed texts that a template may write in a conversation without tools and documents.

    Parts that depend on the messages are filled in with the name of each role, so that
    `<|{{ message.role }}|>` gives `<|user|>` and the like.

    Args:
        source: The template, in Jinja.

    Raises:
        jinja2.TemplateSyntaxError: It is no valid Jinja.
    """
    try:
        return frozenset(_texts(parse(source)))
    except RecursionError:
        raise jinja2.TemplateSyntaxError("it is nested too deeply", 1) from None


def variables(source: str) -> frozenset[str]:
    """The names of all variables that a template reads, such as `eos_token`.

    Raises:
        jinja2.TemplateSyntaxError: It is no valid Jinja.
    """
    return frozenset(name.name for name in parse(source).find_all(nodes.Name))


def special_tokens(texts: frozenset[str]) -> frozenset[str]:
    """The parts of texts that have the form of a special token."""
    return frozenset(match for text in texts for match in _SPECIAL.findall(text))


def _texts(node: nodes.Node) -> Iterator[str]:
    """The texts of all expressions that are written, or that variables are set to."""
    if isinstance(node, nodes.If):
        if not _needs_what_is_never_given(node.test):
            yield from _of_all(node.body)
        yield from _of_all([*node.elif_, *node.else_])
    elif isinstance(node, nodes.Output):
        yield from _filled(node.nodes)
        yield from _of_all(node.nodes)
    elif isinstance(node, nodes.Add | nodes.Concat):
        yield from _filled(list(_operands(node)))
        yield from _of_all(node.iter_child_nodes())
    elif isinstance(node, nodes.Const):
        if isinstance(node.value, str):
            yield node.value
    elif isinstance(node, nodes.TemplateData):
        yield node.data
    # A comparison writes nothing, and an index is the name of a field.
    elif not isinstance(node, nodes.Compare | nodes.Getitem):
        yield from _of_all(node.iter_child_nodes())


def _of_all(children: Iterable[nodes.Node]) -> Iterator[str]:
    for child in children:
        yield from _texts(child)


def _needs_what_is_never_given(test: nodes.Node) -> bool:
    if isinstance(test, nodes.Not):
        return False
    for part in (test, *test.find_all((nodes.Name, nodes.Getattr, nodes.Const))):
        for field in ("name", "attr", "value"):
            word = getattr(part, field, None)
            if isinstance(word, str) and _NEVER_GIVEN.search(word):
                return True
    return False


def _operands(node: nodes.Expr) -> Iterator[nodes.Expr]:
    """The operands of nested sums, from left to right."""
    if isinstance(node, nodes.Add):
        yield from _operands(node.left)
        yield from _operands(node.right)
    elif isinstance(node, nodes.Concat):
        for part in node.nodes:
            yield from _operands(part)
    else:
        yield node


def _filled(parts: list[nodes.Expr]) -> Iterator[str]:
    """The text of consecutive parts, once with the name of each role for what is not fixed."""
    flat = [operand for part in parts for operand in _operands(part)]
    fixed = [_fixed(part) for part in flat]
    for role in _ROLES:
        yield "".join(role if text is None else text for text in fixed)


def _fixed(part: nodes.Expr) -> str | None:
    if isinstance(part, nodes.TemplateData):
        return part.data
    return part.value if isinstance(part, nodes.Const) and isinstance(part.value, str) else None
