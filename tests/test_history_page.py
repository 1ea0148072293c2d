"""The slider over a training: its models against PyTorch, and its panel in a real browser."""

import copy
import re

import pytest
import torch
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import expect
from torch.testing import assert_close

from tinytransformer.cli import main
from tinytransformer.files import InputError
from tinytransformer.generate import SampleConfig, encode_prompt, generate
from tinytransformer.history import read_packed_history
from tinytransformer.model_page import model_page
from tinytransformer.runs import load_run

PROMPT = " = Greta Holt = \n Greta Holt ("


@pytest.fixture(scope="module")
def tiny():
    return load_run("tiny")


@pytest.fixture(scope="module")
def saved(tiny, tmp_path_factory):
    file = tmp_path_factory.mktemp("page") / "tiny.html"
    model_page(tiny, PROMPT, history=True).save(file)
    return file


@pytest.fixture(scope="module")
def opened(launch, saved, tmp_path_factory):
    "One page for all tests; at the end nothing may have been asked for or gone wrong."
    context = launch(
        tmp_path_factory.mktemp("reader"), offline=True, viewport=dict(width=1200, height=900)
    )
    page, asked, wrong = context.new_page(), [], []
    own = ("file:", "data:", "blob:")
    page.on("request", lambda r: None if r.url.startswith(own) else asked.append(r.url))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda m: wrong.append(m.text) if m.type == "error" else None)
    page.goto(saved.as_uri())
    page.locator("#learned-details[data-ready]").wait_for()
    yield page
    assert (asked, wrong) == ([], [])


@pytest.fixture
def page(opened):
    "The page as it is when it opens."
    if opened.locator("#learned-note").is_visible():
        go_to(opened, 1800)
    return opened


def go_to(page, step: int) -> None:
    "Move the slider, and wait until the model of that step has written."
    page.evaluate(
        """async (step) => {
          const { learned } = document.getElementById("learned");
          await learned.go(learned.steps.indexOf(step));
          learned.write();
        }""",
        step,
    )


def test_the_file_is_small(saved):
    assert saved.stat().st_size < 2_000_000


@pytest.fixture(scope="module")
def at_440(tiny):
    model = copy.deepcopy(tiny.model)
    model.load_state_dict(read_packed_history(tiny.folder).weights(440), strict=False)
    return model


def test_a_step_of_the_slider_is_that_model(page, tiny, at_440):
    "Its logits, what it writes to the prompt, and what the rest of the page shows."
    go_to(page, 440)
    ids = encode_prompt(tiny.tokenizer, PROMPT)
    with torch.no_grad():
        logits = at_440(torch.tensor([ids]))[0, -1].double()
    found = page.evaluate(
        "() => Array.from(document.getElementById('learned').learned.page.text.logits)"
    )
    assert_close(torch.tensor(found, dtype=torch.float64), logits, rtol=0, atol=1e-4)
    cfg = SampleConfig(temperature=0, max_new_tokens=40)
    expected = tiny.tokenizer.decode(generate(at_440, torch.tensor([ids]), cfg)[0].tolist())
    assert page.locator("#learned .wrote").text_content() == expected
    likeliest = tiny.tokenizer.decode([logits.argmax().item()]).strip()
    assert likeliest in page.locator("#token tbody tr").first.inner_text()


def test_the_weights_are_those_of_python(page, tiny):
    "Every value of every step, and not only nearly."
    history = read_packed_history(tiny.folder)
    for step in (0, 440):
        found = page.evaluate(
            """async (step) => {
              const { learned } = document.getElementById("learned");
              const { tensors } = await learned.model(learned.steps.indexOf(step));
              const names = Object.keys(tensors);
              return names.map((name) => [name, tensors[name].reduce((sum, w) => sum + w * w, 0)]);
            }""",
            step,
        )
        weights = history.weights(step)
        assert [name for name, _ in found] == list(weights)
        for name, square in found:
            assert square == pytest.approx(weights[name].double().square().sum().item(), rel=1e-9)


def test_the_keyboard_moves_the_slider(page):
    slider = page.get_by_role("slider", name="The model after training step")
    expect(slider).to_have_attribute("aria-valuetext", "step 1,800 of 1,800")
    note = page.locator("#learned-note")
    expect(note).to_be_hidden()
    slider.focus()
    page.keyboard.press("Home")
    expect(slider).to_have_attribute("aria-valuetext", "step 0 of 1,800")
    expect(note).to_contain_text("The model as it was after step 0 of 1,800")
    for _ in range(5):
        page.keyboard.press("ArrowRight")
    expect(slider).to_have_attribute("aria-valuetext", "step 440 of 1,800")
    rows = page.locator("#learned tbody tr")
    assert rows.all_inner_texts()[0].split("\t")[-2:] == ["0.81", "0.01"]
    assert rows.all_inner_texts()[3].split("\t")[-2:] == ["39 %", "75 %"]
    page.get_by_role("button", name="Back to the finished model").click()
    expect(note).to_be_hidden()


def test_the_moment_is_marked(page):
    "In the chart, in a sentence, and with a button that goes there."
    expect(page.locator("#learned svg .moment")).to_have_count(1)
    assert re.search("steps 420–440", page.locator("#learned svg").text_content())
    expect(page.locator("#learned-moment")).to_contain_text("between step 420 and step 440")
    page.get_by_role("button", name="Show step 440").click()
    expect(page.locator("#learned-note")).to_contain_text("step 440")


def test_it_plays_and_pauses(page):
    page.get_by_role("slider", name="The model after").press("Home")
    button = page.locator("#learned .stop button")
    button.click()
    expect(button).to_have_text("Pause")
    button.click()
    expect(button).to_have_text("Play")


def test_a_damaged_step_is_one_sentence(page):
    page.evaluate(
        """() => {
          const { learned } = document.getElementById("learned");
          learned.models.delete(1);
          learned.whole = learned.history.packed[100];
          learned.history.packed[100] = learned.whole.slice(0, 400);
        }"""
    )
    slider = page.get_by_role("slider", name="The model after")
    slider.press("Home")
    slider.press("ArrowRight")
    expect(page.locator("#learned [role=status]")).to_contain_text("cannot be read")
    slider.press("ArrowRight")
    expect(page.locator("#learned [role=status]")).to_be_empty()
    page.evaluate(
        """() => {
          const { learned } = document.getElementById("learned");
          learned.models.delete(1);
          learned.history.packed[100] = learned.whole;
        }"""
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_serious_in_an_audit(page, scheme):
    go_to(page, 440)
    page.emulate_media(color_scheme=scheme)
    for context in ("#learned-details", "#learned-note"):
        found = Axe().run(page, context=context).response["violations"]
        serious = [v for v in found if v["impact"] in ("serious", "critical")]
        assert [(v["id"], node["html"]) for v in serious for node in v["nodes"]] == []


def test_it_fits_a_phone(page):
    page.set_viewport_size(dict(width=390, height=800))
    expect(page.locator("#learned svg")).to_have_attribute("viewBox", re.compile("^0 0 3[0-9]+ "))
    assert page.evaluate("() => document.documentElement.scrollWidth") <= 390
    page.set_viewport_size(dict(width=1200, height=900))


def test_only_a_run_that_has_a_history_shows_one(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(["page", "tiny", "tiny.html", "--history", "true"])
    assert '"moment": [420, 440]' in (tmp_path / "tiny.html").read_text(encoding="utf-8")
    other = copy.copy(tiny)
    other.folder = tmp_path
    with pytest.raises(InputError, match="has no history.bin"):
        model_page(other, history=True)
