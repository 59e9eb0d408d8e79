"""Every notebook runs from top to bottom, and is committed with its outputs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from shardsim.xla.host import QUICK

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

ROOT = Path(__file__).parent.parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def names(path: Path) -> str:
    return path.stem


@pytest.mark.parametrize("path", NOTEBOOKS, ids=names)
def test_outputs_are_committed_and_no_cell_failed(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert not any(out.output_type == "error" for out in cell.get("outputs", []))
        if cell.cell_type == "code":
            assert cell.execution_count is not None
    assert path.stat().st_size < 1_000_000
    assert any(
        "image/png" in out.get("data", {})
        for cell in notebook.cells
        for out in cell.get("outputs", [])
    )


@pytest.mark.notebook
@pytest.mark.filterwarnings("ignore")  # of the libraries that talk to the kernel
@pytest.mark.parametrize("path", NOTEBOOKS, ids=names)
def test_notebook_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    search_path = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, search_path)))
    monkeypatch.setenv("XLA_FLAGS", QUICK)
    notebook = nbformat.read(path, as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    )
    client.execute()


def test_the_picture_of_the_docs_is_small() -> None:
    picture = ROOT / "docs" / "pictures" / "vit-22b-layer.png"
    assert 5_000 < picture.stat().st_size < 200_000
    assert "pictures/vit-22b-layer.png" in (ROOT / "docs" / "reports.md").read_text("utf-8")
