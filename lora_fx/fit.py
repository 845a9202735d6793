"""Whether an adapter fits a graph, before anything is changed."""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx, nn

from lora_fx.adapter import Adapter, Update
from lora_fx.branches import branches
from lora_fx.config import LoraConfig
from lora_fx.errors import AdapterError, shorten
from lora_fx.graphs import attribute
from lora_fx.sites import Site, readers
from lora_fx.trace import example_of

Groups = Mapping[str, list[Site]]


def check_fit(gm: fx.GraphModule, adapter: Adapter, groups: Groups, strict: bool) -> dict[str, str]:
    """Matches an adapter against the layers of a graph.

    Returns:
        What does not match, by path, with the reason: empty if ``strict``.

    Raises:
        AdapterError: a shape differs, the name is taken, or, if ``strict``, anything is left over.
    """
    _check_name(gm, adapter.name, adapter.updates)
    for path, update in adapter.updates.items():
        if path in groups:
            _check_shape(adapter, path, update, groups[path][0])
    unknown = [path for path in adapter.updates if path not in groups]
    skipped = dict.fromkeys(unknown, "no linear layer of the graph has this path")
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


def fresh_updates(gm: fx.GraphModule, config: LoraConfig, groups: Groups) -> dict[str, Update]:
    """New updates for every layer that a config targets, all zero in effect.

    Raises:
        AdapterError: the config matches no layer, or the name is taken.
    """
    example = example_of(gm)
    head = example.output_embedding if example else None
    paths = [p for p in groups if config.rule.matches(p) and not (_all(config) and p == head)]
    if not paths:
        raise AdapterError(
            f"target_modules={config.target_modules!r} match none of the "
            f"{len(groups)} linear layers: {shorten(list(groups))}"
        )
    _check_name(gm, config.name, dict.fromkeys(paths))
    generator = config.make_generator()
    return {
        path: config.update_for(
            path, site.in_features, site.out_features, site.dtype, generator=generator
        )
        for path in paths
        for site in groups[path][:1]
    }


def _all(config: LoraConfig) -> bool:
    return config.rule.is_all_linear


def _check_name(gm: fx.GraphModule, name: str, paths: Mapping[str, object]) -> None:
    if hasattr(nn.Module, name) or hasattr(nn.Module(), name):
        raise AdapterError(
            f"adapter {name}: torch's modules have an attribute of that name; "
            "load this one with another name="
        )
    taken = [b.path for b in branches(gm) if b.name == name and b.path in paths]
    if taken:
        raise AdapterError(
            f"adapter {name}: the graph already has an adapter of that name at {shorten(taken)}; "
            "load this one with another name="
        )


def _check_shape(adapter: Adapter, path: str, update: Update, site: Site) -> None:
    if update.shape != site.shape:
        (out, into), (rows, columns) = update.shape, site.shape
        raise AdapterError(
            f"adapter {adapter.name}, {path}: made for a layer {into} -> {out}, "
            f"the model's is {columns} -> {rows}. Use the base that it was trained on"
        )


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


def _missing(gm: fx.GraphModule, adapter: Adapter, groups: Groups) -> list[str]:
    rule = adapter.expects
    if rule is None:
        return []
    example = example_of(gm)
    head = example.output_embedding if example and rule.is_all_linear else None
    return [p for p in groups if p not in adapter.updates and p != head and rule.matches(p)]


def _unmatched(adapter: Adapter, unknown: list[str], paths: list[str]) -> str:
    message = (
        f"adapter {adapter.name}: {len(unknown)} targets match nothing in the graph: "
        f"{shorten(unknown)}. The graph's linear layers: {shorten(paths) or 'none'}."
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
