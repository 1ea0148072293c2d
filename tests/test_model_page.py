"""The model in a page: the engine in JavaScript against PyTorch, and the page in a real browser."""

import base64
import copy
import itertools
import json
import random
import re
import shutil
import unicodedata

import pytest
import torch
from axe_playwright_python.sync_playwright import Axe
from conftest import ROOT, refusal
from playwright.sync_api import Error, Page, expect
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch.testing import assert_close

from tinytransformer import variants  # noqa: F401
from tinytransformer.answer_key import TokenReader, recalled_tokens, token_spans
from tinytransformer.cli import main
from tinytransformer.explorer import silenced
from tinytransformer.generate import SampleConfig, encode_prompt, generate, next_distribution
from tinytransformer.model import ModelConfig, Transformer
from tinytransformer.model_page import model_page, pack_model
from tinytransformer.runs import load_run
from tinytransformer.tinywiki import WIKI, articles

STATIC = ROOT / "tinytransformer" / "static"
ENGINE = (STATIC / "engine.js").read_text(encoding="utf-8")
LOAD = """async ([code, data]) => {
  const engine = await import("data:text/javascript;base64," + code);
  const bytes = await engine.unpack(data.weights);
  const tensors = engine.readTensors(bytes, data.shapes, data.dtype);
  window.engine = engine;
  window.model = new engine.Transformer(data.config, tensors);
  const json = new TextDecoder().decode(await engine.unpack(data.tokenizer));
  window.tokenizer = new engine.Tokenizer(JSON.parse(json));
  window.read = (ids, off = []) => {
    const cache = model.emptyCache();
    return ids.map((id) => {
      const trace = {};
      model.read(id, cache, { trace, off: new Set(off) });
      return trace;
    });
  };
}"""


@pytest.fixture(scope="module")
def tiny():
    return load_run("tiny")


@pytest.fixture(scope="module")
def rounded(tiny):
    "The model with its weights rounded to the 16 bits that a page carries."
    model = Transformer(tiny.model.cfg).eval()
    weights = tiny.model.state_dict()
    model.load_state_dict({name: tensor.half().float() for name, tensor in weights.items()})
    return model


@pytest.fixture(scope="module")
def blank(launch, tmp_path_factory):
    "An empty page."
    return launch(tmp_path_factory.mktemp("profile")).new_page()


@pytest.fixture
def run_in_page(blank):
    "Puts a model into the page, and returns the function that evaluates JavaScript there."

    def put(model: Transformer, tokenizer: Tokenizer, dtype: str = "float32"):
        data = pack_model(model, tokenizer, dtype)
        blank.evaluate(LOAD, [base64.b64encode(ENGINE.encode()).decode(), data])
        return blank.evaluate

    return put


def logits_in_page(evaluate, ids: list[int]) -> torch.Tensor:  # (T, V)
    rows = evaluate("(ids) => read(ids).map((trace) => Array.from(trace.logits))", ids)
    return torch.tensor(rows, dtype=torch.float64)


def random_texts(n: int) -> list[str]:
    "Texts of any characters that Unicode has assigned, with more spaces and letters than chance."
    rng = random.Random(0)
    assigned = [
        chr(c) for c in range(0x110000) if unicodedata.category(chr(c)) not in ("Cn", "Cs", "Co")
    ]
    common = " \t\n\r  etaoin'sdll.,0123456789=@-–é\u00a0\u0085\u200b\u2028\u3000\ufeff"
    return [
        "".join(rng.choice(assigned if rng.random() < 0.3 else common) for _ in range(60))
        for _ in range(n)
    ]


# --- the engine


def test_tokens_are_those_of_the_tokenizer(run_in_page, tiny):
    evaluate = run_in_page(tiny.model, tiny.tokenizer)
    texts = ["", " ", "  a", "don't", " = The", "’s 's", "\r\n\r\n x", *random_texts(500)]
    found = evaluate("(texts) => texts.map((text) => tokenizer.encode(text))", texts)
    assert found == [encode_prompt(tiny.tokenizer, text) for text in texts]
    decoded = evaluate("(rows) => rows.map((ids) => tokenizer.decode(ids))", found)
    assert decoded == texts


def test_random_tokens_decode_as_in_python(run_in_page, tiny):
    evaluate = run_in_page(tiny.model, tiny.tokenizer)
    rng = random.Random(1)
    rows = [[rng.randrange(tiny.model.cfg.vocab_size) for _ in range(12)] for _ in range(250)]
    rows += [[rng.randrange(256) for _ in range(12)] for _ in range(250)]  # single bytes
    found = evaluate("(rows) => rows.map((ids) => tokenizer.decode(ids))", rows)
    assert found == [tiny.tokenizer.decode(ids) for ids in rows]


SHAPES = [
    {},
    {"activation": "gelu", "tie_weights": True},
    {"norm": "rms", "positions": "rotary", "activation": "swiglu"},
    {"positions": "rotary", "num_heads": 1, "num_layers": 1},
]


@pytest.mark.parametrize("parts", SHAPES)
def test_logits_and_weights_of_any_model(run_in_page, tiny, parts):
    torch.manual_seed(0)
    shape = {"seq_len": 24, "embed_dim": 32, "num_heads": 4, "num_layers": 3, "init_std": 0.2}
    model = Transformer(ModelConfig(vocab_size=1024, **(shape | parts))).eval()
    for parameter in model.parameters():  # no zero bias and no unit gain that could hide a fault
        parameter.data += 0.1 * torch.randn_like(parameter)
    evaluate = run_in_page(model, tiny.tokenizer)
    ids = torch.randint(1024, (24,)).tolist()
    with torch.no_grad():
        logits, weights = model.double()(torch.tensor([ids]), return_weights=True)
    # PyTorch computes the angles of rotary positions in float32
    atol = 1e-5 if "positions" in parts else 1e-10
    assert_close(logits_in_page(evaluate, ids), logits[0], rtol=0, atol=atol)
    found = evaluate(
        "(ids) => read(ids).at(-1).layers.map((l) => l.weights.map((w) => Array.from(w)))", ids
    )
    assert_close(torch.tensor(found, dtype=torch.float64), weights[:, 0, :, -1], rtol=0, atol=atol)


def test_weights_of_tiny_in_16_bits(run_in_page, tiny, rounded):
    "Logits of the shipped run: within 1e-4 given its own weights, and close to them in 16 bits."
    ids = encode_prompt(tiny.tokenizer, " = Greta Holt = \n Greta Holt ( 1839 – 1880 ) was")
    with torch.no_grad():
        logits = tiny.model(torch.tensor([ids]))[0].double()
    found = {
        dtype: logits_in_page(run_in_page(tiny.model, tiny.tokenizer, dtype), ids)
        for dtype in ("float32", "float16")
    }
    assert_close(found["float32"], logits, rtol=0, atol=1e-4)
    with torch.no_grad():
        assert_close(found["float16"], rounded(torch.tensor([ids]))[0].double(), rtol=0, atol=1e-4)
    assert (found["float16"] - logits).abs().max() < 0.05


WRITE = """([ids, count, settings]) => {
  const text = new engine.Text(model);
  for (const id of ids) text.push(id);
  for (let n = 0; n < count; n++) {
    const p = engine.nextDistribution(text.logits, text.ids, [], settings);
    text.push(engine.drawToken(p, 0.5));
  }
  return text.ids;
}"""


def test_greedy_text_is_that_of_generate(run_in_page, tiny):
    "Also beyond the context of 192 tokens, where the window jumps."
    evaluate = run_in_page(tiny.model, tiny.tokenizer)
    ids = encode_prompt(tiny.tokenizer, " = Greta Holt = \n")
    cfg = SampleConfig(temperature=0, max_new_tokens=300)
    expected = generate(tiny.model, torch.tensor([ids]), cfg)[0].tolist()
    settings = dict(temperature=0, top_k=0, top_p=1, min_p=0)
    settings |= dict(repetition_penalty=1, frequency_penalty=0, presence_penalty=0)
    assert evaluate(WRITE, [ids, 300, settings]) == expected


def test_distribution_is_that_of_chapter_06(run_in_page, tiny):
    evaluate = run_in_page(tiny.model, tiny.tokenizer)
    rng = random.Random(2)
    torch.manual_seed(2)
    for _ in range(30):
        settings = dict(
            temperature=rng.choice([0, 0.3, 1, 1.7]),
            top_k=rng.choice([0, 1, 5, 50]),
            top_p=rng.choice([1, 0.9, 0.3]),
            min_p=rng.choice([0, 0.05, 0.5]),
            repetition_penalty=rng.choice([1, 1.3]),
            frequency_penalty=rng.choice([0, 0.7]),
            presence_penalty=rng.choice([0, 1.1]),
        )
        logits = 3 * torch.randn(1, 100, dtype=torch.float64)
        ids = torch.randint(100, (1, 20))
        written = ids[0, 8:]
        counts = torch.bincount(written, minlength=100)[None]
        cfg = SampleConfig(**(settings | dict(top_k=settings["top_k"] or None)))
        expected = next_distribution(logits, ids, cfg, counts)[0]
        found = evaluate(
            "([z, ids, written, s]) => Array.from("
            "engine.nextDistribution(Float64Array.from(z), ids, written, s))",
            [logits[0].tolist(), ids[0].tolist(), written.tolist(), settings],
        )
        # PyTorch multiplies the counts by the penalties in float32
        assert_close(torch.tensor(found, dtype=torch.float64), expected, rtol=0, atol=1e-6)


def test_draws_follow_the_distribution(run_in_page, tiny):
    "Each token owns a share of the numbers from 0 to 1 that is as long as its probability."
    evaluate = run_in_page(tiny.model, tiny.tokenizer)
    p = [0, 0.25, 0, 0.5, 0.25, 0]
    draws = evaluate(
        "(p) => [0, 0.2, 0.2499, 0.25, 0.7, 0.75, 0.99999].map((u) => engine.drawToken(p, u))", p
    )
    assert draws == [1, 1, 1, 3, 3, 4, 4]
    numbers = evaluate(
        "() => { const next = engine.randomNumbers(7); return [...Array(20000)].map(next) }"
    )
    assert len(set(numbers)) > 19_990 and 0 <= min(numbers) and max(numbers) < 1
    shares = torch.histc(torch.tensor(numbers), bins=10, min=0, max=1) / len(numbers)
    assert (shares - 0.1).abs().max() < 5 * (0.1 * 0.9 / len(numbers)) ** 0.5


def test_heads_switched_off(run_in_page, tiny):
    evaluate = run_in_page(tiny.model, tiny.tokenizer)
    ids = encode_prompt(tiny.tokenizer, " = Greta Holt = \n Greta Holt")
    off = [(0, 1), (1, 3)]
    with torch.no_grad(), silenced(tiny.model, off):
        expected = tiny.model(torch.tensor([ids]))[0, -1].double()
    found = evaluate(
        "([ids, off]) => Array.from(read(ids, off).at(-1).logits)", [ids, ["0.1", "1.3"]]
    )
    assert_close(torch.tensor(found, dtype=torch.float64), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "change, message",
    [
        ("data.config.norm = 'batch'", "model.norm is batch: the page knows layer and rms"),
        ("data.shapes.more = [9]", "the weights end inside more"),
        ("delete data.shapes['norm.bias']", "256 bytes are left after the weights"),
        ("data.config.num_layers = 3", "the weights have no blocks.2.norm1.weight"),
    ],
)
def test_damaged_data_is_refused(blank, tiny, change, message):
    data = pack_model(tiny.model, tiny.tokenizer, "float32")
    code = base64.b64encode(ENGINE.encode()).decode()
    with pytest.raises(Error, match=message):
        blank.evaluate(LOAD.replace("const bytes", change + ";\n  const bytes"), [code, data])
        blank.evaluate("read([1])")


# --- the truth


def put_grammar(evaluate) -> None:
    code = base64.b64encode((STATIC / "grammar.js").read_bytes()).decode()
    evaluate(
        """async ([code, wiki]) => {
          const { TokenReader } = await import("data:text/javascript;base64," + code);
          window.reader = new TokenReader(tokenizer, wiki);
        }""",
        [code, WIKI],
    )


def test_the_truth_is_that_of_the_answer_key(run_in_page, tiny):
    evaluate = run_in_page(tiny.model, tiny.tokenizer)
    put_grammar(evaluate)
    for article in itertools.islice(articles(5), 3):
        expected = [
            answer.probabilities for answer in TokenReader(tiny.tokenizer).read(article.text)
        ]
        found = evaluate(
            "(text) => reader.read(text).map((truth) => Object.fromEntries(truth))", article.text
        )
        assert len(found) == len(expected) + 1  # and what follows the article
        for mine, theirs in zip(found, expected):
            assert {int(i): pytest.approx(p, abs=1e-12) for i, p in mine.items()} == theirs


def test_recalled_facts_are_those_of_the_answer_key(run_in_page, tiny):
    evaluate = run_in_page(tiny.model, tiny.tokenizer)
    put_grammar(evaluate)
    for article in itertools.islice(articles(11), 2):
        spans = token_spans(tiny.tokenizer, article.text)
        expected = recalled_tokens(tiny.tokenizer, article.text)
        found = evaluate(
            "([text, spans]) => spans.map(([from, to]) => reader.recall(text.slice(0, to), from))",
            [article.text, spans],
        )
        assert {i for i, fact in enumerate(found) if fact} == set(expected)
        token_at = {letter: i for i, span in enumerate(spans) for letter in range(*span)}
        for i, (name, sources) in expected.items():
            assert found[i]["name"] == name
            assert tuple(token_at[letter] for letter in found[i]["letters"]) == sources


def test_there_is_no_truth_about_other_texts(run_in_page, tiny):
    evaluate = run_in_page(tiny.model, tiny.tokenizer)
    put_grammar(evaluate)
    text = " = Clara Falk is a cat"
    known = evaluate("(text) => reader.read(text).map((truth) => truth !== null)", text)
    count = len(encode_prompt(tiny.tokenizer, " = Clara"))
    assert known[: count + 1] == [True] * (count + 1) and not known[-1]
    assert len(known) == len(encode_prompt(tiny.tokenizer, text)) + 1


# --- the page


@pytest.fixture(scope="module")
def saved(tiny, tmp_path_factory):
    file = tmp_path_factory.mktemp("page") / "tiny.html"
    model_page(tiny).save(file)
    return file


@pytest.fixture(scope="module")
def context(launch, tmp_path_factory):
    return launch(
        tmp_path_factory.mktemp("reader"), offline=True, viewport=dict(width=1200, height=900)
    )


@pytest.fixture
def open_page(context, saved):
    "Opens the page from the disk; afterwards nothing may have been asked for or gone wrong."
    pages, asked, wrong = [], [], []

    def start(path=saved, **media) -> Page:
        page = context.new_page()
        pages.append(page)
        own = ("file:", "data:", "blob:")
        page.on("request", lambda r: None if r.url.startswith(own) else asked.append(r.url))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda m: wrong.append(m.text) if m.type == "error" else None)
        page.emulate_media(**media)
        page.goto(path.as_uri())
        page.locator("html[data-ready], [role=alert]").first.wait_for()
        return page

    yield start
    for page in pages:
        page.close()
    assert (asked, wrong) == ([], [])


def tokens_of(page: Page) -> list[str]:
    return page.locator("#tokens span").all_text_contents()


def give_prompt(page: Page, text: str) -> None:
    "Type a prompt, and wait until the model has read it."
    page.locator("#prompt").fill(text)
    expect(page.locator("#tokens")).to_have_text(text)


def set_control(page: Page, name: str, value: float) -> None:
    page.locator(f"input[name={name}]").fill(str(value))


def test_the_file_is_small(saved):
    assert saved.stat().st_size < 1_000_000


def test_writes_greedily_what_generate_writes(open_page, tiny, rounded):
    page = open_page()
    prompt = page.locator("#prompt").input_value()
    set_control(page, "temperature", 0)
    page.get_by_role("button", name="Write").click()
    expect(page.locator("#said")).to_contain_text("200 tokens in", timeout=60_000)
    ids = encode_prompt(tiny.tokenizer, prompt)
    cfg = SampleConfig(temperature=0, max_new_tokens=200)
    expected = generate(rounded, torch.tensor([ids]), cfg)[0].tolist()
    assert "".join(tokens_of(page)) == tiny.tokenizer.decode(expected)
    loss = float(page.locator("#loss").inner_text().split()[4])
    assert 0 < loss < 1


def test_alternatives_bend_and_can_be_taken(open_page, tiny, rounded):
    page = open_page()
    give_prompt(page, " = Greta Holt = \n Greta Holt ( 18")
    rows = page.locator("#token tbody tr")
    expect(page.locator("#token caption")).to_contain_text("Next token")
    expect(rows).to_have_count(10)
    ids = encode_prompt(tiny.tokenizer, " = Greta Holt = \n Greta Holt ( 18")
    with torch.no_grad():
        p = rounded(torch.tensor([ids]))[0, -1].softmax(-1)
    set_control(page, "temperature", 1)
    best = p.topk(10)
    for row, value in zip(rows.all(), best.values.tolist()):
        own, bent = row.locator("td.number").all_inner_texts()
        assert own == bent and abs(float(own.strip("< %")) - 100 * value) < 0.11
    set_control(page, "top_k", 1)
    assert rows.first.locator("td.number").nth(1).inner_text() == "100.0 %"
    assert rows.nth(1).locator("td.number").nth(1).inner_text() == "0 %"
    second = tiny.tokenizer.decode([best.indices[1].item()])
    rows.nth(1).get_by_role("button").click()
    assert tokens_of(page)[-1] == second
    before = tokens_of(page)
    page.locator("#tokens span").nth(3).click()
    expect(page.locator("#token caption")).to_contain_text("In place of")
    rows.first.get_by_role("button").click()
    assert tokens_of(page)[:3] == before[:3] and len(tokens_of(page)) == 4


def test_keys_go_from_token_to_token(open_page):
    page = open_page()
    box = page.locator("#tokens")
    box.focus()
    page.keyboard.press("Home")
    expect(page.locator("#token")).to_contain_text("nothing came before it")
    page.keyboard.press("ArrowRight")
    expect(page.locator("#token caption")).to_contain_text("In place of")
    assert box.get_attribute("aria-activedescendant") == "token-1"
    page.keyboard.press("Escape")
    expect(page.locator("#token caption")).to_contain_text("Next token")


def test_a_head_switched_off_changes_the_loss(open_page, tiny, rounded):
    page = open_page()
    prompt = (
        " = Greta Holt = \n Greta Holt ( 1839 – 1880 ) was a Danish painter of Dunham . Miss Holt"
    )
    give_prompt(page, prompt)
    ids = torch.tensor([encode_prompt(tiny.tokenizer, prompt)])

    def loss() -> float:
        with torch.no_grad():
            return torch.nn.functional.cross_entropy(rounded(ids)[0, :-1], ids[0, 1:]).item()

    whole = loss()
    with silenced(rounded, [(1, 2)]):
        without = loss()
    page.get_by_role("button", name="switch off head 2 of layer 1").click()
    expect(page.locator("#loss")).to_contain_text("without 1.2")
    found = page.locator("#loss").inner_text().replace(";", "").split()
    shown = [float(word) for word in (found[6], found[-1].rstrip("."))]
    assert abs(shown[0] - without) < 0.002 and abs(shown[1] - whole) < 0.002


def test_the_map_shows_the_weights(open_page, tiny, rounded):
    page = open_page()
    prompt = " = Greta Holt = \n Greta Holt ( 1839"
    give_prompt(page, prompt)
    ids = encode_prompt(tiny.tokenizer, prompt)
    host = page.locator("#map .attention-map[data-ready]")
    host.wait_for()
    page.wait_for_timeout(400)  # the map is drawn once typing has ended
    with torch.no_grad():
        weights = rounded(torch.tensor([ids]), return_weights=True)[1][:, 0]
    found = host.evaluate(
        "(host, T) => [0, 1].map((l) => host.attentionMap.weight(l, 2, T - 1, 3))", len(ids)
    )
    assert_close(torch.tensor(found), weights[:, 2, -1, 3].float(), rtol=0.003, atol=1e-4)
    page.locator("#tokens span").nth(5).click()
    assert host.evaluate("(host) => host.attentionMap.state.token") == 5


@pytest.mark.parametrize(
    "prompt, said",
    [
        ("", "The prompt is empty"),
        pytest.param("the" * 33_000, "it reads the last 192", marks=pytest.mark.slow),
        ("x" * 100_000, "the model sees at most 192: it reads the last 192"),
        pytest.param(" = \U0001f600 = \n", None, marks=pytest.mark.slow),
        ("\u0634\u0645\u0633 \u05e9\u05de\u05e9", None),
        ("</script><b>bold</b><!--", None),
    ],
)
def test_prompts_that_nobody_expected(open_page, prompt, said):
    page = open_page()
    page.locator("#prompt").fill(prompt)
    if said:
        expect(page.locator("#said")).to_contain_text(said, timeout=30_000)
    else:
        expect(page.locator("#tokens")).to_have_text(prompt)
        expect(page.locator("#token caption")).to_contain_text("Next token")
        page.get_by_role("button", name="One token").click()
        expect(page.locator("#said")).to_have_text("")
    assert page.locator("#tokens b").count() == 0
    give_prompt(page, " = The")  # and the page goes on
    page.get_by_role("button", name="One token").click()
    assert "".join(tokens_of(page)).startswith(" = The")


def test_half_of_a_character(open_page):
    page = open_page()
    page.evaluate(
        """() => {
          const prompt = document.getElementById("prompt");
          prompt.value = " = a\ud83d";
          prompt.dispatchEvent(new Event("input"));
        }"""
    )
    expect(page.locator("#said")).to_contain_text("half of a character")


def test_a_file_that_was_cut(open_page, tiny, tmp_path):
    data = model_page(tiny).html
    cut = tmp_path / "cut.html"
    start = data.index('"weights": "') + 2000
    cut.write_text(data[:start] + data[start + 4000 :], encoding="utf-8")
    page = open_page(cut)
    expect(page.get_by_role("alert")).to_contain_text("The model cannot be read")
    expect(page.locator("#app")).to_be_hidden()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_serious_in_an_audit(open_page, scheme):
    page = open_page(color_scheme=scheme)
    page.locator("#tokens span").nth(2).click()
    found = Axe().run(page).response["violations"]
    serious = [v for v in found if v["impact"] in ("serious", "critical")]
    assert [(v["id"], node["html"]) for v in serious for node in v["nodes"]] == []


def test_without_scripts(launch, saved, tmp_path):
    page = launch(tmp_path, java_script_enabled=False).new_page()
    page.goto(saved.as_uri())
    assert "needs JavaScript, which is switched off" in page.inner_text("noscript")
    assert "Bergdahl" in page.inner_text("noscript pre")


def test_fits_a_phone(open_page):
    page = open_page()
    page.set_viewport_size(dict(width=390, height=800))
    assert page.evaluate("() => document.documentElement.scrollWidth") <= 390


def test_the_command_writes_the_page(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main(["page", "tiny", "tiny.html", "--prompt", " = Holt"])
    assert "tiny.html holds the model, 0.6" in capsys.readouterr().out
    assert '"prompt": " = Holt"' in (tmp_path / "tiny.html").read_text(encoding="utf-8")
    with pytest.raises(SystemExit, match="tiny.html is there already: give the name of a new"):
        main(["page", "tiny", "tiny.html"])


def test_the_truth_stands_beside_the_model(open_page, tiny):
    page = open_page()
    text = next(articles(7)).text
    start = text[: text.index(" was a")] + " was"
    give_prompt(page, start)
    expect(page.locator("#token th").last).to_have_text("truth")
    *_, answer = TokenReader(tiny.tokenizer).read(start + " a")
    shown = {
        row.locator("button").inner_text().replace("␣", " "): row.locator(".truth").inner_text()
        for row in page.locator("#token tbody tr").all()
    }
    for token, p in answer.probabilities.items():
        found = shown[tiny.tokenizer.decode([token])]
        assert float(found.strip("< %")) == pytest.approx(100 * p, abs=0.06)
    assert "2 tokens are possible here" in page.locator("#token p").inner_text()
    first = next(articles(8)).text
    give_prompt(page, first + start)  # an article before it changes nothing
    expect(page.locator("#token p")).to_contain_text("2 tokens are possible here")
    page.locator("#tokens span").nth(20).click()  # and the truth about that one is known, too
    expect(page.locator("#token th").last).to_have_text("truth")
    give_prompt(page, "a text of a different kind")
    expect(page.locator("#token th").last).to_have_text("your settings")


# --- the walk

STEPS = """() => {
  const plain = (x) => (ArrayBuffer.isView(x) ? Array.from(x) : x);
  const steps = document.getElementById("walk").walk.steps;
  return Object.fromEntries(steps.map(({ id, numbers }) => [
    id, Object.fromEntries(Object.entries(numbers).map(([name, x]) => [name, plain(x)])),
  ]));
}"""


@torch.no_grad()
def numbers_of_walk(
    model: Transformer, ids: list[int], t: int, layer: int, head: int
) -> dict[str, dict[str, torch.Tensor]]:  # step -> name -> values
    "What the walk shows for one token, layer and head, by PyTorch's own modules."
    seen: dict[str, torch.Tensor] = {}
    hooks = [
        module.register_forward_hook(
            lambda _, given, out, name=name: seen.update(
                {name: out[0] if isinstance(out, tuple) else out, f"{name} in": given[0]}
            )
        )
        for name, module in model.named_modules()
    ]
    logits, weights = model(torch.tensor([ids]), return_weights=True)
    for hook in hooks:
        hook.remove()
    block = f"blocks.{layer}"
    rotary = model.cfg.positions == "rotary"
    D = model.cfg.head_dim
    own = slice(head * D, (head + 1) * D)
    q, k, v = (part[:, own] for part in seen[f"{block}.attention.qkv"][0].chunk(3, dim=-1))
    if rotary:
        q, k = (variants.rotate(x[None, None], torch.arange(len(ids)))[0, 0] for x in (q, k))
    scores = q[t] @ k[: t + 1].T
    x = seen[f"{block}.norm1 in"][0, t]
    attended = seen[f"{block}.attention.proj"][0, t]
    fed, middle = seen[f"{block}.ffn"][0, t], seen[f"{block}.norm2 in"][0, t]
    inner = seen[f"{block}.ffn.{'down' if model.cfg.activation == 'swiglu' else '2'} in"][0, t]
    token = model.embeddings.token.weight[ids[t]]
    hidden = torch.full((len(ids) - t - 1,), -torch.inf)
    heads = seen[f"{block}.attention.proj in"][0, t]
    return {
        "embedding": {"token": token},
        "position": {
            "token": token,
            "position": None if rotary else model.embeddings.position.weight[t],
            "x": seen["blocks.0.norm1 in"][0, t],
        },
        "norm": {"x": x, "normed": seen[f"{block}.norm1"][0, t]},
        "qkv": {"q": q[t], "k": k[t], "v": v[t]},
        "score": {"q": q[t], "scores": scores},
        "scale": {"scores": scores, "scaled": scores / D**0.5},
        "mask": {"masked": torch.cat([scores / D**0.5, hidden])},
        "softmax": {"weights": weights[layer, 0, head, t, : t + 1]},
        "values": {
            "weights": weights[layer, 0, head, t, : t + 1],
            "values": v[: t + 1],
            "output": heads[own],
        },
        "join": {"heads": heads, "attended": attended},
        "residual": {"x": x, "attended": attended, "middle": middle},
        "feed-forward": {
            "normed": seen[f"{block}.norm2"][0, t],
            "inner": inner,
            "active": (inner > 0).sum(),
            "fed": fed,
            "x": middle + fed,
        },
        "layers": {
            "layers": torch.stack(
                [
                    seen[f"blocks.{n}.norm2 in"][0, t] + seen[f"blocks.{n}.ffn"][0, t]
                    for n in range(model.cfg.num_layers)
                ]
            )
        },
        "final-norm": {"x": seen["norm in"][0, t], "normed": seen["norm"][0, t]},
        "logits": {"logits": logits[0, t]},
    }


def assert_same_numbers(found: dict, expected: dict) -> None:
    for step, parts in expected.items():
        assert set(found[step]) == set(parts)
        for name, values in parts.items():
            if values is None:
                assert found[step][name] is None
                continue
            value = torch.tensor(found[step][name], dtype=torch.float64)
            assert_close(value, values.double(), rtol=1e-5, atol=1e-4, msg=f"{step}: {name}")


def open_walk(page: Page, prompt: str, t: int, layer: int, head: int) -> Page:
    give_prompt(page, prompt)
    page.locator("#walk-details > summary").click()
    page.locator("#walk-details[data-ready]").wait_for()
    page.wait_for_timeout(400)  # the walk hears of a text once typing has ended
    for name, value in (("token", t), ("layer", layer), ("head", head)):
        page.locator("#walk").get_by_label(name, exact=True).select_option(str(value))
    return page


def test_the_walk_shows_the_numbers_of_pytorch(open_page, tiny, rounded):
    rng = random.Random(3)
    ids = [rng.randrange(32, 120) for _ in range(9)]
    prompt = " Holt " + "".join(tiny.tokenizer.decode([i]) for i in ids if i < 95) + " was a"
    ids = encode_prompt(tiny.tokenizer, prompt)
    t, layer, head = len(ids) - 2, 1, 2
    page = open_walk(open_page(), prompt, t, layer, head)
    found = page.evaluate(STEPS)
    assert len(found) == page.evaluate("document.getElementById('walk').walk.steps.length") == 18
    assert found["id"] == {"id": ids[t], "position": t}
    assert_same_numbers(found, numbers_of_walk(rounded, ids, t, layer, head))
    numbers = {
        step: {name: torch.tensor(x, dtype=torch.float64) for name, x in parts.items()}
        for step, parts in found.items()
    }
    place, middle, p = numbers["position"], numbers["residual"], numbers["probabilities"]
    assert_close(place["token"] + place["position"], place["x"])
    assert_close(middle["x"] + middle["attended"], middle["middle"])
    assert_close(numbers["softmax"]["weights"].sum().item(), 1.0)
    weighted = numbers["values"]["weights"] @ numbers["values"]["values"]
    assert_close(weighted, numbers["values"]["output"])
    assert_close(numbers["logits"]["logits"].softmax(-1), p["own"])
    assert_close((numbers["logits"]["logits"] / 0.8).softmax(-1), p["bent"])
    assert found["draw"]["next"] == ids[t + 1]


def test_the_walk_goes_by_keys_links_and_buttons(open_page, saved):
    page = open_page()
    page.evaluate("location.hash = 'step=softmax'")
    heading = page.locator("#walk h3")
    expect(heading).to_have_text("9 of 18: Scores become weights")
    page.get_by_role("button", name="Next").click()
    expect(heading).to_contain_text("10 of 18")
    assert page.evaluate("location.hash") == "#step=values"
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    expect(heading).to_contain_text("8 of 18")
    page.get_by_role("button", name="switch off head 0 of layer 0").click()
    page.evaluate("location.hash = 'step=values'")
    expect(page.locator("#walk [aria-live]")).to_contain_text("is switched off")
    page.get_by_role("button", name="Play").click()
    page.get_by_role("button", name="Pause").click()
    give_prompt(page, "")
    expect(page.locator("#walk [aria-live]")).to_contain_text("no token to follow")
    give_prompt(page, "a")
    expect(page.locator("#walk [aria-live]")).to_contain_text("Head 0 of layer 0")
    page.set_viewport_size(dict(width=390, height=800))
    widths = page.evaluate(
        """() => {
          const { walk } = document.getElementById("walk");
          return walk.steps.map(({ id }) => {
            walk.go(id);
            return document.documentElement.scrollWidth;
          });
        }"""
    )
    assert len(widths) == 18 and max(widths) <= 390
    page.locator("#prompt").fill(" Holt" * 193)
    expect(page.locator("#said")).to_contain_text("it reads the last 192")
    page.get_by_role("button", name="One token").click()  # the window jumps
    page.evaluate("location.hash = 'step=id'")
    expect(page.locator("#walk [aria-live]")).to_contain_text("the window has jumped past the")
    found = Axe().run(page, context="#walk").response["violations"]
    assert [v["id"] for v in found if v["impact"] in ("serious", "critical")] == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "parts",
    [{"activation": "gelu"}, {"norm": "rms", "positions": "rotary", "activation": "swiglu"}],
)
def test_the_walk_knows_every_kind_of_part(open_page, tiny, tmp_path, parts):
    "Each step has its sentences, and the numbers of PyTorch."
    torch.manual_seed(0)
    shape = {"seq_len": 24, "embed_dim": 16, "num_heads": 2, "num_layers": 2, "init_std": 0.2}
    run = copy.copy(tiny)
    run.model = Transformer(ModelConfig(vocab_size=1024, **(shape | parts))).eval()
    for parameter in run.model.parameters():  # rounded to what a page carries
        parameter.data = (parameter + 0.1 * torch.randn_like(parameter)).half().float()
    model_page(run).save(tmp_path / "other.html")
    prompt = " = Greta Holt = \n Greta Holt was"
    ids = encode_prompt(tiny.tokenizer, prompt)
    page = open_walk(open_page(tmp_path / "other.html"), prompt, t=len(ids) - 3, layer=1, head=1)
    assert_same_numbers(
        page.evaluate(STEPS), numbers_of_walk(run.model, ids, t=len(ids) - 3, layer=1, head=1)
    )
    drawn = page.locator("#walk svg [data-part=position]").text_content()
    assert drawn == ("rotary position" if "positions" in parts else "position table")
    said = page.evaluate(
        """() => {
          const { walk } = document.getElementById("walk");
          return walk.steps.map(({ id }) => {
            walk.go(id);
            return walk.said.textContent;
          });
        }"""
    )
    assert len(said) == 18 and not any("NaN" in text or "undefined" in text for text in said)
    assert ("rotary positions" in said[2]) == ("positions" in parts)
    assert {"gelu": "GELU", "swiglu": "SwiGLU"}[parts["activation"]] in said[12]


def test_the_walk_plays_to_its_end(open_page):
    "More slowly for somebody who wants less motion; and the cells of a vector answer to keys."
    page = open_page(reduced_motion="reduce")
    page.clock.install()
    page.evaluate("location.hash = 'step=draw'")
    heading = page.locator("#walk h3")
    expect(heading).to_contain_text("18 of 18")
    page.get_by_role("button", name="Play").click()
    expect(heading).to_contain_text("1 of 18")
    page.clock.run_for(5000)
    expect(heading).to_contain_text("1 of 18")
    page.clock.run_for(2000)
    expect(heading).to_contain_text("2 of 18")
    cells = page.locator("#walk .cells").first
    cells.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    expect(page.locator("#walk .label").first).to_contain_text("[1]")
    expect(heading).to_contain_text("2 of 18")
    page.clock.run_for(17 * 6750)
    expect(heading).to_contain_text("18 of 18")
    expect(page.get_by_role("button", name="Play")).to_be_visible()
    page.emulate_media(reduced_motion="no-preference")
    page.get_by_role("button", name="Play").click()
    page.clock.run_for(5000)
    expect(heading).to_contain_text("2 of 18")


def test_the_walk_leads_to_headings_that_are_there():
    content = (STATIC / "walk_steps.js").read_text(encoding="utf-8")
    links = re.findall(r'chapter: \["(\w+)", "([^"]+)"\]', content)
    assert len(links) == 18
    for chapter, heading in links:
        notebook = json.loads((ROOT / "nbs" / f"{chapter}.ipynb").read_text(encoding="utf-8"))
        text = "\n".join("".join(cell["source"]) for cell in notebook["cells"])
        assert re.search(f"^##+ {re.escape(heading)}$", text, flags=re.MULTILINE), heading


def test_a_recalled_fact_is_marked_and_shading_follows_the_truth(open_page, tiny):
    page = open_page()
    text = next(articles(7)).text
    recalled = recalled_tokens(tiny.tokenizer, text)
    i = next(i for i in recalled if i > 20)
    name, sources = recalled[i]
    give_prompt(page, text[: token_spans(tiny.tokenizer, text)[i][1]])
    page.locator("#tokens span").nth(i).click()
    expect(page.locator("#token")).to_contain_text(f"Here the fact “{name}” is recalled")
    marked = page.locator("#tokens .source").evaluate_all("nodes => nodes.map(({ id }) => id)")
    assert marked == [f"token-{at}" for at in sorted(set(sources))]
    expect(page.locator("#map [role=status]").first).to_contain_text(f"(token {sources[0]})")
    backgrounds = "() => [...document.querySelectorAll('#tokens span')].map((n) => n.rare)"
    plain = page.evaluate(backgrounds)
    page.get_by_label("its surprise above the truth").check()
    above = page.evaluate(backgrounds)
    assert all(0 <= b <= a + 1e-9 for a, b in zip(plain, above)) and sum(above) < sum(plain)


def test_a_file_cut_short_says_so(open_page, saved, tmp_path):
    "As a download that was broken off: what is there of the page says that the rest is missing."
    content = saved.read_text(encoding="utf-8")
    cut = tmp_path / "short.html"
    cut.write_text(content[: content.index('"weights": "') + 3000], encoding="utf-8")
    page = open_page(cut)
    expect(page.get_by_role("alert")).to_contain_text("This file was cut short")


def test_a_diverged_run_is_refused(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny.folder, tmp_path / "diverged")
    for file in (tmp_path / "diverged").rglob("*.safetensors"):
        tensors = load_file(file)
        tensors["norm.weight"][3] = torch.nan
        save_file(tensors, file)
    said = refusal("page", "diverged", "page.html")
    assert "norm.weight" in said or "diverged" in said
    assert not (tmp_path / "page.html").exists()
