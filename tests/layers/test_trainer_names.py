"""The table of trainers' names: each line is of something, and a base says which lines it has."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import pytest
import torch

from lora_fx.layers.base_layers import BaseLayers
from lora_fx.layers.layer import Layer
from lora_fx.layers.meanings import Meaning
from lora_fx.layers.trainer_names import _DECODERS, TABLE, _lines, names_in_decoder, names_of

Named = Callable[[BaseLayers], Mapping[str, Meaning]]


def base(*paths: str, shape: tuple[int, ...] = (5, 3)) -> BaseLayers:
    layer = Layer(path="", kind="linear", shape=shape, dtype=torch.float32)
    return BaseLayers(dict.fromkeys(paths, layer))


@pytest.mark.parametrize(("table", "names_of"), [(TABLE, names_of), (_DECODERS, names_in_decoder)])
def test_every_line_gives_the_name_that_it_has(table: str, names_of: Named) -> None:
    for theirs, ours in _lines(table):
        every = [path.lstrip("~?").replace("#", "7").replace("@", "x.y") for path in ours]
        paths = [path for path, own in zip(every, ours, strict=True) if "?" not in own]
        name = theirs.replace("#", "7").replace("@", "x.y")
        meant = names_of(base(*every))[name]
        assert meant == Meaning(tuple(paths), None, None, "~~" in ours[0], meant.least)
        assert meant.least == len(theirs.removeprefix("@.").split("."))
        held = names_of(base(*(f"unet.{path}" for path in every)))
        assert tuple(f"unet.{path}" for path in paths) in {m.layers for m in held.values()}


def test_a_line_whose_layers_are_not_all_there_gives_none() -> None:
    parts = ["to_q", "to_k", "to_v"]
    paths = [f"transformer_blocks.0.attn.{part}" for part in parts]
    assert "double_blocks.0.img_attn.qkv" in names_of(base(*paths))
    assert "double_blocks.0.img_attn.qkv" not in names_of(base(*paths[:2]))
    assert names_of(base("fc", "layers.0.self_attn.q_proj")) == {}


def test_a_line_may_ask_for_a_layer_that_it_does_not_mean() -> None:
    """MiniMax has the halves of a gate in another order than PixArt, which has no such layer."""
    path, told = "transformer_blocks.0.ff.net.0.proj", "transformer_blocks.0.adaln_proj.linear"
    meant = names_of(base(path, told, shape=(6, 3)))["blocks.0.mlp.fc1"]
    assert (meant.layers, meant.halves_swapped) == ((path,), True)
    assert "blocks.0.mlp.fc1" not in names_of(base(path, shape=(6, 3)))


def test_scale_and_shift_alone_are_swapped() -> None:
    name = "joint_blocks.3.context_block.adaLN_modulation.1"
    path = "transformer_blocks.3.norm1_context.linear"
    assert names_of(base(path, shape=(6, 3)))[name].halves_swapped
    assert not names_of(base(path, shape=(18, 3)))[name].halves_swapped


def test_a_name_that_may_be_of_two_layers_is_of_none() -> None:
    paths = [f"{start}.timestep_embedder.linear_1" for start in ("time", "context.time")]
    assert names_of(base(paths[0]))["time_in.in_layer"].layers == (paths[0],)
    assert "time_in.in_layer" not in names_of(base(*paths))


def test_the_blocks_of_a_unet_are_counted_through() -> None:
    down = [f"down_blocks.{b}.resnets.{r}.conv1" for b in range(3) for r in range(2)]
    down += [f"down_blocks.{b}.downsamplers.0.conv" for b in range(2)]
    up = [f"up_blocks.{b}.resnets.{r}.conv2" for b in range(3) for r in range(3)]
    rest = ["up_blocks.1.upsamplers.0.conv", "up_blocks.0.attentions.1.proj_in"]
    rest += ["up_blocks.0.upsamplers.0.conv", "mid_block.resnets.1.conv_shortcut"]
    names = names_of(base(*down, *up, *rest)).items()
    found = {m.layers[0]: name for name, m in names if re.match("(in|out|mid)", name)}
    assert [found[path] for path in down] == [
        *(f"input_blocks.{n}.0.in_layers.2" for n in (1, 2, 4, 5, 7, 8)),
        "input_blocks.3.0.op", "input_blocks.6.0.op",
    ]  # fmt: skip
    assert [found[path] for path in up] == [f"output_blocks.{n}.0.out_layers.3" for n in range(9)]
    assert [found[path] for path in rest] == [
        "output_blocks.5.1.conv", "output_blocks.1.1.proj_in", "output_blocks.2.2.conv",
        "middle_block.2.skip_connection",
    ]  # fmt: skip
