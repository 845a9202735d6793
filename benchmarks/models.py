"""Whole models with an adapter of rank 8 on every linear layer: each form over the merged one."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import fx

import lora_fx
from benchmarks.files import Active, adapter_for, agree, caller, session, write
from benchmarks.timing import columns, ratios
from lora_fx.demo.encoder import load_encoder, load_extra

RANK = 8
FORMS = ("merged", "chosen", "factored", "swappable")
BATCHES = ((1, 128), (8, 128))


def encoder() -> fx.GraphModule:
    """The sentence encoder of the demo, all-MiniLM-L6-v2."""
    ids = torch.randint(1000, 20_000, (2, 16), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    shapes = {name: {0: "batch", 1: "length"} for name in inputs}
    return lora_fx.trace(load_encoder(load_extra()), (), inputs, dynamic_shapes=shapes)


def decoder() -> fx.GraphModule:
    """A small decoder of Llama's architecture, with random weights."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=4000,
        use_cache=False,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    ids = torch.randint(0, 4000, (2, 16))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    shapes = {name: {0: "batch", 1: "length"} for name in inputs}
    return lora_fx.trace(model, (), inputs, dynamic_shapes=shapes)


def measure(
    name: str, gm: fx.GraphModule, rounds: int, block: float
) -> dict[str, dict[str, float]]:
    """All forms of one model at each batch."""
    adapter = adapter_for(gm, RANK)
    with tempfile.TemporaryDirectory() as directory:
        opened: dict[str, Any] = {}
        for form in FORMS:
            write(gm, adapter, form, Path(directory) / f"{form}.onnx")
            opened[form] = session(Path(directory) / f"{form}.onnx")
        model, file = (Path(directory) / name for name in ("swappable.onnx", "a.onnx_adapter"))
        active = Active(adapter, model, file)
    rows = {}
    for batch, length in BATCHES:
        ids = np.random.default_rng(0).integers(1000, 4000, (batch, length))
        inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
        options = {"swappable": active}
        runs = {form: caller(opened[form], inputs, options.get(form)) for form in FORMS}
        agree(runs)
        found = columns(ratios(runs, "merged", rounds, block))
        rows[f"{name}, {batch} x {length}"] = {"allowed": 1.08} | found
    return rows


MODELS: dict[str, Callable[[], fx.GraphModule]] = {"MiniLM": encoder, "decoder": decoder}


def run(
    models: tuple[str, ...] = ("MiniLM", "decoder"), rounds: int = 25, block: float = 0.02
) -> dict[str, dict[str, float]]:
    """Every model in turn."""
    rows: dict[str, dict[str, float]] = {}
    for name in models:
        rows |= measure(name, MODELS[name](), rounds, block)
    return rows
