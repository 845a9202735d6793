"""PEFT as the writer of adapters for small models, on disk."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_fx.testing.models import Blocks
from lora_fx.testing.zoo import tiny

Tensors = dict[str, torch.Tensor]
MLP_INPUT = torch.linspace(-1, 1, 84).reshape(4, 7, 3)
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2], [6, 5, 3, 5, 8, 9, 7]])

_ARCHITECTURES: dict[str, tuple[str, dict[str, int]]] = {
    "bert": ("BertForSequenceClassification", {}),
    "gpt2": ("GPT2LMHeadModel", {"n_embd": 12}),
    "llama": ("LlamaForCausalLM", {"num_hidden_layers": 3}),
}


def config_in(path: Path) -> dict[str, Any]:
    """The fields of a PEFT config: beside the tensors in a directory, or in a file's metadata."""
    from safetensors import safe_open

    if path.is_dir():
        fields: dict[str, Any] = json.loads((path / "adapter_config.json").read_text())
        return fields
    with safe_open(path, framework="pt") as file:
        fields = json.loads(file.metadata()["lora_adapter_metadata"])
    return fields


class Lab:
    """Models, and adapters that PEFT writes and reads in one directory.

    Args:
        root: the directory.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def base(self, kind: str) -> nn.Module:
        """A small model with weights that depend on its kind alone, in float32."""
        torch.manual_seed(0)
        if kind == "mlp":
            return Blocks().eval()
        architecture, changes = _ARCHITECTURES[kind]
        model: nn.Module = tiny(architecture, **changes)
        return model.eval()

    def run(self, kind: str, model: nn.Module) -> torch.Tensor:
        """The model's output for an input that depends on its kind alone."""
        with torch.no_grad():
            is_mlp = kind == "mlp"
            output: torch.Tensor = model(MLP_INPUT) if is_mlp else model(input_ids=IDS).logits
        return output

    def write(self, kind: str = "mlp", dtype: torch.dtype = torch.float32, **options: Any) -> Path:
        """Lets PEFT write an adapter with random weights, as if trained, in a dtype."""
        import peft

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
        import peft

        model: nn.Module = peft.PeftModel.from_pretrained(self.base(kind), str(directory))
        return model.eval()

    def edit_config(self, directory: Path, **changes: object) -> None:
        """Sets fields of an adapter's config; the value ``...`` removes one."""
        file = directory / "adapter_config.json"
        fields = {**json.loads(file.read_text()), **changes}
        file.write_text(json.dumps({k: v for k, v in fields.items() if v is not ...}))

    def edit_tensors(self, directory: Path, change: Callable[[Tensors], Tensors]) -> None:
        """Rewrites an adapter's tensors."""
        from safetensors.torch import load_file, save_file

        file = directory / "adapter_model.safetensors"
        save_file(change(load_file(file)), file, metadata={"format": "pt"})
