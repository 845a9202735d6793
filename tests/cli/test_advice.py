"""The command line advises what it has: every message of the source, held against its options."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer.main

import lora_fx
from lora_fx.cli.advice import OPTIONS, PYTHON, in_options
from lora_fx.cli.program import _options, app

COMMANDS = {name: _options(c) for name, c in typer.main.get_command(app).commands.items()}  # type: ignore[attr-defined]
EVERY = frozenset().union(*COMMANDS.values()) | {"--version"}
ROOTS = [Path(lora_fx.__file__).parent, Path(lora_fx.export.__file__).parent]
ROOTS.append(Path(lora_fx.passes.__file__).parent)
# Of functions that no command calls, of trainers' own calls, and of what a model's function gives.
ELSEWHERE = {
    "adapters", "args", "dynamic_shapes", "form", "how", "init", "kwargs", "max", "opset",
    "progress", "rank", "save_projection", "seed", "target", "target_modules", "temperature",
    "top_k", "top_p", "use_cache", "verify", "wd_on_out",
}  # fmt: skip
WORD = r"(?<![\w-])([a-z_]+)=(?=[\w\"'{(,;:. )]|$)"


def texts() -> Iterator[tuple[str, str]]:
    """Every string of the source that is no docstring, and where it is."""
    for file in sorted({file for root in ROOTS for file in root.rglob("*.py")}):
        if {"testing", "demo"} & set(file.parts[len(ROOTS[0].parts) - 1 :]):
            continue
        tree = ast.parse(file.read_text())
        docs = {
            id(node.body[0].value)
            for node in ast.walk(tree)
            if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef)
            and node.body
            and isinstance(node.body[0], ast.Expr)
        }
        for node in ast.walk(tree):
            is_text = isinstance(node, ast.Constant) and isinstance(node.value, str)
            if is_text and id(node) not in docs:
                yield f"{file.name}:{node.lineno}", node.value


def test_every_option_that_a_message_names_exists() -> None:
    named = {
        (option, place)
        for place, text in texts()
        for option in re.findall(r"(?<![\w-])--[a-z][a-z-]*", text)
    }
    assert len(named) > 20, "the control: options are seen"
    assert {(option, place) for option, place in named if option not in EVERY} == set()


def test_every_word_of_python_that_a_message_names_is_an_option_or_left_out() -> None:
    known = {re.match(r"[a-z_]+", word) for word in (*OPTIONS, *PYTHON)}
    words = {match[0] for match in known if match} | ELSEWHERE | {"slots"}
    named = {(word, place) for place, text in texts() for word in re.findall(WORD, text)}
    assert len(named) > 30, "the control: words are seen"
    assert {(word, place) for word, place in named if word not in words} == set()


@pytest.mark.parametrize("option", OPTIONS.values())
def test_what_stands_for_a_word_is_an_option(option: str) -> None:
    assert option.split()[0] in EVERY


CASES = {
    "a pickle; save it, or pass allow_pickle=True if you trust it": (
        "export", "a pickle; save it, or pass --allow-pickle if you trust it",
    ),
    "x: no slot; export the model with slots= for these": (
        "export", "x: no slot; export the model with --slots for these",
    ),
    'x; export it with slots={"a.b": "weight"}, or fold it': (
        "export", "x; export it with --slots a.b=weight, or fold it",
    ),
    "x is 'pissa': it fits that base alone; save it anew, or pass strict=False to use it": (
        "inspect", "x is 'pissa': it fits that base alone; save it anew",
    ),
    "x: a, which reads it twice; allow_unmerged=True keeps it beside": (
        "merge", "x: a, which reads it twice; --allow-unmerged keeps it beside",
    ),
    "no slot for what has no name: a: names= gives one": (
        "add-lora", "no slot for what has no name: a: --name gives one",
    ),
    "no inputs that were tried run: it is too long; give some as inputs=": (
        "merge", "no inputs that were tried run: it is too long",
    ),
    "2 targets match nothing: fc. The layers: a. Pass strict=False to leave them out": (
        "export", "2 targets match nothing: fc. The layers: a",
    ),
    "first at a: differs\nSay it otherwise.\nTo trace it all the same: check=False.": (
        "export", "first at a: differs\nSay it otherwise.",
    ),
    "Try: pass example inputs, so that torch.export traces it (frontend='export').": (
        "export", "Try: pass example inputs, so that torch.export traces it.",
    ),
    "x: only the base could tell; pass base=, the model itself": (
        "inspect", "x: only the base could tell; pass --base, the model itself",
    ),
    "y: only the base could tell; pass base=, the model itself": (
        "export", "y: only the base could tell",  # which has the model itself
    ),
    "config.json names no class: add it, or give --task": (
        "inspect", "config.json names no class: add it",
    ),
    "enable_lora=[True, False] says 1; pass enable_lora= as it is": (
        "adapter", "enable_lora=[True, False] says 1; pass --enable-lora as it is",
    ),
    'diffusers or PEFT; pass format="diffusers" for the one': (
        "inspect", "diffusers or PEFT; pass --format diffusers for the one",
    ),
    "out of its reach; give b before a; or fold the first, then inject the second, which acts": (
        "export", "out of its reach; give b before a",
    ),
    "--alpha x: expected a number": ("inspect", "--alpha x: expected a number"),
}  # fmt: skip


@pytest.mark.parametrize("text", CASES)
def test_a_command_says_its_own_options(text: str) -> None:
    command, want = CASES[text]
    assert in_options(text, COMMANDS[command], EVERY) == want


def test_a_message_that_is_all_advice_stays() -> None:
    assert in_options("give --task", COMMANDS["inspect"], EVERY) == "give --task"
