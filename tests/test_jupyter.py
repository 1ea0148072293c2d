"""The book in JupyterLab: it opens at its start, and a chapter with a map runs from top to
bottom."""

import re

from conftest import run_all

OPEN = """async path => {
    window.panel = await jupyterapp.commands.execute('docmanager:open', {path});
    await panel.context.ready;
}"""
CELLS = """panel.content.widgets.filter(cell => cell.model.type === 'code')
    .map(cell => cell.model.sharedModel.toJSON())"""


def test_it_opens_at_the_start(launch, book, tmp_path):
    folder, address = book
    page = launch(tmp_path).new_page()
    # by this page, Jupyter tells the browser where to go
    opened = next((folder / "runtime").glob("jpserver-file-to-run-*.html")).read_text()
    page.goto(address + re.search(r"http://[^/]+(/[^\"]+ipynb\?token=abc)", opened)[1])
    page.locator(".jp-Notebook h1", has_text="tinytransformer").wait_for(timeout=60_000)


def test_run_all(launch, book, tmp_path):
    """Run > Run All Cells in 02: every cell has run, none has failed, and the attention map is
    drawn.
    """
    page = launch(tmp_path).new_page()
    page.goto(f"{book[1]}/lab?reset&token=abc")
    page.wait_for_function("window.jupyterapp")
    page.evaluate("jupyterapp.restored")
    page.evaluate(OPEN, "02_attention.ipynb")
    assert page.evaluate("panel.context.path") == "02_attention.ipynb"
    run_all(page, "panel")
    cells = page.evaluate(CELLS)
    page.locator(".attention-map[data-ready]").first.wait_for(state="attached")
    page.evaluate("panel.sessionContext.shutdown().then(() => panel.dispose())")
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert cells and not [output for output in outputs if output["output_type"] == "error"]
    assert not [output for output in outputs if output.get("name") == "stderr"]
    assert all(cell["execution_count"] for cell in cells if "".join(cell["source"]).strip())
