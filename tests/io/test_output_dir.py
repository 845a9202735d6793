"""All files of a command, or none."""

from pathlib import Path

import pytest

from lora_fx.errors import ExportError
from lora_fx.io.output_dir import refuse_existing, staged

NAMES = ("model", "report")


def test_files_appear_together(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with staged(out, NAMES, "model", False) as draft:
        for name in NAMES:
            (draft / name).write_text(name)
        assert not out.exists()
    assert {file.name: file.read_text() for file in out.iterdir()} == {n: n for n in NAMES}
    assert list(out.parent.iterdir()) == [out]


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> None:
        with staged(tmp_path / "out", NAMES, "model", False) as draft:
            (draft / "model").write_text("half")
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_what_appears_meanwhile_stays(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def write(force: bool) -> None:
        with staged(out, NAMES, "model", force) as draft:
            (draft / "model").write_text("new")
            out.mkdir(exist_ok=True)
            (out / "model").write_text("mine")

    with pytest.raises(ExportError, match="holds model already: pass --force"):
        write(False)
    assert (out / "model").read_text() == "mine"
    write(True)
    assert (out / "model").read_text() == "new"


def test_only_the_files_to_write_are_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("mine")
    refuse_existing(tmp_path, NAMES, False)
    with pytest.raises(ExportError, match="notes: is a file: give a directory"):
        refuse_existing(tmp_path / "notes", NAMES, True)
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(ExportError, match="out: cannot be created"),
        staged(tmp_path / "file" / "out", NAMES, "model", False),
    ):
        pass
