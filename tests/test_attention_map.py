"""The map in a real browser: what it shows is what NumPy says, every part answers to mouse and
keys, and nothing is asked of any network."""

import re
import xml.etree.ElementTree as ElementTree

import nbformat
import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe
from conftest import ROOT
from playwright.sync_api import Page

from tinytransformer.attention_map import (
    SCRIPT,
    attention_map,
    decode,
    encode,
    script,
    side_by_side,
)
from tinytransformer.explorer import look
from tinytransformer.model import ModelConfig, Transformer

WORDS = "the cat sat on the mat and the cat slept".split()
ROLE = "[role=%s]"


def random_weights(
    layers: int, heads: int, T: int, spread: float = 2.0, seed: int = 0
) -> np.ndarray:
    scores = np.random.default_rng(seed).normal(size=(layers, heads, T, T)) * spread
    scores[..., ~np.tril(np.ones((T, T), bool))] = -np.inf
    e = np.exp(scores - scores.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@pytest.fixture(scope="module")
def context(launch, tmp_path_factory):
    return launch(
        tmp_path_factory.mktemp("browser"), offline=True, viewport=dict(width=1200, height=900)
    )


@pytest.fixture
def show(context, tmp_path):
    """Saves a map as a page and opens it from the disk; afterwards nothing may have been asked for,
    and nothing may have gone wrong.
    """
    pages, asked, wrong = [], [], []

    def open_page(*maps, html=None, **media) -> Page:
        page = context.new_page()
        pages.append(page)
        page.on(
            "request",
            lambda r: (
                asked.append(r.url) if not r.url.startswith(("file:", "data:", "blob:")) else None
            ),
        )
        page.on("pageerror", lambda e: wrong.append(str(e)))
        page.on("console", lambda m: wrong.append(m.text) if m.type == "error" else None)
        if media:
            page.emulate_media(**media)
        path = tmp_path / f"{len(pages)}.html"
        if html is not None:
            path.write_text(html, encoding="utf-8")
        else:
            maps[0].save(path)
        page.goto(path.as_uri())
        for host in page.locator(".attention-map").all():
            host.and_(page.locator("[data-ready]")).wait_for()
        return page

    yield open_page
    for page in pages:
        page.close()
    assert not asked and not wrong, (asked, wrong)


@pytest.fixture(scope="module")
def weights():
    return random_weights(2, 3, len(WORDS))


@pytest.fixture(scope="module")
def seen():
    "A small model of the book, and what it looked at."
    import torch

    torch.manual_seed(0)
    model = Transformer(
        ModelConfig(vocab_size=50, seq_len=16, embed_dim=24, num_heads=3, num_layers=2)
    ).eval()
    for p in model.parameters():
        p.data *= 8  # so that the heads differ
    return look(model, range(10), WORDS)


def state(page: Page, n: int = 0) -> dict:
    return page.evaluate(f"document.querySelectorAll('.attention-map')[{n}].attentionMap.state")


def call(page: Page, expression: str):
    return page.evaluate(
        "(() => { const map = document.querySelector('.attention-map').attentionMap; return"
        f" {expression} }})()"
    )


def cell(page: Page, q: int, k: int, T: int = len(WORDS)) -> tuple[float, float]:
    "Where on the page the square of query q and key k is."
    box = page.locator("canvas.heat").bounding_box()
    margin = min(90, box["width"] / 4)
    size = (box["width"] - margin) / T
    return box["x"] + margin + (k + 0.5) * size, box["y"] + margin + (q + 0.5) * size


def readout(page: Page) -> str:
    return page.locator(ROLE % "status").inner_text()


@pytest.mark.parametrize("bits, tolerance", [(8, 0.02), (16, 2e-4)])
def test_values_are_those_of_numpy(show, weights, bits, tolerance):
    page = show(attention_map(weights, WORDS, bits=bits))
    T = len(WORDS)
    got = np.array(
        call(
            page,
            f"[0,1].map(l => [-1,0,1,2].map(h => Array.from({{length: {T}}}, (_, q) =>"
            f" Array.from({{length: {T}}}, (_, k) => map.weight(l, h, q, k)))))",
        )
    )
    kept = decode(encode(weights, bits), bits)
    assert np.allclose(got[:, 1:], kept, rtol=1e-12) and np.allclose(
        got[:, 0], kept.mean(axis=1), rtol=1e-12
    )
    visible = weights >= 1e-4
    assert abs(got[:, 1:] / np.where(visible, weights, 1) - 1)[visible].max() < tolerance


def test_why_is_what_the_model_did(show, seen):
    page = show(attention_map(seen.weights, seen.tokens, vectors=seen.vectors))
    q, k, v = seen.vectors.double().numpy()
    for layer, head, t, s in [(0, 0, 9, 3), (1, 2, 5, 5), (1, 1, 7, 0), (0, 2, 0, 0)]:
        why = call(page, f"map.why({layer}, {head}, {t}, {s})")
        weight = seen.weights[layer, head, t, s].item()
        assert why["weight"] == pytest.approx(weight, abs=1e-6)
        assert why["products"] == pytest.approx(
            list(q[layer, head, t] * k[layer, head, s]), abs=1e-6
        )
        assert why["dot"] == pytest.approx(q[layer, head, t] @ k[layer, head, s], abs=1e-6)
        assert why["adds"] == pytest.approx(list(weight * v[layer, head, s]), abs=1e-6)
        page.locator("canvas.heat").scroll_into_view_if_needed()
        call(page, f"map.choose({{layer: {layer}, head: {head}, token: {t}, key: {s}}})")
        assert float(page.locator(".why .weight").inner_text()) == pytest.approx(weight, abs=1e-6)
        assert float(
            re.search(r"q · k = (\S+),", page.locator(".why").inner_text())[1]
        ) == pytest.approx(why["dot"], rel=1e-5)
    assert call(page, "map.why(0, 0, 2, 5)")["weight"] == 0
    call(page, "map.choose({layer: 0, head: 0, token: 2, key: 5})")
    assert "comes later" in page.locator(".why").inner_text() and "comes later" in readout(page)


def test_pointing_and_pinning(show, weights):
    page = show(attention_map(weights, WORDS, bits=16))
    page.mouse.move(*cell(page, 6, 2))
    assert (state(page)["token"], state(page)["key"]) == (6, 2)
    assert "“and” (6) looks at “sat” (2)" in readout(
        page
    ) and f"{weights[0, 0, 6, 2]:.4g}" in readout(page)
    page.mouse.click(*cell(page, 6, 2))
    page.mouse.move(*cell(page, 8, 1))
    # pinned: pointing elsewhere changes nothing
    assert state(page)["pinned"] and state(page)["token"] == 6
    page.locator(ROLE % "option").nth(3).hover()
    assert state(page)["token"] == 6
    page.mouse.click(*cell(page, 6, 2))  # the same square again lets go
    page.locator(ROLE % "option").nth(3).hover()
    assert not state(page)["pinned"] and (state(page)["token"], state(page)["key"]) == (3, None)
    page.locator(ROLE % "option").nth(3).click()
    assert state(page)["pinned"]
    page.locator(ROLE % "option").nth(7).click()  # another token moves the pin
    assert state(page)["pinned"] and state(page)["token"] == 7
    page.locator(ROLE % "option").nth(7).click()
    assert not state(page)["pinned"]
    page.locator(ROLE % "radio").nth(4).click()
    assert (state(page)["layer"], state(page)["head"]) == (1, 1)


def test_tokens_are_shaded_by_their_weight(show, weights):
    page = show(attention_map(weights, WORDS, bits=16))
    call(page, "map.choose({layer: 1, head: 2, token: 5, key: null})")
    shades = [
        page.evaluate("(node) => node.style.background", node)
        for node in page.locator(ROLE % "option").element_handles()
    ]
    for t, shade in enumerate(shades):
        weight = weights[1, 2, 5, t] if t <= 5 else weights[1, 2, t, 5]
        colour, ink = re.search(r"--(\w+)\) / ([\d.]+)", shade).groups()
        assert colour == ("looks" if t <= 5 else "seen") and float(ink) == pytest.approx(
            0.5 * weight**0.5, abs=1e-3
        )


def test_heat_map_shows_the_weights(show):
    "One square is full, the others are empty; the picture says so, pixel by pixel."
    one = np.tile(np.eye(10), (1, 1, 1, 1))
    one[0, 0, 7] = np.eye(10)[2]
    page = show(attention_map(one, WORDS))
    call(page, "map.choose({token: 0, key: null})")
    ink = page.locator("canvas.heat").evaluate(
        """canvas => {
          const T = 10, ratio = devicePixelRatio, width = canvas.clientWidth;
          const margin = Math.min(90, width / 4), size = (width - margin) / T;
          const c = canvas.getContext("2d"), at = i => (margin + (i + .5) * size) * ratio;
          const row = q => Array.from({length: T}, (_, k) =>
            c.getImageData(at(k), at(q), 1, 1).data[3]);
          return Array.from({length: T}, (_, q) => row(q));
        }"""
    )
    assert np.array_equal(np.array(ink) > 128, one[0, 0] == 1)
    thumbnail = page.locator(".heads canvas").first.evaluate(
        "canvas => Array.from(canvas.getContext('2d').getImageData(0, 0, 10, 10).data).filter((_,"
        " i) => i % 4 === 3)"
    )
    assert np.array_equal(np.array(thumbnail).reshape(10, 10) == 255, one[0, 0] == 1)


def test_everything_by_keyboard(show, weights):
    page = show(attention_map(weights, WORDS))
    visited = []
    for _ in range(14):
        page.keyboard.press("Tab")
        focused = page.evaluate(
            "(() => { const e = document.activeElement.shadowRoot?.activeElement; return e &&"
            " [e.getAttribute('role') || e.tagName, getComputedStyle(e).outlineStyle] })()"
        )
        if focused:
            visited.append(tuple(focused))
    assert {"SELECT", "BUTTON", "radio", "application", "listbox"} <= {name for name, _ in visited}
    assert all(outline == "solid" for _, outline in visited)  # where one is can be seen
    page.locator(ROLE % "radio").first.focus()
    for key, place in [
        ("ArrowRight", (0, 1)),
        ("ArrowDown", (1, 1)),
        ("End", (1, 2)),
        ("ArrowUp", (0, 2)),
        ("Home", (0, 0)),
        ("ArrowLeft", (0, 0)),
    ]:
        page.keyboard.press(key)
        assert (state(page)["layer"], state(page)["head"]) == place
    page.locator(ROLE % "listbox").focus()
    for key, token in [
        ("Home", 0),
        ("ArrowRight", 1),
        ("ArrowRight", 2),
        ("ArrowLeft", 1),
        ("End", 9),
        ("ArrowRight", 9),
    ]:
        page.keyboard.press(key)
        assert state(page)["token"] == token
    assert page.locator("[aria-selected=true]").count() == 1
    page.locator("canvas.heat").focus()
    for key, place in [
        ("Home", (9, 0)),
        ("ArrowUp", (8, 0)),
        ("ArrowRight", (8, 1)),
        ("End", (8, 8)),
        ("ArrowDown", (9, 8)),
    ]:
        page.keyboard.press(key)
        assert (state(page)["token"], state(page)["key"]) == place
    page.keyboard.press("Enter")
    assert state(page)["pinned"] and "pinned" in readout(page)
    page.keyboard.press("Escape")
    assert not state(page)["pinned"]
    page.locator("select").nth(0).select_option("1")
    page.locator("select").nth(1).focus()
    page.keyboard.press("2")  # by number
    assert (state(page)["layer"], state(page)["head"]) == (1, 2)
    page.locator("select").nth(1).select_option("mean")
    assert state(page)["head"] == -1 and "mean of its heads" in readout(page)


def test_sort_and_filter(show, weights):
    a_map = attention_map(weights, WORDS, statistics={"mine": np.arange(6).reshape(2, 3)})
    page = show(a_map)
    radios = page.locator(ROLE % "radio")
    for name in ("entropy", "previous", "first", "induction", "mine"):
        page.locator("select").nth(2).select_option(name)
        values = np.array(a_map.data["statistics"][name])
        wanted = [f"{i // 3}.{i % 3}" for i in np.argsort(-values, axis=None, kind="stable")]
        assert [caption.split()[0] for caption in radios.all_inner_texts()] == wanted
    page.get_by_label("at least").fill("3")
    page.keyboard.press("Enter")
    assert [caption.split()[0] for caption in radios.all_inner_texts()] == ["1.2", "1.1", "1.0"]
    page.get_by_label("at least").fill("30")
    page.keyboard.press("Enter")
    assert (
        radios.count() == 0
        and "no head has mine of 30 or more" in page.locator(".heads").inner_text()
    )
    page.locator("select").nth(2).select_option("")
    assert radios.count() == 6 and not page.get_by_label("at least").is_visible()


def test_table_of_values(show, seen):
    page = show(attention_map(seen.weights, seen.tokens, vectors=seen.vectors))
    call(page, "map.choose({layer: 1, head: 0, token: 6})")
    button = page.get_by_role("button", name="values")
    button.click()
    rows = [row.split("\t") for row in page.locator("tbody tr").all_inner_texts()]
    assert [row[1].strip() for row in rows] == WORDS and button.get_attribute(
        "aria-expanded"
    ) == "true"
    for t, row in enumerate(rows):
        looks, is_seen = (None if x == "–" else float(x) for x in row[2:])
        assert looks == (
            pytest.approx(seen.weights[1, 0, 6, t].item(), rel=1e-5, abs=1e-7) if t <= 6 else None
        )
        assert is_seen == (
            pytest.approx(seen.weights[1, 0, t, 6].item(), rel=1e-5, abs=1e-7) if t >= 6 else None
        )
    button.click()
    assert not page.locator("tbody").is_visible()


NASTY = [
    "<b>x</b>",
    "</script><script>window.ran = 1</script>",
    "\"'&`${1}",
    "\n",
    "שלום",
    "☃️",
    "\ud83d",
    "-->",
    "\x00\x07",
    "<img src=x onerror='window.ran = 1'>",
]


def test_tokens_are_never_markup(show, weights):
    page = show(attention_map(weights, NASTY, title="</title><script>window.ran = 1</script>"))
    words = page.locator(ROLE % "option").all_inner_texts()
    assert (
        words[:3] == NASTY[:3] and words[4] == "שלום" and words[9] == NASTY[9] and "⏎" in words[3]
    )
    page.get_by_role("button", name="values").click()
    for t in range(10):
        call(page, f"map.choose({{token: {t}, key: {t}}})")
        if t not in (3, 6, 8):
            assert NASTY[t] in readout(page)
    ElementTree.fromstring(call(page, "map.svg()"))  # well-formed, whatever the tokens
    assert call(page, "window.ran") is None and page.locator(".map b, .map img").count() == 0


def test_export(show, weights):
    page = show(attention_map(weights, WORDS, title="a & b"))
    call(page, "map.choose({layer: 1, head: 1, token: 8})")
    with page.expect_download() as download:
        page.get_by_role("button", name="SVG").click()
    assert download.value.suggested_filename == "attention-1.1.svg"
    svg = ElementTree.parse(download.value.path()).getroot()
    texts = [node.text for node in svg.iter("{http://www.w3.org/2000/svg}text")]
    assert texts[0] == "a & b: layer 1, head 1" and set(WORDS) <= set(texts)
    squares = [
        float(node.get("fill-opacity")) ** 2
        for node in svg.iter("{http://www.w3.org/2000/svg}rect")
        if node.get("fill-opacity")
    ]
    assert squares[0] == pytest.approx(1, abs=0.01) and len(squares) == (
        weights[1, 1] > 1e-3
    ).sum() + len(WORDS)  # the map, and the sentence
    with page.expect_download() as download:
        page.get_by_role("button", name="PNG").click()
    from PIL import Image

    picture = Image.open(download.value.path())
    assert (
        picture.format == "PNG"
        and picture.width == 2 * int(svg.get("width"))
        and len(set(picture.convert("L").getdata())) > 20
    )


def test_several_on_a_page(show, weights):
    "Two maps, the first of them twice: each has its own state."
    one, two = (
        attention_map(weights, WORDS, title="one"),
        attention_map(weights[:, :2], WORDS, title="two"),
    )
    page = show(
        html=(
            "<!doctype html><meta"
            f" charset=utf-8>{one._repr_html_()}{two._repr_html_()}{one._repr_html_()}"
        )
    )
    assert page.locator(".map strong").all_inner_texts() == ["one", "two", "one"]
    page.locator(ROLE % "radio").nth(5).click()
    assert [(state(page, n)["layer"], state(page, n)["head"]) for n in range(3)] == [
        (1, 2),
        (0, 0),
        (0, 0),
    ]


def test_side_by_side(show, weights):
    page = show(
        side_by_side(
            attention_map(weights, WORDS), attention_map(random_weights(2, 3, 4), WORDS[:4])
        )
    )
    page.locator(ROLE % "radio").nth(4).click()
    assert [(state(page, n)["layer"], state(page, n)["head"]) for n in (0, 1)] == [(1, 1), (1, 1)]
    page.locator(ROLE % "radio").nth(6).click()
    assert [(state(page, n)["layer"], state(page, n)["head"]) for n in (0, 1)] == [(0, 0), (0, 0)]
    # the same text: tokens, too
    page = show(
        side_by_side(
            attention_map(weights, WORDS),
            attention_map(random_weights(2, 3, len(WORDS), seed=1), WORDS),
        )
    )
    page.locator(ROLE % "option").nth(13).click()
    assert state(page, 0) == state(page, 1) and state(page)["token"] == 3 and state(page)["pinned"]


def test_light_and_dark(show, weights):
    a_map = attention_map(weights, WORDS)
    paper = "document.querySelector('.attention-map').shadowRoot.querySelector('.map')"
    light, dark = (
        show(a_map, color_scheme=scheme).evaluate(f"getComputedStyle({paper}).backgroundColor")
        for scheme in ("light", "dark")
    )
    assert light == "rgb(255, 255, 255)" and max(map(int, re.findall(r"\d+", dark))) < 40
    page = show(
        html=f"<!doctype html><meta charset=utf-8><body class='quarto-light'>{a_map._repr_html_()}"
    )
    assert page.locator(".attention-map").get_attribute("data-theme") == "light"
    # Quarto's switch, while the page is open
    page.evaluate("document.body.className = 'quarto-dark'")
    page.locator(".attention-map[data-theme=dark]").wait_for()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_accessible(show, seen, scheme):
    page = show(
        attention_map(seen.weights, seen.tokens, vectors=seen.vectors, title="a map"),
        color_scheme=scheme,
    )
    page.get_by_role("button", name="values").click()
    call(page, "map.choose({token: 6, key: 2, pinned: true})")
    found = [
        f"{v['id']}: {v['nodes'][0]['html'][:200]}"
        for v in Axe().run(page).response["violations"]
        if v["impact"] in ("serious", "critical")
    ]
    assert not found, found


def test_without_scripts(launch, tmp_path, weights):
    "The picture stands in, as it does in a notebook that is not trusted."
    page = launch(tmp_path / "profile", offline=True, java_script_enabled=False).new_page()
    attention_map(weights, WORDS).save(tmp_path / "map.html")
    page.goto((tmp_path / "map.html").as_uri())
    picture = page.locator(".attention-map img")
    assert (
        picture.is_visible()
        and picture.bounding_box()["width"] > 100
        and "2 x 3 heads for 10 tokens" in picture.get_attribute("alt")
    )
    assert page.locator("noscript").inner_text().startswith("This picture shows all heads. With")
    side_by_side(*2 * [attention_map(weights, WORDS)]).save(tmp_path / "two.html")
    page.goto((tmp_path / "two.html").as_uri())
    pictures = page.locator(".attention-map img").all()
    assert len(pictures) == 2 and all(picture.is_visible() for picture in pictures)
    page.goto((SCRIPT.parent / "serve.html").as_uri())
    assert "needs JavaScript, which is switched off" in page.locator("noscript").inner_text()


def test_many_heads_and_tokens(show):
    "Twelve layers of twelve heads, and a text of 300 tokens: all there."
    page = show(attention_map(random_weights(12, 12, 32), ["t"] * 32))
    assert page.locator(ROLE % "radio").count() == 144
    page = show(attention_map(random_weights(1, 1, 300), [f"t{i}" for i in range(300)]))
    page.mouse.click(*cell(page, 299, 7, 300))
    assert abs(state(page)["token"] - 299) <= 1 and abs(state(page)["key"] - 7) <= 1


@pytest.mark.parametrize(
    "name", ["02_attention", "appendix/attention_map", "appendix/explorer", "appendix/gpt2_twin"]
)
def test_saved_notebooks(show, name):
    "The maps that are saved in the book, on one page: all drawn, by the script as it is now."
    notebook = nbformat.read(ROOT / "nbs" / f"{name}.ipynb", as_version=4)
    saved = [
        output["data"]["text/html"]
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if "attention-map" in output.get("data", {}).get("text/html", "")
    ]
    assert saved and all(script() in each for each in saved), (
        f"run {name} again: attention_map.js has changed"
    )
    page = show(html="<!doctype html><meta charset=utf-8>" + "".join(saved))
    assert page.locator(".map").count() == "".join(saved).count('class="attention-map"')
