"""The hand-written JavaScript, formatted and linted by Biome, which npm installs."""

import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT

BIOME = ROOT / "node_modules" / ".bin" / "biome"


@pytest.fixture(scope="module")
def biome():
    "`biome ci` in a folder."
    if not shutil.which("node"):
        pytest.skip("Biome checks the JavaScript and needs Node.js: install it, then run `npm ci`")
    if not BIOME.exists():
        pytest.skip("Biome checks the JavaScript and is not installed: run `npm ci`")

    def run(folder: Path, *args: str) -> subprocess.CompletedProcess:
        command = [BIOME, "ci", "--colors=off", *args]
        return subprocess.run(command, cwd=folder, capture_output=True, text=True)

    return run


def test_javascript_is_formatted_and_linted(biome):
    done = biome(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    "text, rule",
    [
        ("export const a = nowhere;\n", "noUndeclaredVariables"),
        ("const a = 1;\nexport default 2;\n", "noUnusedVariables"),
        ("export function a() {\n" + "  a();\n" * 61 + "}\n", "noExcessiveLinesPerFunction"),
        ("export const a   = 1;\n", "format"),
    ],
)
def test_faults_are_found(biome, tmp_path, text, rule):
    (tmp_path / "biome.json").write_bytes((ROOT / "biome.json").read_bytes())
    file = tmp_path / "tinytransformer" / "static" / "a.js"
    file.parent.mkdir(parents=True)
    file.write_text(text)
    done = biome(tmp_path, "--vcs-enabled=false")
    assert done.returncode == 1 and rule in done.stdout + done.stderr
