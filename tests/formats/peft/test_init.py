"""PEFT's directories, PEFT being writer, reader and oracle."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import loralib as lora
import pytest
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_fx.adapters.updates import Update
from lora_fx.errors import AdapterError, AdapterWarning
from lora_fx.formats import load_adapter, save_adapter
from lora_fx.testing import config_in, relative, same_adapter, same_bits, same_tensors

PATTERNS = {
    "rank_pattern": {"layers.1": 3, "block.fc": 1, "^fc": 4},
    "alpha_pattern": {"fc": 7, r"layers\.\d": 0.5},
}
RANKS = {"rank_pattern": {"layers.1": 3, "block.fc": 1}}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("mlp", {"target_modules": ["fc"]}),
    "all-linear": ("mlp", {"target_modules": "all-linear"}),
    "only the outer of two fc": ("mlp", {"target_modules": "fc"}),
    "regex": ("mlp", {"target_modules": r"layers\.[02]|.*fc"}),
    "rslora": ("mlp", {"target_modules": "all-linear", "use_rslora": True, "r": 3}),
    "patterns": ("mlp", {"target_modules": "all-linear", **PATTERNS}),
    "rslora with patterns": ("mlp",
     {"target_modules": "all-linear", "use_rslora": True, **PATTERNS}),
    "exclude": ("mlp", {"target_modules": "all-linear", "exclude_modules": ["layers.1"]}),
    "exclude by regex": ("mlp", {"target_modules": ["fc"], "exclude_modules": r"block\..*"}),
    "ranks": ("mlp", {"target_modules": "all-linear", **RANKS, "lora_alpha": 7}),
    "ranks of rslora": ("mlp", {"target_modules": "all-linear", **RANKS, "use_rslora": True}),
    "lora_bias": ("mlp", {"target_modules": ["fc", "layers.0"], "lora_bias": True}),
    "bias lora_only": ("mlp", {"bias": "lora_only"}),
    "bias lora_only of one layer": ("mlp", {"target_modules": "fc", "bias": "lora_only"}),
    "bias all": ("mlp", {"bias": "all"}),
    "modules_to_save": ("mlp", {"modules_to_save": ["classifier", "norm"]}),
    "bias all with modules_to_save": ("mlp", {"bias": "all", "modules_to_save": ["classifier"]}),
    "bert": ("bert", {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"}),
    "bert all-linear": ("bert", {"target_modules": "all-linear", "task_type": "SEQ_CLS"}),
    "bias all with a nested module": ("bert",
     {"target_modules": ["query"], "bias": "all", "modules_to_save": ["pooler"]}),
    "gpt2": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "use_rslora": True}),
    "gpt2 all-linear": ("gpt2", {"target_modules": "all-linear"}),
    "llama": ("llama", {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [0, 2]}),
    "llama by layers_pattern": ("llama",
     {"target_modules": ["k_proj"], "layers_to_transform": 1, "layers_pattern": "layers"}),
}  # fmt: skip
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TENSORS = "adapter_model.safetensors"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_an_adapter_is_what_peft_makes_of_the_base(lab: Any, case: str, dtype: torch.dtype) -> None:
    kind, options = CASES[case]
    directory = lab.write(kind, dtype, **options)
    adapter = load_adapter(directory)
    base, oracle = lab.base(kind), lab.read(kind, directory).get_base_model()
    layers = {path: m for path, m in oracle.named_modules() if isinstance(m, LoraLayer)}
    assert set(adapter.updates) == set(layers)
    for path, layer in layers.items():
        update = adapter.updates[path]
        expected: torch.Tensor = layer.get_delta_weight("default").detach()
        if isinstance(layer.get_base_layer(), Conv1D):
            expected = expected.T  # PEFT gives the delta as the layer stores its weight, (in, out)
        assert update.down.dtype == update.up.dtype == dtype
        assert update.shape == tuple(expected.shape)
        assert relative(update.delta(), expected) <= 1e-6
        assert relative(0.9 * update.delta(), expected) > 1e-2
        assert update.kind == ("rslora" if options.get("use_rslora") else "lora")
        assert (update.bias is not None) == options.get("lora_bias", False)
        if update.bias is not None:
            same_bits(update.bias, layer.lora_B["default"].bias.to(dtype))

    sites = [path for path, m in base.named_modules() if isinstance(m, nn.Linear | Conv1D)]
    assert adapter.expects is not None
    assert {path for path in sites if adapter.expects.matches(path)} == set(adapter.updates)

    before, changed = dict(base.named_parameters()), dict[str, torch.Tensor]()
    for key, value in oracle.named_parameters():
        path = key.replace(".base_layer.", ".").replace(".modules_to_save.default.", ".")
        if ".lora_" not in key and ".original_module." not in key:
            changed |= {} if torch.equal(value, before[path]) else {path: value.to(dtype)}
    same_tensors(adapter.replacements, changed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_peft_computes_the_same_from_what_is_written(
    lab: Any, tmp_path: Path, case: str, dtype: torch.dtype
) -> None:
    """As a directory, and as one file, which has the same tensors and the same config in it."""
    kind, options = CASES[case]
    original = lab.write(kind, dtype, **options)
    first, written = load_adapter(original, name="a"), tmp_path / "written"
    save_adapter(first, written)
    expected = lab.run(kind, lab.read(kind, original))
    assert torch.equal(lab.run(kind, lab.read(kind, written)), expected)
    assert not torch.allclose(lab.run(kind, lab.base(kind)), expected, rtol=1e-2)

    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    save_adapter(first, files[0], format="peft_file")
    same_tensors(load_file(files[0]), load_file(written / TENSORS))
    assert config_in(files[0]) == config_in(written)
    second = load_adapter(files[0], name="a")
    same_adapter(second, first)
    assert str(second) == str(first)
    save_adapter(second, files[1], format="peft_file")
    assert files[0].read_bytes() == files[1].read_bytes()


# What is said of the tensors alone, in place of the config.
HINTS: dict[str, dict[str, Any]] = {
    "plain": {"alpha": 3},
    "all-linear": {"alpha": 3},
    "rslora": {"alpha": 3, "use_rslora": True, "r": 3},
    "ranks": {"alpha": 7},
    "ranks of rslora": {"alpha": 3, "use_rslora": True},
    "lora_bias": {"alpha": 3},
}


@pytest.mark.parametrize("case", HINTS)
def test_hints_take_the_place_of_the_config(lab: Any, case: str) -> None:
    kind, options = CASES[case]
    directory = lab.write(kind, **options)
    expected = load_adapter(directory)
    file = shutil.copy(directory / TENSORS, lab.root / "alone.safetensors")
    pickled = lab.root / "alone.bin"
    torch.save(load_file(file), pickled)
    for found in (
        load_adapter(file, **HINTS[case]),
        load_adapter(pickled, allow_pickle=True, **HINTS[case]),
    ):
        same_adapter(found, expected)
        kinds = [{update.kind for update in a.updates.values()} for a in (found, expected)]
        assert kinds[0] == kinds[1]
    louder = load_adapter(file, **{**HINTS[case], "alpha": 1.1 * HINTS[case]["alpha"]})
    with pytest.raises(AssertionError):
        same_adapter(louder, expected)


def test_the_config_of_a_file_is_the_one_in_peft_s_directory(lab: Any) -> None:
    directory = lab.write(**CASES["ranks"][1], modules_to_save=["classifier"])
    file = directory / TENSORS
    same_adapter(load_adapter(file), load_adapter(directory))
    with pytest.raises(AdapterError, match=r"adapter_config\.json: says what alpha"):
        load_adapter(file, alpha=3)
    other = file.rename(directory / "step_500.safetensors")
    with pytest.raises(AdapterError, match=r"step_500\.safetensors: holds no config.*alpha="):
        load_adapter(other)


def test_a_pickle_holds_no_config(lab: Any) -> None:
    with pytest.raises(AdapterError, match=r"ends in \.safetensors"):
        save_adapter(load_adapter(lab.write()), lab.root / "a.bin", format="peft_file")


def test_without_target_modules_there_is_no_rule(lab: Any) -> None:
    directory = lab.write()
    lab.edit_config(directory, target_modules=None)
    assert load_adapter(directory).expects is None


@pytest.mark.parametrize("name", ["adapter_config.json", TENSORS])
def test_a_missing_file_is_named(lab: Any, name: str) -> None:
    directory = lab.write()
    (directory / name).unlink()
    (left,) = (file.name for file in directory.iterdir())
    with pytest.raises(AdapterError, match=rf"{name}: no such file; .*and this one has {left}"):
        load_adapter(directory)
    (directory / left).unlink()
    with pytest.raises(AdapterError, match="and this one has nothing"):
        load_adapter(directory)


def test_a_pickle_is_read_only_when_asked_for(lab: Any) -> None:
    directory = lab.write()
    expected = load_adapter(directory).updates["fc"].delta()
    file = directory / TENSORS
    torch.save(load_file(file), directory / "adapter_model.bin")
    file.unlink()
    with pytest.raises(AdapterError, match=r"adapter_model\.bin: a pickle .* allow_pickle=True"):
        load_adapter(directory)
    found = load_adapter(directory, allow_pickle=True).updates["fc"].delta()
    assert torch.equal(found, expected)
    assert not torch.equal(0.9 * found, expected)


def resize(part: str, *shape: int) -> Any:
    return lambda tensors: {
        key: torch.ones(shape) if part in key else tensor for key, tensor in tensors.items()
    }


def without(part: str) -> Any:
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if part not in key}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (resize("lora_A", 4, 5), r"lora_A\.weight \(4, 5\) should be of rank 2 by r or"),
        (resize("lora_B.weight", 7, 4), r"lora_B\.weight is \(7, 4\), expected .* r = 2"),
        (resize("weight", 4, 4), r"lora_A\.weight \(4, 4\) should be of rank 2 by r or"),
        (resize("lora_A", 2, 5, 1, 1), r"lora_B\.weight is \(7, 2\), expected .*, 1, 1\)"),
        (resize("lora_B.weight", 14), r"lora_B\.weight is \(14,\), expected"),
        (resize("weight", 2, 2, 3), r"lora_B\.weight is \(2, 2, 3\), expected .*, 1\)"),
        (resize("weight", 2, 2, 1, 1, 1, 1), ".* a kernel of more than 3"),
        (without("lora_B.weight"), "half of a pair, up is missing"),
        (without("lora_A"), "half of a pair, down is missing"),
        (resize("lora_B.bias", 3), r"lora_B\.bias is \(3,\), expected .* out = 7"),
        (without("bias"), "has .*lora_bias is True"),
    ],
)
def test_tensors_that_contradict_the_config_are_refused(
    lab: Any, change: Any, message: str
) -> None:
    directory = lab.write(target_modules=["layers.0"], lora_bias=True)
    lab.edit_tensors(directory, change)
    with pytest.raises(AdapterError, match=rf"layers\.0: {message}"):
        load_adapter(directory)


@pytest.mark.parametrize("part", ["lora_A", "lora_B", None])
def test_an_adapter_without_effect_is_warned_of(lab: Any, part: str | None) -> None:
    directory = lab.write()
    if part is None:
        lab.edit_config(directory, lora_alpha=0)
    else:
        lab.edit_tensors(
            directory, lambda t: {k: v.zero_() if part in k else v for k, v in t.items()}
        )
    with pytest.warns(AdapterWarning, match="no effect"):
        assert load_adapter(directory).updates["fc"].scale == (0 if part is None else 1.5)


def test_a_saved_fan_in_fan_out_is_not_believed(lab: Any) -> None:
    directory = lab.write("gpt2", target_modules=["c_attn"])
    saved = config_in(directory)["fan_in_fan_out"]
    before = load_adapter(directory).updates["transformer.h.0.attn.c_attn"].delta()
    lab.edit_config(directory, fan_in_fan_out=not saved)
    after = load_adapter(directory).updates["transformer.h.0.attn.c_attn"].delta()
    assert after.shape == (36, 12)
    assert torch.equal(before, after)


@pytest.mark.parametrize("name", ["adapter_config.json", TENSORS])
def test_a_damaged_file_loads_or_raises_the_typed_error(lab: Any, name: str, refusals: Any) -> None:
    directory = lab.write(target_modules=["fc"], modules_to_save=["classifier"])
    refused = refusals(directory / name, lambda _: load_adapter(directory), 400, within=900)
    assert len(refused) > 200
    assert all(str(directory) in message for message in refused)


def test_a_module_that_is_stored_whole_is_none_that_the_config_targets(lab: Any) -> None:
    saved = {"target_modules": ["fc", "classifier"], "modules_to_save": ["classifier"]}
    rule = load_adapter(lab.write("mlp", **saved)).expects
    assert rule is not None
    assert [path for path in ("fc", "classifier") if rule.matches(path)] == ["fc"]


@pytest.mark.parametrize("name", [TENSORS, "adapter_model.bin"])
def test_an_adapter_in_shards_is_the_same(name: str, lab: Any) -> None:
    directory = lab.write("mlp", target_modules="all-linear", use_rslora=True, r=3)
    whole = directory / TENSORS
    expected, tensors = load_adapter(directory), load_file(whole)
    whole.unlink()
    keys, stem = sorted(tensors), name.partition(".")[0]
    names: dict[str, str] = {}
    for part in (0, 1):
        shard = name.replace(stem, f"{stem}-0000{part + 1}-of-00002")
        own = {key: tensors[key] for key in keys[part::2]}
        save_file(own, directory / shard) if "safe" in name else torch.save(own, directory / shard)
        names |= dict.fromkeys(own, shard)
    index = directory / f"{name}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": names}))
    for path in (directory, index):  # the config beside it says what the index' tensors mean
        found = load_adapter(path, allow_pickle=True)
        assert found.updates.keys() == expected.updates.keys()
        pairs = [(found.updates[p].delta(), expected.updates[p].delta()) for p in expected.updates]
        assert all(torch.equal(one, two) for one, two in pairs)


GROUPS = [True, False, True]


def old_directory(path: Path, layer: lora.MergedLinear, **fields: Any) -> Path:
    """What PEFT 0.2 wrote of a fused layer: loralib's tensors, the second as a convolution's."""
    path.mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_modules": ["qkv"]}
    config |= {"bias": "none", "enable_lora": GROUPS, "merge_weights": True, **fields}
    (path / "adapter_config.json").write_text(json.dumps(config))
    start = "base_model.model.qkv"
    pair = {
        f"{start}.lora_A.weight": layer.lora_A,
        f"{start}.lora_B.weight": layer.lora_B[..., None],
    }
    save_file(
        {k: v.detach().contiguous() for k, v in pair.items()}, path / "adapter_model.safetensors"
    )
    return path


def test_an_adapter_of_fused_outputs_from_before_0_3_is_read_as_one_of_today(
    tmp_path: Path,
) -> None:
    """``enable_lora``, which PEFT set by itself where one module was targeted."""
    torch.manual_seed(0)
    layer = lora.MergedLinear(5, 9, r=2, lora_alpha=3, enable_lora=GROUPS, merge_weights=False)
    nn.init.normal_(layer.lora_B)
    base, x = nn.Linear(5, 9), torch.randn(4, 7, 5)
    base.load_state_dict({"weight": layer.weight, "bias": layer.bias})
    adapter = load_adapter(old_directory(tmp_path / "a", layer))
    update = adapter.updates["qkv"]
    assert isinstance(update, Update)
    assert relative(x @ update.weight(base.weight).T + base.bias, layer(x)) <= 1e-6
    assert relative(base(x), layer(x)) > 1e-2
    save_adapter(adapter, tmp_path / "b")  # which PEFT of today loads
    assert config_in(tmp_path / "b").get("enable_lora") is None
    assert same_adapter(load_adapter(tmp_path / "b", name=adapter.name), adapter) is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"enable_lora": [1, 0]},
            r"adapter_config\.json: enable_lora is \[1, 0\], expected a list",
        ),
        (
            {"enable_lora": [True] + [False] * 99_999},
            r"enable_lora is of 100000 outputs, expected at most 64",
        ),
        (
            {"enable_lora": [True] * 3},
            r"of outputs of \[2, 2, 2\] rows, but up has 8",
        ),
    ],
)
def test_a_config_that_fuses_otherwise_is_refused(
    fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    layer = lora.MergedLinear(5, 12, r=2, enable_lora=GROUPS)
    with pytest.raises(AdapterError, match=message):
        load_adapter(old_directory(tmp_path / "a", layer, **fields))
