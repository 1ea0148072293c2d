"""Every notebook runs from top to bottom, its asserts included, through nbdev's own runner; and what is saved in it is what its code says."""
import json, re

import nbdev.test
import pytest
from conftest import ROOT
from execnb.shell import CaptureShell

NOTEBOOKS = sorted((ROOT/"nbs").rglob("*.ipynb"), key=lambda path: (path.stem not in ("05_train", "06_generate", "attention_map"), path))  # these wait for a training: begin with them


def said(cell: dict) -> str:
    "The text that a cell shows, with # for each number: times differ from run to run, and last digits from processor to processor."
    parts = []
    for output in cell.get("outputs", []):
        data = output.get("data", {})
        if output.get("name") == "stdout": parts += output["text"]
        elif not {"image/png", "text/html"} & data.keys(): parts += data.get("text/markdown", data.get("text/plain", ""))
    return " ".join(re.sub(r"[-+]?\d[\d,]*(\.\d+)?(e[-+]?\d+)?", "#", "".join(parts)).split())


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook(path, capfd, monkeypatch):
    ran = []
    class Shell(CaptureShell):
        def run_all(self, nb, **options):
            ran.append(nb)
            super().run_all(nb, **options)
    monkeypatch.setattr(nbdev.test, "CaptureShell", Shell)
    passed, _ = nbdev.test.test_nb(path, skip_flags=["notest"], basepath=ROOT)
    assert passed, capfd.readouterr().err
    saved = {cell["id"]: said(cell) for cell in json.loads(path.read_text())["cells"]}
    other = {cell.id: (saved[cell.id], said(cell)) for cell in ran[0].cells if said(cell) != saved[cell.id]}
    assert not other, f"cells that show something else than what is saved: {other}"
