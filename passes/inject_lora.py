"""Puts an adapter beside the layers it updates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import fx, nn

from lora_fx.adapters.adapter import Adapter, AnyUpdate, Update
from lora_fx.adapters.lora_config import LoraConfig
from lora_fx.adapters.other_updates import anew
from lora_fx.algebra.evaluate import recorded
from lora_fx.errors import AdapterError, shorten
from lora_fx.graph.editor import Editor
from lora_fx.graph.lazy_tensor import evaluate
from lora_fx.graph.pass_base import Pass
from lora_fx.injection.bind import Binding, bind
from lora_fx.injection.branch_tensors import canonical
from lora_fx.injection.branches import adapters_beside, col_of, input_of
from lora_fx.injection.check_graph import check_binding, fresh_targets
from lora_fx.injection.emit_branch import add_branch, inject_update
from lora_fx.injection.injected_adapters import Held, note_binding, note_fresh
from lora_fx.injection.invocation_mask import Masks
from lora_fx.injection.parametrize import FOLD_FIRST, base_weight, check_stacks, parametrize
from lora_fx.injection.whole_tensors import exchange
from lora_fx.layers.adapter_tensors import adapters_of, behind, parameter_names, value_names
from lora_fx.layers.base_layers import layers_in
from lora_fx.layers.parameter_readers import CLOSED, readers, tensor_of
from lora_fx.layers.sites import Groups, Site, by_path, is_one_way, weight_name

Injectable = Adapter | LoraConfig


@dataclass(frozen=True)
class InjectLora(Pass):
    """``linear(x, W, b)  ->  add(linear(x, W, b), matmul(matmul(x, A), B))``.

    A is (in, r), B is (r, out) with the scale folded in; an embedding looks A up, a convolution
    shrinks with its own geometry and expands point by point, a transposed one too. DoRA and (IA)3
    add a term ``mul(sub(linear, b), gain)``, or scale x by a vector first. What has no form beside
    the layer (LoKr, OFT) makes its weight anew: ``linear(x, W, b) -> linear(x, f(W, values), b)``;
    a second of these makes it of what the first made.

    An activated adapter (aLoRA) adds ``mul(branch, mask)``, the mask of the tokens from the last
    invocation in ``input_ids`` on.

    A `LoraConfig` makes a branch that
    trains: the base is frozen, the scale is a factor of its own, and dropout acts on x. A layer
    that is called twice gets the branch at both calls, with one A and one B.

    Refuses an adapter that does not fit: targets that match no layer, shapes that differ, layers
    that its config names and its file lacks, a second adapter of one name.

    Attributes:
        adapter: an Adapter, a LoraConfig, or a sequence of them, which are summed.
        strict: False turns what does not match into edits that say so.
    """

    adapter: Injectable | Sequence[Injectable]
    strict: bool = True

    def rewrite(self, editor: Editor) -> None:
        """Adds a branch for each update of each adapter, at each call of its layer.

        Raises:
            AdapterError: an adapter does not fit, or is none.
        """
        several = self.adapter if isinstance(self.adapter, Sequence) else [self.adapter]
        if any(isinstance(adapter, LoraConfig) for adapter in several):
            editor.freeze()  # once: of several configs all train
        for adapter in several:
            if isinstance(adapter, LoraConfig):
                _inject_config(editor, adapter)
            elif isinstance(adapter, Adapter):
                _inject_adapter(editor, adapter, self.strict)
            else:
                raise AdapterError(
                    f"cannot inject a {type(adapter).__name__}: give an Adapter "
                    "(lora_fx.load_adapter), a LoraConfig, or a list of them"
                )


def _inject_adapter(editor: Editor, adapter: Adapter, strict: bool) -> None:
    groups = by_path(editor.gm)
    layers = layers_in(editor.gm, groups)
    binding = _beside(bind(layers, adapter), groups)
    beside = adapters_beside(groups, binding.updates)
    skipped = check_binding(editor.gm, binding, layers, groups, beside, strict)
    for path, reason in skipped.items():
        editor.record("skip", path, reason)
    before = _replace(editor, binding.replaced, adapter.name)
    if before:
        groups = by_path(editor.gm)
    masks: Masks = {}
    for path, update in binding.updates.items():
        if path in groups:
            inject_update(editor, groups[path], update, adapter.name, masks)
        else:
            _on_parameter(editor, path, update, adapter.name)
        editor.record("inject", path, f"{_words(update)}, adapter {adapter.name}")
    note_binding(editor.gm, binding, groups, beside, skipped, before)


def _beside(binding: Binding, groups: Groups) -> Binding:
    """A weight that calls multiply with from both sides has no one side: it is made anew."""
    both = {path for path, calls in groups.items() if not is_one_way(calls)}
    updates = {
        path: anew(update) if path in both and _says_weight(update) else update
        for path, update in binding.updates.items()
    }
    return replace(binding, updates=updates)


def _says_weight(update: AnyUpdate) -> bool:
    """Whether W' is all that an update of low rank does."""
    return isinstance(update, Update) and update.bias is None and not update.invocation


def _on_parameter(editor: Editor, path: str, update: AnyUpdate, name: str) -> None:
    """Makes a parameter that no layer alone reads anew, such as that of many experts."""
    names = value_names(path, name, len(update.values), bare=True)
    reads = behind(editor.gm.graph, readers(editor.gm, path))
    if not reads:
        raise AdapterError(f"adapter {name}: {path} {CLOSED}")
    check_stacks(path, adapters_of(reads[0][1]), update, name)
    own = tensor_of(editor.gm, path)
    assert own is not None
    for reader, source in reads:
        function = recorded(update.of, tuple(own.shape), update.leaves)
        parametrize(editor, reader, source, update.values, function, names, own.dtype)


def _words(update: AnyUpdate) -> str:
    rank = update.rank
    return update.kind if rank is None else f"{update.kind} rank {rank}"


def _replace(
    editor: Editor, replacements: Mapping[str, torch.Tensor], adapter: str
) -> dict[str, Held]:
    """Puts other tensors in the place of the model's; what stood there, where any differed."""
    before: dict[str, Held] = {}
    for name, value in replacements.items():
        own = tensor_of(editor.gm, name)
        assert own is not None
        old = evaluate(own)
        new = value.to(old.dtype)
        if torch.equal(new, old):
            editor.record("keep", name, "the adapter's is equal to the model's own")
            continue
        if not new.isfinite().all():
            raise AdapterError(
                f"{name}: adapter {adapter} replaces it by NaN or infinity, or by values that "
                f"overflow {old.dtype}; load the model in a wider dtype, or save the adapter again"
            )
        exchange(editor, name, new)
        editor.record("replace", name, f"{tuple(value.shape)}")
        before[name] = own
    return before


def _inject_config(editor: Editor, config: LoraConfig) -> None:
    groups = by_path(editor.gm)
    layers = layers_in(editor.gm, groups)
    generator = config.make_generator()
    updates: dict[str, Update] = {}
    left: dict[str, torch.Tensor] = {}
    made: dict[str, _Fresh] = {}
    beside = fresh_targets(editor.gm, config, layers, groups)
    for path in beside:
        first = groups[path][0]
        # A module of two names has one update, as it has one weight.
        twin = next((made[name] for name in layers.aliases.get(path, ()) if name in made), None)
        fresh = made[path] = twin or _fresh(editor, config, groups[path], generator)
        updates[path] = update = fresh.update
        if fresh.residual is not None:
            left[weight_name(first)] = fresh.residual.detach()
            _leave(editor, groups[path], fresh.residual)
        names = parameter_names(path, config.name, first.bare)
        nodes = {
            "down": editor.constant(names.down, fresh.down, before=first.node),
            "up": editor.constant(names.up, fresh.up, before=first.node),
        }
        for site in groups[path]:
            x = _dropped(editor, site, config)
            add_branch(editor, site, nodes, x, update.scale)
        editor.record("inject", path, f"fresh {_words(update)}, trainable")
    note_fresh(editor.gm, Adapter(config.name, updates, left), groups, beside)


class _Fresh(NamedTuple):
    """A new update, the parameters that train it, and what is left of the weight it came of."""

    update: Update
    down: nn.Parameter
    up: nn.Parameter
    residual: nn.Parameter | None


def _fresh(
    editor: Editor, config: LoraConfig, calls: Sequence[Site], generator: torch.Generator | None
) -> _Fresh:
    """New factors for a layer, and what PiSSA and OLoRA leave of its weight."""
    site = calls[0]
    update, residual = config.fresh(
        site.path,
        site.shape,
        site.kind,
        site.dtype,
        lambda: canonical(site, base_weight(editor, site)),
        generator,
        site.groups,
    )
    left = None
    if residual is not None:
        stored = site.type.store("weight", residual, site.groups).contiguous()
        left = nn.Parameter(stored, requires_grad=False)
    down, up = site.type.store("down", update.down), site.type.store("up", update.up)
    return _Fresh(update, nn.Parameter(down.contiguous()), nn.Parameter(up.contiguous()), left)


def _leave(editor: Editor, calls: Sequence[Site], residual: nn.Parameter) -> None:
    """Puts what was left of a weight in its place.

    Raises:
        AdapterError: an adapter has made the weight anew, and would be lost.
    """
    others = adapters_of(calls[0].operand)
    if others:
        raise AdapterError(
            f"{calls[0].path}: the factors start out of the weight, and {shorten(others)} has made "
            f"that anew; {FOLD_FIRST}"
        )
    for reader, source in dict.fromkeys(read for call in calls for read in call.reads):
        node = editor.constant(str(calls[0].weight.target), residual, before=reader)
        editor.rebind(reader, source, node)


def _dropped(editor: Editor, site: Site, config: LoraConfig) -> fx.Node:
    x = input_of(site, col_of(site))
    if config.dropout == 0 or site.type.reads_ids:  # ids are not dropped
        return x
    module = nn.Dropout(config.dropout).train(editor.gm.training)
    down = parameter_names(site.path, config.name, site.bare).down
    name = down.replace("lora_A", "lora_dropout")
    return editor.call_module(name, module, x, before=site.node)
