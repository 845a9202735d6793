"""Directories that bitsandbytes quantised, loaded without it: every weight as it was stored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_fx.errors import LoraFxError
from lora_fx.graph.example import STORED
from lora_fx.tasks import load
from lora_fx.testing import save_bitsandbytes, tiny
from lora_fx.testing.pipelines import tiny_unet

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "nf4": ("LlamaForCausalLM", {}),
    "nf4 of plain factors": ("LlamaForCausalLM", {"nested": False}),
    "fp4": ("LlamaForCausalLM", {"kind": "fp4"}),
    "8 bits": ("LlamaForCausalLM", {"kind": "int8"}),
    "in shards": ("LlamaForCausalLM", {"shards": 3}),
    "held as bfloat16": ("LlamaForCausalLM", {"storage": torch.bfloat16}),
    "turned round": ("GPT2LMHeadModel", {}),
    "8 bits, square and turned round": ("GPT2LMHeadModel", {"kind": "int8"}),
    "a classifier": ("BertForSequenceClassification", {}),
}


@pytest.mark.parametrize("what", CASES)
def test_a_model_has_the_numbers_that_were_stored(what: str, tmp_path: Path) -> None:
    kind, options = CASES[what]
    torch.manual_seed(0)
    original = tiny(kind).eval()
    before = {name: value.clone() for name, value in original.state_dict().items()}
    numbers = save_bitsandbytes(original, tmp_path / "base", **options)
    source = load(tmp_path / "base")[0]
    state = source.model.state_dict()
    assert len(numbers) > 3
    for name, value in state.items():
        wanted = numbers.get(name, before[name])
        assert value.dtype == wanted.dtype == torch.float32
        assert torch.equal(value, wanted), name
        assert (name in numbers) != torch.equal(value, before[name])  # the control
    word = {"int8": None}.get(options.get("kind", "nf4"), f"{options.get('kind', 'nf4')}:64")
    assert source.task.get(STORED) == word


def base(tmp_path: Path, **options: Any) -> Path:
    torch.manual_seed(0)
    save_bitsandbytes(tiny("LlamaForCausalLM").eval(), tmp_path / "base", **options)
    return tmp_path / "base"


def test_it_may_be_loaded_in_half_precision(tmp_path: Path) -> None:
    source = load(base(tmp_path), dtype=torch.float16)[0]
    assert {value.dtype for value in source.model.parameters()} == {torch.float16}


def test_nothing_is_left_in_the_directory_or_changed(tmp_path: Path) -> None:
    directory = base(tmp_path)
    before = {file.name: file.read_bytes() for file in directory.iterdir()}
    load(directory)
    assert {file.name: file.read_bytes() for file in directory.iterdir()} == before


def test_the_config_that_is_written_beside_a_file_quantises_nothing(tmp_path: Path) -> None:
    source = load(base(tmp_path))[0]
    (tmp_path / "out").mkdir()
    assert source.write_beside is not None
    source.write_beside(tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in written
    assert written["architectures"] == ["LlamaForCausalLM"]


def broken(directory: Path, change: Any) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def test_a_part_that_is_missing_is_named_with_its_file(tmp_path: Path) -> None:
    directory = base(tmp_path)
    name = "model.layers.0.mlp.up_proj.weight"
    broken(directory, lambda tensors: tensors.pop(f"{name}.quant_map"))
    with pytest.raises(LoraFxError, match=rf"model.safetensors: {name}: lacks quant_map"):
        load(directory)


def test_eight_bits_without_scales_are_refused(tmp_path: Path) -> None:
    directory = base(tmp_path, kind="int8")
    name = "model.layers.0.mlp.up_proj"
    broken(directory, lambda tensors: tensors.pop(f"{name}.SCB"))
    with pytest.raises(LoraFxError, match=rf"{name}.weight: int8 without"):
        load(directory)


def test_a_pickle_or_a_damaged_file_is_refused(tmp_path: Path) -> None:
    directory = base(tmp_path)
    (directory / "model.safetensors").write_bytes(b"1234")
    with pytest.raises(LoraFxError, match="save the quantised model again"):
        load(directory)
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    with pytest.raises(LoraFxError, match="save the quantised model again"):
        load(directory)


def in_bytes(directory: Path, dtype: torch.dtype, scale: str = "weight_scale") -> None:
    """Stores the linear layers of a directory in bytes, with a scale of each beside."""
    file, most = directory / next(directory.glob("*.safetensors")).name, {torch.int8: 127}
    tensors = load_file(file)
    for name in [name for name in tensors if name.endswith("proj.weight")]:
        factor = tensors[name].abs().max() / most.get(dtype, 448)
        tensors[name] = (tensors[name] / factor).to(dtype)
        if scale:
            tensors[f"{name.removesuffix('weight')}{scale}"] = factor
    save_file(tensors, file, {"format": "pt"})


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("method", ["modelopt", None])
def test_bytes_whose_scale_nobody_reads_are_refused(
    method: str | None, dtype: torch.dtype, tmp_path: Path
) -> None:
    """transformers would take the bytes for the numbers, and only warn of what is left over."""
    model = tiny("LlamaForCausalLM")
    if method:
        model.config.quantization_config = {"quant_method": method}
    model.save_pretrained(tmp_path)
    in_bytes(tmp_path, dtype)
    said = r"in bytes, and LlamaForCausalLM has no place .*proj\.weight_scale.*dequantize\(\)"
    with pytest.raises(LoraFxError, match=said):
        load(tmp_path)


def test_bytes_whose_scale_is_read_are_numbers(tmp_path: Path) -> None:
    plain, stored = tmp_path / "plain", tmp_path / "stored"
    model = tiny("LlamaForCausalLM", hidden_size=32).eval()
    model.save_pretrained(plain)
    method = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    model.config.quantization_config = method
    model.save_pretrained(stored)
    file = stored / "model.safetensors"
    in_bytes(stored, torch.float8_e4m3fn, "weight_scale_inv")
    scales = {n: t.reshape(1, 1) if "scale" in n else t for n, t in load_file(file).items()}
    save_file(scales, file, {"format": "pt"})
    in_bytes(plain, torch.float8_e4m3fn, "")  # the control: as a cast, whose numbers they are
    states = [load(directory)[0].model.state_dict() for directory in (plain, stored)]
    for name, own in model.state_dict().items():
        is_cast = name.endswith("proj.weight")
        off = [float((state[name] - own).norm() / own.norm()) for state in states]
        assert off[1] < 0.05 < (off[0] if is_cast else 1)


def test_a_directory_that_something_else_quantised_says_what_to_do(tmp_path: Path) -> None:
    model = tiny("LlamaForCausalLM")
    model.config.quantization_config = {"quant_method": "gptq", "bits": 4}
    model.save_pretrained(tmp_path)
    with pytest.raises(LoraFxError, match=r"quantised by gptq; load.*model\.dequantize\(\)"):
        load(tmp_path)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # of transformers' own code
def test_a_model_that_stays_packed_is_refused_by_what_quantised_it(tmp_path: Path) -> None:
    """BitNet's four numbers a byte are read by transformers itself, into layers of its own."""
    model, file = tiny("LlamaForCausalLM", hidden_size=32), tmp_path / "model.safetensors"
    model.config.quantization_config = {
        "quant_method": "bitnet", "modules_to_not_convert": ["lm_head"],
    }  # fmt: skip
    model.save_pretrained(tmp_path)
    tensors = load_file(file)
    layers = [name for name in tensors if name.endswith("_proj.weight")]
    for name in layers:
        tensors[name] = torch.zeros(len(tensors[name]) // 4, tensors[name].shape[1]).byte()
        tensors[f"{name}_scale"] = torch.ones(1)
    save_file(tensors, file, {"format": "pt"})
    said = r"_proj\.weight, .* packed for kernels .*\nIts weights are quantised by bitnet; load"
    with pytest.raises(LoraFxError, match=said):
        load(tmp_path)


def test_a_model_of_diffusers_in_few_bits_says_what_to_do(tmp_path: Path) -> None:
    unet = tiny_unet()
    unet.save_pretrained(tmp_path)
    file = next(tmp_path.glob("*.safetensors"))
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("to_q.weight"))
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    save_file({**tensors, f"{name}_scale": torch.ones(())}, file, {"format": "pt"})
    with pytest.raises(LoraFxError, match=rf"in bytes, .* no place .*: {name}_scale; load"):
        load(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(LoraFxError, match=r"quantised by bitsandbytes; load"):
        load(tmp_path)
