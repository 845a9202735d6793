"""Small random models, and PEFT as the writer of their adapters."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

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
        injected = lora_fx.inject(gm, adapter)
        with torch.no_grad():
            assert relative(injected(x), expected) <= 1e-5
            assert relative(lora_fx.fold(injected)(x), expected) <= 1e-5
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


# Every type that PEFT 0.21 saves and that can be read here, on every layer that PEFT has it for.


class Two(nn.Module):
    """Two layers with something between them that is not affine."""

    def __init__(self, wide: nn.Module, narrow: nn.Module) -> None:
        super().__init__()
        self.wide, self.narrow = wide, narrow

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.narrow(torch.tanh(self.wide(x)))
        return result


class Attention(nn.Module):
    """An attention module that packs its projections, behind a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 6)
        self.mha = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.fc(x))
        result: torch.Tensor = self.mha(x, x, x, need_weights=False)[0]
        return result


class Experts(nn.Module):
    """Four experts 3 -> 5 -> 6 in two parameters, registered against the alphabet."""

    def __init__(self, is_transposed: bool) -> None:
        super().__init__()
        self.is_transposed = is_transposed
        up, down = torch.zeros(4, 5, 3), torch.zeros(4, 6, 5)
        self.up_proj = nn.Parameter(up.mT.clone() if is_transposed else up)
        self.down_proj = nn.Parameter(down.mT.clone() if is_transposed else down)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        up, down = (p.mT if self.is_transposed else p for p in (self.up_proj, self.down_proj))
        hidden = torch.tanh(torch.einsum("...i,eoi->...eo", x, up))
        return torch.einsum("...ei,eoi->...o", hidden, down)


class Bare(nn.Module):
    """A layer whose matrix has a name of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.zeros(6, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.kernel)


def _linear() -> nn.Module:
    return Two(nn.Linear(3, 5), nn.Linear(5, 7, bias=False))


def _even() -> nn.Module:
    return Two(nn.Linear(8, 12), nn.Linear(12, 4, bias=False))


def _transposed() -> nn.Module:
    return Two(Conv1D(5, 3), Conv1D(7, 5))


def _embedding() -> nn.Module:
    return Two(nn.Embedding(11, 6), nn.Linear(6, 7))


def _conv(kind: Any, **options: Any) -> Callable[[], nn.Module]:
    fields = {"kernel_size": 3, "stride": 2, "padding": 1} | options
    point = 2 if kind is nn.Conv3d else 1  # PEFT cannot merge into a Conv3d of one point
    return lambda: Two(kind(4, 6, **fields), kind(6, 7, point, bias=False))


def _experts(is_transposed: bool) -> Callable[[], nn.Module]:
    return lambda: Two(nn.Linear(3, 3), Experts(is_transposed))


_BOTH: dict[str, Any] = {"target_modules": ["wide", "narrow"]}
_PATTERNS = {"rank_pattern": {"wide": 3}, "alpha_pattern": {"^narrow": 5}}
_LORA: dict[str, Any] = {"r": 2, "lora_alpha": 3, **_BOTH}
_ADA: dict[str, Any] = {"init_r": 3, "lora_alpha": 5, "total_step": 9, **_BOTH}


def _lora(**options: Any) -> Any:
    return peft.LoraConfig(**{**_LORA, **options})


def _loha(**options: Any) -> Any:
    return peft.LoHaConfig(**{"r": 2, "alpha": 3, **_BOTH, **options})


def _lokr(**options: Any) -> Any:
    return peft.LoKrConfig(**{"r": 1, "alpha": 3, **_BOTH, **options})


def _oft(**options: Any) -> Any:
    return peft.OFTConfig(**{"oft_block_size": 2, **_BOTH, **options})


def _ia3(*inner: str, **options: Any) -> Any:
    return peft.IA3Config(**{**_BOTH, "feedforward_modules": [*inner], **options})


_SOME = {"rank_pattern": {"wide.lora_E.default": [True, False, True]}}
PeftCase = tuple[Callable[[], nn.Module], Callable[[], Any]]
PEFT_CASES: dict[str, PeftCase] = {
    "linear lora": (_linear, _lora),
    "linear rslora": (_linear, lambda: _lora(use_rslora=True, **_PATTERNS)),
    "linear patterns": (_linear, lambda: _lora(**_PATTERNS)),
    "linear dora": (_linear, lambda: _lora(use_dora=True)),
    "linear dora rslora": (_linear, lambda: _lora(use_dora=True, use_rslora=True, r=3)),
    "linear dora bias": (_linear, lambda: _lora(use_dora=True, bias="all")),
    "linear lora_bias": (_linear, lambda: _lora(target_modules=["wide"], lora_bias=True)),
    "linear bias": (_linear, lambda: _lora(target_modules=["wide"], bias="lora_only")),
    "linear saved": (
        _linear, lambda: _lora(target_modules=["wide"], modules_to_save=["narrow"]),
    ),
    "linear adalora": (_linear, lambda: peft.AdaLoraConfig(**_ADA)),
    "linear adalora pruned": (_linear, lambda: peft.AdaLoraConfig(**_ADA, **_SOME)),
    "linear adalora bias": (_linear, lambda: peft.AdaLoraConfig(**_ADA, bias="lora_only")),
    "linear vera": (_linear, lambda: peft.VeraConfig(r=2, **_BOTH)),
    "linear vera bias": (_linear, lambda: peft.VeraConfig(r=2, **_BOTH, bias="vera_only")),
    "linear vera seed": (
        _linear,
        lambda: peft.VeraConfig(r=2, **_BOTH, save_projection=False, projection_prng_key=7),
    ),
    "linear loha": (_linear, _loha),
    "linear loha patterns": (_linear, lambda: _loha(**_PATTERNS)),
    "linear lokr": (_linear, _lokr),
    "linear lokr patterns": (_linear, lambda: _lokr(**_PATTERNS)),
    "linear lokr full": (_linear, lambda: _lokr(r=8)),
    "linear lokr both": (_even, lambda: _lokr(decompose_both=True, decompose_factor=4)),
    "linear ia3": (_linear, lambda: _ia3("narrow")),
    "linear ia3 saved": (
        _linear, lambda: _ia3(target_modules=["wide"], modules_to_save=["narrow"]),
    ),
    "linear oft": (_even, _oft),
    "linear oft blocks": (_even, lambda: _oft(r=2, oft_block_size=0)),
    "linear oft exact": (_even, lambda: _oft(use_cayley_neumann=False, oft_block_size=4)),
    "linear oft terms": (_even, lambda: _oft(num_cayley_neumann_terms=3, oft_block_size=4)),
    "linear oft shared": (_even, lambda: _oft(block_share=True, oft_block_size=4)),
    "linear oft constrained": (_even, lambda: _oft(coft=True, eps=0.5, oft_block_size=4)),
    "linear oft bias": (_even, lambda: _oft(bias="oft_only")),
    "transposed lora": (_transposed, lambda: _lora(fan_in_fan_out=True)),
    "transposed dora": (_transposed, lambda: _lora(fan_in_fan_out=True, use_dora=True)),
    "transposed adalora": (
        _transposed, lambda: peft.AdaLoraConfig(**_ADA, fan_in_fan_out=True),
    ),
    "transposed vera": (
        _transposed, lambda: peft.VeraConfig(r=2, fan_in_fan_out=True, **_BOTH),
    ),
    "transposed ia3": (_transposed, lambda: _ia3("wide", fan_in_fan_out=True)),
    "embedding lora": (_embedding, _lora),
    "embedding rslora": (_embedding, lambda: _lora(use_rslora=True, **_PATTERNS)),
    "embedding dora": (_embedding, lambda: _lora(use_dora=True)),
    "embedding bias": (_embedding, lambda: _lora(bias="all")),
    "embedding oft": (_embedding, lambda: _oft(oft_block_size=3)),
    "embedding tokens": (
        _embedding,
        lambda: peft.TrainableTokensConfig(token_indices=[1, 7, 3], target_modules=["wide"]),
    ),
    "embedding tokens beside lora": (
        _embedding,
        lambda: _lora(target_modules=["narrow"], trainable_token_indices={"wide": [9, 2]}),
    ),
    "embedding tokens beside adalora": (
        _embedding,
        lambda: peft.AdaLoraConfig(
            **{**_ADA, "target_modules": ["narrow"]}, trainable_token_indices={"wide": [9, 2]}
        ),
    ),
    "attention lora": (Attention, lambda: _lora(target_modules=["mha", "fc"])),
    "attention rslora": (
        Attention, lambda: _lora(target_modules=["mha"], use_rslora=True, rank_pattern={"mha": 3}),
    ),
    "attention lora_bias": (Attention, lambda: _lora(target_modules=["mha"], lora_bias=True)),
    "attention bias": (Attention, lambda: _lora(target_modules=["mha"], bias="all")),
    "experts lora": (
        _experts(False),
        lambda: _lora(target_modules=[], target_parameters=["narrow.down_proj", "narrow.up_proj"]),
    ),
    "experts transposed": (
        _experts(True),
        lambda: _lora(target_modules=["wide"], target_parameters=["down_proj", "up_proj"]),
    ),
    "experts patterns": (
        _experts(False),
        lambda: _lora(
            target_modules=["wide"],
            target_parameters=["narrow.down_proj", "narrow.up_proj"],
            rank_pattern={"narrow.up_proj": 3},
            alpha_pattern={"down_proj": 5},
            use_rslora=True,
        ),
    ),
    "experts one": (
        _experts(True),
        lambda: _lora(target_modules=[], target_parameters=["narrow.down_proj"]),
    ),
    "parameter lora": (
        lambda: Two(nn.Linear(3, 3), Bare()),
        lambda: _lora(target_modules=[], target_parameters=["wide.weight", "narrow.kernel"]),
    ),
}  # fmt: skip
_CONVS = {"conv1d": nn.Conv1d, "conv2d": nn.Conv2d, "conv3d": nn.Conv3d}
# What PEFT has for each; it refuses LoHa, LoKr, OFT and AdaLoRA on Conv3d, (IA)3, OFT and AdaLoRA
# on Conv1d, VeRA on any; LoHa, LoKr and OFT on transformers' Conv1D; on embeddings all but LoRA,
# DoRA, OFT and trained tokens; DoRA, AdaLoRA and all others on attention; lora_bias and DoRA on
# embeddings and attention, respectively.
_OF_CONVS: dict[str, tuple[dict[str, Any], Callable[[], Any], str]] = {
    "lora": ({}, _lora, "123"),
    "rslora": ({}, lambda: _lora(use_rslora=True, **_PATTERNS), "123"),
    "dora": ({}, lambda: _lora(use_dora=True), "123"),
    "lora_bias": ({}, lambda: _lora(target_modules=["wide"], lora_bias=True), "123"),
    "grouped lora": ({"groups": 2}, _lora, "123"),
    "loha": ({"dilation": 2}, _loha, "12"),
    "loha core": ({}, lambda: _loha(use_effective_conv2d=True), "12"),
    "grouped loha": ({"groups": 2}, _loha, "12"),
    "lokr": ({}, lambda: _lokr(r=2), "12"),
    "lokr low": ({}, lambda: _lokr(decompose_both=True), "12"),
    "lokr core": ({}, lambda: _lokr(use_effective_conv2d=True), "2"),  # a Conv1d's does not run
    "ia3": ({}, lambda: _ia3("narrow"), "23"),
    "adalora": ({}, lambda: peft.AdaLoraConfig(**_ADA), "2"),
    "oft": ({"kernel_size": 1, "padding": 0}, _oft, "2"),
}
PEFT_CASES |= {
    f"{layer} {name}": (_conv(_CONVS[layer], **options), make)
    for layer in _CONVS
    for name, (options, make, sizes) in _OF_CONVS.items()
    if layer[4] in sizes
}


def peft_input(base: Any, batch: int) -> torch.Tensor:
    """An input of a model of the table."""
    make = torch.Generator().manual_seed(batch)
    if isinstance(base, Attention):
        return torch.randn(batch, 7, 3, generator=make)
    layer: Any = base.wide
    if isinstance(layer, nn.Embedding):
        return torch.randint(0, 11, (batch, 7), generator=make)
    if isinstance(layer, nn.Linear | Conv1D):
        size = layer.nx if isinstance(layer, Conv1D) else layer.in_features
        return torch.randn(batch, 7, size, generator=make)
    sizes = (13, 11, 12)[: layer.weight.ndim - 2]
    return torch.randn(batch, 4, *sizes, generator=make)


@dataclass(frozen=True)
class SavedCase:
    """What PEFT wrote of a case of the table, and what PEFT reads of it."""

    base: nn.Module
    directory: Path
    x: torch.Tensor

    def load(self, directory: Path) -> Any:
        """The base with an adapter, as PEFT loads it."""
        return peft.PeftModel.from_pretrained(copy.deepcopy(self.base), str(directory)).eval()

    def run(self, directory: Path) -> torch.Tensor:
        """What PEFT's model of an adapter computes."""
        with torch.no_grad():
            output: torch.Tensor = self.load(directory)(self.x)
        return output


def save_case(name: str, directory: Path) -> SavedCase:
    """Lets PEFT wrap a model of the table, randomise and save it."""
    make, config = PEFT_CASES[name]
    torch.manual_seed(0)
    base = make().eval()
    for parameter in base.parameters():
        nn.init.normal_(parameter, 0.0, 0.5)
    model = peft.get_peft_model(copy.deepcopy(base), config())
    torch.manual_seed(3)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.requires_grad and ("magnitude" in key or "ia3" in key):
                parameter.mul_(torch.empty_like(parameter).uniform_(0.5, 1.5))
            elif parameter.requires_grad:
                parameter.normal_(0.0, 0.7 if "hada" in key else 0.4)
    model.save_pretrained(str(directory))
    return SavedCase(base, directory, peft_input(base, 4))


@pytest.fixture(params=PEFT_CASES)
def peft_case(request: pytest.FixtureRequest, tmp_path: Path) -> SavedCase:
    """Every case of the table, saved by PEFT."""
    return save_case(request.param, tmp_path / "by_peft")


@pytest.fixture
def save_peft_case() -> Callable[[str, Path], SavedCase]:
    return save_case
