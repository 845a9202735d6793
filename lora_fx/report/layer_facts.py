"""What an adapter does to each layer, and how well a graph holds it: measured, in numbers."""

from __future__ import annotations

from collections.abc import Iterator, Set
from dataclasses import dataclass

import torch

from lora_fx.adapters.updates import AnyUpdate, Update, length
from lora_fx.algebra.low_rank import NotLowRankError
from lora_fx.algebra.matrix_expr import Matrix
from lora_fx.algebra.truncation import Svd, of_product, size_of, svd_of
from lora_fx.branch_lowering.cost import Cost
from lora_fx.choices import Target
from lora_fx.errors import AdapterError
from lora_fx.graph.lazy_tensor import evaluate
from lora_fx.injection.bind import Binding
from lora_fx.layers.base_layers import BaseLayers, layers_in
from lora_fx.layers.sites import by_path
from lora_fx.reference.base_weights import Base, Own
from lora_fx.reference.weight_change import Place, blocks, fitted
from lora_fx.report.distance import difference
from lora_fx.report.holding import Holding
from lora_fx.report.stages import Stages

LinAlgError: type[Exception] = torch.linalg.LinAlgError  # type: ignore[attr-defined]
ITSELF = "(the model)"  # in place of an adapter's name
MOST = 64  # singular values that are kept of a layer


@dataclass(frozen=True)
class LayerFacts:
    """What an adapter does to one layer.

    Attributes:
        path: of the layer; of what an adapter brings whole, the parameter's name.
        layer: the layer's type, ``"linear"``, ``"conv2d"``, ...; ``""`` of no layer.
        adapter: its name.
        kind: of the update: ``"lora"``, ``"dora"``, ...; ``"replaced"``; ``"folded"`` of what the
            model itself computes around a layer, and is no low-rank product, such as DoRA in a
            model that PEFT wrapped.
        shape: (out, in, *kernel).
        rank: of two factors, or None.
        scale: of two factors, or None.
        change: the Frobenius norm of W' - W over that of W; None where W is zero.
        effective_rank: exp of the entropy of the singular values of W' - W as shares of their sum
            (Roy and Vetterli, EUSIPCO 2007): 1 of one direction, r of r equal ones. Of the
            ``singular_values``; None of a vector.
        singular_values: of W' - W, descending, the first 64; of all matrices of experts.
        form: how the graph holds it: ``"merged"``, or what is computed beside the layer.
        cost: what the form costs more than the merged layer, with a shrink of its own; None where
            it is not counted.
        error: how far W' - W as the graph stores it is off, by rounding to its dtype, over the norm
            of W' - W; None where it is made when loaded, of several adapters, or folded together
            with more than its adapter.
    """

    path: str
    layer: str
    adapter: str
    kind: str
    shape: list[int]
    rank: int | None
    scale: float | None
    change: float | None
    effective_rank: float | None
    singular_values: list[float]
    form: str
    cost: Cost | None
    error: float | None


@torch.no_grad()
def layer_facts(stages: Stages, target: Target = "constant") -> list[LayerFacts]:
    """Measures every layer that the adapters of a graph change.

    Args:
        stages: of the graph.
        target: ``"constant"``, or ``"input"`` where factors are given at each call.
    """
    layers = layers_in(stages.base, by_path(stages.base))
    bound = list(stages.bound(layers))
    every = [path for one in bound for path in one.updates]
    replaced = {name.rpartition(".")[0] for one in bound for name in one.replaced}
    apart = stages.mixed() | replaced | {path for path in every if every.count(path) > 1}
    holding = Holding.of(stages.standing(), target)
    measure = _Measure(layers, Base(stages.base), holding, apart)
    found = [fact for one in bound for fact in measure.facts(one)]
    return [*found, *measure.folded({*every, *replaced})]


@dataclass(frozen=True)
class _Measure:
    """A base, and a graph that holds adapters of it.

    Attributes:
        layers: of the base.
        base: the same, for its weights.
        holding: the graph.
        apart: layers at which W' - W is not that of one adapter alone.
    """

    layers: BaseLayers
    base: Base
    holding: Holding
    apart: Set[str]

    def facts(self, binding: Binding) -> Iterator[LayerFacts]:
        name = binding.adapter.name
        for path, update in binding.updates.items():
            if update.kind == "tokens" and self.base.never_calls(path):
                continue
            try:
                yield self._updated(name, path, update)
            except (AdapterError, LinAlgError):  # it is said to be there, unmeasured
                yield self._unknown(name, path, update)
        for parameter, value in binding.replaced.items():
            yield self._replaced(name, parameter, value)

    def folded(self, known: Set[str]) -> Iterator[LayerFacts]:
        """What fold made of other layers: of what the model itself computes around them."""
        for path, site in self.holding.folded():
            own = None if path in known else self._own(f"{path}.weight")
            held = None if own is None else self.holding.delta(path, Place(own, None))
            svd = None if held is None else _decomposed(held)
            if own is not None and svd is not None and svd.size:
                yield LayerFacts(
                    path, site.kind, ITSELF, "folded", list(site.own_shape), None, None,
                    _over(svd.size, length(own.weight())), effective_rank(svd.values),
                    svd.values[:MOST].tolist(), *self.holding.form(path), None,
                )  # fmt: skip

    def _own(self, parameter: str) -> Own | None:
        """The layer whose weight a parameter is, if it is one and the base has it by this name."""
        try:
            own = self.base.replaced(parameter)
        except AdapterError:
            return None
        return None if isinstance(own, str) else own

    def _updated(self, name: str, path: str, update: AnyUpdate) -> LayerFacts:
        own = self.base.own(path, update)
        place = Place(own, fitted(update, own.layer))
        values, whole = _spectrum(place)
        held = None if path in self.apart else self.holding.delta(path, place)
        form, cost = self.holding.form(path)
        return LayerFacts(
            path, "" if own.layer is None else own.layer.kind, name, update.kind,
            list(place.shape), update.rank, update.scale if isinstance(update, Update) else None,
            _over(whole, length(own.weight())), effective_rank(values), values[:MOST].tolist(),
            form, cost, None if held is None else _over(_gap(held, place.delta()), whole),
        )  # fmt: skip

    def _unknown(self, name: str, path: str, update: AnyUpdate) -> LayerFacts:
        shape = [size or 0 for size in update.shape]
        form, cost = self.holding.form(path)
        return LayerFacts(
            path, "", name, update.kind, shape, None, None, None, None, [], form, cost, None
        )

    def _replaced(self, name: str, parameter: str, value: torch.Tensor) -> LayerFacts:
        """Of a head, a norm or a bias; the spectrum is that of a matrix."""
        before, own = self.layers.unevaluated(parameter), self._own(parameter)
        assert before is not None
        start = evaluate(before)
        kept = (value.to(start.dtype).double() - value.double()).norm()
        size = float((value.double() - start.double()).norm())
        svd = None if own is None else _decomposed(Place(own, None).delta(value))
        return LayerFacts(
            parameter, "" if own is None or own.layer is None else own.layer.kind, name,
            "replaced", list(value.shape), None, None, _over(size, length(start)),
            None if svd is None else effective_rank(svd.values),
            [] if svd is None else svd.values[:MOST].tolist(),
            *self.holding.form(parameter), _over(float(kept), size),
        )  # fmt: skip


def effective_rank(values: torch.Tensor) -> float:
    """``exp(-sum p log p)`` of singular values as shares p of their sum; 0 of none."""
    total = values.double().sum()
    if total == 0:
        return 0.0
    shares = values.double() / total
    return float(torch.special.entr(shares).sum().exp())


def _decomposed(matrix: Matrix) -> Svd | None:
    try:
        return svd_of(matrix, MOST, None)
    except LinAlgError:  # a base that holds NaN or infinity
        return None


def _spectrum(place: Place) -> tuple[torch.Tensor, float]:
    """The singular values of W' - W, descending, and its Frobenius norm."""
    if place.own.layer is None and place.update is not None and len(place.update.shape) == 3:
        try:
            svds = [of_product(*pair) for pair in zip(*blocks(place.update), strict=True)]
        except NotLowRankError:
            svds = []
        if svds:
            values = torch.cat([svd.values for svd in svds]).sort(descending=True).values
            return values, float(values.norm())
    svd = svd_of(place.delta(), MOST, None)
    return svd.values, svd.size


def _gap(one: Matrix, other: Matrix) -> float:
    if one.shape != other.shape:
        return float("nan")
    return size_of(difference(one, other))


def _over(part: float, whole: float) -> float | None:
    """A share; None of nothing, or where it is not known."""
    return part / whole if whole > 0 and part == part else None
