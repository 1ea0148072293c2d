"""What the tests share: a small trained run, a browser, JupyterLab, and the choice to talk to
the Hub."""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from playwright.sync_api import Error, Page, sync_playwright

ROOT = Path(__file__).resolve().parent.parent
SMALL = [
    "--data.articles",
    "60",
    "--data.vocab_size",
    "300",
    "--model.seq_len",
    "32",
    "--model.embed_dim",
    "16",
    "--model.num_layers",
    "1",
    "--train.max_steps",
    "6",
    "--train.eval_every",
    "3",
    "--sample.max_new_tokens",
    "5",
]  # seconds, not minutes
SWITCHES = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync".split()


def pytest_addoption(parser):
    parser.addoption("--hub", action="store_true", help="also run the tests that talk to the Hub")
    parser.addoption(
        "--kills",
        type=int,
        default=1,
        help="how often each of the killing tests kills, at random moments",
    )


def pytest_collection_modifyitems(config, items):
    items.sort(
        key=lambda item: dict(test_notebooks=0, test_jupyter=2).get(item.path.stem, 1)
    )  # the first one trains `tiny` while the other workers need no model; the chapters in JupyterLab find it there
    if config.getoption("--hub"):
        return
    for item in items:
        if "hub" in item.keywords:
            item.add_marker(
                pytest.mark.skip(reason="needs the Hugging Face Hub: ask for it with --hub")
            )


def pytest_configure(config):
    """One thread for each worker and for the commands it starts: there are as many workers as
    cores, and sums over other numbers of threads differ in their last bits.
    """
    import torch

    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)
        os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(scope="session")
def workspace(tmp_path_factory):
    "A folder with a small trained run in runs/small and its data in data/."
    from tinytransformer.cli import main

    folder = tmp_path_factory.mktemp("workspace")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        main(["train", "--config", "tiny", "--folder", "runs/small", *SMALL])
    return folder


@pytest.fixture
def here(workspace, monkeypatch):
    "The workspace as the current folder."
    monkeypatch.chdir(workspace)
    return workspace


@pytest.fixture(scope="module")
def launch():
    "Starts a browser with a profile of its own."
    with sync_playwright() as playwright:
        opened = []

        def start(folder, **options):
            try:
                context = playwright.chromium.launch_persistent_context(
                    str(folder), executable_path=shutil.which("chromium"), args=SWITCHES, **options
                )
            except Error as error:
                if "Executable doesn't exist" not in str(error):
                    raise
                pytest.skip(
                    "needs a browser: install Debian's chromium, or run `playwright install chromium`"
                )
            opened.append(context)
            return context

        yield start
        for context in opened:
            context.close()


@contextmanager
def jupyter_lab(folder: Path, *begin: str) -> Iterator[str]:
    """JupyterLab in `folder`, on a free port of this machine: its address; the token is abc. What
    it says is in `log`, and what it would have a browser open in `runtime/`.
    """
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "jupyter",
                "lab",
                *begin,
                "--no-browser",
                "--allow-root",
                "--ServerApp.port=0",
                "--ServerApp.ip=127.0.0.1",
                "--IdentityProvider.token=abc",
                "--LabApp.expose_app_in_browser=True",
                "--LabApp.news_url=",
                "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
            ],
            cwd=folder,
            stderr=log,
            stdout=log,
            env=os.environ | dict(JUPYTER_RUNTIME_DIR=str(folder / "runtime")),
        )
    for _ in range(600):
        if server.poll() is not None or (
            found := re.search(r"http://127\.0\.0\.1:\d+", (folder / "log").read_text())
        ):
            break
        time.sleep(0.1)
    assert found, (folder / "log").read_text()
    yield found[0]
    server.terminate()
    try:
        server.wait(10)
    except subprocess.TimeoutExpired:
        server.kill()


def run_all(page: Page, panel: str = "jupyterapp.shell.currentWidget") -> None:
    "As the menu does, once the kernel can be reached."
    page.wait_for_function(
        f"window.jupyterapp && {panel}?.sessionContext?.session?.kernel?.connectionStatus === 'connected'",
        timeout=60_000,
    )
    page.evaluate(
        f"jupyterapp.commands.execute('notebook:run-all-cells', {{semanticWidget: {panel}.id}})"
    )
