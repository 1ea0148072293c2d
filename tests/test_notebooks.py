"""Every notebook runs from top to bottom, its asserts included, through nbdev's own runner."""
import pytest
from conftest import ROOT
from nbdev.test import test_nb as run_notebook

NOTEBOOKS = sorted((ROOT/"nbs").rglob("*.ipynb"), key=lambda path: (path.stem not in ("05_train", "06_generate", "attention_map"), path))  # these wait for a training: begin with them


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook(path, capfd):
    passed, _ = run_notebook(path, skip_flags=["notest"], basepath=ROOT)
    assert passed, capfd.readouterr().err
