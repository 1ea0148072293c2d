"""What the tests share: options, a small trained run, commands, servers, a browser and
JupyterLab."""

import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from commands import COMMAND, CommandProcess, CommandServer
from filelock import FileLock
from playwright.sync_api import Error, Page, sync_playwright

ROOT = Path(__file__).resolve().parent.parent
SMALL = (
    "--data.articles 60 --data.vocab_size 300 --model.seq_len 32 --model.embed_dim 16"
    " --model.num_layers 1 --train.max_steps 6 --train.eval_every 3 --sample.max_new_tokens 5"
    " --train.optimizer adamw --train.learning_rate 0.01 --train.seed 0"
).split()  # seconds, not minutes
SWITCHES = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    " --disable-component-update --disable-sync"
).split()
CONTEXT = 1536  # of the run that is served: texts long enough that a test has time to look on
TOGETHER = {  # files whose tests share a server or a browser
    "test_serve": "server",
    "test_docker": "server",
    "test_attention_map": "browser",
    "test_drawings": "browser",
    "test_jupyter": "JupyterLab",
}
LEFT_OUT = {
    "hub": "talks to the Hugging Face Hub: ask for it with --hub",
    "slow": "takes long and rarely breaks: ask for it with --slow",
}


def pytest_addoption(parser):
    parser.addoption("--hub", action="store_true", help="also run the tests that talk to the Hub")
    parser.addoption(
        "--slow", action="store_true", help="also run what takes long and rarely breaks"
    )
    parser.addoption(
        "--kills", type=int, default=1, help="how often each killing test kills, at random moments"
    )


def pytest_configure(config):
    """One thread for PyTorch, here and in all processes that the tests start, because there are as
    many workers as cores. Compiled kernels go to a folder of this session: those that another
    setting of ATEN_CPU_CAPABILITY has left behind can abort a process.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if "PYTEST_XDIST_WORKER" not in os.environ:
        config.compiled = tempfile.TemporaryDirectory(prefix="tinytransformer-tests-")
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = config.compiled.name


def pytest_unconfigure(config):
    if hasattr(config, "compiled"):
        config.compiled.cleanup()


def pytest_collection_modifyitems(config, items):
    "Leave out what was not asked for, and begin with the notebooks."
    longest_first = dict(test_tiny=0, test_notebooks=1)
    items.sort(key=lambda item: longest_first.get(item.path.stem, 2))
    for item in items:
        for mark, reason in LEFT_OUT.items():
            if mark in item.keywords and not config.getoption(mark):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """With `-n`, give the tests of files that belong together to one worker, so that what they
    share is started once, and all others to whoever is free. (xdist_group would do, but xdist 3.8
    does not see it with pytest 9.2.)
    """
    if config.getoption("dist") != "load":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return TOGETHER.get(Path(nodeid.split("::")[0]).stem, nodeid)

    return Scheduling(config, log)


# --- folders and processes


@pytest.fixture(scope="session")
def once(tmp_path_factory) -> Callable[[str, Callable[[Path], None]], Path]:
    """`once(name, make)`: a folder that `make` fills for the first worker that asks; do not change
    it.
    """
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent  # the folder of the session, above those of the workers

    def folder_of_all(name: str, make: Callable[[Path], None]) -> Path:
        folder, done = base / f"{name}-of-all", base / f"{name}-is-made"
        with FileLock(base / f"{name}.lock"):
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                make(folder)
                done.touch()
        return folder

    return folder_of_all


@pytest.fixture(scope="session")
def commands(tmp_path_factory) -> Iterator[CommandServer]:
    "Starts commands in processes of their own, from a parent that has imported PyTorch."
    server = CommandServer(tmp_path_factory.mktemp("commands"))
    yield server
    server.close()


def train_small(folder: Path) -> None:
    "A small trained run in runs/small, and its data in data/."
    from tinytransformer.cli import main

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        main(["train", "--config", "tiny", "--folder", "runs/small", *SMALL])


@pytest.fixture(scope="session")
def small_run(once) -> Path:
    "A folder with a small trained run in runs/small and its data in data/; to be copied."
    return once("workspace", train_small)


@pytest.fixture(scope="session")
def workspace(small_run, tmp_path_factory) -> Path:
    "A copy of `small_run` for the tests of this worker, which add to it."
    folder = tmp_path_factory.mktemp("workspace")
    return shutil.copytree(small_run, folder, dirs_exist_ok=True)


@pytest.fixture
def here(workspace, monkeypatch) -> Path:
    "The workspace as the current folder."
    monkeypatch.chdir(workspace)
    return workspace


def refusal(*args: str) -> str:
    "The one line with which a command refuses."
    from tinytransformer.cli import main

    with pytest.raises(SystemExit) as stop:
        main(list(args))
    message = stop.value.code
    assert isinstance(message, str) and message.startswith("tinytransformer: ")
    assert "\n" not in message and "Traceback" not in message
    return message


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


# --- a server of completions


def train_for_serving(folder: Path) -> None:
    "A run that has learned next to nothing, with a long context: what it writes takes its time."
    from tinytransformer.cli import main

    longer = (
        f"--model.seq_len {CONTEXT} --model.num_heads 2 --train.max_steps 60 --train.eval_every 60"
    )
    quick = "--train.learning_rate 0.02 --train.batch_size 1"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        main(
            [
                "train",
                "--config",
                "tiny",
                "--folder",
                "runs/small",
                *SMALL,
                *longer.split(),
                *quick.split(),
            ]
        )


@pytest.fixture(scope="session")
def served_run(once) -> Path:
    "The folder of the run that is served; it is shared by all workers."
    return once("served", train_for_serving) / "runs/small"


def wait_for_address(
    server: subprocess.Popen | CommandProcess, log: Path, seconds: float = 120
) -> str:
    "The address that a server on this machine writes into its log."
    end = time.monotonic() + seconds
    while not (found := re.search(r"http://127\.0\.0\.1:\d+", log.read_text())):
        ended = server.poll() is not None
        assert not ended, f"the server has ended: {log.read_text()} {server.communicate()}"
        assert time.monotonic() < end, f"no address after {seconds} seconds: {log.read_text()}"
        time.sleep(0.05)
    return found[0]


class Served:
    "A server that runs, and writes its address into the file `out`."

    def __init__(self, process: subprocess.Popen | CommandProcess, out: Path):
        self.process, self.url = process, wait_for_address(process, out)

    def end(self) -> tuple[int, str]:
        self.process.terminate()
        _, err = self.process.communicate(timeout=120)
        return self.process.returncode, err


@pytest.fixture(scope="session")
def served(served_run, tmp_path_factory) -> Iterator[Served]:
    "The installed command, for the tests of one group; in the end it must have had no complaints."
    out = tmp_path_factory.mktemp("served") / "stdout"
    command = [COMMAND, "serve", str(served_run), "--port", "0"]
    with out.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.PIPE, text=True)
    served = Served(process, out)
    yield served
    assert served.end() == (0, "")


# --- browser and JupyterLab


@contextlib.contextmanager
def browser_or_skip() -> Iterator[None]:
    try:
        yield
    except Error as error:
        if "Executable doesn't exist" not in str(error):
            raise
        pytest.skip(
            "needs a browser: install Debian's chromium, or run `playwright install chromium`"
        )


@pytest.fixture(scope="module")
def launch():
    "Starts a browser with a profile of its own."
    with sync_playwright() as playwright:
        opened = []

        def start(folder, **options):
            with browser_or_skip():
                context = playwright.chromium.launch_persistent_context(
                    str(folder), executable_path=shutil.which("chromium"), args=SWITCHES, **options
                )
            opened.append(context)
            return context

        yield start
        for context in opened:
            context.close()


@contextlib.contextmanager
def jupyter_lab(folder: Path, *begin: str) -> Iterator[str]:
    """JupyterLab in `folder`, on a free port of this machine: its address; the token is abc. Its
    messages are in the file `log`, and what it would have a browser open is in `runtime/`.
    """
    options = [
        "--no-browser",
        "--allow-root",
        "--ServerApp.port=0",
        "--ServerApp.ip=127.0.0.1",
        "--IdentityProvider.token=abc",
        "--LabApp.expose_app_in_browser=True",
        "--LabApp.news_url=",
        "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
    ]
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "jupyter", "lab", *begin, *options],
            cwd=folder,
            stderr=log,
            stdout=log,
            env=os.environ | dict(JUPYTER_RUNTIME_DIR=str(folder / "runtime")),
        )
    try:
        yield wait_for_address(server, folder / "log")
    finally:
        server.terminate()
        try:
            server.wait(10)
        except subprocess.TimeoutExpired:
            server.kill()


@pytest.fixture(scope="session")
def book(tmp_path_factory) -> Iterator[tuple[Path, str]]:
    """JupyterLab as the README starts it, for the tests of one file: its folder and its
    address. The folder is a copy of the project, so that nothing is saved over ours; what was
    prepared and trained is shared.
    """
    folder = tmp_path_factory.mktemp("book")
    ignore = shutil.ignore_patterns(".ipynb_checkpoints")
    shutil.copytree(ROOT / "nbs", folder / "nbs", symlinks=True, ignore=ignore)
    for name in ("data", "runs", "benchmarks"):
        (ROOT / name).mkdir(exist_ok=True)
        (folder / name).symlink_to(ROOT / name)
    command = re.search(r"`jupyter lab (\S+)`", (ROOT / "README.md").read_text())
    with jupyter_lab(folder, command[1]) as address:
        yield folder, address


def run_all(page: Page, panel: str = "jupyterapp.shell.currentWidget") -> None:
    "Run all cells, as the menu does, once the kernel can be reached."
    connected = f"{panel}?.sessionContext?.session?.kernel?.connectionStatus === 'connected'"
    page.wait_for_function(f"window.jupyterapp && {connected}", timeout=60_000)
    page.evaluate(
        f"jupyterapp.commands.execute('notebook:run-all-cells', {{semanticWidget: {panel}.id}})"
    )
