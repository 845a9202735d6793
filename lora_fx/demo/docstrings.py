"""Real text that every machine has: the docstrings of Python's standard library."""

from __future__ import annotations

import ast
import hashlib
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_fx.errors import LoraFxError

SUBJECTS = {
    "language": (
        "_collections_abc ast bdb collections contextlib dis doctest enum functools importlib "
        "inspect logging pdb pickletools pydoc symtable traceback typing unittest"
    ),
    "network": (
        "asyncio email ftplib http imaplib ipaddress mailbox poplib smtplib socket socketserver "
        "ssl urllib wsgiref xmlrpc"
    ),
}
_PER_MODULE = 160  # of one label, so that a large package does not outweigh the rest
_MIN_WORDS = 4
_MIN_PER_MODULE = 10
# The recipe was chosen on another split (without the salt); this one was only ever scored.
_SALT = b"held out:"
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Texts:
    """Texts, and for each the index of its label.

    Attributes:
        texts: one paragraph each.
        labels: of the same length.
    """

    texts: list[str]
    labels: list[int]


@dataclass(frozen=True)
class Subject:
    """Docstrings to tell apart by the module that they come from.

    Attributes:
        name: of the subject.
        modules: the labels.
        train: for training and for the centroids.
        held_out: for scoring only.
    """

    name: str
    modules: list[str]
    train: Texts
    held_out: Texts


def load_subject(name: str, modules: Sequence[str], root: Path | None = None) -> Subject:
    """Gathers the docstrings of some modules, and keeps half of each module's for scoring.

    Args:
        name: of the subject.
        modules: top-level modules or packages; one that this Python lacks is left out.
        root: where they are; the standard library by default.

    Returns:
        The same split for the same sources, whatever the order of files on disk.

    Raises:
        LoraFxError: fewer than two modules have docstrings (a library without sources).
    """
    root = root or Path(sysconfig.get_path("stdlib"))
    seen: set[str] = set()
    found = {module: list(_paragraphs(root, module, seen)) for module in modules}
    kept = {module: texts for module, texts in found.items() if len(texts) >= _MIN_PER_MODULE}
    if len(kept) < 2:
        raise LoraFxError(
            f"{root}: docstrings in {len(kept)} of {len(modules)} modules of {name}, expected "
            "two or more: is this Python installed without its sources?"
        )
    halves = [_halves(texts) for texts in kept.values()]
    train, held_out = zip(*halves, strict=True)
    return Subject(name, list(kept), _labelled(train), _labelled(held_out))


def _paragraphs(root: Path, module: str, seen: set[str]) -> Iterator[str]:
    """First paragraphs of a module's docstrings, each text once over all modules."""
    for path in _files(root, module):
        for node in ast.walk(ast.parse(path.read_bytes())):
            text = first_paragraph(node)
            if len(text.split()) >= _MIN_WORDS and text.lower() not in seen:
                seen.add(text.lower())
                yield text


def _files(root: Path, module: str) -> list[Path]:
    single = root / f"{module}.py"
    return [single] if single.is_file() else sorted((root / module).rglob("*.py"))


def first_paragraph(node: ast.AST) -> str:
    """The first paragraph of a node's docstring on one line; empty if it has none."""
    text = ast.get_docstring(node) if isinstance(node, _DOCUMENTED) else None
    return " ".join((text or "").strip().split("\n\n")[0].split())


def _halves(texts: list[str]) -> tuple[list[str], list[str]]:
    """Splits by hash: random to the eye, the same on every machine."""
    ordered = sorted(texts, key=lambda text: hashlib.sha256(_SALT + text.encode()).digest())[
        :_PER_MODULE
    ]
    middle = len(ordered) // 2
    return ordered[:middle], ordered[middle:]


def _labelled(parts: Sequence[list[str]]) -> Texts:
    pairs = [(text, label) for label, texts in enumerate(parts) for text in texts]
    return Texts([text for text, _ in pairs], [label for _, label in pairs])
