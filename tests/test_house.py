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
import torch
from conftest import ROOT
from packaging.requirements import Requirement

BIN = Path(sys.executable).parent  # of the environment that runs the tests
CHAPTERS = "data embeddings attention block model train generate".split()
ALONE = {"tinywiki", "files", "attention_map", "drawings"}  # import nothing of ours, or files alone
OUTERMOST = {"serve", "cli", "__main__"}  # know HTTP and the terminal; nothing else knows them


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


def test_ruff_passes():
    "Every notebook and file is formatted, and the linter finds nothing."
    for command in ("format --check", "check"):
        done = subprocess.run(
            [BIN / "ruff", *command.split()], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_types_are_right():
    done = subprocess.run([BIN / "mypy"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_lines_are_short():
    """At most 100 columns, in notebooks too. Ruff cannot check those, because a directive of
    Quarto, such as `#| fig-alt: ...`, has to stay on one line.
    """
    cells = {
        f"{path.name}, cell {i}": "".join(cell["source"])
        for path in (ROOT / "nbs").rglob("*.ipynb")
        for i, cell in enumerate(json.loads(path.read_text())["cells"])
        if cell["cell_type"] == "code"
    }
    assert [
        f"{name}: {line}"
        for name, source in cells.items()
        for line in source.splitlines()
        if len(line) > 100 and not line.startswith("#|")
    ] == []


def test_docstrings_are_whole():
    "Two strings one after the other are two statements, and only the first is the docstring."
    cut = [
        f"{path.name}: {node.name}"
        for path in (ROOT / "tinytransformer").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and any(
            isinstance(statement, ast.Expr)
            and isinstance(statement.value, ast.Constant)
            and isinstance(statement.value.value, str)
            for statement in node.body[1:]
        )
    ]
    assert cut == []


def test_functions_fit_on_a_screen():
    "No function of the package is longer than 60 lines."
    lengths = {
        f"{path.name}: {node.name}": node.end_lineno - node.lineno + 1
        for path in (ROOT / "tinytransformer").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert {name: lines for name, lines in lengths.items() if lines > 60} == {}


def test_quarto_finds_its_configuration():
    assert (ROOT / "nbs" / "_quarto.yml").resolve() == (ROOT / "_quarto.yml").resolve()


def imported_names(source: str, package: str) -> set[str]:
    """Full names of all that a source in `package` imports, anywhere in it, by a dot or by the
    package's name.
    """
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            base = package.split(".")[: 1 - node.level or None] if node.level else []
            module = ".".join(base + [node.module] * bool(node.module))
            found |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return found


def our_imports() -> dict[str, set[str]]:
    """Of each module of the package, as `data` or `serve.page`: the modules of the package that it
    imports.
    """
    root = ROOT / "tinytransformer"
    paths = {
        ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path
        for path in root.rglob("*.py")
        if path.name != "_modidx.py"
    }
    found = {}
    for name, path in paths.items():
        parents = (
            ["tinytransformer", *name.split(".")]
            if path.name == "__init__.py"
            else ["tinytransformer", *name.split(".")][:-1]
        )
        names = imported_names(
            path.read_text(), ".".join(part for part in parents if part != "__init__")
        )
        found[name] = {other for other in paths if f"tinytransformer.{other}" in names} - {name}
    return found


def test_imports_are_found():
    source = """
from .data import Blocks
from . import model
import tinytransformer.train as t
def f():
    from tinytransformer.serve.page import show
"""
    wanted = {
        "tinytransformer.data",
        "tinytransformer.model",
        "tinytransformer.train",
        "tinytransformer.serve.page",
    }
    assert wanted <= imported_names(source, "tinytransformer")
    assert "tinytransformer.data" in imported_names(
        "from ..data import Blocks", "tinytransformer.serve"
    )
    # the second one inside a function
    assert "block" in our_imports()["model"] and "serve" in our_imports()["cli"]


def test_imports_go_one_way():
    """A chapter imports lower chapters and what imports nothing of ours; only the commands import
    the server and the commands.
    """
    for module, others in our_imports().items():
        area = module.split(".")[0]
        wrong = {
            other for other in others if other.split(".")[0] in OUTERMOST and area not in OUTERMOST
        }
        if module in ALONE:
            wrong |= others - {"files"}
        if module in CHAPTERS:
            wrong |= others - {*CHAPTERS[: CHAPTERS.index(module)], *ALONE}
        if module == "hf":  # a run may begin from Hugging Face, so it is below the runs
            wrong |= others & {"runs"}
        assert not wrong, f"{module} imports {wrong}"


def test_nothing_is_imported_late_to_avoid_a_circle():
    """Only the outermost modules import ours inside functions, for what is an extra, what few
    commands need, or what comes after Ctrl-C has been made silent. Two modules that need each other
    would be one.
    """
    late = {
        path.stem
        for path in (ROOT / "tinytransformer").rglob("*.py")
        for function in ast.walk(ast.parse(path.read_text()))
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
        if isinstance(node, ast.ImportFrom)
        and (node.level or (node.module or "").startswith("tinytransformer"))
    }
    assert late <= OUTERMOST


def test_imports_are_declared():
    "Whatever the package imports is among the requirements in settings.ini."
    found = {
        name.split(".")[0]
        for path in (ROOT / "tinytransformer").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Import) or isinstance(node, ast.ImportFrom) and not node.level
        for name in (
            [node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
        )
    }
    known = sys.stdlib_module_names | {"tinytransformer"}
    called = dict(yaml="pyyaml", PIL="pillow", prometheus_client="prometheus-client")
    requirements = [Requirement(line) for line in distribution("tinytransformer").requires]
    declared = {re.sub(r"[-_.]+", "-", req.name).lower() for req in requirements}
    imported = {called.get(name, name.replace("_", "-").lower()) for name in found - known}
    assert imported <= declared, f"not declared: {sorted(imported - declared)}"
    # tools of the notebooks are not among what the package needs to run
    assert not {req.name for req in requirements if req.marker is None} & {"fastcore", "nbdev"}


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
    the version that is here. It is written for Python 3.11 on Linux; what PyTorch needs for a GPU
    is not in it. Elsewhere the versions only have to meet the requirements in settings.ini, which
    all have a pin."""
    pins = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line
    )
    needed = required(["tinytransformer[dev,track,serve]"]) - {"tinytransformer"}
    versions = {name: distribution(name).version.split("+")[0] for name in needed}
    assert {"torch", "nbdev", "pytest"} <= needed
    if sys.version_info[:2] == (3, 11) and sys.platform == "linux":
        for_a_gpu = required(["torch"]) if torch.version.cuda else set()
        assert needed - for_a_gpu <= pins.keys(), (
            f"not pinned: {sorted(needed - for_a_gpu - pins.keys())}"
        )
        assert {name: version for name, version in versions.items() if name in pins} == {
            name: pins[name] for name in needed & pins.keys()
        }
        return
    wanted = [Requirement(line) for line in distribution("tinytransformer").requires]
    wanted = [
        req
        for req in wanted
        if req.marker is None
        or any(req.marker.evaluate({"extra": extra}) for extra in ("", "dev", "track", "serve"))
    ]
    names = {req: re.sub(r"[-_.]+", "-", req.name).lower() for req in wanted}
    assert set(names.values()) <= pins.keys(), f"not pinned: {set(names.values()) - pins.keys()}"
    wrong = [
        f"{req}, not {versions.get(name)}"
        for req, name in names.items()
        if not req.specifier.contains(versions.get(name, "0"), prereleases=True)
    ]
    assert not wrong
    pytest.skip(
        "constraints.txt is for Python 3.11 on Linux:"
        f" compared {len(names)} installed versions with settings.ini instead"
    )
