"""Hostile adapters, models and commands, made by a script: ``python tests/hostile/corpus.py OUT``.

OUT gets a directory for each case, and ``cases.jsonl``: a line for each, with what a reader should
say of it. With ``--run`` every case is read as well, watched, and what came of it is printed.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from cases import every_case, write
from making import Case, Models


def main(out: Path, run: bool) -> None:
    """Writes the corpus, and reads it."""
    out = out.resolve()
    cases = every_case(Models(out / "originals"))
    write(cases, out / "cases")
    lines = [{"directory": f"cases/{n:03}", **case.line()} for n, case in enumerate(cases)]
    (out / "cases.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if not run:
        print(f"{len(cases)} cases in {out}")
        return
    from reading import WAYS, graph

    _warm(out, WAYS)
    from watching import Watch

    graph(), graph(__import__("torch").float16)
    watch = Watch()
    for number, case in enumerate(cases):
        home = out / "cases" / f"{number:03}"
        os.chdir(home)
        with watch.over(home):
            result = _read(case, home, WAYS[case.how])
        result["seen"] = watch.taken()
        print("RESULT", json.dumps({**case.line(), **result}), flush=True)


def _warm(out: Path, ways: dict[str, Any]) -> None:
    """Imports what reading imports, on files that are good."""
    import contextlib

    from cases import adapter, pickled
    from making import tensors

    good = out / "good"
    for name, make in (("peft", adapter()), ("pickle", pickled(tensors))):
        (good / name).mkdir(parents=True, exist_ok=True)
        make(good / name)
    for way, home in (
        ("load_pickle", good / "pickle"), ("fit", good / "peft"), ("export", good / "peft"),
        ("session", out / "originals" / "inside"), ("directory", good),
    ):  # fmt: skip
        with contextlib.suppress(Exception):
            ways[way](home)
    import peft  # noqa: F401
    import transformers.models.bert.modeling_bert  # noqa: F401


def _read(case: Case, home: Path, way: Any) -> dict[str, Any]:
    before = time.process_time()  # of the processor: others may use it at the same time
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            way(home)
            found = {"error": None, "message": ""}
        except BaseException as error:
            kinds = [kind.__name__ for kind in type(error).__mro__]
            found = {"error": kinds, "message": str(error)}
    return {
        "found": found["message"][:500],
        "error": found["error"],
        "warned": [str(w.message) for w in told],
        "seconds": time.process_time() - before,
        "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]), "--run" in sys.argv)
