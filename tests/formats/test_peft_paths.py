"""Where updates are kept in a file: the reverse of what the file's paths mean."""

from __future__ import annotations

from typing import Any

import torch

from lora_fx import Update
from lora_fx.adapters.source_record import Stored
from lora_fx.formats.peft_paths import Home, homes_of
from lora_fx.formats.peft_places import places_of
from lora_fx.formats.peft_record import PeftConfig
from lora_fx.formats.peft_types import LORA
from lora_fx.layers.base_layers import layers_of


def update(**settings: Any) -> Update:
    stored = Stored({}, settings) if settings else None
    return Update(torch.ones(2, 3), torch.ones(5, 2), 1.0, stored=stored)


def test_an_output_projection_is_inside_of_its_attention() -> None:
    homes = homes_of({"mha": update(), "mha.out_proj": update(), "other.out_proj": update()})
    assert homes["mha.out_proj"] == Home("mha.base_layer.out_proj", "")
    assert homes["other.out_proj"] == Home("other.out_proj", "other.out_proj")
    places = places_of([home.key for home in homes.values()], PeftConfig(LORA), layers_of(None))
    assert {path: places[home.key].path for path, home in homes.items()} == {p: p for p in homes}


def test_parameters_keep_their_order_when_one_is_gone() -> None:
    inner, outer = (update(parameter=name, depth=d) for name, d in (("a", 2), ("c", 0)))
    homes = homes_of({"m.a": inner, "m.c": outer})
    assert homes["m.c"] == Home("m", "m.c", "m.c")
    assert homes["m.a"] == Home("m.base_layer", "m.a", "m.a")


def test_a_parameter_called_weight_is_kept_at_its_module() -> None:
    homes = homes_of({"fc": update(parameter="weight", depth=0)})
    assert homes["fc"] == Home("fc", "fc.weight", "fc.weight")
