"""Models whose adapters have another count of tokens: their tables grow, or shrink, with them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from lora_fx.errors import LoraFxError


def fit_vocabulary(model: Any, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Gives a model of transformers as many tokens as the table has that an adapter brings.

    Args:
        model: changed in place.
        shapes: of the tensors that adapters hold whole, by parameter name.

    Returns:
        The parameters that were resized and that no adapter brings: they hold random numbers.

    Raises:
        LoraFxError: the model cannot be resized.
    """
    table = _asked(model, "get_input_embeddings")
    path = next((path for path, module in model.named_modules() if module is table), None)
    brought = shapes.get(f"{path}.weight", ())
    own = tuple(getattr(getattr(table, "weight", None), "shape", ()))
    if len(brought) != 2 or len(own) != 2 or brought[0] == own[0] or brought[1] != own[1]:
        return []
    try:
        model.resize_token_embeddings(brought[0], mean_resizing=False)
    except Exception as error:  # the model's own code, which may raise anything
        raise LoraFxError(
            f"the adapter brings {brought[0]} tokens, the model has {own[0]}, and it cannot be "
            f"resized: {error}"
        ) from error
    resized = [_asked(model, "get_input_embeddings"), _asked(model, "get_output_embeddings")]
    held = {id(p) for module in resized if module is not None for p in module.parameters()}
    every = dict(model.named_parameters(remove_duplicate=False))
    known = {id(value) for name, value in every.items() if name in shapes}
    return [name for name, value in model.named_parameters() if id(value) in held - known]


def _asked(model: Any, name: str) -> nn.Module | None:
    """What a model says of itself, where it has such a thing at all."""
    try:
        found = getattr(model, name)()
    except (AttributeError, NotImplementedError):
        return None
    return found if isinstance(found, nn.Module) else None
