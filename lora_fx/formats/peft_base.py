"""What a base model or graph tells of the layers of a PEFT file."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx, nn

from lora_fx.formats.base_layers import layers_of
from lora_fx.graph.example import example_of
from lora_fx.layers.sites import by_path

Shape = tuple[int, ...]


@dataclass(frozen=True)
class PeftBase:
    """The base that a file is read for, or none.

    Attributes:
        model: the model or traced graph, or None where the caller gave none.
        layers: module path -> (out, in, *kernel) of its weight, where in is one group's.
        linear: those of them that are linear.
    """

    model: nn.Module | None
    layers: dict[str, Shape]
    linear: frozenset[str]

    @property
    def is_graph(self) -> bool:
        """Whether it is a graph, whose modules are gone: neither their order nor flags are told."""
        return isinstance(self.model, fx.GraphModule)

    def parameters(self, module: str) -> dict[str, Shape]:
        """The parameters that a module itself holds, in the order that it registered them."""
        assert self.model is not None
        start = f"{module}." if module else ""
        named = self.model.named_parameters(remove_duplicate=False)
        own = ((name.removeprefix(start), p) for name, p in named if name.startswith(start))
        return {name: tuple(p.shape) for name, p in own if "." not in name}

    def tied_to(self, path: str) -> list[str]:
        """Other layers that read the weight of the layer at a path, in a model of transformers.

        PEFT trains the tokens of what ``tie_word_embeddings`` ties, and of no other shared weight.
        """
        if isinstance(self.model, fx.GraphModule):
            example = example_of(self.model)
            if example is None or example.output_embedding is None:
                return []
            sites = by_path(self.model)
            weights: dict[str, object] = {p: calls[0].weight.target for p, calls in sites.items()}
        elif self.model is not None and _ties(self.model):
            modules = self.model.named_modules(remove_duplicate=False)
            weights = {p: id(getattr(m, "weight", None)) for p, m in modules if p in self.layers}
        else:
            return []
        return [p for p in weights if p != path and weights[p] == weights.get(path)]


def _ties(model: nn.Module) -> bool:
    return bool(getattr(getattr(model, "config", None), "tie_word_embeddings", False))


def base_of(given: object) -> PeftBase:
    """What there is to know of a base.

    Raises:
        AdapterError: the base is no module.
    """
    if given is None:
        return PeftBase(None, {}, frozenset())
    found = layers_of(given)
    layers = {path: layer.shape for path, layer in found.items() if layer.is_matrix and layer.shape}
    heads = frozenset(path for path in layers if found[path].is_linear)
    return PeftBase(given if isinstance(given, nn.Module) else None, layers, heads)
