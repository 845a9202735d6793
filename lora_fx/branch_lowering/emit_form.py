"""Writes layers with their branches into a graph, in their forms."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial, reduce
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
    own = [node for node in (site.bias,) if node]
    biases = [*own, *(branch.bias for branch in branches if branch.bias)]
    as_is = site.node if biases == own and not form.ones else None  # x W + b, as it stands

    def layer(
        x: Any, weight: Any, biases: Any, narrow: Any, base: Any, downs: Any, ups: Any
    ) -> Any:
        total = reduce(aten.add.Tensor, biases) if biases else None
        bias, rows = (None, [aten.unsqueeze.default(total, 0)]) if form.ones else (total, [])
        scaled = [_times(up, branch.scale) for up, branch in zip(ups, branches, strict=True)]
        turned = partial(aten.t.default, weight)
        makers = {
            "x": lambda: x,
            "weight": turned if site.transposed else lambda: weight,
            "matrix": lambda: weight if site.transposed else turned(),
            "bias": lambda: bias,
            "base": lambda: base if as_is else forms.merged(x, makers["weight"](), bias),
            "narrow": lambda: narrow,
            "down": lambda: _beside(member, downs, 1),
            "up": lambda: _beside(member, [*scaled, *rows], 0),
        }
        return form.function(**{name: makers[name]() for name in forms.operands_of(form.function)})

    downs, ups = [branch.down for branch in branches], [branch.up for branch in branches]
    operands = (site.input, site.weight, biases, narrow, as_is, downs, ups)
    new, calls = editor.inline(layer, operands, before=member.out, like=site.node)
    weight = str(site.weight.target)
    names = {weight: weight}
    if not member.slots:
        names |= _named(member.at, "lora_shrink", downs) | _named(member.at, "lora_expand", ups)
    names |= _named(member.at, "bias", biases)
    held = [weight, *(str(node.target) for node in own)]
    fold_constants(editor, constants, calls, names, site.dtype, own=held)
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


def _times(up: Any, scale: float) -> Any:
    return up if scale == 1 else aten.mul.Tensor(up, scale)


def _named(at: str, name: str, nodes: Iterable[fx.Node]) -> dict[str, str]:
    return {str(node.target): f"{at}{name}" for node in nodes}


def _holder(members: Sequence[Member]) -> str:
    """What the names begin with that several layers have in common."""
    if len(members) == 1:
        return members[0].at
    paths = [member.site.path.split(".")[:-1] for member in members]
    steps = takewhile(lambda names: len(set(names)) == 1, zip(*paths, strict=False))
    return "".join(f"{names[0]}." for names in steps)
