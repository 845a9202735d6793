"""The low-rank form of any adapter: what each update makes of W, as plain LoRA, and how near."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import nn

from lora_fx.adapters.adapter import Adapter
from lora_fx.adapters.converted import Converted, Layered
from lora_fx.adapters.parameter_updates import of_experts
from lora_fx.adapters.scaling import check_cut
from lora_fx.adapters.source_record import EMBEDDING, SourceRecord, kept
from lora_fx.adapters.updates import AnyUpdate, Update, activated
from lora_fx.algebra.low_rank import NotLowRankError
from lora_fx.algebra.truncation import cut, of_product, rank_of, svd_of
from lora_fx.errors import AdapterError, shorten, within
from lora_fx.layers.layer import Layer
from lora_fx.reference.base_weights import Base, Own
from lora_fx.reference.weight_change import Place, blocks, fitted

_PLAIN = ("lora", "rslora", "alora")
_SHARED = "its table is never called itself: the layers that share it have its rows"
Made = tuple[AnyUpdate, Layered]


@torch.no_grad()
def low_rank_form(
    adapter: Adapter, rank: int | None, energy: float | None, base: nn.Module | None
) -> Converted:
    """Does what `Adapter.to_lora` says.

    Raises:
        AdapterError: as there.
    """
    check_cut(rank, energy)
    with within(f"adapter {adapter.name}"):
        damaged = [path for path, update in adapter.updates.items() if not update.is_finite()]
        damaged += [n for n, t in adapter.replacements.items() if not t.isfinite().all()]
        if damaged:
            raise AdapterError(f"NaN or infinity in {shorten(damaged)}; save it again")
        return _Form(adapter, Base(base), rank, energy).converted()


@dataclass(frozen=True)
class _Form:
    """One conversion."""

    adapter: Adapter
    base: Base
    rank: int | None
    energy: float | None

    def converted(self) -> Converted:
        whole, stayed = self._replaced()
        made: dict[str, Made] = {}
        for path in (*self.adapter.updates, *(p for p in whole if p not in self.adapter.updates)):
            update = self.adapter.updates.get(path)
            if update is not None and update.kind == "tokens" and self.base.never_calls(path):
                stayed[path] = _SHARED
                continue
            own, value = whole.get(path, (None, None))
            if own is None:
                assert update is not None
                own = self.base.own(path, update)
            with within(path):
                made[path] = self._made(update, own, value)
        left = {n: t for n, t in self.adapter.replacements.items() if n in stayed}
        updates = {path: update for path, (update, _) in made.items()}
        adapter = replace(self.adapter, updates=updates, replacements=left)
        return Converted(adapter, {path: told for path, (_, told) in made.items()}, stayed)

    def _replaced(self) -> tuple[dict[str, tuple[Own, torch.Tensor]], dict[str, str]]:
        """The weights of layers that are replaced, by path; and what stays, with the reason."""
        whole: dict[str, tuple[Own, torch.Tensor]] = {}
        stayed: dict[str, str] = {}
        for name, value in self.adapter.replacements.items():
            own = self.base.replaced(name)
            if isinstance(own, str):
                stayed[name] = own
            elif own.weight().shape != value.shape:
                found, wanted = tuple(value.shape), tuple(own.weight().shape)
                raise AdapterError(
                    f"{name}: shape {found}, the model's is {wanted}. Use the base that it was "
                    "trained on"
                )
            elif torch.equal(value.to(own.weight().dtype), own.weight()):
                stayed[name] = "it is the base's own"
            else:
                whole[own.path] = own, value
        return whole, stayed

    def _made(self, update: AnyUpdate | None, own: Own, value: torch.Tensor | None) -> Made:
        """The LoRA of one layer.

        Args:
            update: of the layer; None where its weight is replaced and no more.
            own: the layer.
            value: what takes the place of its weight, if anything.
        """
        fit = None if update is None else fitted(update, own.layer)
        if fit is not None and own.layer is None and len(fit.shape) == 3:
            stack = self._of_experts(fit, own)
            if stack is not None:
                return stack
        place = Place(own, fit)
        delta = place.delta(value)
        mine = fit if value is None and isinstance(fit, Update) and fit.is_product else None
        if mine is not None and self.rank is not None and mine.rank <= self.rank:
            return _as_it_is(update, mine, own.layer)
        svd = svd_of(delta, self.rank, self.energy)
        count = rank_of(svd, max(delta.shape), self.rank, self.energy)
        if mine is not None and count >= mine.rank:
            return _as_it_is(update, mine, own.layer)
        found = cut(svd, count, torch.float32 if fit is None else fit.wide(torch.float32))
        down, stored = found.down.reshape(-1, *place.shape[1:]), _stored(fit, own.layer)
        if fit is None:
            return Update(down, found.up, 1.0, stored=stored), Layered(
                "replaced", count, found.error
            )
        shift = fit.shift(lambda: self._bias(own))
        lora = Update(down, found.up, 1.0, bias=shift, stored=stored)
        return activated(lora, fit.invocation), Layered(fit.kind, count, found.error)

    def _bias(self, own: Own) -> torch.Tensor | None:
        """That of a layer: the base's, or what the adapter puts in its place."""
        replaced = self.adapter.replacements.get(f"{own.path}.{own.bias_leaf}")
        return own.bias() if replaced is None else replaced

    def _of_experts(self, update: AnyUpdate, own: Own) -> Made | None:
        """The LoRA of a parameter that holds several matrices, each cut by itself at one rank."""
        try:
            left, right = blocks(update)
        except NotLowRankError as error:
            if own.held is None:
                return None  # a convolution's kernel, for all that is known
            raise AdapterError(f"{error}, and it holds several matrices; leave it out") from error
        svds = [of_product(one, other) for one, other in zip(left, right, strict=True)]
        side = max(left.shape[1], right.shape[2])
        count = max(rank_of(svd, side, self.rank, self.energy) for svd in svds)
        if count >= right.shape[1]:
            return update, Layered(update.kind, right.shape[1], 0.0)
        cuts = [cut(svd, count, update.wide(torch.float32)) for svd in svds]
        lost = math.hypot(*(c.error * svd.size for c, svd in zip(cuts, svds, strict=True)))
        size = math.hypot(*(svd.size for svd in svds))
        up, down = torch.stack([c.up for c in cuts]), torch.stack([c.down for c in cuts])
        return of_experts(up, down, update.stored), Layered(
            update.kind, count, lost / size if size > 0 else 0.0
        )


def _as_it_is(given: AnyUpdate | None, fit: Update, layer: Layer | None) -> Made:
    """Factors that are few enough, under the name of LoRA."""
    told = Layered(fit.kind, fit.rank, 0.0)
    if given is not None and fit.kind in _PLAIN:
        return given, told
    return replace(fit, kind="lora", stored=_stored(fit, layer)), told


def _stored(update: AnyUpdate | None, layer: Layer | None) -> SourceRecord | None:
    if layer is not None and layer.is_table:
        return EMBEDDING
    return None if update is None else kept(update.stored)
