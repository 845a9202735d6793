"""Refuses an adapter that a graph has no place for: names taken, shared weights, idle layers."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence, Set

import torch
from torch import fx, nn
from torch._ops import HigherOrderOperator
from torch.utils import _pytree as pytree

from lora_fx.adapters.adapter import Adapter, WeightUpdate
from lora_fx.adapters.lora_config import LoraConfig
from lora_fx.errors import AdapterError, AdapterWarning, shorten, within
from lora_fx.graph.editor import SCALED
from lora_fx.graph.example import example_of
from lora_fx.graph.graph_module import is_free
from lora_fx.graph.ops import asks_sizes, blocks_of, holder_path, module_path, op_name, reached
from lora_fx.injection.bind import Binding, meant_by, targeted
from lora_fx.injection.branches import Beside, adapters_beside
from lora_fx.injection.injected_adapters import injected
from lora_fx.injection.unmatched import cause
from lora_fx.layers.adapter_tensors import makers, parameter_names, recorded
from lora_fx.layers.base_layers import BaseLayers
from lora_fx.layers.layer_types import OPERATORS
from lora_fx.layers.parameter_readers import CLOSED, is_inside
from lora_fx.layers.sites import Groups, Site, is_one_way

_NOTHING = "the update is zero, and the model calls nothing of the layer"


def check_binding(
    gm: fx.GraphModule,
    binding: Binding,
    layers: BaseLayers,
    groups: Groups,
    beside: Beside,
    strict: bool,
) -> dict[str, str]:
    """Refuses what a graph has no place for.

    Args:
        gm: the graph.
        binding: of an adapter to its layers.
        layers: of the graph.
        groups: their calls.
        beside: the adapters at each layer that is updated.
        strict: refuse what is left over, too.

    Returns:
        What does not match, by path, with the reason: if ``strict``, what changes nothing alone.

    Raises:
        AdapterError: the name is taken, a layer cannot be adapted, another adapter replaces the
            same tensor, or, if ``strict``, anything is left over.
    """
    adapter = binding.adapter
    check_name(gm, adapter.name, groups, beside)
    for path in beside:
        is_dense = isinstance(binding.updates[path], WeightUpdate)
        _check_adaptable(gm, adapter.name, path, groups, one_way=not is_dense)
    _check_replaced(gm, adapter.name, binding.replaced)
    idle = _idle(gm, binding.refused)
    updates = {path: adapter.updates[path] for path in idle if path in adapter.updates}
    nothing = {path: _NOTHING for path, update in updates.items() if not update.has_effect()}
    left = [path for path in binding.refused if path not in nothing]
    if left and strict:
        raise AdapterError(_unmatched(gm, adapter.name, left, list(groups)))
    present = {*binding.updates, *(name.removesuffix(".weight") for name in binding.replaced)}
    wanted = targeted(adapter.expects, layers)
    if strict and wanted == []:
        _check_targets(adapter, layers)
    missing = [path for path in wanted or () if path not in present]
    if missing and strict:
        raise AdapterError(
            f"adapter {adapter.name}: its config targets layers that its file has no tensors for: "
            f"{shorten(missing)}. Save the adapter again, or pass strict=False to leave them as "
            "the base has them"
        )
    absent = dict.fromkeys(missing, "targeted by the config, absent from the file")
    return dict(binding.refused) | nothing | absent


def _check_targets(adapter: Adapter, layers: BaseLayers) -> None:
    """Refuses tensors for layers of a graph under a config that names none of its layers."""
    names = () if adapter.expects is None else adapter.expects.target_modules
    own = [path for path in adapter.updates if path in layers and not layers.is_bare(path)]
    if names and own:
        named = names if isinstance(names, str) else shorten(list(names))
        raise AdapterError(
            f"adapter {adapter.name}: its config targets {named}, no layer of the graph, and its "
            f"file has tensors for {shorten(own)}. Correct target_modules, or pass strict=False to "
            "take the file as it is"
        )


def fresh_targets(
    gm: fx.GraphModule, config: LoraConfig, layers: BaseLayers, groups: Groups
) -> Beside:
    """The layers that a config targets, by path, and the adapters at each.

    Raises:
        AdapterError: the config matches no layer, or the name is taken.
    """
    paths = meant_by(config.rule, layers)
    if not paths:
        told = _reached(gm, _named(gm, config))
        raise AdapterError(
            f"target_modules={config.target_modules!r} match none of the "
            f"{len(layers)} layers: {shorten(list(layers)) or 'none'}"
            f"{_as_a_name(config.target_modules, layers)}{told and f'.{told}'}"
        )
    beside = adapters_beside(groups, paths)
    check_name(gm, config.name, groups, beside)
    for path in paths:
        _check_adaptable(gm, config.name, path, groups, one_way=True)
    if config.rule.is_all_linear:
        _tell_left_out(paths, layers)
    return beside


def _named(gm: fx.GraphModule, config: LoraConfig) -> list[str]:
    """The modules of a graph that a config means, layers or not: that call, or are read."""
    rule, nodes = config.rule, gm.graph.nodes
    calling = [holder_path(n) for n in nodes if not rule.is_all_linear or n.target in OPERATORS]
    read = [str(n.target).rpartition(".")[0] for n in gm.graph.find_nodes(op="get_attr")]
    paths = dict.fromkeys(calling + read)
    return [path for path in paths if path and (rule.is_all_linear or rule.matches(path))]


def _tell_left_out(paths: list[str], layers: BaseLayers) -> None:
    """Warns where most of a network is not linear: its linear layers are rarely what is meant."""
    kernels = [path for path in layers if layers[path].is_conv]
    if len(kernels) > len(paths):
        warnings.warn(
            f'target_modules="all-linear" adapts {shorten(paths)} and leaves out '
            f"{len(kernels)} convolutions, {shorten(kernels)}: give a list of names to adapt them",
            AdapterWarning,
            stacklevel=2,
        )


def _as_a_name(wanted: object, layers: BaseLayers) -> str:
    """What to say of a string that would mean layers as a name."""
    if not isinstance(wanted, str) or not any(f".{p}".endswith(f".{wanted}") for p in layers):
        return ""
    return f". A string is a regex of whole paths: give a list of names, [{wanted!r}]"


def check_name(gm: fx.GraphModule, name: str, groups: Groups, beside: Beside) -> None:
    """Refuses a name that an adapter at the layers has, or that gives names which are taken.

    Raises:
        AdapterError: names the layers, or the tensors.
    """
    taken = [path for path, names in beside.items() if name in names]
    if taken:
        raise AdapterError(
            f"adapter {name}: the graph already has an adapter of that name at {shorten(taken)}; "
            "load this one with another name="
        )
    wanted = [n for path in beside for n in parameter_names(path, name, groups[path][0].bare)]
    used = [n for n in wanted if not is_free(gm, n)]
    if used:
        raise AdapterError(
            f"adapter {name}: its tensors would be called {shorten(used)}, names that the model "
            "has taken; load this one with another name="
        )


def check_one_way(calls: Sequence[Site]) -> None:
    """Refuses factors beside a weight whose inputs are the outputs of another call.

    Raises:
        AdapterError: one call multiplies with the weight, another with its transpose.
    """
    if not is_one_way(calls):
        raise AdapterError(
            f"one call multiplies with its weight {calls[0].weight.target}, another "
            "with the transpose, and factors stand beside one side alone. Leave the layer out, or "
            "give each call a weight of its own"
        )


def check_unscaled(calls: Sequence[Site]) -> None:
    """Refuses a folded layer that an update does not mean, such as ``2 * W``.

    Raises:
        AdapterError: says what to do.
    """
    if any(SCALED in site.node.meta for site in calls):
        raise AdapterError(
            "what the model itself does around the layer, such as a factor behind it, was folded "
            "into its weight, which no update was made for: inject into the graph that fold was "
            "given (lora_fx.unfold gives it back), and fold that"
        )


def check_reached(gm: fx.GraphModule, path: str, groups: Groups) -> None:
    """Refuses a layer of whose weight an adapter would not reach all that its update means.

    Of a weight that is cut into parts these are all parts; of a whole one, all that the modules
    read which call the layer: others read the base's, as beside PEFT's.

    Args:
        gm: the graph.
        path: of the layer.
        groups: all layers of the graph.

    Raises:
        AdapterError: something that is no layer reads it there too.
    """
    calls = groups[path]
    is_whole = all(site.is_whole for site in calls)
    if is_whole and {user for s in calls for user in s.weight.users} <= {s.node for s in calls}:
        return
    layers = [site for group in groups.values() for site in group]
    others = {*reached(gm.graph)} - {site.node for site in layers} - makers(recorded(gm.graph))
    callers = {module_path(site.node) for site in calls}
    weight = calls[0].weight.target
    picks = {call for site in layers for call in site.part.calls}
    for user, node in _readers(gm, weight, picks):
        is_elsewhere = is_whole and not _is_read_by(callers, user, node)
        if user in others and not is_elsewhere and not asks_sizes(user):
            at = module_path(user) or "the model itself"
            raise AdapterError(
                f"its weight {weight} is also read by {op_name(user)} of {at}, which is no "
                "layer: the adapter would be missing there. Leave the layer out, or apply what "
                "is read as a linear layer"
            )


def _readers(
    gm: fx.GraphModule, weight: object, picks: Collection[fx.Node]
) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Who reads a weight, or what some calls pick of it, and the node that they read."""
    pending = [node for node in gm.graph.find_nodes(op="get_attr") if node.target == weight]
    for node in pending:  # grows
        pending += [user for user in node.users if user in picks]
        yield from ((user, node) for user in node.users if user not in picks)


def _is_read_by(modules: Set[str], reader: fx.Node, source: fx.Node) -> bool:
    """Whether one of some modules reads a tensor in a call, or, in a block, one that is not told.

    Calls in a block of autocast say whose they are, those of `torch.cond` do not.
    """
    blocks = blocks_of(reader)
    if not blocks:
        return module_path(reader) in modules
    leaves, modules = pytree.arg_tree_leaves(*reader.args), modules | {""}
    places = (reversed(list(block.find_nodes(op="placeholder"))) for block in blocks)
    pairs = [pair for own in places for pair in zip(reversed(leaves), own, strict=False)]
    inner = [(user, own) for given, own in pairs if given is source for user in own.users]
    return any(_is_read_by(modules, user, own) for user, own in inner)


def _check_adaptable(
    gm: fx.GraphModule, name: str, path: str, groups: Groups, one_way: bool
) -> None:
    with within(f"adapter {name}, {path}"):
        check_reached(gm, path, groups)
        check_unscaled(groups[path])
        if one_way:
            check_one_way(groups[path])


def _check_replaced(gm: fx.GraphModule, name: str, replaced: Mapping[str, torch.Tensor]) -> None:
    """Refuses what another adapter has replaced by something else: there is no sum of the two."""
    for record in injected(gm):
        known = record.adapter.replacements
        others = [n for n in replaced if n in known and not torch.equal(known[n], replaced[n])]
        if others and not record.fresh:
            raise AdapterError(
                f"adapter {name}: {shorten(others)} is replaced by adapter "
                f"{record.adapter.name} too, and the values differ: leave one of them out"
            )


def _unmatched(gm: fx.GraphModule, name: str, unknown: list[str], paths: list[str]) -> str:
    modules = _modules(gm)
    model = type(modules[""]).__name__ if modules else "graph"
    idle = _idle(gm, unknown)
    others = [path for path in unknown if path not in idle]
    told = _reached(gm, unknown) or _uncalled(gm, idle) + cause(others, paths, model)
    return (
        f"adapter {name}: {len(unknown)} targets match nothing in the graph: "
        f"{shorten(unknown)}. The graph's layers (calls on a stored weight): "
        f"{shorten(paths) or 'none'}.{told} Pass strict=False to leave "
        "them out"
    )


def _idle(gm: fx.GraphModule, unknown: Iterable[str]) -> list[str]:
    """The modules that a model has, and of which it calls nothing that changes an output."""
    known = [path for path in unknown if path in _modules(gm)]
    if not known:  # as with almost every adapter
        return []
    called = {f"{module_path(node)}." for node in reached(gm.graph)}
    return [path for path in known if not any(each.startswith(f"{path}.") for each in called)]


def _modules(gm: fx.GraphModule) -> Mapping[str, nn.Module]:
    """The modules of the model that was traced, by path; none if the graph is another's."""
    example = example_of(gm)
    return {} if example is None or example.model is None else example.model.modules


def _uncalled(gm: fx.GraphModule, idle: list[str]) -> str:
    """What to say of modules that the model has, and that no call of the graph is made by."""
    if not idle:
        return ""
    if read := _fetched(gm, idle):
        return (
            f" {shorten([*read])} is read by calls of other modules, which compute with it before "
            "anything is multiplied: adapt the parameter by its name (PEFT's target_parameters)."
        )
    return (
        f" The model has {shorten(idle)}, but calls nothing of it here: it changes nothing. Trace "
        "the model with the inputs, or for the task, that it is used for."
    )


def _reached(gm: fx.GraphModule, unknown: Sequence[str]) -> str:
    """What to say of modules that the model has, and whose weight no layer of a graph stores."""
    calling = {holder_path(node) for node in reached(gm.graph) if node.target in OPERATORS}
    computed = [path for path in unknown if path and path in calling]
    if computed:
        return (
            f" What {shorten(computed)} multiplies with is computed at each call, as under "
            "weight_norm: store it, with torch.nn.utils.parametrize.remove_parametrizations or, of "
            "the older hooks, remove_weight_norm and prune.remove, before the model is traced; "
            "where the layer's own code computes it, as in a BiT or an NFNet, trace the model that "
            "PEFT wraps, and fold that; or adapt the parameter that it is computed from, by its "
            "name (PEFT's target_parameters)."
        )
    held = [name for name, node in _fetched(gm, unknown).items() if any(map(_is_block, node.users))]
    if held:
        return (
            f" {shorten(held)} is read in a block of its own, as autocast and torch.cond make "
            "them, where nothing can be adapted: trace the model without it, in the dtype that it "
            "computes in."
        )
    inside = [path for path in unknown if is_inside(gm, f"{path}.")]
    return f" {shorten(inside)} {CLOSED}." if inside else ""


def _fetched(gm: fx.GraphModule, paths: Sequence[str]) -> dict[str, fx.Node]:
    """The tensors of modules that a graph reads, by name."""
    starts = tuple(f"{path}." for path in paths)
    nodes = {str(node.target): node for node in reached(gm.graph) if node.op == "get_attr"}
    return {name: node for name, node in nodes.items() if name.startswith(starts)}


def _is_block(node: fx.Node) -> bool:
    """Whether a node calls a graph of its own."""
    return isinstance(node.target, HigherOrderOperator)
