"""What holds the project together: notebooks and package in step, pins, links, and who may
import whom."""

import ast
import filecmp
import json
import re
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from conftest import ROOT
from packaging.requirements import Requirement

BIN = Path(sys.executable).parent  # of the environment that runs the tests
CHAPTERS = "data embeddings attention block model train generate".split()


@pytest.fixture
def copy(tmp_path):
    "What nbdev reads and writes, in a folder of its own."
    for name in ("nbs", "tinytransformer"):
        shutil.copytree(
            ROOT / name,
            tmp_path / name,
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
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def differing(a: Path, b: Path) -> list[str]:
    files = {
        p.relative_to(root)
        for root in (a, b)
        for p in root.rglob("*")
        if p.is_file() and "__pycache__" not in p.parts and p.name != ".last_checked"
    }
    return sorted(
        str(f)
        for f in files
        if not ((a / f).exists() and (b / f).exists() and filecmp.cmp(a / f, b / f, shallow=False))
    )


def test_export_leaves_no_difference(copy):
    "The committed package is what the committed notebooks export."
    subprocess.run([BIN / "nbdev_export"], cwd=copy, check=True)
    assert differing(ROOT / "tinytransformer", copy / "tinytransformer") == []
    assert (copy / "pyproject.toml").read_text() == (ROOT / "pyproject.toml").read_text()


def test_clean_leaves_no_difference(copy):
    "The committed notebooks are clean."
    subprocess.run([BIN / "nbdev_clean"], cwd=copy, check=True)
    assert differing(ROOT / "nbs", copy / "nbs") == []


def test_readme_is_the_front_page():
    "README.md is what index.ipynb shows."
    subprocess.run([sys.executable, ROOT / ".ci" / "readme", "--check"], check=True)


def test_links_of_the_front_page():
    "Every file that README.md points to is there."
    links = re.findall(r"\]\((?!\w+:|#)([^)]+)\)", (ROOT / "README.md").read_text())
    assert len(links) > 7 and [link for link in links if not (ROOT / link).exists()] == []


def test_notebooks_save_their_outputs():
    "A reader of the page sees what the cells show."
    for path in sorted((ROOT / "nbs").glob("0*.ipynb")):
        outputs = [o for c in json.loads(path.read_text())["cells"] for o in c.get("outputs", [])]
        assert any("image/png" in o.get("data", {}) for o in outputs), (
            f"{path.name} shows no picture"
        )
        assert not [
            o for o in outputs if o["output_type"] == "error" or o.get("name") == "stderr"
        ], f"{path.name} shows an error"


def test_quarto_finds_its_configuration():
    assert (ROOT / "nbs" / "_quarto.yml").resolve() == (ROOT / "_quarto.yml").resolve()


def test_imports_go_one_way():
    "A chapter imports from lower chapters and TinyWiki alone; TinyWiki imports nothing of ours."
    for module in [*CHAPTERS, "tinywiki"]:
        source = (ROOT / "tinytransformer" / f"{module}.py").read_text()
        ours = {
            node.module
            for node in ast.walk(ast.parse(source))
            if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module
        }
        allowed = (
            set() if module == "tinywiki" else {*CHAPTERS[: CHAPTERS.index(module)], "tinywiki"}
        )
        assert ours <= allowed, f"{module} imports {ours - allowed}"


def required(names: list[str]) -> set[str]:
    "Everything installed that the requirements in `names` bring along."
    found, todo = set(), [Requirement(name) for name in names]
    while todo:
        req = todo.pop()
        key = re.sub(r"[-_.]+", "-", req.name).lower()
        if (
            req.marker
            and not any(req.marker.evaluate({"extra": extra}) for extra in [*req.extras, ""])
            or (key, *sorted(req.extras)) in found
        ):
            continue
        try:
            dist = distribution(req.name)
        except PackageNotFoundError:
            continue  # for another platform or Python
        found.add((key, *sorted(req.extras)))
        for line in dist.requires or []:
            child = Requirement(line)
            if child.marker is None or any(
                child.marker.evaluate({"extra": extra}) for extra in [*req.extras, ""]
            ):
                child.marker = None
                todo.append(child)
    return {name for name, *_ in found}


def test_every_installed_version_is_pinned():
    """constraints.txt names each package that an installation with [dev,track,serve] brings, and
    the version that is here.
    """
    pins = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line
    )
    needed = required(["tinytransformer[dev,track,serve]"]) - {"tinytransformer"}
    assert {"torch", "nbdev", "pytest"} <= needed
    assert needed <= pins.keys(), f"not pinned: {sorted(needed - pins.keys())}"
    versions = {name: distribution(name).version.split("+")[0] for name in needed}
    assert versions == {name: pins[name] for name in needed}
