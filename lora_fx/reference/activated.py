"""aLoRA beside a module that runs: no weight says it, so it is added to what the layer gives."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lora_fx.adapters.updates import AnyUpdate, Update
from lora_fx.errors import within
from lora_fx.injection.conform import conform
from lora_fx.injection.invocation_mask import IDS
from lora_fx.numerics import widened
from lora_fx.reference.module_layers import NoWeightFormError, Place


@dataclass(frozen=True, eq=False)
class Activated:
    """One update that acts from its invocation on.

    Attributes:
        path: of the layer, as the adapter has it.
        update: in the layer's shape.
    """

    path: str
    update: Update

    @classmethod
    def of(cls, path: str, update: AnyUpdate, place: Place) -> Activated:
        """Of a place.

        Raises:
            NoWeightFormError: it is no layer.
        """
        if place.layer is None:
            raise NoWeightFormError(f"{path} is no layer")
        with within(path):
            fit = conform(update, place.layer)
        assert isinstance(fit, Update)
        return cls(path, fit)

    def beside(self, ids: torch.Tensor) -> Callable[..., torch.Tensor]:
        """A hook that adds it at the tokens of a call, whose ids are (batch, length)."""
        starts = [_last(row, self.update.invocation) for row in ids.tolist()]
        update = self.update

        def hook(module: nn.Module, inputs: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
            x = widened(inputs[0])
            down, up = update.down.to(x.dtype), update.up.to(x.dtype)
            change = x @ down.T @ up.T * update.scale
            shift = update.shift(lambda: None)
            change = change if shift is None else change + shift.to(x.dtype)
            result = output.clone()
            for row, start in enumerate(starts):
                if start is not None:
                    result[row, start:] += change[row, start:].to(output.dtype)
            return result

        return hook


def ids_of(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> torch.Tensor:
    """The ids among the inputs of a model."""
    names = inspect.signature(model.forward).parameters
    given = dict(zip(names, args, strict=False)) | dict(kwargs)
    found: torch.Tensor = given[IDS]
    return found


def _last(row: Sequence[int], tokens: Sequence[int]) -> int | None:
    """Where the last occurrence of some tokens begins, or None."""
    places = range(len(row) - len(tokens), -1, -1)
    return next((at for at in places if list(row[at : at + len(tokens)]) == list(tokens)), None)
