"""Emits layers with their branches in one of their forms."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import reduce
from itertools import chain, takewhile
from typing import Any, cast

import torch
from torch import fx, nn

from lora_fx.branch_lowering import forms
from lora_fx.branch_lowering.selection import Candidate, Group
from lora_fx.graph.constants import Constants
from lora_fx.graph.editor import Editor
from lora_fx.graph.fold_constants import fold_constants
from lora_fx.graph.ops import aten


def emit(editor: Editor, constants: Constants, group: Group) -> Iterator[tuple[Candidate, fx.Node]]:
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


def _layer(
    editor: Editor, constants: Constants, member: Candidate, narrow: fx.Node | None
) -> fx.Node:
    """A layer with its branches as one."""
    site, branches, function = member.site, member.branches, member.form.function
    own = [node for node in (site.bias,) if node]
    biases = [*own, *(branch.bias for branch in branches if branch.bias)]
    base = site.node if biases == own and not member.form.ones else None

    def layer(*operands: Any) -> Any:
        given = _given(member, *operands)
        return function(**{name: given[name]() for name in forms.operands_of(function)})

    downs, ups = _factors(member)
    operands = (site.input, site.weight, biases, base, narrow, downs, ups)
    new, calls = editor.inline(layer, operands, before=member.out, like=site.node)
    names = {str(site.weight.target): str(site.weight.target)}
    if not member.slots:
        names |= _named(member.at, "lora_shrink", downs) | _named(member.at, "lora_expand", ups)
    names |= _named(member.at, "bias", biases)
    held = [str(node.target) for node in (site.weight, *own)]
    fold_constants(editor, constants, calls, names, site.dtype, own=held)
    return cast(fx.Node, new)


def _given(
    member: Candidate,
    x: Any,
    weight: Any,
    biases: Any,
    base: Any,
    narrow: Any,
    downs: Any,
    ups: Any,
) -> dict[str, Callable[[], Any]]:
    """What a form may take, made when it does: branches as one, the bias in B if it is there."""
    bias = reduce(aten.add.Tensor, biases) if biases else None
    rows = [_times(up, branch.scale) for up, branch in zip(ups, member.branches, strict=True)]
    if member.form.ones:
        rows, bias = [*rows, aten.unsqueeze.default(bias, 0)], None
    turned = member.site.transposed
    given: dict[str, Callable[[], Any]] = {
        "x": lambda: x,
        "weight": lambda: aten.t.default(weight) if turned else weight,
        "matrix": lambda: weight if turned else aten.t.default(weight),
        "bias": lambda: bias,
        "narrow": lambda: narrow,
        "down": lambda: _beside(member, downs, 1),
        "up": lambda: _beside(member, rows, 0),
    }
    again = lambda: forms.merged(x, given["weight"](), bias)  # noqa: E731
    return given | {"base": again if base is None else lambda: base}


def _shrunk(
    editor: Editor, constants: Constants, members: Sequence[Candidate], before: fx.Node
) -> list[fx.Node]:
    """What ``x A`` is of each member, by one product."""
    site, widths = members[0].site, [member.width for member in members]
    at, ones = _holder(members), None
    if any(member.form.ones for member in members):
        column = torch.cat([torch.arange(m.width) == m.width - m.form.ones for m in members])
        held = nn.Parameter(column.to(site.dtype), requires_grad=False)
        ones = editor.constant(f"{at}lora_ones", held, before=before)
    downs = [_factors(member)[0] for member in members]

    def shrink(x: Any, downs: Any, ones: Any) -> Any:
        for member, own in zip(members, downs, strict=True):
            if member.form.ones:  # a column of zeros, which becomes one of ones
                own[-1] = aten.constant_pad_nd.default(own[-1], [0, 1])
        return forms.shrink(x, list(chain(*downs)), ones, widths)

    parts, calls = editor.inline(shrink, (site.input, downs, ones), before=before, like=site.node)
    names = {} if members[0].slots else _named(at, "lora_shrink", chain(*downs))
    fold_constants(editor, constants, calls, names, site.dtype)
    return list(parts)


def _factors(member: Candidate) -> tuple[list[fx.Node], list[fx.Node]]:
    """A and B of each branch."""
    pairs = [(b.down, b.up) for b in member.branches if b.down is not None and b.up is not None]
    return [down for down, _ in pairs], [up for _, up in pairs]


def _beside(member: Candidate, parts: Sequence[Any], axis: int) -> Any:
    """Factors of several branches as one; what is a constant is a new one, even of one branch."""
    return parts[0] if member.slots and len(parts) == 1 else aten.cat.default(list(parts), axis)


def _times(up: Any, scale: float) -> Any:
    return up if scale == 1 else aten.mul.Tensor(up, scale)


def _named(at: str, name: str, nodes: Iterable[fx.Node]) -> dict[str, str]:
    return {str(node.target): f"{at}{name}" for node in nodes}


def _holder(members: Sequence[Candidate]) -> str:
    """What the names begin with that several layers have in common."""
    if len(members) == 1:
        return members[0].at
    paths = [member.site.path.split(".")[:-1] for member in members]
    steps = takewhile(lambda names: len(set(names)) == 1, zip(*paths, strict=False))
    return "".join(f"{names[0]}." for names in steps)
