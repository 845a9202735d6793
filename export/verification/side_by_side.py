"""Files against files: what onnxruntime makes of two of them, and of one that must differ."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch

from lora_fx.export.report import Check, Verification
from lora_fx.export.verification.file_run import Feeds, Run, first_of
from lora_fx.numerics import coarsest, compare


@dataclass(frozen=True)
class Pair:
    """Two that must agree.

    Attributes:
        what: which they are, in the report.
        found: what was made.
        expected: what it is held against.
    """

    what: str
    found: Run
    expected: Run


def held_against(
    pairs: Sequence[Pair],
    controls: Mapping[str, Run],
    feeds: Mapping[str, Feeds],
    dtype: torch.dtype = torch.float32,
) -> Verification:
    """Runs files on the same inputs.

    Args:
        pairs: that must agree; the last is what the controls are held against.
        controls: what must not agree with it, by what they are in the report; each is run until
            one of the inputs tells it apart.
        feeds: the inputs of each run, by a label.
        dtype: the coarsest of the weights, which says what can be asked for.
    """
    evidence = Verification(against="the file beside it")
    _run_all(pairs, controls, feeds)
    expected: dict[str, Feeds] = {}
    for pair in pairs:
        expected = pair.expected.outputs(feeds)
        for optimise in (False, True):
            found = pair.found.outputs(feeds, optimise=optimise)
            evidence.checks += _rows(pair.what, found, expected, optimise, dtype)
    for what, control in controls.items():
        for label in feeds:
            found, wanted = control.outputs({label: feeds[label]}), {label: expected[label]}
            rows = list(_rows(what, found, wanted, True, dtype))
            evidence.controls += [replace(row, ok=not row.ok) for row in rows]
            if not all(row.ok for row in rows):
                break
    return evidence


def _run_all(
    pairs: Sequence[Pair], controls: Mapping[str, Run], feeds: Mapping[str, Feeds]
) -> None:
    """Runs each file once, some beside others: each has one thread, and remembers what it gave."""
    optimised = [pair.found for pair in pairs] + [pair.expected for pair in pairs]
    each = {(id(run), True): run for run in optimised}
    each |= {(id(pair.found), False): pair.found for pair in pairs}
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        done = [pool.submit(run.outputs, feeds, optimise=key[1]) for key, run in each.items()]
        done += [
            pool.submit(control.outputs, first_of(feeds))
            for control in controls.values()
            if (id(control), True) not in each
        ]
        for outputs in done:
            outputs.result()


def _rows(
    what: str,
    found: Mapping[str, Feeds],
    expected: Mapping[str, Feeds],
    optimise: bool,
    dtype: torch.dtype,
) -> Iterator[Check]:
    for label, outputs in expected.items():
        for name, wanted in outputs.items():
            is_number = wanted.dtype.kind == "f"
            result = compare(found[label][name], wanted, dtype if is_number else None)
            numbers = result.max_abs, result.relative, result.tolerance
            same = found[label][name].dtype == wanted.dtype
            yield Check(
                what, label, "all" if optimise else "off", name, *numbers, result.ok and same
            )


def coarsest_named(names: Sequence[str]) -> torch.dtype:
    """The type that rounds most, of names of types, some of which torch has not."""
    return coarsest(getattr(torch, name, None) for name in names)
