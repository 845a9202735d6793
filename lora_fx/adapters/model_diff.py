"""Two models compared tensor by tensor, paired by the operators that read them."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx, nn

from lora_fx.errors import AdapterError, shorten
from lora_fx.graph.lazy_tensor import LazyTensor, evaluate, get_unevaluated
from lora_fx.graph.ops import module_path, op_name
from lora_fx.graph.wrappers import named_modules
from lora_fx.layers.layer import layer_of
from lora_fx.layers.layer_types import NORM, TYPES
from lora_fx.layers.sites import Site, sites


@dataclass(frozen=True)
class TensorRef:
    """One tensor of a model, by the place that reads it.

    Attributes:
        name: what a replacement of it is called.
        value: the tensor, or what computes it.
        layer: path of the layer whose weight it is, where an update can act on it, or None.
        kind: of that layer, as a `Site` has it.
    """

    name: str
    value: torch.Tensor | LazyTensor
    layer: str | None = None
    kind: str = "linear"

    @property
    def place(self) -> str:
        """What an adapter would call it."""
        return self.layer or self.name

    def read(self) -> torch.Tensor:
        """The tensor; one that is still to be computed is not kept."""
        value = evaluate(self.value)
        if value.is_meta:
            raise AdapterError(f"{self.name}: the tensor has no data; load the model's weights")
        return value


Pair = tuple[TensorRef, TensorRef]


def matched(base: nn.Module, tuned: nn.Module) -> list[Pair]:
    """The two models' tensors, matched.

    Raises:
        AdapterError: one has what the other has not, or of another shape.
    """
    for model in (base, tuned):
        if not isinstance(model, nn.Module):
            raise AdapterError(f"found a {type(model).__name__}, expected a module or a graph")
    if isinstance(base, fx.GraphModule) != isinstance(tuned, fx.GraphModule):
        raise AdapterError("one is a graph and one a module: trace both, or neither")
    one, two = _held(base), _held(tuned)
    alone = [[key for key in a if key not in b] for a, b in ((one, two), (two, one))]
    if any(alone):
        raise AdapterError(
            f"the models differ in structure: the base alone has {shorten(alone[0]) or 'nothing'}, "
            f"the tuned one alone {shorten(alone[1]) or 'nothing'}. Merge or fold adapters first"
        )
    for key in one:
        before, after = tuple(one[key].value.shape), tuple(two[key].value.shape)
        if before != after:
            raise AdapterError(f"{key}: shape {before} in the base, {after} in the tuned model")
    return [(one[key], two[key]) for key in one]


def _held(model: nn.Module) -> dict[str, TensorRef]:
    if isinstance(model, fx.GraphModule):
        return _held_by_graph(model)
    return dict(_held_by_module(model))


def _held_by_module(model: nn.Module) -> Iterator[tuple[str, TensorRef]]:
    for path, module in named_modules(model):
        kind = _kind_of(module)
        for leaf in (*module._parameters, *module._buffers):
            value = get_unevaluated(module, leaf)
            if value is None:
                continue
            name = f"{path}.{leaf}".removeprefix(".")
            if kind is None or leaf != "weight":
                yield name, TensorRef(name, value)
            else:
                yield f"{name}{_mark(kind)}", TensorRef(name, value, path or name, kind)


def _mark(kind: str) -> str:
    """How a key of a module tells layers whose weights may have one shape."""
    layer = TYPES[kind]
    axes = "num, dim" if layer.reads_ids else ", ".join(layer.weight.split())
    return f" ({axes})" if layer.transposed else ""


def _kind_of(module: nn.Module) -> str | None:
    """The kind of a layer, as a `Site` has it, if an update can act on its weight."""
    found = layer_of(module)
    if found is None or found.kind == NORM or found.groups > 1:
        return None
    return None if getattr(module, "max_norm", None) is not None else found.kind


def _held_by_graph(gm: fx.GraphModule) -> dict[str, TensorRef]:
    """Names are those of the modules that read, since a tied tensor bears another's."""
    found = {site.node: site for site in sites(gm)}
    calls: Counter[str] = Counter()
    held: dict[str, TensorRef] = {}
    for node in gm.graph.nodes:
        if node.op == "call_module":
            inner = dict(_held_by_module(gm.get_submodule(node.target)))
            held |= {f"{node.target}.{key}": _beneath(node.target, h) for key, h in inner.items()}
        place = f"{module_path(node)} {op_name(node)}".strip()
        calls[place] += 1
        for slot, source in enumerate(node.all_input_nodes):
            if source.op != "get_attr" or not _is_tensor(get_unevaluated(gm, source.target)):
                continue
            name = f"{module_path(node)}.{source.target.rpartition('.')[2]}".removeprefix(".")
            layer = _layer_of(found.get(node), source)
            key = f"{place} (call {calls[place]}, tensor {slot})"
            held[key] = TensorRef(name, get_unevaluated(gm, source.target), *layer)
    return held


def _layer_of(site: Site | None, source: fx.Node) -> tuple[str, str] | tuple[()]:
    """Path and kind of the layer whose whole weight a node is, if an update can act on it."""
    if site is None or site.weight is not source or site.groups > 1:
        return ()
    return site.path, site.kind


def _beneath(path: str, held: TensorRef) -> TensorRef:
    return TensorRef(f"{path}.{held.name}", held.value)


def _is_tensor(value: object) -> bool:
    return isinstance(value, (torch.Tensor, LazyTensor))


def shared(pairs: list[Pair]) -> list[list[Pair]]:
    """The pairs, together where both models share one tensor between several places."""
    groups: dict[tuple[int, int], list[Pair]] = defaultdict(list)
    for one, two in pairs:
        groups[id(one.value), id(two.value)].append((one, two))
    return list(groups.values())
