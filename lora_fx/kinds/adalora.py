"""AdaLoRA: a product of low rank with its singular values beside it, pruned while it trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from lora_fx.adapters.source_record import SourceRecord
from lora_fx.adapters.updates import AnyUpdate, Update
from lora_fx.errors import AdapterError
from lora_fx.kinds.validation import layer_shape, measure, number, unflatten
from lora_fx.numerics import widened

_SHAPES = {"lora_A": ("r", "in"), "lora_B": ("out", "r"), "lora_E": ("r", "1")}
LEAVES = frozenset(_SHAPES)


def read(tensors: Mapping[str, torch.Tensor], settings: Mapping[str, Any]) -> AnyUpdate:
    """Reads ``scale / (ranknum + 1e-5) * B diag(E) A``.

    Source: Zhang et al., AdaLoRA, arXiv:2303.10512; ``adalora`` of PEFT 0.21, which keeps dividing
    by the rank before the pruning (``init_r``), whatever rank is left in the file.

    Args:
        tensors: lora_A (r, in * kernel), lora_B (out, r), lora_E (r, 1).
        settings: ``scale``: the config's lora_alpha, or the rank in the file where that is not
            positive; ``ranknum``: its init_r; ``shape`` of a convolution, whose kernel no tensor
            tells.

    Returns:
        An update of kind ``"adalora"``; without ``shape`` its down is (r, in * kernel), in the
        order of (r, in, *kernel).

    Raises:
        AdapterError: a tensor is missing, not used or of another shape; a setting is wrong.
    """
    scale, ranknum = (number(settings, name) for name in ("scale", "ranknum"))
    if ranknum <= 0:
        raise AdapterError(f"setting ranknum is {ranknum}, expected a positive number")
    measure(tensors, _SHAPES)
    down = widened(tensors["lora_E"]) * widened(tensors["lora_A"])
    down = unflatten("lora_A", down, layer_shape(settings))
    stored = SourceRecord(tensors, settings)
    return Update(down, tensors["lora_B"], scale / (ranknum + 1e-5), kind="adalora", stored=stored)
