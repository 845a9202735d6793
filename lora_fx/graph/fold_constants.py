"""Constant folding: what calls compute from constants alone becomes a lazy constant."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import fx

from lora_fx.errors import PassError
from lora_fx.graph.constants import Constants
from lora_fx.graph.editor import Editor
from lora_fx.graph.lazy_tensor import LazyTensor


def fold_constants(
    editor: Editor,
    constants: Constants,
    calls: Sequence[fx.Node],
    names: Mapping[str, str],
    dtype: torch.dtype,
    own: Collection[str] = (),
) -> None:
    """Puts a constant in the place of each largest part of some calls that reads constants alone.

    What is made of parameters that are being trained is computed at once.

    Args:
        editor: of the graph.
        constants: of the graph; one for all folds of an edit, so that equal constants are one.
        calls: in order.
        names: a tensor of the graph -> what a constant made of it is called, where the first
            counts; a tensor without a name here is none that is known before the graph runs.
        dtype: of the constants.
        own: tensors that may be trained, and are read later all the same.
    """
    for call in calls:
        for source in call.all_input_nodes:
            if str(source.target) in names and source not in constants.nodes:
                constants.admit(source)
        constants.admit(call)
    for call in calls:
        if call not in constants.nodes or constants.nodes >= call.users.keys():
            continue
        leaves = {held.name: held for held in constants.leaves([call]).values()}
        name = next((new for old, new in names.items() if old in leaves), call.name)
        value = lazily(constants, call, dtype, name)
        if any(held.is_trained for held in leaves.values() if held.name not in own):
            value.materialize()
        editor.replace(call, editor.constant(name, value, before=call))


def lazily(constants: Constants, node: fx.Node, dtype: torch.dtype, name: str) -> LazyTensor:
    """A constant of a graph, computed when it is read, and rounded once."""
    shape = constants.shape(node)
    assert shape is not None

    def make() -> torch.Tensor:
        return rounded(constants.value(node), dtype, name)

    return LazyTensor(shape, dtype, make, constants.key(node))


def rounded(wide: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    """A new constant in the dtype that it is kept in.

    Raises:
        PassError: it is not finite there.
    """
    value = wide.to(dtype).contiguous()
    if not _is_finite(value):
        raise PassError(
            f"{name}: the folded value is not finite in {dtype} (largest magnitude "
            f"{wide.abs().max().item():g}); fold the model in a wider dtype"
        )
    return value


def _is_finite(value: torch.Tensor) -> bool:
    """In one pass, where isfinite makes three tensors; a sum may overflow where no value does."""
    return bool(value.sum().isfinite()) or all(bool(end.isfinite()) for end in value.aminmax())
