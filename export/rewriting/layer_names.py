"""What the layers of an ONNX file are called: by their weights, by their nodes, or as one says."""

from __future__ import annotations

import re
from ast import literal_eval
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import takewhile
from types import MappingProxyType
from typing import Any

import onnx_ir as ir

from lora_fx.errors import ExportError, shorten
from lora_fx.export.rewriting.file_layers import FileLayer
from lora_fx.export.rewriting.weight_reads import handed_on

# ``fc.weight``, genai's ``fc.MatMul.weight``, and what quantisers put behind them.
_WEIGHT = re.compile(
    r"(?P<path>.+?)(\.MatMul|\.Gemm)?([._]|\.in_proj_)(weight|qweight|kernel)"
    r"([._](Q\d+\w*|Bnb4|quantized|quant|transposed|fp16|\d+bits?))*(_G\d+)?"
)
# ``/encoder/layer.0/query/MatMul_1``, ``/lm_head/MatMul_Q4``.
_NODE = re.compile(
    r"/?(?P<path>.*)/(MatMul|Gemm|Conv|Gather|GatherBlockQuantized|MatMulNBits|MatMulBnb4)(_\w+)?"
)
_NUMBERED = re.compile(r"::|^val_\d+$")  # exporters' own names of values, which tools build on
_BIAS = re.compile(r"(?P<path>.+)\.(in_proj_)?bias")
_NOTES = "pkg.torch.onnx"
_LEAF = re.compile(r"torch\.nn\.modules\.(linear|sparse|conv)\.\w+")  # reads its own weight alone
# Where an operator takes what it adds; onnxruntime's own are fused with the Add of a layer.
_BIASES = {
    "Add": (0, 1),
    "BiasGelu": (1,),
    "FastGelu": (1,),
    "Gemm": (2,),
    "MatMulNBits": (5,),
    "SkipLayerNormalization": (4,),
    "SkipSimplifiedLayerNormalization": (3,),
}
_PRODUCTS = {"MatMul", "Gemm", "Conv", "MatMulNBits", "MatMulBnb4"}
# What onnxruntime calls a weight that a batch-norm, or a factor, was multiplied into.
_FUSED = re.compile(r"(ConvBn|ConvMul|MatMulBn)Fusion_\w+.*")
_RULES = "pkg.onnxscript.rewriter.rule_name"
Paths = dict[str, list[FileLayer]]
_NONE: Mapping[str, Any] = MappingProxyType({})


def named_layers(layers: Iterable[FileLayer], names: Mapping[str, str]) -> tuple[Paths, list[str]]:
    """The layers of a file by module path, several calls of one together.

    Args:
        layers: of the file.
        names: name of an initializer or of a node -> module path, before all else.

    Returns:
        The layers, and the names of the weights of those that have no path.

    Raises:
        ExportError: a name of ``names`` is none of the file's, or a path of it none.
    """
    if odd := [p for p in names.values() if not (isinstance(p, str) and p and p.isprintable())]:
        raise ExportError(f"names: {odd[0]!r:.80} is no module path: give one, such as encoder.fc")
    found: Paths = {}
    nameless, used, every = [], set(), list(layers)
    graphs = dict.fromkeys(layer.node.graph for layer in every)
    parents = _parents_of_scopes(node for graph in graphs if graph is not None for node in graph)
    shared = _shared(every)
    for layer in every:
        mine = [str(layer.node.name), str(layer.weight.name)]
        given = next((name for name in mine if name in names), None)
        used.add(given)
        kinds, rest = shared.get(_holder(layer), ((), ""))
        behind = rest if layer.kind in kinds else None
        path = names[given] if given is not None else path_of(layer, behind, found, parents)
        if path is None:
            nameless.append(mine[1])
        else:
            found.setdefault(path, []).append(layer)
    if unknown := [name for name in names if name not in used]:
        raise ExportError(
            f"names: no layer has a weight or a node called {shorten(unknown)}; there are "
            f"{shorten(list(dict.fromkeys(str(layer.weight.name) for layer in every)))}"
        )
    return found, list(dict.fromkeys(nameless))


def paths_in(layers: Iterable[FileLayer]) -> dict[ir.Node, str]:
    """What the layers of a file are called, as far as the file tells."""
    every = list(layers)
    named = {c.node: path for path, calls in named_layers(every, {})[0].items() for c in calls}
    told = {layer.node: named.get(layer.node) or path_of(layer) for layer in every}
    return {node: path for node, path in told.items() if path is not None}


def apart(
    layers: Iterable[FileLayer],
    paths: Mapping[ir.Node, str],
    name_of: Callable[[FileLayer], str] = lambda layer: str(layer.weight.name),
) -> Paths:
    """The calls of each weight, and of each kind of them, by one name.

    By its path; or, where another has that, as a module may hold two weights, by its weight's name;
    or by that and its kind, as a head may share the weight of a table.

    Args:
        layers: calls.
        paths: what they are called, as `paths_in` says.
        name_of: what the weight of one is called.
    """
    of_weight: dict[tuple[ir.Value, str], list[FileLayer]] = {}
    for layer in layers:
        of_weight.setdefault((layer.weight, layer.kind), []).append(layer)
    found: Paths = {}
    for (weight, kind), calls in of_weight.items():
        own = name_of(calls[0])
        names = (paths.get(calls[0].node, own), own)
        free = next((name for name in names if name not in found), f"{weight.name} ({kind})")
        found[free] = calls
    return found


def path_of(
    layer: FileLayer,
    behind: str | None = None,
    known: Mapping[str, Sequence[FileLayer]] = _NONE,
    parents: Mapping[str, str] = _NONE,
) -> str | None:
    """By the module that torch.onnx notes; else by the weight, then by the node.

    A weight tells if it bears the name of a parameter, and is no other module's too. A second call
    of a layer is a node, or a weight, of the first one's name and a number, with its weight or,
    where a tool made one for each call, an equal one.

    Args:
        layer: a call of it.
        behind: where its weight lies below the module that calls it, if that may bear another
            module's name.
        known: the layers that have a path already.
        parents: how paths begin where the scopes of nodes begin otherwise.
    """
    if noted := _by_note(layer.node):
        return noted
    by_weight = _parameter_path(str(layer.weight.name)) if behind is None else None
    if by_weight is not None:
        return by_weight
    scope = _scope(layer.node, noted=behind is not None)
    path = _by_scope(layer.node) or (scope and _moved(scope, parents) + (behind or ""))
    copied = _parameter_path(_first(str(layer.weight.name))) if behind is None else None
    for first in (_first(path or ""), copied or ""):
        calls = known.get(first, ())
        if any(call.kind == layer.kind and _may_be_one(call, layer) for call in calls):
            return first
    return path or _by_bias(layer.node)


def _first(name: str) -> str:
    """A name without the number that a second one of it gets."""
    return re.sub(r"_\d+$", "", name)


def _shared(layers: Sequence[FileLayer]) -> dict[str, tuple[set[str], str]]:
    """Weights that bear one module's name and are another's too.

    A table that a linear layer reads, and what calls of more than one module read.

    Returns:
        Name -> the kinds of such calls, and where it lies below the module that calls it.
    """
    kinds: dict[str, set[str]] = {}
    scopes: dict[str, set[str]] = {}
    for layer in layers:
        kinds.setdefault(_holder(layer), set()).add(layer.kind)
        if (scope := _scope(layer.node, noted=True)) is not None:
            scopes.setdefault(_holder(layer), set()).add(scope)
    paths = {_parameter_path(str(layer.weight.name)) for layer in layers}
    found = {holder: ({"linear"}, "") for holder, of in kinds.items() if "embedding" in of}
    for holder, of in scopes.items():
        if len({scope for scope in of if _first(scope) not in of - {scope}}) > 1:
            over = [s for s in of if s and holder in paths and f"{holder}.".startswith(f"{s}.")]
            above = max(over, key=len, default=holder)
            found[holder] = kinds[holder], holder.removeprefix(above)
    return found


def _holder(layer: FileLayer) -> str:
    """Whose weight it is by its name, or else by who calls it: exporters turn a tied one."""
    name = str(layer.weight.name)
    return _parameter_path(name) or _by_note(layer.node) or _scope(layer.node) or name


def _may_be_one(one: FileLayer, other: FileLayer) -> bool:
    """Whether two calls may be of one layer: of a weight of which a few bits are left, by shape."""
    is_told = one.quantised == other.quantised
    return is_same(one.weight, other.weight) if is_told else one.shape == other.shape


def is_same(one: ir.Value, other: ir.Value) -> bool:
    """Whether two weights are one, or equal bit for bit."""
    held = one.const_value, other.const_value
    if one is other or held[0] is None or held[1] is None:
        return one is other
    alike = (one.dtype, one.shape) == (other.dtype, other.shape)
    return alike and held[0].tobytes() == held[1].tobytes()


def is_fused(layer: FileLayer) -> bool:
    """Whether a weight is another one than the module has, as far as the file tells.

    Exporters name a matrix anew that they transpose; a convolution's is stored as the module has
    it, so where that bears no parameter's name it was computed.
    """
    rules, name = layer.node.metadata_props.get(_RULES, ""), str(layer.weight.name)
    is_computed = layer.kind.startswith("conv") and not _parameter_path(name)
    return "FuseBatchNorm" in rules or is_computed or _FUSED.fullmatch(name) is not None


def _parameter_path(name: str) -> str | None:
    """The path of the module whose weight bears a name, if that is one of a parameter."""
    found = _WEIGHT.fullmatch(name)
    return found["path"] if found and not _NUMBERED.search(found["path"]) else None


def _parents_of_scopes(nodes: Iterable[ir.Node]) -> dict[str, str]:
    """How paths begin where scopes begin otherwise: a module that is not called itself has none.

    ``self.model.decoder(x)`` makes nodes of ``/decoder/...`` that read ``model.decoder...``.
    """
    found: dict[str, set[str]] = {}
    for node in nodes:
        scope = str(node.name).strip("/").split("/")[:-1]
        old = [part for name in scope for part in name.split(".")]
        for value in node.inputs:
            is_own = value is not None and value.is_initializer()
            new = str(value.name).split(".")[:-1] if is_own and value is not None else []
            common = _common_end(old, new)
            if common and _numbers(old) == _numbers(new):
                begins = [".".join(path[: len(path) - common + 1]) for path in (old, new)]
                found.setdefault(begins[0], set()).add(begins[1])
    return {old: next(iter(new)) for old, new in found.items() if len(new) == 1}


def _common_end(one: Sequence[str], other: Sequence[str]) -> int:
    """How many parts two paths end in alike."""
    pairs = zip(reversed(one), reversed(other), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _numbers(path: Iterable[str]) -> list[str]:
    return [part for part in path if part.isdigit()]


def _moved(path: str, parents: Mapping[str, str]) -> str:
    """A scope as a path."""
    old = max((p for p in parents if f"{path}.".startswith(f"{p}.")), key=len, default="")
    return parents[old] + path.removeprefix(old) if old else path


def _scope(node: ir.Node, noted: bool = False) -> str | None:
    """The path of the module that calls a node, as its name has it, or a note; None if none has."""
    by_node = _NODE.fullmatch(str(node.name))
    if by_node:
        return by_node["path"].replace("/", ".")
    return _noted(node)[0] if noted and f"{_NOTES}.name_scopes" in node.metadata_props else None


def _by_note(node: ir.Node) -> str | None:
    """The module that torch.onnx notes, if it is of a kind that reads its own weight alone.

    A weight that is tied bears the name of either module.
    """
    path, kind = _noted(node)
    return path if _LEAF.fullmatch(kind) else None


def _by_scope(node: ir.Node) -> str | None:
    """The module that torch.onnx notes, if it reads its own weight there."""
    path = _noted(node)[0]
    own = {f"%p_{path.replace('.', '_')}_{name}" for name in ("weight", "in_proj_weight")}
    reads = re.findall(r"%\w+", node.metadata_props.get(f"{_NOTES}.fx_node", ""))
    return path if own.intersection(reads) else None


def _noted(node: ir.Node) -> tuple[str, str]:
    """The path and the class of the module that calls a node, as torch.onnx notes them."""
    found = []
    for what in ("name_scopes", "class_hierarchy"):
        try:
            noted = literal_eval(node.metadata_props.get(f"{_NOTES}.{what}", "[]"))
        except (ValueError, SyntaxError):
            noted = []
        found.append(str(noted[-2]) if isinstance(noted, list) and len(noted) > 1 else "")
    return found[0], found[1]


def _by_bias(node: ir.Node) -> str | None:
    """The layer whose bias it adds, or is added next, if that is to one weight's products alone."""
    if node.inputs[1] is None:
        return None
    own = _whole(node.inputs[1])
    for adder in (node, *(user for user, _ in node.outputs[0].uses())):
        for bias in _added_by(adder):
            weights = [_multiplied_before(reader) for reader, _ in bias.uses()]
            if all(found and all(is_same(own, weight) for weight in found) for found in weights):
                found = _BIAS.fullmatch(str(bias.name))
                return found["path"] if found else None
    return None


def _added_by(node: ir.Node) -> list[ir.Value]:
    """The stored biases that a node adds."""
    places = _BIASES.get(node.op_type, ())
    inputs = [value for place, value in enumerate(node.inputs) if place in places]
    held = [value for value in inputs if value is not None and value.is_initializer()]
    return [value for value in held if _BIAS.fullmatch(str(value.name))]


def _multiplied_before(node: ir.Node) -> list[ir.Value]:
    """The weights whose products a node adds to: its own, or those that it reads."""
    read = [value.producer() for value in node.inputs if value is not None]
    made = [node] if node.op_type in _PRODUCTS else read
    factors = [p.inputs[1] for p in made if p is not None and p.op_type in _PRODUCTS]
    return [_whole(value) for value in factors if value is not None]


def _whole(weight: ir.Value) -> ir.Value:
    """What a weight is made of, whole numbers if it is dequantised."""
    source = handed_on(weight)[0]
    node = source.producer()
    if node is None or node.op_type != "DequantizeLinear" or node.inputs[0] is None:
        return source
    return _whole(node.inputs[0])


def check_one(path: str, calls: Sequence[FileLayer]) -> None:
    """Refuses calls of one path that are of two layers.

    Raises:
        ExportError: they have two weights, or are of two kinds.
    """
    is_one = all(is_same(call.weight, calls[0].weight) for call in calls)
    if not is_one or len({(call.kind, call.shape, call.turned) for call in calls}) > 1:
        weights = list(dict.fromkeys(str(call.weight.name) for call in calls))
        nodes = [str(call.node.name) for call in calls]
        raise ExportError(
            f"{path}: two layers of one name: nodes {shorten(nodes)}, weights {shorten(weights)}; "
            "give a name to each: names={node: path}; or choose others in slots="
        )
