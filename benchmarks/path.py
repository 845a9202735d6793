"""From a checkpoint and an adapter on disk to an ONNX file: ours, verified, and PEFT's, unverified.

Each runs in a process of its own, so that neither finds memory or caches of the other's.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.memory import peak
from benchmarks.merge import checkpoint, loaded
from benchmarks.peers import Logits

SIZES = {"0.2B": 3, "0.5B": 24}
ADAPTERS = 9  # the second to the tenth

Stages = dict[str, float]


@contextmanager
def stage(stages: Stages, name: str) -> Iterator[None]:
    """Notes the seconds that something takes."""
    start = time.perf_counter()
    yield
    stages[name] = stages.get(name, 0.0) + time.perf_counter() - start


def ids() -> torch.Tensor:
    """Two rows of eight tokens."""
    return torch.arange(16).reshape(2, 8)


def ours(directory: Path) -> Stages:
    """Folded, written and verified; then a swappable model, and each further adapter for it."""
    import lora_fx
    import lora_fx.export  # loaded before anything is counted, as the other side's packages are

    stages: Stages = {}
    with peak() as memory:
        with stage(stages, "load"):
            model = loaded(directory)
        with stage(stages, "trace"):
            inputs = {"input_ids": ids(), "use_cache": False}
            shapes = {"input_ids": {0: "batch", 1: "length"}, "use_cache": None}
            gm = lora_fx.trace(model, (), inputs, dynamic_shapes=shapes)
        with stage(stages, "adapter"):
            adapter = lora_fx.load_adapter(directory / "adapter")
        with stage(stages, "fold"):
            folded = lora_fx.fold(lora_fx.inject(gm, adapter))
        report = lora_fx.to_onnx(folded, directory / "merged.onnx")
    stages |= {f"export: {name}": seconds for name, seconds in report.seconds.items()}
    stages["total"] = sum(stages.values())
    stages["peak MB"] = memory.megabytes
    del folded, report
    injected = lora_fx.inject(gm, adapter)
    path = directory / "swappable.onnx"
    with stage(stages, "swappable, once"):
        lora_fx.to_onnx(injected, path, adapters="input", verify=False)
    with stage(stages, "further adapters"):
        for number in range(ADAPTERS):
            another = lora_fx.load_adapter(directory / "adapter")
            file = directory / f"{number}.onnx_adapter"
            lora_fx.export_adapter(another, path, file, check=False)
    stages["a further adapter"] = stages.pop("further adapters") / ADAPTERS
    return stages


def theirs(directory: Path) -> Stages:
    """PEFT's merge, torch.onnx.export and save."""
    import onnxscript
    import peft

    assert onnxscript.__version__
    stages: Stages = {}
    with peak() as memory:
        with stage(stages, "load"):
            model = loaded(directory)
        with stage(stages, "adapter"):
            tuned = peft.PeftModel.from_pretrained(model, directory / "adapter")
        with stage(stages, "fold"):
            merged = tuned.merge_and_unload()
        with stage(stages, "export: convert"):
            dimensions = ({0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC},)
            program = torch.onnx.export(
                Logits(merged).eval(),
                (ids(),),
                dynamo=True,
                dynamic_shapes=dimensions,
                verbose=False,
            )
        with stage(stages, "export: write"):
            assert program is not None
            program.save(str(directory / "peer.onnx"), external_data=True)
    stages["total"] = sum(stages.values())
    stages["peak MB"] = memory.megabytes
    return stages


def child(side: str, directory: Path) -> Stages:
    """One side, in a process of its own."""
    command = [sys.executable, __file__, side, str(directory)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{side} failed:\n{done.stderr[-2000:]}")
    stages: Stages = json.loads(done.stdout.splitlines()[-1])
    return stages


def run(sizes: dict[str, int] = SIZES, **changes: Any) -> dict[str, dict[str, float]]:
    """Both sides at each size.

    Returns:
        Seconds by stage and MB of anonymous memory at the peak, and what ours takes of theirs.
    """
    rows = {}
    for name, layers in sizes.items():
        with tempfile.TemporaryDirectory() as directory:
            checkpoint(Path(directory), layers, **changes)
            both = {side: child(side, Path(directory)) for side in ("ours", "theirs")}
        mine, peer = both["ours"], both["theirs"]
        stages = {stage: 0.0 for side in both.values() for stage in side}
        rows |= {f"{name}, {side}": stages | values for side, values in both.items()}
        rows[f"{name}, ours / theirs"] = stages | {
            "total": mine["total"] / peer["total"],
            "peak MB": mine["peak MB"] / peer["peak MB"],
            "a further adapter": mine["a further adapter"] / peer["total"],
        }
    return rows


if __name__ == "__main__":
    torch.set_num_threads(1)
    side = {"ours": ours, "theirs": theirs}[sys.argv[1]]
    print(json.dumps(side(Path(sys.argv[2]))))
