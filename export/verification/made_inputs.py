"""Inputs for a file that nobody gave any for: what its graph says of their types and sizes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx

from lora_fx.errors import ExportError
from lora_fx.export.runtime.active_adapter import activated
from lora_fx.export.runtime.in_place import axes_in_place
from lora_fx.export.runtime.ort import call, check_names, open_session, to_array
from lora_fx.export.verification.file_run import Feeds, Run

_HANDS_ON = {"Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze", "Flatten"}
_CASES = 2  # that run are enough
_SUM = re.compile(r"\s*\+\s*")


def feeds_for(
    run: Run,
    model: onnx.ModelProto,
    given: Mapping[str, Any] | None = None,
    session: Any = None,
) -> dict[str, Feeds]:
    """Inputs of one or two shapes that a file runs on: label -> name -> array.

    Numbers are random, ids of a table below its size, and masks, flags and other whole numbers
    one.

    Args:
        run: the file; it knows what these gave afterwards.
        model: the same, loaded without its external data.
        given: inputs to use and no others.
        session: one of the file, opened to check it; None: one of its own.

    Raises:
        ExportError: what was given does not run, or nothing that was tried.
    """
    session = session or open_session(run.path, threads=1, to_check=True)
    active = activated(session, run.path, run.manifest, run.adapter)
    inputs = [value for value in session.get_inputs() if value.name not in active.feeds]
    if given is not None:
        check_names(run.path, given, [value.name for value in inputs])
        feeds = {name: to_array(name, value) for name, value in given.items()}
        run.known[True, "as given"] = call(session, feeds | active.feeds, active.options)
        return {"as given": feeds}
    limits = dict(_table_sizes(model))
    found: dict[str, Feeds] = {}
    problem: ExportError | None = None
    for sizes in _sizes(inputs, axes_in_place(model)):
        feeds = {value.name: _values(value, sizes, limits) for value in inputs}
        label = ", ".join(f"{n}={s}" for n, s in sizes.items() if "+" not in n) or "as declared"
        try:
            given_back = call(session, feeds | active.feeds, active.options)
            run.known.setdefault((True, label), given_back)
            found.setdefault(label, feeds)
        except ExportError as error:
            problem = error
        if len(found) == _CASES:
            break
    if not found:
        raise ExportError(
            f"{run.path}: no inputs that were tried run: {problem}; give some as inputs="
        )
    return found


def _sizes(inputs: Sequence[Any], apart: Sequence[str]) -> Iterator[dict[str, int]]:
    """Sizes of the dimensions that may change: one of each, all different, or others of one size.

    Few, since products with one row are three times as fast in a large model.

    Args:
        inputs: of the model.
        apart: dimensions of which one has to be 1.
    """
    names = [s for v in inputs for s in v.shape if isinstance(s, str)]
    parts = dict.fromkeys(p for n in names for p in _SUM.split(n) if not p.isdigit())
    sizes = {part: 2 + place for place, part in enumerate(parts)}
    yield _summed(names, dict.fromkeys(parts, 1))
    for one in apart:
        yield _summed(names, sizes | {one: 1})
    if not apart:
        yield _summed(names, sizes)
    yield _summed(names, {part: 3 + 2 * place for place, part in enumerate(parts)})
    for size in (4, 16, 32, 64):
        yield _summed(names, dict.fromkeys(parts, size))


def _summed(names: list[str], parts: Mapping[str, int]) -> dict[str, int]:
    """With those that are called after a sum, ``"past + new"``."""
    return {n: sum(int(p) if p.isdigit() else parts[p] for p in _SUM.split(n)) for n in names}


def _values(
    value: Any, sizes: Mapping[str, int], limits: Mapping[str, int]
) -> np.ndarray[Any, Any]:
    shape = [s if isinstance(s, int) else sizes.get(s or "", 2) for s in value.shape]
    kind = value.type.removeprefix("tensor(").removesuffix(")")
    random = np.random.default_rng(len(value.name))
    if kind in ("float", "double", "float16"):
        dtype = {"float": "float32", "double": "float64"}.get(kind, kind)
        return random.standard_normal(shape).astype(dtype)
    if kind == "bool" or kind.startswith(("int", "uint")):
        made = random.integers(0, limits[value.name], shape) if value.name in limits else 1
        return np.broadcast_to(np.asarray(made), shape).astype(kind)
    raise ExportError(
        f"input {value.name!r} is {value.type}, which nothing is made up for; give it as inputs="
    )


def _table_sizes(model: onnx.ModelProto) -> Iterator[tuple[str, int]]:
    """Inputs whose values pick from a table, and how many it has: of several the fewest."""
    tables = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    origin = {value.name: value.name for value in model.graph.input}
    found: dict[str, int] = {}
    for node in model.graph.node:
        if node.op_type in _HANDS_ON and node.input[0] in origin:
            origin[node.output[0]] = origin[node.input[0]]
        picks = node.op_type in ("Gather", "GatherElements", "GatherBlockQuantized")
        if picks and node.input[1] in origin and tables.get(node.input[0]):
            axis = next((a.i for a in node.attribute if a.name in ("axis", "gather_axis")), 0)
            name, rows = origin[node.input[1]], tables[node.input[0]][axis]
            found[name] = min(rows, found.get(name, rows))
    yield from found.items()
