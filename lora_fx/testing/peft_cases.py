"""Every adapter that PEFT saves and that is read here, on every layer that PEFT has it for."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_fx.testing.models import Two
from lora_fx.testing.models import even_linear as _even
from lora_fx.testing.models import table_and_linear as _embedding
from lora_fx.testing.models import two_linear as _linear
from lora_fx.testing.models import two_transposed as _transposed
from lora_fx.testing.peft_types import PEFT_TYPES


class Attends(nn.Module):
    """An attention module that packs its projections, behind a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 6)
        self.mha = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, length, 3) -> (batch, length, 6)."""
        x = torch.tanh(self.fc(x))
        result: torch.Tensor = self.mha(x, x, x, need_weights=False)[0]
        return result


class TwoExperts(nn.Module):
    """Four experts 3 -> 5 -> 6 in two parameters, registered against the alphabet."""

    def __init__(self, is_transposed: bool) -> None:
        super().__init__()
        self.is_transposed = is_transposed
        up, down = torch.zeros(4, 5, 3), torch.zeros(4, 6, 5)
        self.up_proj = nn.Parameter(up.mT.clone() if is_transposed else up)
        self.down_proj = nn.Parameter(down.mT.clone() if is_transposed else down)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., 3) -> (..., 6)."""
        up, down = (p.mT if self.is_transposed else p for p in (self.up_proj, self.down_proj))
        hidden = torch.tanh(torch.einsum("...i,eoi->...eo", x, up))
        return torch.einsum("...ei,eoi->...o", hidden, down)


class Bare(nn.Module):
    """A layer whose matrix has a name of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.zeros(6, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., 3) -> (..., 6)."""
        return nn.functional.linear(x, self.kernel)


def _conv(kind: Any, **options: Any) -> Callable[[], nn.Module]:
    fields = {"kernel_size": 3, "stride": 2, "padding": 1} | options
    point = 2 if kind is nn.Conv3d else 1  # PEFT cannot merge into a Conv3d of one point
    return lambda: Two(kind(4, 6, **fields), kind(6, 7, point, bias=False))


def _experts(is_transposed: bool) -> Callable[[], nn.Module]:
    return lambda: Two(nn.Linear(3, 3), TwoExperts(is_transposed))


_BOTH: dict[str, Any] = {"target_modules": ["wide", "narrow"]}
_PATTERNS = {"rank_pattern": {"wide": 3}, "alpha_pattern": {"^narrow": 5}}


def _config(name: str, defaults: dict[str, Any], options: dict[str, Any]) -> Any:
    import peft

    return getattr(peft, name)(**{**_BOTH, **defaults, **options})


def _lora(**options: Any) -> Any:
    return _config("LoraConfig", {"r": 2, "lora_alpha": 3}, options)


def _ada(**options: Any) -> Any:
    defaults = {"init_r": 3, "lora_alpha": 5, "total_step": 9}
    return _config("AdaLoraConfig", defaults, options)


def _vera(**options: Any) -> Any:
    return _config("VeraConfig", {"r": 2}, options)


def _loha(**options: Any) -> Any:
    return _config("LoHaConfig", {"r": 2, "alpha": 3}, options)


def _lokr(**options: Any) -> Any:
    return _config("LoKrConfig", {"r": 1, "alpha": 3}, options)


def _oft(**options: Any) -> Any:
    return _config("OFTConfig", {"oft_block_size": 2}, options)


def _ia3(*inner: str, **options: Any) -> Any:
    return _config("IA3Config", {"feedforward_modules": [*inner]}, options)


def _tokens(**options: Any) -> Any:
    return _config("TrainableTokensConfig", {}, options)


_SOME = {"rank_pattern": {"wide.lora_E.default": [True, False, True]}}
PeftCase = tuple[Callable[[], nn.Module], Callable[[], Any]]
# Every type that PEFT 0.21 saves and that can be read here, on every layer that PEFT has it for.
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
    "linear adalora": (_linear, _ada),
    "linear adalora pruned": (_linear, lambda: _ada(**_SOME)),
    "linear adalora bias": (_linear, lambda: _ada(bias="lora_only")),
    "linear vera": (_linear, _vera),
    "linear vera bias": (_linear, lambda: _vera(bias="vera_only")),
    "linear vera seed": (
        _linear,
        lambda: _vera(save_projection=False, projection_prng_key=7),
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
        _transposed, lambda: _ada(fan_in_fan_out=True),
    ),
    "transposed vera": (
        _transposed, lambda: _vera(fan_in_fan_out=True),
    ),
    "transposed ia3": (_transposed, lambda: _ia3("wide", fan_in_fan_out=True)),
    "embedding lora": (_embedding, _lora),
    "embedding rslora": (_embedding, lambda: _lora(use_rslora=True, **_PATTERNS)),
    "embedding dora": (_embedding, lambda: _lora(use_dora=True)),
    "embedding bias": (_embedding, lambda: _lora(bias="all")),
    "embedding oft": (_embedding, lambda: _oft(oft_block_size=3)),
    "embedding tokens": (
        _embedding,
        lambda: _tokens(token_indices=[1, 7, 3], target_modules=["wide"]),
    ),
    "embedding tokens beside lora": (
        _embedding,
        lambda: _lora(target_modules=["narrow"], trainable_token_indices={"wide": [9, 2]}),
    ),
    "embedding tokens beside adalora": (
        _embedding,
        lambda: _ada(
            target_modules=["narrow"], trainable_token_indices={"wide": [9, 2]}
        ),
    ),
    "attention lora": (Attends, lambda: _lora(target_modules=["mha", "fc"])),
    "attention rslora": (
        Attends, lambda: _lora(target_modules=["mha"], use_rslora=True, rank_pattern={"mha": 3}),
    ),
    "attention lora_bias": (Attends, lambda: _lora(target_modules=["mha"], lora_bias=True)),
    "attention bias": (Attends, lambda: _lora(target_modules=["mha"], bias="all")),
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
    "adalora": ({}, _ada, "2"),
    "oft": ({"kernel_size": 1, "padding": 0}, _oft, "2"),
}
PEFT_CASES |= {
    f"{layer} {name}": (_conv(_CONVS[layer], **options), make)
    for layer in _CONVS
    for name, (options, make, sizes) in _OF_CONVS.items()
    if layer[4] in sizes
}


def _input(base: Any, batch: int) -> torch.Tensor:
    """An input of a model of the table."""
    make = torch.Generator().manual_seed(batch)
    if isinstance(base, Attends):
        return torch.randn(batch, 7, 3, generator=make)
    weight = base.wide.weight
    if isinstance(base.wide, nn.LayerNorm):
        return torch.randn(batch, 7, len(weight), generator=make)
    if isinstance(base.wide, nn.Embedding):
        return torch.randint(0, 11, (batch, 7), generator=make)
    if weight.ndim == 2:
        size = getattr(base.wide, "nx", weight.shape[1])
        return torch.randn(batch, 7, size, generator=make)
    sizes = (13, 11, 12)[: weight.ndim - 2]
    return torch.randn(batch, 4, *sizes, generator=make)


@dataclass(frozen=True)
class SavedCase:
    """What PEFT wrote of a case of the table, and what PEFT reads of it.

    Attributes:
        base: the model without the adapter.
        directory: that PEFT saved the adapter to.
        x: an input of the model.
    """

    base: nn.Module
    directory: Path
    x: torch.Tensor

    def load(self, directory: Path) -> Any:
        """The base with an adapter, as PEFT loads it."""
        import peft

        return peft.PeftModel.from_pretrained(copy.deepcopy(self.base), str(directory)).eval()

    def run(self, directory: Path) -> torch.Tensor:
        """What PEFT's model of an adapter computes."""
        with torch.no_grad():
            output: torch.Tensor = self.load(directory)(self.x)
        return output


def save_peft_case(name: str, directory: Path, seed: int = 3) -> SavedCase:
    """Lets PEFT wrap the model of a case of `PEFT_CASES` or `PEFT_TYPES`, randomise and save it."""
    make, config = (PEFT_CASES | PEFT_TYPES)[name]
    with warnings.catch_warnings():
        if name in PEFT_TYPES:  # PEFT says what it cannot compile, and what it will not save
            warnings.simplefilter("ignore")
        return _saved(make, config, directory, seed)


def _saved(make: Any, config: Any, directory: Path, seed: int) -> SavedCase:
    import peft

    torch.manual_seed(0)
    base = make().eval()
    for parameter in base.parameters():
        nn.init.normal_(parameter, 0.0, 0.5)
    model = peft.get_peft_model(copy.deepcopy(base), config())
    torch.manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.requires_grad and ("magnitude" in key or "ia3" in key):
                parameter.mul_(torch.empty_like(parameter).uniform_(0.5, 1.5))
            elif parameter.requires_grad:
                parameter.normal_(0.0, 0.7 if "hada" in key else 0.4)
    model.save_pretrained(str(directory))
    return SavedCase(base, directory, _input(base, 4))
