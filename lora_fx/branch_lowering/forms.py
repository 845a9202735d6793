"""The forms that a layer with branches can have, and what they cost."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from lora_fx.branch_lowering import cost
from lora_fx.branch_lowering.cost import Cost, Shape
from lora_fx.injection.match_branch import Branch
from lora_fx.layers.sites import Site


@dataclass(frozen=True)
class Form:
    """How a layer with its branches is computed.

    Attributes:
        kind: ``"factored"``, ``"augmented"`` or ``"weight"``.
        ones: whether the bias is a row of B, which a column of ones meets.
    """

    kind: str
    ones: bool = False

    def __str__(self) -> str:
        """In words."""
        return f"{self.kind}, bias in B" if self.ones else self.kind

    def expand(self, shape: Shape) -> Cost:
        """What it costs beside the shrink."""
        if self.kind == "weight":
            return cost.weight(shape)
        return (cost.augmented if self.kind == "augmented" else cost.factored)(shape, self.ones)

    def alone(self, shape: Shape) -> Cost:
        """What it costs with a shrink of its own."""
        if self.kind == "weight":
            return self.expand(shape)
        return self.expand(shape) + cost.shrink(shape, shape.r + self.ones, self.ones)


FACTORED = Form("factored")


@dataclass(frozen=True)
class Member:
    """One call of a layer with branches, and its form.

    Attributes:
        site: the call.
        branches: beside it, in order.
        shape: sizes, those that are not known by assumption.
        form: the cheapest.
    """

    site: Site
    branches: tuple[Branch, ...]
    shape: Shape
    form: Form = FACTORED

    @property
    def out(self) -> fx.Node:
        """What the rest of the graph reads."""
        return self.branches[-1].out

    @property
    def is_as_injected(self) -> bool:
        """Whether the graph computes it in this form already."""
        return self.form == FACTORED and len(self.branches) == 1


@dataclass(frozen=True)
class Group:
    """Calls that read one x.

    Attributes:
        members: in the order of the graph.
        shared: whether one product shrinks x for all of them.
    """

    members: tuple[Member, ...]
    shared: bool = False

    @property
    def cost(self) -> Cost:
        """What all of them cost."""
        if not self.shared:
            return sum((m.form.alone(m.shape) for m in self.members), Cost())
        first, ranks = self.members[0].shape, [m.shape.r + m.form.ones for m in self.members]
        ones = any(member.form.ones for member in self.members)
        start = cost.shrink(first, sum(ranks), ones) + cost.moved(
            2 * first.n * sum(ranks), first.size
        )
        return sum((m.form.expand(m.shape) for m in self.members), start)

    def why(self, member: Member) -> str:
        """The costs of a member's form and of the others, over those of the merged layer."""
        least = cost.merged(member.shape)
        forms = {FACTORED, member.form, *forms_of(member, copies=True)} - {Form("weight")}
        told = [
            f"{form} {_over(form.alone(member.shape), least)}" for form in sorted(forms, key=str)
        ]
        shared = f", one shrink for {len(self.members)} layers" if self.shared else ""
        rows = f"n = {member.shape.n}"
        return f"{member.form}{shared} ({rows}; beyond merged: {'; '.join(told)})"


def forms_of(member: Member, copies: bool) -> list[Form]:
    """The forms that a layer can have; ``copies``: whether one may hold a copy of its weight."""
    kinds = ["factored", "augmented"] if copies else ["factored"]
    ones = [False, True] if member.shape.biased and copies else [False]
    return [Form(kind, one) for kind in kinds for one in ones]


def _over(one: Cost, least: Cost) -> str:
    more = f"{(one.flops - least.flops) / 1e6:.3g} MFLOP, {(one.bytes - least.bytes) / 1e6:.3g} MB"
    return f"+{more}, {one.calls - least.calls} calls"
