"""kohya's names against a base: one layer each, or refused."""

from __future__ import annotations

import pytest
import torch

from lora_fx.errors import AdapterError
from lora_fx.layers.base_layers import BaseLayers
from lora_fx.layers.layer import Layer
from lora_fx.layers.pipeline_names import find, name_of, part_of


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
        (
            ["lora_unet_vace_blocks_0_ffn_0"],
            ["vace_blocks.0.ffn.net.0.proj"],
            ["blocks.0.ffn.net.0.proj"],
        ),
        (["lora_transformer_blocks_0_ffn_0"], ["blocks.0.ffn.net.0.proj"], []),
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
        # a trainer's name is one as a whole, and words do not tell where a part of it begins
        (["unet_vace_blocks_0_ffn_0"], ["blocks.0.ffn.net.0.proj"], "1 names mean no layer"),
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
