"""Several adapters that make one weight anew: what the next of them acts on, or why it cannot."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from lora_fx.adapters.updates import AnyUpdate
from lora_fx.errors import AdapterError, shorten
from lora_fx.injection.injected_adapters import injected
from lora_fx.injection.match_branch import branches_of, col_of
from lora_fx.layers.adapter_tensors import adapters_of, made_anew, makers, name_in, value_names
from lora_fx.layers.sites import Site

Read = tuple[fx.Node, fx.Node]
FOLD_FIRST = "fold the first, then inject the second"


def adapters_at(site: Site) -> list[str]:
    """The names of the adapters at a layer: beside it, and in its weight."""
    return [*(branch.name for branch in branches_of(site)), *adapters_of(site.operand)]


def check_layer(site: Site, update: AnyUpdate, name: str) -> None:
    """Refuses an update whose W' another adapter at the layer leaves no meaning.

    Raises:
        AdapterError: the other scales what the layer reads or gives, has a branch that this one
            would have to act on, or makes the weight anew, and this one does not act on any weight.
    """
    branches, col = list(branches_of(site)), col_of(site)
    scaled = [b.name for b in branches if b.gain is not None or b.col is not None]
    scaled += [name_in(str(col.target))] if col is not None and not scaled else []
    if scaled:
        raise AdapterError(
            f"{site.path}: adapter {name} makes its weight anew, and {scaled[0]} scales what the "
            f"layer reads or gives; {FOLD_FIRST}"
        )
    if branches and update.stacks in ("on any", "inputs first"):
        beside = shorten([branch.name for branch in branches])
        raise AdapterError(
            f"{site.path}: adapter {name} acts on the weight, and {beside} stands beside it, out "
            f"of its reach; give {name} before {beside}; or {FOLD_FIRST}, which acts on both then"
        )
    check_stacks(site.path, adapters_of(site.operand), update, name)


def check_stacks(path: str, others: Sequence[str], update: AnyUpdate, name: str) -> None:
    """Refuses an update that does not act on what other adapters made of a weight.

    Raises:
        AdapterError: says why, and what to do.
    """
    if not others or update.stacks in ("on any", "inputs first"):
        return
    earlier = shorten(list(others))
    start = f"{path}: adapter {name} makes its weight anew, and {earlier} has made it anew"
    if update.stacks == "never":
        raise AdapterError(
            f"{start}: what PEFT computes of the two of kind {update.kind!r} is no function of "
            "what the first made; merge them with PEFT (merge_and_unload), and trace that model"
        )
    if not update.is_added:
        raise AdapterError(f"{start}, which its difference from W depends on; {FOLD_FIRST}")


def placed(
    gm: fx.GraphModule, reads: Sequence[Read], path: str, update: AnyUpdate, bare: bool
) -> Sequence[Read]:
    """Who is to read what an update makes: the layer; or the adapters that act behind it.

    PEFT's OFT rotates what a layer reads, in the order of its adapters: of a weight, the last
    comes first. Other kinds of adapters end such a run.

    Raises:
        AdapterError: the graph does not remember what an adapter is.
    """
    if update.stacks != "inputs first":
        return reads
    known = {made.operand: made for made in made_anew(gm.graph)}
    found: list[Read] = []
    for reader, source in reads:
        run = None
        while source in known and _stacks(gm, path, known[source].adapter, bare) == update.stacks:
            run, source = known[source], known[source].source
        inner = makers([run.operand]) if run else set()
        found += [(user, source) for user in source.users if user in inner] or [(reader, source)]
    return found


def _stacks(gm: fx.GraphModule, path: str, adapter: str, bare: bool) -> str:
    """How an adapter in the graph stacks at a layer.

    Raises:
        AdapterError: the graph does not remember it, as one that was pickled does not.
    """
    value, *_ = value_names(path, adapter, 1, bare)
    for record in injected(gm):
        for given, several in record.bound.items():
            if any(value in bound.names.values() for bound in several):
                return record.adapter.updates[given].stacks
    raise AdapterError(
        f"{path}: whether {adapter} rotates what the layer reads is not known in a graph that was "
        f"saved, and the order depends on it; {FOLD_FIRST}, or inject both where it was traced"
    )
