"""The layers of a base model or graph, for names and shapes that a file leaves open."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx, nn

from lora_fx.errors import AdapterError
from lora_fx.graph.example import example_of
from lora_fx.graph.graph_module import attribute
from lora_fx.graph.lazy_tensor import get_unevaluated
from lora_fx.graph.ops import module_path, op_name
from lora_fx.layers.layer import layer_class
from lora_fx.layers.layer_types import NORM, TYPES
from lora_fx.layers.sites import Site, by_path, readers


@dataclass(frozen=True)
class BaseLayer:
    """A layer with a weight.

    Attributes:
        name: what it is called in messages: the class, such as ``"Linear"``, or the operator.
        kind: as `lora_fx.layer_class.LayerClass` has it; None where no adapter acts.
        shape: (out, in / groups, *kernel) of the weight, or a norm's own; None where no adapter
            acts.
        groups: of a convolution.
    """

    name: str
    kind: str | None = None
    shape: tuple[int, ...] | None = None
    groups: int = 1

    @property
    def is_matrix(self) -> bool:
        """Whether it has an input and an output side."""
        return self.shape is not None and self.kind != NORM

    @property
    def is_table(self) -> bool:
        """Whether it reads ids."""
        return self.kind in TYPES and TYPES[self.kind].reads_ids

    @property
    def is_linear(self) -> bool:
        """Whether it is one product with a matrix."""
        return self.kind in TYPES and TYPES[self.kind].is_linear


def layers_of(base: object) -> dict[str, BaseLayer]:
    """The layers of a base by path: those of a traced graph, or all modules that own a weight.

    Raises:
        AdapterError: the base is no module.
    """
    if not isinstance(base, nn.Module):
        raise AdapterError(
            f"base is a {type(base).__name__}, expected the model or the traced graph that the "
            "adapter was made for"
        )
    gm = _graph(base)
    if gm is not None:
        found = {path: _of_site(calls[0]) for path, calls in by_path(gm).items()}
        return dict(_norms(gm)) | found
    modules = base.named_modules(remove_duplicate=False)
    return {path: layer for path, module in modules if (layer := _of_module(module))}


def parameter_of(base: object, name: str) -> torch.Tensor | None:
    """A parameter or buffer of a base by its name: the path of its module, and its own; or None."""
    path, _, leaf = name.rpartition(".")
    gm = _graph(base)
    if gm is not None:
        found = next(readers(gm, name), None)
        return None if found is None else attribute(gm, str(found[1].target)).detach()
    modules = (
        dict(base.named_modules(remove_duplicate=False)) if isinstance(base, nn.Module) else {}
    )
    owner = modules.get(path)
    value = None if owner is None else getattr(owner, leaf, None)
    return value.detach() if isinstance(value, torch.Tensor) else None


def _graph(base: object) -> fx.GraphModule | None:
    """The base, if it is a traced graph."""
    return base if isinstance(base, fx.GraphModule) and example_of(base) is not None else None


def _of_site(site: Site) -> BaseLayer:
    if not site.type.in_files:
        return BaseLayer(site.kind)
    return BaseLayer(site.kind, site.kind, site.own_shape, site.groups)


def _norms(gm: fx.GraphModule) -> Iterator[tuple[str, BaseLayer]]:
    """What reads a vector called weight: a norm, in however many operators it is written."""
    for node in gm.graph.nodes:
        if node.op != "call_function":
            continue
        for source in node.all_input_nodes:
            if source.op == "get_attr" and str(source.target).endswith(".weight"):
                shape = tuple(get_unevaluated(gm, str(source.target)).shape)
                if len(shape) == 1 and module_path(node):
                    yield module_path(node), BaseLayer(op_name(node), NORM, shape)


def _of_module(module: nn.Module) -> BaseLayer | None:
    name, found = type(module).__name__, layer_class(module)
    if found is not None and (found.kind == NORM or TYPES[found.kind].in_files):
        return BaseLayer(name, found.kind, found.shape, found.groups)
    is_layer = isinstance(getattr(module, "weight", None), nn.Parameter)
    return BaseLayer(name) if is_layer else None
