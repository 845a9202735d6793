"""What a command line can name as a model, and the inputs made for it."""

import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lora_fx.errors import LoraFxError
from lora_fx.model_source import example_inputs, find_model

SOURCE = """
import torch
from torch import nn

layer = nn.Linear(3, 5)
NUMBER = 3


def alone():
    return layer


def whole():
    return layer, (torch.ones(4, 3),), {}, {"input": {0: "batch"}}


def nothing():
    return layer, None, None


def wrong():
    return "layer", ()


def long():
    return layer, (), {}, None, "more"


def listed():
    return layer, [torch.ones(4, 3)]
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module in the current directory, which is on no import path yet."""
    import sys

    (tmp_path / "source_of_models.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    monkeypatch.delitem(sys.modules, "source_of_models", raising=False)
    return "source_of_models"


def test_a_function_gives_a_model_and_its_inputs(module: str) -> None:
    source = find_model(f"{module}:whole")
    assert isinstance(source.model, nn.Linear)
    assert [value.shape for value in source.args] == [(4, 3)]
    assert source.dynamic_shapes == {"input": {0: "batch"}}


@pytest.mark.parametrize("name", ["alone", "nothing"])
def test_later_parts_may_be_left_out(module: str, name: str) -> None:
    source = find_model(f"{module}:{name}")
    assert (source.args, source.kwargs, source.dynamic_shapes) == ((), {}, None)


BAD = {
    "NUMBER": "found a int, expected a function",
    "absent": "has no function 'absent'",
    "wrong": r"returned \(str, tuple\), expected \(model, args, kwargs, dynamic_shapes\)",
    "long": r"returned \(Linear, tuple, dict, NoneType, str\)",
    "listed": "args must be a tuple",
}


@pytest.mark.parametrize("name", BAD)
def test_a_function_that_gives_no_model_is_refused(module: str, name: str) -> None:
    with pytest.raises(LoraFxError, match=rf"{module}:{name}: .*{BAD[name]}"):
        find_model(f"{module}:{name}")


def test_a_program_keeps_its_inputs(tmp_path: Path) -> None:
    program = torch.export.export(nn.Linear(3, 5), (torch.ones(4, 3),))
    torch.export.save(program, tmp_path / "saved.pt2")
    found = find_model(str(tmp_path / "saved.pt2")).model
    assert isinstance(found, torch.export.ExportedProgram)
    (args, _) = found.example_inputs
    assert args[0].shape == (4, 3)


def test_a_file_that_is_no_program_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "damaged.pt2"
    path.write_bytes(b"no archive")
    with pytest.raises(LoraFxError, match=r"damaged\.pt2: is damaged or no program"):
        find_model(str(path))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("data/notes.txt", "no program")
    with pytest.raises(LoraFxError, match=r"damaged\.pt2: torch\.export\.load cannot read it"):
        find_model(str(path))


def test_other_paths_are_refused(tmp_path: Path) -> None:
    with pytest.raises(LoraFxError, match="nowhere: no such directory or file; expected a Hugging"):
        find_model(str(tmp_path / "nowhere"))
    with pytest.raises(LoraFxError, match=r"holds no config\.json"):
        find_model(str(tmp_path))
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(LoraFxError, match="this is an adapter"):
        find_model(str(tmp_path))


def test_a_directory_gives_the_architecture_that_it_names(tmp_path: Path, tiny: Any) -> None:
    model = tiny("BertForMaskedLM")
    model.save_pretrained(tmp_path)
    source = find_model(str(tmp_path))
    assert type(source.model) is type(model)
    assert not source.model.training
    found = source.model.state_dict()["bert.encoder.layer.0.output.dense.weight"]
    assert torch.equal(found, model.bert.encoder.layer[0].output.dense.weight)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(LoraFxError, match="transformers cannot load it"):
        find_model(str(tmp_path))


def test_text_inputs_have_padding_and_two_dynamic_axes() -> None:
    import transformers

    inputs, shapes = example_inputs(transformers.BertConfig(vocab_size=31), "here")
    assert inputs["input_ids"].shape == (2, 16)
    assert int(inputs["input_ids"].max()) < 31
    assert inputs["attention_mask"].sum(1).tolist() == [16, 12]
    assert shapes == {name: {0: "batch", 1: "sequence"} for name in inputs}


def test_a_decoder_has_its_own_length() -> None:
    import transformers

    inputs, shapes = example_inputs(transformers.T5Config(vocab_size=31), "here")
    assert inputs["decoder_input_ids"].shape == (2, 8)
    assert shapes["decoder_input_ids"] == {0: "batch", 1: "decoder_sequence"}


def test_images_have_a_dynamic_batch() -> None:
    import transformers

    inputs, shapes = example_inputs(transformers.ViTConfig(image_size=8), "here")
    assert inputs["pixel_values"].shape == (2, 3, 8, 8)
    assert shapes == {"pixel_values": {0: "batch"}}


def test_a_config_of_neither_is_refused() -> None:
    import transformers

    with pytest.raises(LoraFxError, match="here: no example inputs can be made for a time_series"):
        example_inputs(transformers.TimeSeriesTransformerConfig(), "here")
