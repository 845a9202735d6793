"""The page in a browser: at desktop and phone width, light and dark, without any script of its own.

A frame around it, which is not part of it, measures what is seen.
"""

from __future__ import annotations

import dataclasses
import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lora_fx
from lora_fx.export import to_onnx
from lora_fx.report import write_page
from lora_fx.testing import make_adapter

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--hide-scrollbars",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--allow-file-access-from-files",
]
FRAME = """<!doctype html><body style="margin:0"><iframe id="frame" src="page.html"
style="border:0;width:{width}px;height:3000px" onload="look()"></iframe><pre id="seen"></pre>
<script>
function look() {{
  const page = document.getElementById("frame").contentDocument;
  const style = (at) => getComputedStyle(page.querySelector(at));
  const boxes = (at) => [...page.querySelectorAll(at)].map((e) => e.getBoundingClientRect());
  document.getElementById("seen").textContent = JSON.stringify({{
    width: page.documentElement.scrollWidth,
    back: style("body").backgroundColor, front: style("body").color,
    soft: style("header p").color, verdict: style(".verdict").color,
    heads: boxes("h2").map((r) => [r.left, r.right, r.height]),
    wide: boxes(".wide").map((r) => [r.left, r.right]),
    pictures: boxes("figure svg").map((r) => [r.width, r.height]),
    bars: boxes("td svg").map((r) => [r.width, r.height]),
    size: parseFloat(style("td").fontSize), text: page.body.innerText,
  }});
}}
</script>"""
SIZES = {"desktop": 1280, "phone": 390}


class Block(nn.Module):
    """Three projections that read one x, and a layer behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(32, 32) for _ in range(3))
        self.up_proj = nn.Linear(32, 64)
        self.down_proj = nn.Linear(64, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mixed = torch.softmax(self.q_proj(x) @ self.k_proj(x).mT, -1) @ self.v_proj(x)
        y: torch.Tensor = x + self.down_proj(torch.relu(self.up_proj(mixed)))
        return y


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with long names, many layers, a note, and every section."""
    torch.manual_seed(0)
    place = tmp_path_factory.mktemp("page")
    model = nn.Sequential(*(Block() for _ in range(3))).eval()
    shapes = {
        n: tuple(m.weight.shape) for n, m in model.named_modules() if isinstance(m, nn.Linear)
    }
    gm = lora_fx.trace(model, (torch.randn(2, 5, 32),), dynamic_shapes=({0: "batch"},))
    tuned = lora_fx.inject(gm, make_adapter(shapes, rank=4, scale=0.02))
    report = to_onnx(tuned, place / "model.onnx", measure=True)
    long = "a_name_without_a_space_" * 12
    more = dataclasses.replace(
        report, notes=[*report.notes, f"see {long}"], path=f"out/{long}.onnx"
    )
    write_page(more, place / "page.html")
    return place


def browser() -> str:
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")
    assert found, "no browser: apt-get install chromium"
    return found


def run(place: Path, *options: str) -> str:
    command = [browser(), *FLAGS, f"--user-data-dir={place / 'profile'}", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def seen(place: Path, width: int, scheme: str) -> Any:
    frame = place / f"frame_{width}.html"
    frame.write_text(FRAME.format(width=width))
    wanted = f"--blink-settings=preferredColorScheme={['dark', 'light'].index(scheme)}"
    made = run(place, wanted, f"--window-size={width},3000", "--dump-dom", frame.as_uri())
    found = re.search(r'<pre id="seen">(.+?)</pre>', made, re.DOTALL)
    assert found, made[-2000:]
    return json.loads(html.unescape(found[1]))


def brightness(color: str) -> float:
    """Relative luminance, as the web's guidelines for contrast define it."""
    parts = [int(part) / 255 for part in re.findall(r"\d+", color)[:3]]
    linear = [p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted([brightness(one), brightness(other)])
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_the_page_is_readable(size: str, scheme: str, place: Path) -> None:
    page, width = seen(place, SIZES[size], scheme), SIZES[size]
    assert page["width"] <= width, "what is wide scrolls by itself, not the page"
    assert all(left >= 0 and right <= width for left, right in page["wide"])
    assert len(page["heads"]) == 7
    assert all(0 <= left < right <= width and high > 10 for left, right, high in page["heads"])
    assert (brightness(page["back"]) > 0.5) is (scheme == "light")
    assert contrast(page["front"], page["back"]) > 7
    assert min(contrast(page[part], page["back"]) for part in ("soft", "verdict")) > 4.5
    assert page["size"] >= 12
    assert len(page["pictures"]) >= 4
    assert all(20 < wide <= width and high > 20 for wide, high in page["pictures"])
    assert len(page["bars"]) == 15
    assert all(wide == 96 and high == 24 for wide, high in page["bars"])
    for words in ("verified", "q_proj", "0.02", "Verification", "a_name_without_a_space"):
        assert words in page["text"]


def test_a_page_that_is_too_wide_would_be_seen(place: Path, tmp_path: Path) -> None:
    source = (place / "page.html").read_text().replace("overflow-x: auto", "overflow-x: visible")
    (tmp_path / "page.html").write_text(source)
    assert seen(tmp_path, SIZES["phone"], "light")["width"] > SIZES["phone"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_picture_of_it_can_be_taken(scheme: str, place: Path) -> None:
    picture = place / f"{scheme}.png"
    wanted = f"--blink-settings=preferredColorScheme={['dark', 'light'].index(scheme)}"
    run(
        place,
        wanted,
        "--window-size=390,2000",
        f"--screenshot={picture}",
        (place / "page.html").as_uri(),
    )
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 20_000, "not blank"
