"""Which form each branch of a graph is best computed in, by the cost model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod

from torch import fx, nn

from lora_fx.branch_lowering import forms
from lora_fx.branch_lowering.cost import Cost, LayerShape, cost_of, cost_of_shrink
from lora_fx.choices import Target
from lora_fx.graph.lazy_tensor import get_unevaluated
from lora_fx.injection.branches import Branch, branches_of
from lora_fx.layers.adapter_tensors import parameter_names
from lora_fx.layers.sites import Site, sites

TOKENS = 256  # what the rows of an activation are taken to be where they are not known


def choices(
    gm: fx.GraphModule,
    target: Target = "constant",
    tokens: int = TOKENS,
    form: Form | None = None,
    share: bool = True,
) -> list[Group]:
    """Chooses a form for each plain branch beside a linear layer.

    Args:
        gm: a graph with branches; it is read alone.
        target: ``"constant"``, or ``"input"``: A and B are not known before the call.
        tokens: what the rows of an activation are taken to be where they are not known.
        form: of all layers that can have it, whatever it costs; the cheapest by default.
        share: whether layers that read one x may share a shrink.

    Returns:
        The layers by the x that they read. A layer whose weight somebody else reads too stays
        factored: another form would hold the weight twice.
    """
    members = list(_members(gm, tokens))
    if target == "input":
        return [Group((_swappable(member),)) for member in members]
    elsewhere = _read_elsewhere(gm, members)
    decided: dict[str, Form] = {}  # of a layer that is called twice the first call decides
    found: dict[fx.Node, list[Candidate]] = defaultdict(list)
    for member in members:
        mine = decided.setdefault(member.site.path, _best(member, elsewhere, form))
        found[member.site.input].append(replace(member, form=mine))
    return [group for members in found.values() for group in _grouped(members, share)]


def _members(gm: fx.GraphModule, tokens: int) -> Iterator[Candidate]:
    for site in sites(gm):
        beside = tuple(branches_of(site))
        is_whole = site.is_linear and site.operand is site.weight and _is_stored(site.bias)
        is_plain = is_whole and site.labels is None
        if not beside or not is_plain or not all(_is_simple(gm, site, b) for b in beside):
            continue
        rank = sum(_rank(gm, branch) for branch in beside)
        biased = site.bias is not None or any(branch.bias for branch in beside)
        rows, size = tokens_of(site.input, tokens), site.dtype.itemsize
        shape = LayerShape(rows, site.in_features, site.out_features, rank, size, biased)
        yield Candidate(site, beside, shape)


def _is_stored(bias: fx.Node | None) -> bool:
    """Whether a bias can be put beside another, which a part of one or a computed one cannot."""
    return bias is None or bias.op == "get_attr"


def _rank(gm: fx.GraphModule, branch: Branch) -> int:
    assert branch.down is not None
    return int(get_unevaluated(gm, str(branch.down.target)).shape[1])


def _is_simple(gm: fx.GraphModule, site: Site, branch: Branch) -> bool:
    """Whether a branch is plain, in the layer's dtype, and alone in reading its base."""
    if not branch.is_plain or branch.down is None or len(branch.base.users) > 1:
        return False
    dtypes = {
        get_unevaluated(gm, str(node.target)).dtype for node in (branch.down, branch.up) if node
    }
    return dtypes == {site.dtype} and _reads(gm, branch.down, site.input)


def _reads(gm: fx.GraphModule, down: fx.Node, x: fx.Node) -> bool:
    """Whether every shrink by a factor reads x, or what a dropout in eval mode makes of it."""
    for call in down.users:
        source = call.args[0]
        if isinstance(source, fx.Node) and source.op == "call_module":
            module = gm.get_submodule(str(source.target))
            source = (
                source.args[0] if isinstance(module, nn.Dropout) and not module.training else None
            )
        if source is x:
            return True
    return False


def tokens_of(x: fx.Node, assumed: int, features: int = 1) -> int:
    """How many rows an activation has: as known, or as assumed where it is not.

    Args:
        x: its node.
        assumed: where a size is not known, unless the known ones make more.
        features: how many of its axes, at the end, are no rows: none of ids.
    """
    sizes = getattr(x.meta.get("val"), "shape", None)
    known = [size for size in sizes or () if type(size) is int]
    rows = prod(known[: len(known) - features])
    return rows if sizes is not None and len(known) == len(sizes) else max(assumed, rows)


def _read_elsewhere(gm: fx.GraphModule, members: list[Candidate]) -> set[str]:
    """Paths of layers whose weight is read by more than their own calls with branches."""
    readers: dict[int, set[fx.Node]] = defaultdict(set)
    for node in gm.graph.find_nodes(op="get_attr"):
        readers[id(get_unevaluated(gm, str(node.target)))].update(node.users)
    calls: dict[str, list[Candidate]] = defaultdict(list)
    for member in members:
        calls[member.site.path].append(member)

    def is_read(path: str) -> bool:
        weight = get_unevaluated(gm, str(calls[path][0].site.weight.target))
        return not readers[id(weight)] <= {member.site.node for member in calls[path]}

    return {path for path in calls if is_read(path)}


def _best(member: Candidate, elsewhere: set[str], wanted: Form | None) -> Form:
    found = forms_of(member, copies=member.site.path not in elsewhere)
    if wanted is not None:
        return next((form for form in (wanted, Form(wanted.kind)) if form in found), FACTORED)
    return min(found, key=lambda form: form.alone(member.shape).work)


def _grouped(members: list[Candidate], share: bool) -> list[Group]:
    alone = [Group((member,)) for member in members]
    if not share or len(members) == 1 or not all(member.form.shrinks for member in members):
        return alone
    together = Group(tuple(members), shared=True)
    saved = sum(group.cost.work for group in alone) - together.cost.work
    return [together] if saved > 0 else alone


def _swappable(member: Candidate) -> Candidate:
    """The cheapest for factors that are given at each call; unknown rows are taken to be few."""
    member = replace(member, slots=True)
    if any(branch.bias is not None for branch in member.branches):
        return member  # a bias that is an input stays where it is
    shape = replace(member.shape, n=tokens_of(member.site.input, 1))
    return replace(member, form=min(map(Form, forms.SLOTS), key=lambda f: f.alone(shape).work))


@dataclass(frozen=True)
class Form:
    """How a layer with its branches is computed.

    Attributes:
        kind: its name in `forms.CONSTANT` or `forms.SLOTS`.
        ones: whether the bias is a row of B, which a column of ones meets.
    """

    kind: str
    ones: bool = False

    def __str__(self) -> str:
        """In words."""
        return f"{self.kind}, bias in B" if self.ones else self.kind

    @property
    def function(self) -> forms.FormFunction:
        """What computes it."""
        return (forms.SLOTS | forms.CONSTANT)[self.kind]

    @property
    def shrinks(self) -> bool:
        """Whether it reads ``x A``, which may be made for several layers at once."""
        return "narrow" in forms.operands_of(self.function)

    def expand(self, shape: LayerShape) -> Cost:
        """What it costs beside the shrink."""
        return cost_of(self.function, shape, self.ones, slots=self.kind not in forms.CONSTANT)

    def alone(self, shape: LayerShape) -> Cost:
        """What it costs with a shrink of its own."""
        widths = (shape.r + self.ones,)
        shrink = cost_of_shrink(shape, widths, self.ones) if self.shrinks else Cost()
        return self.expand(shape) + shrink


FACTORED = Form("factored")


@dataclass(frozen=True)
class Candidate:
    """One call of a layer with branches, and its form.

    Attributes:
        site: the call.
        branches: beside it, in order.
        shape: sizes, those that are not known by assumption.
        form: the cheapest.
        slots: whether the factors are given at each call.
    """

    site: Site
    branches: tuple[Branch, ...]
    shape: LayerShape
    form: Form = FACTORED
    slots: bool = False

    @property
    def out(self) -> fx.Node:
        """What the rest of the graph reads."""
        return self.branches[-1].out

    @property
    def is_as_injected(self) -> bool:
        """Whether the graph computes it in this form already."""
        return self.form == FACTORED and (self.slots or len(self.branches) == 1)

    @property
    def width(self) -> int:
        """Columns of the shrink."""
        return self.shape.r + self.form.ones

    def beyond_merged(self, form: Form) -> Cost:
        """What a form, with a shrink of its own, costs more than the merged layer."""
        return form.alone(self.shape) - cost_of(forms.merged, self.shape)

    @property
    def at(self) -> str:
        """What the names of its new constants begin with."""
        down = parameter_names(self.site.path, "", self.site.bare).down
        return down.removesuffix("lora_A.").removeprefix(".")


@dataclass(frozen=True)
class Group:
    """Calls that read one x.

    Attributes:
        members: in the order of the graph.
        shared: whether one product shrinks x for all of them.
    """

    members: tuple[Candidate, ...]
    shared: bool = False

    @property
    def cost(self) -> Cost:
        """What all of them cost."""
        if not self.shared:
            return sum((m.form.alone(m.shape) for m in self.members), Cost())
        widths = tuple(member.width for member in self.members)
        ones = any(member.form.ones for member in self.members)
        start = cost_of_shrink(self.members[0].shape, widths, ones)
        return sum((m.form.expand(m.shape) for m in self.members), start)

    def form_of(self, member: Candidate) -> str:
        """The form of a member, in words."""
        shared = f", one shrink for {len(self.members)} layers" if self.shared else ""
        return f"{member.form}{shared}"

    def why(self, member: Candidate) -> str:
        """The costs of a member's form and of the others, over those of the merged layer."""
        found = {FACTORED, member.form, *forms_of(member, copies=True)} - {Form("weight")}
        told = [f"{form} +{member.beyond_merged(form)}" for form in sorted(found, key=str)]
        rows = f"n = {member.shape.n}"
        return f"{self.form_of(member)} ({rows}; beyond merged: {'; '.join(told)})"


def forms_of(member: Candidate, copies: bool) -> list[Form]:
    """The forms that a layer can have; ``copies``: whether one may hold a copy of its weight."""
    if not copies:
        return [FACTORED]
    ones = [False, True] if member.shape.biased else [False]
    found = [Form(kind, one) for kind in forms.CONSTANT for one in ones]
    return [form for form in found if form.shrinks or not form.ones]
