"""Every type of PEFT on every layer that it has it for, PEFT being writer, reader and oracle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_fx.formats import load_adapter, save_adapter
from lora_fx.update import Update

pytestmark = [
    # PEFT says what it does about Conv1D, groups, seeds, and about sizes that blocks do not divide.
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to"),
    pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups > 1"),
    pytest.mark.filterwarnings("ignore:Specified to not (load|save) vera_A and vera_B"),
    # PEFT takes the one-dimensional lora_B.bias for a damaged matrix.
    pytest.mark.filterwarnings("ignore:Adapter 'default'. .* have invalid shape"),
    # PEFT does not see the projection's bias, nor the keys of parameters and of AdaLoRA's masks.
    pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed but the targeted layer"),
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match"),
]


def canonical(module: Any) -> torch.Tensor:
    """The weight of a layer as (out, in, *kernel)."""
    weight: torch.Tensor = module.weight.detach()
    return weight.T if isinstance(module, nn.Embedding | Conv1D) else weight


def weight_at(model: nn.Module, path: str) -> torch.Tensor:
    """What an update of a path acts on."""
    named = dict(model.named_parameters())
    if path in named:
        return named[path].detach()
    module = model.get_submodule(path)
    if isinstance(module, nn.MultiheadAttention):
        weight: torch.Tensor = module.in_proj_weight.detach()
        return weight
    return canonical(module)


def test_every_weight_is_the_one_that_peft_merges(peft_case: Any, relative: Any) -> None:
    adapter = load_adapter(peft_case.directory, base=peft_case.base)
    oracle = peft_case.load(peft_case.directory)
    grouped = [p for p, u in adapter.updates.items() if isinstance(u, Update) and u.groups > 1]
    merged = None if grouped else oracle.merge_and_unload()
    for path, update in adapter.updates.items():
        if merged is None or path == "mha.out_proj":
            continue  # no weight is it; PEFT merges the latter twice
        weight, wanted = weight_at(peft_case.base, path), weight_at(merged, path)
        assert relative(update.weight(weight), wanted) <= 1e-6, path
        assert relative(weight, wanted) > 1e-2, path


def test_what_is_written_is_what_was_read(peft_case: Any, relative: Any, tmp_path: Path) -> None:
    adapter = load_adapter(peft_case.directory, base=peft_case.base)
    save_adapter(adapter, tmp_path / "written")
    files = [d / "adapter_model.safetensors" for d in (peft_case.directory, tmp_path / "written")]
    original, written = map(load_file, files)
    assert original.keys() == written.keys()
    for key, tensor in original.items():
        assert tensor.dtype == written[key].dtype
        assert torch.equal(tensor, written[key]), key
    wanted = peft_case.run(peft_case.directory)
    assert torch.equal(peft_case.run(tmp_path / "written"), wanted)
    with torch.no_grad():
        assert relative(peft_case.base(peft_case.x), wanted) > 1e-2


def test_reading_again_gives_the_same(peft_case: Any, tmp_path: Path) -> None:
    first = load_adapter(peft_case.directory, base=peft_case.base, name="same")
    save_adapter(first, tmp_path / "written.safetensors", format="peft_file")
    second = load_adapter(tmp_path / "written.safetensors", base=peft_case.base, name="same")
    assert str(first) == str(second)
    for path, update in first.updates.items():
        pairs = zip(update.tensors(), second.updates[path].tensors(), strict=True)
        assert all(torch.equal(one, other) for one, other in pairs), path
