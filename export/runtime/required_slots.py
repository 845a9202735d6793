"""Slots without a default, as some exporters leave them: each run has to feed them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from lora_fx.export.onnx_model.tensors import to_numpy
from lora_fx.export.slots.check_adapter import read_adapter, values_of
from lora_fx.export.slots.manifest import Manifest


def required_slots(
    session: Any, manifest: Manifest | None, adapter: str | Path | None
) -> dict[str, np.ndarray[Any, Any]]:
    """What is fed to the slots of a file that have no default: an adapter's, or neutral values.

    Args:
        session: of the file.
        manifest: its slots.
        adapter: a file that was checked, or None.
    """
    names = {value.name for value in session.get_inputs()}
    if manifest is None or names.isdisjoint(manifest.names):
        return {}
    values = {} if adapter is None else values_of(read_adapter(Path(adapter)))
    neutral = {name: value for slot in manifest.slots for name, value in slot.neutral().items()}
    # A copy: the memory of the file ends here.
    return {n: to_numpy(v).copy() for n, v in (neutral | values).items() if n in names}
