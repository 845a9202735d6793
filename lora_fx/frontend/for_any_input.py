"""While tracing, torch's own Python branches on values or sizes take the way that fits all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.distributions import Distribution
from torch.nn.modules import transformer

_HINT = "_detect_is_causal_mask"


@contextmanager
def for_any_input(free_sizes: bool = True) -> Iterator[None]:
    """Lets torch's code choose what a graph of any input has; the numbers are the same to rounding.

    `torch.nn.Transformer` looks whether its mask is the causal one, and takes another way then: a
    graph applies the mask as it is. `torch.einsum` of three operands has opt_einsum, where that
    is installed, count what each order costs, which makes constants of the sizes. Distributions
    look whether their parameters are valid, and raise; a graph takes them as they are.

    Args:
        free_sizes: whether sizes may change; an order that is counted holds for those that do not.
    """
    before, checks = vars(transformer)[_HINT], Distribution._validate_args
    vars(transformer)[_HINT] = _as_hinted
    Distribution.set_default_validate_args(False)
    try:
        with ExitStack() as stack:
            if free_sizes:
                stack.enter_context(torch.backends.opt_einsum.flags(enabled=False))
            yield
    finally:
        vars(transformer)[_HINT] = before
        Distribution.set_default_validate_args(checks)


def _as_hinted(mask: Any, is_causal: bool | None = None, size: int | None = None) -> bool:
    return is_causal is True
