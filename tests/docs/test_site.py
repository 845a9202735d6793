"""The site builds from pages and docstrings without a broken link, and needs no network."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from html import unescape
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# What a browser loads by itself, from another place.
FETCHED = re.compile(
    r'<(?:script|img|iframe)[^>]*\ssrc="(?:https?:)?//'
    r'|<link[^>]*rel="stylesheet"[^>]*href="(?:https?:)?//'
    r"|@import|url\([\"']?http"
)
PAGE = """# Title

```math
W'
```

{link}
"""


def build(source: Path, out: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html"]
    return subprocess.run(
        [*command, str(source), str(out)], capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site")
    done = build(ROOT / "docs", out)
    assert done.returncode == 0, done.stderr
    return out


def test_every_page_is_there(site: Path) -> None:
    pages = [page.relative_to(ROOT / "docs") for page in (ROOT / "docs").rglob("*.md")]
    assert len(pages) > 20
    assert [page for page in pages if not (site / page.with_suffix(".html")).is_file()] == []


def test_nothing_is_fetched_from_elsewhere(site: Path) -> None:
    """Scripts, styles, fonts and pictures are files of the site; links may lead away."""
    files = [*site.rglob("*.html"), *site.rglob("*.css")]
    assert FETCHED.search('<script src="https://cdn.example/x.js">')
    assert [file.name for file in files if FETCHED.search(file.read_text())] == []


def test_formulas_are_mathml(site: Path) -> None:
    text = (site / "concept.html").read_text()
    assert text.count("<math ") == (ROOT / "docs" / "concept.md").read_text().count("```math")
    assert "\\begin" not in text


def test_the_reference_has_every_function_that_a_user_calls(site: Path) -> None:
    import lora_fx

    text = unescape("".join(page.read_text() for page in (site / "api").glob("*.html")))
    rooms = {"export", "passes", "report", "tasks", "testing", "__version__"}
    wanted = [f"lora_fx.{name}" for name in lora_fx.__all__ if name not in rooms]
    wanted += [f"lora_fx.passes.{name}" for name in lora_fx.passes.__all__]
    wanted += [f"lora_fx.export.{name}" for name in lora_fx.export.__all__]
    wanted += [f"lora_fx.report.{name}" for name in lora_fx.report.__all__]
    known = {f"lora_fx.export.{name}" for name in dir(lora_fx)}
    lost = [n for n in wanted if f'id="{n}"' not in text and n not in known]
    assert lost == []


@pytest.mark.parametrize(
    ("link", "is_right"),
    [
        ("[here](index.md#title)", True),
        ("[gone](gone.md)", False),
        ("[gone](index.md#gone)", False),
        ("![gone](gone.svg)", False),
        ("```{eval-rst}\n:py:func:`lora_fx.gone`\n```", False),
    ],
)
def test_a_broken_link_or_reference_is_an_error(link: str, is_right: bool, tmp_path: Path) -> None:
    """The control: the same settings, and one page."""
    docs = tmp_path / "docs"
    (docs / "pictures").mkdir(parents=True)
    shutil.copy(ROOT / "docs" / "conf.py", docs)
    shutil.copy(ROOT / "docs" / "style.css", docs)
    (docs / "index.md").write_text(PAGE.format(link=link))
    done = build(docs, tmp_path / "out")
    assert (done.returncode == 0) == is_right, done.stderr
