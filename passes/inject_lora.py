"""Puts an adapter beside the layers it updates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import fx, nn

from lora_fx.adapter import Adapter, Update
from lora_fx.branches import last_of, parameter_names
from lora_fx.config import LoraConfig
from lora_fx.editor import Editor
from lora_fx.errors import AdapterError
from lora_fx.fit import check_fit, fresh_updates
from lora_fx.ops import aten
from lora_fx.pass_base import Pass
from lora_fx.sites import Site, by_path, readers

Injectable = Adapter | LoraConfig


@dataclass(frozen=True)
class InjectLora(Pass):
    """``linear(x, W, b)  ->  add(linear(x, W, b), matmul(matmul(x, A), B))``.

    A is (in, r), B is (r, out) with the scale folded in. A `LoraConfig` makes a branch that
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
        """Adds a branch for each update of each adapter, at each call of its layer."""
        several = self.adapter if isinstance(self.adapter, Sequence) else [self.adapter]
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
    skipped = check_fit(editor.gm, adapter, groups, strict)
    for path, reason in skipped.items():
        editor.record("skip", path, reason)
    for path, update in adapter.updates.items():
        if path not in skipped:
            _branch(editor, groups[path], update, adapter.name)
    _replace(editor, {p: t for p, t in adapter.replacements.items() if p not in skipped})


def _branch(editor: Editor, calls: list[Site], update: Update, name: str) -> None:
    first = calls[0]
    names = parameter_names(first.path, name, first.bare)
    nodes = [
        editor.constant(n, _constant(n, value, update), before=first.node)
        for n, value in zip(names, update.factors(first.dtype), strict=True)
        if value is not None
    ]
    for site in calls:
        _beside(editor, site, site.input, nodes)
    editor.record("inject", first.path, f"{update.kind} rank {update.rank}, adapter {name}")


def _constant(name: str, value: torch.Tensor, update: Update) -> nn.Parameter:
    if value.isfinite().all():
        return nn.Parameter(value.t().contiguous(), requires_grad=False)
    if not update.is_finite():
        raise AdapterError(f"{name}: the adapter holds NaN or infinity; save it again")
    raise AdapterError(
        f"{name}: values overflow {value.dtype}, the dtype of the layer; "
        "load the model in a wider dtype"
    )


def _beside(
    editor: Editor, site: Site, x: fx.Node, nodes: list[fx.Node], scale: float | None = None
) -> None:
    down, up, *bias = nodes
    base = last_of(site)
    behind = base.next

    def call(target: object, *arguments: object) -> fx.Node:
        return editor.call(target, arguments, before=behind, like=site.node)

    delta = call(aten.matmul.default, call(aten.matmul.default, x, down), up)
    if scale is not None:
        delta = call(aten.mul.Tensor, delta, scale)
    for node in bias:
        delta = call(aten.add.Tensor, delta, node)
    editor.replace(base, call(aten.add.Tensor, base, delta))


def _replace(editor: Editor, replacements: Mapping[str, torch.Tensor]) -> None:
    for name, value in replacements.items():
        found = list(readers(editor.gm, name))
        old = editor.tensor(found[0][1])
        if torch.equal(value.to(old.dtype), old):
            editor.record("keep", name, "the adapter's is equal to the model's own")
            continue
        new = nn.Parameter(value.to(old.dtype), requires_grad=False)
        node = editor.constant(name, new, before=found[0][0])
        for reader, source in found:
            editor.rebind(reader, source, node)
        editor.record("replace", name, f"{tuple(value.shape)}")


def _inject_config(editor: Editor, config: LoraConfig) -> None:
    editor.freeze()
    groups = by_path(editor.gm)
    for path, update in fresh_updates(editor.gm, config, groups).items():
        first = groups[path][0]
        down, up, _ = parameter_names(path, config.name, first.bare)
        nodes = [
            editor.constant(down, nn.Parameter(update.down.T.contiguous()), before=first.node),
            editor.constant(up, nn.Parameter(update.up.T.contiguous()), before=first.node),
        ]
        for site in groups[path]:
            x = _dropped(editor, site, config)
            _beside(editor, site, x, nodes, update.scale)
        editor.record("inject", path, f"fresh {update.kind} rank {update.rank}, trainable")


def _dropped(editor: Editor, site: Site, config: LoraConfig) -> fx.Node:
    if config.dropout == 0:
        return site.input
    module = nn.Dropout(config.dropout).train(editor.gm.training)
    name = parameter_names(site.path, config.name, site.bare)[0].replace("lora_A", "lora_dropout")
    return editor.call_module(name, module, site.input, before=site.node)
