"""Small random models, and PEFT as the writer of their adapters."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lora_fx
from lora_fx import Adapter

Tensors = dict[str, torch.Tensor]
MLP_INPUT = torch.linspace(-1, 1, 84).reshape(4, 7, 3)
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2], [6, 5, 3, 5, 8, 9, 7]])


class Mlp(nn.Module):
    """Ragged sizes tell axes apart; numbered layers, a norm, a layer without bias, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 5)
        self.norm = nn.LayerNorm(5)
        self.layers = nn.ModuleList([nn.Linear(5, 7), nn.Linear(7, 6), nn.Linear(6, 4)])
        self.block = nn.ModuleDict({"fc": nn.Linear(4, 9, bias=False)})
        self.classifier = nn.Linear(9, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.norm(self.fc(x)))
        for layer in self.layers:
            x = torch.tanh(layer(x))
        output: torch.Tensor = self.classifier(torch.tanh(self.block["fc"](x)))
        return output


ARCHITECTURES: dict[str, tuple[str, dict[str, int]]] = {
    "bert": ("BertForSequenceClassification", {}),
    "gpt2": ("GPT2LMHeadModel", {"n_embd": 12}),
    "llama": ("LlamaForCausalLM", {"num_hidden_layers": 3}),
}


class Lab:
    """Models, and adapters that PEFT writes and reads in one directory."""

    def __init__(self, root: Path, tiny: Callable[..., nn.Module]) -> None:
        self.root = root
        self.tiny = tiny

    def base(self, kind: str) -> nn.Module:
        """A small model with weights that depend on its kind alone, in float32."""
        torch.manual_seed(0)
        if kind == "mlp":
            return Mlp().eval()
        architecture, changes = ARCHITECTURES[kind]
        return self.tiny(architecture, **changes).eval()

    def run(self, kind: str, model: nn.Module) -> torch.Tensor:
        """The model's output for an input that depends on its kind alone."""
        with torch.no_grad():
            is_mlp = kind == "mlp"
            output: torch.Tensor = model(MLP_INPUT) if is_mlp else model(input_ids=IDS).logits
        return output

    def write(self, kind: str = "mlp", dtype: torch.dtype = torch.float32, **options: Any) -> Path:
        """Lets PEFT write an adapter with random weights, as if trained, in a dtype."""
        directory = self.root / f"by_peft_{len(list(self.root.iterdir()))}"
        config = peft.LoraConfig(**{"r": 2, "lora_alpha": 3, "target_modules": ["fc"], **options})
        model = peft.get_peft_model(self.base(kind), config)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.normal_()
        model.save_pretrained(str(directory))
        self.edit_tensors(directory, lambda t: {key: value.to(dtype) for key, value in t.items()})
        return directory

    def read(self, kind: str, directory: Path) -> nn.Module:
        """The base with an adapter, as PEFT loads it."""
        return peft.PeftModel.from_pretrained(self.base(kind), str(directory)).eval()

    def edit_config(self, directory: Path, **changes: object) -> None:
        """Sets fields of an adapter's config; the value ``...`` removes one."""
        file = directory / "adapter_config.json"
        fields = {**json.loads(file.read_text()), **changes}
        file.write_text(json.dumps({k: v for k, v in fields.items() if v is not ...}))

    def edit_tensors(self, directory: Path, change: Callable[[Tensors], Tensors]) -> None:
        """Rewrites an adapter's tensors."""
        file = directory / "adapter_model.safetensors"
        save_file(change(load_file(file)), file, metadata={"format": "pt"})


@pytest.fixture
def lab(tmp_path: Path, tiny: Callable[..., nn.Module]) -> Lab:
    return Lab(tmp_path, tiny)


Fits = Callable[[Adapter, nn.Module, torch.Tensor, torch.Tensor], None]


@pytest.fixture
def fits(relative: Callable[[Any, Any], float]) -> Fits:
    """Asserts that a base with an adapter computes what its owner does, and that it matters."""

    def check(adapter: Adapter, base: nn.Module, x: torch.Tensor, expected: torch.Tensor) -> None:
        gm = lora_fx.trace(base.eval(), (x,))
        louder = {p: replace(u, scale=1.1 * u.scale) for p, u in adapter.updates.items()}
        off = Adapter(adapter.name, louder, adapter.replacements)
        with torch.no_grad():
            assert relative(lora_fx.inject(gm, adapter)(x), expected) <= 1e-5
            assert relative(lora_fx.inject(gm, off)(x), expected) > 1e-3
            assert relative(gm(x), expected) > 1e-2

    return check


def _same(found: Adapter, expected: Adapter) -> None:
    assert dict(found.updates).keys() == dict(expected.updates).keys()
    for path, update in found.updates.items():
        other = expected.updates[path]
        assert update.scale == other.scale, path
        _same_bits(update.down, other.down)
        _same_bits(update.up, other.up)
    assert dict(found.replacements).keys() == dict(expected.replacements).keys()
    for name, tensor in found.replacements.items():
        _same_bits(tensor, expected.replacements[name])


def _same_bits(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    assert torch.equal(
        found.contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8)
    )


@pytest.fixture
def same() -> Callable[[Adapter, Adapter], None]:
    """Asserts that two adapters are one, bit for bit; their kinds may differ."""
    return _same
