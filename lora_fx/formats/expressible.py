"""What a format has no place for, told before anything is written."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable

from lora_fx.adapters.adapter import Adapter
from lora_fx.adapters.other_updates import AnyUpdate
from lora_fx.adapters.updates import Update
from lora_fx.errors import AdapterError, shorten

Problem = Callable[[AnyUpdate], str | None]


def check_held(adapter: Adapter, form: str, replaced: Iterable[str], problem: Problem) -> None:
    """Refuses an adapter that a format cannot hold.

    ``replaced`` are parameters that the format has no place for; ``problem`` says in words what
    it cannot hold of an update.
    """
    if not adapter.updates:
        raise AdapterError(f"the adapter {adapter.name} has no update to write")
    problems: dict[str, list[str]] = defaultdict(list)
    for module, update in adapter.updates.items():
        found = problem(update)
        if found is not None:
            problems[found].append(module)
    problems["replaced parameters"] += replaced
    for what, names in problems.items():
        if names:
            raise AdapterError(
                f"{form} cannot hold {what}: {shorten(names)}; "
                "write a PEFT directory, or leave them out"
            )


def not_lora(update: AnyUpdate) -> str | None:
    """Why an update is no LoRA or DoRA of a format without more, or None.

    A product of two factors is one, whatever kind of adapter it came from.
    """
    if not isinstance(update, Update):
        return f"updates of kind {update.kind!r}, which are no product of two factors"
    if not math.isfinite(update.scale):
        return "scales that are no finite number"
    if update.invocation:
        return "invocation tokens (aLoRA)"
    if update.rank == 0:
        return "updates of rank 0"
    if update.bias is not None:
        return "biases of up-projections (lora_bias)"
    if update.row is not None or update.col is not None:
        return f"updates of kind {update.kind!r}, which scale inputs or outputs"
    return None
