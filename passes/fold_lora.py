"""Folds affine regions into the layer they contain."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import fx

from lora_fx.affine.analysis import Analysis
from lora_fx.affine.feature_layout import Layout
from lora_fx.affine.packed_weights import Pack, packs_of
from lora_fx.affine.region import Region
from lora_fx.affine.region_boundary import stored_in, weight_of
from lora_fx.affine.region_selection import maximal_regions
from lora_fx.affine.transfer import analyse
from lora_fx.algebra.evaluate import dense
from lora_fx.algebra.low_rank import is_added
from lora_fx.algebra.matrix_expr import Identity, Leaf, Matrix, Sum, transposed
from lora_fx.graph.editor import Editor
from lora_fx.graph.fold_constants import lazily, rounded
from lora_fx.graph.lazy_tensor import LazyTensor
from lora_fx.graph.ops import aten, call_argument, module_path
from lora_fx.graph.pass_base import Pass
from lora_fx.injection.branches import branches, col_of, input_of, last_of
from lora_fx.injection.known_inputs import hidden_inputs
from lora_fx.layers.adapter_tensors import ParametrizedWeight, parametrized_weights
from lora_fx.layers.layer_types import OPERATORS, LayerType, operands_of
from lora_fx.layers.matrix_products import Product, product_of
from lora_fx.layers.sites import sites
from lora_fx.layers.weight_parts import Part, part_of


@dataclass(frozen=True)
class FoldLora(Pass):
    """``add(linear(x, W, b), matmul(matmul(x, A), B))  ->  linear(x, W + (A @ B).T, b)``.

    Any region that is provably affine in one source and holds a layer of its own shape becomes
    that layer with a new constant, however it was spelled: linear layers, lookups, convolutions.
    Weights are composed in float32 or wider and rounded once, when they are first read; what is
    made of parameters that are being trained is computed at once. A shared weight is left to its
    other readers.

    Refuses a folded weight that is not finite. Leaves alone, and says why, a region whose layer
    is also read from outside. Layers that follow each other stay layers.

    Attributes:
        chains: folds layers that follow each other with no parallel path too.
    """

    chains: bool = False

    @torch.no_grad()
    def rewrite(self, editor: Editor) -> None:
        """Replaces each maximal region, last first."""
        with hidden_inputs(editor):
            analysis = analyse(editor.gm)
            regions = _without_lone_factors(editor, maximal_regions(analysis, self.chains))
            packs = packs_of(editor, analysis, regions)
            for layer in _scaled(editor, analysis, regions):
                editor.scale(layer)
            for region in regions:
                if region.blocked:
                    editor.record("skip", module_path(region.layer), region.blocked)
                else:
                    _fold(editor, analysis, region, packs.get(region.layer))
            for pack in dict.fromkeys(packs.values()):
                for call in pack.rest():
                    _follow(editor, pack, call)
        editor.sweep()
        made = parametrized_weights(editor.gm.graph)
        inner = {each.source for each in made}
        for each in made:
            if each.operand not in inner:
                _evaluate(editor, analysis, each)


def _without_lone_factors(editor: Editor, regions: Sequence[Region]) -> list[Region]:
    """The regions that are no part of a branch without its layer.

    What cannot be merged stays as it was injected: it is read back, and stripped, by that.
    """
    calls: dict[fx.Node | None, set[fx.Node]] = {}
    for branch in branches(editor.gm):
        for factor in (branch.down, branch.up):
            calls.setdefault(factor, set()).add(branch.site)
    stored = ((region, stored_in(region.layer, editor.gm)) for region in regions)
    return [r for r, weight in stored if weight not in calls or calls[weight] & r.nodes]


def _scaled(editor: Editor, analysis: Analysis, regions: Sequence[Region]) -> Iterator[fx.Node]:
    """The layers whose folded weight is not just what they and their adapters multiply with."""
    known = {site.node: site for site in sites(editor.gm)}
    for region in regions:
        site = None if region.blocked else known.get(region.layer)
        if site is None:  # no update of the layer's has a place before the fold either
            continue
        x = analysis.map_of(input_of(site, col_of(site)))
        end = analysis.map_of(last_of(site))
        whole, _ = region.value.relative_to(region.source)
        weight, _ = end.relative_to(region.source) if end else (None, None)
        is_same = weight is not None and (weight == whole or is_added(weight, whole))
        turned, shift = x.relative_to(region.source) if x else (None, None)
        is_direct = shift is None and isinstance(turned, Identity | None)
        if not (is_same and is_direct):
            yield region.layer


def _evaluate(editor: Editor, analysis: Analysis, made: ParametrizedWeight) -> None:
    """Puts a constant in the place of a weight that adapters made and no layer alone reads."""
    constants, name = analysis.constants, str(made.stored.target)
    value = lazily(constants, made.operand, constants.dtype(made.stored), name)
    node = editor.constant(name, value, before=next(iter(made.operand.users)))
    editor.remember(node, made.operand)
    editor.replace(made.operand, node)
    editor.record("fold", name, "made anew by an adapter")


def _follow(editor: Editor, pack: Pack, call: fx.Node) -> None:
    """Lets a call that is not folded read its part of a weight that is."""
    new = editor.again([call], {weight_of(call): pack.operand(call, _round_to(pack.dtype))})
    editor.remember(new[call], call)
    editor.replace(call, new[call])


def _fold(editor: Editor, analysis: Analysis, region: Region, pack: Pack | None) -> None:
    layer, end = region.layer, region.value.node
    weight, bias = region.value.relative_to(region.source)
    known = OPERATORS.get(layer.target)
    if known is not None and known.reads_ids and bias is not None:
        weight, bias = Sum(weight, _spread(bias, weight.shape)), None
    make = _Maker(editor, analysis, region, pack)
    x = editor.along(region.before.moves, region.before.start, region.place)
    folded = make.layer(x, weight, bias)
    last = editor.along(region.behind.moves, folded, region.place)
    editor.remember(last, end)
    editor.replace(end, last)
    editor.record("fold", module_path(layer), f"{len(region.nodes)} calls into one layer")


@dataclass(frozen=True)
class _Maker:
    """Makes the layer that stands for a region: operator, names, dtype are the base layer's."""

    editor: Editor
    analysis: Analysis
    region: Region
    pack: Pack | None = None

    def layer(self, x: fx.Node, weight: Matrix, bias: Matrix | None) -> fx.Node:
        """Calls the layer's operator on new constants.

        `addmm` takes two axes and a bias: without a bias a linear stands for it.
        """
        layer = self.region.layer
        target: Any = layer.target
        product = product_of(layer)
        is_plain = target in OPERATORS and weight_of(layer).op == "get_attr" and not self.pack
        if product is not None and not is_plain:
            return self._product(product, x, weight, bias)
        operands = operands_of(target)
        target = operands.folded or (operands.unbiased if bias is None else None) or target
        if self.pack is not None:
            names = _names(module_path(layer), self.pack.weight)
            at = self.pack.operand(layer, _round_to(self.pack.dtype))
        else:
            names = _names(module_path(layer), weight_of(layer))
            at = self._weight(names[0], OPERATORS[target], weight)
        takes_bias = operands_of(target).bias is not None
        shift = self._shift(names[1], bias, 0 if takes_bias else OPERATORS[target].kernel)
        call = self._call(target, x, at, shift)
        if shift is None or takes_bias:
            return call
        place = self.region.place
        return self.editor.call(aten.add.Tensor, (call, shift), before=place, like=layer)

    def _shift(self, name: str, bias: Matrix | None, behind: int = 0) -> fx.Node | None:
        """The bias: that of a part of a weight stays what it was, if it is the same."""
        own = self.pack.bias_of(self.region.layer) if self.pack else None
        if bias is None:
            return None
        is_known = own is not None and own < self.region.place
        if is_known and bias == self.analysis.column(own, Layout(bias.shape[:1])):
            return own
        return self._constant(name, bias, (bias.shape[0], *[1] * behind))

    def _product(
        self, product: Product, x: fx.Node, weight: Matrix, bias: Matrix | None
    ) -> fx.Node:
        """The same call of x and a new matrix, which is stored, turned and repeated as the old."""
        layer, place = self.region.layer, self.region.place
        part = self._whole(product.matrix).behind(product.matrix, product.batches)
        names = _names(module_path(layer), self.pack.weight if self.pack else part.source)
        if self.pack is None and self._is_own(names[0]):  # nobody else reads the new one
            at = self._constant(names[0], weight, weight.shape)
            return self._call(layer.target, x, at, self._shift(names[1], bias))
        if self.pack is not None:
            operand = self.pack.operand(layer, _round_to(self.pack.dtype))
        else:
            stored = weight if product.turned != part.turned else transposed(weight)
            constant = self._constant(names[0], stored, stored.shape)
            given = dict.fromkeys((part.source, *(leaf for _, leaf in part.reads)), constant)
            operand = self.editor.again(part.calls, given, place)[product.operand]
        shift = self._shift(names[1], bias, product.labels.behind if product.labels else 0)
        target, arguments = product.again(layer, x, operand, shift)
        call = self.editor.call(target, arguments, before=place, like=layer)
        if shift is None or shift in call.all_input_nodes:
            return call
        return self.editor.call(aten.add.Tensor, (call, shift), before=place, like=layer)

    def _is_own(self, name: str) -> bool:
        """Whether a linear layer reads the weight of its own module, turned around or not."""
        layer = self.region.layer
        return layer.target is aten.linear.default and name == f"{module_path(layer)}.weight"

    def _whole(self, matrix: fx.Node) -> Part:
        """How a stored weight comes to the matrix, if all of it does: else that is what is new."""
        part = part_of(self.analysis.gm, matrix)
        is_whole = part is not None and part.rows is None and part.columns is None
        return part if part is not None and is_whole else Part(matrix)

    def _call(self, target: Any, x: fx.Node, weight: fx.Node, bias: fx.Node | None) -> fx.Node:
        layer = self.region.layer
        arguments = layer.args if target is layer.target else ()
        rest = operands_of(target).of(arguments, x, weight, bias)
        return self.editor.call(target, rest, before=self.region.place, like=layer)

    def _weight(self, name: str, layer: LayerType, weight: Matrix) -> fx.Node:
        """A folded weight, (out, in * kernel), as the layer stores its own."""
        base = self.analysis.constants.shape(weight_of(self.region.layer))
        assert base is not None
        if not layer.kernel:
            stored = transposed(weight) if layer.transposed else weight
            return self._constant(name, stored, stored.shape)
        kernel = tuple(base[2:])
        own = weight.shape[0], weight.shape[1] // prod(kernel), *kernel
        groups = self._groups()
        shape = layer.canonical_shape(own, groups)

        def store(wide: torch.Tensor) -> torch.Tensor:
            return layer.store("weight", wide.reshape(own), groups)

        return self._constant(name, weight, shape, store, (layer.weight, groups))

    def _groups(self) -> int:
        layer = self.region.layer
        place = operands_of(layer.target).groups
        return 1 if place is None else int(call_argument(layer, place, "groups", 1))

    def _constant(
        self,
        name: str,
        matrix: Matrix,
        shape: tuple[int, ...],
        store: Callable[[torch.Tensor], torch.Tensor] | None = None,
        how: tuple[object, ...] = (),
    ) -> fx.Node:
        dtype = self.analysis.constants.dtype(weight_of(self.region.layer))
        key = (matrix, shape, dtype, *how)

        def make() -> torch.Tensor:
            wide = _dense(matrix, dtype)
            return rounded(wide.reshape(shape) if store is None else store(wide), dtype, name)

        value = LazyTensor(shape, dtype, make, key)
        if self.analysis.constants.is_trained(self.region.nodes, but=self.region.layer):
            value.materialize()
        return self.editor.constant(name, value, before=self.region.place)


def _spread(bias: Matrix, shape: tuple[int, int]) -> Matrix:
    """A bias as a matrix: the same for every row of a table."""

    def fetch() -> torch.Tensor:
        return dense(bias, torch.float64).expand(shape)

    return Leaf(shape, ("spread", bias), fetch)


def _names(path: str, weight: fx.Node) -> tuple[str, str]:
    """The layer's own names, even where a tied weight bears another's."""
    own = str(weight.target) if weight.op == "get_attr" else ""
    if path and not own.startswith(f"{path}."):
        return f"{path}.weight", f"{path}.bias"
    holder, _, name = (own or "weight").rpartition(".")
    prefix = f"{holder}." if holder else ""
    return f"{prefix}{name}", f"{prefix}{name.replace('weight', 'bias')}"


@torch.no_grad()
def _dense(matrix: Matrix, dtype: torch.dtype) -> torch.Tensor:
    return dense(matrix, torch.promote_types(dtype, torch.float32))


def _round_to(dtype: torch.dtype) -> Callable[[torch.Tensor, str], torch.Tensor]:
    return lambda wide, name: rounded(wide, dtype, name)
