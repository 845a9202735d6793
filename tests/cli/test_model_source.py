"""What a command line can name as a model, and the inputs made for it."""

import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from lora_fx.cli.model_source import find_model
from lora_fx.errors import LoraFxError
from lora_fx.testing import tiny

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
    with pytest.raises(LoraFxError, match=r"^:make: no such directory or file; expected a Hugging"):
        find_model(":make")
    (tmp_path / "mine.py").write_text("")
    with pytest.raises(LoraFxError, match=r"mine\.py: is a file of another kind; expected a Hugg"):
        find_model(str(tmp_path / "mine.py"))
    with pytest.raises(LoraFxError, match=r"holds no config\.json"):
        find_model(str(tmp_path))
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(LoraFxError, match="this is an adapter"):
        find_model(str(tmp_path))


def test_a_module_that_is_not_found_is_told_with_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(
        LoraFxError, match=r"cannot be imported: .*: give .* no_such\.py:make, start"
    ):
        find_model("no_such:make")
    (tmp_path / "wanting.py").write_text("import no_such_package")
    with pytest.raises(LoraFxError, match=r": install no_such_package for this Python$"):
        find_model(f"{tmp_path / 'wanting.py'}:make")


def test_a_directory_gives_the_architecture_that_it_names(tmp_path: Path) -> None:
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


def test_a_file_of_python_is_loaded_by_its_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever it is called, beside others of its name, and with what lies beside it."""
    import sys

    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "beside_the_file.py").write_text("from torch import nn\nSIZE = 4\n")
    source = SOURCE.replace("from torch import nn", "from beside_the_file import SIZE, nn")
    for place, size in (("my-model.v2.py", 5), ("one/json.py", 6), ("two/json.py", 7)):
        file = tmp_path / place
        file.parent.mkdir(exist_ok=True)
        file.write_text(source.replace("(3, 5)", f"(3, {size})"))
        for _ in range(2):
            model = find_model(f"{file}:alone").model
            assert isinstance(model, nn.Linear)
            assert model.out_features == size
    with pytest.raises(LoraFxError, match=r"absent\.py: no such file"):
        find_model(f"{tmp_path / 'absent.py'}:alone")


RAISING = """
import sys


class Silent(Exception):
    def __str__(self):
        raise ValueError


def raises():
    return {}["key"]


def leaves():
    sys.exit(0)


def interrupted():
    raise KeyboardInterrupt


def silent():
    raise Silent


def verifies():
    from lora_fx import VerificationError

    raise VerificationError("mine")
"""


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("raises", r"KeyError: 'key', at .*raising\.py:11: return {}\[\"key\"\]"),
        ("leaves", r"the code called sys.exit\(0\), at .*raising\.py:15: sys.exit\(0\)"),
        ("silent", r"raising\.py:silent: Silent, at .*raising\.py:23"),
        ("verifies", r"VerificationError: mine, at .*raising\.py:29"),
    ],
)
def test_what_the_users_function_raises_is_told_with_its_line(
    name: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / "raising.py").write_text(RAISING)
    with pytest.raises(LoraFxError, match=message) as caught:
        find_model(f"{tmp_path / 'raising.py'}:{name}")
    assert type(caught.value) is LoraFxError
    with pytest.raises(KeyboardInterrupt):
        find_model(f"{tmp_path / 'raising.py'}:interrupted")


@pytest.mark.parametrize("source", ["def f(:", "import no_module_of_this_name", "raise SystemExit"])
def test_a_file_that_cannot_be_imported_is_told(source: str, tmp_path: Path) -> None:
    (tmp_path / "damaged.py").write_text(source)
    for _ in range(2):
        with pytest.raises(LoraFxError, match=r"damaged\.py cannot be imported: .*"):
            find_model(f"{tmp_path / 'damaged.py'}:make")


def test_a_damaged_program_is_refused_whatever_is_damaged(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "saved.pt2"
    torch.export.save(torch.export.export(nn.Linear(3, 5), (torch.ones(4, 3),)), path)
    whole = path.read_bytes()
    half, flipped = whole[: len(whole) // 2], bytearray(whole)
    flipped[200::97] = bytes(byte ^ 0x5A for byte in flipped[200::97])
    for damaged in (half, whole.replace(b'"nodes"', b'"n_des"'), whole[:-9], bytes(flipped)):
        path.write_bytes(damaged)
        with pytest.raises(LoraFxError, match=r"saved\.pt2: "):
            find_model(str(path))
    assert "Traceback" not in capfd.readouterr().err
