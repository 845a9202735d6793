"""LoHa: the Hadamard product of two products of low rank, which is one product of rank r²."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from lora_fx.adapters.source_record import SourceRecord
from lora_fx.adapters.updates import AnyUpdate, Update
from lora_fx.errors import AdapterError
from lora_fx.kinds import dora
from lora_fx.kinds.validation import layer_shape, measure, number, unflatten
from lora_fx.numerics import widened

_PLAIN: dict[str, tuple[str, ...]] = {
    "hada_w1_a": ("out", "r"),
    "hada_w1_b": ("r", "in"),
    "hada_w2_a": ("out", "s"),
    "hada_w2_b": ("s", "in"),
}
_TUCKER: dict[str, tuple[str, ...]] = {
    "hada_t1": ("r", "q", "*kernel"),
    "hada_w1_a": ("r", "out"),
    "hada_w1_b": ("q", "in"),
    "hada_t2": ("s", "p", "*kernel"),
    "hada_w2_a": ("s", "out"),
    "hada_w2_b": ("p", "in"),
}
MARKS = frozenset(_TUCKER)
LEAVES = MARKS | {"alpha", "dora_scale"}


def read(tensors: Mapping[str, torch.Tensor], settings: Mapping[str, Any]) -> AnyUpdate:
    """Reads ``scale * (w1_a w1_b) ∘ (w2_a w2_b)`` as ``up @ down``.

    Row o of ``up`` is the Kronecker product of the rows o of the two ``a`` (face-splitting), column
    c of ``down`` that of the columns c of the two ``b`` (Khatri-Rao). In the Tucker form a core
    (r, q, *kernel) stands between the factors; it joins ``b``, and the rank stays r².
    Source: Hyeon-Woo et al., FedPara, arXiv:2108.06098; ``loha`` of PEFT 0.21 and LyCORIS 4.1.

    Args:
        tensors: w1_a, w2_a (out, r) and w1_b, w2_b (r, in * kernel), or with axes of their own for
            the kernel, as OneTrainer has them, (out, r, 1, ...) and (r, in, *kernel); or w1_a, w2_a
            (r, out), w1_b, w2_b (r, in) and t1, t2 (r, r, *kernel). ``alpha`` is kept,
            ``dora_scale`` heeded.
        settings: ``scale``; ``shape`` of a convolution, whose kernel the plain form does not tell.

    Returns:
        An update of kind ``"loha"``. Without ``shape`` a plain one has ``down`` of
        (r², in * kernel): who meets a convolution of that many columns views it as
        (r², in, *kernel), which is the order that the file has them in.

    Raises:
        AdapterError: a tensor is missing, not used or of another shape; a setting is wrong.
    """
    own, magnitude = dora.split(tensors)
    own.pop("alpha", None)
    scale, shape = number(settings, "scale"), layer_shape(settings)
    is_tucker = "hada_t1" in own or "hada_t2" in own
    if not is_tucker:
        own = {leaf: t.flatten(1) if t.ndim > 2 else t for leaf, t in own.items()}
        tensors = {**tensors, **own}
    measure(own, _TUCKER if is_tucker else _PLAIN)
    one, other = (_factors(own, half, is_tucker) for half in "12")
    if one[1].shape[1:] != other[1].shape[1:]:
        shapes = f"{tuple(own['hada_t1'].shape)} and {tuple(own['hada_t2'].shape)}"
        raise AdapterError(f"hada_t1 and hada_t2 are {shapes}, expected equal kernels")
    up = (one[0][:, :, None] * other[0][:, None, :]).flatten(1)
    down = unflatten("hada_w1_b", (one[1][:, None] * other[1][None]).flatten(0, 1), shape)
    update = Update(down, up, scale, kind="loha", stored=SourceRecord(tensors, settings))
    return dora.with_magnitude(update, magnitude)


def _factors(
    own: Mapping[str, torch.Tensor], half: str, is_tucker: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """One half as (out, r) and (r, in, *kernel), in float32 or wider."""
    a, b = (widened(own[f"hada_w{half}_{letter}"]) for letter in "ab")
    if not is_tucker:
        return a, b
    return a.T, torch.einsum("rq...,qi->ri...", widened(own[f"hada_t{half}"]), b)
