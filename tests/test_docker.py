"""The images, as far as can be seen without building them: every path, command and version in
them is there and works outside."""

import json
import re
import shutil
import subprocess
import sys
import zipfile
from configparser import ConfigParser
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

from tinytransformer.cli import parse

BIN = Path(sys.executable).parent
COMPOSE = yaml.safe_load((ROOT / "docker/compose.yaml").read_text())
# of the Compose specification, what is used here
KNOWN = {
    "image",
    "build",
    "entrypoint",
    "command",
    "environment",
    "ports",
    "volumes",
    "healthcheck",
    "depends_on",
    "profiles",
    "stop_grace_period",
}


def stages() -> dict[str, list[tuple[str, str]]]:
    "Instructions of each stage, those of the stage it stands on first."
    found, name = {}, None
    for line in (ROOT / "docker/Dockerfile").read_text().splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        instruction, rest = line.split(" ", 1)
        if instruction == "FROM":
            base, _, name = rest.split(" ")
            found[name] = list(found.get(base, []))
        else:
            found[name].append((instruction, rest))
    return found


def last(stage: str, instruction: str) -> str:
    return [rest for name, rest in stages()[stage] if name == instruction][-1]


def sources() -> list[str]:
    return [
        source for name, rest in stages()["base"] if name == "COPY" for source in rest.split()[:-1]
    ]


def test_hadolint():
    done = subprocess.run(
        [BIN / "hadolint", ROOT / "docker/Dockerfile"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


def test_what_is_copied():
    "In git, and let through by .dockerignore; nothing else is let through."
    kept = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    allowed = [
        line[1:]
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line.startswith("!")
    ]
    assert sorted(allowed) == sorted(sources()) and all(
        any(f == source or f.startswith(f"{source}/") for f in kept) for source in sources()
    )


@pytest.fixture
def copied(tmp_path):
    "What the image gets, in a folder of its own."
    for source in sources():
        (shutil.copytree if (ROOT / source).is_dir() else shutil.copy)(
            ROOT / source, tmp_path / source
        )
    return tmp_path


def test_that_is_enough_for_setup(copied):
    "setup.py finds all that it reads."
    done = subprocess.run(
        [sys.executable, "setup.py", "--name", "--version"],
        cwd=copied,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and done.stdout.split()[0] == "tinytransformer", done.stderr


@pytest.mark.slow
def test_that_is_enough_for_the_package(copied):
    "A wheel is built from what is copied, with the files of the page in it."
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "-q",
            "--no-deps",
            "--no-build-isolation",
            "-w",
            "out",
            ".",
        ],
        cwd=copied,
        check=True,
    )
    names = zipfile.ZipFile(next((copied / "out").glob("*.whl"))).namelist()
    assert {
        f"tinytransformer/{name}"
        for name in (
            "serve/__init__.py",
            "serve/app.py",
            "static/serve.html",
            "static/serve.js",
            "static/attention_map.js",
            "configs/tiny.yaml",
        )
    } <= set(names)


def test_versions():
    "What is installed is pinned, and the extras are there."
    settings = ConfigParser(delimiters=["="])
    settings.read(ROOT / "settings.ini")
    runs = [
        rest
        for stage in stages().values()
        for name, rest in stage
        if name == "RUN" and "pip install" in rest
    ]
    assert len(re.findall(r"(?m)^torch==", (ROOT / "constraints.txt").read_text())) == 1
    for run in runs:
        assert "-c constraints.txt" in run or "grep '^torch==' constraints.txt" in run
    assert {extra for run in runs for extra in re.findall(r"'\.\[(\w+)\]'", run)} == {
        "track",
        "serve",
    } and all(f"{extra}_requirements" in settings["DEFAULT"] for extra in ("track", "serve"))


@pytest.mark.parametrize("stage", ["train", "serve"])
def test_commands(stage):
    "Understood by the command line; the user is not root."
    words = json.loads(last(stage, "ENTRYPOINT")) + json.loads(last(stage, "CMD"))
    assert words[0] == "tinytransformer" and parse(words[1:])[0] == stage
    assert int(last(stage, "USER")) > 0


def test_health(served):
    "The check passes while the server answers, and fails when nobody does."
    check = json.loads(last("serve", "HEALTHCHECK").split("CMD ")[1])

    def run(port):
        return subprocess.run(
            [sys.executable, *check[1:-1], check[-1].replace("127.0.0.1:8000", port)],
            capture_output=True,
        ).returncode

    assert (
        check[0] == "python"
        and run(served.url.removeprefix("http://")) == 0
        and run("127.0.0.1:9") != 0
    )


def test_compose():
    """Names that Compose knows; targets, volumes and services that exist; ports for this machine
    alone.
    """
    assert set(COMPOSE) == {"name", "services", "volumes"}
    for service in COMPOSE["services"].values():
        assert set(service) <= KNOWN
        folder = (ROOT / "docker" / service["build"]["context"]).resolve()
        assert (
            folder == ROOT
            and (folder / service["build"]["dockerfile"]).is_file()
            and service["build"]["target"] in stages()
        )
        assert all(
            volume.split(":")[0] in COMPOSE["volumes"] for volume in service.get("volumes", [])
        )
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
        assert set(service.get("depends_on", {})) <= set(COMPOSE["services"]) and all(
            "healthcheck" in COMPOSE["services"][name] for name in service.get("depends_on", {})
        )
    made = re.search(r"mkdir -p (.*?) &&", last("base", "RUN"))[1].split()
    assert {
        volume.split(":")[1]
        for service in COMPOSE["services"].values()
        for volume in service["volumes"]
    } <= set(made)  # or they would belong to root


@pytest.mark.slow
def test_commands_of_compose(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert parse(COMPOSE["services"]["train"]["command"])[0] == "train"
    mlflow = COMPOSE["services"]["mlflow"]
    knows = subprocess.run(
        [BIN / mlflow["entrypoint"][0], *mlflow["entrypoint"][1:], "--help"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert all(word in knows for word in mlflow["command"] if word.startswith("--"))
