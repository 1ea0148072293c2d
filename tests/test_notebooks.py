"""Every notebook runs from top to bottom, its asserts included, through nbdev's own runner."""
import pytest
from conftest import ROOT
from nbdev.test import test_nb as run_notebook

NOTEBOOKS = sorted((ROOT/"nbs").rglob("*.ipynb"), key=lambda path: (path.name[:2] not in ("05", "06"), path))  # these wait for a training: begin with them


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook(path, capfd):
    passed, _ = run_notebook(path, skip_flags=["notest"], basepath=ROOT)
    assert passed, capfd.readouterr().err
