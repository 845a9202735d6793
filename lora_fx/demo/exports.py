"""The encoder as ONNX: merged and unmerged for each adapter, and one that swaps them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from lora_fx.api import fold, inject
from lora_fx.demo.encoder import Batch, Encode
from lora_fx.demo.forms import Form
from lora_fx.formats import load_adapter
from lora_fx.frontend.trace import trace

if TYPE_CHECKING:
    from lora_fx.export import Session


def export_forms(
    encoder: nn.Module,
    example: Batch,
    adapters: Sequence[Path],
    out: Path,
    progress: Callable[[str], None],
) -> list[Form]:
    """Exports every form, verified, and opens each in onnxruntime with one thread.

    Args:
        encoder: the base, in eval mode.
        example: what it is traced with; texts and tokens may vary.
        adapters: directories of PEFT.
        out: the files go to ``out/onnx``.
        progress: told the name of each stage.

    Returns:
        Merged, unmerged and swapped for each adapter, then the swappable model alone.
    """
    from lora_fx.export import Session, export_adapter, to_onnx

    dynamic = {name: {0: "batch", 1: "sequence"} for name in example}
    progress("trace")
    base = trace(encoder, kwargs=example, dynamic_shapes=dynamic)
    shared = out / "onnx" / "swappable.onnx"
    progress("export swappable")
    to_onnx(base, shared, adapters="input", force=True)
    swapping = Session(shared, threads=1)  # one for both adapters and the base
    forms: list[Form] = []
    for directory in adapters:
        adapter = load_adapter(directory)
        injected = inject(base, adapter)
        for name, gm in (("merged", fold(injected)), ("unmerged", injected)):
            progress(f"export {name}, {adapter.name}")
            path = out / "onnx" / f"{adapter.name}-{name}.onnx"
            to_onnx(gm, path, force=True)
            session = Session(path, threads=1)
            forms.append(Form(name, adapter.name, encode_with(session), (path,)))
        file = out / "onnx" / f"{adapter.name}.onnx_adapter"
        export_adapter(adapter, shared, file, force=True)
        swapped = encode_with(swapping, file)
        forms.append(Form("swappable", adapter.name, swapped, (shared, file)))
    return [*forms, Form("swappable", "base", encode_with(swapping), (shared,))]


def encode_with(session: Session, adapter: Path | None = None) -> Encode:
    """A session as a function of a batch, with an adapter or without."""

    def encode(batch: Batch) -> torch.Tensor:
        return torch.from_numpy(session.run(batch, adapter=adapter)["last_hidden_state"])

    return encode
