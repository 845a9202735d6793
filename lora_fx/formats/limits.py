"""What a format that stores two matrices a layer cannot hold."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

from lora_fx.adapter import Adapter
from lora_fx.errors import AdapterError, shorten


def check_matrices_only(adapter: Adapter, path: Path, form: str, replaced: Iterable[str]) -> None:
    """Refuses an adapter that is more than matrices, before anything is written.

    Args:
        adapter: what is to be written.
        path: where to, for the message.
        form: the name of the format, for the message.
        replaced: parameters that the adapter replaces and the format has no place for.

    Raises:
        AdapterError: no update, another kind than LoRA, a scale that is not finite, a rank of 0, a
            bias of an up-projection, or replaced parameters; names them.
    """
    if not adapter.updates:
        raise AdapterError(f"{path}: the adapter {adapter.name} has no update to write")
    updates = adapter.updates.items()
    problems = {
        "other kinds than LoRA": [p for p, u in updates if u.kind not in ("lora", "rslora")],
        "scales that are no finite number": [p for p, u in updates if not math.isfinite(u.scale)],
        "updates of rank 0": [p for p, u in updates if u.rank == 0],
        "biases of up-projections (lora_bias)": [p for p, u in updates if u.bias is not None],
        "replaced parameters": list(replaced),
    }
    for what, names in problems.items():
        if names:
            raise AdapterError(
                f"{path}: {form} cannot hold {what}: {shorten(names)}; "
                "write a PEFT directory, or leave them out"
            )


# What a part of a key says about a layer that is more than two matrices; kohya's, LyCORIS's
# and diffusers' keys share these words.
FOREIGN = {
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "lora_mid.": "LoCon's Tucker form",
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "oft_": "OFT",
    "boft_": "BOFT",
    "vera_": "VeRA",
    "ia3_": "(IA)³",
    "w_norm": "a norm's weight (LyCORIS)",
    "b_norm": "a norm's bias (LyCORIS)",
    "diff_b": "a full bias (LyCORIS)",
    "diff": "a full weight (LyCORIS)",
    "rescale": "a rescaled update (LyCORIS)",
    "scalar": "a scaled update (LyCORIS)",
    "lora_B.bias": "the bias of an up-projection (lora_bias)",
}


def refuse_foreign(file: Path, key: str, ending: str) -> None:
    """Refuses a tensor whose name is that of a feature that is not supported.

    Args:
        file: for the message.
        key: the tensor's name.
        ending: what comes after the layer's path in it.

    Raises:
        AdapterError: names the tensor and the feature.
    """
    feature = next((FOREIGN[word] for word in FOREIGN if ending.startswith(word)), None)
    if feature is not None:
        raise AdapterError(f"{file}: tensor {key!r} is {feature}, which is not supported")
