"""Inputs for a file that nobody gave any for: what its graph says of their types and sizes."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from lora_fx.errors import ExportError
from lora_fx.export.onnx_model.parsed import parsed
from lora_fx.export.rewriting.file_layers import layers_in
from lora_fx.export.rewriting.weight_reads import input_at
from lora_fx.export.runtime.active_adapter import activated
from lora_fx.export.runtime.generation import PAST
from lora_fx.export.runtime.in_place import axes_in_place
from lora_fx.export.runtime.ort import NUMPY, call, check_names, open_session, to_array
from lora_fx.export.verification.file_run import Feeds, Run, as_arrays

_HANDS_ON = {
    "Cast", "DequantizeLinear", "Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze",
}  # fmt: skip
# Where an operator takes what is stored, and what it reads.
_READ = {
    "Conv": (1, 0), "Gather": (0, 1), "GatherBlockQuantized": (0, 1), "GatherElements": (0, 1),
    "If": (0, 0),
}  # fmt: skip
_MOST_MADE = 1 << 28  # numbers of one input
_CASES = 2  # that run are enough, of each way that a flag chooses
_SIDES = (224, 384, 336, 448, 512, 518)  # that encoders of images have positions for
_SUM = re.compile(r"\s*\+\s*")
_PAST, _TOTAL = "past_", "total_"


def feeds_for(
    run: Run,
    model: onnx.ModelProto,
    given: Mapping[str, Any] | None = None,
    session: Any = None,
) -> dict[str, Feeds]:
    """Inputs of one or two shapes that a file runs on: label -> name -> array.

    Numbers are random, ids of a table below its size, and masks and other whole numbers one; so
    are flags, and zero too where they choose a branch.

    Args:
        run: the file; it knows what these gave afterwards.
        model: the same, loaded without its external data.
        given: inputs to use and no others.
        session: one of the file, opened to check it; None: one of its own.

    Raises:
        ExportError: what was given does not run, or nothing that was tried.
    """
    session = session or open_session(run.path, threads=1, to_check=True)
    active = activated(session, run.path, run.manifest, run.adapter).silenced()
    inputs = [value for value in session.get_inputs() if value.name not in active.feeds]
    if given is not None:
        check_names(run.path, given, [value.name for value in inputs])
        feeds = {name: to_array(name, value) for name, value in given.items()}
        given_back = call(session, feeds | active.feeds, active.options)
        run.known[True, "as given"] = as_arrays(given_back)
        return {"as given": feeds}
    picks = _picks_of(model)
    found: dict[str, Feeds] = {}
    problem: ExportError | None = None
    ones, zeros = dict[str, int](), dict.fromkeys(picks.flags, 1)  # of values below 1
    for way in (ones, zeros) if picks.flags else (ones,):
        limits, ran = picks.limits | way, 0
        for sizes in _sizes(inputs, axes_in_place(model), picks):
            feeds = {value.name: _values(value, sizes, limits) for value in inputs}
            words = {name: size for name, size in sizes.items() if "+" not in name}
            words |= dict.fromkeys(way, 0)
            label = ", ".join(f"{n}={s}" for n, s in words.items()) or "as declared"
            try:
                given_back = call(session, feeds | active.feeds, active.options)
            except ExportError as error:
                problem = error
                continue
            run.known.setdefault((True, label), as_arrays(given_back))
            ran += label not in found
            found.setdefault(label, feeds)
            if ran == _CASES:
                break
    if not found:
        raise ExportError(
            f"{run.path}: no inputs that were tried run: {problem}; give some as inputs="
        )
    return found


def _sizes(inputs: Sequence[Any], apart: Sequence[str], picks: _Picks) -> Iterator[dict[str, int]]:
    """Sizes of the dimensions that may change: one of each, all different, or others of one size.

    Few, since products with one row are three times as fast in a large model.

    Args:
        inputs: of the model.
        apart: dimensions of which one has to be 1.
        picks: what the graph says of them.
    """
    channels = [v for v in inputs if v.name in picks.channels]
    known = picks.known | {v.shape[1]: picks.channels[v.name] for v in channels}
    images = [v.shape[2:] for v in channels if len(v.shape) == 4]
    sides = {name for shape in images for name in shape if isinstance(name, str)}
    names = _spelled(s for v in inputs for s in v.shape if isinstance(s, str))
    parts = dict.fromkeys(p for sum_ in names.values() for p in sum_ if not p.isdigit())
    known = {name: size for name, size in known.items() if isinstance(name, str)}
    for sizes in _any_sizes(parts, apart, sides):
        yield _summed(names, sizes | known)


def _any_sizes(
    parts: Collection[str], apart: Sequence[str], sides: Collection[str]
) -> Iterator[dict[str, int]]:
    sizes = {part: 2 + place for place, part in enumerate(parts)}
    yield dict.fromkeys(parts, 1)
    for one in apart:
        yield sizes | {one: 1}
    if not apart:
        yield sizes
    sizes = {part: 3 + 2 * place for place, part in enumerate(parts)}
    yield sizes
    if past := [part for part in parts if part.startswith(_PAST)]:
        yield sizes | dict.fromkeys(past, 0)
    for size in (4, 16, 32, 64):
        yield dict.fromkeys(parts, size)
    for side in _SIDES if sides else ():
        for others in (1, 2):
            yield dict.fromkeys(parts, others) | dict.fromkeys(sides, side)


def _spelled(names: Iterable[str]) -> dict[str, list[str]]:
    """What each is the sum of: of ``"past + new"``, and ``total_N`` of ``past_N`` and ``N``."""
    found = {name: _SUM.split(name) for name in names}
    for name in found:
        terms = [f"{_PAST}{name.removeprefix(_TOTAL)}", name.removeprefix(_TOTAL)]
        if name.startswith(_TOTAL) and found.keys() >= set(terms):
            found[name] = terms
    return found


def _summed(names: Mapping[str, Sequence[str]], parts: Mapping[str, int]) -> dict[str, int]:
    """The size of each name, by those of what it is the sum of."""
    return {
        name: sum(int(p) if p.isdigit() else parts[p] for p in terms)
        for name, terms in names.items()
    }


def _values(
    value: Any, sizes: Mapping[str, int], limits: Mapping[str, int]
) -> np.ndarray[Any, Any]:
    shape = [s if isinstance(s, int) else sizes.get(s or "", 2) for s in value.shape]
    if value.type not in NUMPY:
        raise ExportError(
            f"input {value.name!r} is {value.type}, which nothing is made up for; give it as "
            "inputs="
        )
    if math.prod(shape) > _MOST_MADE:
        raise ExportError(
            f"input {value.name!r} of {shape} is more than is made up; give it as inputs=, or "
            "leave sizes open in the file"
        )
    random, dtype = np.random.default_rng(len(value.name)), np.dtype(NUMPY[value.type])
    if dtype.kind == "f":
        return random.standard_normal(shape).astype(dtype)
    made = random.integers(0, limits[value.name], shape) if value.name in limits else 1
    return np.broadcast_to(np.asarray(made), shape).astype(dtype)


@dataclass(frozen=True)
class _Picks:
    """What a graph says of the values and sizes of its inputs.

    Attributes:
        limits: of those whose values pick from a table: how many it has, of several the fewest.
        channels: of those that a convolution reads.
        flags: those that choose a branch.
        known: sizes that dimensions of a cache have, by what they are called.
    """

    limits: dict[str, int] = field(default_factory=dict)
    channels: dict[str, int] = field(default_factory=dict)
    flags: list[str] = field(default_factory=list)
    known: dict[str, int] = field(default_factory=dict)


def _picks_of(model: onnx.ModelProto) -> _Picks:
    read = parsed(model)
    picks = _Picks(known=_of_caches(read))
    for node in (n for n in read.graph.all_nodes() if n.op_type in _READ):
        stored, given = (_origin(input_at(node, at)) for at in _READ[node.op_type])
        if given is None or not given.is_graph_input():
            continue
        name, shape = str(given.name), None if stored is None else stored.shape
        if node.op_type == "If":
            picks.flags.append(name)
        elif shape is None or not shape.is_static() or stored is given:
            continue
        elif node.op_type == "Conv":
            if given.shape is not None and len(given.shape) == len(shape):
                picks.channels[name] = shape.numpy()[1] * (node.attributes.get_int("group", 1) or 1)
        else:
            axis = node.attributes.get_int("gather_axis", node.attributes.get_int("axis", 0))
            rows = shape.numpy()[axis or 0]
            picks.limits[name] = min(rows, picks.limits.get(name, rows))
    return picks


def _of_caches(model: ir.Model) -> dict[str, int]:
    """A head's size, by the layer that reads all heads of fused attention; and a window's.

    A cache of a window is full where all have its length: the rest of it is whatever was there.
    """
    heads = [
        layer.shape[1] // count
        for layer in layers_in(model)
        if (x := layer.node.inputs[0]) is not None
        and (made := x.producer()) is not None
        and (count := made.attributes.get_int("num_heads", 0))
    ]
    found: dict[str, int] = {}
    windows, lengths = [0], set()
    for value in model.graph.inputs:
        if not str(value.name).startswith(PAST) or value.shape is None or len(value.shape) != 4:
            continue
        *_, length, width = (str(size) for size in value.shape)
        lengths.add(length)
        found |= dict.fromkeys([width], heads[0]) if heads else {}
        slides = [n for n in value.consumers() if n.attributes.get_int("sliding_window_cache", 0)]
        windows += [node.attributes.get_int("local_window_size", 0) or 0 for node in slides]
    return found | dict.fromkeys(lengths if any(windows) else (), max(windows))


def _origin(value: ir.Value | None) -> ir.Value | None:
    """The input or the weight that a value is, moved or cast."""
    while value is not None and (node := value.producer()) is not None:
        if node.op_type not in _HANDS_ON:
            return None
        value = input_at(node, 0)
    return value
