"""Names of files against the names of a base: one layer each, or all that each may mean."""

from __future__ import annotations

import pytest
import torch

from lora_fx.layers.base_layers import BaseLayers
from lora_fx.layers.layer import Layer
from lora_fx.layers.moves import MOVED, RENAMED
from lora_fx.layers.resolve import Names, Resolved, Size


def layer(out: int = 5, into: int = 3) -> Layer:
    return Layer(path="", kind="linear", shape=(out, into), dtype=torch.float32)


def resolved(
    asked: list[str] | dict[str, Size], *paths: str, furthest: int = RENAMED, **sizes: Layer
) -> Resolved:
    base = BaseLayers(
        dict.fromkeys(paths, layer()) | {k.replace("__", "."): v for k, v in sizes.items()}
    )
    names = asked if isinstance(asked, dict) else dict.fromkeys(asked, ())
    return Names.of(base).resolve(names, furthest)


@pytest.mark.parametrize(
    "start",
    [
        "diffusion_model.", "transformer.", "unet.", "base_model.model.", "module.", "_orig_mod.",
        "model.", "lora_transformer_", "lora_unet_", "lora_prior_unet_", "lycoris_", "anything.",
        "base_model.model.model.module._orig_mod.",
    ],
)  # fmt: skip
def test_any_prefix_is_stripped(start: str) -> None:
    paths = ["blocks.0.attn.to_q", "blocks.1.attn.to_q", "proj"]
    spell = (lambda p: p.replace(".", "_")) if start.endswith("_") else str
    found = resolved([start + spell(path) for path in paths], *paths, "blocks.1.attn.to_k")
    assert list(found.found.values()) == paths
    assert not found.several


def test_a_wrapper_around_the_model_is_added() -> None:
    paths = ["0.auto_model.layers.0.fc", "0.auto_model.layers.1.fc", "2.linear"]
    found = resolved(["layers.0.fc", "layers.1.fc"], *paths)
    assert list(found.found.values()) == paths[:2]
    assert found.moved == {"": "0.auto_model"}


@pytest.mark.parametrize("part", ["_orig_mod", "module", "_checkpoint_wrapped_module"])
def test_a_wrapper_inside_of_a_path_says_nothing(part: str) -> None:
    paths = ["net.0.fc", "net.1.fc", "net.1.out"]
    wrapped = [f"net.{part}.0.fc", f"net.1.{part}.fc", f"net.1.out.{part}"]
    assert [*resolved(wrapped[:2], *paths).found.values()] == paths[:2]
    assert [*resolved(paths[:2], *wrapped).found.values()] == wrapped[:2]
    assert not resolved(["net.1.other.fc"], *paths).found


def test_layers_are_called_by_a_file_s_names_too() -> None:
    names = Names.of(BaseLayers({"a.fc": layer(), "b.fc": layer()}))
    called = names.called(["old.a.fc", "none"])
    assert [*called] == ["a.fc", "b.fc", "old.a.fc"]
    assert called["old.a.fc"] is called["a.fc"]


def test_parts_in_another_order_are_found() -> None:
    paths = ["model.language_model.layers.0.q", "model.vision.layers.0.q", "lm_head"]
    found = resolved(["language_model.model.layers.0.q", "language_model.lm_head"], *paths)
    assert list(found.found.values()) == [paths[0], "lm_head"]
    assert found.moved["language_model.model"] == "model.language_model"


def test_what_serves_all_names_of_a_group_is_meant() -> None:
    text, vision = "model.language_model.layers.0", "model.vision_tower.layers.0"
    paths = [f"{text}.q", f"{text}.gate", f"{vision}.q"]
    names = ["model.layers.0.q", "model.layers.0.gate"]
    assert list(resolved(names, *paths).found.values()) == paths[:2]
    alone = resolved(names[:1], *paths)
    assert alone.several == {names[0]: [paths[0], paths[2]]}
    assert not alone.found


def test_a_size_tells_two_apart() -> None:
    base = {"a__layers__0__q": layer(5, 3), "b__layers__0__q": layer(7, 3)}
    assert resolved({"x.layers.0.q": (7, 3)}, **base).found == {"x.layers.0.q": "b.layers.0.q"}
    assert resolved({"x.layers.0.q": ()}, **base).several


def test_a_layer_never_becomes_another_s() -> None:
    """Numbers stay: what is moved is around a layer's list, not in it."""
    assert not resolved(["blocks.0.attn.q"], "blocks.1.attn.q", "blocks.2.attn.q").found
    assert not resolved(["a.layers.3.attn.q"], "b.layers.1.attn.q").found
    assert not resolved(["blocks.0.fc"], "fc").found


def test_a_last_part_alone_tells_no_other_place() -> None:
    paths = ["layer.0.attention.output.dense", "layer.0.intermediate.dense"]
    assert not resolved(["layer.0.output.dense"], "layer.0.attention.dense").found
    assert not resolved(["layer.0.dense"], *paths).found
    assert not resolved(["encoder.fc"], "decoder.fc").found


def test_a_move_that_is_known_serves_what_is_short() -> None:
    paths = ["layers.0.mlp.experts.w", "layers.0.mlp.gate"]
    names = ["layers.0.block_sparse_moe.experts.w", "layers.0.block_sparse_moe.gate"]
    found = resolved(names, *paths)
    assert list(found.found.values()) == paths
    assert found.moved == {"block_sparse_moe": "mlp"}
    assert not resolved(names[1:], *paths).found


def test_what_another_name_has_is_not_meant_twice() -> None:
    assert resolved(["fc", "old.fc"], "fc").found == {"fc": "fc"}


def test_a_part_of_a_model_gets_no_other_part_s_names() -> None:
    names = ["decoder.layers.0.fc"]
    assert resolved(names, "encoder.layers.0.fc").found
    assert not resolved(names, "encoder.layers.0.fc", furthest=MOVED).found


def test_dots_tell_more_than_underscores() -> None:
    assert resolved(["x.a_b.c"], "a_b.c", "a.b_c").found == {"x.a_b.c": "a_b.c"}
    assert resolved(["lora_unet_a_b_c"], "a_b.c", "a.b_c").several
    assert resolved(["a_b.c"], "a_b.c", "a.b_c").found == {"a_b.c": "a_b.c"}
