"""Exports that are killed, or short of disk, rights or memory; and the same bytes wherever made.

``LORA_FX_KILLS=1000 pytest tests/hostile/test_faults.py`` kills more often.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).with_name("exporting.py")
KILLS = int(os.environ.get("LORA_FX_KILLS", "2"))


def run(home: Path, *kinds: str, **surroundings: str) -> dict[str, list[Any]]:
    """What a process of its own says, by the word that it begins with."""
    home.mkdir(parents=True, exist_ok=True)
    home.chmod(0o755)  # a process without rights must find its way
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(SCRIPT), str(home), *kinds],
        env={**os.environ, "OMP_NUM_THREADS": "1", **surroundings},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    said: dict[str, list[Any]] = {"raw": []}
    for line in done.stdout.splitlines():
        word, _, rest = line.partition(" ")
        said.setdefault(word, []).append(rest if word in ("raw", "typed") else json.loads(rest))
    return said


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    home = tmp_path_factory.mktemp("faults")
    # Faults first: what is killed then is an export, and not the import of all that it needs.
    return run(home, "faults", f"kills={KILLS}", "digests", PYTHONHASHSEED="1", TZ="UTC")


def test_a_killed_export_leaves_the_old_set_or_the_new_one(said: dict[str, list[Any]]) -> None:
    (found,) = said["KILLS"]
    assert found["mixed"] == 0
    assert not found["left"], "the next run leaves its own files alone"
    assert found["died"] > 0


def test_every_fault_is_a_typed_error_and_nothing_is_written(said: dict[str, list[Any]]) -> None:
    assert said["raw"] == []
    done = {(fault, name): (code, same) for fault, name, code, same in said["FAULT"]}
    assert len(done) == 18
    assert {case: found for case, found in done.items() if found != (1, True)} == {}


def test_bytes_are_the_same_wherever_and_whenever_they_are_made(
    said: dict[str, list[Any]], tmp_path: Path
) -> None:
    home = tmp_path / "elsewhere" / "an \u00fcmlaut and a space"
    other = run(
        home, "digests", PYTHONHASHSEED="2", TZ="Asia/Tokyo", OMP_NUM_THREADS="2", LC_ALL="C",
    )  # fmt: skip
    assert said["DIGESTS"] == other["DIGESTS"]
    assert len(said["DIGESTS"][0]) > 10
