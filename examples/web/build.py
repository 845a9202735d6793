"""Writes what the page loads: an encoder without defaults for its slots, and adapters to feed it.

python examples/web/build.py MODEL ADAPTER... -o OUT

MODEL is the directory of an encoder of BERT's kind, or demo for that of `make demo`; each ADAPTER
is a directory of PEFT's.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import lora_fx
from lora_fx.demo.encoder import load_extra

PAGE = ("index.html", "page.css", "page.mjs", "adapters.mjs", "wordpiece.mjs")


def build(model: Path, adapters: Sequence[Path], out: Path) -> None:
    """Writes the page with its model and adapters.

    Args:
        model: the encoder's directory, with its ``vocab.txt``.
        adapters: directories of PEFT's.
        out: gets the files; earlier ones are replaced.
    """
    out.mkdir(parents=True, exist_ok=True)
    gm = lora_fx.tasks.load(str(model), "feature-extraction")[0].traced()
    loaded = [lora_fx.load_adapter(path) for path in adapters]
    both = lora_fx.inject(gm, loaded)  # what they change gets slots
    print(lora_fx.to_onnx(both, out / "model.onnx", adapters="required", force=True))
    for adapter in (None, *loaded):
        name = "no-adapter" if adapter is None else adapter.name
        file = out / f"{name}.safetensors"
        lora_fx.export_adapter(adapter, out / "model.onnx", file, force=True)
    here = Path(__file__).parent
    for name in PAGE:
        shutil.copy(here / name, out / name)
    shutil.copy(model / "vocab.txt", out / "vocab.txt")
    texts = json.loads((here / "texts.json").read_text())
    shown = {**texts, "adapters": [adapter.name for adapter in loaded]}
    (out / "page.json").write_text(json.dumps(shown, indent=2) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("adapters", nargs="+", type=Path)
    parser.add_argument("-o", "--out", type=Path, required=True)
    given = parser.parse_args()
    build(load_extra() if given.model == "demo" else Path(given.model), given.adapters, given.out)
