"""Writes layers with their branches into a graph, in their forms."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import reduce
from itertools import chain, takewhile
from typing import Any

import torch
from torch import fx, nn

from lora_fx.branch_lowering import forms
from lora_fx.branch_lowering.selection import Group, Member
from lora_fx.graph.constants import Constants
from lora_fx.graph.editor import Editor
from lora_fx.graph.fold_constants import fold_constants
from lora_fx.graph.ops import aten


def emit(editor: Editor, constants: Constants, group: Group) -> Iterator[tuple[Member, fx.Node]]:
    """Each layer of a group that changes, and what computes it, in front of its last sum."""
    cut: list[fx.Node | None] = [None] * len(group.members)
    if group.shared:
        cut[:] = _shrunk(editor, constants, group.members, group.members[0].site.node)
    for member, narrow in zip(group.members, cut, strict=True):
        if narrow is None and member.is_as_injected:
            continue
        if narrow is None and member.form.shrinks:
            (narrow,) = _shrunk(editor, constants, [member], member.out)
        yield member, _layer(editor, constants, member, narrow)


def _layer(editor: Editor, constants: Constants, member: Member, narrow: fx.Node | None) -> fx.Node:
    """A layer with its branches as one: the form, of operands that are put together for it."""
    site, branches, form = member.site, member.branches, member.form
    biases = [node for node in (site.bias, *(b.bias for b in branches)) if node]

    def layer(x: Any, weight: Any, biases: Any, narrow: Any, downs: Any, ups: Any) -> Any:
        bias = reduce(aten.add.Tensor, biases) if biases else None
        scales = [branch.scale for branch in branches]
        ups = [u if s == 1 else aten.mul.Tensor(u, s) for u, s in zip(ups, scales, strict=True)]
        rows = [aten.unsqueeze.default(bias, 0)] if form.ones else []
        makers = {
            "x": lambda: x,
            "weight": lambda: aten.t.default(weight) if site.transposed else weight,
            "matrix": lambda: weight if site.transposed else aten.t.default(weight),
            "bias": lambda: None if form.ones else bias,
            "narrow": lambda: narrow,
            "down": lambda: _beside(member, downs, 1),
            "up": lambda: _beside(member, [*ups, *rows], 0),
        }
        return form.function(**{name: makers[name]() for name in forms.operands_of(form.function)})

    downs, ups = [b.down for b in branches], [b.up for b in branches]
    operands = (site.input, site.weight, biases, narrow, downs, ups)
    new, calls = editor.inline(layer, operands, before=member.out, like=site.node)
    for call in calls:
        if _is_own(call, member):
            editor.replace(call, site.node)
            editor.sweep()
    weight, own = str(site.weight.target), [str(node.target) for node in (site.bias,) if node]
    names = {weight: weight}
    if not member.slots:
        names |= _named(member.at, "lora_shrink", downs) | _named(member.at, "lora_expand", ups)
    names |= _named(member.at, "bias", biases)
    left = [call for call in calls if call.users or call is new]
    fold_constants(editor, constants, left, names, site.dtype, own=[weight, *own])
    return new


def _shrunk(
    editor: Editor, constants: Constants, members: Sequence[Member], before: fx.Node
) -> list[fx.Node]:
    """What ``x A`` is of each member, by one product."""
    site, widths = members[0].site, [member.width for member in members]
    at, ones = _holder(members), None
    if any(member.form.ones for member in members):
        column = torch.cat([torch.arange(m.width) == m.width - m.form.ones for m in members])
        held = nn.Parameter(column.to(site.dtype), requires_grad=False)
        ones = editor.constant(f"{at}lora_ones", held, before=before)
    downs = [[branch.down for branch in member.branches] for member in members]

    def shrink(x: Any, downs: Any, ones: Any) -> Any:
        for member, own in zip(members, downs, strict=True):
            if member.form.ones:  # a column of zeros, which becomes one of ones
                own[-1] = aten.constant_pad_nd.default(own[-1], [0, 1])
        return forms.shrink(x, list(chain(*downs)), ones, widths)

    parts, calls = editor.inline(shrink, (site.input, downs, ones), before=before, like=site.node)
    names = {} if members[0].slots else _named(at, "lora_shrink", chain(*downs))
    fold_constants(editor, constants, calls, names, site.dtype)
    return parts


def _beside(member: Member, parts: Sequence[Any], axis: int) -> Any:
    """Factors of several branches as one; what is a constant is a new one, even of one branch."""
    return parts[0] if member.slots and len(parts) == 1 else aten.cat.default(list(parts), axis)


def _is_own(call: fx.Node, member: Member) -> bool:
    """Whether a form has made the layer's own call again."""
    site = member.site
    if call.target is not aten.linear.default or call.args[0] is not site.input:
        return False
    weight, bias = (*call.args[1:], None)[:2]
    weight = weight.args[0] if site.transposed else weight
    return _same(weight, site.weight) and _same(bias, site.bias)


def _same(one: fx.Node | None, other: fx.Node | None) -> bool:
    """Whether two nodes are one, or fetch one tensor."""
    if one is None or other is None or one is other:
        return one is other
    return one.op == other.op == "get_attr" and one.target == other.target


def _named(at: str, name: str, nodes: Iterable[fx.Node]) -> dict[str, str]:
    return {str(node.target): f"{at}{name}" for node in nodes}


def _holder(members: Sequence[Member]) -> str:
    """What the names begin with that several layers have in common."""
    if len(members) == 1:
        return members[0].at
    paths = [member.site.path.split(".")[:-1] for member in members]
    steps = takewhile(lambda names: len(set(names)) == 1, zip(*paths, strict=False))
    return "".join(f"{names[0]}." for names in steps)
