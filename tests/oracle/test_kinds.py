"""Every kind of adapter that PEFT has, on every layer and dtype that it adapts, beside PEFT."""

from __future__ import annotations

import copy
import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import fx, nn
from transformers.pytorch_utils import Conv1D

import lora_fx
from lora_fx import AdapterError, fold, inject, load_adapter, save_adapter, text, trace, unfold
from lora_fx.numerics import TOLERANCE
from lora_fx.testing import Between, relative

pytestmark = [
    # PEFT says what it does about Conv1D, what it saves besides, and what it makes of odd sizes.
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer"),
    pytest.mark.filterwarnings("ignore:Invalid `oft_block_size`"),
    pytest.mark.filterwarnings("ignore:.*LoRA tensor.s. have invalid shape.*lora_B.bias"),
    pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed but the targeted layer"),
    pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups > 1"),
]


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(6, 10), (7, 6)),
    "linear_no_bias": (lambda: nn.Linear(6, 10, bias=False), (7, 6)),
    "transposed": (lambda: Conv1D(10, 6), (7, 6)),
    "embedding": (lambda: nn.Embedding(11, 10), (7,)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1), (4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, stride=(2, 1), padding=1), (4, 7, 8)),
    "conv2d_point": (lambda: nn.Conv2d(4, 6, 1, bias=False), (4, 7, 8)),
    "conv3d": (lambda: nn.Conv3d(4, 6, (3, 3, 1), padding=(1, 0, 0)), (4, 5, 6, 3)),
}
LORA: dict[str, Any] = {"r": 2, "lora_alpha": 3}
_HOME = tempfile.TemporaryDirectory()
KINDS: dict[str, Callable[[], Any]] = {
    "lora": lambda: peft.LoraConfig(**LORA),
    "rslora": lambda: peft.LoraConfig(**LORA, use_rslora=True),
    "lora_bias": lambda: peft.LoraConfig(**LORA, lora_bias=True),
    "dora": lambda: peft.LoraConfig(**LORA, use_dora=True),
    "dora_rslora": lambda: peft.LoraConfig(**LORA, use_dora=True, use_rslora=True),
    "adalora": lambda: peft.AdaLoraConfig(init_r=3, target_r=2, lora_alpha=5, total_step=10),
    "vera": lambda: peft.VeraConfig(r=3, projection_prng_key=5),
    "loha": lambda: peft.LoHaConfig(r=2, alpha=3),
    "loha_effective": lambda: peft.LoHaConfig(r=2, alpha=3, use_effective_conv2d=True),
    "lokr": lambda: peft.LoKrConfig(r=1, alpha=3),
    "lokr_both": lambda: peft.LoKrConfig(r=1, alpha=3, decompose_both=True, decompose_factor=2),
    "lokr_effective": lambda: peft.LoKrConfig(r=2, alpha=3, use_effective_conv2d=True),
    "ia3": lambda: peft.IA3Config(feedforward_modules=[]),
    "ia3_in": lambda: peft.IA3Config(feedforward_modules=["layer"]),
    "oft": lambda: peft.OFTConfig(r=0, oft_block_size=2, use_cayley_neumann=False),
    "oft_neumann": lambda: peft.OFTConfig(r=0, oft_block_size=2),
    "oft_shared": lambda: peft.OFTConfig(r=0, oft_block_size=2, block_share=True),
}
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
CASES = [(layer, kind) for layer in LAYERS for kind in KINDS]
# Layers that PEFT 0.21 has no form of a kind for, by the start of the kind's name.
_LACKING = {
    "loha": {"transposed", "embedding", "conv3d"},
    "lokr": {"transposed", "embedding", "conv3d"},
    "oft": {"transposed", "conv1d", "conv3d"},
    "lora_bias": {"embedding"},
    "adalora": {"embedding", "conv1d", "conv3d"},
    "vera": {"embedding", "conv1d", "conv2d", "conv2d_point", "conv3d"},
    "ia3": {"embedding", "conv1d"},
}
# Its forward adds up patches that overlap, so that even an adapter of zeros changes the output.
_WRONG = {("conv2d", kind) for kind in KINDS if kind.startswith("oft")}
NOT_IN_PEFT = {
    c for c in CASES for kind, no in _LACKING.items() if c[1].startswith(kind) and c[0] in no
}
RIGHT = [c for c in CASES if c not in NOT_IN_PEFT | _WRONG]


def base_of(layer: str) -> nn.Module:
    torch.manual_seed(0)
    return Between(LAYERS[layer][0]()).eval()


def example(layer: str, batch: int = 4) -> torch.Tensor:
    make, sizes = torch.Generator().manual_seed(batch), LAYERS[layer][1]
    if layer == "embedding":
        return torch.randint(0, 11, (batch, *sizes), generator=make)
    return torch.randn(batch, *sizes, generator=make)


def owner_of(layer: str, kind: str) -> Any:
    """PEFT's model with an adapter of effect."""
    config = KINDS[kind]()
    config.target_modules = ["layer"]
    owner = peft.get_peft_model(base_of(layer), config)
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in owner.named_parameters():
            if parameter.requires_grad and ("magnitude" in name or "ia3" in name):
                parameter.mul_(torch.empty_like(parameter).uniform_(0.5, 1.5))
            elif parameter.requires_grad:
                parameter.normal_(0.0, 0.8 if "hada" in name else 0.4)
    return owner.eval()


@functools.cache
def saved(layer: str, kind: str) -> tuple[Path, Any]:
    """An adapter's directory, and the model that PEFT makes of it; both are only read."""
    path = Path(_HOME.name, f"{layer} {kind}", "french")
    owner_of(layer, kind).save_pretrained(path)
    return path, peft.PeftModel.from_pretrained(base_of(layer), path).eval()


@functools.cache
def traced(layer: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, fx.GraphModule]:
    """A base and its graph; both are only read."""
    base, x = base_of(layer).to(dtype), cast(example(layer), dtype)
    return base, trace(base, (x,), dynamic_shapes=({0: "batch"},))


def cast(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return x.to(dtype) if x.is_floating_point() else x


@pytest.mark.parametrize(("layer", "kind"), RIGHT)
def test_injected_folded_and_in_onnx_as_peft_computes_it(
    layer: str, kind: str, tmp_path: Path
) -> None:
    (path, owner), x = saved(layer, kind), example(layer, 6)
    base, gm = traced(layer)
    injected = inject(gm, load_adapter(path, base=base))
    folded = fold(injected)
    with torch.no_grad():
        wanted = owner(x)
        assert relative(injected(x), wanted) <= 1e-6
        assert relative(folded(x), wanted) <= 1e-5
        assert relative(gm(x), wanted) > 1e-2
    assert text(unfold(folded)) == text(injected)
    for form in (injected, folded):
        lora_fx.to_onnx(form, tmp_path / "m.onnx", force=True)
        (found,) = lora_fx.Session(tmp_path / "m.onnx", threads=1).run({"x": x}).values()
        assert relative(torch.from_numpy(found), wanted) <= 1e-5


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(("layer", "kind"), RIGHT)
def test_half_precision_is_within_the_table(layer: str, kind: str, dtype: str) -> None:
    path, _ = saved(layer, kind)
    half, gm = traced(layer, DTYPES[dtype])
    wide = copy.deepcopy(half).float()
    owner = peft.PeftModel.from_pretrained(wide, path).eval()
    other = cast(example(layer, 6), DTYPES[dtype])
    injected = inject(gm, load_adapter(path, base=half))
    tolerance = TOLERANCE[DTYPES[dtype]]
    with torch.no_grad():
        wanted = owner(cast(other, torch.float32))
        assert relative(injected(other), wanted) <= tolerance
        assert relative(fold(injected)(other), wanted) <= tolerance
        assert relative(gm(other), wanted) > 5 * tolerance


@pytest.mark.parametrize(("layer", "kind"), RIGHT)
def test_what_we_write_is_what_peft_computes(layer: str, kind: str, tmp_path: Path) -> None:
    (path, owner), x = saved(layer, kind), example(layer, 6)
    adapter = load_adapter(path, base=base_of(layer))
    save_adapter(adapter, tmp_path / "again")
    again = peft.PeftModel.from_pretrained(base_of(layer), tmp_path / "again").eval()
    with torch.no_grad():
        assert torch.equal(again(x), owner(x))
        assert relative(base_of(layer)(x), owner(x)) > 1e-2


@pytest.mark.parametrize(("layer", "kind"), sorted(_WRONG))
def test_what_peft_computes_wrongly_is_refused(layer: str, kind: str, tmp_path: Path) -> None:
    owner_of(layer, kind).save_pretrained(tmp_path / "french")
    with pytest.raises(AdapterError, match="layer: OFT of PEFT on a convolution"):
        load_adapter(tmp_path / "french", base=base_of(layer))


@pytest.mark.parametrize(("layer", "kind"), sorted(NOT_IN_PEFT))
def test_what_is_left_out_is_what_peft_has_not(layer: str, kind: str) -> None:
    with pytest.raises((ValueError, TypeError, RuntimeError, NotImplementedError)):
        owner_of(layer, kind)(example(layer))
