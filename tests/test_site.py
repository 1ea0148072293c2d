"""The pages, looked at where Quarto cannot be had: links, headings, pictures, formulas, and what the outputs say."""
import json, re, shutil, subprocess, sys
from pathlib import Path

import pypandoc
import pytest
import yaml
from conftest import ROOT

PAGES = sorted(path for path in (ROOT/"nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts)
NAMES = [str(path.relative_to(ROOT/"nbs")) for path in PAGES]
KNOWN = {"project": {"type"}, "format": {"html", "ipynb"}, "website": {"page-navigation", "search", "sidebar"}, "metadata-files": None}  # of _quarto.yml, as Quarto's reference has them
KNOWN_HTML = {"theme", "toc", "code-fold", "code-copy", "html-math-method", "format-links"}


def cells(page: Path) -> list[dict]: return json.loads(page.read_text())["cells"]
def source(cell: dict) -> str: return "".join(cell["source"])
def prose(page: Path) -> str: return "\n\n".join(source(c) for c in cells(page) if c["cell_type"] == "markdown")
def without_code(text: str) -> str: return re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.S)


def anchors(page: Path) -> set[str]:
    "Identifiers of the headings, as pandoc makes them."
    return set(re.findall(r'<h\d id="([^"]+)"', pypandoc.convert_text(prose(page), "html", "markdown", extra_args=["--mathml"])))


def broken_links(text: str, page: Path) -> list[str]:
    "Links to files that are not there, and to headings that are not in them."
    found = []
    for link in re.findall(r"\]\(([^)\s]+)\)", without_code(text)):
        if re.match(r"\w+:", link): continue
        path, _, anchor = link.partition("#")
        target = (page.parent/path).resolve() if path else page
        if not target.exists() or anchor and target.suffix == ".ipynb" and anchor not in anchors(target): found.append(link)
    return found


def wrong_headings(text: str) -> list[str]:
    "What is wrong with the order of the headings: one H1, first, and no level left out."
    levels = [len(marks) for marks in re.findall(r"(?m)^(#+) \S", re.sub(r"```.*?```", "", text, flags=re.S))]
    wrong = [] if levels[:1] == [1] and levels.count(1) == 1 else [f"levels {levels[:3]}… instead of one H1, first"]
    return wrong + [f"level {a} is followed by level {b}" for a, b in zip(levels, levels[1:]) if b > a + 1]


def debris(output: dict) -> list[str]:
    "What should not be in a saved output: paths of a machine, warnings, tracebacks, half a progress bar, foreign addresses."
    data = output.get("data", {})
    text = "".join(output.get("text", [])) + "".join("".join(data.get(kind, [])) for kind in ("text/plain", "text/markdown"))
    page = "".join(data.get("text/html", []))
    wrong = [found[0] for found in re.finditer(r"(?<![\w.])/(?:home|work|tmp|root|Users)/\S*|\w*Warning:.*|Traceback \(most.*|\d+%\|.*|\d(?:it|step|row)/s|\r(?!\n)", text)]
    return wrong + re.findall(r"""(?:src|href)=["']?(?:https?:)?//[^"'\s>]+""", page) + (["an error"] if output["output_type"] == "error" else [])


def pictures_without_words(page_cells: list[dict]) -> list[str]:
    "Cells whose output is a picture, and that have no text for those who cannot see it."
    return [source(c)[:60] for c in page_cells if c["cell_type"] == "code" and any("image/png" in o.get("data", {}) for o in c["outputs"]) and "fig-alt:" not in source(c)]


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_page(page):
    text, all_cells = prose(page), cells(page)
    assert broken_links(text, page) == []
    assert wrong_headings(text) == []
    assert pictures_without_words(all_cells) == []
    assert [found for c in all_cells if c["cell_type"] == "code" for o in c["outputs"] for found in debris(o)] == []
    first = source(all_cells[0])
    assert re.match(r"# [^\n]+\n\n> [^\n]+", first) or page.name == "index.ipynb", "a page begins with its title and a line of description"


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_formulas(page, tmp_path):
    "Pandoc turns every formula into MathML, and complains about none."
    (tmp_path/"page.md").write_text(prose(page))
    done = subprocess.run([pypandoc.get_pandoc_path(), "--mathml", "-f", "markdown", "-t", "html", tmp_path/"page.md"], capture_output=True, text=True, check=True)
    assert "Could not convert TeX math" not in done.stderr and 'class="math' not in re.sub(r"<math.*?</math>", "", done.stdout, flags=re.S)


def test_the_checks_can_fail(tmp_path):
    page = ROOT/"nbs"/"index.ipynb"
    assert broken_links("[a](nowhere.ipynb) [b](00_data.ipynb#no-such-heading) `[c](code)` [d](00_data.ipynb)", page) == ["nowhere.ipynb", "00_data.ipynb#no-such-heading"]
    assert wrong_headings("## Late\n") and wrong_headings("# One\n\n### Three\n") and wrong_headings("# One\n\n# Two\n") and not wrong_headings("# One\n\n## Two\n\n```\n# a comment\n```\n")
    for bad in ("in /home/me/x.py", "UserWarning: no", " 50%|#### ", "12it/s", "a\rb"): assert debris(dict(output_type="stream", text=[bad])), bad
    assert debris(dict(output_type="display_data", data={"text/html": '<script src="https://example.org/a.js">'})) and not debris(dict(output_type="stream", text=["loss 3.2, runs/tiny, a/b\n"]))
    picture = dict(cell_type="code", source=["plt.show()"], outputs=[dict(output_type="display_data", data={"image/png": "x"})])
    assert pictures_without_words([picture]) and not pictures_without_words([picture | dict(source=['#| fig-alt: "a line"\n', "plt.show()"])])
    (tmp_path/"page.md").write_text("$\\frac{1$")
    assert "math" in subprocess.run([pypandoc.get_pandoc_path(), "--mathml", "-f", "markdown", "-t", "html", tmp_path/"page.md"], capture_output=True, text=True).stdout.lower()


def test_sidebar_lists_every_page():
    config = yaml.safe_load((ROOT/"_quarto.yml").read_text())
    def files(entry):
        if isinstance(entry, str): yield entry
        elif isinstance(entry, list): yield from (f for e in entry for f in files(e))
        else: yield from files(entry.get("href") or entry.get("contents"))
    listed = list(files(config["website"]["sidebar"]["contents"]))
    assert sorted(listed) == sorted([*NAMES, "changelog.md"]) and (ROOT/"nbs"/"changelog.md").exists() and listed[0] == "index.ipynb"
    assert [f for f in listed if re.match(r"\d\d_", f)] == sorted(f for f in NAMES if re.match(r"\d\d_", f))  # chapters in order


def test_quarto_knows_the_keys():
    config = yaml.safe_load((ROOT/"_quarto.yml").read_text())
    assert config.keys() <= KNOWN.keys() and all(allowed is None or config[key].keys() <= allowed for key, allowed in KNOWN.items() if key in config)
    assert config["format"]["html"].keys() <= KNOWN_HTML and config["format"]["html"]["html-math-method"] == "mathml"  # formulas without a network
    assert config["format"]["html"]["format-links"] == ["ipynb"] and "ipynb" in config["format"]  # each notebook can be downloaded from its page


@pytest.mark.skipif(not shutil.which("quarto"), reason="Quarto is not installed: the real site is not rendered")
def test_site_renders(tmp_path):
    for name in ("nbs", "tinytransformer"): shutil.copytree(ROOT/name, tmp_path/name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("settings.ini", "pyproject.toml", "setup.py", "README.md", "CHANGELOG.md", "_quarto.yml"): shutil.copy(ROOT/name, tmp_path)
    subprocess.run([Path(sys.executable).with_name("nbdev_docs")], cwd=tmp_path, check=True)
    assert all((tmp_path/"_docs"/name).with_suffix(".html").exists() for name in NAMES)


def test_workflows():
    "GitHub's own schema."
    done = subprocess.run([Path(sys.executable).with_name("check-jsonschema"), "--builtin-schema", "vendor.github-workflows", *sorted((ROOT/".github"/"workflows").glob("*.yml"))], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
