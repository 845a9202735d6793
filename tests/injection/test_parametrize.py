"""Parameters that no layer alone reads: the weights of many experts."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import fx, nn

import lora_fx
from lora_fx import Adapter, fold, inject, load_adapter, text, trace, unfold
from lora_fx.adapters.adapter import WeightUpdate
from lora_fx.adapters.other_updates import added
from lora_fx.export.program.example_inputs import example_inputs
from lora_fx.export.program.without_retracing import program_of
from lora_fx.passes import FoldLora, StripLora
from lora_fx.testing import Between, relative

SIZES: dict[str, Any] = {
    "hidden_size": 12,
    "intermediate_size": 10,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 31,
    "num_local_experts": 3,
    "num_experts_per_tok": 2,
    "use_cache": False,
    "pad_token_id": 0,
}
TARGETS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


@pytest.fixture(scope="module")
def mixtral() -> tuple[Any, fx.GraphModule]:
    torch.manual_seed(0)
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**SIZES)).eval()
    model.set_experts_implementation("batched_mm")
    ids = torch.randint(1, 31, (2, 5))
    axes = {"input_ids": {0: "batch", 1: "length"}}
    return model, trace(model, (), {"input_ids": ids}, dynamic_shapes=axes)


def saved(model: Any, path: Path, targets: list[str]) -> Any:
    config = peft.LoraConfig(
        r=2, lora_alpha=3, target_modules=["q_proj"], target_parameters=targets
    )
    owner = peft.get_peft_model(copy.deepcopy(model), config)
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in owner.named_parameters():
            if "lora_" in name:
                parameter.normal_(0.0, 0.4)
    owner.save_pretrained(path)
    return owner.eval()


@pytest.mark.parametrize("targets", [TARGETS, TARGETS[:1], TARGETS[1:]])
def test_experts_equal_peft_injected_folded_and_in_onnx(
    mixtral: Any, targets: list[str], tmp_path: Path
) -> None:
    model, gm = mixtral
    owner = saved(model, tmp_path / "french", targets)
    adapter = load_adapter(tmp_path / "french", base=model)
    injected = inject(gm, adapter)
    folded = fold(injected)
    ids = torch.randint(1, 31, (3, 7))
    with torch.no_grad():
        wanted = owner(ids).logits
        assert relative(injected(input_ids=ids).logits, wanted) <= 1e-6
        assert relative(folded(input_ids=ids).logits, wanted) <= 1e-5
        assert relative(gm(input_ids=ids).logits, wanted) > 1e-2
    assert "lora_" not in text(folded)
    assert FoldLora()(folded).modified is False
    assert text(unfold(folded)) == text(injected)
    assert text(StripLora()(injected).graph_module) == text(gm)
    assert program_of(folded, example_inputs(folded, None, None, None)) is not None  # as traced
    path = tmp_path / "m.onnx"
    lora_fx.to_onnx(folded, path)
    (logits,) = lora_fx.Session(path).run({"input_ids": ids}).values()
    assert relative(torch.from_numpy(logits), wanted) <= 1e-5


class Experts(nn.Module):
    """Square weights of three experts, called ``weight``, which the model itself transposes."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 5, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.matmul(x.unsqueeze(1), self.weight.transpose(1, 2)).sum(1)


@pytest.mark.parametrize("path", ["layer", "layer.weight"])
def test_calls_of_the_model_on_a_parameter_stay_its_own(path: str) -> None:
    torch.manual_seed(0)
    model, x, delta = Between(Experts()).eval(), torch.randn(4, 7, 5), torch.randn(3, 5, 5)
    gm = trace(model, (x,))
    injected = inject(gm, Adapter("a", {path: WeightUpdate("full", added(delta), (3, 5, 5))}))
    tuned = copy.deepcopy(model)
    with torch.no_grad():
        tuned.layer.weight += delta
        assert relative(injected(x), tuned(x)) <= 1e-6
        assert relative(fold(injected)(x), tuned(x)) <= 1e-6
        assert relative(gm(x), tuned(x)) > 1e-2
    stripped = StripLora()(injected).graph_module
    assert text(stripped) == text(gm)
    assert relative(stripped(x), model(x)) == 0
