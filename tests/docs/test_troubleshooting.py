"""Each message that troubleshooting quotes is one that the source raises, word for word."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "troubleshooting.md"
MESSAGES = re.findall(r"^### `(.*)`$", PAGE.read_text(), re.MULTILINE)
DIFFERS = "…"


def shown(node: ast.AST) -> str | None:
    """A string of the source, with what is put into it as it differs."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(shown(part) or DIFFERS for part in node.values)
    return None


@cache
def strings() -> tuple[str, ...]:
    """Every string of the source that is no docstring."""
    return tuple(
        text
        for room in ("lora_fx", "passes", "export")
        for path in sorted((ROOT / room).rglob("*.py"))
        for text in in_code(ast.parse(path.read_text()))
    )


def in_code(tree: ast.AST) -> Iterator[str]:
    docs = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr)}
    for node in ast.walk(tree):
        text = shown(node) if id(node) not in docs else None
        if text:
            yield text


def is_raised(message: str) -> bool:
    """Whether a string of the source has these words, anything in place of what differs."""
    pattern = re.compile(".+".join(map(re.escape, message.split(DIFFERS))))
    return any(pattern.search(text) for text in strings())


@pytest.mark.parametrize("message", MESSAGES)
def test_a_quoted_message_is_in_the_source(message: str) -> None:
    assert is_raised(message)


def test_a_message_that_nobody_raises_is_seen() -> None:
    assert len(MESSAGES) > 25
    assert not is_raised("the graph already has an adapter of this name at …")
    assert not is_raised("Every string of the source that is no docstring.")
