"""Folding an adapter into a checkpoint, beside PEFT's merge_and_unload."""

from __future__ import annotations

import gc
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import nn

import lora_fx
from benchmarks.memory import peak
from lora_fx.graph.lazy_tensor import evaluate, get_unevaluated

RANK = 16
# Qwen2-0.5B's shape, and one of a tenth of its layers.
SIZES = {"0.2B": 3, "0.5B": 24}


SHAPE = {
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 151_936,
    "tie_word_embeddings": True,
}


def checkpoint(directory: Path, layers: int, **changes: Any) -> None:
    """Saves a model of random weights and an adapter for all its linear layers."""
    transformers.utils.logging.disable_progress_bar()
    config = transformers.Qwen2Config(**{**SHAPE, "num_hidden_layers": layers, **changes})
    model = transformers.Qwen2ForCausalLM(config)
    model.save_pretrained(directory)
    lora = peft.LoraConfig(r=RANK, target_modules="all-linear", init_lora_weights=False)
    peft.get_peft_model(model, lora).save_pretrained(directory / "adapter")


def loaded(directory: Path) -> nn.Module:
    """The checkpoint, memory-mapped."""
    model: nn.Module = transformers.Qwen2ForCausalLM.from_pretrained(directory)
    return model.eval()


def ours(directory: Path) -> Callable[[], Any]:
    """Folds an injected graph and computes every folded weight once, as an export does."""
    inputs = {"input_ids": torch.arange(16).reshape(2, 8), "use_cache": False}
    gm = lora_fx.trace(loaded(directory), (), inputs)
    injected = lora_fx.inject(gm, lora_fx.load_adapter(directory / "adapter"))

    def run() -> None:
        folded = lora_fx.fold(injected)
        for name in {str(node.target) for node in folded.graph.find_nodes(op="get_attr")}:
            evaluate(get_unevaluated(folded, name))

    return run


def theirs(directory: Path) -> Callable[[], Any]:
    """PEFT merges a wrapped model into the model's own weights."""
    return peft.PeftModel.from_pretrained(loaded(directory), directory / "adapter").merge_and_unload


def measured(step: Callable[[], Any]) -> tuple[float, float]:
    """Processor seconds and MB of anonymous memory, without garbage collection."""
    with peak() as memory:
        gc.disable()
        start = time.process_time()
        step()
        seconds = time.process_time() - start
        gc.enable()
    return seconds, memory.megabytes


def run(
    sizes: dict[str, int] = SIZES, repeats: int = 5, **changes: Any
) -> dict[str, dict[str, float]]:
    """Both in turn, each on a checkpoint that was just loaded.

    Returns:
        By size, medians over the repeats: seconds, MB, and PEFT over ours for both.
    """
    rows = {}
    for name, layers in sizes.items():
        with tempfile.TemporaryDirectory() as directory:
            checkpoint(Path(directory), layers, **changes)
            pairs = [
                (measured(ours(Path(directory))), measured(theirs(Path(directory))))
                for _ in range(repeats)
            ]
        median = statistics.median
        rows[name] = {
            "fold s": median(one[0] for one, _ in pairs),
            "PEFT s": median(two[0] for _, two in pairs),
            "times as fast": median(two[0] / one[0] for one, two in pairs),
            "fold MB": median(one[1] for one, _ in pairs),
            "PEFT MB": median(two[1] for _, two in pairs),
        }
    return rows
