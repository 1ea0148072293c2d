"""How large the map is, how soon it can be used, and how fast it answers, in a real browser;
bertviz and CircuitsVis on the same weights, if they are installed.

python benchmarks/attention_map.py [--libraries FOLDER]   # with require.min.js, d3.min.js and
jquery.min.js, which bertviz asks a CDN for
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import tempfile
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch
from playwright.sync_api import sync_playwright

from tinytransformer.attention_map import attention_map, decode, encode
from tinytransformer.corpus import prepare
from tinytransformer.data import Blocks, DataConfig
from tinytransformer.explorer import look
from tinytransformer.loop import fit
from tinytransformer.model import ModelConfig, Transformer
from tinytransformer.train import TrainConfig

HERE = Path(__file__).parent
SWITCHES = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    " --disable-component-update --disable-sync".split()
)
QUIET = """() => {
  let last = 0;
  const options = { subtree: true, childList: true, attributes: true };
  new MutationObserver(() => { last = performance.now() }).observe(document, options);
  window.lastChange = () => last;
}"""
REDRAW = """() => {
  const map = document.querySelector(".attention-map").attentionMap;
  const { layers, heads, tokens } = map.size, times = [];
  for (let i = 0; i < 60; i++) {
    const began = performance.now(), q = (i * 37) % tokens;
    const layer = (i * 5) % layers, head = (i * 7) % heads;
    map.choose({ layer, head, token: q, key: (i * 11) % (q + 1) });
    document.body.offsetHeight;
    times.push(performance.now() - began);
  }
  return times;
}"""


def weights_of(kind: str, layers: int, heads: int, T: int, corpus) -> np.ndarray:
    """Attention weights (layers, heads, T, T): of a model before training, of one after 200 steps,
    or of independent random scores, which nothing can compress.
    """
    if kind == "random":
        scores = np.random.default_rng(0).normal(size=(layers, heads, T, T)) * 2
        scores[..., ~np.tril(np.ones((T, T), bool))] = -np.inf
        e = np.exp(scores - scores.max(-1, keepdims=True))
        return e / e.sum(-1, keepdims=True)
    torch.manual_seed(0)
    model = Transformer(
        ModelConfig(
            vocab_size=corpus.vocab_size,
            seq_len=T,
            embed_dim=16 * heads,
            num_heads=heads,
            num_layers=layers,
            tie_weights=True,
        )
    )
    if kind == "trained":
        fit(
            model,
            corpus,
            TrainConfig(
                max_steps=200, batch_size=8, learning_rate=2e-3, eval_every=200, warmup_steps=20
            ),
        )
    ids = Blocks(corpus.streams["validation"], T)[0][0].tolist()
    return look(model, ids, [""] * T).weights.double().numpy()


def page_of(peer: str, weights: np.ndarray, tokens: list[str]) -> str:
    "The HTML that a library gives for all heads."
    if peer == "tinytransformer":
        return attention_map(weights, tokens)._repr_html_()
    if peer == "bertviz":
        from bertviz import model_view

        page = model_view(
            [torch.tensor(layer, dtype=torch.float32)[None] for layer in weights],
            tokens,
            html_action="return",
        ).data
        return (
            "<script"
            ' src="https://cdnjs.cloudflare.com/ajax/libs/require.js/2.3.6/require.min.js"></script>'
            + page
        )
    import circuitsvis

    heads = weights.reshape(-1, *weights.shape[2:])
    return circuitsvis.attention.attention_heads(
        tokens=tokens, attention=torch.tensor(heads, dtype=torch.float32)
    ).local_src


def measure(context, peer: str, html: str, libraries: Path | None) -> dict:
    """Bytes of the page, milliseconds until it stands still, nodes in it; and for ours the
    milliseconds of a redraw.
    """
    page = context.new_page()
    if libraries:
        page.route(
            "https://cdnjs.cloudflare.com/**",
            lambda route: route.fulfill(
                path=libraries
                / (
                    name
                    if (name := Path(route.request.url).name).endswith("min.js")
                    else name + ".min.js"
                )
            ),
        )
    page.add_init_script(f"({QUIET})()")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "page.html"
        file.write_text(f"<!doctype html><meta charset=utf-8><body>{html}", encoding="utf-8")
        page.goto(file.as_uri(), timeout=300_000)
        if peer == "tinytransformer":
            page.locator(".attention-map[data-ready]").wait_for(timeout=60_000)
        page.wait_for_function("performance.now() - window.lastChange() > 3000", timeout=300_000)
        result = dict(
            megabytes=len(html.encode()) / 1e6,
            ready_ms=page.evaluate("window.lastChange()"),
            nodes=page.evaluate(
                "document.querySelectorAll('*').length +"
                " [...document.querySelectorAll('*')].reduce((n, e) => n +"
                " (e.shadowRoot?.querySelectorAll('*').length || 0), 0)"
            ),
        )
        if peer == "tinytransformer":
            times = page.evaluate(REDRAW)
            result |= dict(redraw_ms=statistics.median(times), slowest_redraw_ms=max(times))
    page.close()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--libraries", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    corpus = prepare(DataConfig(data_dir=str(HERE.parent / "data")))
    peers = ["tinytransformer"]
    for name in ("bertviz", "circuitsvis"):
        try:
            version(name)
        except PackageNotFoundError:
            print(f"{name} is not installed, and left out")
        else:
            peers.append(name)
    rows = []
    with sync_playwright() as playwright, tempfile.TemporaryDirectory() as profile:
        context = playwright.chromium.launch_persistent_context(
            profile,
            executable_path=shutil.which("chromium"),
            args=SWITCHES,
            viewport=dict(width=1200, height=900),
        )
        for layers, heads, T in ((4, 8, 128), (12, 12, 256)):
            tokens = [
                corpus.tokenizer.decode([i])
                for i in Blocks(corpus.streams["validation"], T)[0][0].tolist()
            ]
            for kind in ("untrained", "trained", "random"):
                weights = weights_of(kind, layers, heads, T, corpus)
                some = weights >= 1e-4
                error = abs(decode(encode(weights)) / np.where(some, weights, 1) - 1)[some].max()
                for peer in peers if kind == "trained" and T == 128 else peers[:1]:
                    html = page_of(peer, weights, tokens)
                    found = [
                        measure(context, peer, html, args.libraries)
                        for _ in range(args.rounds if peer == "tinytransformer" else 1)
                    ]
                    row = dict(
                        library=peer,
                        weights=kind,
                        layers=layers,
                        heads=heads,
                        T=T,
                        **{name: statistics.median(f[name] for f in found) for name in found[0]},
                    )
                    if peer == "tinytransformer":
                        row["largest_relative_error"] = float(error)
                    rows.append(row)
                    print(json.dumps(row), flush=True)
        browser = (
            context.browser.version
            if context.browser
            else context.pages[0].evaluate("navigator.userAgent").split("Chrome/")[1].split()[0]
        )
        context.close()
    about = dict(
        date=str(date.today()),
        machine=f"{os.cpu_count()} cores, {platform.machine()}",
        browser=browser,
        versions={name: version(name) for name in (*peers, "playwright")},
        rows=rows,
    )
    (HERE / "results").mkdir(exist_ok=True)
    (HERE / "results" / "attention_map.json").write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
