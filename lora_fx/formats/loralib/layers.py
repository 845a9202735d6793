"""A layer's pair in loralib's layout as an update, and an adapter as the state dict of a model."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from lora_fx.adapters.adapter import Adapter
from lora_fx.adapters.other_updates import AnyUpdate, WeightUpdate, added
from lora_fx.adapters.scaling import alpha_for, checked_rank
from lora_fx.adapters.source_record import SourceRecord
from lora_fx.adapters.updates import Update
from lora_fx.errors import AdapterError, shorten, within
from lora_fx.formats.dialects import Roles, check_held, not_lora
from lora_fx.formats.hints import Hints, value_for
from lora_fx.kinds import lora
from lora_fx.kinds.validation import measure

Shape = tuple[int, ...]
Groups = tuple[bool, ...]  # of a MergedLinear, a matrix of several outputs: which are adapted
LEAVES = frozenset({"lora_A", "lora_B"})
# Keys of the safetensors metadata, ours: loralib keeps both in the model's constructor.
ALPHAS, FUSED = "lora_alpha", "enable_lora"
PICKLES = (".pt", ".pth", ".bin")
_OUTPUTS = 64  # of one fused layer; attention has three


def update_of(
    path: str,
    roles: Roles,
    layer: Shape | None,
    alpha: float,
    hints: Hints,
    is_table: bool = False,
) -> AnyUpdate:
    """The update of one layer: ``W + alpha / r * (lora_B @ lora_A)``, viewed as W is.

    Args:
        path: of the layer.
        roles: its pair.
        layer: (out, in / groups, *kernel), or None if unknown, and then no convolution.
        alpha: of the layer.
        hints: ``r`` and ``enable_lora`` are heeded.
        is_table: whether it is known to be an embedding, which other formats name otherwise.
    """
    lora.check_pair(roles)
    (first, down), (second, up) = roles[lora.DOWN], roles[lora.UP]
    measure(dict(roles.values()), {first: ("r * adapted", "in"), second: ("out", "r")})
    kernel = () if layer is None else layer[2:]
    size = kernel[0] if kernel else 1
    rank, rest = divmod(up.shape[1], size)
    with within(f"{path}: lora_A {tuple(down.shape)} and lora_B {tuple(up.shape)}"):
        if rest or not rank:
            raise AdapterError(f"the layer's kernel is {kernel}, expected r * {size} ranks")
        if hints.r is not None and checked_rank("r", hints.r) != rank:
            raise AdapterError(
                f"of rank {rank}, the hint r is {hints.r}; a convolution's matrices have "
                "r times its kernel's size: pass base= if it is one"
            )
        settings = {"alpha": alpha, "r": rank, "scale": alpha / rank}
        if layer is not None and kernel:
            return _conv(down, up, layer, settings)
        groups = groups_of(path, down, up, hints, None if layer is None else layer[0])
    if groups is None:
        return lora.read(roles, lora.Form(), alpha=alpha, is_table=is_table)
    stored = SourceRecord({"lora_A": down, "lora_B": up}, settings | {"enable_lora": list(groups)})
    return Update(down, block_diagonal(up, groups), alpha / rank, "fused", stored=stored)


def _conv(
    down: torch.Tensor, up: torch.Tensor, layer: Shape, settings: dict[str, float]
) -> AnyUpdate:
    """The update of a convolution, which loralib reads off a matrix of (out * k, in * k).

    Source: ``ConvLoRA`` of loralib 0.1.2. Its product is viewed as the weight, so k numbers of an
    output stand below each other, and the rank of the weight is up to r k². Without groups it is
    a product of two factors still, which pays where that is less than half of the inputs.
    """
    out, into, *kernel = layer
    size, cells, rank = kernel[0], math.prod(kernel), len(down)
    if len(set(kernel)) > 1 or rank != up.shape[1] or len(up) * down.shape[1] != math.prod(layer):
        raise AdapterError(
            f"no pair of a convolution {layer}: expected (r * k, in * k) and "
            "(out / groups * k, r * k), whose product has as many numbers as the weight"
        )
    scale, stored = settings["scale"], SourceRecord({"lora_A": down, "lora_B": up}, settings)
    is_one_group = len(up) == out * size
    simple = _of_points(up, size) if is_one_group else None
    if simple is not None:
        return Update(down.reshape(-1, into, *kernel), simple, scale, stored=stored)
    if is_one_group and 2 * rank * size < into * cells:
        eye = torch.eye(size, dtype=down.dtype, device=down.device)
        wide = torch.kron(eye, down).reshape(-1, into, *kernel)
        return Update(wide, up.reshape(out, -1), scale, stored=stored)
    dtype = torch.promote_types(torch.promote_types(up.dtype, down.dtype), torch.float32)
    delta = scale * (up.to(dtype) @ down.to(dtype)).reshape(layer)
    return WeightUpdate("dense", added(delta), layer, stored)


def _of_points(up: torch.Tensor, size: int) -> torch.Tensor | None:
    """The u of ``kron(u, I)``, if this is such a matrix: what one point says of all of them."""
    parts = up.reshape(len(up) // size, size, -1, size)
    found = parts[:, 0, :, 0].contiguous()
    return found if torch.equal(as_points(found, size), up) else None


def as_points(up: torch.Tensor, size: int) -> torch.Tensor:
    """An up-projection (out, r) as loralib stores a convolution's: (out * k, r * k)."""
    return torch.kron(up.contiguous(), torch.eye(size, dtype=up.dtype, device=up.device))


def groups_of(
    path: str,
    down: torch.Tensor,
    up: torch.Tensor,
    hints: Hints,
    out: int | None,
) -> Groups | None:
    """Which outputs of a layer are adapted, or None for a layer of one output.

    Args:
        path: of the layer.
        down: ``lora_A``, (r, in), or (r * adapted, in).
        up: ``lora_B``, (out, r), or (size * adapted, r).
        hints: ``enable_lora`` is heeded.
        out: how many outputs the base's layer has, if it is known.
    """
    count, rest = divmod(len(down), up.shape[1])
    if rest or not count or len(up) % count:
        raise AdapterError("the ranks differ, expected (r, in) and (out, r)")
    groups = _hinted(path, hints, count, len(up), out)
    if groups is None and count > 1:
        raise AdapterError(
            f"a fused layer (MergedLinear) with {count} adapted outputs; pass "
            "enable_lora=, such as [True, False, True], as its model has it"
        )
    if groups is not None and sum(groups) != count:
        raise AdapterError(
            f"{count} outputs are adapted, enable_lora={list(groups)} says {sum(groups)}"
        )
    size = len(up) // count * len(groups or (True,))
    if out is not None and out != size:
        said = "no enable_lora" if groups is None else f"enable_lora={list(groups)}"
        raise AdapterError(
            f"with {said} of an output of {size}, the base's is of {out}; "
            "pass enable_lora= as its model has it"
        )
    return groups


def block_diagonal(up: torch.Tensor, groups: Groups) -> torch.Tensor:
    """The up-projection of all outputs at once, for a down-projection that stacks their ranks.

    Output g is ``up[g] @ down[g]``, so each block meets its own ranks alone, and an output that is
    not adapted is zero. Source: ``MergedLinear.merge_AB`` of loralib 0.1.2.

    Args:
        up: (size * adapted, r).
        groups: which outputs are adapted.

    Returns:
        (size * outputs, r * adapted): the same values, and zeros.
    """
    rank = up.shape[1]
    blocks = up.chunk(sum(groups))
    size = len(blocks[0])
    whole = up.new_zeros(size * len(groups), rank * len(blocks))
    rows = [place for place, adapted in enumerate(groups) if adapted]
    for column, (row, block) in enumerate(zip(rows, blocks, strict=True)):
        whole[row * size : (row + 1) * size, column * rank : (column + 1) * rank] = block
    return whole


def _hinted(path: str, hints: Hints, count: int, rows: int, out: int | None) -> Groups | None:
    """What the hint says of a layer; a hint for all layers is of those that can be fused."""
    given = hints.enable_lora
    if given is None:
        return None
    if isinstance(given, Mapping):
        found = value_for(given, path)
        return None if found is None else checked_groups(found)
    groups = checked_groups(given)
    if count > 1:
        return groups
    if sum(groups) > 1 or groups == (True,):
        return None
    if out is None:
        raise AdapterError(
            f"enable_lora={list(groups)} adapts one output, so {path} may be fused or not; pass "
            "base=, or enable_lora={name: [...]} for the layers that are"
        )
    return groups if out == rows * len(groups) else None


def checked_groups(value: object) -> Groups:
    """Returns an ``enable_lora``, or refuses what is not a list of bools, one of them True."""
    is_list = isinstance(value, Sequence) and all(type(item) is bool for item in value)
    if not isinstance(value, Sequence) or not is_list or not any(value):
        raise AdapterError(f"enable_lora is {value!r:.80}, expected a list of bools, one True")
    if len(value) > _OUTPUTS:  # each has its rows in memory, adapted or not
        raise AdapterError(f"enable_lora is of {len(value)} outputs, expected at most {_OUTPUTS}")
    return tuple(value)


def contents(
    adapter: Adapter, path: Path, hints: Hints
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """A state dict that a model of loralib's layers loads, and texts beside.

    Tensors that loralib wrote are written as they were; another product of two factors becomes
    that of its ``Linear``, ``Embedding`` or ``Conv2d`` layer. A ``.pt`` holds the tensors alone,
    so all layers must have one alpha, which the reader has to know, as it has to know what is
    fused; a ``.safetensors`` holds both in its metadata. rsLoRA becomes the alpha that gives its
    scale over the rank.
    """
    others = [key for key in adapter.replacements if not key.endswith(".bias")]
    check_held(adapter, "loralib's format", others, _problem)
    alphas = {module: _alpha(update) for module, update in adapter.updates.items()}
    if path.suffix in PICKLES and len(set(alphas.values())) > 1:
        found = shorten([f"{p}: {alpha:g}" for p, alpha in alphas.items()])
        raise AdapterError(f"its layers have several alphas ({found}): write .safetensors")
    tensors = dict(adapter.replacements)
    fused = {}
    for module, update in adapter.updates.items():
        own = update.stored_tensors if _is_own(update) else _pair(update)
        tensors |= {f"{module}.{leaf}": tensor for leaf, tensor in own.items()}
        if _is_own(update) and FUSED in update.stored_settings:
            fused[module] = update.stored_settings[FUSED]
    metadata = {ALPHAS: json.dumps(alphas)}
    return tensors, metadata | ({FUSED: json.dumps(fused)} if fused else {})


def _problem(update: AnyUpdate) -> str | None:
    if _is_own(update):
        return None
    found = not_lora(update)
    if found is not None or not isinstance(update, Update):
        return found
    if update.magnitude is not None:
        return "DoRA"
    if update.groups > 1:
        return "grouped up-projections"
    kernel = update.down.shape[2:]
    is_square = len(kernel) == 2 and len(set(kernel)) == 1
    if not is_square and any(size > 1 for size in kernel):
        return f"updates of kernels such as {tuple(kernel)}"
    return None


def _is_own(update: AnyUpdate) -> bool:
    return update.stored_tensors.keys() == LEAVES


def _alpha(update: AnyUpdate) -> float:
    settings = update.stored_settings if _is_own(update) else {}
    if not isinstance(update, Update):
        return float(settings["alpha"])
    if settings.get("scale") == update.scale:
        return float(settings["alpha"])
    return alpha_for(update.scale, settings.get("r", update.rank))


def _pair(update: AnyUpdate) -> dict[str, torch.Tensor]:
    """lora_A and lora_B of a product of two factors."""
    assert isinstance(update, Update)
    kernel = update.down.shape[2:]
    size = kernel[0] if kernel else 1
    down = update.down.reshape(update.rank * size, -1)
    return {"lora_A": down, "lora_B": as_points(update.up, size) if size > 1 else update.up}
