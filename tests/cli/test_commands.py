"""What the commands do: whole outputs or none, and refusals by name."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import lora_fx
from lora_fx.cli.adapter_options import AdapterOptions
from lora_fx.cli.commands import export_model, verify_model
from lora_fx.cli.convert import convert_adapter
from lora_fx.cli.onnx_files import merge_file, open_file
from lora_fx.errors import AdapterError, ExportError, LoraFxError, VerificationError
from lora_fx.testing import make_adapter

MODEL = """
import torch
from torch import nn


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.one = nn.Linear(3, 5)

    def forward(self, x):
        return torch.tanh(self.one(x))


def make():
    torch.manual_seed(0)
    return Tiny().eval(), (torch.randn(4, 7, 3),), {}, {"x": {0: "batch", 1: "sequence"}}
"""
SPEC = "model_of_the_jobs:make"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(autouse=True)
def source(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The user's module can be imported."""
    (home / "model_of_the_jobs.py").write_text(MODEL)
    monkeypatch.syspath_prepend(home)


@pytest.fixture
def french(home: Path) -> Path:
    if not (home / "french").exists():
        lora_fx.save_adapter(make_adapter({"one": (5, 3)}), home / "french")
    return home / "french"


@pytest.fixture
def swappable(home: Path, french: Path) -> Path:
    """One export for all tests that only read it."""
    if not (home / "out").exists():
        export_model(SPEC, [french], "swappable", home / "out", False, lambda stage: None)
    return home / "out"


def nothing(stage: str) -> None:
    """Shows no progress."""


def test_a_swappable_export_is_a_model_its_report_and_adapters(swappable: Path) -> None:
    names = {"model.onnx", "report.json", "french.onnx_adapter"}
    assert {file.name for file in swappable.iterdir()} == names
    report = json.loads((swappable / "report.json").read_text())
    assert report["path"] == str(swappable / "model.onnx")
    assert report["slots"] == ["one"]


def test_a_required_export_has_a_file_for_no_adapter_too(french: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    plan: Any = export_model(SPEC, [french], "required", out, False, nothing, dry_run=True)
    report: Any = export_model(SPEC, [french], "required", out, False, nothing)
    names = {"model.onnx", "report.json", "french.safetensors", "no-adapter.safetensors"}
    assert {file.name for file in out.iterdir()} == {*plan.names} == names
    assert plan.files[0].adapter_files == ["no-adapter.safetensors", "french.safetensors"]
    assert (report.mode, report.verified) == ("required", True)
    assert {row.what for row in report.checks} == {"base", "adapted", "french"}
    for name, to in (("none.safetensors", None), ("none.bin", "safetensors")):
        assert convert_adapter(None, tmp_path / name, out / "model.onnx", to, False).adapter is None
        assert (tmp_path / name).read_bytes() == (out / "no-adapter.safetensors").read_bytes()
    convert_adapter(french, tmp_path / "a.safetensors", out / "model.onnx", None, False)
    assert (tmp_path / "a.safetensors").read_bytes() == (out / "french.safetensors").read_bytes()
    assert verify_model(out / "model.onnx", SPEC, [french], nothing).mode == "required"
    merged = merge_file(
        out / "model.onnx", out / "french.safetensors", tmp_path / "m.onnx", False, False, nothing
    )
    assert (merged.mode, merged.verified) == ("merged", True)
    (out / "report.json").unlink()
    with pytest.raises(ExportError, match=r"holds .*no-adapter\.safetensors.* already"):
        export_model(SPEC, [french], "required", out, False, nothing)
    for given in ({"source": None, "model": None}, {"source": french, "model": None}):
        with pytest.raises(AdapterError, match=r"use --for MODEL\.onnx"):
            convert_adapter(out=tmp_path / "x", to="safetensors", force=False, **given)  # type: ignore[arg-type]


def test_verify_tells_stages_and_finds_another_adapter(
    swappable: Path, french: Path, tmp_path: Path
) -> None:
    stages: list[str] = []
    report = verify_model(swappable / "model.onnx", SPEC, [french], stages.append)
    assert stages[:2] == ["load", "trace"]
    assert report.verified
    merged = tmp_path / "merged"
    export_model(SPEC, [french], "merged", merged, False, nothing)
    lora_fx.save_adapter(make_adapter({"one": (5, 3)}, scale=1.65), tmp_path / "off")
    with pytest.raises(VerificationError, match=r"model\.onnx"):
        verify_model(merged / "model.onnx", SPEC, [tmp_path / "off"], nothing)


def test_an_adapter_is_written_for_a_model_or_as_peft(
    swappable: Path, french: Path, tmp_path: Path
) -> None:
    file = tmp_path / "again.onnx_adapter"
    adapter, report = convert_adapter(french, file, swappable / "model.onnx", None, False)
    assert (report.path, report.size) == (str(file), file.stat().st_size)
    assert adapter.name == "french"
    assert file.read_bytes() == (swappable / "french.onnx_adapter").read_bytes()
    convert_adapter(french, tmp_path / "copy", None, "peft", False)
    assert lora_fx.load_adapter(tmp_path / "copy").updates.keys() == adapter.updates.keys()


@pytest.mark.parametrize("program", [False, True])
def test_the_model_is_the_base_of_lossy_names(program: bool, home: Path, tmp_path: Path) -> None:
    file, spec = tmp_path / "kohya.safetensors", SPEC
    lora_fx.save_adapter(make_adapter({"one": (5, 3)}), file, format="kohya", component="unet")
    if program:
        from model_of_the_jobs import make

        model, args, _, _ = make()
        spec = str(tmp_path / "saved.pt2")
        torch.export.save(torch.export.export(model, args), spec)
    out = tmp_path / "out"
    report = export_model(
        spec, [file], "merged", out, False, nothing, AdapterOptions(component="unet")
    )
    assert report.verified
    verify_model(out / "model.onnx", spec, [file], nothing, AdapterOptions(component="unet"))
    with pytest.raises(VerificationError, match=r"model\.onnx"):
        verify_model(out / "model.onnx", spec, [], nothing)


def test_a_conversion_takes_hints_and_gives_components(
    french: Path, tmp_path: Path, home: Path
) -> None:
    kohya, diffusers = tmp_path / "kohya.safetensors", tmp_path / "diffusers.safetensors"
    convert_adapter(french, kohya, None, "kohya", False, AdapterOptions(component="unet"))
    given = AdapterOptions(component="text_encoder", base=SPEC)
    convert_adapter(kohya, diffusers, None, "diffusers", False, given)
    back = AdapterOptions(component="text_encoder")
    adapter, _ = convert_adapter(diffusers, tmp_path / "back", None, "peft", False, back)
    before, zeros = lora_fx.load_adapter(french).updates["one"], torch.zeros(5, 3)
    assert torch.equal(adapter.updates["one"].weight(zeros), before.weight(zeros))
    with pytest.raises(AdapterError, match="base="):
        convert_adapter(kohya, tmp_path / "again", None, "peft", False)
    with pytest.raises(AdapterError, match="use --for MODEL"):
        convert_adapter(french, tmp_path / "x.onnx_adapter", None, "onnx_adapter", False)
    assert not (tmp_path / "again").exists()


def test_what_exists_stays_without_force(swappable: Path, french: Path, tmp_path: Path) -> None:
    before = {file.name: file.read_bytes() for file in swappable.iterdir()}
    with pytest.raises(ExportError, match="pass --force to replace"):
        export_model(SPEC, [french], "swappable", swappable, False, nothing)
    assert {file.name: file.read_bytes() for file in swappable.iterdir()} == before
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ExportError, match="file: is a file: give a directory"):
        export_model(SPEC, [], "merged", tmp_path / "file", True, nothing)


def test_a_failure_leaves_nothing(tmp_path: Path, french: Path) -> None:
    out = tmp_path / "deep" / "out"
    with pytest.raises(AdapterError, match="french is given twice"):
        export_model(SPEC, [french, french], "merged", out, False, nothing)
    lora_fx.save_adapter(make_adapter({"odd": (5, 3)}), tmp_path / "odd")
    with pytest.raises(AdapterError, match="odd"):
        export_model(SPEC, [tmp_path / "odd"], "merged", out, False, nothing)
    with pytest.raises(LoraFxError, match="nowhere: no such directory or file"):
        export_model("nowhere", [], "merged", out, False, nothing)
    assert not out.parent.exists()


def test_a_failure_while_writing_leaves_no_draft(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import lora_fx.export

    def failing(gm: object, path: Path, **_: object) -> None:
        path.write_text("half")
        raise ExportError("no form")

    monkeypatch.setattr(lora_fx.export, "to_onnx", failing)
    with pytest.raises(ExportError, match="no form"):
        export_model(SPEC, [], "merged", tmp_path / "out", False, nothing)
    assert list(tmp_path.iterdir()) == []


def test_the_model_comes_after_all_that_belongs_to_it(
    french: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who sees the model sees its report and adapters: it is put in place last, taken first."""
    names, replace = {"french.onnx_adapter", "model.onnx", "report.json"}, os.replace
    put: list[str] = []
    taken: list[str] = []

    def watched(source: Path, target: Path) -> None:
        put.extend([target.name] if target.parent == tmp_path else [])
        taken.extend([target.name] if source.parent == tmp_path else [])
        replace(source, target)

    monkeypatch.setattr("lora_fx.io.atomic.os.replace", watched)
    export_model(SPEC, [french], "swappable", tmp_path, False, nothing)
    assert (set(put), put[-1], taken) == (names, "model.onnx", [])
    export_model(SPEC, [french], "swappable", tmp_path, True, nothing)
    assert (set(put[3:]), put[-1]) == (names, "model.onnx")
    assert (set(taken), taken[0]) == (names, "model.onnx")


def test_a_missing_file_is_not_verified(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"model\.onnx: no such file"):
        verify_model(tmp_path / "model.onnx", SPEC, [], nothing)


def test_what_cannot_be_merged_is_refused_by_name_or_noted(
    home: Path, french: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lora_fx.cli.commands.fold", lambda gm: gm)  # nothing folds
    arguments = (SPEC, [french], "merged", home / "refused", False, lambda stage: None)
    with pytest.raises(ExportError, match=r"beside 1 layers: one \(.*--allow-unmerged"):
        export_model(*arguments)
    assert not (home / "refused").exists()
    report = export_model(*arguments, allow_unmerged=True)
    assert report.mode == "unmerged"
    assert any(note.startswith("not merged") and "one (" in note for note in report.notes)


@pytest.mark.parametrize("mode", ["merged", "unmerged", "swappable"])
def test_a_report_speaks_of_the_mode_as_it_was_asked_for(
    mode: str, home: Path, french: Path
) -> None:
    out = home / f"report_{mode}"
    export_model(SPEC, [french], mode, out, False, lambda stage: None)
    assert json.loads((out / "report.json").read_text())["mode"] == mode


def seen(out: Path, *adapters: Path, mode: str = "merged", **more: Any) -> Any:
    """The report of an export, as JSON has it."""
    return export_model(SPEC, [*adapters], mode, out, False, nothing, **more).to_dict()


def test_a_model_is_cast_with_its_inputs_and_adapters_follow(french: Path, tmp_path: Path) -> None:
    report = seen(tmp_path / "half", french, dtype="float16")
    assert (report["verified"], report["dtype"]) == (True, "float16")
    file = tmp_path / "half" / "model.onnx"
    session = lora_fx.Session(file, threads=1)
    x = torch.randn(2, 3, 3, generator=torch.Generator().manual_seed(1)).half()
    assert next(iter(session.run({"x": x}).values())).dtype == "float16"
    assert all(row["tolerance"] > 1e-3 for row in report["checks"])
    assert verify_model(file, SPEC, [french], nothing).dtype == "float16"  # the file notes it
    with pytest.raises(VerificationError, match=r"model\.onnx"):
        verify_model(file, SPEC, [], nothing)
    plain = seen(tmp_path / "plain", french)
    assert plain["dtype"] is None
    from model_of_the_jobs import make

    assert make()[0].one.weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("bfloat16", "--dtype bfloat16: onnxruntime's CPU provider runs no bfloat16 models"),
        ("int8", "--dtype int8: onnxruntime's CPU provider runs no int8 models"),
        ("fp8", "--dtype 'fp8': is no dtype: expected float32 or float16"),
        ("nn", "--dtype 'nn': is no dtype"),
        ("", "--dtype '': is no dtype"),
    ],
)
def test_a_dtype_that_cannot_be_verified_is_refused(
    word: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(LoraFxError, match=message):
        seen(tmp_path / "out", dtype=word)
    assert not (tmp_path / "out").exists()


def test_a_program_keeps_its_dtype(tmp_path: Path) -> None:
    from model_of_the_jobs import make

    model, args, _, _ = make()
    spec = str(tmp_path / "saved.pt2")
    torch.export.save(torch.export.export(model, args), spec)
    with pytest.raises(LoraFxError, match="--dtype: a program keeps its own"):
        export_model(spec, [], "merged", tmp_path / "o", False, nothing, dtype="float16")


def test_adapters_of_one_name_are_told_apart(french: Path, tmp_path: Path) -> None:
    other = tmp_path / "other" / "french"
    lora_fx.save_adapter(make_adapter({"one": (5, 3)}, rank=3), other)
    out = tmp_path / "out"
    seen(out, french, other, mode="swappable", names=["ours", f"theirs={other}"])
    assert {file.stem for file in out.glob("*.onnx_adapter")} == {"ours", "theirs"}
    file = out / "model.onnx"
    report = verify_model(file, SPEC, [french, other], nothing, names=["ours", "theirs"])
    assert [one.adapter for one in report.coverage] == ["ours", "theirs"]
    with pytest.raises(AdapterError, match="french is given twice: name them by --name"):
        seen(tmp_path / "again", french, other, mode="swappable")


def test_a_dry_run_says_what_an_export_would_write(french: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    plan = seen(out, french, mode="swappable", dry_run=True)
    assert not out.exists()
    seen(out, french, mode="swappable")
    assert {*plan["files"]} == {file.name for file in out.iterdir()}
    (part,) = plan["parts"]
    assert [layer["path"] for layer in part["adapters"]["french"]] == part["slots"] == ["one"]
    assert part["inputs"] == ["x"]
    with pytest.raises(ExportError, match="pass --force"):
        seen(out, french, dry_run=True)
    shown = str(export_model(SPEC, [french], "merged", out / "a", False, nothing, dry_run=True))
    assert "would write to" in shown
    assert "adapter french: 1 layers\n    one  lora" in shown


def test_a_dry_run_is_refused_as_the_export_would_be(
    french: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora_fx.save_adapter(make_adapter({"odd": (5, 3)}), tmp_path / "odd")
    update = make_adapter({"one": (5, 3)}, kind="lokr")
    lora_fx.save_adapter(update, tmp_path / "anew")
    cases: list[tuple[Path, str, dict[str, Any]]] = [
        (tmp_path / "odd", "merged", {}),
        (tmp_path / "anew", "swappable", {}),
        (french, "swappable", {"slots": ["nowhere"]}),
        (french, "merged", {"slots": ["one"]}),
        (french, "merged", {"opset": 17}),
        (french, "merged", {"opset": 22, "shared_cache": True}),
    ]
    for adapter, mode, more in cases:
        told = []
        for dry in (True, False):
            with pytest.raises(LoraFxError) as error:
                seen(tmp_path / "out", adapter, mode=mode, dry_run=dry, **more)
            told.append(type(error.value))
        assert told[0] is told[1], adapter
    monkeypatch.setattr("lora_fx.cli.dry_run.fold", lambda gm: gm)  # nothing folds
    with pytest.raises(ExportError, match="beside 1 layers"):
        seen(tmp_path / "out", french, dry_run=True)
    assert not (tmp_path / "out").exists()


def test_an_adapter_is_merged_into_an_exported_file(
    swappable: Path, french: Path, tmp_path: Path
) -> None:
    report = merge_file(
        swappable / "model.onnx", french, tmp_path / "m.onnx", False, False, nothing
    )
    assert report.mode == "merged"
    assert verify_model(tmp_path / "m.onnx", SPEC, [french], nothing).verified
    made, bare = swappable / "french.onnx_adapter", tmp_path / "bare.safetensors"
    one: Any = lora_fx.load_adapter(french).updates["one"]
    save_file({"one.lora_A": one.down, "one.lora_B": one.up}, bare)  # which says no scale
    given = AdapterOptions(alpha=[str(one.scale * one.rank)])
    for place, (source, hints) in enumerate(
        ((made, None), (made, AdapterOptions()), (bare, given), (bare, AdapterOptions(alpha=["1"])))
    ):
        out = tmp_path / f"{place}.onnx"
        merge_file(swappable / "model.onnx", source, out, False, False, nothing, hints)
        same = out.read_bytes() == (tmp_path / "m.onnx").read_bytes()
        assert same == (place < 3)
    with pytest.raises(ExportError, match="exists: pass force=True"):
        merge_file(swappable / "model.onnx", french, tmp_path / "m.onnx", False, False, nothing)


def test_a_file_gets_slots_and_is_the_model_again(french: Path, tmp_path: Path) -> None:
    export_model(SPEC, [], "merged", tmp_path / "base", False, nothing)
    base, out = tmp_path / "base" / "model.onnx", tmp_path / "slots.onnx"
    assert open_file(base, out, (), (), False, nothing).slots == ["one"]
    assert verify_model(out, SPEC, [french], nothing).verified
    required = open_file(base, tmp_path / "fed.onnx", (), (), False, nothing, required=True)
    assert (required.mode, required.slots) == ("required", ["one"])
    report = open_file(base, out, ["o*"], ["one.weight=other"], True, nothing)
    assert report.slots == ["other"]
    for name, said in (("=x", "--name =x: expected NAME=PATH"), ("a=b=x", "a node called a=b;")):
        with pytest.raises(ExportError, match=said):
            open_file(base, out, (), [name], True, nothing)
