"""Mutants of our own code against the tests that should notice: ``python tests/mutants/run.py``.

``rows.jsonl`` has a line for each: a file, what stands there, what is put in its place, and the
tests. Options: words that a file's path must hold; ``--from N``; ``--seconds S`` for all of it.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
LONGEST = 300  # seconds of one mutant; one that hangs is noticed


def rows() -> list[dict[str, Any]]:
    """The table, each line checked against the code: what it changes stands there once."""
    found = [json.loads(line) for line in (HERE / "rows.jsonl").read_text().splitlines()]
    for row in found:
        count = (ROOT / row["file"]).read_text().count(row["before"])
        assert count == 1, f"{row['file']}: {count} times {row['before']!r}"
        missing = [test for test in row["tests"] if not (ROOT / test.partition("::")[0]).exists()]
        assert not missing, missing
    return found


def copied(home: Path) -> Path:
    """The package as it is installed, and its tests, to be changed."""
    skip = shutil.ignore_patterns("__pycache__", "*.pyc")
    shutil.copytree(ROOT / "lora_fx", home / "lora_fx", ignore=skip)
    for room in ("passes", "export"):
        shutil.copytree(ROOT / room, home / "lora_fx" / room, ignore=skip)
        (home / room).symlink_to(home / "lora_fx" / room)
    shutil.copytree(ROOT / "tests", home / "tests", ignore=skip)
    shutil.copy(ROOT / "pyproject.toml", home)
    return home


def passes(home: Path, tests: list[str]) -> bool:
    """Whether tests pass, in a process that has all but our package in memory already."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            signal.alarm(LONGEST)
            os.chdir(home)
            sys.path.insert(0, str(home))
            sys.dont_write_bytecode = True
            for name in [n for n in sys.modules if n.partition(".")[0] == "lora_fx"]:
                del sys.modules[name]
            import pytest

            said = os.open(home / "said.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(said, 1)
            os.dup2(said, 2)
            options = ["-x", "-q", "--assert=plain", "-p", "no:cacheprovider", "-p", "no:xdist"]
            code = int(pytest.main([*options, *tests]))
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def main(words: list[str], first: int, seconds: float) -> int:
    """Runs the table; gives how many mutants lived."""
    for name in ("torch", "torch.export", "torch.onnx", "onnx", "onnx_ir", "onnxscript", "peft",
                 "onnxruntime", "transformers", "safetensors.torch"):  # fmt: skip
        importlib.import_module(name)
    begin, lived, done = time.monotonic(), [], 0
    chosen = [row for row in rows() if all(word in row["file"] for word in words)][first:]
    with tempfile.TemporaryDirectory() as place:
        home = copied(Path(place))
        whole: dict[str, bool] = {}
        for row in chosen:
            if time.monotonic() - begin > seconds:
                break
            key = " ".join(row["tests"])
            if key not in whole:  # the control: they pass on the code as it is
                whole[key] = passes(home, row["tests"])
            file, before = home / row["file"], (ROOT / row["file"]).read_text()
            file.write_text(before.replace(row["before"], row["after"]))
            survived = not whole[key] or passes(home, row["tests"])
            file.write_text(before)
            done += 1
            if survived:
                lived.append(row)
                why = "lived" if whole[key] else "tests fail without it"
                print(f"{why}: {row['file']}: {row['before']!r} -> {row['after']!r}", flush=True)
    print(f"{done - len(lived)} of {done} mutants noticed, of {len(chosen)} chosen")
    return len(lived)


if __name__ == "__main__":
    given = sys.argv[1:]

    def option(name: str, default: float) -> float:
        return float(given[given.index(name) + 1]) if name in given else default

    names = [word for n, word in enumerate(given) if "-" not in word and "--" not in given[n - 1]]
    sys.exit(bool(main(names, int(option("--from", 0)), option("--seconds", 1e9))))
