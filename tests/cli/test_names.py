"""What a command line names: outputs of a file, an adapter's module, what it wrote."""

from __future__ import annotations

import json
from pathlib import Path

import onnxruntime as ort
import pytest

import lora_fx
from lora_fx.cli import main
from lora_fx.testing import make_adapter

MODEL = """
import torch
from torch import nn


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.one = nn.Linear(3, 5)

    def forward(self, x):
        return {"logits": self.one(x), "hidden": torch.tanh(x)}


class Both(nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.key = Inner(), Inner()

    def forward(self, x):
        return {"logits": self.query(x)["logits"] + self.key(x)["logits"], "hidden": torch.tanh(x)}


def inner():
    torch.manual_seed(0)
    return Inner().eval(), (torch.randn(4, 3),), {}, ({0: "batch"},)


def plain():
    return nn.Linear(3, 5).eval(), (torch.randn(4, 3),)


def both():
    torch.manual_seed(0)
    return Both().eval(), (torch.randn(4, 3),), {}, ({0: "batch"},)
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("home")
    (directory / "named.py").write_text(MODEL)
    lora_fx.save_adapter(make_adapter({"one": (5, 3)}), directory / "french")
    return directory


def call(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    return int(stop.value.code or 0)


def outputs(file: Path) -> list[str]:
    return [value.name for value in ort.InferenceSession(str(file)).get_outputs()]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["logits=scores"], ["scores", "hidden"]),
        (["hidden=logits", "logits=hidden"], ["hidden", "logits"]),
        (["first", "second"], ["first", "second"]),
        ([], ["logits", "hidden"]),
    ],
)
def test_outputs_are_called_as_asked(
    names: list[str], expected: list[str], home: Path, tmp_path: Path
) -> None:
    spec, out = f"{home / 'named.py'}:inner", tmp_path / "out"
    options = [word for name in names for word in ("--output-name", name)]
    assert call("export", spec, *options, "-o", out) == 0
    assert outputs(out / "model.onnx") == expected
    assert json.loads((out / "report.json").read_text())["outputs"] == expected
    told = set(expected) != {"logits", "hidden"} or not names  # else the file seems to be another's
    assert call("verify", out / "model.onnx", "--against", spec) == (0 if told else 2)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["same", "same"], "expected 2 different names, for logits, hidden"),
        (["logits=hidden"], "expected 2 different names"),
        (["one"], "expected 2 different names"),
        (["one", "two", "three"], "expected 2 different names"),
        (["loss=x"], "no loss; there are logits, hidden"),
        (["logits=a", "b"], "expected OLD=NEW each, an output once, or NAME for each output in"),
        (["logits=a", "logits=b"], "expected OLD=NEW each"),
        (["logits="], "expected OLD=NEW each"),
        (["logits=a\nb"], "expected a name that can be printed"),
        (["x", "y"], "x is an input too"),
    ],
)
def test_other_names_are_refused_and_nothing_is_written(
    names: list[str], message: str, home: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    options = [word for name in names for word in ("--output-name", name)]
    for dry in ((), ("--dry-run",)):
        spec = f"{home / 'named.py'}:inner"
        assert call("export", spec, *options, *dry, "-o", tmp_path / "out") == 2, dry
        said = capfd.readouterr().err
        assert message in said
        assert "output_names" not in said
    assert not (tmp_path / "out").exists()


def test_the_prefix_says_which_of_two_an_adapter_is_for(
    home: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    spec, french = f"{home / 'named.py'}:both", home / "french"
    assert call("export", spec, "--adapter", french, "-o", tmp_path / "never") == 2
    assert "pass --prefix, the path of the module" in capfd.readouterr().err
    out, file = tmp_path / "out", tmp_path / "french.onnx_adapter"
    told = ("--prefix", "query")
    swappable = ("--mode", "swappable", "--slots", "all-linear", "-o", out)
    assert call("export", spec, "--adapter", french, *told, *swappable) == 0
    capfd.readouterr()
    model = out / "model.onnx"
    assert call("adapter", french, "--for", model, *told, "-o", file) == 0
    said = capfd.readouterr().out
    assert "1 of 2 slots filled\n  query.one  rank 2  float32  64 bytes" in said
    assert "as the base: key.one" in said
    assert file.read_bytes() == (out / "french.onnx_adapter").read_bytes()
    assert call("verify", model, "--against", spec, "--adapter", french, *told) == 0
    capfd.readouterr()
    assert call("adapter", french, "--for", model, *told, "-o", file, "--force", "--json") == 0
    report = json.loads(capfd.readouterr().out)["file"]
    assert report["filled"] == [{"path": "query.one", "rank": 2, "dtype": "float32", "size": 64}]
    assert (report["left"], report["size"]) == (["key.one"], file.stat().st_size)


def test_a_dry_run_and_inspect_say_what_the_file_has(
    home: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """``input`` is a function of Python too, which graphs call ``input_1``."""
    spec, out = (f"{home / 'named.py'}:plain", "--output-name", "sums"), tmp_path / "out"
    assert call("export", *spec, "--dry-run", "--json", "-o", out) == 0
    (part,) = json.loads(capfd.readouterr().out)["parts"]
    assert call("export", *spec, "-o", out) == 0
    file = ort.InferenceSession(str(out / "model.onnx"))
    assert part["inputs"] == [value.name for value in file.get_inputs()] == ["input"]
    assert part["outputs"] == [value.name for value in file.get_outputs()] == ["sums"]
    assert "verified: " in capfd.readouterr().out
    assert call("inspect", out / "model.onnx", "--json") == 0
    assert json.loads(capfd.readouterr().out)["mode"] == "merged"
