"""The low-rank difference of two models, as an adapter."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import fx, nn

from lora_fx.adapter import Adapter, Update, check_name
from lora_fx.config import checked_rank
from lora_fx.deferred import Deferred, raw
from lora_fx.errors import AdapterError, shorten
from lora_fx.ops import module_path, op_name
from lora_fx.sites import sites


class Extracted(NamedTuple):
    """What `extract` found.

    Attributes:
        adapter: an update for each linear layer that differs, a replacement for each other
            floating-point tensor that does.
        errors: module path -> Frobenius norm of what the update leaves of the layer's difference,
            over that of the difference.
        left_out: tensor -> why it differs and yet is not in the adapter.
    """

    adapter: Adapter
    errors: Mapping[str, float]
    left_out: Mapping[str, str]


@dataclass(frozen=True)
class Held:
    """One tensor of a model, by the place that reads it.

    Attributes:
        name: what a replacement of it is called.
        value: the tensor, or what computes it.
        layer: path of the linear layer whose weight it is, or None.
        transposed: whether that weight is stored as (in, out).
    """

    name: str
    value: torch.Tensor | Deferred
    layer: str | None = None
    transposed: bool = False

    def read(self) -> torch.Tensor:
        """The tensor; one that is still to be computed is not kept."""
        value = self.value.compute() if isinstance(self.value, Deferred) else self.value
        if value.is_meta:
            raise AdapterError(f"{self.name}: the tensor has no data; load the model's weights")
        return value.detach()


Pair = tuple[Held, Held]


def extract(
    base: nn.Module,
    tuned: nn.Module,
    rank: int | None = None,
    energy: float | None = None,
    *,
    name: str = "extracted",
) -> Extracted:
    """Finds the adapter that turns one model into another of the same layers.

    The difference of each linear layer (``nn.Linear``, transformers' Conv1D, or a site of a
    graph) is cut off by singular value decomposition. One difference is in memory at a time, in
    float32 or wider; so are the factors found. What a low-rank update cannot say (biases, norms,
    embeddings, a weight that an embedding shares with a linear layer) becomes a replacement, the
    tuned model's own values. Equal tensors are left out, and shared ones are compared once.

    Args:
        base: a module, or a traced graph.
        tuned: another with the same layers; a graph if the base is one.
        rank: the highest rank of an update, or
        energy: the fraction of the squared Frobenius norm of each difference to keep, in (0, 1].
        name: of the adapter.

    Returns:
        The adapter, the relative residual of each layer, and what could not be expressed.

    Raises:
        AdapterError: the models' layers or shapes differ, a difference is not finite, or not just
            one of rank and energy is given.
    """
    check_name(name)
    _check_cut(rank, energy)
    updates: dict[str, Update] = {}
    replacements: dict[str, torch.Tensor] = {}
    errors: dict[str, float] = {}
    left_out: dict[str, str] = {}
    for pairs in _shared(_pairs(base, tuned)):
        found = _change(pairs, rank, energy)
        names = [one.name for one, _ in pairs]
        if isinstance(found, str):
            left_out |= dict.fromkeys(names, found)
        elif isinstance(found, torch.Tensor):
            replacements |= dict.fromkeys(names, found)
        elif found is not None:
            layers = [one.layer for one, _ in pairs if one.layer is not None]
            updates |= dict.fromkeys(layers, found[0])
            errors |= dict.fromkeys(layers, found[1])
    return Extracted(Adapter(name, updates, replacements), errors, left_out)


def _check_cut(rank: int | None, energy: float | None) -> None:
    if (rank is None) == (energy is None):
        raise AdapterError(f"rank is {rank!r:.80} and energy {energy!r:.80}: give one of the two")
    if rank is not None:
        checked_rank("rank", rank)
    if energy is not None and not (type(energy) in (int, float) and 0 < energy <= 1):
        raise AdapterError(f"energy is {energy!r:.80}, expected a fraction, above 0 and at most 1")


def _pairs(base: nn.Module, tuned: nn.Module) -> list[Pair]:
    """The two models' tensors, matched.

    Raises:
        AdapterError: one has what the other has not, or of another shape.
    """
    for model in (base, tuned):
        if not isinstance(model, nn.Module):
            raise AdapterError(f"found a {type(model).__name__}, expected a module or a graph")
    if isinstance(base, fx.GraphModule) != isinstance(tuned, fx.GraphModule):
        raise AdapterError("one is a graph and one a module: trace both, or neither")
    one, two = _held(base), _held(tuned)
    alone = [[key for key in a if key not in b] for a, b in ((one, two), (two, one))]
    if any(alone):
        raise AdapterError(
            f"the models differ in structure: the base alone has {shorten(alone[0]) or 'nothing'}, "
            f"the tuned one alone {shorten(alone[1]) or 'nothing'}. Merge or fold adapters first"
        )
    for key in one:
        before, after = tuple(one[key].value.shape), tuple(two[key].value.shape)
        if before != after:
            raise AdapterError(f"{key}: shape {before} in the base, {after} in the tuned model")
    return [(one[key], two[key]) for key in one]


def _held(model: nn.Module) -> dict[str, Held]:
    if isinstance(model, fx.GraphModule):
        return _held_by_graph(model)
    return dict(_held_by_module(model))


def _held_by_module(model: nn.Module) -> Iterator[tuple[str, Held]]:
    for path, module in model.named_modules(remove_duplicate=False):
        transposed = _is_transposed(module)
        for leaf in (*module._parameters, *module._buffers):
            value = raw(module, leaf)
            if value is None:
                continue
            name = f"{path}.{leaf}".removeprefix(".")
            if leaf != "weight" or not (transposed or isinstance(module, nn.Linear)):
                yield name, Held(name, value)
                continue
            # The key tells a Linear from a Conv1D of the same, square shape.
            key = f"{name} (in, out)" if transposed else name
            yield key, Held(name, value, path or name, transposed)


def _is_transposed(module: nn.Module) -> bool:
    """Whether it is transformers' Conv1D, told without importing transformers."""
    names = {(cls.__module__, cls.__name__) for cls in type(module).__mro__}
    return ("transformers.pytorch_utils", "Conv1D") in names


def _held_by_graph(gm: fx.GraphModule) -> dict[str, Held]:
    """Names are those of the modules that read, since a tied tensor bears another's."""
    found = {site.node: site for site in sites(gm)}
    calls: Counter[str] = Counter()
    held: dict[str, Held] = {}
    for node in gm.graph.nodes:
        if node.op == "call_module":
            inner = dict(_held_by_module(gm.get_submodule(node.target)))
            held |= {f"{node.target}.{key}": _beneath(node.target, h) for key, h in inner.items()}
        place = f"{module_path(node)} {op_name(node)}".strip()
        calls[place] += 1
        for slot, source in enumerate(node.all_input_nodes):
            if source.op != "get_attr" or not _is_tensor(raw(gm, source.target)):
                continue
            name = f"{module_path(node)}.{source.target.rpartition('.')[2]}".removeprefix(".")
            site = found.get(node)
            is_weight = site is not None and site.weight is source
            layer = (site.path, site.transposed) if site and is_weight else ()
            key = f"{place} (call {calls[place]}, tensor {slot})"
            held[key] = Held(name, raw(gm, source.target), *layer)
    return held


def _beneath(path: str, held: Held) -> Held:
    return Held(f"{path}.{held.name}", held.value)


def _is_tensor(value: object) -> bool:
    return isinstance(value, (torch.Tensor, Deferred))


def _shared(pairs: list[Pair]) -> list[list[Pair]]:
    """The pairs, together where both models share one tensor between several places."""
    groups: dict[tuple[int, int], list[Pair]] = defaultdict(list)
    for one, two in pairs:
        groups[id(one.value), id(two.value)].append((one, two))
    return list(groups.values())


def _change(
    pairs: list[Pair], rank: int | None, energy: float | None
) -> tuple[Update, float] | torch.Tensor | str | None:
    """What became of one tensor: an update and its residual, a new value, or why neither.

    A function of its own, so that nothing of one tensor is in memory when the next is read.
    """
    (one, two), *_ = pairs
    before, after = one.read(), two.read()
    if _are_equal(before, after):
        return None
    if not (before.is_floating_point() and after.is_floating_point()):
        return f"an adapter holds no tensor of {after.dtype}"
    if not _is_linear(pairs):
        return after.clone()
    return _factored(_difference(one.name, before, after, one.transposed), rank, energy)


def _is_linear(pairs: list[Pair]) -> bool:
    """Whether nothing but linear layers reads a tensor, as a weight, and all the same way round."""
    return all(one.layer is not None for one, _ in pairs) and (
        len({one.transposed for one, _ in pairs}) == 1
    )


def _are_equal(before: torch.Tensor, after: torch.Tensor) -> bool:
    wide = torch.promote_types(before.dtype, after.dtype)
    return before is after or torch.equal(before.to(wide), after.to(wide))


def _difference(
    name: str, before: torch.Tensor, after: torch.Tensor, transposed: bool
) -> torch.Tensor:
    """``after - before`` as (out, in), in memory of its own, in float32 or wider."""
    wide = torch.promote_types(torch.promote_types(before.dtype, after.dtype), torch.float32)
    gap = after.to(wide, copy=True).sub_(before.to(after.device))
    if not gap.isfinite().all():
        raise AdapterError(f"{name}: the difference holds NaN or infinity; is a model damaged?")
    return gap.T if transposed else gap


def _factored(gap: torch.Tensor, rank: int | None, energy: float | None) -> tuple[Update, float]:
    """The nearest update to a difference, which is used up, and its measured relative residual."""
    rows, values, columns = torch.linalg.svd(gap, full_matrices=False)
    kept = _rank_of(values, max(gap.shape), rank, energy)
    root = values[:kept].sqrt()
    up, down = rows[:, :kept] * root, (columns[:kept].T * root).T.contiguous()
    size = gap.norm()
    residual = gap.addmm_(up, down, alpha=-1).norm()
    return Update(down, up, scale=1.0), float(residual / size)


def _rank_of(values: torch.Tensor, size: int, rank: int | None, energy: float | None) -> int:
    """How many singular values to keep: never those that are rounding errors of the first."""
    noise = values[0] * size * torch.finfo(values.dtype).eps
    numerical = max(1, int((values > noise).sum()))
    if energy is None:
        return numerical if rank is None else min(rank, numerical)
    held = values.double().square().cumsum(0)
    return min(int((held < energy * held[-1]).sum()) + 1, numerical)
