"""What an error says of paths that match nothing: how they differ, and so why."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

import lora_fx
from lora_fx.errors import AdapterError
from lora_fx.injection.unmatched import cause
from lora_fx.testing import relative

LLAMA = [
    f"model.layers.{n}.{name}" for n in range(3) for name in ("self_attn.q_proj", "mlp.up_proj")
]
HEADLESS = [path.removeprefix("model.") for path in LLAMA]
CASES: dict[str, tuple[list[str], list[str], str]] = {
    "a wrapper around the adapter's": (["wrapped." + p for p in LLAMA], LLAMA, "by 'wrapped.'"),
    "a wrapper around the graph's": (HEADLESS, LLAMA, "by 'model.'"),
    "a part that was moved": (
        ["language_" + p.replace("model.", "model.model.", 1) for p in LLAMA],
        ["model.language_model." + p for p in HEADLESS],
        "6 of them begin with 'language_model.model.' where the graph's layers begin with "
        "'model.language_model.'",
    ),
    "more layers": (
        [p.replace(".2.", ".31.").replace(".1.", ".9.") for p in LLAMA],
        LLAMA,
        "of more layers: it has model.layers.31.self_attn.q_proj, and the graph ends with "
        "model.layers.2.self_attn.q_proj",
    ),
    "a head": (["lm_head"], HEADLESS, "A LlamaModel computes nothing that is called lm_head: "),
    "a head that is stored whole": (["score.weight"], HEADLESS, "nothing that is called score: "),
    "a model that PEFT wrapped": (
        ["fc"], ["base_model.model.fc.base_layer", "base_model.model.fc.lora_A.default"],
        "PEFT has wrapped base_model.model.fc already, whose own layer is "
        "base_model.model.fc.base_layer: trace the model as it was before",
    ),
    "another architecture": (
        ["h.0.attn.c_attn", "h.0.mlp.c_fc"], LLAMA, "nothing that is called c_attn or c_fc: ",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_cause_is_said(case: str) -> None:
    unknown, paths, want = CASES[case]
    said = cause(unknown, paths, "LlamaModel")
    assert want in said
    assert said.count(": ") <= 2, "one cause alone"


def test_several_causes_are_all_said() -> None:
    said = cause([*HEADLESS, "score.weight"], LLAMA, "LlamaModel")
    assert "by 'model.'" in said
    assert "called score" in said


def test_nothing_is_said_of_what_cannot_be_told() -> None:
    assert cause(["fc"], ["fc.fc"], "Net") == " The paths differ by 'fc.': trace the module that " \
        "the adapter was made for."  # fmt: skip
    assert cause(["b.q_proj.x"], ["a.x.q_proj.k"], "Net") == ""
    assert cause(["h.1.fc"], ["h.0.fc", "h.2.fc"], "Net") == ""
    assert cause([], [], "Net") == ""


def small(kind: str, **more: Any) -> Any:
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=8, intermediate_size=12, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=9, pad_token_id=0, use_cache=False, **{"num_hidden_layers": 1, **more},
    )  # fmt: skip
    return getattr(transformers, kind)(config).eval()


def adapter_for(*paths: str) -> lora_fx.Adapter:
    gen = torch.Generator().manual_seed(0)
    shapes = dict.fromkeys(paths, (8, 8)) | ({"lm_head": (9, 8)} if "lm_head" in paths else {})
    return lora_fx.Adapter("a", {
        path: lora_fx.Update(
            torch.randn(2, into, generator=gen), torch.randn(out, 2, generator=gen), 1.0
        )
        for path, (out, into) in shapes.items()
    })  # fmt: skip


def test_a_model_without_its_head_is_named_by_its_class() -> None:
    gm = lora_fx.trace(small("LlamaModel"), (), {"input_ids": torch.tensor([[1, 2, 3]])})
    with pytest.raises(AdapterError, match="A LlamaModel computes nothing that is called lm_head"):
        lora_fx.inject(gm, adapter_for("layers.0.self_attn.q_proj", "lm_head"))


class Idle(torch.nn.Module):
    """A layer that its model does not call, as contact_head of ESM, and a holder of called ones."""

    def __init__(self) -> None:
        super().__init__()
        self.block = torch.nn.Sequential(torch.nn.Linear(8, 8))
        self.head = torch.nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.block(x)
        return y


@pytest.mark.parametrize("frontend", ["export", "symbolic"])
def test_a_layer_that_is_not_called_is_told_from_one_of_another_model(frontend: str) -> None:
    gm = lora_fx.trace(Idle().eval(), (torch.randn(3, 8),), frontend=frontend)
    idle = "The model has head, but calls nothing of it here: it changes nothing. Trace the "
    with pytest.raises(AdapterError, match=idle):
        lora_fx.inject(gm, adapter_for("block.0", "head"))
    with pytest.raises(AdapterError, match=r"has head, but .* nothing that is called score: "):
        lora_fx.inject(gm, adapter_for("block.0", "head", "score"))
    with pytest.raises(AdapterError, match="1 targets match nothing") as failed:
        lora_fx.inject(gm, adapter_for("block"))
    assert "calls nothing of it" not in str(failed.value)


class Unread(Idle):
    """A layer whose result nobody reads, as BERT's pooler beside its other heads."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.block(x)
        torch.tanh(self.head(y))
        return y


class First(Idle):
    """Such a layer in front: torch.export notes its guards as calls of what comes first."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.head(x)
        return super().forward(x)


class Sized(Idle):
    """A layer of whose result the sizes are read alone, and random numbers that nobody reads."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.head(x)
        torch.dropout(y, 0.5, self.training)
        return super().forward(x).reshape(y.shape)


@pytest.mark.parametrize(
    ("kind", "frontend"),
    [(Idle, "export"), (Unread, "export"), (First, "export"), (Sized, "symbolic")],
)
def test_what_an_idle_layer_never_learned_is_left_out(
    kind: type[Idle], frontend: Any, tmp_path: Path
) -> None:
    model, x = kind().eval(), torch.randn(3, 8)
    gm = lora_fx.trace(model, (x,), frontend=frontend)
    adapter = adapter_for("block.0", "head")
    with pytest.raises(AdapterError, match="has head, but calls nothing of it here"):
        lora_fx.inject(gm, adapter)
    head = dataclasses.replace(adapter.updates["head"], up=torch.zeros(8, 2))
    adapter = dataclasses.replace(adapter, updates=adapter.updates | {"head": head})
    result = lora_fx.passes.InjectLora(adapter)(gm)
    skipped = [(e.path, e.text) for e in result.edits if e.action == "skip"]
    assert skipped == [("head", "the update is zero, and the model calls nothing of the layer")]
    tuned = result.graph_module
    assert relative(tuned(x), model(x)) > 0.1
    file = tmp_path / "model.onnx"
    report = lora_fx.to_onnx(tuned, file, adapters="input")
    assert (report.verified, report.slots) == (True, ["block.0"])
    lora_fx.export_adapter(adapter, file, tmp_path / "a.onnx_adapter")
    found = lora_fx.Session(file).run({"x": x}, adapter=tmp_path / "a.onnx_adapter")
    assert relative(torch.from_numpy(found["output"]), tuned(x)) < 1e-5
    nothing = dataclasses.replace(adapter, updates={"head": head})
    with pytest.raises(AdapterError, match="no slot at head"):
        lora_fx.export_adapter(nothing, file, tmp_path / "b.onnx_adapter")
    assert lora_fx.to_onnx(lora_fx.fold(tuned), tmp_path / "merged.onnx").verified


class Elsewhere(torch.nn.Module):
    """A weight that is normalised before its root multiplies with it, and a block of autocast."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.fc = torch.nn.Linear(8, 5, bias=False), torch.nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            y = self.fc(x)
        weight = torch.nn.functional.normalize(self.head.weight)
        return torch.nn.functional.linear(y.float(), weight)


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("head", r"head\.weight is read by calls of other modules, .*target_parameters"),
        ("fc", r"fc\.weight, fc\.bias is read in a block of its own, as autocast .*dtype"),
    ],
)
def test_a_weight_that_is_read_elsewhere_is_not_called_idle(path: str, reason: str) -> None:
    gm = lora_fx.trace(Elsewhere().eval(), (torch.randn(3, 8),))
    with pytest.raises(AdapterError, match=reason):
        lora_fx.inject(gm, adapter_for(path))


def test_a_model_of_fewer_layers_is_named_by_its_last() -> None:
    gm = lora_fx.trace(small("LlamaForCausalLM"), (), {"input_ids": torch.tensor([[1, 2, 3]])})
    paths = [f"model.layers.{n}.self_attn.q_proj" for n in (0, 1)]
    with pytest.raises(AdapterError, match=r"it has model\.layers\.1.*ends with model\.layers\.0"):
        lora_fx.inject(gm, adapter_for(*paths))
