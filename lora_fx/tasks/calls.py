"""How a model is called: what is exported of it, and the example inputs of that call."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lora_fx.errors import LoraFxError
from lora_fx.tasks.example_inputs import example_inputs


@dataclass(frozen=True)
class Prepared:
    """What a directory says of the inputs of its model.

    Attributes:
        names: what its tokenizer gives.
        processor: how images or sounds are prepared: its ``preprocessor_config.json``.
        last_logits: whether logits of the last position alone are wanted.
    """

    names: Collection[str] = ()
    processor: Mapping[str, Any] = field(default_factory=dict)
    last_logits: bool = False


@dataclass(frozen=True)
class Call:
    """One call that is exported.

    Attributes:
        model: what is called.
        kwargs: example inputs by name.
        dynamic_shapes: as `lora_fx.trace` takes it.
        input_names: what the file calls some of the inputs, by the names that they would have.
        generates: whether it is a decoder with a cache, whose next token is its own input.
        file: the name of its file.
        noted: what its file notes of how it is called.
        joined: the name of a file that is this call or the one before it, as a flag says.
    """

    model: nn.Module
    kwargs: Mapping[str, Any]
    dynamic_shapes: Any = None
    input_names: Mapping[str, str] | None = None
    generates: bool = False
    file: str = "model.onnx"
    noted: Mapping[str, str] = field(default_factory=dict)
    joined: str | None = None


def check_runs(model: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Refuses a model that fails on its example inputs, whatever is made of it.

    Raises:
        LoraFxError: what its code said.
    """
    try:
        with torch.no_grad():
            model(*args, **kwargs)
    except Exception as error:  # the model's own code, which may raise anything
        raise LoraFxError(
            f"{type(model).__name__} does not run on the example inputs: "
            f"{type(error).__name__}: {error}. Mend its config, or give module:function, which "
            "returns the model and inputs that it takes"
        ) from error


def as_it_is(model: Any, prepared: Prepared) -> tuple[Call, ...]:
    """The model's own forward, without a cache.

    Raises:
        LoraFxError: an input that the model needs cannot be made; names it.
    """
    kwargs, shapes = example_inputs(model, prepared.names, prepared.processor)
    return (Call(model, kwargs, shapes),)


def of_each_choice(model: Any, prepared: Prepared) -> tuple[Call, ...]:
    """The same with an axis of choices behind that of the batch, as multiple choice has it."""
    kwargs, shapes = example_inputs(model, prepared.names, prepared.processor)
    several = {n: torch.stack([t, t.roll(1, 0), t.flip(0)], 1) for n, t in kwargs.items()}
    axes = {
        name: {axis + (axis > 0): label for axis, label in own.items()} | {1: "num_choices"}
        for name, own in shapes.items()
    }
    return (Call(model, several, axes),)
