"""The pages, looked at where Quarto cannot be had: links, headings, pictures, formulas, and what
the outputs say."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from contextlib import contextmanager
from functools import cache, partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import pypandoc
import pytest
import yaml
from conftest import ROOT

PAGES = sorted(
    path for path in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts
)
NAMES = [str(path.relative_to(ROOT / "nbs")) for path in PAGES]
# of _quarto.yml, as Quarto's reference has them
KNOWN = {
    "project": {"type"},
    "format": {"html", "ipynb"},
    "website": {"page-navigation", "search", "sidebar"},
    "metadata-files": None,
}
KNOWN_HTML = {"theme", "toc", "code-fold", "code-copy", "html-math-method", "format-links", "grid"}


def cells(page: Path) -> list[dict]:
    return json.loads(page.read_text())["cells"]


def source(cell: dict) -> str:
    return "".join(cell["source"])


def prose(page: Path) -> str:
    return "\n\n".join(source(c) for c in cells(page) if c["cell_type"] == "markdown")


def without_code(text: str) -> str:
    return re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.S)


@cache
def anchors(page: Path) -> set[str]:
    "Identifiers of the headings, as pandoc makes them."
    return set(
        re.findall(
            r'<h\d id="([^"]+)"',
            pypandoc.convert_text(prose(page), "html", "markdown", extra_args=["--mathml"]),
        )
    )


def broken_links(text: str, page: Path) -> list[str]:
    "Links to files that are not there, or not on the site, and to headings that are not in them."
    found = []
    for link in re.findall(r"\]\(([^)\s]+)\)", without_code(text)):
        if re.match(r"\w+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = Path(os.path.normpath(page.parent / path)) if path else page
        if (
            not target.is_relative_to(ROOT / "nbs")
            or not target.exists()
            or anchor
            and target.suffix == ".ipynb"
            and anchor not in anchors(target)
        ):
            found.append(link)
    return found


def wrong_headings(text: str) -> list[str]:
    "What is wrong with the order of the headings: one H1, first, and no level left out."
    levels = [
        len(marks)
        for marks in re.findall(r"(?m)^(#+) \S", re.sub(r"```.*?```", "", text, flags=re.S))
    ]
    wrong = (
        []
        if levels[:1] == [1] and levels.count(1) == 1
        else [f"levels {levels[:3]}… instead of one H1, first"]
    )
    return wrong + [
        f"level {a} is followed by level {b}" for a, b in zip(levels, levels[1:]) if b > a + 1
    ]


def swallowed_lists(text: str) -> list[str]:
    "Lists that follow a line of text at once: pandoc takes them for more of the paragraph."
    return re.findall(
        r"(?m)^(?![-*] |\d+\. |\s|$).*\n((?:[-*]|\d+\.) \S.*)$",
        re.sub(r"```.*?```", "", text, flags=re.S),
    )


def debris(output: dict) -> list[str]:
    """What should not be in a saved output: paths of a machine, warnings, tracebacks, half a
    progress bar, foreign addresses.
    """
    data = output.get("data", {})
    text = "".join(output.get("text", [])) + "".join(
        "".join(data.get(kind, [])) for kind in ("text/plain", "text/markdown")
    )
    page = "".join(data.get("text/html", []))
    wrong = [
        found[0]
        for found in re.finditer(
            r"(?<![\w.])/(?:home|work|tmp|root|Users)/\S*|\w*Warning:.*|Traceback"
            r" \(most.*|\d+%\|.*|\d(?:it|step|row)/s|\r(?!\n)",
            text,
        )
    ]
    return (
        wrong
        + re.findall(r"""(?:src|href)=["']?(?:https?:)?//[^"'\s>]+""", page)
        + (["an error"] if output["output_type"] == "error" else [])
    )


def open_solutions(page_cells: list[dict]) -> list[str]:
    "Solutions of exercises that do not fold away, or whose answer stands below them all the same."
    found = [
        source(c)
        for c in page_cells
        if c["cell_type"] == "code" and '#| code-summary: "Solution"' in source(c)
    ]
    return [
        text[:60]
        for text in found
        if "#| code-fold: true" not in text or "#| output: false" not in text
    ]


def pictures_without_words(page_cells: list[dict]) -> list[str]:
    "Cells whose output is a picture, and that have no text for those who cannot see it."
    return [
        source(c)[:60]
        for c in page_cells
        if c["cell_type"] == "code"
        and any("image/png" in o.get("data", {}) for o in c["outputs"])
        and "fig-alt:" not in source(c)
    ]


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_page(page):
    text, all_cells = prose(page), cells(page)
    assert broken_links(text, page) == []
    assert wrong_headings(text) == []
    assert swallowed_lists(text) == []
    assert pictures_without_words(all_cells) == []
    assert open_solutions(all_cells) == []
    assert [
        found
        for c in all_cells
        if c["cell_type"] == "code"
        for o in c["outputs"]
        for found in debris(o)
    ] == []
    first = source(all_cells[0])
    assert re.fullmatch(r"# [^\n]+\n\n> [^\n]+", first), (
        "a page begins with a cell of its title and a line of description; nbdev makes front matter"
        " of it, and would lose what else stands there"
    )


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_formulas(page, tmp_path):
    "Pandoc turns every formula into MathML, and complains about none."
    (tmp_path / "page.md").write_text(prose(page))
    done = subprocess.run(
        [
            pypandoc.get_pandoc_path(),
            "--mathml",
            "-f",
            "markdown",
            "-t",
            "html",
            tmp_path / "page.md",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "Could not convert TeX math" not in done.stderr and 'class="math' not in re.sub(
        r"<math.*?</math>", "", done.stdout, flags=re.S
    )


def test_the_checks_can_fail(tmp_path):
    page = ROOT / "nbs" / "index.ipynb"
    assert broken_links(
        "[a](nowhere.ipynb) [b](00_data.ipynb#no-such-heading) `[c](code)` [d](00_data.ipynb)"
        " [e](../setup.py)",
        page,
    ) == ["nowhere.ipynb", "00_data.ipynb#no-such-heading", "../setup.py"]
    assert (
        wrong_headings("## Late\n")
        and wrong_headings("# One\n\n### Three\n")
        and wrong_headings("# One\n\n# Two\n")
        and not wrong_headings("# One\n\n## Two\n\n```\n# a comment\n```\n")
    )
    assert swallowed_lists("You will\n- read\n") == ["- read"] and not swallowed_lists(
        "You will\n\n- read,\n  for long\n- write\n"
    )
    for bad in ("in /home/me/x.py", "UserWarning: no", " 50%|#### ", "12it/s", "a\rb"):
        assert debris(dict(output_type="stream", text=[bad])), bad
    assert debris(
        dict(
            output_type="display_data",
            data={"text/html": '<script src="https://example.org/a.js">'},
        )
    ) and not debris(dict(output_type="stream", text=["loss 3.2, runs/tiny, a/b\n"]))
    picture = dict(
        cell_type="code",
        source=["plt.show()"],
        outputs=[dict(output_type="display_data", data={"image/png": "x"})],
    )
    assert pictures_without_words([picture]) and not pictures_without_words(
        [picture | dict(source=['#| fig-alt: "a line"\n', "plt.show()"])]
    )
    solution = dict(
        cell_type="code",
        source=["#| code-fold: true\n", '#| code-summary: "Solution"\n', "print(42)"],
    )
    assert open_solutions([solution]) and not open_solutions(
        [solution | dict(source=["#| output: false\n", *solution["source"]])]
    )
    (tmp_path / "page.html").write_text(
        '<a href="gone.html">a</a> <img alt="b" src="page.html?c#d"> <a class="e"'
        ' href="https://example.org/f">g</a>'
    )
    assert dead_links(tmp_path) == ["page.html: gone.html"]
    (tmp_path / "page.md").write_text("$\\frac{1$")
    assert (
        "math"
        in subprocess.run(
            [
                pypandoc.get_pandoc_path(),
                "--mathml",
                "-f",
                "markdown",
                "-t",
                "html",
                tmp_path / "page.md",
            ],
            capture_output=True,
            text=True,
        ).stdout.lower()
    )


def test_sidebar_lists_every_page():
    config = yaml.safe_load((ROOT / "_quarto.yml").read_text())

    def files(entry):
        if isinstance(entry, str):
            yield entry
        elif isinstance(entry, list):
            yield from (f for e in entry for f in files(e))
        else:
            yield from files(entry.get("href") or entry.get("contents"))

    listed = list(files(config["website"]["sidebar"]["contents"]))
    assert (
        sorted(listed) == sorted([*NAMES, "changelog.md"])
        and (ROOT / "nbs" / "changelog.md").exists()
        and listed[0] == "index.ipynb"
    )
    # chapters in order
    assert [f for f in listed if re.match(r"\d\d_", f)] == sorted(
        f for f in NAMES if re.match(r"\d\d_", f)
    )


def test_quarto_knows_the_keys():
    config = yaml.safe_load((ROOT / "_quarto.yml").read_text())
    assert config.keys() <= KNOWN.keys() and all(
        allowed is None or config[key].keys() <= allowed
        for key, allowed in KNOWN.items()
        if key in config
    )
    # formulas without a network
    assert (
        config["format"]["html"].keys() <= KNOWN_HTML
        and config["format"]["html"]["html-math-method"] == "mathml"
    )
    # each notebook can be downloaded from its page
    assert config["format"]["html"]["format-links"] == ["ipynb"] and "ipynb" in config["format"]


def minutes_to_read(page: Path) -> float:
    """What the front page's table goes by: 150 words and 15 lines of code a minute, and a minute
    for a picture. Hidden cells and folded solutions are left out.
    """
    words = lines = figures = 0
    for cell in cells(page):
        text = source(cell)
        if cell["cell_type"] == "markdown":
            words += len(re.sub(r"\$\$.*?\$\$|\$[^$\n]*\$", "", text, flags=re.S).split())
        elif "#| hide" not in text and "code-fold: true" not in text:
            lines += sum(bool(re.match(r"\s*[^#\s]", line)) for line in text.splitlines())
            figures += any("image/png" in o.get("data", {}) for o in cell["outputs"])
    return words / 150 + lines / 15 + figures


def test_front_page_says_how_long_a_chapter_takes():
    """Every chapter is in its table, with minutes that are right to about a third, and with
    sections to skip that are there.
    """
    rows = re.findall(
        r"(?m)^\| \[\d\d [^]]+\]\((\d\d_\w+\.ipynb)\) \|.*\| (\d+) \|([^|]*)\|$",
        prose(ROOT / "nbs" / "index.ipynb"),
    )
    assert [name for name, *_ in rows] == [name for name in NAMES if re.match(r"\d\d_", name)]
    wrong = [
        f"{name}: {minutes} minutes, and not {minutes_to_read(ROOT / 'nbs' / name):.0f}"
        for name, minutes, _ in rows
        if not 0.7 < minutes_to_read(ROOT / "nbs" / name) / int(minutes) < 1.4
    ]
    lost = [
        (name, title)
        for name, _, skipped in rows
        for title in re.findall(r"\*(.*?)\*", skipped)
        if not re.search(rf"(?m)^##+ {re.escape(title)}$", prose(ROOT / "nbs" / name))
    ]
    assert wrong == lost == []


@pytest.mark.parametrize("name", [name for name in NAMES if re.match(r"\d\d_", name)])
def test_exercises_are_rated(name):
    "Three or four in each chapter, each with one to three stars and a solution."
    page = ROOT / "nbs" / name
    _, _, exercises = prose(page).partition("## Exercises")
    stars = re.findall(r"(?m)^(?:\*\*)?\d\..*?(★+)", exercises)
    solutions = sum('#| code-summary: "Solution"' in source(c) for c in cells(page))
    assert 3 <= len(stars) <= 4 and len(stars) == solutions
    assert all(len(rating) <= 3 for rating in stars)


def test_glossary_points_to_where_a_word_is_used():
    "Each word, or one of its other names, stands in the notebook that the glossary names."
    page = ROOT / "nbs" / "appendix" / "glossary.ipynb"
    table = re.findall(r"(?m)^\| \*\*(.+?)\*\*<br>\*(.*?)\* \| .* \| (\[.*\)) \|$", prose(page))
    assert len(table) > 50 and len({ours for ours, _, _ in table}) == len(table)
    rows = [
        (ours, others, where)
        for ours, others, links in table
        for where in re.findall(r"\]\((.*?)\)", links)
    ]
    texts = {where: " ".join(map(source, cells(page.parent / where))).lower() for *_, where in rows}
    lost = [
        (ours, where)
        for ours, others, where in rows
        if not any(
            name.strip("` ").lower() in texts[where]
            for name in [*ours.split(", ")[:1], *others.split(", ")]
        )
    ]
    assert lost == []


def html_name(name: str) -> str:
    "Where nbdev puts a page: without the number of its chapter."
    path = Path(name)
    return str(path.with_name(re.sub(r"^\d+\w*?_", "", path.stem) + ".html"))


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    "What nbdev needs of the project, in a folder of its own."
    folder = tmp_path_factory.mktemp("site")
    for name in ("nbs", "tinytransformer"):
        shutil.copytree(
            ROOT / name,
            folder / name,
            symlinks=True,
            ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"),
        )
    for name in (
        "settings.ini",
        "pyproject.toml",
        "setup.py",
        "README.md",
        "CHANGELOG.md",
        "_quarto.yml",
    ):
        shutil.copy(ROOT / name, folder)
    return folder


def test_nbdev_processes_every_page(project):
    """What Quarto is given: every notebook, its reference filled in, its title as front matter and
    its opening still there.
    """
    # what nbdev_proc_nbs does, which without Quarto would begin with sudo and pip
    process = "from nbdev.serve import proc_nbs; proc_nbs()"
    done = subprocess.run(
        [sys.executable, "-c", process],
        cwd=project,
        capture_output=True,
        text=True,
        env=os.environ | dict(PYTHONPATH=str(project)),
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for name in NAMES:
        front, *rest = cells(project / "_proc" / name)
        assert (
            front["cell_type"] == "raw"
            and {"title", "description", "output-file"}
            <= yaml.safe_load(source(front).strip().strip("-")).keys()
        )
        opening = source(cells(ROOT / "nbs" / name)[1])
        assert opening.split(".")[0].split("](")[0][:60] in "".join(map(source, rest)), (
            f"{name} has lost its opening"
        )
        # nbdev makes a link of a name in `code`; inside of another link it would be no link at all
        doubled = re.findall(r"\[\[`.*?\)", "".join(map(source, rest)))
        assert not doubled, f"{name} links a name that nbdev links by itself: {doubled}"
        shown = "".join(
            "".join(o.get("data", {}).get("text/markdown", []))
            for c in rest
            for o in c.get("outputs", [])
        )
        assert "!!!" not in shown and "concepts/" not in shown, (
            f"{name} shows what another library says of itself"
        )


@pytest.mark.skipif(
    not shutil.which("quarto"), reason="Quarto is not installed: the real site is not rendered"
)
def test_site_renders(project, launch, tmp_path):
    """Every page, on a wide and on a narrow screen: its title, no scrolling to the side, no failing
    script, nothing missing, and no foreign address but Quarto's two for widgets.
    """
    subprocess.run(
        [Path(sys.executable).with_name("nbdev_docs")],
        cwd=project,
        check=True,
        env=os.environ | dict(PYTHONPATH=str(project)),
    )
    assert (project / "README.md").read_bytes() == (ROOT / "README.md").read_bytes()
    context, wrong = launch(tmp_path, viewport=dict(width=1400, height=900)), []
    with serving(project / "_docs") as address:
        for name in [*map(html_name, NAMES), "changelog.html"]:
            page = context.new_page()
            # Quarto's own line for widgets says so where there is no network
            page.on(
                "pageerror",
                lambda e: (
                    wrong.append((name, str(e))) if "define is not defined" not in str(e) else None
                ),
            )
            page.on("response", lambda r: wrong.append((name, r.url)) if r.status >= 400 else None)
            page.on(
                "request",
                lambda r: (
                    wrong.append((name, r.url))
                    if not r.url.startswith(
                        (
                            address,
                            "data:",
                            "blob:",
                            "https://cdnjs.cloudflare.com/ajax/libs/require",
                            "https://cdnjs.cloudflare.com/ajax/libs/jquery",
                            "https://cdn.jsdelivr.net/npm/@jupyter-widgets/",
                        )
                    )
                    else None
                ),
            )
            for width in (1400, 390):
                page.set_viewport_size(dict(width=width, height=900))
                page.goto(f"{address}/{name}")
                assert (
                    page.locator("h1").count() == 1 and page.locator("main p, main li").count() > 1
                ), name
                if (
                    over := page.evaluate(
                        "document.documentElement.scrollWidth -"
                        " document.documentElement.clientWidth"
                    )
                ) > 0:
                    wrong.append((name, f"{over} pixels too wide on a screen of {width}"))
            assert name == "changelog.html" or page.locator("a", has_text="Jupyter").count(), (
                f"{name} has no link to its notebook"
            )
            page.close()
    assert not wrong
    assert dead_links(project / "_docs") == []


def dead_links(site: Path) -> list[str]:
    "What the rendered pages point to, within the site, and that is not there."

    def targets(page):
        return {
            unquote(target)
            for target in re.findall(
                r'<(?:a|img|link|script)\b[^>]*? (?:href|src)="([^"#]+)', page.read_text()
            )
            if not re.match(r"\w+:|//", target)
        }

    return [
        f"{page.relative_to(site)}: {target}"
        for page in sorted(site.rglob("*.html"))
        if "site_libs" not in page.parts
        for target in sorted(targets(page))
        if not (page.parent / target.split("?")[0]).exists()
    ]


@contextmanager
def serving(folder: Path):
    "The address of a server of files."

    class Silent(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Silent, directory=folder)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_workflows():
    "GitHub's own schema."
    done = subprocess.run(
        [
            Path(sys.executable).with_name("check-jsonschema"),
            "--builtin-schema",
            "vendor.github-workflows",
            *sorted((ROOT / ".github" / "workflows").glob("*.yml")),
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
