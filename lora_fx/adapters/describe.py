"""One layer's update as plain values: what it is, and how large."""

from __future__ import annotations

from typing import Any

from lora_fx.adapters.adapter import AnyUpdate


def describe_update(path: str, update: AnyUpdate) -> dict[str, Any]:
    """Describes the update of one layer.

    Returns:
        ``path``, ``kind`` and ``shape``, None where any size fits; ``rank``, ``scale`` and
        ``norm``, of ``scale * up @ down``, where there are such factors; ``<vector>_norm`` for each
        vector beside them; ``norms`` of the values of what is a function of the weight.
    """
    report = {"path": path, "kind": update.kind, "shape": list(update.shape)}
    return report | update.measures()
