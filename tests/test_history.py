"""How a model learned: the weights that a training keeps, what is measured of them, the slider."""

import json
from dataclasses import replace

import pytest
import safetensors.torch
import torch
from conftest import ROOT

from tinytransformer.checkpoint import kept_weights, read_checkpoint
from tinytransformer.corpus import prepare
from tinytransformer.data import DataConfig
from tinytransformer.files import InputError
from tinytransformer.history import induction_scores, learning_history, read_history
from tinytransformer.model import ModelConfig
from tinytransformer.runs import load_run, train_run
from tinytransformer.train import TrainConfig

SHAPE = ModelConfig(seq_len=32, embed_dim=16, num_heads=2, num_layers=1, dropout=0.1)
SHORT = TrainConfig(max_steps=4, warmup_steps=2, eval_every=2, keep_at=[0, 2, 3])


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    data = DataConfig(
        articles=60, vocab_size=300, data_dir=str(tmp_path_factory.mktemp("text") / "data")
    )
    return data, prepare(data)


@pytest.fixture(scope="module")
def kept(text, tmp_path_factory):
    "The folder of a short run that keeps its weights now and then."
    data, corpus = text
    return train_run(
        tmp_path_factory.mktemp("kept") / "run", data, SHAPE, SHORT, corpus=corpus
    ).folder


def contents(run):
    return {step: file.read_bytes() for step, file in kept_weights(run).items()}


def test_keeping_weights_changes_none(text, kept, tmp_path):
    "Neither those of the end nor what dropout draws on the way."
    data, corpus = text
    other = train_run(tmp_path / "run", data, SHAPE, replace(SHORT, keep_at=[]), corpus=corpus)
    assert not kept_weights(other.folder) and list(kept_weights(kept)) == [0, 2, 3]
    for name in ("best", "last"):
        mine, its = (
            read_checkpoint(run / name, state=False).weights for run in (other.folder, kept)
        )
        assert all(torch.equal(mine[key], its[key]) for key in mine.keys() | its.keys())


def test_what_was_killed_before_it_was_kept_is_made_up_for(text, kept, tmp_path):
    """A kill between the checkpoint of a step and the weights that are kept of it; the option may
    be given to a run that goes on.
    """

    class Killed(BaseException):
        pass

    def kill(row):
        if row["step"] == 3:
            raise Killed

    data, corpus = text
    run = tmp_path / "run"
    with pytest.raises(Killed):
        train_run(run, data, SHAPE, SHORT, corpus=corpus, log=kill)
    (run / "history/2.safetensors").unlink()
    train_run(run, data, SHAPE, SHORT, resume=True, corpus=corpus)
    assert contents(run) == contents(kept)
    more = replace(SHORT, max_steps=5, keep_at=[5])
    train_run(run, data, SHAPE, more, resume=True, corpus=corpus)
    assert list(contents(run)) == [0, 2, 3, 5]
    last = read_checkpoint(run / "last", state=False).weights
    halves = safetensors.torch.load_file(run / "history/5.safetensors")
    assert all(torch.equal(halves[name], last[name].half()) for name in last)


def test_a_history_that_cannot_be_written_ends_nothing(text, tmp_path, capsys):
    data, corpus = text
    (tmp_path / "run").mkdir()
    run = tmp_path / "run"

    def block(row):
        if row["step"] == 1:  # a file where the folder has to be
            (run / "history").write_text("")

    train_run(run, data, SHAPE, replace(SHORT, keep_at=[2, 3]), corpus=corpus, log=block)
    assert capsys.readouterr().err.count("the history failed") == 1


@pytest.mark.parametrize("steps", [[-1], [1.5], [True], ["3"], [10**13]])
def test_steps_that_are_none(steps):
    with pytest.raises(InputError, match=r"train.keep_at is \[.*\]: give a list of steps, each"):
        TrainConfig(keep_at=steps)


def test_history_is_read_back(kept):
    "Each step's weights in its turn, and last the model of the run."
    run = load_run(kept)
    norms = {step: model.embeddings.token.weight.norm().item() for step, model in read_history(run)}
    assert list(norms) == [0, 2, 3, 4] and len(set(norms.values())) == 4
    assert norms[4] == run.model.embeddings.token.weight.norm().item()
    assert induction_scores(run.model, n=16).shape == (1, 2)


def test_weights_of_another_model_are_refused(kept, tmp_path):
    run = load_run(kept)
    shape = replace(SHAPE, embed_dim=32)
    run.model = type(run.model)(replace(shape, vocab_size=300))
    with pytest.raises(InputError, match="the weights are of another model"):
        next(read_history(run))


def test_the_table_ends_with_the_shipped_model():
    "Its last row is measured again here; `tiny` itself keeps no other weights."
    rows = json.loads((ROOT / "benchmarks/results/history.json").read_text())
    (row,) = learning_history(load_run("tiny"))
    assert row["step"] == rows[-1]["step"] and row["recall"] == pytest.approx(
        rows[-1]["recall"], abs=0.01
    )
    for name in ("excess", "looks", "induction"):
        for mine, its in zip(flat(row[name]), flat(rows[-1][name]), strict=True):
            assert mine == pytest.approx(its, abs=0.01), name


def flat(value):
    if isinstance(value, dict):
        value = list(value.values())
    return [part for inner in value for part in flat(inner)] if isinstance(value, list) else [value]
