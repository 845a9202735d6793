"""The tutorial notebook: a reader runs it from top to bottom, and each cell shows what it says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

NOTEBOOK = Path(__file__).resolve().parent.parent / "examples" / "tutorial.ipynb"


def run(notebook: Any, place: Path) -> Any:
    client = NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(place)}})
    client.execute()
    return notebook


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return run(nbformat.read(NOTEBOOK, as_version=4), tmp_path_factory.mktemp("tutorial"))


def shown(notebook: Any, kind: str) -> list[str]:
    """What the cells show as their value, in order."""
    results = [o for cell in notebook.cells for o in cell.get("outputs", [])]
    return [
        r["data"][kind]
        for r in results
        if r["output_type"] == "execute_result" and kind in r["data"]
    ]


def test_it_is_kept_without_outputs() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.outputs == [] and cell.execution_count is None for cell in cells)


def test_every_cell_runs_and_says_nothing_on_stderr(done: Any) -> None:
    streams = [o for cell in done.cells for o in cell.get("outputs", []) if "name" in o]
    text = "".join(stream["text"] for stream in streams if stream["name"] == "stdout")
    assert text.splitlines() == ["None is [None]", "mine is ['mine']", "other is ['other']"]
    assert [stream["text"] for stream in streams if stream["name"] == "stderr"] == []


def test_what_the_cells_show_is_rich(done: Any) -> None:
    made = shown(done, "text/html")
    drawn, explained, folded, report, passed, adapter, session, apart = made
    assert "lora" not in drawn
    assert drawn.count("matmul") > 0 == folded.count("matmul")
    assert "becomes the layer of" in explained
    assert "agree; the farthest is off by" in report
    assert "<caption>modified, " in passed
    assert "adapter mine: 2 targets" in adapter
    assert "slot 0.layer" in session
    assert "mine and other: 2 differ" in apart


def test_a_cell_that_is_wrong_is_noticed(tmp_path: Path) -> None:
    cell = nbformat.v4.new_code_cell("assert 1 + 1 == 3")
    with pytest.raises(CellExecutionError, match="AssertionError"):
        run(nbformat.v4.new_notebook(cells=[cell]), tmp_path)
