"""The example notebook runs as it stands, and is kept without outputs."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="the extra `docs` is not installed")
nbclient = pytest.importorskip("nbclient", reason="the extra `docs` is not installed")
NOTEBOOK = Path(__file__).parents[1] / "examples" / "first_document.ipynb"


@pytest.mark.slow
def test_the_notebook_runs(tmp_path):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert not any(cell.outputs or cell.execution_count for cell in notebook.cells if cell.cell_type == "code")
    nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    results = [cell.outputs[-1] for cell in notebook.cells if cell.cell_type == "code" and cell.outputs]
    size, lengths, strip, values, advantages, words = results
    assert int(size.data["text/plain"]) > 3_000_000
    assert len(set(ast.literal_eval(lengths.data["text/plain"]))) == 1
    assert "image/png" in strip.data
    scores = ast.literal_eval(values.data["text/plain"])
    assert max(scores) - min(scores) > 0.1  # a group with spread: there is something to learn
    signs = ast.literal_eval(advantages.data["text/plain"])
    assert [value > sum(scores) / 6 for value in scores] == [sign > 0 for sign in signs]
    assert "a small red ball" in words.data["text/plain"]
