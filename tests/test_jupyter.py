"""JupyterLab in a browser: the book opens at its start, a chapter with an attention map runs from
top to bottom, and maps and explorers answer.
"""

import re

import nbformat
import numpy as np
import pytest
from conftest import run_all
from playwright.sync_api import Page

from tinytransformer.attention_map import attention_map
from tinytransformer.drawings import draw_block

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


@pytest.mark.slow
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


NOTEBOOK = """
import numpy as np
from tinytransformer.attention_map import attention_map
from tinytransformer.explorer import AttentionExplorer
from tinytransformer.model import ModelConfig, Transformer
from tinytransformer.data import train_bpe
tokenizer = train_bpe(["the cat sat on the mat and the cat slept"] * 9, 270)
sizes = dict(seq_len=64, embed_dim=16, num_heads=2, num_layers=2)
model = Transformer(ModelConfig(vocab_size=tokenizer.get_vocab_size(), **sizes)).eval()
"""


def open_notebook(launch, book, tmp_path, *cells, outputs=()) -> Page:
    folder, address = book
    nb = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(source) for source in cells],
        metadata=dict(kernelspec=dict(name="python3", display_name="python3", language="python")),
    )
    if outputs:
        nb.cells[0].outputs = [
            nbformat.v4.new_output("display_data", data=data) for data in outputs
        ]
    name = f"{tmp_path.name}.ipynb"
    nbformat.write(nb, folder / "nbs" / name)
    page = launch(tmp_path / "profile", viewport=dict(width=1300, height=1000)).new_page()
    page.goto(f"{address}/lab/tree/{name}?reset&token=abc")
    page.locator(".jp-Notebook-ExecutionIndicator[data-status=idle]").wait_for(timeout=60_000)
    return page


def test_untrusted_notebook(launch, book, tmp_path):
    "Scripts are taken out, and the picture stays."
    weights = np.tile(np.eye(9), (2, 3, 1, 1))
    html = attention_map(weights, list("abcdefghi"))._repr_html_()
    page = open_notebook(launch, book, tmp_path, "1", outputs=[{"text/html": html}])
    picture = page.locator(".attention-map img")
    picture.wait_for()
    assert picture.bounding_box()["width"] > 100
    assert not page.locator(".attention-map[data-ready]").count()


def test_drawing_before_and_after_it_is_trusted(launch, book, tmp_path):
    """Inline SVG is taken out with its words, and its title and the still picture stay. Once the
    cell has run, the drawing is there in the colour of the theme, and the still is hidden.
    """
    code = "from tinytransformer.drawings import draw_block; draw_block()"
    saved = {"text/html": draw_block()._repr_html_()}
    page = open_notebook(launch, book, tmp_path, code, outputs=[saved])
    still = page.locator(".jp-OutputArea-output img")
    still.wait_for()
    assert still.bounding_box()["width"] > 300
    assert page.locator(".jp-OutputArea-output").inner_text().strip() == draw_block().title
    run_all(page)
    letters = page.locator(".tinytransformer-drawing text").first
    letters.wait_for(timeout=60_000)
    assert not still.is_visible()
    colour = "node => [getComputedStyle(node).fill, getComputedStyle(node.closest('div')).color]"
    for theme in ("JupyterLab Light", "JupyterLab Dark"):
        page.evaluate(f"jupyterapp.commands.execute('apputils:change-theme', {{theme: '{theme}'}})")
        page.wait_for_function(f"document.body.dataset.jpThemeName === '{theme}'")
        fill, around = letters.evaluate(colour)
        assert fill == around


def test_jupyterlab(launch, book, tmp_path):
    "Run from top to bottom: a map that answers, and whose keys are no commands of the notebook."
    page = open_notebook(
        launch,
        book,
        tmp_path,
        NOTEBOOK,
        "attention_map(np.eye(5)[None, None], list('abcde'), title='in the lab')",
    )
    run_all(page)
    page.locator(".attention-map[data-ready]").wait_for(timeout=60_000)
    page.locator("[role=radio]").first.click()
    cells = page.locator(".jp-Notebook .jp-Cell").count()
    for part in (
        page.locator("[role=radio]").first,
        page.locator("[role=listbox]"),
        page.locator("canvas.heat"),
        page.get_by_role("button", name="values"),
    ):
        part.focus()
        for key in ("x", "a", "b", "d", "d", "m", "y", "z", "0", "0", "Shift+M"):
            page.keyboard.press(key)
    page.locator("[role=listbox]").focus()
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    host = "document.querySelector('.attention-map')"
    assert page.evaluate(f"{host}.attentionMap.state.token") == 1
    page.wait_for_timeout(300)
    assert (
        page.locator(".jp-Notebook .jp-Cell").count() == cells == 2
        and page.locator(".jp-Dialog").count() == 0
    )
    assert page.locator(".jp-Notebook .jp-CodeCell").count() == 2


@pytest.mark.parametrize(
    "package", ["anywidget", pytest.param("ipywidgets alone", marks=pytest.mark.slow)]
)
def test_explorer_in_jupyterlab(launch, book, tmp_path, package):
    "A prompt typed into the page is answered by a new map; heads are switched off."
    hide = "import sys; sys.modules['anywidget'] = None" if package != "anywidget" else ""
    page = open_notebook(
        launch,
        book,
        tmp_path,
        hide + NOTEBOOK,
        "AttentionExplorer(model, tokenizer, 'the cat sat')",
    )
    run_all(page)
    page.locator("[data-ready]").wait_for(timeout=60_000)
    words = page.locator("[role=option]")
    before = words.count()
    page.locator("textarea[placeholder], .widget-textarea textarea").first.fill(
        "the cat sat on the mat and slept"
    )
    page.keyboard.press("Tab")
    page.wait_for_function(
        "before => document.querySelector('[data-ready]')"
        "?.shadowRoot.querySelectorAll('[role=option]').length > before",
        arg=before,
    )
    page.locator(".widget-select-multiple select").select_option(index=1)
    page.get_by_text("against").wait_for()
