"""LoRA: the product of two factors, and DoRA's magnitude over it; each format has them its way."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from lora_fx.adapters.source_record import EMBEDDING
from lora_fx.adapters.updates import AnyUpdate, Update, activated, with_settings
from lora_fx.errors import AdapterError
from lora_fx.kinds import dora
from lora_fx.kinds.validation import check_rank, measure
from lora_fx.numerics import widened

DOWN, UP, MID, BIAS, MAGNITUDE = "down", "up", "mid", "bias", "magnitude"
Roles = Mapping[str, tuple[str, torch.Tensor]]  # role -> key and tensor
MAX_KERNEL = 3  # axes that the kernel of a convolution has


@dataclass(frozen=True)
class Form:
    """How a format stores LoRA.

    Attributes:
        down: the axes of the down-projection; of matrices alone, if no kernel may follow.
        up: those of the up-projection; beside a kernel as many of 1 follow.
        is_exact: up and a magnitude have just those axes, and a kernel no more than a layer's; else
            up may be a matrix beside a kernel, and a magnitude may have axes of 1 anywhere.
        is_grouped: up may be (out, r / groups, 1, ...), beside a grouped convolution.
        is_column: a magnitude is (out, 1, ...); else (out,), or beside a kernel (1, out, 1, ...).
    """

    down: tuple[str, ...] = ("r", "in", "*kernel")
    up: tuple[str, ...] = ("out", "r")
    is_exact: bool = True
    is_grouped: bool = False
    is_column: bool = False

    def magnitude(self, out: int, kernel: int) -> tuple[int, ...]:
        """The shape of a magnitude beside so many axes of a kernel."""
        points = (1,) * kernel
        if self.is_column:
            return out, 1, *points
        return (1, out, *points) if kernel else (out,)


def check_pair(roles: Roles) -> None:
    """Refuses half of a pair.

    Raises:
        AdapterError: names the tensors that stand alone.
    """
    for role in (DOWN, UP):
        if role not in roles:
            names = sorted(key for key, _ in roles.values())
            raise AdapterError(f"half of a pair, {role} is missing beside {names}")


def read(
    roles: Roles,
    form: Form,
    *,
    scale: float = 1.0,
    alpha: float | None = None,
    rank: tuple[int, str] | None = None,
    is_table: bool = False,
    use_rslora: bool = False,
    invocation: tuple[int, ...] = (),
) -> Update:
    """Reads ``W + scale * up @ down``, or DoRA where there is a magnitude.

    A convolution may be in Tucker's form, with a core (r, r, *kernel) between factors of single
    points. Joined with the core, down is (r, in, *kernel): the same product, exactly.
    Source: Hu et al., LoRA, arXiv:2106.09685; the core is LoCon's, of LyCORIS 4.1.

    Args:
        roles: the tensors of a layer, each with its key; of those with other roles nothing is read.
        form: how the format stores them.
        scale: of the product.
        alpha: instead of a scale: what is divided by the rank.
        rank: what a config says, and where.
        is_table: whether the layer is known to be an embedding.
        use_rslora: whether the scale was alpha over the root of the rank.
        invocation: aLoRA's tokens.

    Returns:
        An update of kind ``"lora"``, ``"rslora"``, ``"dora"`` or ``"alora"``, its factors in the
        dtype of the file; with a core down is in float32 or wider.

    Raises:
        AdapterError: a tensor is missing or of another shape, or the ranks differ.
    """
    check_pair(roles)
    down, up = _factors(roles, form, rank)
    scale = scale if alpha is None else alpha / len(down)
    bias, stored = roles[BIAS][1] if BIAS in roles else None, EMBEDDING if is_table else None
    update = Update(down, up, scale, bias=bias, stored=stored)
    if MAGNITUDE in roles:
        update = _with_magnitude(update, *roles[MAGNITUDE], form)
    update = activated(update, invocation)
    plain = "rslora" if use_rslora else "lora"
    kind = "alora" if invocation else plain if update.magnitude is None else "dora"
    update = replace(update, kind=kind)
    return with_settings(update, use_rslora=True) if use_rslora and kind != plain else update


def _axes(roles: Roles, form: Form) -> dict[str, tuple[str, ...]]:
    """The axes of each tensor by role: as the form says, and as its neighbours ask for."""
    down, up = roles[DOWN][1], roles[UP][1]
    kernel = _kernel(down, form)
    axes = {DOWN: form.down, UP: form.up, BIAS: ("out",)}
    if kernel > 0:
        is_flat = up.ndim == 2 and not form.is_exact
        inner = "r / groups" if form.is_grouped else "r"
        axes[UP] = ("out", inner, *([] if is_flat else ["1"] * kernel))
    if MID in roles:
        axes[DOWN] = ("r", "in", *["1"] * (roles[MID][1].ndim - 2))
        axes[MID] = ("r", "r", "k", "*kernel")
    return axes


def _kernel(down: torch.Tensor, form: Form) -> int:
    """How many axes of a kernel a down-projection has."""
    return down.ndim - 2 if len(form.down) > 2 else 0


def _factors(
    roles: Roles, form: Form, rank: tuple[int, str] | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(r, in, *kernel) and (out, r), of tensors that fit together and are of the rank."""
    (key, down), (up_key, up), axes = roles[DOWN], roles[UP], _axes(roles, form)
    measure({key: down}, {key: axes[DOWN]})
    if form.is_exact and _kernel(down, form) > MAX_KERNEL:
        raise AdapterError(f"{key} is {tuple(down.shape)}, of a kernel of more than {MAX_KERNEL}")
    if rank is not None:
        check_rank(key, down, rank, form.down.index("r"))
    own = [(axes[role], *roles[role]) for role in axes if role in roles]
    sizes = measure({name: t for _, name, t in own}, {name: names for names, name, _ in own})
    of_group = sizes.get("r / groups")
    if of_group and sizes["r"] % of_group:
        raise AdapterError(
            f"{up_key} is {tuple(up.shape)}, expected (out, r / groups, 1, ...) with r = "
            f"{sizes['r']}: the ranks differ"
        )
    if form.down[0] != "r":
        return down.t().contiguous(), up.t().contiguous()
    if MID in roles:
        down = torch.einsum("rq...,qi->ri...", widened(roles[MID][1]), widened(down).flatten(1))
    return down, up.flatten(1)


def _with_magnitude(update: Update, key: str, tensor: torch.Tensor, form: Form) -> Update:
    out, kernel = len(update.up), update.down.ndim - 2
    if form.is_exact and tuple(tensor.shape) != form.magnitude(out, kernel):
        expected = form.magnitude(out, kernel)
        raise AdapterError(f"{key} is {tuple(tensor.shape)}, expected {expected}")
    return replace(update, magnitude=dora.vector(key, tensor, out))


def stored(update: Update, form: Form) -> dict[str, torch.Tensor]:
    """The tensors of an update by role, as a format stores them: the reverse of `read`."""
    kernel = update.down.ndim - 2
    up = update.up.reshape(*update.up.shape, *[1] * kernel)
    found = {DOWN: update.down, UP: up, BIAS: update.bias}
    if update.magnitude is not None:
        shape = form.magnitude(len(update.up), kernel)
        found[MAGNITUDE] = update.magnitude.reshape(shape)
    return {role: tensor for role, tensor in found.items() if tensor is not None}


def as_peft_runs(updates: Mapping[str, AnyUpdate]) -> dict[str, AnyUpdate]:
    """What PEFT makes of the updates of a file, when it trains, runs and merges them.

    It adds the update of an attention module's output projection twice, and its bias once.
    Source: ``MultiheadAttention`` of PEFT 0.21.2, whose ``merge`` adds what ``out_proj.merge``
    adds again (peft#3774).
    """
    result = dict(updates)
    for path, inner, _ in _attention(updates):
        half = None if inner.bias is None else inner.bias / 2
        result[path] = replace(inner, scale=2 * inner.scale, bias=half)
    return result


def as_peft_stores(updates: Mapping[str, AnyUpdate]) -> dict[str, AnyUpdate]:
    """The updates of which PEFT makes these: the reverse of `as_peft_runs`.

    PEFT has one alpha for both projections. Where they have one scale here, the factor is halved.
    """
    result = dict(updates)
    for path, inner, outer in _attention(updates):
        if inner.scale == outer.scale:
            result[path] = replace(inner, up=inner.up / 2)
        else:
            twice = None if inner.bias is None else inner.bias * 2
            result[path] = replace(inner, scale=inner.scale / 2, bias=twice)
    return result


def _attention(updates: Mapping[str, AnyUpdate]) -> Iterator[tuple[str, Update, Update]]:
    """Each output projection's path and update, and that of the attention it is inside of."""
    for path, inner in updates.items():
        owner, _, name = path.rpartition(".")
        outer = updates.get(owner)
        if name == "out_proj" and isinstance(inner, Update) and isinstance(outer, Update):
            yield path, inner, outer
