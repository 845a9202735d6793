"""How a graph holds what adapters change: merged, beside its layer, or given at each call."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import fx

from lora_fx.algebra.matrix_expr import Matrix
from lora_fx.branch_lowering.cost import Cost
from lora_fx.branch_lowering.cost_beside import cost_beside, cost_of_slot
from lora_fx.branch_lowering.selection import choices
from lora_fx.choices import Target
from lora_fx.graph.editor import FOLDED
from lora_fx.graph.lazy_tensor import evaluate, get_unevaluated
from lora_fx.injection.branches import branches_of
from lora_fx.injection.read_adapter import update_from
from lora_fx.layers.adapter_tensors import recorded
from lora_fx.layers.sites import Groups, Site, by_path
from lora_fx.reference.weight_change import Place, fitted

Form = tuple[str, Cost | None]


@dataclass(frozen=True)
class Holding:
    """One graph.

    Attributes:
        gm: the graph.
        sites: its layers by path.
        made: operands that adapters make at each call, and the stored weights.
        beside: layers with something beside them: the form, and what it costs, if that is counted.
        otherwise: the form of all others.
    """

    gm: fx.GraphModule
    sites: Groups
    made: Mapping[fx.Node, fx.Node]
    beside: Mapping[str, Form]
    otherwise: str

    @classmethod
    def of(cls, gm: fx.GraphModule, target: Target) -> Holding:
        """Looks at a graph whose factors are constants, or ``"input"``: given at each call."""
        is_input = target == "input"
        start, anew = ("slot, ", "slot, whole") if is_input else ("", "made when loaded")
        groups, made = by_path(gm), recorded(gm.graph)
        beside: dict[str, Form] = {str(weight.target): (anew, None) for weight in made.values()}
        chosen = [(group, one) for group in choices(gm, target) for one in group.members]
        for group, one in chosen:
            cost = one.beyond_merged(one.form)
            beside[one.site.path] = f"{start}{group.form_of(one)}", cost
        apart = groups.keys() - {one.site.path for _, one in chosen}
        for site in (site for path in apart for site in groups[path]):
            if is_input and site.operand in made:
                beside[site.path] = anew, cost_of_slot(site)
            elif site.operand in made:
                beside[site.path] = anew, cost_beside(gm, site)
            elif any(branches_of(site)):
                beside[site.path] = f"{start}factored", cost_beside(gm, site, is_input)
        return cls(gm, groups, made, beside, "slot, whole" if is_input else "merged")

    def form(self, path: str) -> Form:
        """How the update of a layer is held, and what that costs more than the merged layer.

        Args:
            path: of the layer; of what an adapter brings whole, the parameter's name.
        """
        if path in self.beside or self.otherwise == "merged":
            return self.beside.get(path, (self.otherwise, Cost()))
        owner = self.sites.get(path) or self.sites.get(path.removesuffix(".weight"), ())
        return self.otherwise, sum(map(cost_of_slot, owner[:1]), Cost())

    def folded(self) -> Iterator[tuple[str, Site]]:
        """The layers that fold made anew, with nothing beside them."""
        for path, (site, *_) in self.sites.items():
            if FOLDED in site.node.meta and path not in self.beside:
                yield path, site

    def delta(self, path: str, place: Place) -> Matrix | None:
        """W' - W of a layer as it is stored; None where it is not, or of several adapters."""
        site = next(iter(self.sites.get(path, ())), None)
        if site is None or site.operand in self.made:
            return None
        branches = list(branches_of(site))
        if len(branches) > 1:
            return None
        if branches:
            update = update_from(self.gm, site, branches[0])
            return Place(place.own, fitted(update, place.own.layer)).delta()
        stored = evaluate(get_unevaluated(self.gm, str(site.weight.target)))
        if stored.shape != place.own.weight().shape:
            return None
        return Place(place.own, None).delta(stored)
