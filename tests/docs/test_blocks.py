"""Every block of README.md and docs/ runs, in order, as a reader of that page would run it."""

from __future__ import annotations

import doctest
import linecache
import re
import shlex
import shutil
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lora_fx.cli import main

ROOT = Path(__file__).parents[2]
# A block that is run, and the one right behind it that says what it prints.
_RUN = re.compile(
    r"^```(?P<language>python|sh)\n(?P<text>.*?)^```\n(?:\n*```text\n(?P<printed>.*?)^```)?",
    re.DOTALL | re.MULTILINE,
)
KNOWN = {"python", "sh", "text", "math", "{toctree}", "{include}", "{eval-rst}"}


@dataclass(frozen=True)
class Block:
    """One fenced block.

    Attributes:
        page: the file.
        line: the number of its first line, from 0.
        language: what stands behind the fence.
        text: what is in it.
        printed: the ``text`` block right behind it, which says what it prints.
    """

    page: Path
    line: int
    language: str
    text: str
    printed: str | None = None

    @property
    def file(self) -> str | None:
        """The name of the file that a block is, by its first line alone: ``# model.py``."""
        found = re.match(r"# (\S+\.py)\n", self.text)
        return found and found[1]


def pages() -> list[Path]:
    """README.md and every page of the site; what tests write is read by those."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: Path) -> Iterator[Block]:
    """The blocks of a page that are run."""
    text = page.read_text()
    for found in _RUN.finditer(text):
        yield Block(page, text[: found.start("text")].count("\n"), **found.groupdict())


def languages(page: Path) -> set[str]:
    """What stands behind the fences of a page."""
    return set(re.findall(r"^```(\S+)", page.read_text(), re.MULTILINE))


PAGES = [page for page in pages() if list(blocks(page))]
EXPORTED: dict[str, Path] = {}
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
TARGETS = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
@pytest.mark.usefixtures("here")
def test_the_blocks_of_a_page_run(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    read(list(blocks(page)), capsys)


def read(found: list[Block], capsys: pytest.CaptureFixture[str]) -> None:
    """Runs blocks in one namespace, and holds what they print against the page."""
    names: dict[str, Any] = {"__name__": "page"}
    for block in found:
        capsys.readouterr()
        if block.language == "sh":
            shell(block.text)
        elif block.file:
            Path(block.file).write_text(block.text)
        else:
            python(block, names)
        said = capsys.readouterr().out
        if block.printed is not None:
            flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
            assert doctest.OutputChecker().check_output(block.printed, said, flags), said


def python(block: Block, names: dict[str, Any]) -> None:
    """Runs a block; errors point to the line of the page."""
    source = "\n" * block.line + block.text
    linecache.cache[str(block.page)] = (len(source), None, source.splitlines(True), str(block.page))
    exec(compile(source, str(block.page), "exec"), names)


def shell(text: str) -> None:
    """Runs the commands of a block that are ours; of others, looks up what they name."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if not words:
            continue
        program, *arguments = words
        CHECKS[program](arguments)


def lora_fx(arguments: list[str]) -> None:
    """Runs a command in this process; an export that another page made, of the same, is copied."""
    command, out = shlex.join(arguments), Path(arguments[-1])
    is_export = arguments[0] == "export" and arguments[-2] == "-o"
    if command in EXPORTED:
        shutil.copytree(EXPORTED[command], out)
        return
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert not stop.value.code, f"lora-fx {command}"
    if is_export and "llama/" in arguments:
        EXPORTED[command] = out.resolve()


def make(arguments: list[str]) -> None:
    assert set(arguments) <= TARGETS


def pip(arguments: list[str]) -> None:
    """``pip install -e .`` and ``pip install -e '.[extra,extra]'``."""
    assert arguments[:2] == ["install", "-e"]
    for wanted in arguments[2:]:
        found = re.fullmatch(r"\.(?:\[([\w,-]+)\])?", wanted)
        assert found, wanted
        assert {*filter(None, (found[1] or "").split(","))} <= EXTRAS.keys()


def venv(arguments: list[str]) -> None:
    """An environment, made and entered: tests run in one."""
    assert arguments == ["-m", "venv", ".venv", "&&", ".", ".venv/bin/activate"]


def file(arguments: list[str]) -> None:
    """``python examples/x.py``, which a test of its own runs."""
    assert (ROOT / arguments[0]).is_file()


CHECKS = {"lora-fx": lora_fx, "make": make, "pip": pip, "python": file, "python3": venv}


def test_no_language_but_these_is_fenced() -> None:
    """What is neither run nor output is told by its fence: a new language needs a runner."""
    assert {name_of(page) for page in pages() if not languages(page) <= KNOWN} == set()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("```python\nassert 1 == 2, 'one'\n```\n", "one"),
        ("```python\nprint(3)\n```\n\n```text\n4\n```\n", "3"),
        ("```sh\nmake nothing\n```\n", "nothing"),
        ("```sh\npip install -e '.[nothing]'\n```\n", "nothing"),
        ("```sh\nlora-fx inspect nowhere\n```\n", "inspect nowhere"),
    ],
)
def test_a_page_that_is_wrong_is_seen(
    tmp_path: Path, text: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.md"
    page.write_text(text)
    with pytest.raises(AssertionError, match=message):
        read(list(blocks(page)), capsys)


def test_a_command_that_nobody_checks_is_seen() -> None:
    with pytest.raises(KeyError, match="rm"):
        shell("rm -r x")
