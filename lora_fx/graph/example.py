"""What a graph was traced with: example inputs, and the module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import fx

from lora_fx.errors import LoraFxError
from lora_fx.graph.traced_module import TracedModule

_META = "lora_fx.example"
TASK = "lora_fx.task"  # in a file's metadata
LAST_LOGITS = "lora_fx.last_logits"
NEW_CACHE = "lora_fx.new_cache_behind"  # so many tokens: a longer text turns by other angles
DTYPE = "lora_fx.dtype"  # that the model was cast to
STORED = "lora_fx.stored"  # what its weights were numbers of, and in blocks of what: "nf4:64"


@dataclass(frozen=True)
class Example:
    """What a graph was traced with, kept for export.

    Attributes:
        args: positional example inputs.
        kwargs: example inputs by name, in the order of the model's signature.
        dynamic_shapes: as given to `trace`.
        output_embedding: module path of the output head that PEFT's "all-linear" leaves out.
        aliases: path of a module that has several names -> its other names.
        model: the module that was traced, as it was then; None once the graph is another's.
        input_names: what a file calls some of the inputs, by the names that they would have.
        task: what it is exported for, and how, as a file's metadata has it.
        generates: whether it is one step of a decoder with a cache, as `lora_fx.tasks` calls it.
    """

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    dynamic_shapes: Any = None
    output_embedding: str | None = None
    aliases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    model: TracedModule | None = field(default=None, compare=False, repr=False)
    input_names: Mapping[str, str] | None = None
    task: Mapping[str, str] = field(default_factory=dict)
    generates: bool = False


def checked_call(
    args: object, kwargs: object, error: type[LoraFxError]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Example inputs that were given, by position and by name; None: none.

    Raises:
        LoraFxError: of the type ``error``: they are no tuple, or no dictionary.
    """
    by_position, by_name = () if args is None else args, {} if kwargs is None else kwargs
    if not isinstance(by_position, tuple):
        raise error(f"args is a {type(args).__name__}: give a tuple, such as (x,)")
    if not isinstance(by_name, Mapping):
        raise error(f'kwargs is a {type(kwargs).__name__}: give a dictionary, such as {{"x": x}}')
    return by_position, dict(by_name)


def remember_example(gm: fx.GraphModule, example: Example) -> None:
    """Notes what a graph was traced with."""
    gm.meta[_META] = example


def example_of(gm: fx.GraphModule) -> Example | None:
    """The example inputs that a graph was traced with, if it remembers any."""
    example = gm.meta.get(_META)
    return example if isinstance(example, Example) else None


def aliases_of(gm: fx.GraphModule) -> Mapping[str, tuple[str, ...]]:
    """Path of a module that has several names -> its other names."""
    example = example_of(gm)
    return example.aliases if example else {}


def first_names(gm: fx.GraphModule, paths: Sequence[str]) -> list[str]:
    """One path for each layer: of a module that has several names, the first in the model."""
    others = aliases_of(gm)
    order = {path: place for place, path in enumerate(others)}
    named = ({path, *others.get(path, ())} & {*paths} for path in paths)
    return list(dict.fromkeys(min(names, key=lambda n: order.get(n, 0)) for names in named))


def task_of(gm: fx.GraphModule) -> Mapping[str, str]:
    """What a graph is exported for, as a file's metadata has it."""
    example = example_of(gm)
    return example.task if example else {}


def forget_model(gm: fx.GraphModule) -> None:
    """Notes that a graph no longer computes what the module that was traced does."""
    example = example_of(gm)
    if example is not None:
        gm.meta[_META] = replace(example, model=None)
