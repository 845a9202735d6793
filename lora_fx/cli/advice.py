"""What a message advises, in the words of the command that it is shown by.

Messages name what Python's functions take. A command says its option of that meaning, and leaves
out what it has none for.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator

# What is advised in Python -> the option; a value that was given is no advice.
_END = r"(?=[\s,;:.)]|$)"
OPTIONS = {
    r'adapters="input"': "--mode swappable",
    r'adapters="required"': "--mode required",
    r"allow_pickle=True": "--allow-pickle",
    r"allow_unmerged=True": "--allow-unmerged",
    rf"alpha={_END}": "--alpha",
    rf"base={_END}": "--base",
    rf"component={_END}": "--component",
    r"enable_lora=\{name: \[\.\.\.\]\}": "--enable-lora LAYER=1,0,1",
    rf"enable_lora={_END}": "--enable-lora",
    r"force=True": "--force",
    r'format="(\w+)"': r"--format \1",
    rf"format={_END}": "--format",
    rf"layers={_END}": "--layer",
    rf"model={_END}": "--for",
    rf"name={_END}": "--name",
    r"names=\{node: path\}": "--name NODE=PATH",
    rf"names={_END}": "--name",
    r"output_names": "--output-name",
    rf"prefix={_END}(?: to load_adapter)?": "--prefix",
    r'(?:slots=)?\{"([^"]+)": "(\w+)"\}': r"--slots \1=\2",
    rf"slots={_END}": "--slots",
    r'quantize="float"': "--bits float",
    r"use_rslora=True": "--use-rslora",
    r"vectors=True": "--vectors",
}
# What no command has.
PYTHON = (
    *(r"strict=False", r"check=False", r"frontend=['\"]\w+['\"]", rf"inputs={_END}"),
    r"fold the first, then inject the second",
)
_STARTS, _ENDS = ("; ", ". ", ", or ", "\n", " ("), ("; ", ". ", "\n")


def in_options(text: str, own: Collection[str], every: Collection[str]) -> str:
    """A message with the options of a command in it, and none that it lacks.

    Args:
        text: the message.
        own: the options of the command.
        every: those of all commands.
    """
    for word, option in OPTIONS.items():
        text = re.sub(rf"(?<!\w){word}", option, text)
    lacks = [rf"{re.escape(option)}(?![\w-])" for option in every if option not in own]
    for word in (*PYTHON, *lacks):
        text = _without(text, rf"(?<![\w-]){word}")
    return text


def _without(text: str, word: str) -> str:
    """A message without the clauses that advise something; the first clause is no advice."""
    while (found := next(_clauses(text, word), None)) is not None:
        text = text[: found[0]] + text[found[1] :]
    return text


def _clauses(text: str, word: str) -> Iterator[tuple[int, int]]:
    for match in re.finditer(word, text):
        start = max(text.rfind(mark, 0, match.start()) for mark in _STARTS)
        marks = (")",) if start >= 0 and text.startswith(" (", start) else _ENDS
        ends = (text.find(mark, match.end()) for mark in marks)
        end = min((end for end in ends if end >= 0), default=len(text))
        if start >= 0:
            yield start, end + (marks == (")",))
