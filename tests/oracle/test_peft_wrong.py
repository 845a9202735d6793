"""Where PEFT 0.21.2 computes something else than its own formula: the formula is what we keep.

If one of these fails because PEFT agrees with us, it was mended there: drop the case.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

from lora_fx import fold, inject, load_adapter, save_adapter, trace
from lora_fx.adapters.adapter import Update
from lora_fx.testing import Attention, Between, operators, relative, save_peft_case

pytestmark = [
    # PEFT says that it cannot merge into a grouped convolution.
    pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups > 1"),
    # PEFT says that it leaves the bias of an attention module out, and takes one for a matrix.
    pytest.mark.filterwarnings("ignore:Adapter .* have invalid shape"),
    pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed but the targeted layer"),
]


def saved(base: nn.Module, path: Path) -> Any:
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["layer"])
    owner = peft.get_peft_model(copy.deepcopy(base), config)
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in owner.named_parameters():
            if "lora_" in name:
                parameter.normal_(0.0, 0.4)
    owner.save_pretrained(path)
    return owner.eval()


GEOMETRIES: dict[str, Callable[[], nn.Module]] = {
    "dilation": lambda: nn.Conv2d(4, 6, 3, padding=2, dilation=2),
    "circular": lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"),
    "reflect": lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
}


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_a_convolution_keeps_its_geometry(geometry: str, tmp_path: Path) -> None:
    """PEFT's branch drops dilation and padding mode (peft#3697); merged, it is right."""
    torch.manual_seed(0)
    base, x = Between(GEOMETRIES[geometry]()).eval(), torch.randn(3, 4, 7, 8)
    owner = saved(base, tmp_path / "a")
    gm = trace(base, (x,))
    injected = inject(gm, load_adapter(tmp_path / "a"))
    with torch.no_grad():
        try:
            unmerged = owner(x)
        except RuntimeError:  # a branch of another size cannot even be added
            unmerged = base(x)
        merged = owner.merge_and_unload()(x)
        assert relative(injected(x), merged) <= 1e-6
        assert relative(fold(injected)(x), merged) <= 1e-5
        assert relative(unmerged, merged) > 1e-2
        assert relative(base(x), merged) > 1e-2


def test_a_kernel_of_one_axis_in_three_dimensions_folds(tmp_path: Path) -> None:
    """PEFT's merge takes a kernel (1, 1, k) for a point, and fails."""
    torch.manual_seed(0)
    base = Between(nn.Conv3d(4, 6, (1, 1, 3), padding=(0, 0, 1))).eval()
    x = torch.randn(2, 4, 3, 4, 5)
    owner = saved(base, tmp_path / "a")
    injected = inject(trace(base, (x,)), load_adapter(tmp_path / "a"))
    with torch.no_grad():
        wanted = owner(x)
        assert relative(injected(x), wanted) <= 1e-6
        assert relative(fold(injected)(x), wanted) <= 1e-5
        assert relative(base(x), wanted) > 1e-2
    with pytest.raises(RuntimeError):
        owner.merge_and_unload()


def test_what_a_grouped_convolution_gets_stays_beside_it(tmp_path: Path) -> None:
    """Each output of the branch sees all inputs, which no grouped weight can say."""
    torch.manual_seed(0)
    base, x = Between(nn.Conv2d(4, 6, 3, padding=1, groups=2)).eval(), torch.randn(3, 4, 7, 8)
    owner = saved(base, tmp_path / "a")
    injected = inject(trace(base, (x,)), load_adapter(tmp_path / "a"))
    folded = fold(injected)
    with torch.no_grad():
        wanted = owner(x)
        assert relative(injected(x), wanted) <= 1e-6
        assert relative(folded(x), wanted) <= 1e-5
        assert relative(base(x), wanted) > 1e-2
    assert operators(folded) == operators(injected)


def test_the_output_projection_of_attention_is_adapted_as_peft_trained_it(tmp_path: Path) -> None:
    """PEFT adds the delta of ``out_proj`` twice, in forward and in merge (peft#3774): so do we.

    Alone of these cases its two forms agree, and what was trained by one is meant by both.
    """
    torch.manual_seed(0)
    base, x = Attention(12).eval(), torch.randn(3, 5, 12)
    owner = saved(base, tmp_path / "a")
    adapter = load_adapter(tmp_path / "a")
    outer = adapter.updates["layer.out_proj"]
    assert isinstance(outer, Update)
    once = replace(adapter, updates=adapter.updates | {"layer.out_proj": replace(outer, scale=1.5)})
    gm = trace(base, (x,))
    with torch.no_grad():
        wanted = owner(x)
        assert relative(inject(gm, adapter)(x), wanted) <= 1e-6
        assert relative(fold(inject(gm, adapter))(x), wanted) <= 1e-5
        assert relative(inject(gm, once)(x), wanted) > 1e-2
        assert relative(owner.merge_and_unload()(x), wanted) <= 1e-6


ATTENTION = ["attention lora", "attention rslora", "attention lora_bias"]


@pytest.mark.parametrize("name", ATTENTION)
def test_the_update_of_an_output_projection_is_what_peft_runs(name: str, tmp_path: Path) -> None:
    """Twice what its factors say; the bias of the packed projection PEFT leaves out (peft#3774)."""
    case = save_peft_case(name, tmp_path / "a")
    adapter = load_adapter(case.directory, base=case.base)
    outer, inner = adapter.updates["mha"], adapter.updates["mha.out_proj"]
    assert isinstance(inner, Update)
    assert isinstance(outer, Update)
    layer = case.load(case.directory).get_submodule("base_model.model.mha.base_layer.out_proj")
    assert relative(inner.delta(), 2 * layer.get_delta_weight("default").detach()) <= 1e-6
    run = adapter.updates | {"mha": replace(outer, bias=None)}
    once = run | {"mha.out_proj": replace(inner, scale=inner.scale / 2)}
    gm = trace(case.base, (case.x,))
    wanted = case.run(case.directory)
    with torch.no_grad():
        found, other = (inject(gm, replace(adapter, updates=u))(case.x) for u in (run, once))
        assert relative(found, wanted) <= 1e-6
        assert relative(other, wanted) > 1e-2


@pytest.mark.parametrize("name", ["attention lora", "attention lora_bias"])
def test_an_attention_of_one_scale_is_written_so_that_peft_runs_it(
    name: str, tmp_path: Path
) -> None:
    case = save_peft_case(name, tmp_path / "a")
    adapter = load_adapter(case.directory, base=case.base, name="a")
    outer, inner = adapter.updates["mha"], adapter.updates["mha.out_proj"]
    assert isinstance(inner, Update)
    assert isinstance(outer, Update)
    here = {"mha": replace(outer, bias=None), "mha.out_proj": replace(inner, scale=outer.scale)}
    adapter = replace(adapter, updates=here, expects=None)
    save_adapter(adapter, tmp_path / "b")
    gm = trace(case.base, (case.x,))
    with torch.no_grad():
        found = inject(gm, adapter)(case.x)
        assert relative(case.run(tmp_path / "b"), found) <= 1e-6
        assert relative(case.run(case.directory), found) > 1e-2
    again = load_adapter(tmp_path / "b", base=case.base).updates["mha.out_proj"]
    assert isinstance(again, Update)
    assert relative(again.delta(), inner.delta() / 2) <= 1e-6
