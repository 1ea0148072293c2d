"""The instruments in the page against those of the appendix, and their panel in a real browser."""

import base64
import re

import pytest
import torch
from axe_playwright_python.sync_playwright import Axe
from conftest import ROOT
from playwright.sync_api import Page, expect
from torch.testing import assert_close

from tinytransformer import variants  # noqa: F401
from tinytransformer.explorer import (
    direct_logit_attribution,
    heads_of,
    logit_lens,
    patch_heads,
    stream_names,
)
from tinytransformer.generate import encode_prompt
from tinytransformer.model import ModelConfig, Transformer
from tinytransformer.model_page import model_page, pack_model
from tinytransformer.runs import load_run

STATIC = ROOT / "tinytransformer" / "static"
START = " = Greta Holt = \n Greta Holt ( 1837 – 1880 ) was a Danish painter of Dunham . \n"
TEXT = START + " = = Life = = \n Miss Holt was born in the year"
OTHER = TEXT.replace("1837", "1839")
LOAD = """async ([codes, data]) => {
  const url = (code) => "data:text/javascript;base64," + code;
  const imports = Object.fromEntries(Object.entries(codes).map(([k, v]) => [k, url(v)]));
  const map = document.createElement("script");
  map.type = "importmap";
  map.textContent = JSON.stringify({ imports });
  document.head.append(map);
  const engine = await import("engine");
  window.inside = await import("inside");
  window.load = async (data) => {
    const tensors = engine.readTensors(await engine.unpack(data.weights), data.shapes, data.dtype);
    window.model = new engine.Transformer(data.config, tensors);
  };
}"""


@pytest.fixture(scope="module")
def tiny():
    return load_run("tiny")


@pytest.fixture(scope="module")
def evaluate(launch, tmp_path_factory):
    "Evaluates JavaScript in a page that has the modules."
    page = launch(tmp_path_factory.mktemp("profile")).new_page()
    page.goto("about:blank")
    codes = {
        name: base64.b64encode((STATIC / f"{name}.js").read_bytes()).decode()
        for name in ("engine", "parts", "inside")
    }
    page.evaluate(LOAD, [codes, None])
    return page.evaluate


def small_model(**settings) -> Transformer:
    "An untrained model whose norms, biases and matrices are all random."
    torch.manual_seed(0)
    cfg = ModelConfig(
        vocab_size=50, seq_len=16, embed_dim=24, num_heads=3, num_layers=3, **settings
    )
    model = Transformer(cfg).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture(params=["tiny", "plain", "variant"])
def case(request, tiny):
    "A model, its tokenizer, and two texts that differ in one token."
    if request.param == "tiny":
        texts = [encode_prompt(tiny.tokenizer, text) for text in (TEXT, OTHER)]
        return tiny.model, texts
    parts = dict(norm="rms", positions="rotary", activation="swiglu")
    plain = dict(activation="gelu", tie_weights=True)
    model = small_model(**(parts if request.param == "variant" else plain))
    return model, [list(range(12)), [0, 1, 2, 30, *range(4, 12)]]


def test_the_instruments_are_those_of_pytorch(case, evaluate, tiny):
    model, (ids, source_ids) = case
    evaluate("(data) => load(data)", pack_model(model, tiny.tokenizer, "float32"))

    def close(found, expected):
        assert_close(torch.tensor(found).double(), expected.double(), rtol=0, atol=1e-4)

    lens = evaluate(
        """(ids) => inside.logitLens(model, inside.readTraces(model, ids).at(-1))
          .map(({ name, logits }) => [name, Array.from(logits)])""",
        ids,
    )
    assert [name for name, _ in lens] == stream_names(model)
    close([logits for _, logits in lens], logit_lens(model, ids)[:, -1])

    for other in (None, 7):
        expected = direct_logit_attribution(model, ids, -1, 5, other)
        found = evaluate(
            """([ids, other]) =>
              inside.attribution(model, inside.readTraces(model, ids).at(-1), 5, other)""",
            [ids, other],
        )
        assert [name for name, _ in found] == list(expected)
        close([value for _, value in found], torch.tensor(list(expected.values())))
        with torch.no_grad():
            logits = model(torch.tensor([ids]))[0, -1]
        whole = logits[5] - (0 if other is None else logits[other])
        assert sum(value for _, value in found) == pytest.approx(whole.item(), abs=1e-4)

    for head in heads_of(model)[::2]:
        for positions in ([len(ids) - 1], list(range(len(ids)))):
            found = evaluate(
                """([ids, other, layer, head, positions]) => {
                  const traces = inside.readTraces(model, other);
                  const patches = inside.outputsOf(model, traces, layer, head, positions);
                  return Array.from(inside.readTraces(model, ids, { patches }).at(-1).logits);
                }""",
                [ids, source_ids, *head, positions],
            )
            close(found, patch_heads(model, ids, source_ids, [head], positions)[-1])


# --- the panel


@pytest.fixture(scope="module")
def saved(tiny, tmp_path_factory):
    file = tmp_path_factory.mktemp("page") / "tiny.html"
    model_page(tiny, TEXT).save(file)
    return file


@pytest.fixture(scope="module")
def context(launch, tmp_path_factory):
    return launch(
        tmp_path_factory.mktemp("reader"), offline=True, viewport=dict(width=1200, height=900)
    )


@pytest.fixture
def open_panel(context, saved):
    "Opens the page and its panel; afterwards nothing may have been asked for or gone wrong."
    pages, wrong = [], []

    def start(**media) -> Page:
        page = context.new_page()
        pages.append(page)
        own = ("file:", "data:", "blob:")
        page.on("request", lambda r: None if r.url.startswith(own) else wrong.append(r.url))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.emulate_media(**media)
        page.goto(saved.as_uri())
        page.locator("html[data-ready]").wait_for()
        page.locator("#inside-details summary").click()
        page.locator("#inside-details[data-ready]").wait_for()
        return page

    yield start
    for page in pages:
        page.close()
    assert wrong == []


def numbers(row) -> list[float]:
    return [float(text.strip("< %")) for text in row.locator("td.number").all_inner_texts()]


def test_the_panel_answers(open_panel):
    page = open_panel()
    inside = page.locator("#inside")
    expect(inside.locator("p").first).to_contain_text("About the likeliest next token, “␣1837”")
    # the year can be read after feed-forward 0, and not before
    rows = inside.locator(".lens tbody tr")
    right = [row.locator("td").first.locator(".right").count() for row in rows.all()]
    assert right == [0, 0, 1, 1, 1]
    caption = inside.locator(".bars caption").inner_text()
    said = re.search(r"sum to (\S+), and the model has (\S+)\.", caption)
    total, logits = said.groups()
    assert abs(float(total) - float(logits)) <= 0.011
    # a second text is proposed, and head 0.0 carries the difference
    second = inside.get_by_label("Second text, in which one fact differs")
    expect(second).to_have_value(TEXT.replace("1837", "1838"))
    row = inside.locator(".patch tbody tr").filter(has_text="1837")
    inside.get_by_label("head").select_option("0.0")
    own, patched, _ = numbers(row)
    assert own > 90 and patched < 10
    inside.get_by_label("head").select_option("1.0")
    own, patched, _ = numbers(row)
    assert own > 90 and patched > 90
    # texts of different lengths
    second.fill(TEXT + " 18")
    expect(page.locator("#inside-result")).to_contain_text(
        "change a word for one of as many tokens"
    )
    second.fill("")
    expect(page.locator("#inside-result")).to_contain_text("Write a second text")
    # a token of the text, and one before which there is nothing
    page.locator("#tokens span").nth(5).click()
    expect(inside.locator("p").first).to_contain_text("token 5 of the text")
    page.locator("#tokens span").first.click()
    expect(inside.locator("p").first).to_contain_text("Nothing came before this token")
    page.locator("#prompt").fill("")
    expect(page.locator("#inside-result")).to_contain_text("There is no text to patch yet")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_panel_is_for_everybody(open_panel, scheme):
    page = open_panel(color_scheme=scheme)
    found = Axe().run(page, context="#inside-details").response["violations"]
    serious = [v for v in found if v["impact"] in ("serious", "critical")]
    assert [(v["id"], node["html"]) for v in serious for node in v["nodes"]] == []
    page.set_viewport_size(dict(width=390, height=800))
    assert page.evaluate("() => document.documentElement.scrollWidth") <= 390
