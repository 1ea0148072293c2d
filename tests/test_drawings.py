"""The schematic drawings, measured in a browser: every text is in its box and on the sheet, no two
texts overlap, arrows end at boxes, and shapes, numbers and counts are those of real tensors."""

import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator

import pytest
import torch
from conftest import ROOT

from tinytransformer import drawings
from tinytransformer.attention import attention_weights
from tinytransformer.generate import KVCache
from tinytransformer.model import ModelConfig, Transformer, count_parameters, parameter_formula

WORDS = ["the", "fox", "ran", "and", "it", "hid"]
Q = [[0, 1], [2, 0], [2, 0], [0, 1], [1, 0], [2, 0]]
K = [[0, 0], [2, 0], [0, 2], [0, 0], [1, 0], [0, 2]]
V = [[0, 0], [10, 0], [0, 6], [0, 0], [5, 0], [0, 6]]
SMALL = ModelConfig(vocab_size=50, seq_len=16, embed_dim=24, num_heads=3, num_layers=2)
GPT2 = ModelConfig(50257, 1024, 768, 12, 12, activation="gelu", tie_weights=True)
ENCYCLOPAEDIC = [" encyclopaedia", " of", "\n", " the", " Wow", "MMMMMMMM", "<eos>"]
DRAWINGS = {
    "data": lambda: drawings.draw_data(),
    "data of long tokens": lambda: drawings.draw_data(ENCYCLOPAEDIC, range(4000, 4007), 2),
    "embeddings": lambda: drawings.draw_embeddings(),
    "embeddings of long tokens": lambda: drawings.draw_embeddings(
        ENCYCLOPAEDIC[:4], range(4000, 4004)
    ),
    "head": lambda: drawings.draw_head(),
    "head with numbers": lambda: drawings.draw_head(WORDS, Q, K, V, "hid"),
    "head at its beginning": lambda: drawings.draw_head(WORDS, Q, K, V, 1, scaled=False),
    "two heads": lambda: drawings.draw_heads(),
    "four heads": lambda: drawings.draw_heads(4),
    "block": lambda: drawings.draw_block(),
    "model": lambda: drawings.draw_model(),
    "small model": lambda: drawings.draw_model(SMALL),
    "large model": lambda: drawings.draw_model(GPT2),
    "step": lambda: drawings.draw_step(),
    "cache": lambda: drawings.draw_cache(),
    "cache of one prompt token": lambda: drawings.draw_cache(["the"], ["fox", "ran", "and", "it"]),
}
LOOSE = {  # arrows that end at a text, or leave the drawing
    "data": 2,
    "embeddings": 2,
    "head with numbers": 2,
    "head at its beginning": 2,
    "two heads": 1,
    "four heads": 1,
}
MEASURE = """svg => {
    const at = r => [r.left, r.top, r.right, r.bottom];
    const sheet = svg.getBoundingClientRect();
    const texts = [...svg.querySelectorAll('text')].map(text => {
        const box = text.closest('[data-box]');
        const frame = box && box.querySelector('rect').getBoundingClientRect();
        const style = getComputedStyle(text);
        return {words: text.textContent, place: at(text.getBoundingClientRect()),
                box: frame && at(frame), fill: style.fill, color: style.color,
                size: parseFloat(style.fontSize) * sheet.width / svg.viewBox.baseVal.width};
    });
    const tips = [...svg.querySelectorAll('.head')].map(head => {
        const p = head.getPointAtLength(0);
        const q = p.matrixTransform(svg.getScreenCTM());
        return [q.x, q.y];
    });
    const boxes = [...svg.querySelectorAll('rect, circle')].map(b => at(b.getBoundingClientRect()));
    const still = getComputedStyle(svg.nextElementSibling).display;
    return {sheet: at(sheet), texts, tips, boxes, still};
}"""


@pytest.fixture(scope="module")
def measured(launch, tmp_path_factory) -> Iterator[dict]:
    "What a browser makes of all drawings on one page of a phone, in the dark."
    context = launch(
        tmp_path_factory.mktemp("browser"), offline=True, viewport=dict(width=390, height=800)
    )
    page, asked = context.new_page(), []
    page.on("request", lambda r: asked.append(r.url) if not r.url.startswith("data:") else None)
    body = "".join(make()._repr_html_() for make in DRAWINGS.values())
    page.set_content(
        '<!doctype html><meta name="viewport" content="width=device-width"><body style="margin:0'
        f' 15px;background:#222;color:#eee">{body}</body>'
    )
    svgs = page.locator("svg").all()
    assert len(svgs) == len(DRAWINGS) and not asked
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    return {name: svg.evaluate(MEASURE) for name, svg in zip(DRAWINGS, svgs)}


def inside(place: list[float], box: list[float]) -> bool:
    return (
        place[0] >= box[0] - 0.5
        and place[1] >= box[1] - 0.5
        and place[2] <= box[2] + 0.5
        and place[3] <= box[3] + 0.5
    )


def overlap(a: list[float], b: list[float]) -> bool:
    "More than a pixel across, and more than the empty rim that a line of text has above and below."
    across = min(a[2], b[2]) - max(a[0], b[0])
    down = min(a[3], b[3]) - max(a[1], b[1])
    return across > 1 and down > 3


def on_border(tip: list[float], box: list[float]) -> bool:
    x, y = tip
    near = min(abs(x - box[0]), abs(x - box[2])), min(abs(y - box[1]), abs(y - box[3]))
    within = box[0] - 1 <= x <= box[2] + 1 and box[1] - 1 <= y <= box[3] + 1
    return within and min(near) < 1.2


@pytest.mark.parametrize("name", DRAWINGS)
def test_texts_and_arrows(measured, name):
    seen = measured[name]
    assert [t["words"] for t in seen["texts"] if not inside(t["place"], seen["sheet"])] == []
    assert [
        t["words"] for t in seen["texts"] if t["box"] and not inside(t["place"], t["box"])
    ] == []
    assert [
        (a["words"], b["words"])
        for i, a in enumerate(seen["texts"])
        for b in seen["texts"][:i]
        if overlap(a["place"], b["place"])
    ] == []
    assert min(t["size"] for t in seen["texts"]) >= 10
    assert all(t["fill"] == t["color"] == "rgb(238, 238, 238)" for t in seen["texts"])
    assert seen["still"] == "none"
    loose = [tip for tip in seen["tips"] if not any(on_border(tip, b) for b in seen["boxes"])]
    assert len(loose) <= LOOSE.get(name.removesuffix(" of long tokens"), 0), loose


@pytest.mark.parametrize("name", DRAWINGS)
def test_it_is_a_picture_by_itself(name):
    "Well-formed, with words for those who do not see it, and nothing that is asked of anyone."
    drawing = DRAWINGS[name]()
    svg = drawing.svg()
    root = ElementTree.fromstring(svg)
    tag = "{http://www.w3.org/2000/svg}"
    assert root.get("role") == "img" and [child.tag for child in root][:2] == [
        f"{tag}title",
        f"{tag}desc",
    ]
    assert root[0].text == drawing.title and len(root[1].text) > 60
    assert repr(drawing) == f"Drawing: {drawing.title}"
    assert not re.search(r"<script|href|url\(|\bid=|@import", svg)
    assert re.findall(r"https?://[^\"' ]+", svg) == ["http://www.w3.org/2000/svg"]
    assert not re.search(
        r"nan|inf(?!o)", re.sub(r"<!\[CDATA.*?]]>|<style>.*?</style>", "", svg, flags=re.S)
    )


def luminance(colour: str) -> float:
    "As WCAG defines it."
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return sum(a * b for a, b in zip((0.2126, 0.7152, 0.0722), linear))


@pytest.mark.parametrize("role", drawings.COLOURS)
def test_colours_are_seen_in_light_and_dark(role):
    colour = luminance(drawings.COLOURS[role])
    assert 1.05 / (colour + 0.05) >= 3
    assert (colour + 0.05) / (luminance("#222222") + 0.05) >= 3


def real_shapes(H: int) -> tuple[dict[str, int], dict[str, tuple[int, ...]]]:
    "The sizes behind the letters, and the shapes that a small model really has."
    torch.manual_seed(0)
    cfg = ModelConfig(vocab_size=50, seq_len=7, embed_dim=12, num_heads=H, num_layers=1)
    model, seen = Transformer(cfg).eval(), {}

    def watch(name, module):
        module.register_forward_hook(lambda m, args, out: seen.update({name: tuple(out.shape)}))

    block = model.blocks[0]
    for name, module in {
        "embeddings": model.embeddings,
        "qkv": block.attention.qkv,
        "out": block.attention.proj,
        "hidden": block.ffn[0],
        "block": block,
    }.items():
        watch(name, module)
    x = torch.randint(50, (5, 7))
    seen["ids"], seen["logits"] = tuple(x.shape), tuple(model(x).shape)
    h = model.embeddings(x)
    q, k, v = block.attention.queries_keys_values(block.norm1(h))
    seen["heads"], seen["head"] = tuple(q.shape), tuple((attention_weights(q, k) @ v)[:, 0].shape)
    seen["token table"] = tuple(model.embeddings.token.weight.shape)
    seen["position table"] = tuple(model.embeddings.position.weight.shape)
    seen["head weight"] = tuple(model.head.weight.T.shape)
    seen["weights"] = tuple(attention_weights(q, k)[0, 0].shape)
    seen["q"] = tuple(q[0, 0].shape)
    return dict(B=5, T=7, C=12, H=H, D=12 // H, V=50, N=99), seen


def as_numbers(shape: tuple[str | int, ...], sizes: dict[str, int]) -> tuple[int, ...]:
    "(B, T, 3C) with numbers in place of the letters."

    def value(size):
        if isinstance(size, int):
            return size
        return int(size[:-1] or 1) * sizes[size[-1]]

    return tuple(map(value, shape))


def test_shapes_are_those_of_tensors():
    sizes, real = real_shapes(H=2)
    expected = {
        "embeddings": {
            "ids": "ids",
            "token table": "token table",
            "position table": "position table",
            "x": "embeddings",
        },
        "head": {"q": "q", "k": "q", "v": "q", "scores": "weights", "weights": "weights"},
        "two heads": {
            "x": "embeddings",
            "qkv": "qkv",
            "heads": "heads",
            "head": "head",
            "joined": "embeddings",
            "out": "out",
        },
        "block": {"x": "embeddings", "hidden": "hidden", "out": "block"},
        "model": {
            "ids": "ids",
            "token table": "token table",
            "position table": "position table",
            "head": "head weight",
            "logits": "logits",
        },
        "step": {"x": "ids", "y": "ids", "logits": "logits"},
    }
    for name, tensors in expected.items():
        shapes = DRAWINGS[name]().shapes
        for drawn, tensor in tensors.items():
            assert as_numbers(shapes[drawn], sizes) == real[tensor], (name, drawn)


def test_shapes_of_the_cache_are_those_of_a_cache():
    "Prefill of three tokens, then two steps: what the queries and the kept keys look like."
    cfg = ModelConfig(vocab_size=50, seq_len=7, embed_dim=12, num_heads=2, num_layers=1)
    model, seen = Transformer(cfg).eval(), []
    attention = model.blocks[0].attention
    plain = attention.attend

    def attend(q, k, *rest):
        seen.append((tuple(q.shape), tuple(k.shape)))
        return plain(q, k, *rest)

    attention.attend = attend
    cache = KVCache(model, 1, 7)
    with torch.no_grad():
        for tokens in ([[1, 2, 3]], [[4]], [[5]]):
            model(torch.tensor(tokens), cache)
    sizes = dict(B=1, H=2, D=6)
    shapes = drawings.draw_cache().shapes
    for (q, k), name in zip(seen, ("prefill", "step 1", "step 2"), strict=True):
        assert as_numbers(shapes[f"{name} q"], sizes) == q, name
        assert as_numbers(shapes[f"{name} k"], sizes) == k, name


@pytest.mark.parametrize("cfg", [SMALL, GPT2, ModelConfig(vocab_size=512)])
def test_counts_are_those_of_the_model(cfg):
    with torch.device("meta"):
        count = count_parameters(Transformer(cfg))
    drawing = drawings.draw_model(cfg)
    counts, formula = drawing.counts, parameter_formula(cfg)
    assert sum(counts.values()) == count and f"[{count:,}]" in drawing.svg()
    norms = counts["first norms"] + counts["second norms"] + counts["last norm"]
    assert norms == formula["layer norms"]
    for part in ("token embedding", "position embedding", "attention", "feed-forward", "head"):
        assert counts[part] == formula[part]


def test_letters_and_numbers_agree():
    "The formulas of the drawing, calculated."
    sizes = dict(V=50, T=16, C=24, N=2)
    for part, text in drawings.formulas().items():
        python = re.sub(r"(\d)([A-Z])", r"\1*\2", text.replace("²", "**2").replace("·", "*"))
        assert eval(python, sizes.copy()) == drawings.count_parts(SMALL)[part], part


def test_variants_are_refused():
    from types import SimpleNamespace

    cfg = SimpleNamespace(**vars(SMALL) | dict(norm="rms"))
    with pytest.raises(ValueError, match="norm is 'rms', but only layer can be drawn"):
        drawings.draw_model(cfg)


@pytest.mark.parametrize("query", [0, 3, 5])
def test_numbers_are_those_of_attention(query):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 6, 2)
    drawing = drawings.draw_head(WORDS, q, k, v, query)
    weights = attention_weights(q, k)[query]
    words = [text.text for text in ElementTree.fromstring(drawing.svg()).iter() if text.text]
    for number in (*weights[: query + 1].tolist(), *(weights @ v).tolist()):
        assert any(abs(float(w.replace("−", "-")) - number) < 0.006 for w in words if is_number(w))
    assert words.count("−∞") == 5 - query
    assert f"{weights.max():.2f}" in drawing.alt
    score = (q[query] @ k[0]).item()
    plain = drawings.draw_head(WORDS, q, k, v, query, scaled=False).svg()
    assert drawings.show_number(score) in plain and "q·k/√D" not in plain


def is_number(words: str) -> bool:
    return re.fullmatch(r"−?\d+(\.\d+)?", words) is not None


def test_the_checks_can_fail():
    assert not inside([0, 0, 10, 10], [0, 0, 9, 10]) and inside([1, 1, 2, 2], [0, 0, 9, 9])
    assert overlap([0, 0, 10, 10], [8, 5, 20, 15]) and not overlap([0, 0, 10, 10], [0, 9, 10, 20])
    assert on_border([5, 0], [0, 0, 10, 10]) and not on_border([5, 5], [0, 0, 10, 10])
    d = drawings.Drawing("too wide", "a box that is too small for its text")
    with pytest.raises(ValueError, match="give it more room, or shorten it"):
        d.box(0, 0, 30, 30, "encyclopaedia")


def test_it_needs_nothing_heavy():
    code = (
        "import sys, tinytransformer.drawings; tinytransformer.drawings.draw_block();"
        " sys.exit(bool({'torch', 'numpy', 'matplotlib'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
