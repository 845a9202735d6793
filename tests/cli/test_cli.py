"""The command line: what it writes, prints and returns, on a small model of the user's own."""

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import numpy as np
import onnxruntime as ort
import peft
import pytest
import torch
from safetensors.torch import load_file

from lora_fx import load_adapter
from lora_fx.cli import main
from lora_fx.testing import tiny

MODEL = """
import torch
from torch import nn


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 6)
        self.last = nn.Linear(6, 5, bias=False)

    def forward(self, x):
        return self.last(torch.relu(self.first(x)))


def make():
    torch.manual_seed(0)
    return Tiny().eval(), (torch.randn(4, 7, 3),), {}, {"x": {0: "batch", 1: "sequence"}}


def other():
    torch.manual_seed(1)
    return Tiny().eval(), (torch.randn(4, 7, 3),), None, {"x": {0: "batch", 1: "sequence"}}


def bare():
    return nn.Linear(3, 5)


NUMBER = 3
"""
SPEC = "tiny_model_of_the_user:make"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory with the user's module and two PEFT adapters, on the import path."""
    directory = tmp_path_factory.mktemp("home")
    (directory / "tiny_model_of_the_user.py").write_text(MODEL)
    before = Path.cwd()
    sys.path.insert(0, str(directory))
    os.chdir(directory)
    make_adapter(directory / "french", rank=2, seed=2)
    make_adapter(directory / "german", rank=4, seed=3)
    yield directory
    os.chdir(before)
    sys.path[:] = [entry for entry in sys.path if entry != str(directory)]


def make_adapter(path: Path, rank: int, seed: int) -> None:
    from tiny_model_of_the_user import make

    torch.manual_seed(seed)
    config = peft.LoraConfig(
        r=rank, lora_alpha=8, target_modules=["first", "last"], init_lora_weights=False
    )
    peft.get_peft_model(make()[0], config).save_pretrained(path)


def eager(*adapters: Path) -> tuple[np.ndarray, np.ndarray]:
    """An input that was not traced, and what PEFT makes of it."""
    from tiny_model_of_the_user import make

    x = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(9))
    total = make()[0](x)
    for adapter in adapters:
        total = peft.PeftModel.from_pretrained(make()[0], adapter)(x)
    return x.numpy(), total.detach().numpy()


def call(*arguments: object) -> int:
    """Runs a command in this process, and gives its exit code."""
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    return int(stop.value.code or 0)


def distance(model: Path, x: np.ndarray, expected: np.ndarray) -> float:
    (found,) = ort.InferenceSession(str(model)).run(None, {"x": x})
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def test_the_version_is_the_package_s(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--version") == 0
    assert capsys.readouterr().out == f"lora-fx {metadata.version('lora-fx')}\n"
    assert call("inspect", "--version") == 2


@pytest.fixture(scope="module")
def swappable(home: Path) -> Path:
    out = home / "swappable"
    chosen = ("--adapter", home / "french", "--adapter", home / "german")
    assert call("export", SPEC, *chosen, "--mode", "swappable", "-o", out) == 0
    return out


@pytest.fixture(scope="module")
def merged(home: Path) -> Path:
    out = home / "merged"
    assert call("export", SPEC, "--adapter", home / "french", "-o", out) == 0
    return out


def test_export_writes_a_model_that_equals_peft(home: Path, merged: Path) -> None:
    x, expected = eager(home / "french")
    assert {file.name for file in merged.iterdir()} == {"model.onnx", "report.json"}
    assert distance(merged / "model.onnx", x, expected) <= 1e-5
    assert distance(merged / "model.onnx", *eager()) >= 1e-2
    report = json.loads((merged / "report.json").read_text())
    assert report["verified"]
    assert report["path"] == str(merged / "model.onnx")


def test_opset_and_slots_are_as_asked(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, given = home / "asked", ("--mode", "swappable", "--slots", "last", "--opset", "21")
    assert call("export", SPEC, *given, "-o", out) == 0
    report = json.loads((out / "report.json").read_text())
    assert (report["opset"], report["slots"]) == (21, ["last"])
    everywhere = ("--mode", "swappable", "--slots", "all-linear")
    assert call("export", SPEC, *everywhere, "-o", home / "everywhere") == 0
    slots = json.loads((home / "everywhere" / "report.json").read_text())["slots"]
    assert {"first", "last"} <= {*slots}
    capsys.readouterr()
    assert call("export", SPEC, "--slots", "last", "-o", home / "no") == 2
    assert "--slots and --vectors are of --mode swappable: add it" in capsys.readouterr().err
    assert call("export", SPEC, "--opset", "9", "-o", home / "no") == 2
    assert not (home / "no").exists()


def test_swappable_export_writes_each_adapter(home: Path, swappable: Path) -> None:
    from lora_fx.export import Session

    files = {"model.onnx", "report.json", "french.onnx_adapter", "german.onnx_adapter"}
    assert {file.name for file in swappable.iterdir()} == files
    session = Session(swappable / "model.onnx")
    for name in ("french", "german"):
        x, expected = eager(home / name)
        found = session.run({"x": x}, adapter=swappable / f"{name}.onnx_adapter")["output"]
        base = session.run({"x": x})["output"]
        assert np.linalg.norm(found - expected) <= 1e-5 * np.linalg.norm(expected)
        assert np.linalg.norm(base - expected) >= 1e-2 * np.linalg.norm(expected)


def test_two_adapters_are_summed(home: Path) -> None:
    out = home / "summed"
    chosen = ("--adapter", home / "french", "--adapter", home / "german")
    assert call("export", SPEC, *chosen, "--mode", "unmerged", "-o", out) == 0
    x, one = eager(home / "french")
    assert distance(out / "model.onnx", x, one) >= 1e-2
    assert distance(out / "model.onnx", x, summed(home, x)) <= 1e-5


def summed(home: Path, x: np.ndarray) -> np.ndarray:
    """What PEFT makes of both adapters at once."""
    from tiny_model_of_the_user import make

    model = peft.PeftModel.from_pretrained(make()[0], home / "french", adapter_name="french")
    model.load_adapter(home / "german", adapter_name="german")
    model.add_weighted_adapter(["french", "german"], [1.0, 1.0], "both", combination_type="cat")
    model.set_adapter("both")
    return model(torch.from_numpy(x)).detach().numpy()


def test_json_is_the_report_alone(
    home: Path, capfd: pytest.CaptureFixture[str], swappable: Path, merged: Path
) -> None:
    capfd.readouterr()
    command = ("verify", merged / "model.onnx", "--against", SPEC, "--adapter", home / "french")
    assert call(*command, "--json") == 0
    report = json.loads(capfd.readouterr().out)
    assert report["verified"]
    assert report["controls"]
    for path, kind in (
        (home / "french", "adapter"),
        (swappable / "model.onnx", "model"),
        (swappable / "french.onnx_adapter", "adapter file"),
    ):
        assert call("inspect", path, "--json") == 0
        assert json.loads(capfd.readouterr().out)["kind"] == kind


def test_inspect_an_adapter_shows_ranks_scales_and_norms(
    home: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert call("inspect", home / "french") == 0
    shown = capfd.readouterr().out
    assert "first  kind lora  shape 6, 3  rank 2  scale 4  norm" in shown
    assert "adapter_model.safetensors  sha256:" in shown


def test_inspect_a_model_shows_its_slots(
    swappable: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    capfd.readouterr()
    assert call("inspect", swappable / "model.onnx", "--json") == 0
    report = json.loads(capfd.readouterr().out)
    assert [slot["path"] for slot in report["slots"]] == ["first", "last"]
    assert report["inputs"] == ["x"]
    assert call("inspect", swappable / "german.onnx_adapter", "--json") == 0
    adapter = json.loads(capfd.readouterr().out)
    assert adapter["model_version"] == report["model_version"]
    assert {value["name"]: value["shape"] for value in adapter["values"]} == {
        "first.lora_A": [3, 4],
        "first.lora_B": [4, 6],
        "last.lora_A": [6, 4],
        "last.lora_B": [4, 5],
    }


def test_adapter_converts_for_a_model(home: Path, swappable: Path) -> None:
    out = home / "again.onnx_adapter"
    model = swappable / "model.onnx"
    assert call("adapter", home / "french", "--for", model, "-o", out) == 0
    assert out.read_bytes() == (swappable / "french.onnx_adapter").read_bytes()
    assert call("adapter", home / "german", "--for", model, "-o", out) == 2
    assert out.read_bytes() == (swappable / "french.onnx_adapter").read_bytes()
    assert call("adapter", home / "german", "--for", model, "-o", out, "--force") == 0
    assert out.read_bytes() == (swappable / "german.onnx_adapter").read_bytes()


def test_adapter_converts_to_a_format_that_peft_reads(home: Path) -> None:
    assert call("adapter", home / "french", "--to", "peft", "-o", home / "copy") == 0
    assert np.array_equal(eager(home / "copy")[1], eager(home / "french")[1])


def test_adapter_converts_to_plain_lora(home: Path, capfd: pytest.CaptureFixture[str]) -> None:
    lora, given = home / "as_lora", ("adapter", home / "french", "--to-lora", "--base", SPEC)
    assert call(*given, "--rank", "1", "-o", lora) == 0
    told = capfd.readouterr().out
    assert "  first  lora -> rank 1  error " in told
    assert f"written to {lora}" in told
    assert load_adapter(lora).updates["first"].rank == 1
    assert call(*given, "--energy", "1", "-o", home / "whole", "--json") == 0
    report = json.loads(capfd.readouterr().out)
    whole = {"kind": "lora", "rank": 2, "error": 0.0, "energy": 1.0}
    assert report["layers"] == dict.fromkeys(report["targets"], whole)
    assert np.array_equal(eager(home / "whole")[1], eager(home / "french")[1])
    assert not np.allclose(eager(lora)[1], eager(home / "french")[1])


def test_adapter_converts_to_plain_lora_for_a_model(home: Path, swappable: Path) -> None:
    out, model = home / "lora.onnx_adapter", swappable / "model.onnx"
    given = ("adapter", home / "french", "--to-lora", "--rank", "2", "--for", model, "-o", out)
    assert call(*given) == 0
    assert out.read_bytes() == (swappable / "french.onnx_adapter").read_bytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--rank", "2", "--to", "peft"), "--rank and --energy are of --to-lora"),
        (("--to-lora",), "rank is None and energy None: give one of the two"),
        (("--to-lora", "--rank", "0"), "rank is 0, expected a positive integer"),
    ],
)
def test_what_plain_lora_shall_hold_is_said(
    home: Path, options: tuple[str, ...], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert call("adapter", home / "french", *options, "-o", home / "never") == 2
    assert message in capfd.readouterr().err
    assert not (home / "never").exists()


def test_hints_reach_the_formats(home: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A file of loralib's: a pickle without a scale."""
    file = home / "french.pt"
    assert call("adapter", home / "french", "--to", "loralib", "-o", file) == 0
    hints = ("--allow-pickle", "--alpha", "first=8", "--alpha", "last=8")
    for command in (("inspect", file), ("adapter", file, "--to", "peft", "-o", home / "no_hint")):
        capfd.readouterr()
        assert call(*command) == 2
        assert "pass --allow-pickle if" in capfd.readouterr().err
        assert call(*command, "--allow-pickle") == 2
        assert "alpha" in capfd.readouterr().err
    assert not (home / "no_hint").exists()
    assert call("inspect", file, *hints) == 0
    assert "first  kind lora  shape 6, 3  rank 2  scale 4  norm" in capfd.readouterr().out
    assert call("adapter", file, *hints, "--to", "peft", "-o", home / "with_hints") == 0
    assert np.array_equal(eager(home / "with_hints")[1], eager(home / "french")[1])
    out = home / "from_loralib"
    assert call("export", SPEC, "--adapter", file, *hints, "-o", out) == 0
    assert distance(out / "model.onnx", *eager(home / "french")) <= 1e-5
    verify = ("verify", out / "model.onnx", "--against", SPEC, "--adapter", file)
    assert call(*verify, *hints) == 0
    assert call(*verify, "--allow-pickle", "--alpha", "7") == 1


def test_lossy_names_need_a_base(home: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = home / "kohya.safetensors"
    kohya = ("--to", "kohya", "--component", "unet", "-o", file)
    assert call("adapter", home / "french", *kohya) == 0
    assert call("inspect", file) == 2
    assert "--base" in capfd.readouterr().err
    assert call("inspect", file, "--base", SPEC, "--json") == 0
    report = json.loads(capfd.readouterr().out)
    assert sorted(target["path"] for target in report["targets"]) == ["first", "last"]
    back = home / "from_kohya"
    assert call("adapter", file, "--base", SPEC, "--to", "peft", "-o", back) == 0
    assert np.array_equal(eager(back)[1], eager(home / "french")[1])
    out = home / "kohya_out"
    assert call("export", SPEC, "--adapter", file, "-o", out) == 0
    assert distance(out / "model.onnx", *eager(home / "french")) <= 1e-5
    assert distance(out / "model.onnx", *eager()) >= 1e-2


def test_verify_accepts_the_right_model_and_refuses_another(
    home: Path, swappable: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = swappable / "model.onnx"
    french = ("--adapter", home / "french")
    assert call("verify", model, "--against", SPEC, *french) == 0
    assert call("verify", model, "--against", SPEC) == 0
    capfd.readouterr()
    assert call("verify", model, "--against", "tiny_model_of_the_user:other") == 1
    error = capfd.readouterr().err
    assert error.startswith("error: ")
    assert "Traceback" not in error


def test_verify_tells_one_adapter_from_another(home: Path, merged: Path) -> None:
    command = ("verify", merged / "model.onnx", "--against", SPEC, "--adapter")
    assert call(*command, home / "german") == 1


BAD = {
    "no such model": (["nowhere"], "nowhere: no such directory or file"),
    "no such program": (["nowhere.pt2"], "nowhere.pt2: no such file"),
    "no such module": (["no_module_of_this_name:make"], "cannot be imported"),
    "no such function": (["tiny_model_of_the_user:nothing"], "has no function 'nothing'"),
    "no function": (["tiny_model_of_the_user:NUMBER"], "found a int, expected a function"),
    "no inputs": (["tiny_model_of_the_user:bare"], "no example inputs"),
    "an adapter as a model": (["french"], "this is an adapter"),
    "no such adapter": ([SPEC, "--adapter", "nowhere"], "nowhere: no such file or directory"),
    "an adapter twice": ([SPEC, "--adapter", "french", "--adapter", "french"], "given twice"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_by_name_and_nothing_is_written(
    home: Path, case: str, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments, message = BAD[case]
    before = sorted(home.iterdir())
    assert call("export", *arguments, "-o", home / "refused") == 2
    shown = capfd.readouterr()
    assert message in shown.err
    assert "Traceback" not in shown.err
    assert shown.out == ""
    assert sorted(home.iterdir()) == before


def test_a_foreign_adapter_is_refused(home: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = peft.LoraConfig(r=2, target_modules=["odd"], init_lora_weights=False)
    odd = torch.nn.ModuleDict({"odd": torch.nn.Linear(9, 8)})
    peft.get_peft_model(odd, config).save_pretrained(home / "foreign")
    assert call("export", SPEC, "--adapter", home / "foreign", "-o", home / "refused") == 2
    assert "odd" in capfd.readouterr().err
    assert not (home / "refused").exists()


def test_an_existing_output_stays_without_force(
    home: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = home / "existing"
    out.mkdir()
    (out / "report.json").write_text("mine")
    assert call("export", SPEC, "-o", out) == 2
    assert "report.json already: pass --force" in capfd.readouterr().err
    assert [file.read_text() for file in out.iterdir()] == ["mine"]
    assert call("export", SPEC, "-o", out, "--force", "--json") == 0
    written = json.loads((out / "report.json").read_text())
    assert json.loads(capfd.readouterr().out) == written
    assert written["verified"]


def test_an_adapter_goes_either_for_a_model_or_to_a_format(
    home: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert call("adapter", home / "french", "-o", home / "neither") == 2
    capfd.readouterr()
    onnx = ("--to", "onnx_adapter", "-o", home / "neither")
    assert call("adapter", home / "french", *onnx) == 2
    assert "use --for MODEL.onnx" in capfd.readouterr().err
    assert not (home / "neither").exists()


def test_no_adapter_is_written_for_a_model(
    home: Path, swappable: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model, out = swappable / "model.onnx", home / "none.safetensors"
    assert call("adapter", "--none", "--for", model, "-o", out) == 0
    assert "no adapter" in capfd.readouterr().out
    assert not any(value.any() for value in load_file(out).values())
    assert call("adapter", "--none", "--for", model, "-o", home / "b", "--to", "safetensors") == 0
    assert (home / "b").read_bytes() == out.read_bytes()
    for given in (("--none", home / "french", "--for", model), ("--for", model)):
        assert call("adapter", *given, "-o", home / "never") == 2
        assert "give one adapter, or --none" in capfd.readouterr().err
    assert call("adapter", "--none", "--to", "peft", "-o", home / "never") == 2
    assert "use --for MODEL.onnx" in capfd.readouterr().err
    assert call("adapter", home / "french", "--for", model, "--to", "peft", "-o", home / "n") == 2
    assert "expected onnx_adapter or safetensors" in capfd.readouterr().err
    assert not {home / "never", home / "n"} & {*home.iterdir()}


def test_an_exported_program_is_a_model(home: Path) -> None:
    from tiny_model_of_the_user import make

    model, args, _, _ = make()
    batch = torch.export.Dim.DYNAMIC
    program = torch.export.export(model, args, dynamic_shapes={"x": {0: batch, 1: batch}})
    torch.export.save(program, home / "saved.pt2")
    out = home / "from_program"
    assert call("export", home / "saved.pt2", "--adapter", home / "french", "-o", out) == 0
    assert distance(out / "model.onnx", *eager(home / "french")) <= 1e-5


def test_a_directory_of_transformers_is_a_model(home: Path) -> None:
    tiny("BertModel").save_pretrained(home / "bert")
    out = home / "bert_out"
    assert call("export", home / "bert", "--mode", "unmerged", "-o", out) == 0
    session = ort.InferenceSession(str(out / "model.onnx"))
    names = ["input_ids", "attention_mask", "token_type_ids"]
    assert [value.name for value in session.get_inputs()] == names


def test_the_module_runs_as_a_program(home: Path) -> None:
    command = [sys.executable, "-m", "lora_fx", "inspect", str(home / "french"), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["name"] == "french"


RAISING = """
import sys
import torch
from torch import nn


class Leaves(nn.Linear):
    def forward(self, input):
        sys.exit(0)


class Fails(nn.Linear):
    def forward(self, input):
        raise ArithmeticError("mine")


def in_forward():
    return Fails(3, 5), (torch.ones(2, 3),)


def exit_in_forward():
    return Leaves(3, 5), (torch.ones(2, 3),)


def leaves():
    sys.exit(0)


def leaves_with_one():
    sys.exit(1)


def reads():
    return input()


def closes():
    raise BrokenPipeError


def interrupted():
    raise KeyboardInterrupt


def verifies():
    from lora_fx import VerificationError

    raise VerificationError("mine")
"""
RAISED = {
    "in_forward": (2, "ArithmeticError: mine"),
    "exit_in_forward": (2, "the code called sys.exit(0), at "),
    "leaves": (2, "the code called sys.exit(0), at "),
    "leaves_with_one": (2, "the code called sys.exit(1), at "),
    "reads": (2, "reads: "),
    "closes": (2, "BrokenPipeError"),
    "interrupted": (130, "interrupted"),
    "verifies": (2, "VerificationError: mine"),
}


@pytest.mark.parametrize("command", ["export", "verify", "adapter"])
@pytest.mark.parametrize("name", RAISED)
def test_the_users_own_errors_are_one_message(
    home: Path, merged: Path, name: str, command: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """Exit 1 is for verification alone, and 0 for what was done."""
    (home / "raising.py").write_text(RAISING)
    spec, out = f"./raising.py:{name}", home / "refused"
    if command == "adapter" and "forward" in name:
        return  # the base of names is not run
    before = sorted(home.iterdir())
    arguments = {
        "export": (spec, "-o", out),
        "verify": (merged / "model.onnx", "--against", spec),
        "adapter": (home / "french", "--base", spec, "--to", "peft", "-o", out),
    }
    capfd.readouterr()
    code, message = RAISED[name]
    assert call(command, *arguments[command]) == code
    shown = capfd.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("error: ")
    assert message in shown.err
    assert shown.err.count("error: ") == 1
    assert "Traceback" not in shown.err
    assert sorted(home.iterdir()) == before


def test_a_defect_of_our_own_says_so(
    home: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    module = importlib.import_module("lora_fx.cli.inspect")  # the command has its name too
    monkeypatch.setattr(module, "describe", len)
    assert call("inspect", home / "french") == 2
    shown = capfd.readouterr().err
    assert shown.startswith("error: TypeError: len() takes exactly one argument")
    assert "set LORA_FX_TRACEBACK=1 to see the traceback" in shown
    assert "Traceback" not in shown
    monkeypatch.setenv("LORA_FX_TRACEBACK", "1")
    assert call("inspect", home / "french") == 2
    assert "Traceback (most recent call last)" in capfd.readouterr().err


def test_a_reader_that_leaves_is_told_once(home: Path) -> None:
    """As ``| head -0`` does; Python itself would complain at its end, and exit with 120."""
    program = "import sys; from lora_fx.cli import main; sys.stdin.read(); main(sys.argv[1:])"
    command = [sys.executable, "-c", program, "inspect", str(home / "french")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as running:
        assert running.stdout is not None
        running.stdout.close()
        running.stdout = None
        _, shown = running.communicate("")
    assert running.returncode == 2
    assert shown == "error: the reader of the output closed it before everything was written\n"


@pytest.mark.parametrize("given", [["-o", ""], ["--out="], ["-o", "x", "--adapter", ""]])
def test_an_empty_text_is_no_path(given: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    """A shell gives one for a variable that is not set, and "" is the directory where it stands."""
    assert call("export", "model.py:f", *given) == 2
    found = [text for text in given if text][-1]
    assert f"nothing is given at {found}: give a value, or leave it out" in capfd.readouterr().err


def test_usage_stays_typers(capfd: pytest.CaptureFixture[str]) -> None:
    assert call("export", "--no-such-option") == 2
    assert call("no-such-command") == 2
    capfd.readouterr()
    assert call("--help") == 0
    assert "inspect" in capfd.readouterr().out


def test_the_model_is_named_by_place_or_by_option(
    home: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    told = []
    for model in ([SPEC], ["-m", SPEC], ["--model", SPEC]):
        out = ["-o", str(tmp_path / "out"), "--dry-run", "--json"]
        assert call("export", *model, "--adapter", str(home / "french"), *out) == 0
        told.append(json.loads(capfd.readouterr().out))
    assert told[0] == told[1] == told[2]
    assert told[0]["dry_run"] is True
    assert not (tmp_path / "out").exists()
    for model in ([], [SPEC, "-m", SPEC]):
        assert call("export", *model, "-o", str(tmp_path / "out")) == 2
        assert "give one model: MODEL, or -m MODEL" in capfd.readouterr().err


def test_hints_are_options_of_every_command_that_reads_adapters(
    capfd: pytest.CaptureFixture[str],
) -> None:
    hints = {"--alpha", "--enable-lora", "--use-rslora", "--component", "--allow-pickle"}
    for command in ("export", "adapter", "inspect", "verify"):
        assert call(command, "--help") == 0
        shown = capfd.readouterr().out
        assert all(hint in shown for hint in hints), command
        assert ("--base" in shown) is (command in ("adapter", "inspect"))
