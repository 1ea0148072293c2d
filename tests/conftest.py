"""What the tests share: a small trained run, and the choice to talk to the Hub."""
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["--data.articles", "60", "--data.vocab_size", "300", "--model.seq_len", "32", "--model.embed_dim", "16", "--model.num_layers", "1",
         "--train.max_steps", "6", "--train.eval_every", "3", "--sample.max_new_tokens", "5"]  # seconds, not minutes


def pytest_addoption(parser):
    parser.addoption("--hub", action="store_true", help="also run the tests that talk to the Hub")
    parser.addoption("--kills", type=int, default=1, help="how often each of the killing tests kills, at random moments")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--hub"): return
    for item in items:
        if "hub" in item.keywords: item.add_marker(pytest.mark.skip(reason="needs the Hugging Face Hub: ask for it with --hub"))


def pytest_configure(config):
    "One thread for each worker and for the commands it starts: there are as many workers as cores, and sums over other numbers of threads differ in their last bits."
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
