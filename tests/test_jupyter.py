"""The book in JupyterLab: it opens at its start, and every chapter runs from top to bottom."""

import re
import shutil

import pytest
from conftest import ROOT, jupyter_lab, run_all

CHAPTERS = sorted(
    (ROOT / "nbs").glob("0*.ipynb"), reverse=True
)  # the longest first, so that no worker is left alone with one of them


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    """JupyterLab, started as the README says, in a copy of the project, so that it saves nothing
    over ours; what was prepared and trained is shared.
    """
    folder = tmp_path_factory.mktemp("book")
    shutil.copytree(
        ROOT / "nbs",
        folder / "nbs",
        symlinks=True,
        ignore=shutil.ignore_patterns(".ipynb_checkpoints"),
    )
    for name in ("data", "runs", "benchmarks"):
        (ROOT / name).mkdir(exist_ok=True)
        (folder / name).symlink_to(ROOT / name)
    command = re.search(r"`jupyter lab (\S+)`", (ROOT / "README.md").read_text())
    with jupyter_lab(folder, command[1]) as address:
        yield folder, address


def test_it_opens_at_the_start(launch, book, tmp_path):
    folder, address = book
    page = launch(tmp_path).new_page()
    opened = next(
        (folder / "runtime").glob("jpserver-file-to-run-*.html")
    ).read_text()  # by it, Jupyter tells the browser where to go
    page.goto(address + re.search(r"http://[^/]+(/[^\"]+ipynb\?token=abc)", opened)[1])
    page.locator(".jp-Notebook h1", has_text="tinytransformer").wait_for(timeout=60_000)


@pytest.fixture(scope="module")
def lab(launch, book, tmp_path_factory):
    "A page in which JupyterLab is loaded, once for all chapters."
    page = launch(tmp_path_factory.mktemp("profile")).new_page()
    page.goto(f"{book[1]}/lab?reset&token=abc")
    page.wait_for_function("window.jupyterapp")
    page.evaluate("jupyterapp.restored")
    return page


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda path: path.stem)
def test_run_all(lab, chapter):
    "Run > Run All Cells: every cell has run, and none has failed."
    lab.evaluate(
        "async path => { window.panel = await jupyterapp.commands.execute('docmanager:open', {path}); await panel.context.ready }",
        chapter.name,
    )
    assert lab.evaluate("panel.context.path") == chapter.name
    run_all(lab, "panel")  # not what is in front: once something kept the chapter before it there
    cells = lab.evaluate(
        "panel.content.widgets.filter(cell => cell.model.type === 'code').map(cell => cell.model.sharedModel.toJSON())"
    )
    lab.evaluate("panel.sessionContext.shutdown().then(() => panel.dispose())")
    assert cells and not [
        output
        for cell in cells
        for output in cell["outputs"]
        if output["output_type"] == "error" or output.get("name") == "stderr"
    ]
    assert all(cell["execution_count"] for cell in cells if "".join(cell["source"]).strip())
