"""Writes a layer with its branches into a graph, in one of its forms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn

from lora_fx.branch_lowering.selection import Member
from lora_fx.graph.editor import Editor
from lora_fx.graph.lazy_tensor import TensorSnapshot
from lora_fx.graph.ops import aten
from lora_fx.graph.stacked_weights import Factors, Make
from lora_fx.injection.match_branch import parameter_names


class Maker:
    """Makes the calls of one layer in its form, just before the sum that they stand for."""

    def __init__(self, editor: Editor, member: Member) -> None:
        self.editor, self.member, self.site = editor, member, member.site
        self.ones = member.form.ones
        branches, gm = member.branches, editor.gm
        biases = [node for node in (self.site.bias, *(b.bias for b in branches)) if node]
        self.factors = Factors(
            tuple(TensorSnapshot.of(gm, str(b.down.target)) for b in branches if b.down),
            tuple((TensorSnapshot.of(gm, str(b.up.target)), b.scale) for b in branches if b.up),
            tuple(TensorSnapshot.of(gm, str(node.target)) for node in biases),
        )
        names = parameter_names(self.site.path, "", self.site.bare)
        self.at = names.down.removesuffix(".lora_A.")

    @property
    def width(self) -> int:
        """Columns of the shrink."""
        return self.factors.rank + self.ones

    @property
    def _adds_bias(self) -> bool:
        """Whether a branch has a bias of its own."""
        return any(branch.bias is not None for branch in self.member.branches)

    def made(self, h: fx.Node | None) -> fx.Node:
        """The layer with its branches; ``h`` is what a shared product shrank, or None."""
        if self.member.form.kind == "weight":
            return self._weight()
        if h is None:
            h = shrunk(self.editor, [self], self.at, before=self.member.out)
        if self.member.form.kind == "augmented":
            x = self._call(aten.cat.default, [self.site.input, h], -1)
            return self._linear(x, self._stacked())
        up = self._constant(
            "lora_expand", (self.factors.rank + self.ones, self.site.out_features), self._up
        )
        return self._call(aten.add.Tensor, self._base(), self._call(aten.matmul.default, h, up))

    def _up(self) -> torch.Tensor:
        return self.factors.up(self.ones, self.site.dtype)

    def _stacked(self) -> fx.Node:
        """[W; B], (out, in + rank), under the name of W."""
        held = TensorSnapshot.of(self.editor.gm, str(self.site.weight.target))

        def stacked() -> torch.Tensor:
            base = held.read()
            return torch.cat([base.T if self.site.transposed else base, self._up().T], dim=1)

        shape = (self.site.out_features, self.site.in_features + self.width)
        return self._weight_constant(shape, stacked, held, "stacked")

    def _base(self) -> fx.Node:
        """``x W + b``, without b where B holds it."""
        if not self.ones and not self._adds_bias:
            return self.site.node
        if not self.site.transposed:
            return self._linear(self.site.input, self.site.weight)
        held = TensorSnapshot.of(self.editor.gm, str(self.site.weight.target))
        shape = self.site.shape[0], self.site.shape[1]
        weight = self._weight_constant(shape, lambda: held.read().T, held, "turned")
        return self._linear(self.site.input, weight)

    def _weight(self) -> fx.Node:
        """``x (W + A B) + b``."""
        held = TensorSnapshot.of(self.editor.gm, str(self.site.weight.target))
        weight = self.site.weight
        if not self.site.transposed:
            shape = self.site.shape[1], self.site.shape[0]
            weight = self._weight_constant(shape, lambda: held.read().T, held, "turned")
        for branch in self.member.branches:
            product = self._call(aten.matmul.default, branch.down, branch.up)
            if branch.scale != 1:
                product = self._call(aten.mul.Tensor, product, branch.scale)
            weight = self._call(aten.add.Tensor, weight, product)
        y = self._call(aten.matmul.default, self.site.input, weight)
        bias = self._bias()
        return y if bias is None else self._call(aten.add.Tensor, y, bias)

    def _linear(self, x: fx.Node, weight: fx.Node) -> fx.Node:
        bias = None if self.ones else self._bias()
        given = (x, weight) if bias is None else (x, weight, bias)
        return self._call(aten.linear.default, *given)

    def _bias(self) -> fx.Node | None:
        """The sum of all biases, if there is one."""
        if not self._adds_bias:
            return self.site.bias
        dtype = self.site.dtype
        return self._constant("bias", (self.site.out_features,), lambda: self.factors.bias(dtype))

    def _constant(self, name: str, shape: tuple[int, ...], make: Make) -> fx.Node:
        value = self.factors.promise(shape, self.site.dtype, make, (name, self.ones))
        return self.editor.constant(f"{self.at}.{name}", value, before=self.member.out)

    def _weight_constant(
        self, shape: tuple[int, ...], make: Make, held: TensorSnapshot, how: str
    ) -> fx.Node:
        key = (how, self.ones, id(held.value))
        value = self.factors.promise(shape, self.site.dtype, make, key)
        return self.editor.constant(str(self.site.weight.target), value, before=self.member.out)

    def _call(self, target: Any, *arguments: Any) -> fx.Node:
        return self.editor.call(target, arguments, before=self.member.out, like=self.site.node)


def shrunk(editor: Editor, makers: Sequence[Maker], at: str, before: fx.Node) -> fx.Node:
    """``x A`` for several layers, with a column of ones behind each that has its bias in B."""
    first, dtype = makers[0], makers[0].site.dtype
    parts = [(maker.factors, maker.ones) for maker in makers]
    downs = Factors(tuple(held for factors, _ in parts for held in factors.downs), (), ())

    def down() -> torch.Tensor:
        return torch.cat([factors.down(ones, dtype) for factors, ones in parts], dim=1)

    shape = (first.site.in_features, sum(maker.width for maker in makers))
    key = ("shrink", *(ones for _, ones in parts), *(factors.key for factors, _ in parts))
    prefix = f"{at}." if at else ""
    value = downs.promise(shape, dtype, down, key)
    a = editor.constant(f"{prefix}lora_shrink", value, before=before)
    x, like = first.site.input, first.site.node
    h = editor.call(aten.matmul.default, (x, a), before=before, like=like)
    if not any(maker.ones for maker in makers):
        return h
    column = torch.cat([torch.arange(m.width) == m.width - m.ones for m in makers]).to(dtype)
    one = nn.Parameter(column, requires_grad=False)
    ones = editor.constant(f"{prefix}lora_ones", one, before=before)
    return editor.call(aten.add.Tensor, (h, ones), before=before, like=like)
