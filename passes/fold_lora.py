"""Folds affine regions into the layer they contain."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from lora_fx.affine.algebra import transposed
from lora_fx.affine.analysis import Analysis
from lora_fx.affine.evaluate import dense
from lora_fx.affine.matrices import Leaf, Matrix, Sum
from lora_fx.affine.region import Region
from lora_fx.affine.regions import maximal_regions
from lora_fx.affine.transfer import analyse
from lora_fx.affine.ways import LAYERS, stored_in, weight_of
from lora_fx.deferred import Deferred
from lora_fx.editor import Editor
from lora_fx.errors import PassError
from lora_fx.ops import aten, module_path
from lora_fx.pass_base import Pass
from lora_fx.products import Product, batches_of, product_of
from lora_fx.recorded import made_anew
from lora_fx.turned import steps_from, turned_from


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
        analysis = analyse(editor.gm)
        for region in maximal_regions(analysis, self.chains):
            if region.blocked:
                editor.record("skip", module_path(region.layer), region.blocked)
            else:
                _fold(editor, analysis, region)
        editor.sweep()
        for made, _, source in made_anew(editor.gm.graph):
            _evaluate(editor, analysis, made, source)


def _evaluate(editor: Editor, analysis: Analysis, made: fx.Node, source: fx.Node) -> None:
    """Puts a constant in the place of a weight that an adapter made and no layer alone reads."""
    constants, name = analysis.constants, str(source.target)
    shape, dtype = constants.shape(source), constants.dtype(source)
    assert shape is not None
    reader = next(iter(made.users))
    key = ("made anew", constants.key(made))
    value = Deferred(shape, dtype, lambda: _to(dtype, constants.value(made), name), key)
    node = editor.constant(name, value, before=reader)
    editor.remember(node, made)
    editor.replace(made, node)
    editor.record("fold", name, "made anew by an adapter")


def _fold(editor: Editor, analysis: Analysis, region: Region) -> None:
    layer, end = region.layer, region.value.node
    weight, bias = region.value.since(region.source)
    if layer.target is aten.embedding.default and bias is not None:
        weight, bias = Sum(weight, _spread(bias, weight.shape)), None
    make = _Maker(editor, analysis, region)
    x = editor.along(region.before.moves, region.before.start, end)
    folded = make.layer(x, weight, bias)
    last = editor.along(region.behind.moves, folded, end)
    editor.remember(last, end)
    editor.replace(end, last)
    editor.record("fold", module_path(layer), f"{len(region.nodes)} calls into one layer")


@dataclass(frozen=True)
class _Maker:
    """Makes the layer that stands for a region: operator, names, dtype are the base layer's."""

    editor: Editor
    analysis: Analysis
    region: Region

    def layer(self, x: fx.Node, weight: Matrix, bias: Matrix | None) -> fx.Node:
        """Calls the layer's operator on new constants.

        `addmm` takes two axes and a bias: without a bias a linear stands for it.
        """
        layer = self.region.layer
        target: Any = layer.target
        product = product_of(layer)
        if product is not None and (target not in LAYERS or stored_in(layer) not in layer.args):
            return self._product(product, x, weight, bias)
        if target is aten.addmm.default and bias is None:
            target = aten.linear.default
        if target in (aten.addmm.default, aten.embedding.default):
            weight = transposed(weight)
        names = _names(module_path(layer), weight_of(layer))
        shape = self._shape(target, weight)
        at = self._constant(names[0], weight, shape)
        shift = None if bias is None else self._constant(names[1], bias, (bias.shape[0],))
        return self._call(target, x, at, shift)

    def _product(
        self, product: Product, x: fx.Node, weight: Matrix, bias: Matrix | None
    ) -> fx.Node:
        """The same call of x and a new matrix, which is stored, turned and repeated as the old."""
        layer, end = self.region.layer, self.region.value.node
        layer, end = self.region.layer, self.region.value.node
        source, turns = turned_from(product.matrix)
        moves = [*steps_from(product.matrix), *batches_of(product)]
        if source.op != "get_attr":
            source, turns, moves = product.matrix, False, batches_of(product)
        stored = weight if product.turned != turns else transposed(weight)
        names = _names(module_path(layer), source)
        operand = self.editor.along(moves, self._constant(names[0], stored, stored.shape), end)
        behind = product.labels.behind if product.labels else 0
        sizes = (weight.shape[0], *[1] * behind)
        shift = None if bias is None else self._constant(names[1], bias, sizes)
        target, arguments = product.again(layer, x, operand, shift)
        call = self.editor.call(target, arguments, before=end, like=layer)
        if shift is None or shift in call.all_input_nodes:
            return call
        return self.editor.call(aten.add.Tensor, (call, shift), before=end, like=layer)

    def _call(self, target: Any, x: fx.Node, weight: fx.Node, bias: fx.Node | None) -> fx.Node:
        layer, end = self.region.layer, self.region.value.node
        if target is aten.addmm.default:
            arguments: tuple[Any, ...] = (bias, x, weight)
        elif target is aten.embedding.default:
            arguments = (weight, x, *layer.args[2:])
        else:
            rest = layer.args[3:]
            arguments = (x, weight, bias, *rest) if bias is not None or rest else (x, weight)
        return self.editor.call(target, arguments, before=end, like=layer)

    def _shape(self, target: Any, weight: Matrix) -> tuple[int, ...]:
        shape = self.analysis.constants.shape(weight_of(self.region.layer))
        is_conv = shape is not None and len(shape) > 2
        return (weight.shape[0], *shape[1:]) if is_conv and shape else weight.shape

    def _constant(self, name: str, matrix: Matrix, shape: tuple[int, ...]) -> fx.Node:
        dtype = self.analysis.constants.dtype(weight_of(self.region.layer))
        key = (matrix, shape, dtype)
        value = Deferred(shape, dtype, lambda: _rounded(matrix, shape, dtype, name), key)
        if self.analysis.constants.is_trained(self.region.nodes, but=self.region.layer):
            value.keep()
        return self.editor.constant(name, value, before=self.region.value.node)


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


def _rounded(matrix: Matrix, shape: tuple[int, ...], dtype: torch.dtype, name: str) -> torch.Tensor:
    with torch.no_grad():
        wide = dense(matrix, torch.promote_types(dtype, torch.float32))
        return _to(dtype, wide.reshape(shape), name)


def _to(dtype: torch.dtype, wide: torch.Tensor, name: str) -> torch.Tensor:
    rounded = wide.to(dtype).contiguous()
    if not _is_finite(rounded):
        raise PassError(
            f"{name}: the folded value is not finite in {dtype} (largest magnitude "
            f"{wide.abs().max().item():g}); fold the model in a wider dtype"
        )
    return rounded


def _is_finite(value: torch.Tensor) -> bool:
    """In one pass, where isfinite makes three tensors; a sum may overflow where no value does."""
    return bool(value.sum().isfinite()) or all(bool(end.isfinite()) for end in value.aminmax())
