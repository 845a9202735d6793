"""What the values of a slot do to the weight and the bias of its layer."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from lora_fx.export.rewriting.merged_tensor import Change, Part
from lora_fx.export.rewriting.weight_reads import Read
from lora_fx.export.slots.slot import AnySlot, ExpertSlot, Slot
from lora_fx.layers.axes import names_of

Values = Mapping[str, torch.Tensor]
_EXPERTS = {"weight": "e out in", "down": "e r in", "up": "e out r"}
_NEUTRAL = {"col": 1}


def acts(slot: AnySlot, values: Values) -> bool:
    """Whether the layer gives anything else with these values."""
    parts = {part: values[given.name] for part, given in slot.inputs.items() if part != "down"}
    return any(bool((v != _NEUTRAL.get(part, 0)).any()) for part, v in parts.items())


def axes_of(slot: AnySlot, read: Read) -> tuple[str, ...] | None:
    """The names of the axes of a slot's weight, or None if it is of another shape."""
    known = read.weight.shape
    shape = tuple(known.numpy()) if known is not None and known.is_static() else ()
    if isinstance(slot, ExpertSlot):
        return _axes_of(slot, "weight") if shape == slot.shape else None
    assert isinstance(slot, Slot)
    if read.axes is None:
        return None
    sizes = {"out": slot.out_features, "in": slot.in_features}
    names = names_of(read.axes, len(slot.kernel))
    sizes[names[1]] //= slot.groups
    wanted = [sizes.get(name) or slot.kernel[int(name[1:])] for name in names]
    return tuple(names) if list(shape) == wanted else None


def _axes_of(slot: ExpertSlot, part: str) -> tuple[str, ...]:
    names = _EXPERTS[part].split()
    return tuple(names[-len(slot.shape) :])


def changes_of(slot: AnySlot, values: Values) -> list[Change] | None:
    """What becomes of W, for each group of the layer; None if its groups are mixed."""
    given = {p: slot.from_input(p, values[name]) for p, (name, _) in slot.inputs.items()}
    if isinstance(slot, ExpertSlot):
        return [Change(**{part: Part(_axes_of(slot, part), v) for part, v in given.items()})]
    assert isinstance(slot, Slot)
    stored, kernel = slot.layer.type, len(slot.kernel)
    whole = Change(
        down=Part.of(stored.down, given["down"], kernel),
        up=Part.of(stored.up, given["up"], kernel),
        gain=Part(("out",), given["gain"].flatten()) if "gain" in given else None,
        col=Part(("in",), given["col"].flatten()) if "col" in given else None,
    )
    if slot.groups == 1:
        return [whole]
    out, into = slot.out_features // slot.groups, slot.in_features // slot.groups
    groups = range(slot.groups)
    if any(_meets(whole, o * out, out, i * into, into) for o in groups for i in groups if o != i):
        return None
    return [whole.of_group(g * out, out, g * into, into) for g in groups]


def shift_of(slot: AnySlot, values: Values) -> torch.Tensor | None:
    """What is added to the bias, as the slot has it, or None."""
    given = slot.inputs.get("bias")
    found = None if given is None else values[given.name]
    return None if found is None or not bool(found.any()) else found


def _meets(whole: Change, out: int, outs: int, into: int, ins: int) -> bool:
    """Whether outputs of one group get anything from inputs of another."""
    part = whole.of_group(out, outs, into, ins)
    assert part.down is not None
    assert part.up is not None
    down = part.down.values.movedim(part.down.axes.index("r"), 0).flatten(1)
    up = part.up.values.movedim(part.up.axes.index("r"), 1)
    return bool((up.float() @ down.float()).any())
