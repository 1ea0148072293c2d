"""What others ran into, in a run and around it: by-products that fail, diverged weights, signals,
odd files and paths, small containers, other folders."""

import json
from pathlib import Path

import pytest

from tinytransformer import runs, trackers
from tinytransformer.data import DataConfig
from tinytransformer.files import read_rows
from tinytransformer.model import ModelConfig
from tinytransformer.runs import train_run
from tinytransformer.train import TrainConfig

SHAPE = ModelConfig(seq_len=32, embed_dim=16, num_heads=2, num_layers=1, dropout=0.1)
SHORT = TrainConfig(max_steps=6, warmup_steps=2, eval_every=2, batch_size=4)


def data_in(folder: Path) -> DataConfig:
    return DataConfig(articles=60, vocab_size=300, data_dir=str(folder / "data"))


# --- by-products


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    "A folder with a run in which nothing failed."
    folder = tmp_path_factory.mktemp("undisturbed")
    train_run(folder / "run", data_in(folder), SHAPE, SHORT, write=lambda model: "a text")
    return folder


def fail(*args, **kwargs):
    raise ZeroDivisionError("broken\nin two lines")


def fail_in_eval_mode(model):
    model.eval()  # dropout would be off from here on
    fail()


@pytest.mark.parametrize("broken", ["sample", "log", "bar", "tracker", "picture", "sample file"])
def test_by_products_cannot_undo_the_work(undisturbed, tmp_path, monkeypatch, capsys, broken):
    "Each failure is reported once, in one line, and the run is the same run."
    write, log, train = (lambda model: "a text"), (lambda row: None), SHORT
    if broken == "sample":
        write = fail_in_eval_mode
    elif broken == "log":
        log = fail
    elif broken == "bar":
        monkeypatch.setattr(trackers.tqdm, "update", fail)
    elif broken == "tracker":
        train = TrainConfig(**vars(SHORT) | dict(track="tensorboard"))
        monkeypatch.setattr(trackers.TensorBoardTracker, "log", fail)
    elif broken == "picture":
        monkeypatch.setattr(runs, "plot_metrics", fail)
    else:
        monkeypatch.setattr(trackers.RunLog, "log_sample", fail)
    run = tmp_path / "run"
    train_run(run, data_in(undisturbed), SHAPE, train, write=write, log=log)
    said = capsys.readouterr().err
    assert said.count("broken in two lines") == 1, said
    assert len(said.strip().splitlines()) == 1
    whole = undisturbed / "run"
    for name in ("last/model.safetensors", "best/model.safetensors", "summary.json"):
        assert (run / name).read_bytes() == (whole / name).read_bytes()
    assert [row["step"] for row in read_rows(run / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]


class PowerCut(BaseException):
    pass


@pytest.mark.parametrize("moment", ["row", "sample"])
def test_killed_between_a_checkpoint_and_its_by_products(
    undisturbed, tmp_path, monkeypatch, moment
):
    "The checkpoint is there already, and a resumed run has all rows and samples, each once."

    def cut(*args):
        if json.loads((tmp_path / "run/last/checkpoint.json").read_text())["step"] == 4:
            raise PowerCut

    def write(model):
        cut()
        return "a text"

    data, run = data_in(undisturbed), tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(PowerCut):
        if moment == "row":
            add = trackers.JsonLines.add
            patch.setattr(
                trackers.JsonLines,
                "add",
                lambda self, row: (row["step"] == 4 and cut(), add(self, row)),
            )
        train_run(run, data, SHAPE, SHORT, write=write)
    train_run(run, data, SHAPE, SHORT, resume=True, write=lambda model: "a text")
    whole = undisturbed / "run"
    for name in ("last/model.safetensors", "samples.jsonl", "summary.json"):
        assert (run / name).read_bytes() == (whole / name).read_bytes()
    assert [row["step"] for row in read_rows(run / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
