"""kohya's names against a base: one layer each, or refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lora_fx.adapters.adapter import Update
from lora_fx.errors import AdapterError
from lora_fx.formats import load_adapter
from lora_fx.formats.kohya.names import (
    ALGORITHMS,
    algorithm_of,
    find,
    name_of,
    part_of,
    rank_of_algorithm,
)
from lora_fx.layers.base_layers import BaseLayers
from lora_fx.layers.layer import Layer


def layer(name: str, kind: str, shape: tuple[int, ...]) -> Layer:
    return Layer(path="", kind=kind, shape=shape, dtype=torch.float32, name=name)


LINEAR = layer("Linear", "linear", (5, 3))


KINDS = {
    "a.b": layer("Conv2d", "conv2d", (5, 3, 3, 3)),
    "a.c": layer("LayerNorm", "norm", (5,)),
    "d": layer("Embedding", "embedding", (5, 11)),
}
BLOCKS = ["down_blocks.0.attn1.to_out.0", "down_blocks.0.attn1.to_q", "mid_block.proj_in"]
FLAT = [f"lora_unet_{path}".replace(".", "_") for path in BLOCKS]
PIPELINE = ["unet.proj", "text_encoder.proj", "text_encoder_2.proj", "text_encoder_3.proj"]


def found(names: list[str], *paths: str) -> list[str]:
    layers = {path: KINDS.get(path, LINEAR) for path in paths}
    meant = find(dict.fromkeys(names, ()), BaseLayers(layers))
    assert all(meaning.is_whole for meaning in meant.values())
    return [meant[name].layers[0] for name in names]


def test_the_part_is_the_beginning_of_a_name() -> None:
    parts = ["unet", "te", "te1", "te2", "te3"]
    names = [f"lora_{part}_x" for part in parts] + ["lora_x", "x", "lycoris_x"]
    assert [part_of(name) for name in names] == [*parts, None, None, "lycoris"]


@pytest.mark.parametrize(
    ("names", "meant", "others"),
    [
        (
            [f"lora_unet_{path}".replace(".", "_") for path in BLOCKS],
            BLOCKS,
            ["down_blocks.0.attn1.to"],
        ),
        ([f"lora_{part}_proj" for part in ("unet", "te1", "te2", "te3")], PIPELINE, []),
        (["lora_unet_proj"], ["transformer.proj"], []),
        (["lora_te3_proj"], ["text_encoder_2.proj"], []),
        # the part that a name begins with is the longer end
        (["lora_unet_proj"], ["unet.proj"], ["proj"]),
        (["lora_unet_proj"], ["unet.proj"], ["transformer.proj"]),
        # layers of all kinds
        (["lycoris_a_b", "lycoris_a_c", "lycoris_d"], [*KINDS], []),
    ],
)
def test_a_name_means_one_layer(names: list[str], meant: list[str], others: list[str]) -> None:
    assert found(names, *others, *meant) == meant


@pytest.mark.parametrize(
    ("names", "paths", "message"),
    [
        (["unet_a_b_c"], ["a.b_c", "a_b.c", "other"],
         r"mean several layers of the base: lora_unet_a_b_c \(a\.b_c or a_b\.c\); pass prefix="),
        (["unet_a_b_c"], ["a.b_c", "a_b.c", "a.b.c"], r"a\.b_c or a_b\.c or a\.b\.c"),
        (["unet_a", "unet_b"], ["a", "c"], r"1 names mean no layer .*: lora_unet_b; .*: a, c$"),
        (["unet_a", "te_b"], ["a"], r"lora_te_b; .*pass component= .* of te, unet$"),
        (["te1_a", "te2_a"], ["a"], "lora_te1_a and lora_te2_a are both of a; pass comp"),
    ],
)  # fmt: skip
def test_a_name_that_does_not_is_refused(names: list[str], paths: list[str], message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        found([f"lora_{name}" for name in names], *paths)


@pytest.mark.parametrize(
    ("path", "component", "name"),
    [
        ("a.b_c", "unet", "lora_unet_a_b_c"),
        ("a.b", "lycoris", "lycoris_a_b"),
        ("unet.a.b", None, "lora_unet_a_b"),
        ("transformer.a", None, "lora_unet_a"),
        ("text_encoder.a", None, "lora_te_a"),
        ("text_encoder_2.a", None, "lora_te2_a"),
    ],
)
def test_a_path_has_one_name(path: str, component: str | None, name: str) -> None:
    assert name_of(path, [path, "text_encoder.b"], component) == name
    if name == "lora_te_a":
        assert name_of(path, [path, "text_encoder_2.b"], component) == "lora_te1_a"


@pytest.mark.parametrize(
    ("start", "down", "up"),
    [
        ("diffusion_model.", "lora_A.weight", "lora_B.weight"),
        ("model.diffusion_model.", "lora_down.weight", "lora_up.weight"),
        ("lora_prior_unet_", "lora_down.weight", "lora_up.weight"),
        ("lora_unet_", "lora_A.weight", "lora_B.weight"),
        ("anything.", "lora_down.weight", "lora_up.weight"),
        ("", "down.weight", "up.weight"),
        ("diffusion_model.", "lora_A.default.weight", "lora_B.default.weight"),
    ],
)
def test_any_trainer_s_spelling_is_told_and_read(
    tmp_path: Path, start: str, down: str, up: str
) -> None:
    net = nn.ModuleDict({"block": nn.ModuleDict({"fc": nn.Linear(3, 5)})})
    path = "block_fc" if start.endswith("_") else "block.fc"
    pair = {down: torch.randn(2, 3), up: torch.ones(5, 2), "alpha": torch.tensor(1.0)}
    tensors = {f"{start}{path}.{end}": tensor for end, tensor in pair.items()}
    save_file(tensors, tmp_path / "a.safetensors")
    [(found, update)] = load_adapter(tmp_path / "a.safetensors", base=net).updates.items()
    assert found == "block.fc"
    assert isinstance(update, Update)
    assert (update.shape, update.scale) == ((5, 3), 0.5)
    with pytest.raises(AdapterError, match="pass base="):
        load_adapter(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("leaves", "algorithm"),
    [
        ("lora_down.weight lora_up.weight", "lora"),
        ("lora_down.weight lora_up.weight lora_mid.weight alpha dora_scale", "lora"),
        ("hada_w1_a hada_w1_b hada_w2_a hada_w2_b alpha", "loha"),
        ("lokr_w1 lokr_w2 dora_scale", "lokr"),
        ("diff diff_b", "full"),
        ("diff_b", "full"),
        ("oft_blocks alpha", "oft"),
        ("oft_blocks rescale", "oft"),
        ("weight on_input", "ia3"),
        ("w_norm b_norm", "norm"),
        ("alpha", None),
        ("alpha dora_scale", None),
        ("hada_w1_a lora_up.weight", None),
        ("w_norm diff", None),
        ("lora_A", None),
    ],
)
def test_leaves_are_of_one_algorithm_or_none(leaves: str, algorithm: str | None) -> None:
    assert algorithm_of(leaves.split()) == algorithm
    assert algorithm is None or algorithm in ALGORITHMS


@pytest.mark.parametrize(
    ("algorithm", "shapes", "rank"),
    [
        ("lora", {"lora_down.weight": (2, 3)}, 2),
        ("loha", {"hada_w1_a": (5, 2), "hada_w1_b": (2, 3)}, 2),
        ("lokr", {"lokr_w1": (5, 3), "lokr_w2_b": (2, 3)}, 2),
        ("lokr", {"lokr_w1_b": (2, 3), "lokr_w2": (4, 3)}, 2),
        ("lokr", {"lokr_w1": (5, 3), "lokr_w2": (4, 3)}, None),
        ("full", {"diff": (5, 3)}, None),
        ("oft", {"oft_blocks": (5, 3, 3)}, None),
    ],
)
def test_the_rank_is_what_alpha_is_divided_by(
    algorithm: str, shapes: dict[str, tuple[int, ...]], rank: int | None
) -> None:
    tensors = {leaf: torch.ones(shape) for leaf, shape in shapes.items()}
    assert rank_of_algorithm(algorithm, tensors) == rank


def test_a_module_that_is_called_like_an_adapter_is_a_part_of_its_path(tmp_path: Path) -> None:
    net = nn.ModuleDict({"default": nn.ModuleDict({"fc": nn.Linear(3, 5)}), "fc": nn.Linear(3, 5)})
    start = "diffusion_model.default.fc.lora"
    tensors = {f"{start}_A.weight": torch.randn(2, 3), f"{start}_B.weight": torch.ones(5, 2)}
    save_file(tensors, tmp_path / "a.safetensors")
    assert set(load_adapter(tmp_path / "a.safetensors", base=net).updates) == {"default.fc"}
