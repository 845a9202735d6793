"""The corpus, read in a process of its own: what is said, how soon, in how much memory, unseen."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
SECONDS, KILOBYTES = 2, 1 << 20


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    out = tmp_path_factory.mktemp("corpus")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(HERE / "corpus.py"), str(out), "--run"],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    found = [json.loads(line.removeprefix("RESULT ")) for line in lines]
    said = (out / "cases.jsonl").read_text().splitlines()
    assert [json.loads(line)["name"] for line in said] == [one["name"] for one in found]
    assert list(out.rglob("stolen")) == []
    return found


def wrong(one: dict[str, Any]) -> str | None:
    """What is not as a line of the corpus says."""
    if one["warns"]:
        told = not one["message"] or any(re.search(one["message"], w) for w in one["warned"])
        return None if one["error"] is None and told else "no warning"
    if one["error"] is None:
        return "accepted"
    if "LoraFxError" not in one["error"]:
        return f"raised {one['error'][0]}"
    is_told = re.search(one["message"], one["found"], re.DOTALL) and one["file"] in one["found"]
    return None if is_told else f"says {one['found']}"


def test_every_case_is_refused_by_name(results: list[dict[str, Any]]) -> None:
    told = {f"{one['row']} {one['name']}": wrong(one) for one in results}
    assert {name: problem for name, problem in told.items() if problem} == {}


def test_a_control_would_be_seen(results: list[dict[str, Any]]) -> None:
    one = next(one for one in results if not one["warns"])
    assert wrong({**one, "error": None}) == "accepted"
    assert wrong({**one, "error": ["IndexError", "Exception"]}) == "raised IndexError"
    assert wrong({**one, "message": "something else"}) is not None
    assert wrong({**one, "file": "another file"}) is not None


def test_no_row_of_the_list_is_left_out(results: list[dict[str, Any]]) -> None:
    assert {one["row"] for one in results} == {*range(1, 63)}
    assert len({(one["row"], one["name"]) for one in results}) == len(results)


def test_none_takes_long_or_much(results: list[dict[str, Any]]) -> None:
    assert [one["name"] for one in results if one["seconds"] > SECONDS] == []
    assert max(one["memory"] for one in results) < KILOBYTES


def test_nothing_runs_connects_or_is_touched_outside(results: list[dict[str, Any]]) -> None:
    assert {one["name"]: one["seen"] for one in results if one["seen"]} == {}


WATCHED = """
import os, pickle, socket, subprocess, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from watching import Watch
home = Path(sys.argv[2]); watch = Watch()
(home / "in").mkdir(); (home / "evil_module.py").write_text("x = 1"); sys.path.append(str(home))
with watch.over(home / "in"):
    (home / "in" / "file").write_text("fine")
    for harm in (
        lambda: (home / "out").write_text("x"), lambda: open("/etc/hostname").read(),
        lambda: os.rename(home / "in" / "file", home / "moved"), lambda: os.mkdir(home / "made"),
        lambda: subprocess.run(["true"]), lambda: os.system("true"), lambda: socket.socket(),
        lambda: pickle.loads(b"cos\\ngetcwd\\n(tR."), lambda: __import__("evil_module"),
    ):
        try: harm()
        except OSError: pass
        print(len(watch.taken()))
"""


def test_the_watch_sees_what_it_should(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, str(HERE), str(tmp_path)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert len(done.stdout.split()) == 9
    assert "0" not in done.stdout.split()
