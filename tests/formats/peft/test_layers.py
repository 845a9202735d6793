"""Every type of PEFT on every layer that it has it for, PEFT being writer, reader and oracle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import fx, nn
from transformers.pytorch_utils import Conv1D

import lora_fx
from lora_fx import AdapterError
from lora_fx.adapters.updates import Update
from lora_fx.formats import load_adapter, save_adapter
from lora_fx.formats.peft.lora import LoraConfig, lora_tensors, read_lora
from lora_fx.testing import PEFT_CASES, means, relative, same_tensors, save_peft_case

TENSORS = "adapter_model.safetensors"


def canonical(module: Any) -> torch.Tensor:
    """The weight of a layer as (out, in, *kernel)."""
    weight: torch.Tensor = module.weight.detach()
    return weight.T if isinstance(module, nn.Embedding | Conv1D) else weight


def weight_at(model: nn.Module, path: str) -> torch.Tensor:
    """What an update of a path acts on."""
    named = dict(model.named_parameters())
    if path in named:
        return named[path].detach()
    module = model.get_submodule(path)
    if isinstance(module, nn.MultiheadAttention):
        weight: torch.Tensor = module.in_proj_weight.detach()
        return weight
    return canonical(module)


def test_every_weight_is_the_one_that_peft_merges(peft_case: Any) -> None:
    adapter = load_adapter(peft_case.directory, base=peft_case.base)
    oracle = peft_case.load(peft_case.directory)
    grouped = [p for p, u in adapter.updates.items() if isinstance(u, Update) and u.groups > 1]
    merged = None if grouped else oracle.merge_and_unload()
    for path, update in adapter.updates.items():
        if merged is None or path == "mha.out_proj":
            continue  # no weight is it; PEFT merges the latter twice
        means(update, weight_at(peft_case.base, path), weight_at(merged, path))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_what_is_written_is_what_was_read(
    peft_case: Any, dtype: torch.dtype, tmp_path: Path
) -> None:
    file = peft_case.directory / TENSORS
    save_file({key: tensor.to(dtype) for key, tensor in load_file(file).items()}, file)
    adapter = load_adapter(peft_case.directory, base=peft_case.base, name="same")
    assert all(bool(t.isfinite().all()) for u in adapter.updates.values() for t in u.tensors())
    save_adapter(adapter, tmp_path / "written")
    same_tensors(load_file(tmp_path / "written" / TENSORS), load_file(file))
    save_adapter(adapter, tmp_path / "written.safetensors", format="peft_file")
    again = load_adapter(tmp_path / "written.safetensors", base=peft_case.base, name="same")
    assert str(again) == str(adapter)
    for path, update in adapter.updates.items():
        assert all(map(torch.equal, again.updates[path].tensors(), update.tensors())), path
    if dtype == torch.float32:
        wanted = peft_case.run(peft_case.directory)
        assert torch.equal(peft_case.run(tmp_path / "written"), wanted)
        with torch.no_grad():
            assert relative(peft_case.base(peft_case.x), wanted) > 1e-2


# Only the base tells the orientation of experts, how wide VeRA draws from a seed, and that a core
# with a kernel (3, 1) is of a Conv1d; without one these are refused, here or by their layer.
OPEN = {
    "experts": "pass base=, the model",
    "conv1d loha core": "Use the base",
    "linear vera seed": r"drawn from a seed.*pass base=.*narrow",
}
GRAPHS: dict[Any, fx.GraphModule] = {}  # of each model of the table, only read


def test_without_a_base_nothing_else_is_read(
    peft_case: Any, request: pytest.FixtureRequest
) -> None:
    name = request.node.callspec.params["peft_case"]
    make = PEFT_CASES[name][0]
    if make not in GRAPHS:  # cases that are made alike have one base, bit for bit
        GRAPHS[make] = lora_fx.trace(peft_case.base, (peft_case.x,))
    gm = GRAPHS[make]
    same_tensors(gm.state_dict(), peft_case.base.state_dict())
    wanted = load_adapter(peft_case.directory, base=peft_case.base)
    for start, message in OPEN.items():
        if name.startswith(start):
            with pytest.raises(AdapterError, match=message):
                lora_fx.inject(gm, load_adapter(peft_case.directory))
            return
    found = load_adapter(peft_case.directory)
    assert found.updates.keys() == wanted.updates.keys()
    with torch.no_grad():
        one, other = (lora_fx.inject(gm, a)(peft_case.x) for a in (found, wanted))
        assert relative(one, other) <= 1e-6
        assert relative(gm(peft_case.x), one) > 1e-2


# A case, what is changed of it, fields of its config or tensors by their keys, and the message.
PRUNED = {"rank_pattern": {"wide.lora_E": [True, False, False]}}
BESIDE = "embedding tokens beside lora"
WRONG: dict[str, tuple[str, dict[str, Any], str]] = {
    "rank of loha": ("linear loha", {"r": 3}, r": hada_w1_b \(2, .\) .* rank 3 by r"),
    "rank of lokr": ("linear lokr", {"r": 2}, r"lokr_w2_b \(1, .\) should be of rank 2"),
    "rank of vera": ("linear vera", {"r": 3}, r"vera_lambda_d \(2,\) .* rank 3"),
    "rank of adalora": ("linear adalora", {"init_r": 4}, r"lora_A \(3, .\) .* 4 by init_r"),
    "mask of adalora": ("linear adalora pruned", PRUNED, r"wide: lora_A \(2, 3\) .* of rank 1"),
    "a size of ia3": ("linear ia3", {"wide.ia3_l": (2, 2)}, r"ia3_l is \(2, 2\)"),
    "the side of ia3": ("linear ia3", {"feedforward_modules": []}, r"narrow: ia3_l is \(1, 5\)"),
    "the side of a convolution": ("conv2d ia3", {"feedforward_modules": None},
     r"feedforward_modules is missing, and ia3_l \(1, 6, 1, 1\)"),
    "a pattern of ia3": ("linear ia3", {"feedforward_modules": "(.*)**X"},
     r"feedforward_modules: .* is not a regex"),
    "projections beside a seed": ("linear vera", {"save_projection": False},
     r"holds \['vera_A', 'vera_B'\], but save_projection is False"),
    "no projections": ("linear vera seed", {"save_projection": True}, "holds no projection"),
    "experts": ("experts one", {"narrow.lora_A.weight": (8, 4)},
     r"narrow: lora_A and lora_B .* rank 2"),
    "blocks of oft": ("linear oft", {"wide.oft_R.weight": (3, 1)}, r"wide: "),
    "an old oft": ("linear oft", {"peft_version": "0.17.0"}, r"before 0\.18"),
    "magnitudes": ("linear lora", {"use_dora": True}, r"wide: has .*use_dora True"),
    "a size of a magnitude": ("conv2d dora", {"wide.lora_magnitude_vector": (6,)},
     r"wide: lora_magnitude_vector is \(6,\), expected \(1, 6, 1, 1\)"),
    "tokens": (BESIDE, {"trainable_token_indices": {"wide": [9]}},
     "wide: 1 indices, .* and 2 rows"),
    "a name of tokens": (BESIDE, {"trainable_token_indices": {"other": [9, 2]}},
     r"trainable_token_indices names other, not wide"),
    "a misspelt pattern": ("linear loha", {"rank_pattern": {"misspelt": 3}},
     r"rank_pattern has keys that match no adapted module: misspelt"),
    "a feature": ("linear adalora", {"use_qalora": True}, "use_qalora is True, a feature"),
    "an unknown field": ("linear lokr", {"unheard_of": 1}, "unheard_of is 1, an unknown"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_agree_is_refused(name: str, tmp_path: Path) -> None:
    of, changes, message = WRONG[name]
    case = save_peft_case(of, tmp_path / "a")
    config = case.directory / "adapter_config.json"
    fields = {key: value for key, value in changes.items() if "." not in key}
    config.write_text(json.dumps({**json.loads(config.read_text()), **fields}))
    file = case.directory / TENSORS
    shapes = {f"base_model.model.{k}": v for k, v in changes.items() if k not in fields}
    save_file({**load_file(file), **{k: torch.ones(shape) for k, shape in shapes.items()}}, file)
    with pytest.raises(AdapterError, match=rf"^{tmp_path}.*{message}"):
        load_adapter(case.directory, base=case.base)


HINTED = ["embedding dora", "conv2d grouped lora", "conv3d dora", "attention lora"]


@pytest.mark.parametrize("name", HINTED)
def test_hints_take_the_place_of_a_config(name: str, tmp_path: Path) -> None:
    case = save_peft_case(name, tmp_path / "a")
    alone = tmp_path / "alone.safetensors"
    (case.directory / TENSORS).rename(alone)
    copy = load_adapter(alone, alpha=3, name="a")
    alone.rename(case.directory / TENSORS)
    assert str(copy) == str(load_adapter(case.directory, name="a"))


Shapes = dict[str, tuple[int, ...]]
PAIR: Shapes = {"lora_A.weight": (2, 3), "lora_B.weight": (5, 2)}
TABLE: Shapes = {"lora_embedding_A": (2, 11), "lora_embedding_B": (5, 2)}
CONV: Shapes = {"lora_A.weight": (2, 4, 3, 1), "lora_B.weight": (6, 2, 1, 1)}


def test_a_table_beside_biases_has_none() -> None:
    tensors = {leaf: torch.randn(size) for leaf, size in TABLE.items()}
    update = read_lora("fc", tensors, LoraConfig(r=2, lora_alpha=3, lora_bias=True))
    assert (update.shape, update.scale, update.bias) == ((5, 11), 1.5, None)
    same_tensors(lora_tensors(update, False), tensors)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (PAIR | TABLE, "has .*, expected"),
        ({"lora_embedding_A": (2, 11)}, "half of a pair, up is missing"),
        (CONV | {"lora_B.weight": (6, 2)}, r"lora_B.weight is \(6, 2\), exp"),
        (CONV | {"lora_B.weight": (6, 2, 3, 1)}, r"is \(6, 2, 3, 1\), expected"),
        (CONV | {"lora_B.weight": (6, 3, 1, 1)}, "r = 2: the ranks differ"),
        (TABLE | {"lora_embedding_A": (3, 11)}, r"lora_embedding_A \(3, 11\) .* rank 2"),
        ({"lora_embedding_A": (2, 11, 1), "lora_embedding_B": (5, 2, 1)}, r"expected \(r, in\)"),
    ],
)
def test_shapes_that_are_of_no_layer_are_refused(shapes: Shapes, message: str) -> None:
    tensors = {leaf: torch.ones(size) for leaf, size in shapes.items()}
    with pytest.raises(AdapterError, match=message):
        read_lora("fc", tensors, LoraConfig(r=2, lora_alpha=3))
