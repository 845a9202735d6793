"""The weights of a base, a module or a graph, by the paths that adapters have for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from lora_fx.adapters.updates import AnyUpdate
from lora_fx.errors import AdapterError
from lora_fx.graph.example import example_of
from lora_fx.graph.lazy_tensor import evaluate
from lora_fx.graph.traced_module import TracedModule
from lora_fx.layers.base_layers import layers_of
from lora_fx.layers.layer import Layer
from lora_fx.reference.module_layers import NoWeightFormError, place_of, replaced


@dataclass(frozen=True, eq=False)
class Own:
    """What an update acts on.

    Attributes:
        path: of the layer, or of the parameter.
        layer: what reads the weight; None where no layer alone does, or nobody knows.
        held: the tensors of its module by name; None where there is no base.
        leaf: name of the weight among them.
        bias_leaf: name of the layer's bias, whether there is one or not.
    """

    path: str
    layer: Layer | None = None
    held: Mapping[str, Any] | None = None
    leaf: str = ""
    bias_leaf: str | None = None

    def weight(self) -> torch.Tensor:
        """W as the model stores it.

        Raises:
            AdapterError: there is no base.
        """
        if self.held is None:
            raise AdapterError(
                "what the update does depends on the layer's weight; pass base=, the model (--base "
                "on the command line)"
            )
        return evaluate(self.held[self.leaf])

    def bias(self) -> torch.Tensor | None:
        """That of the layer, or None."""
        own = None if self.held is None or self.bias_leaf is None else self.held.get(self.bias_leaf)
        return None if own is None else evaluate(own)


class Base:
    """A base, of which nothing is read but what is asked for.

    Args:
        base: the model, or the traced graph; None where there is none.

    Raises:
        AdapterError: it is no module.
    """

    def __init__(self, base: nn.Module | None) -> None:
        self._known = layers_of(base)
        self._is_graph = isinstance(base, fx.GraphModule)
        example = example_of(base) if isinstance(base, fx.GraphModule) else None
        traced = None if base is None else (example and example.model) or TracedModule(base)
        self._traced = traced

    def own(self, path: str, update: AnyUpdate) -> Own:
        """What an update at a path acts on.

        Raises:
            AdapterError: the base has nothing there, or nothing that is told apart.
        """
        if self._traced is None:
            return Own(path)
        hint = self._known.get(path)
        try:
            place = place_of(self._traced, path, update, hint)
        except NoWeightFormError as error:
            raise AdapterError(f"{error}. Use the base that it was trained on") from error
        is_told = self._is_graph and hint is not None and hint.is_matrix
        layer, held = hint if is_told else place.layer, self._traced.parameters(place.module)
        return Own(path, layer, held, place.leaf, place.bias)

    def never_calls(self, path: str) -> bool:
        """Whether the base is a graph that has no layer at a path."""
        return self._is_graph and path not in self._known

    def replaced(self, name: str) -> Own | str:
        """What a tensor that takes the place of the base's is: a layer's weight; or why it is none.

        Raises:
            AdapterError: the base has none of this name.
        """
        if self._traced is None:
            return "whether it is a layer's weight is not known without base="
        try:
            _, leaf, held = replaced(self._traced, name)
        except NoWeightFormError as error:
            raise AdapterError(f"{error}. Use the base that it was trained on") from error
        owner = name.rpartition(".")[0]
        called = (p for p, held_as in self._known.weights.items() if held_as == name)
        path = next(called, owner if leaf == "weight" else "")
        layer = self._known.get(path)
        if layer is None or not layer.is_matrix:
            return "it is no weight of a layer that multiplies with a matrix"
        return Own(path, layer, held, leaf, "bias" if leaf == "weight" else None)
