"""Every notebook runs once, from top to bottom in a Jupyter kernel, and what is saved in it is what
it shows.

Text has to be equal. A number may differ in what rounding leaves: processors add in different
orders."""

import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from conftest import ROOT
from nbclient import NotebookClient

LONGEST_FIRST = ["05_train", "06_generate", "gpt2_twin", "attention_map", "04_model", "engine"]
NOTEBOOKS = sorted(
    (path for path in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts),
    key=lambda path: (*(path.stem != name for name in LONGEST_FIRST), path),
)
DIGEST = re.compile(r"(?<![0-9a-f.])[0-9a-f]{16}(?![0-9a-f])")  # of weights or settings
NUMBER = re.compile(r"[-+]?\d+(?:,\d{3})*(?:\.\d+)?(?:e[-+]?\d+)?")
# float32 keeps 24 bits (6e-8); sums of some thousand numbers lose two digits, and a perplexity per
# word is the exponential of such a sum
RELATIVE = 5e-5


def text_of(cell: dict) -> str:
    """The text that a cell shows, without pictures and digests, each stretch of white space as one
    blank; what it writes to stderr comes last.
    """
    shown, errors = [], []
    for output in cell.get("outputs", []):
        data = output.get("data", {})
        if "name" in output:
            (errors if output["name"] == "stderr" else shown).append(output["text"])
        elif not {"image/png", "text/html"} & data.keys():
            shown.append(data.get("text/markdown", data.get("text/plain", "")))
    text = DIGEST.sub("#", re.sub("<Figure size .*>", "", " ".join(shown + errors)))
    return " ".join(text.split())


def unit(number: str) -> float:
    "What one step in the last printed digit is worth: 0.001 for 1.250, and 1 for a whole number."
    digits, _, exponent = number.partition("e")
    return 10.0 ** (int(exponent or 0) - len(digits.partition(".")[2]))


def numbers_agree(a: str, b: str) -> bool:
    """Whole numbers are counts, and have to be equal. Others agree if they differ by no more than
    one in the last printed digit, where rounding may go either way, or by a relative error of
    `RELATIVE`."""
    if a == b:
        return True
    if not any(mark in a + b for mark in ".e"):
        return False
    x, y = (float(number.replace(",", "")) for number in (a, b))
    return abs(x - y) <= 1.001 * max(unit(a), unit(b)) + RELATIVE * abs(x)


def texts_agree(a: str, b: str, timed: bool = False) -> bool:
    "The same words, and numbers that agree; any number will do where a time or memory is shown."
    if NUMBER.sub("#", a) != NUMBER.sub("#", b):
        return False
    return timed or all(map(numbers_agree, NUMBER.findall(a), NUMBER.findall(b)))


def differences(saved: list[dict], now: list[dict]) -> list[tuple[str, str]]:
    """What the cells showed when they were saved, and what they show now, where the two do not
    agree.
    """
    shown = [
        (text_of(a), text_of(b), "#| timed" in a["source"].splitlines())
        for a, b in zip(saved, now, strict=True)
    ]
    return [(a, b) for a, b, timed in shown if not texts_agree(a, b, timed)]


@pytest.mark.parametrize(
    "saved, now, agree",
    [
        ("loss 0.4451", "loss 0.4451", True),
        ("loss 0.4451", "loss 0.4452", True),  # the last digit, rounded the other way
        ("loss 0.4451", "loss 0.4453", False),
        ("loss 0.4451", "loss 0.5451", False),
        ("loss 0.4451", "loss -0.4451", False),
        ("loss 0.4451", "mean 0.4451", False),
        ("1,234 tokens", "1,235 tokens", False),  # a count is exact
        ("[3, 4]", "[3, 5]", False),
        ("0.30000000000000004", "0.3", True),
        ("1234.5678", "1234.5712", True),  # 3e-6 of it
        ("1234.5678", "1234.6678", False),
        ("1.19e-07", "1.20e-07", True),
        ("1.19e-07", "1.49e-07", False),
        ("0.1234567890123456", "0.1334567890123456", False),  # not a digest
        ("[1,0.25]", "[1,0.35]", False),
        ("step 60.", "step 61.", False),
        ("nan", "0.5", False),
        ("12 %", "12 % of them", False),
    ],
)
def test_numbers_are_compared(saved, now, agree):
    assert texts_agree(saved, now) == agree


def test_changes_are_noticed():
    "A changed digit is, but neither times, pictures nor digests; and a missing output is."

    def cell(text, source="print(x)", **data):
        outputs = [dict(output_type="stream", name="stdout", text=text)]
        return dict(source=source, outputs=outputs + [dict(data=data)] * bool(data))

    def differ(a, b):
        return differences([cell("same"), a], [cell("same"), b])

    assert differ(cell("loss 0.25"), cell("loss 0.35")) == [("loss 0.25", "loss 0.35")]
    assert differ(cell("loss 0.25"), dict(source="print(x)", outputs=[])) == [("loss 0.25", "")]
    assert not differ(cell("took 3.1 s", "#| timed\nf()"), cell("took 4.2 s", "#| timed\nf()"))
    assert differ(cell("took 3.1 s", "#| timed\nf()"), cell("needed 3.1 s", "#| timed\nf()"))
    assert not differ(cell("weights 0123456789abcdef"), cell("weights 0123456789abcdee"))
    warned = cell("a")
    warned["outputs"].append(dict(output_type="stream", name="stderr", text="a warning"))
    assert differ(cell("a"), warned) == [("a", "a a warning")]
    assert not differ(cell("a", **{"image/png": "x"}), cell("a", **{"image/png": "y"}))
    assert differ(cell("", **{"text/plain": "1.5"}), cell("", **{"text/plain": "2.5"}))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook(path):
    "No cell fails, and what is saved is what the code shows, stderr included."
    saved = nbformat.read(path, as_version=4)
    now = nbformat.read(path, as_version=4)
    where = dict(metadata=dict(path=str(path.parent)))
    NotebookClient(now, timeout=1200, kernel_name="python3", resources=where).execute()
    before, after = ([cell for cell in nb.cells if cell.cell_type == "code"] for nb in (saved, now))
    assert all(cell.execution_count for cell in after if cell.source.strip())
    different = differences(before, after)
    assert not different, "\n\n".join(f"saved: {a}\nnow:   {b}" for a, b in different)


def test_nbdev_test():
    "nbdev's own command for it, on a small notebook."
    command = [Path(sys.executable).with_name("nbdev_test"), "--path", "nbs/appendix/entry.ipynb"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "Success" in done.stdout, done.stdout + done.stderr
