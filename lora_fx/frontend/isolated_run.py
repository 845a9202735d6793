"""Runs a model without side effects: state and RNGs put back, inputs copied, one seed."""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils import _pytree as pytree

from lora_fx.graph.module_state import Snapshot, snapshot
from lora_fx.graph.traced_module import plain_attention

# A larger tensor is kept only if it is known to be written to: copies of all would be a second
# model where weights are buffers.
_SMALL = 1 << 20
_COPIED = (torch.Tensor, nn.Parameter, nn.Buffer)
# The words of a Mersenne Twister's state that it gives as 0, and as 32 ones; half of its words.
_EXTREMES = {"least": 0, "greatest": 0x12DD9BB3}
_HALF = 312


@contextmanager
def preserved(model: nn.Module, written: Iterable[torch.Tensor]) -> Iterator[Snapshot]:
    """Puts back attributes, and the tensors that a call may write to.

    Args:
        model: what is run.
        written: tensors that are known to be written to, of any size.
    """
    known = {id(tensor): tensor for tensor in written}
    before = snapshot(model)
    for name, tensor in before.held_tensors():
        size = tensor.numel() * tensor.itemsize  # a sparse one has no nbytes
        may_change = not isinstance(tensor, nn.Parameter) and size <= _SMALL
        if (id(tensor) in known or may_change) and type(tensor) in _COPIED:
            before.tensors.append((name, tensor, tensor.detach().clone()))
            known.pop(id(tensor), None)
    before.tensors += [("", tensor, tensor.detach().clone()) for tensor in known.values()]
    try:
        yield before
    finally:
        before.restore()


@contextmanager
def as_in_eager() -> Iterator[None]:
    """No gradients, and torch's attention by its plain path, which is the one that is traced."""
    with torch.no_grad(), plain_attention(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the user's call is the one that should warn
        yield


@contextmanager
def random_kept() -> Iterator[None]:
    """Puts the global random states of torch, Python and numpy back."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def seed(draws: int | str = 0) -> Callable[[], list[str]]:
    """Sets all global random states; gives what tells which of Python's and numpy's was used.

    Args:
        draws: another number gives these two other numbers, and torch, whose numbers a graph
            draws, the same; ``"least"`` and ``"greatest"`` give them 156 fractions that are all 0,
            or all just below 1, before they go on at random.
    """
    other, extreme = (0, _EXTREMES[draws]) if isinstance(draws, str) else (draws, None)
    torch.manual_seed(20_260)
    random.seed(20_261 + other)
    np.random.seed(20_262 + other)
    if extreme is not None:  # both are Mersenne Twisters, whose state is the words that come
        rest = [random.getrandbits(32) for _ in range(_HALF)]
        words = [extreme] * _HALF + rest
        random.setstate((3, (*words, 0), None))
        np.random.set_state(("MT19937", np.array(words, np.uint32), 0, 0, 0.0))
    before = _states()

    def drawn() -> list[str]:
        now = _states()
        return [name for name, state in before.items() if state != now[name]]

    return drawn


def own_inputs(inputs: Any) -> Any:
    """A copy of inputs to run on: what is one tensor, or shares memory, does so in the copy."""
    memo: dict[int, Any] = {}
    for leaf in pytree.tree_leaves(inputs):
        if isinstance(leaf, torch.Tensor) and leaf.requires_grad and not leaf.is_leaf:
            memo[id(leaf)] = leaf.detach().clone().requires_grad_()
    return copy.deepcopy(inputs, memo)


def _states() -> dict[str, Any]:
    state: Any = np.random.get_state()
    name, keys, *rest = state
    return {"random": random.getstate(), "numpy.random": (name, bytes(keys), *rest)}
