"""Every notebook runs from top to bottom, its asserts included, through nbdev's own runner; and
what is saved in it is what its code says."""

import json
import re

import nbdev.test
import pytest
from conftest import ROOT
from execnb.shell import CaptureShell

from tinytransformer.data import digest
from tinytransformer.train import trained_tiny

NOTEBOOKS = sorted(
    (ROOT / "nbs").rglob("*.ipynb"),
    key=lambda path: (path.stem not in ("05_train", "06_generate", "attention_map"), path),
)  # these wait for a training: begin with them


def said(cell: dict) -> str:
    """The text that a cell shows, with # for each number and each digest: times differ from run to
    run, last digits from processor to processor, and the name of a run with its code.
    """
    parts = []
    for output in cell.get("outputs", []):
        data = output.get("data", {})
        if output.get("name") == "stdout":
            parts += output["text"]
        elif not {"image/png", "text/html"} & data.keys():
            parts += data.get("text/markdown", data.get("text/plain", ""))
    return " ".join(
        re.sub(
            r"-?[0-9a-f]{16}|[-+]?\d[\d,]*(\.\d+)?(e[-+]?\d+)?",
            "#",
            re.sub("<Figure size .*>", "", "".join(parts)),
        ).split()
    )


def weights() -> str:
    "What 05 prints of them."
    return digest((trained_tiny(ROOT).folder / "best/model.safetensors").read_bytes())


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
    saved, now = (
        [cell for cell in cells if cell["cell_type"] == "code"]
        for cells in (json.loads(path.read_text())["cells"], ran[0].cells)
    )
    if (
        "trained_tiny(" in path.read_text()
        and f"weights {weights()}" not in (ROOT / "nbs" / "05_train.ipynb").read_text()
    ):
        pytest.skip(
            "this processor rounds in another way, tiny is another model here, and its words are not those that are saved"
        )
    other = [(said(a), said(b)) for a, b in zip(saved, now, strict=True) if said(a) != said(b)]
    assert not other, f"what is saved, and what the code says now: {other}"
