"""The small model of the book: the run that comes with the package, and the recipe that made it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tinytransformer.checkpoint import same_text
from tinytransformer.cli import main
from tinytransformer.config import config_file, read_config
from tinytransformer.corpus import prepare
from tinytransformer.data import DataConfig
from tinytransformer.files import read_json, read_rows
from tinytransformer.model import ModelConfig
from tinytransformer.runs import TRAINED, compare_with_floor, load_run, near_floor
from tinytransformer.tinywiki import WIKI, continuations
from tinytransformer.train import TrainConfig, evaluate

COMMAND = str(Path(sys.executable).with_name("tinytransformer"))


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file()
    }


@pytest.fixture(scope="module")
def run():
    return load_run("tiny")


@pytest.fixture(scope="module")
def summary(run):
    return read_json(run.folder / "summary.json")


def test_the_shipped_run_has_the_committed_recipe(run):
    "Every setting of tiny.yaml, so that the recipe cannot change while the weights stay."
    recipe = read_config(config_file("tiny"))
    for section, cls in dict(data=DataConfig, model=ModelConfig, train=TrainConfig).items():
        shipped = run.config[section] | (dict(vocab_size=None) if section == "model" else {})
        assert cls(**shipped) == cls(**recipe[section])
    assert run.config["sample"].items() >= recipe["sample"].items()


def test_the_shipped_numbers_are_what_its_weights_give(run, summary, tmp_path):
    "On this processor and with text prepared here; both are the same up to rounding."
    corpus = prepare(DataConfig(**run.config["data"] | dict(data_dir=str(tmp_path / "data"))))
    assert corpus.content == run.checkpoint["tokens"]
    assert evaluate(run.model, corpus.streams["validation"]) == pytest.approx(
        summary["val_loss"], rel=1e-4
    )
    found = compare_with_floor(run.model, corpus)
    assert found["sliding_loss"] == pytest.approx(summary["sliding_loss"], rel=1e-4)
    assert found["fact_recall"] == pytest.approx(summary["fact_recall"], abs=2e-3)
    assert near_floor(summary | found) and summary["floor"] == corpus.floor("validation")


@pytest.mark.slow
def test_the_recipe_makes_it(run, summary, tmp_path):
    """The README's first command, on one thread: near the floor here as well, and step by step what
    was shipped, as long as rounding has not grown. Chapter 05, which every run of the tests
    executes, trains the same recipe by the plain loop and holds it to the same bar.
    """
    env = os.environ | dict(OMP_NUM_THREADS="1")
    done = subprocess.run(
        [COMMAND, "train", "--config", "tiny"],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    mine = tmp_path / "runs/tiny"
    assert near_floor(read_json(mine / "summary.json")), done.stdout
    assert "facts recalled: " in done.stdout and "train for longer" not in done.stdout
    losses = [
        [row["loss"] for row in read_rows(folder / "metrics.jsonl")[:20]]
        for folder in (mine, run.folder)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    here, there = (
        json.loads((folder / "environment.json").read_text())[-1] for folder in (mine, run.folder)
    )
    if all(
        here[name] == there[name] for name in ("processor", "instructions", "threads", "versions")
    ):
        weights = [
            (folder / "best/model.safetensors").read_bytes() for folder in (mine, run.folder)
        ]
        assert weights[0] == weights[1], (
            "the machine that made the shipped run makes other weights now"
        )


def test_a_training_that_misses_the_bar_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main(
        [
            "train",
            "--config",
            "tiny",
            "--train.max_steps",
            "3",
            "--data.articles",
            "60",
            "--data.vocab_size",
            "300",
        ]
    )
    assert "this one does not: train for longer (--train.max_steps)" in capsys.readouterr().out


def test_it_writes_right_after_installation(tmp_path):
    "In an empty folder, with nothing prepared; an article for a name has facts that agree."
    done = subprocess.run(
        [COMMAND, "generate", "tiny", " = Ingrid", "--temperature", "0"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    article = done.stdout.rstrip("\n").split("\n = ")[0]
    assert len(article) > 100 and continuations(WIKI, article)
    assert list(tmp_path.iterdir()) == []


def test_commands_open_it_and_leave_it_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    before = contents(TRAINED["tiny"])
    main(["evaluate", "tiny"])
    row = capsys.readouterr().out.splitlines()[1].split()
    assert float(row[5]) == pytest.approx(
        read_json(TRAINED["tiny"] / "summary.json")["val_loss"], abs=1e-3
    )
    main(["compare", "tiny", " =", "--max_new_tokens", "5"])
    main(["export", "tiny", "twin"])
    assert (tmp_path / "twin/model.safetensors").is_file()
    with pytest.raises(
        SystemExit,
        match="tiny comes with the package and stays as it is: train your own with --config tiny",
    ):
        main(["train", "--resume", "tiny"])
    assert contents(TRAINED["tiny"]) == before


def test_a_folder_of_that_name_comes_first(tmp_path, monkeypatch, workspace):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").symlink_to(workspace / "runs/small")
    assert load_run("tiny").model.cfg.embed_dim == 16


def test_a_text_is_known_by_its_tokens():
    """Files may differ, as other versions write them; older checkpoints say only which files they
    were.
    """
    here = dict(data="files", tokens="digest")
    assert same_text(dict(data="other files", tokens="digest"), here)
    assert same_text(dict(data="files"), here)
    assert not same_text(dict(data="other files"), here)
    assert not same_text(dict(data="other files", tokens="other"), here)
