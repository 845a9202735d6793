"""From a checkpoint and an adapter on disk to a merged ONNX file: what whole processes take.

Ours, verified; and what else makes such a file: onnxruntime-genai's builder and mobius, each given
what PEFT merged in memory, and PEFT with torch.onnx. All files are held against PEFT's outputs.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.memory import anonymous

CLIENTS = Path(__file__).parent.parent / ".venv" / "clients"
SIZES = {"0.2B": (1024, 12), "0.5B": (1280, 24)}  # features, layers
RANK, HEAD = 16, 64
VOCABULARY = 32_000
Rows = dict[str, dict[str, float]]


def ids() -> torch.Tensor:
    """Two rows of eight tokens."""
    return torch.arange(3, 19).reshape(2, 8)


def checkpoint(directory: Path, size: int, layers: int) -> None:
    """A Llama of random weights, a tokenizer, an adapter, and the logits that PEFT gives."""
    import peft
    import tokenizers
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=size,
        intermediate_size=size * 8 // 3 // 64 * 64,
        num_hidden_layers=layers,
        num_attention_heads=size // HEAD,
        vocab_size=VOCABULARY,
    )
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(directory)
    words = tokenizers.models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2}, unk_token="<unk>")
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(words), eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(directory)
    lora = peft.LoraConfig(r=RANK, target_modules="all-linear", init_lora_weights=False)
    tuned = peft.get_peft_model(model, lora).eval()
    tuned.save_pretrained(directory / "adapter")
    with torch.no_grad():
        np.save(directory / "wanted.npy", tuned(input_ids=ids()).logits.numpy())


def loaded(directory: Path) -> Any:
    """The base, memory-mapped."""
    import transformers

    return transformers.LlamaForCausalLM.from_pretrained(directory).eval()


def merged(directory: Path) -> Any:
    """What PEFT makes of both."""
    import peft

    tuned = peft.PeftModel.from_pretrained(loaded(directory), directory / "adapter")
    return tuned.merge_and_unload()


def ours(directory: Path) -> None:
    """Traced, folded, written and verified."""
    import lora_fx
    import lora_fx.export

    (directory / "ours").mkdir()
    inputs = {"input_ids": ids(), "use_cache": False}
    shapes = {"input_ids": {0: "batch", 1: "length"}, "use_cache": None}
    gm = lora_fx.trace(loaded(directory), (), inputs, dynamic_shapes=shapes)
    adapter = lora_fx.load_adapter(directory / "adapter")
    folded = lora_fx.fold(lora_fx.inject(gm, adapter))
    assert lora_fx.to_onnx(folded, directory / "ours" / "model.onnx").verified


def genai(directory: Path) -> None:
    """The builder, which is handed the merged model where it would load one."""
    import transformers
    from onnxruntime_genai.models.builder import (  # type: ignore[import-not-found]
        create_model,
        parse_extra_options,
    )

    model = merged(directory)
    transformers.AutoModelForCausalLM.from_pretrained = lambda *_, **__: model
    places = str(directory), str(directory / "genai"), "fp32", "cpu", str(directory / "cache")
    options = parse_extra_options("model", *places, [])
    create_model("model", *places, **options)


def mobius(directory: Path) -> None:
    """Mobius' graph with the merged weights."""
    from mobius import build  # type: ignore[import-not-found]

    package = build(str(directory), load_weights=False, dtype="f32")
    package.apply_weights(merged(directory).state_dict())
    package.save(str(directory / "mobius"))


class Logits(torch.nn.Module):
    """A model of transformers that returns a tensor, as torch.onnx wants it."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """The logits."""
        logits: torch.Tensor = self.model(input_ids=input_ids, use_cache=False).logits
        return logits


def torch_onnx(directory: Path) -> None:
    """PEFT's merge, torch.onnx.export and save."""
    free = ({0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC},)
    module = Logits(merged(directory)).eval()
    program = torch.onnx.export(module, (ids(),), dynamo=True, dynamic_shapes=free, verbose=False)
    assert program is not None
    (directory / "torch.onnx").mkdir()
    program.save(str(directory / "torch.onnx" / "model.onnx"), external_data=True)


SIDES: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "ours": (ours, ()),
    "genai": (genai, ("onnxruntime_genai",)),
    "mobius": (mobius, ("mobius", "onnx_shape_inference")),
    "torch.onnx": (torch_onnx, ()),
}


def measured(side: str, directory: Path) -> dict[str, float]:
    """Processor and wall seconds of a process, and its anonymous memory at the peak, in MB."""
    packages = directory / "packages" / side
    packages.mkdir(parents=True)
    for name in SIDES[side][1]:
        (packages / name).symlink_to(CLIENTS.resolve() / name)
    env = os.environ | {"PYTHONPATH": str(packages), "HF_HUB_OFFLINE": "1"}
    begin, peak = time.perf_counter(), 0.0
    with (directory / "said.txt").open("w+") as said:
        command = [sys.executable, "-W", "ignore", __file__, side, str(directory)]
        child = subprocess.Popen(command, env=env, stdout=said, stderr=said)
        while True:
            done, status, used = os.wait4(child.pid, os.WNOHANG)
            if done:
                break
            peak = max(peak, anonymous(child.pid))
            time.sleep(0.05)
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            raise RuntimeError(f"{side} failed:\n{Path(said.name).read_text()[-2000:]}")
    wall = time.perf_counter() - begin
    return {"processor s": used.ru_utime + used.ru_stime, "wall s": wall, "peak MB": peak}


def difference(model: Path, wanted: np.ndarray[Any, Any], heads: int) -> float:
    """How far a file is from PEFT's logits, over their norm."""
    session = ort.InferenceSession(model)
    batch, length = ids().shape
    known = {
        "input_ids": ids().numpy(),
        "attention_mask": np.ones((batch, length), np.int64),
        "position_ids": np.arange(length)[None].repeat(batch, 0),
    }
    feeds = {}
    for value in session.get_inputs():
        if value.name in known:
            feeds[value.name] = known[value.name]
        else:  # a cache that is still empty
            feeds[value.name] = np.zeros((batch, heads, 0, HEAD), np.float32)
    logits = session.run(["logits"] if model.parent.name != "torch.onnx" else None, feeds)[0]
    return float(np.linalg.norm(logits - wanted) / np.linalg.norm(wanted))


def run(sizes: dict[str, tuple[int, int]] = SIZES) -> Rows:
    """Each side at each size, and what it takes over genai's builder."""
    rows: Rows = {}
    for name, (size, layers) in sizes.items():
        with tempfile.TemporaryDirectory() as home:
            directory = Path(home)
            checkpoint(directory, size, layers)
            wanted = np.load(directory / "wanted.npy")
            found = {side: measured(side, directory) for side in SIDES}
            for side, row in found.items():
                row["difference"] = difference(
                    directory / side / "model.onnx", wanted, size // HEAD
                )
                for column in ("processor s", "peak MB"):
                    row[f"{column} / genai"] = row[column] / found["genai"][column]
                rows[f"{name}, {side}"] = row
    return rows


if __name__ == "__main__":
    torch.set_num_threads(1)
    SIDES[sys.argv[1]][0](Path(sys.argv[2]))
