"""The layers of a base model or graph, for names and shapes that a file leaves open."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx, nn

from lora_fx.errors import AdapterError
from lora_fx.sites import by_path
from lora_fx.trace import example_of


@dataclass(frozen=True)
class BaseLayer:
    """A layer with a weight.

    Attributes:
        kind: the class, such as ``"Linear"``.
        shape: (out, in) of a linear layer; None for any other.
    """

    kind: str
    shape: tuple[int, int] | None


def layers_of(base: object) -> dict[str, BaseLayer]:
    """The layers of a base by path: a traced graph's linear ones, or all that own a weight.

    Raises:
        AdapterError: the base is no module.
    """
    if not isinstance(base, nn.Module):
        raise AdapterError(
            f"base is a {type(base).__name__}, expected the model or the traced graph that the "
            "adapter was made for"
        )
    if isinstance(base, fx.GraphModule) and example_of(base) is not None:
        sites = {path: calls[0] for path, calls in by_path(base).items()}
        return {path: BaseLayer("Linear", site.shape) for path, site in sites.items()}
    modules = base.named_modules(remove_duplicate=False)
    return {path: layer for path, module in modules if (layer := _layer(module))}


def _layer(module: nn.Module) -> BaseLayer | None:
    weight, kind = getattr(module, "weight", None), type(module).__name__
    if isinstance(module, nn.Linear):
        return BaseLayer(kind, (module.out_features, module.in_features))
    if not isinstance(weight, nn.Parameter):
        return None
    # transformers' own linear layer, which stores its weight as (in, out)
    shape = (weight.shape[1], weight.shape[0]) if kind == "Conv1D" and weight.ndim == 2 else None
    return BaseLayer(kind, shape)
