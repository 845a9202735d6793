"""Which layers a base has, by path: of a model, a traced graph, or a file with slots."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import fx, nn

from lora_fx.errors import AdapterError
from lora_fx.graph.example import example_of
from lora_fx.graph.lazy_tensor import LazyTensor, evaluate, get_all_unevaluated, get_unevaluated
from lora_fx.graph.ops import module_path, op_name
from lora_fx.graph.wrappers import bare, named_modules
from lora_fx.layers.layer import Layer, layer_of
from lora_fx.layers.layer_types import NORM
from lora_fx.layers.parameter_readers import readers, tensor_of
from lora_fx.layers.sites import Groups, by_path, is_bare, is_packed


@dataclass(frozen=True, eq=False)
class BaseLayers(Mapping[str, Layer]):
    """The layers of a base, by the paths of their modules.

    Attributes:
        layers: path -> layer. A graph has those that it calls; a model every module that owns a
            weight, norms and what no adapter acts on among them.
        base: the model or the graph; None where a file is all there is.
        graph: the base, if it is a graph of calls on stored weights, whose modules are gone.
        aliases: path of a module that has several names -> its other names.
        weights: of a graph, path -> the name of the weight that the layer reads.
        head: path of the output embedding that PEFT's "all-linear" leaves out.
        held: where a file is all there is, its parameters: name -> a tensor of the same shape.
    """

    layers: Mapping[str, Layer]
    base: nn.Module | None = None
    graph: fx.GraphModule | None = None
    aliases: Mapping[str, Sequence[str]] = field(default_factory=dict)
    weights: Mapping[str, str] = field(default_factory=dict)
    head: str | None = None
    held: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def __getitem__(self, path: str) -> Layer:
        """The layer at a path."""
        return self.layers[path]

    def __iter__(self) -> Iterator[str]:
        """The paths."""
        return iter(self.layers)

    def __len__(self) -> int:
        """How many there are."""
        return len(self.layers)

    @property
    def is_graph(self) -> bool:
        """Whether neither the order of a module's parameters nor its flags are told."""
        return isinstance(self.base, fx.GraphModule)

    @property
    def config(self) -> Any:
        """What transformers says of the model, or of its part that reads text; None without."""
        found: Any = getattr(self.base, "config", None)
        return getattr(found, "get_text_config", lambda: found)()

    def is_bare(self, path: str) -> bool:
        """Whether a layer's weight is a parameter that no module of its own holds."""
        return path in self.weights and is_bare(path, self.weights[path])

    def is_packed(self, path: str) -> bool:
        """Whether it is the projection of an attention module that packs three in one."""
        return path in self.weights and is_packed(self.weights[path])

    def shape_of(self, path: str) -> tuple[int, ...] | None:
        """(out, in / groups, *kernel) of a weight; None if files have no updates of the layer."""
        layer = self.get(path)
        return layer.own_shape if layer and layer.is_matrix and layer.in_files else None

    def parameter(self, name: str) -> torch.Tensor | None:
        """A parameter or buffer by its name, the path of its module and its own; or None."""
        value = self.unevaluated(name)
        return None if value is None else evaluate(value).detach()

    def unevaluated(self, name: str) -> torch.Tensor | LazyTensor | None:
        """The same; a lazy one of a graph is not computed."""
        if name in self.held:
            return self.held[name]
        if self.graph is not None:
            return tensor_of(self.graph, name)
        path, _, leaf = name.rpartition(".")
        value = getattr(self._modules.get(path), leaf, None)
        return value if isinstance(value, torch.Tensor) else None

    def names_of(self, name: str) -> list[str]:
        """All names that a parameter or buffer has, where modules share it; that one first."""
        if self.graph is not None:
            read = next(readers(self.graph, name), None)
            weights = self.weights.items() if read is not None else ()
            same = [f"{path}.weight" for path, own in weights if read and own == read[1].target]
        else:
            value, modules = self.unevaluated(name), self._modules.items()
            same = [
                f"{p}.{n}" for p, m in modules for n, own in m._parameters.items() if own is value
            ]
        return list(dict.fromkeys([name, *(other.removeprefix(".") for other in same)]))

    def parameters(self, path: str) -> dict[str, tuple[int, ...]]:
        """The shapes of those that a module itself holds, in the order that it registered them."""
        module = self._modules.get(path)
        own = () if module is None else module.named_parameters(recurse=False)
        return {name: tuple(p.shape) for name, p in own}

    def all_parameters(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor that is known by name, whosever it is."""
        if self.held:
            return {name: tuple(tensor.shape) for name, tensor in self.held.items()}
        if self.graph is not None:
            names = {str(n.target) for n in self.graph.graph.nodes if n.op == "get_attr"}
            found = get_all_unevaluated(self.graph, names)
            return {n: tuple(t.shape) for n, t in found.items() if hasattr(t, "shape")}
        found = {}
        for path, module in self._modules.items():
            own: dict[str, torch.Tensor | None] = {**module._parameters, **module._buffers}
            found |= {
                f"{path}.{n}".lstrip("."): tuple(t.shape) for n, t in own.items() if t is not None
            }
        return found

    def under(self, path: str) -> BaseLayers:
        """The layers of one child of a model, by their paths in it; none if it has no such."""
        start = f"{path}."
        own = {p.removeprefix(start): layer for p, layer in self.items() if p.startswith(start)}
        return BaseLayers(own, self._modules.get(path))

    def is_turned(self, path: str) -> bool:
        """Whether the module at a path says that it stores its experts as (in, out)."""
        return getattr(self._modules.get(path), "is_transposed", False) is True

    def tied_to(self, path: str) -> list[str]:
        """Other layers that read the weight of the layer at a path, in a model of transformers.

        PEFT trains the tokens of what ``tie_word_embeddings`` ties, and of no other shared weight.
        """
        if self.graph is not None:
            weights: Mapping[str, object] = self.weights if self.head else {}
        elif getattr(getattr(self.base, "config", None), "tie_word_embeddings", False):
            matrices = [p for p, layer in self.items() if layer.is_matrix]
            weights = {p: id(getattr(self._modules[p], "weight", None)) for p in matrices}
        else:
            return []
        return [p for p in weights if p != path and weights[p] == weights.get(path)]

    def heads_of(self, path: str) -> list[str]:
        """Who else gets the tokens that PEFT trains of a table; a head's are its own alone."""
        return self.tied_to(path) if path in self and self[path].is_table else []

    @cached_property
    def _modules(self) -> dict[str, nn.Module]:
        return {} if self.base is None else dict(named_modules(self.base))


def layers_of(base: object) -> BaseLayers:
    """The layers of a model or a traced graph; of None, none.

    Raises:
        AdapterError: the base is no module.
    """
    if base is None:
        return BaseLayers({})
    if not isinstance(base, nn.Module):
        raise AdapterError(
            f"base is a {type(base).__name__}, expected the model or the traced graph that the "
            "adapter was made for"
        )
    base = bare(base)
    if isinstance(base, fx.GraphModule) and example_of(base) is not None:
        found = layers_in(base, by_path(base))
        return replace(found, layers={**dict(_norms(base)), **found.layers})
    modules = named_modules(base)
    return BaseLayers({path: layer for path, m in modules if (layer := _of_module(m, path))}, base)


def layers_in(gm: fx.GraphModule, groups: Groups) -> BaseLayers:
    """The layers of a graph whose calls are known, by path."""
    example = example_of(gm)
    layers = {path: calls[0].layer for path, calls in groups.items()}
    weights = {path: str(calls[0].weight.target) for path, calls in groups.items()}
    if example is None:
        return BaseLayers(layers, gm, gm, weights=weights)
    return BaseLayers(layers, gm, gm, example.aliases, weights, example.output_embedding)


def _norms(gm: fx.GraphModule) -> Iterator[tuple[str, Layer]]:
    """What reads a vector called weight: a norm, in however many operators it is written."""
    for node in gm.graph.nodes:
        if node.op != "call_function" or not (path := module_path(node)):
            continue
        read = [str(n.target) for n in node.all_input_nodes if n.op == "get_attr"]
        for name in (name for name in read if name.endswith(".weight")):
            weight = get_unevaluated(gm, name)
            shape, dtype = tuple(weight.shape), weight.dtype
            if len(shape) == 1:
                called = op_name(node)
                yield path, Layer(path=path, kind=NORM, shape=shape, dtype=dtype, name=called)


def _of_module(module: nn.Module, path: str) -> Layer | None:
    found, weight = layer_of(module, path), getattr(module, "weight", None)
    if found is not None or not isinstance(weight, nn.Parameter):
        return found
    shape, name = tuple(weight.shape), type(module).__name__
    return Layer(path=path, kind="", shape=shape, dtype=weight.dtype, name=name)
