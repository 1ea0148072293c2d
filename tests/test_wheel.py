"""What a wheel holds, used where there is no checkout."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT, SMALL


def build(folder: Path) -> None:
    "Build a wheel from what git knows, and unpack it into `installed`."
    files = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\0")
    for name in filter(None, files):  # a build leaves folders behind: not in the checkout
        if (ROOT / name).is_file() and not name.startswith(
            ("nbs/0", "nbs/appendix", "benchmarks/results")
        ):
            (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "source" / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run(
        [
            sys.executable,
            "-m",
            "build",
            "--wheel",
            "--no-isolation",
            "--outdir",
            folder / "dist",
            folder / "source",
        ],
        check=True,
        capture_output=True,
    )
    (wheel,) = (folder / "dist").glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "installed")


@pytest.fixture(scope="session")
def installed(once) -> Path:
    "A folder with nothing but the contents of the wheel, built once for all workers."
    return once("wheel", build) / "installed"


def run(installed: Path, cwd: Path, *args) -> str:
    done = subprocess.run(
        [sys.executable, *args],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(installed), "PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_is_the_wheel_that_runs(installed, tmp_path):
    assert Path(
        run(
            installed, tmp_path, "-c", "import tinytransformer; print(tinytransformer.__file__)"
        ).strip()
    ).is_relative_to(installed)
    assert {"tinytransformer", "tests", "nbs", "benchmarks"} & {
        p.name for p in installed.iterdir()
    } == {"tinytransformer"}
    assert "export" in run(installed, tmp_path, "-m", "tinytransformer", "--help")


def test_it_trains_and_shows_a_map(installed, tmp_path):
    "Configurations, TinyWiki, the map's script and the server's page are in it."
    assert "validation loss" in run(
        installed, tmp_path, "-m", "tinytransformer", "train", "--config", "tiny", *SMALL
    )
    page = (
        "from tinytransformer.attention_map import attention_map; import numpy as np;"
        " attention_map(np.eye(3)[None, None], list('abc')).save('map.html')"
    )
    run(installed, tmp_path, "-c", page)
    assert "attentionMap" in (tmp_path / "map.html").read_text()
    assert (
        "<html"
        in run(
            installed,
            tmp_path,
            "-c",
            "from importlib.resources import files;"
            " print((files('tinytransformer')/'static/serve.html').read_text())",
        ).lower()
    )


def test_the_trained_tiny_is_in_it(installed, tmp_path):
    "It writes at once; with its history it makes the wheel larger by about two megabytes."
    command = ["-m", "tinytransformer", "generate", "tiny", " = Ingrid", "--max_new_tokens", "20"]
    assert run(installed, tmp_path, *command).startswith(" = Ingrid")
    files = [file for file in (installed / "tinytransformer/trained").rglob("*") if file.is_file()]
    assert {file.name for file in files} >= {
        "model.safetensors",
        "config.yaml",
        "summary.json",
        "history.bin",
    }
    assert sum(file.stat().st_size for file in files) < 2.2e6
