"""The small page that writes an article about a name, in a real browser."""

import pytest
import torch
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, expect

from tinytransformer.files import InputError
from tinytransformer.model_page import article_page
from tinytransformer.runs import load_run

NAMES = ["Ingrid Maria Kjellberg", "Karl Christian Blom"]


@pytest.fixture(scope="module")
def page(launch, tmp_path_factory) -> Page:
    "The page opened from disk, by somebody who wants no animation; it notes what goes wrong."
    folder = tmp_path_factory.mktemp("article")
    article_page("tiny", NAMES, head=(1, 2)).save(folder / "article.html")
    page = launch(folder / "profile", reduced_motion="reduce").new_page()
    page.wrong = []
    page.on("pageerror", lambda error: page.wrong.append(str(error)))
    page.on("request", lambda request: page.wrong.append(request.url))
    page.goto((folder / "article.html").as_uri())
    page.locator("[data-ready=true]").wait_for()
    page.wrong = [url for url in page.wrong if not url.startswith(("file:", "data:"))]
    return page


def write(page: Page, name: str) -> str:
    page.get_by_label("Write an article about").fill(name)
    page.get_by_role("button", name="Write", exact=True).click()
    return page.locator("#text").inner_text()


def test_an_article_is_written(page):
    text = write(page, NAMES[0])
    assert text.startswith(f" = {NAMES[0]} = \n {NAMES[0]} (") and " = = Life = = " in text
    assert text.count("\n = ") == text.count("\n = =")  # and it ends before the next article
    page.get_by_role("button", name="Another name").click()
    expect(page.get_by_label("Write an article about")).to_have_value(
        page.locator("#text").inner_text().split(" = ")[1]
    )
    assert page.wrong == []


def test_a_word_shows_where_the_head_looked(page):
    "The shares that are shaded are those of PyTorch, for a name that stands there twice."
    write(page, NAMES[0])
    tokens = page.locator("#text span")
    pieces = tokens.all_inner_texts()
    again = [i for i, piece in enumerate(pieces) if piece == " Kjellberg"][1]
    tokens.nth(again).hover()
    said = page.locator("#said").inner_text()
    assert "“␣Kjellberg” had a probability of" in said and "Head 2 of layer 1" in said
    run = load_run("tiny")
    ids = run.tokenizer.encode("".join(pieces)).ids[:again]
    assert [run.tokenizer.decode([i]) for i in ids] == pieces[:again]
    model = run.model.half().float()
    with torch.no_grad():
        _, weights = model(torch.tensor([ids]), return_weights=True)
    row = weights[1][0, 2, -1]
    assert f"({100 * row.max():.1f} %)" in said
    shaded = [
        i for i in range(again) if tokens.nth(i).evaluate("(token) => token.style.background")
    ]
    assert shaded == [i for i, weight in enumerate(row.tolist()) if weight > 0.02]
    page.locator("#text").press("ArrowLeft")
    expect(tokens.nth(again - 1)).to_have_attribute("aria-selected", "true")


@pytest.mark.parametrize("name", ["</script><b>bold", "नमस्ते 🦊 \ud83d", "x" * 5000])
def test_any_name_is_only_text(page, name):
    write(page, name)
    assert page.locator("#text b").count() == 0 and page.locator("#text span").count() > 10
    assert page.wrong == []


def test_an_empty_name_is_answered(page):
    before = write(page, NAMES[0])
    assert write(page, "   ") == before
    expect(page.locator("#said")).to_contain_text("Give a name")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everybody_can_read_it(page, scheme):
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size(dict(width=390, height=700))
    write(page, NAMES[1])
    page.locator("#text span").nth(30).click()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    found = Axe().run(page).response["violations"]
    assert [one["id"] for one in found if one["impact"] in ("serious", "critical")] == []


def test_only_for_articles(tmp_path):
    run = load_run("tiny")
    run.config["data"]["dataset"] = "Salesforce/wikitext"
    with pytest.raises(InputError, match="Salesforce/wikitext.*use model_page"):
        article_page(run, NAMES, head=(1, 2))
