"""LoRA of ``nn.MultiheadAttention``, whose output projection PEFT adds twice."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from lora_fx.adapters.updates import AnyUpdate, Update


def as_run(updates: Mapping[str, AnyUpdate]) -> dict[str, AnyUpdate]:
    """What PEFT makes of the updates of a file, when it trains, runs and merges them.

    It adds the update of an attention module's output projection twice, and its bias once.
    Source: ``MultiheadAttention`` of PEFT 0.21.2, whose ``merge`` adds what ``out_proj.merge``
    adds again (peft#3774).
    """
    result = dict(updates)
    for path, inner, _ in _attention(updates):
        half = None if inner.bias is None else inner.bias / 2
        result[path] = replace(inner, scale=2 * inner.scale, bias=half)
    return result


def as_stored(updates: Mapping[str, AnyUpdate]) -> dict[str, AnyUpdate]:
    """The updates of which PEFT makes these: the reverse of `as_run`.

    PEFT has one alpha for both projections. Where they have one scale here, the factor is halved.
    """
    result = dict(updates)
    for path, inner, outer in _attention(updates):
        if inner.scale == outer.scale:
            result[path] = replace(inner, up=inner.up / 2)
        else:
            twice = None if inner.bias is None else inner.bias * 2
            result[path] = replace(inner, scale=inner.scale / 2, bias=twice)
    return result


def _attention(updates: Mapping[str, AnyUpdate]) -> Iterator[tuple[str, Update, Update]]:
    """Each output projection's path and update, and that of the attention it is inside of."""
    for path, inner in updates.items():
        owner, _, name = path.rpartition(".")
        outer = updates.get(owner)
        if name == "out_proj" and isinstance(inner, Update) and isinstance(outer, Update):
            yield path, inner, outer
