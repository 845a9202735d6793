"""Models that PEFT wrapped fold to what they wrapped, and nothing here tells the fold so."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig
from torch import fx, nn
from transformers.pytorch_utils import Conv1D

from lora_fx import fold, text, trace, unfold
from lora_fx.numerics import TOLERANCE
from lora_fx.passes import FoldLora
from lora_fx.testing import Two, folds_to, operators, relative
from lora_fx.testing.zoo import traced, untraced

pytestmark = [
    # PEFT says what it does about Conv1D, and advises on tied embeddings.
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer"),
    # It also says what it cannot do itself: compile BOFT's kernel, merge into grouped convolutions.
    pytest.mark.filterwarnings("ignore:Failed to load the CUDA extension"),
    pytest.mark.filterwarnings("ignore:Setting boft_n_butterfly_factor to 1"),
    pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups > 1"),
]

BOTH = ["wide", "narrow"]
LORA: dict[str, Any] = {"r": 2, "lora_alpha": 3, "target_modules": BOTH}


def wrapped(base: nn.Module, configs: tuple[Any, ...], spread: float = 0.4) -> Any:
    """What PEFT makes of a model, every adapter active and none of them without effect."""
    first, *others = copy.deepcopy(configs)
    model = peft.get_peft_model(copy.deepcopy(base), first)
    for index, config in enumerate(others):
        model.add_adapter(f"other_{index}", config)
    if others:
        model.base_model.set_adapter(list(model.peft_config))
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and ("magnitude" in name or "ia3" in name):
                parameter.mul_(torch.empty_like(parameter).uniform_(0.5, 1.5))
            elif parameter.requires_grad:
                parameter.normal_(0.0, spread)
    return model.eval()


def linear() -> nn.Module:
    return Two(nn.Linear(3, 5), nn.Linear(5, 7, bias=False))


def even() -> nn.Module:
    """Sizes that blocks divide."""
    return Two(nn.Linear(8, 12), nn.Linear(12, 4, bias=False))


def one_block() -> nn.Module:
    """Of one block on one side."""
    return Two(nn.Linear(4, 8), nn.Linear(8, 4, bias=False))


def transposed() -> nn.Module:
    return Two(Conv1D(5, 3), Conv1D(7, 5))


def embedding() -> nn.Module:
    return Two(nn.Embedding(11, 5), nn.Linear(5, 7))


def padded() -> nn.Module:
    return Two(nn.Embedding(11, 5, padding_idx=2), nn.Linear(5, 7))


@functools.cache
def conv(kind: Any, **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        fields = {"kernel_size": 3, "stride": 2, "padding": 1} | options
        return Two(kind(4, 6, **fields), kind(6, 7, 1, bias=False))

    return make


Case = tuple[Callable[[], nn.Module], Any]  # a base model, and one config or several
LINEAR: dict[str, Case] = {
    "lora": (linear, LoraConfig(**LORA)),
    "lora_dropout": (linear, LoraConfig(**LORA, lora_dropout=0.3)),
    "lora_patterns": (linear, LoraConfig(**LORA, rank_pattern={"wide": 3})),
    "rslora": (linear, LoraConfig(**LORA, use_rslora=True)),
    "dora": (linear, LoraConfig(**LORA, use_dora=True)),
    "lora_bias": (linear, LoraConfig(**LORA | {"target_modules": ["wide"]}, lora_bias=True)),
    "loha": (linear, peft.LoHaConfig(r=2, alpha=3, target_modules=BOTH)),
    "lokr": (linear, peft.LoKrConfig(r=1, alpha=3, target_modules=BOTH)),
    "lokr_decomposed": (
        even,
        peft.LoKrConfig(r=1, alpha=3, target_modules=BOTH, decompose_both=True),
    ),
    "lokr_full": (linear, peft.LoKrConfig(r=8, target_modules=BOTH)),
    "vera": (linear, peft.VeraConfig(r=2, target_modules=BOTH)),
    "ia3": (linear, peft.IA3Config(target_modules=BOTH, feedforward_modules=[])),
    "ia3_feedforward": (linear, peft.IA3Config(target_modules=BOTH, feedforward_modules=BOTH)),
    "oft": (even, peft.OFTConfig(oft_block_size=4, target_modules=BOTH)),
    "oft_solved": (
        even,
        peft.OFTConfig(oft_block_size=4, target_modules=BOTH, use_cayley_neumann=False),
    ),
    "oft_blocks": (even, peft.OFTConfig(r=2, oft_block_size=0, target_modules=BOTH)),
    "oft_shared": (even, peft.OFTConfig(oft_block_size=4, target_modules=BOTH, block_share=True)),
    "adalora": (
        linear,
        peft.AdaLoraConfig(init_r=3, lora_alpha=3, target_modules=BOTH, total_step=9),
    ),
    "fourierft": (linear, peft.FourierFTConfig(n_frequency=9, scaling=9.0, target_modules=BOTH)),
    "randlora": (linear, peft.RandLoraConfig(r=2, randlora_alpha=3, target_modules=BOTH)),
    "boft": (even, peft.BOFTConfig(boft_block_size=4, target_modules=BOTH)),
    "delora": (even, peft.DeloraConfig(r=2, target_modules=BOTH)),
    "hira": (even, peft.HiraConfig(r=2, target_modules=BOTH)),
    "vblora": (
        even,
        peft.VBLoRAConfig(r=2, num_vectors=6, vector_length=1, target_modules=BOTH),
    ),
    "miss": (even, peft.MissConfig(r=2, target_modules=BOTH)),
    "road": (even, peft.RoadConfig(group_size=2, target_modules=BOTH)),
    "gralora": (even, peft.GraloraConfig(r=4, gralora_k=2, target_modules=BOTH)),
    "c3a": (even, peft.C3AConfig(block_size=4, target_modules=BOTH)),
    # An axis of one may be of the batch or of the features.
    "c3a_one_block": (one_block, peft.C3AConfig(block_size=4, target_modules=BOTH)),
    "gralora_one_block": (one_block, peft.GraloraConfig(r=4, gralora_k=1, target_modules=BOTH)),
    "miss_ragged": (linear, peft.MissConfig(r=2, target_modules=BOTH)),
    "road_two": (even, peft.RoadConfig(group_size=4, variant="road_2", target_modules=BOTH)),
    "adamss": (
        even,
        peft.AdamssConfig(r=4, num_subspaces=2, subspace_rank=1, target_modules=BOTH),
    ),
    "hra": (linear, peft.HRAConfig(r=2, target_modules=BOTH)),
    "pvera": (linear, peft.PveraConfig(r=2, target_modules=BOTH)),
    "two_lora": (linear, (LoraConfig(**LORA), LoraConfig(**LORA | {"r": 3}))),
    "dora_and_lora": (linear, (LoraConfig(**LORA, use_dora=True), LoraConfig(**LORA))),
    "two_loha": (linear, (peft.LoHaConfig(r=2, target_modules=BOTH),) * 2),
    "transposed_lora": (transposed, LoraConfig(**LORA, fan_in_fan_out=True)),
    "transposed_dora": (transposed, LoraConfig(**LORA, fan_in_fan_out=True, use_dora=True)),
    "transposed_ia3": (
        transposed,
        peft.IA3Config(target_modules=BOTH, feedforward_modules=["wide"], fan_in_fan_out=True),
    ),
    "embedding_lora": (embedding, LoraConfig(**LORA)),
    "embedding_dora": (embedding, LoraConfig(**LORA, use_dora=True)),
    "embedding_two_lora": (embedding, (LoraConfig(**LORA), LoraConfig(**LORA | {"r": 3}))),
    "embedding_padding_lora": (padded, LoraConfig(**LORA)),
}
ABSENT = [(nn.Conv3d, "loha"), (nn.Conv3d, "lokr"), (nn.Conv1d, "ia3")]  # PEFT has none
# PEFT's lora_A forgets the base's dilation, which only a kernel of 1 does not feel.
CONV: dict[str, Case] = {
    f"{name}_{kind.__name__.lower()}": (conv(kind, **options), config)
    for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    for name, options, config in [
        ("lora", {}, LoraConfig(**LORA)),
        ("dora", {}, LoraConfig(**LORA, use_dora=True)),
        ("two_lora", {}, (LoraConfig(**LORA), LoraConfig(**LORA | {"r": 3}))),
        ("dilated_lora", {"kernel_size": 1, "dilation": 2}, LoraConfig(**LORA)),
        ("same_lora", {"stride": 1, "padding": "same"}, LoraConfig(**LORA)),
        ("loha", {"dilation": 2}, peft.LoHaConfig(r=2, target_modules=BOTH)),
        ("lokr", {"dilation": 2}, peft.LoKrConfig(r=2, target_modules=BOTH)),
        ("ia3", {}, peft.IA3Config(target_modules=BOTH, feedforward_modules=["narrow"])),
    ]
    if (kind, name) not in ABSENT
}


def example(base: nn.Module, batch: int) -> tuple[torch.Tensor, dict[int, str]]:
    """An input of a model of two layers, and its dynamic axes."""
    make = torch.Generator().manual_seed(batch)
    layer: Any = base.wide
    if isinstance(layer, nn.Embedding):
        return torch.randint(0, 11, (batch, 7), generator=make), {0: "batch", 1: "length"}
    if isinstance(layer, nn.Linear | Conv1D):
        size = layer.nx if isinstance(layer, Conv1D) else layer.in_features
        return torch.randn(batch, 7, size, generator=make), {0: "batch", 1: "length"}
    sizes = (13, 11, 12)[: layer.weight.ndim - 2]
    return torch.randn(batch, 4, *sizes, generator=make), {0: "batch"}


@functools.cache
def based(make: Callable[[], nn.Module], dtype: torch.dtype) -> tuple[nn.Module, fx.GraphModule]:
    """A base with nothing zero, and its graph; both are only read."""
    torch.manual_seed(0)
    base = make().eval()
    for parameter in base.parameters():
        nn.init.normal_(parameter, 0.0, 0.5)
    x, axes = example(base.to(dtype), 4)
    return base, trace(base, (cast(x, dtype),), dynamic_shapes=(axes,))


@functools.cache
def built(
    name: str, dtype: torch.dtype = torch.float32
) -> tuple[nn.Module, fx.GraphModule, Any, fx.GraphModule]:
    """A case's base, its graph, what PEFT makes of it, and the graph of that: only read."""
    make, configs = CASES[name]
    base, base_graph = based(make, dtype)
    torch.manual_seed(0)
    model = wrapped(base, configs if isinstance(configs, tuple) else (configs,))
    x, axes = example(base, 4)
    gm = trace(model, (cast(x, dtype),), dynamic_shapes={"args": (axes,)})
    return base, base_graph, model, gm


@pytest.mark.parametrize("name", [*LINEAR, *CONV])
def test_a_wrapped_layer_folds_to_the_layer(name: str) -> None:
    base, base_graph, model, gm = built(name)
    other, _ = example(base, 6)
    folded = folds_to(gm, base_graph)
    with torch.no_grad():
        wanted = model(other)
        assert relative(folded(other), wanted) <= 1e-5
        assert relative(base(other), wanted) >= 1e-2


@pytest.mark.parametrize("name", ["lora", "dora", "oft", "transposed_lora", "embedding_dora"])
def test_the_folded_graph_reads_as_the_base(name: str) -> None:
    _, base_graph, _, gm = built(name)
    folded = text(fold(gm)).replace("base_model.model.", "").replace(".base_layer", "")
    assert folded.replace("args_0", "x") == text(base_graph)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "name", ["lora", "dora", "two_lora", "vera", "ia3", "transposed_lora", "embedding_lora"]
)
def test_casts_around_a_wide_adapter_fold_too(name: str, dtype: torch.dtype) -> None:
    base, base_graph, model, gm = built(name, dtype)
    other = cast(example(base, 6)[0], dtype)
    folded = folds_to(gm, base_graph)
    with torch.no_grad():
        exact = copy.deepcopy(model).float()(cast(other, torch.float32))
        assert folded(other).dtype == model(other).dtype == dtype
        assert relative(folded(other), exact) <= TOLERANCE[dtype]
        assert relative(base(other), exact) > 10 * TOLERANCE[dtype]


def cast(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return x.to(dtype) if x.is_floating_point() else x


# What PEFT computes here is no layer of the base's geometry, whatever its merge makes of it:
# lora_A pads with zeros where the base pads by going round, forgets the dilation, and reads all
# channels where the base reads a group's.
APART: dict[str, Case] = {
    "circular_lora": (conv(nn.Conv2d, padding_mode="circular"), LoraConfig(**LORA)),
    "circular_dora": (conv(nn.Conv1d, padding_mode="circular"), LoraConfig(**LORA, use_dora=True)),
    "dilated_lora": (conv(nn.Conv1d, stride=5, dilation=2), LoraConfig(**LORA)),
    "grouped_lora": (conv(nn.Conv2d, groups=2), LoraConfig(**LORA)),
    "grouped_dora": (conv(nn.Conv2d, groups=2), LoraConfig(**LORA, use_dora=True)),
}
# These move features about beside the layer: affine, but a fold may leave them alone.
MOVED: dict[str, Case] = {
    # This one writes its projection into its own parameter, at every call.
    "oft_constrained": (
        even,
        peft.OFTConfig(oft_block_size=4, target_modules=BOTH, coft=True, eps=0.5),
    ),
    # Its spectrum is picked by a mask: torch.export leaves checks of how many there are behind.
    "waveft": (even, peft.WaveFTConfig(n_frequency=9, target_modules=BOTH)),
}
CASES = LINEAR | CONV | APART | MOVED


@pytest.mark.parametrize("name", [*APART, *MOVED])
def test_what_is_no_layer_stays_right(name: str) -> None:
    base, base_graph, model, gm = built(name)
    other, _ = example(base, 6)
    folded = fold(gm)
    assert FoldLora()(folded).modified is False
    assert text(unfold(folded)) == text(gm)
    with torch.no_grad():
        wanted = model(other)
        assert relative(folded(other), wanted) <= 1e-5
        assert relative(base(other), wanted) >= 1e-2
    assert name in MOVED or operators(folded) != operators(base_graph)


def on_model(kind: str, targets: list[str]) -> tuple[Any, ...]:
    """Configs for a transformers model."""
    fields: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": targets}
    down = [t for t in targets if t == "down_proj"]
    configs = {
        "lora": lambda: LoraConfig(**fields),
        "dora": lambda: LoraConfig(**fields, use_dora=True),
        "two": lambda: (LoraConfig(**fields), LoraConfig(**fields | {"r": 3})),
        "loha": lambda: peft.LoHaConfig(r=3, target_modules=targets),
        "lokr": lambda: peft.LoKrConfig(r=3, target_modules=targets),
        "vera": lambda: peft.VeraConfig(r=3, target_modules=targets),
        "ia3": lambda: peft.IA3Config(target_modules=targets, feedforward_modules=down),
        "oft": lambda: peft.OFTConfig(oft_block_size=4, target_modules=targets),
        "adalora": lambda: peft.AdaLoraConfig(
            init_r=3, lora_alpha=6, target_modules=targets, total_step=9
        ),
        "fourierft": lambda: peft.FourierFTConfig(
            n_frequency=50, scaling=30.0, target_modules=targets
        ),
        "randlora": lambda: peft.RandLoraConfig(r=4, target_modules=targets),
    }
    made = configs[kind]()
    return made if isinstance(made, tuple) else (made,)


MODELS = ["bert", "gpt2", "llama", "qwen2", "t5", "vit"]
METHODS = ["loha", "lokr", "vera", "ia3", "oft", "adalora", "fourierft", "randlora"]
EMBEDDINGS = {"gpt2": "wte", "bert": "word_embeddings", "qwen2": "embed_tokens"}
WHOLE = [(m, k, "") for m in MODELS for k in ("lora", "dora", "two")]
WHOLE += [("llama", method, "") for method in METHODS]
WHOLE += [(m, kind, table) for m, table in EMBEDDINGS.items() for kind in ("lora", "dora")]
WHOLE += [("llama", "lora", "lm_head"), ("gpt2", "ia3", "")]


BLOCKS = {
    "bert": ["encoder.layer"],
    "gpt2": ["transformer.h"],
    "llama": ["model.layers"],
    "qwen2": ["model.layers"],
    "t5": ["encoder.block", "decoder.block"],
    "vit": ["layers"],
}


@functools.cache
def fixed(name: str) -> tuple[Any, fx.GraphModule]:
    """A model of one block without free axes, a sixth of the time, and its graph: only read."""
    case = untraced(name)
    for path in BLOCKS[name]:
        del case.model.get_submodule(path)[1:]  # type: ignore[operator]
    for parameter in case.model.parameters():
        if parameter.ndim > 1:  # or a block hardly shows beside what it is added to
            parameter.data.mul_(4)
    return case, trace(case.model, (), case.inputs)


@pytest.mark.parametrize(("name", "kind", "more"), WHOLE)
def test_a_wrapped_model_folds_to_the_model(name: str, kind: str, more: str) -> None:
    """Of two blocks and free axes where it is LoRA on layers; all else has axes on single ones."""
    is_whole = kind == "lora" and not more
    case, base_graph = traced(name) if is_whole else fixed(name)
    dynamic, others = (case.dynamic, case.others) if is_whole else ({}, case.inputs)
    targets = case.targets + [more] * bool(more)
    # LoHa multiplies four factors: small ones would make an adapter of no effect.
    model = wrapped(case.model, on_model(kind, targets), spread=0.4 if kind == "loha" else 0.15)
    model.requires_grad_(True)  # or attention picks another kernel than it did in the base
    inner = model.get_base_model()  # torch.export has no dynamic shapes for PEFT's **kwargs
    gm = trace(inner, (), case.inputs, dynamic_shapes=dynamic or None)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    folded = folds_to(gm, base_graph)
    with torch.no_grad():
        wanted = model(**others)
        assert relative(folded(**others), wanted) <= 1e-5
        assert relative(case.model(**others), wanted) >= 1e-2
    after = model.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items())
