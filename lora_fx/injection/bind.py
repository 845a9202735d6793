"""Binds an adapter to a graph: which update goes to which sites, or why it does not fit."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx

from lora_fx.adapters.adapter import Adapter
from lora_fx.adapters.lora_config import LoraConfig
from lora_fx.adapters.target_rule import TargetRule
from lora_fx.errors import AdapterError, shorten, within
from lora_fx.graph.example import example_of
from lora_fx.graph.graph_module import attribute, is_free
from lora_fx.graph.lazy_tensor import get_unevaluated
from lora_fx.injection.conform import fitted
from lora_fx.injection.injected_adapters import injected
from lora_fx.injection.match_branch import branches_of, parameter_names
from lora_fx.layers.sites import Site, readers
from lora_fx.layers.weight_readers import check_one_way, check_reached

Groups = Mapping[str, list[Site]]


def check_fit(gm: fx.GraphModule, adapter: Adapter, groups: Groups, strict: bool) -> dict[str, str]:
    """Matches an adapter against the layers of a graph.

    Returns:
        What does not match, by path, with the reason: empty if ``strict``.

    Raises:
        AdapterError: a shape differs, the name is taken, or, if ``strict``, anything is left over.
    """
    known = {path: update for path, update in adapter.updates.items() if path in groups}
    _check_name(gm, adapter.name, [groups[path][0] for path in known])
    for path, update in known.items():
        with within(f"adapter {adapter.name}, {path}"):
            fitted(update, groups[path][0])
            check_reached(gm, path, groups)
            if not update.makes_anew:
                check_one_way(groups[path])
    unknown = [path for path in adapter.updates if path not in groups]
    unknown = [path for path in unknown if not _is_read(gm, adapter, path)]
    _check_replaced(gm, adapter)
    skipped = dict.fromkeys(unknown, "no layer of the graph has this path")
    skipped |= _unknown_parameters(gm, adapter)
    if skipped and strict:
        raise AdapterError(_unmatched(adapter, list(skipped), list(groups)))
    missing = _missing(gm, adapter, groups)
    if missing and strict:
        raise AdapterError(
            f"adapter {adapter.name}: its config targets layers that its file has no tensors for: "
            f"{shorten(missing)}. Save the adapter again, or pass strict=False to leave them as "
            "the base has them"
        )
    return skipped | dict.fromkeys(missing, "targeted by the config, absent from the file")


def fresh_targets(gm: fx.GraphModule, config: LoraConfig, groups: Groups) -> list[str]:
    """The paths of the layers that a config targets.

    Raises:
        AdapterError: the config matches no layer, or the name is taken.
    """
    example = example_of(gm)
    head = example.output_embedding if example else None
    rule = config.rule
    paths = [p for p, calls in groups.items() if _targets(rule, p, calls[0], head)]
    if not paths:
        raise AdapterError(
            f"target_modules={config.target_modules!r} match none of the "
            f"{len(groups)} layers: {shorten(list(groups)) or 'none'}"
        )
    _check_name(gm, config.name, [groups[path][0] for path in paths])
    for path in paths:
        with within(f"adapter {config.name}, {path}"):
            check_reached(gm, path, groups)
            check_one_way(groups[path])
    return paths


def _targets(rule: TargetRule, path: str, site: Site, head: str | None) -> bool:
    """Whether a rule means a layer; "all-linear" leaves out heads and what is no linear module."""
    if rule.is_all_linear and (not site.is_linear or site.bare or site.packed or path == head):
        return False
    return rule.matches(path)


def _check_name(gm: fx.GraphModule, name: str, layers: list[Site]) -> None:
    taken = [site.path for site in layers if name in {b.name for b in branches_of(site)}]
    if taken:
        raise AdapterError(
            f"adapter {name}: the graph already has an adapter of that name at {shorten(taken)}; "
            "load this one with another name="
        )
    wanted = [n for site in layers for n in parameter_names(site.path, name, site.bare)]
    used = [n for n in wanted if not is_free(gm, n)]
    if used:
        raise AdapterError(
            f"adapter {name}: its tensors would be called {shorten(used)}, names that the model "
            "has taken; load this one with another name="
        )


def _is_read(gm: fx.GraphModule, adapter: Adapter, path: str) -> bool:
    """Whether a path is that of a parameter which its update makes anew, layer or no layer.

    Raises:
        AdapterError: the parameter is of another shape.
    """
    update = adapter.updates[path]
    found = next(readers(gm, path), None) if update.makes_anew else None
    if found is None:
        return False
    shape = tuple(get_unevaluated(gm, str(found[1].target)).shape)
    sizes = zip(update.shape, shape, strict=False)
    if len(update.shape) != len(shape) or any(want not in (None, size) for want, size in sizes):
        raise AdapterError(
            f"adapter {adapter.name}, {path}: made for a parameter {update.shape}, the model's is "
            f"{shape}. Use the base that it was trained on"
        )
    return True


def _unknown_parameters(gm: fx.GraphModule, adapter: Adapter) -> dict[str, str]:
    unknown = {}
    for name, value in adapter.replacements.items():
        found = next(readers(gm, name), None)
        if found is None:
            unknown[name] = "no layer of the graph reads a parameter of this name"
        elif (shape := attribute(gm, str(found[1].target)).shape) != value.shape:
            raise AdapterError(
                f"adapter {adapter.name}, {name}: shape {tuple(value.shape)}, "
                f"the model's is {tuple(shape)}. Use the base that it was trained on"
            )
    return unknown


def _check_replaced(gm: fx.GraphModule, adapter: Adapter) -> None:
    """Refuses what another adapter has replaced by something else: there is no sum of the two."""
    for record in injected(gm):
        known = record.adapter.replacements
        both = [name for name in adapter.replacements if name in known]
        others = [n for n in both if not torch.equal(known[n], adapter.replacements[n])]
        if others and not record.fresh:
            raise AdapterError(
                f"adapter {adapter.name}: {shorten(others)} is replaced by adapter "
                f"{record.adapter.name} too, and the values differ: leave one of them out"
            )


def _missing(gm: fx.GraphModule, adapter: Adapter, groups: Groups) -> list[str]:
    rule = adapter.expects
    if rule is None:
        return []
    example = example_of(gm)
    head = example.output_embedding if example else None
    meant = [p for p, calls in groups.items() if _targets(rule, p, calls[0], head)]
    return [path for path in meant if path not in adapter.updates]


def _unmatched(adapter: Adapter, unknown: list[str], paths: list[str]) -> str:
    message = (
        f"adapter {adapter.name}: {len(unknown)} targets match nothing in the graph: "
        f"{shorten(unknown)}. The graph's layers (calls on a stored weight): "
        f"{shorten(paths) or 'none'}."
    )
    prefix = _common_prefix(unknown, paths)
    if prefix:
        message += (
            f" The paths differ by {prefix!r}: trace the module that the adapter was made for."
        )
    return f"{message} Pass strict=False to leave them out"


def _common_prefix(unknown: list[str], paths: list[str]) -> str | None:
    for one, two in ((unknown, paths), (paths, unknown)):
        longer = next((path for path in two if path.endswith(f".{one[0]}")), None) if one else None
        if longer:
            return longer.removesuffix(one[0])
    return None
