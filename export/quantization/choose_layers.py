"""Which weights of a file are quantised: of linear layers and tables, and what stays and why."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass
from fnmatch import fnmatchcase

import onnx_ir as ir

from lora_fx.errors import ExportError, shorten
from lora_fx.export.quantization.heads import BRANCH, heads_in
from lora_fx.export.rewriting.file_layers import DTYPES, FileLayer, layers_in
from lora_fx.export.rewriting.layer_names import apart, paths_in

A_HEAD = "a head"
_DTYPES = ("float32", "float16")


@dataclass(frozen=True)
class Chosen:
    """What is quantised of a file.

    Attributes:
        layers: path -> the calls of one weight.
        left: path -> why it stays as it is.
    """

    layers: dict[str, list[FileLayer]]
    left: dict[str, str]


def choose_layers(
    model: ir.Model,
    wanted: Sequence[str] | None = None,
    keep: Sequence[str] = (),
    tables: Sequence[str] = (),
    own: Set[str] | None = None,
) -> Chosen:
    """Chooses linear layers and tables: of the base alone, what adapters bring is left.

    Args:
        model: the model.
        wanted: paths of linear layers, where ``*`` stands for any part; by default all but heads.
        keep: paths that are left.
        tables: paths of embeddings, likewise.
        own: paths and names of the model's weights, if it is known: no other constant is taken.

    Raises:
        ExportError: a path means no layer of its kind, or none is named.
    """
    linear, embeddings = _named(list(layers_in(model)))
    if wanted is not None and not (wanted or tables):
        raise ExportError(f"layers: names no layer; there are {shorten(list(linear)) or 'none'}")
    _refuse_unknown("linear layer", wanted or (), linear)
    _refuse_unknown("embedding", tables, embeddings)
    _refuse_unknown("layer", keep, linear | embeddings)
    heads = heads_in(model, {call.node for calls in linear.values() for call in calls})
    lookups = {call.node for calls in embeddings.values() for call in calls}
    asked = {path: calls for path, calls in embeddings.items() if _means(tables, path)}
    chosen: dict[str, list[FileLayer]] = {}
    left = {}
    for path, calls in (asked | linear).items():
        why = _why_not(calls, lookups)
        if path in linear and wanted is not None and not _means(wanted, path):
            continue
        if own is not None and not {path, str(calls[0].weight.name)} & own:
            why = "computed from numbers, no weight of the model"
        if _means(keep, path):
            why = "asked for"
        elif wanted is None and any(call.node in heads for call in calls):
            why = why or A_HEAD
        if why:
            left[path] = why
        else:
            chosen[path] = calls
    return Chosen(chosen, left)


def _named(
    layers: Sequence[FileLayer],
) -> tuple[dict[str, list[FileLayer]], dict[str, list[FileLayer]]]:
    """Linear layers, and embeddings, by path; of two of one path the second by its weight."""
    own = [
        layer
        for layer in layers
        if BRANCH not in str(layer.weight.name) and (layer.kind == "linear" or _is_table(layer))
    ]
    named = apart(own, paths_in(layers))
    linear = {name: calls for name, calls in named.items() if calls[0].kind == "linear"}
    return linear, {name: calls for name, calls in named.items() if name not in linear}


def _is_table(layer: FileLayer) -> bool:
    return layer.kind == "embedding" and layer.node.inputs[0] is layer.weight


def _why_not(calls: Sequence[FileLayer], lookups: Set[ir.Node]) -> str:
    """Why a weight cannot be quantised; nothing if it can. A table may keep it in float beside."""
    first = calls[0]
    known = {call.node for call in calls} | lookups
    others = {user.op_type for user in _readers(first.weight) if user not in known}
    shape = first.node.inputs[0].shape if first.node.inputs[0] is not None else None
    if first.weight.is_graph_input():
        return "its weight is an input, which may be given in place of what is stored"
    if any(call.quantised for call in calls):
        return "quantised already"
    if first.dtype not in _DTYPES:
        return f"{first.dtype}"
    if DTYPES.get(first.weight.dtype) != first.dtype:  # type: ignore[arg-type]
        return f"stored as {first.weight.dtype}, and read as {first.dtype}"
    if first.kind == "embedding":
        return ""
    if others or len({call.turned for call in calls}) > 1 or first.weight.is_graph_output():
        return f"its weight is read by {', '.join(sorted(others)) or 'others'} too"
    if any(call.node.attributes.get_float("beta", 1.0) != 1.0 for call in calls):
        return "its bias is scaled"
    if any(_holds_branch(call.node) for call in calls):
        return "an adapter is a part of its weight: quantise when it is exported"
    return "it reads a vector" if shape is not None and shape.rank() < 2 else ""


def _readers(weight: ir.Value) -> list[ir.Node]:
    """Who reads a weight in the end, turned round or not."""
    found = []
    for use in weight.uses():
        hands_on = use.node.op_type in ("Identity", "Transpose")
        found += _readers(use.node.outputs[0]) if hands_on else [use.node]
    return found


def _holds_branch(node: ir.Node) -> bool:
    """Whether x has columns that an adapter made, whose rows of the weight are the adapter's B."""
    x = node.inputs[0]
    made = None if x is None else x.producer()
    if made is None or made.op_type != "Concat":
        return False
    waiting, seen = [value for value in made.inputs if value is not None], 0
    while waiting and seen < _DEEP:
        seen += 1
        value = waiting.pop(0)
        if value.is_initializer() and BRANCH in str(value.name):
            return True
        maker = value.producer()
        waiting += [v for v in maker.inputs if v is not None] if maker is not None else []
    return False


_DEEP = 12  # values behind a concatenation: its shrink, a sum with ones, casts


def _means(patterns: Sequence[str], path: str) -> bool:
    return any(name == path or fnmatchcase(path, name) for name in patterns)


def _refuse_unknown(what: str, patterns: Sequence[str], named: dict[str, list[FileLayer]]) -> None:
    unknown = [name for name in patterns if not any(_means([name], path) for path in named)]
    if unknown:
        raise ExportError(
            f"no {what} at {shorten(unknown)}; there are {shorten(list(named)) or 'none'}"
        )
