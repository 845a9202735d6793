"""diffusers' own files of a small UNet: diffusers is writer, reader and oracle; no hub is asked."""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import fx, nn

import lora_fx
from lora_fx.adapters.adapter import Adapter
from lora_fx.errors import AdapterError
from lora_fx.formats import load_adapter, save_adapter
from lora_fx.formats.diffusers import WEIGHTS
from lora_fx.formats.peft import METADATA
from lora_fx.testing import config_in, means, relative, same_adapter, same_tensors

diffusers = pytest.importorskip("diffusers")
# PEFT 0.21 takes the bias of an up-projection for a piece of a matrix that was not gathered.
pytestmark = pytest.mark.filterwarnings(
    r"ignore:Adapter .default.. \d+ LoRA tensor.s. have invalid shape"
)
MAKE = torch.Generator().manual_seed(3)
INPUTS = (
    torch.randn(2, 3, 8, 8, generator=MAKE),
    torch.tensor([3, 7]),
    torch.randn(2, 5, 10, generator=MAKE),
)
LAYERS = ["to_q", "to_k", "to_out.0", "conv1", "proj_in", "conv_in", "time_emb_proj"]
Tensors = dict[str, torch.Tensor]


def made() -> Any:
    """Linear layers, convolutions of 3 x 3 and of points, with weights that depend on nothing."""
    torch.manual_seed(0)
    model = diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=3, out_channels=3, block_out_channels=(8, 12),
        layers_per_block=1, cross_attention_dim=10, norm_num_groups=4, attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    return model.eval()


BASE = made()  # only read


def unet() -> Any:
    """A copy, which takes a tenth of making it."""
    return copy.deepcopy(BASE)


@functools.cache
def traced() -> fx.GraphModule:
    return lora_fx.trace(BASE, INPUTS)


def run(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(*INPUTS)[0]
    return result


LORA: dict[str, dict[str, Any]] = {
    "plain": {},
    "patterns": {
        "rank_pattern": {"to_k": 3, "conv1": 1, "^conv_in": 1},
        "alpha_pattern": {"proj_in": 7, r"to_out\.0": 5},
    },
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "dora and rslora": {"use_dora": True, "use_rslora": True, "rank_pattern": {"to_k": 3}},
    "lora_bias": {"lora_bias": True},
}
LOKR: dict[str, dict[str, Any]] = {
    "lokr": {"r": 2, "alpha": 3},
    "lokr of linear layers": {"r": 2, "alpha": 3},
    "lokr of four factors": {"r": 1, "alpha": 3, "decompose_both": True, "decompose_factor": 4},
    "lokr in Tucker form": {"r": 1, "alpha": 3, "use_effective_conv2d": True},
}
CASES = [*LORA, *LOKR]


def config_of(case: str) -> Any:
    if case in LORA:
        # PEFT warns of a layer without a bias, which cannot be merged then
        layers = LAYERS if case != "lora_bias" else [n for n in LAYERS if n not in ("to_q", "to_k")]
        return peft.LoraConfig(r=2, lora_alpha=3, target_modules=layers, **LORA[case])
    # without a config diffusers takes no LoKr of a convolution: it unpacks two axes of each factor
    layers = LAYERS if case != "lokr of linear layers" else ["to_q", "to_k", "to_out.0"]
    return peft.LoKrConfig(target_modules=layers, **LOKR[case])


@functools.cache
def trained(case: str) -> Any:
    """The UNet with an adapter, as if trained: only read."""
    model = unet()
    model.add_adapter(config_of(case))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter.mul_(1 + 0.3 * torch.rand_like(parameter))
            elif "lora_" in name or "lokr_" in name:
                parameter.normal_(0.0, 0.3)
    return model


def written(directory: Path, model: Any, case: str) -> Path:
    """What a pipeline writes."""
    diffusers.StableDiffusionPipeline.save_lora_weights(
        str(directory),
        unet_lora_layers=get_peft_model_state_dict(model),
        unet_lora_adapter_metadata=config_of(case).to_dict(),
    )
    return directory / WEIGHTS


@dataclass(frozen=True)
class Saved:
    """A case, the UNet with it, the file that a pipeline writes, and what is read of that."""

    case: str
    model: Any
    file: Path
    adapter: Adapter


@pytest.fixture(scope="module", params=CASES)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    model = trained(request.param)
    file = written(tmp_path_factory.mktemp("saved") / "a", model, request.param)
    return Saved(request.param, model, file, load_adapter(file, component="unet"))


def loaded(file: Path, **options: Any) -> Any:
    """The UNet with a file, as diffusers loads it."""
    model = unet()
    model.load_lora_adapter(str(file.parent), weight_name=file.name, **options)
    return model.eval()


def test_the_graph_is_the_model() -> None:
    assert relative(traced()(*INPUTS)[0], run(BASE)) == 0


def test_a_file_of_a_pipeline(saved: Saved) -> None:
    axes = {len(update.shape) for update in saved.adapter.updates.values()}
    assert axes == ({2} if "linear" in saved.case else {2, 4})
    tuned, expected = lora_fx.inject(traced(), saved.adapter), run(saved.model)
    assert relative(run(tuned), expected) <= 2e-6
    assert relative(run(lora_fx.fold(tuned)), expected) <= 1e-5
    assert relative(run(traced()), expected) > 1e-2
    whole = load_adapter(saved.file.parent)
    assert {f"unet.{path}" for path in saved.adapter.updates} == set(whole.updates)
    assert saved.adapter.expects is not None
    assert all(map(saved.adapter.expects.matches, saved.adapter.updates))


def test_weights_are_those_that_diffusers_merges(saved: Saved) -> None:
    model = copy.deepcopy(saved.model)
    model.fuse_lora()
    for path, update in saved.adapter.updates.items():
        merged = model.get_submodule(path).base_layer.weight
        weight = BASE.get_submodule(path).weight.detach()
        means(update, weight, merged)


def test_a_file_of_one_model(saved: Saved, tmp_path: Path) -> None:
    saved.model.save_lora_adapter(str(tmp_path / "b"))
    adapter = load_adapter(tmp_path / "b" / WEIGHTS)
    assert set(adapter.updates) == set(load_adapter(tmp_path / "b", component="unet").updates)
    for path, update in adapter.updates.items():
        weight = BASE.get_submodule(path).weight.detach()
        assert torch.equal(update.weight(weight), saved.adapter.updates[path].weight(weight))
    (tmp_path / "b" / WEIGHTS).rename(tmp_path / "c.safetensors")
    again = load_adapter(tmp_path / "c.safetensors", name="a")
    assert str(again) == str(Adapter("a", adapter.updates))


def test_what_is_written_is_the_same_to_the_bit_and_to_diffusers(
    saved: Saved, tmp_path: Path
) -> None:
    other = tmp_path / "b.safetensors"
    save_adapter(saved.adapter, other, format="diffusers", component="unet")
    same_tensors(load_file(other), load_file(saved.file))
    again = load_adapter(other, component="unet")
    assert str(again) == str(Adapter("b", saved.adapter.updates))
    if saved.case in LORA:
        kind = "dora" if "dora" in saved.case else "rslora" if saved.case == "rslora" else "lora"
        assert {update.kind for update in saved.adapter.updates.values()} == {kind}
        fields = config_in(other)
        said = fields["unet.use_rslora"], fields["unet.use_dora"]
        assert said == ("rslora" in saved.case, "dora" in saved.case)
        assert (fields["unet.r"], fields["unet.lora_alpha"]) == (2, 3)
    expected = run(saved.model)
    assert relative(run(loaded(other, prefix="unet")), expected) <= 1e-6
    assert relative(run(BASE), expected) > 1e-2


@pytest.mark.parametrize("case", ["plain", "dora", "lokr of linear layers"])
def test_a_file_without_metadata_has_a_scale_of_1(tmp_path: Path, case: str) -> None:
    file = written(tmp_path / "a", trained(case), case)
    state = load_file(file)
    save_file(state, tmp_path / "b.safetensors")
    adapter = load_adapter(tmp_path / "b.safetensors", component="unet")
    expected = run(loaded(tmp_path / "b.safetensors", prefix="unet"))
    assert relative(run(lora_fx.inject(traced(), adapter)), expected) <= 2e-6
    assert relative(run(trained(case)), expected) > 1e-2
    save_adapter(adapter, tmp_path / "c.safetensors", format="diffusers", component="unet")
    again = load_file(tmp_path / "c.safetensors")
    assert all(torch.equal(again[key], state[key]) for key in state)
    with safe_open(tmp_path / "c.safetensors", framework="pt") as opened:
        assert (METADATA in opened.metadata()) == ("lokr" not in case)


def test_a_text_encoder_beside_the_model(tmp_path: Path, rewritten: Any) -> None:
    """As the pipeline writes it: the text encoder in another spelling."""
    from diffusers.utils import convert_state_dict_to_diffusers
    from transformers import CLIPTextConfig, CLIPTextModel

    fields = {"vocab_size": 97, "hidden_size": 24, "num_attention_heads": 2}
    more = {"num_hidden_layers": 1, "intermediate_size": 40, "max_position_embeddings": 16}
    torch.manual_seed(0)
    text = CLIPTextModel(CLIPTextConfig(**fields, **more))
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "out_proj"])
    peft.inject_adapter_in_model(config, text)  # transformers' own way wants one version of PEFT
    for name, parameter in text.named_parameters():
        if "lora_" in name:
            parameter.data.normal_()
    diffusers.StableDiffusionPipeline.save_lora_weights(
        str(tmp_path),
        unet_lora_layers=get_peft_model_state_dict(trained("patterns")),
        text_encoder_lora_layers=convert_state_dict_to_diffusers(get_peft_model_state_dict(text)),
        unet_lora_adapter_metadata=config_of("patterns").to_dict(),
        text_encoder_lora_adapter_metadata=config.to_dict(),
    )
    assert any("lora_linear_layer" in key for key in load_file(tmp_path / WEIGHTS))
    adapter = load_adapter(tmp_path, component="text_encoder")
    for path, update in adapter.updates.items():
        layer: Any = text.get_submodule(path)
        base = layer.base_layer.weight.detach()
        means(update, base, base + layer.get_delta_weight("default").detach())
    assert len(adapter.updates) == 2
    for hints in ({}, {"component": "text_encoder"}, {"component": "unet"}):
        first = load_adapter(tmp_path, name="a", **hints)
        _, again = rewritten(first, "diffusers", **hints)
        same_adapter(again, first)
        assert str(again) == str(first)


def test_lokr_of_a_config_and_lokr_without_are_not_mixed(tmp_path: Path) -> None:
    file = written(tmp_path / "a", trained("lokr"), "lokr")
    save_file(load_file(file), tmp_path / "b.safetensors")
    with_config, without = (load_adapter(f) for f in (file, tmp_path / "b.safetensors"))
    others = {path.replace("unet.", "transformer."): u for path, u in without.updates.items()}
    mixed, halves = (
        Adapter("a", {**with_config.updates, **more})
        for more in (others, {"unet.x": next(iter(without.updates.values()))})
    )
    for adapter, message in (
        (mixed, "a config of all components or of none, .* transformer"),
        (halves, "cannot hold LoKr beside others in one model, unet"),
    ):
        with pytest.raises(AdapterError, match=message):
            save_adapter(adapter, tmp_path / "c.safetensors", format="diffusers")


def test_a_grouped_convolution_has_a_grouped_up(reads: Any, rewritten: Any) -> None:
    def base() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(6, 8, 3, groups=2))

    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["0"])
    with pytest.warns(UserWarning, match="Merging is not supported"):
        model = peft.get_peft_model(base(), config)
    for parameter in model.parameters():
        parameter.data.normal_(0.0, 0.3) if parameter.requires_grad else None
    state = get_peft_model_state_dict(model)
    state = {key.replace("base_model.model", "unet"): value for key, value in state.items()}
    assert state["unet.0.lora_B.weight"].shape == (8, 2, 1, 1)
    adapter = reads(state | {"unet.0.alpha": torch.tensor(6.0)}, component="unet")
    x = torch.randn(2, 6, 5, 7, generator=torch.Generator().manual_seed(0))
    gm = lora_fx.trace(base(), (x,))
    with torch.no_grad():
        expected = model(x)
        assert relative(lora_fx.inject(gm, adapter)(x), expected) <= 1e-6
        assert relative(gm(x), expected) > 1e-2
    found, _ = rewritten(adapter, "diffusers", component="unet")
    assert all(torch.equal(found[key], tensor) for key, tensor in state.items())
