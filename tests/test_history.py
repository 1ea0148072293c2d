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
from tinytransformer.history import (
    PackedHistory,
    induction_scores,
    learning_history,
    measure,
    pack_history,
    quantize,
    read_articles,
    read_history,
    read_packed_history,
)
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


@pytest.fixture(scope="module")
def shipped():
    run = load_run("tiny")
    return read_packed_history(run.folder), run.model


@pytest.fixture(scope="module")
def articles_of_tiny():
    return read_articles(load_run("tiny"))


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


@pytest.mark.slow
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


@pytest.mark.slow
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


def test_a_history_is_packed_to_half_a_step(kept):
    "Also rows of zeros; and the file that comes of it is read back, or refused if cut."
    packed = pack_history(load_run(kept), [0, 2], rows=[{"step": 0}])
    whole = packed.to_bytes()
    assert PackedHistory.from_bytes(whole) == packed
    for step in (0, 2):
        weights = safetensors.torch.load_file(kept / f"history/{step}.safetensors")
        found = packed.weights(step)
        assert list(found) == list(weights)
        for name, tensor in weights.items():
            codes, scales = quantize(tensor)
            assert (found[name] - tensor).abs().le(0.501 * scales).all(), (step, name)
            assert torch.equal(found[name], codes * scales.float()), (step, name)
    for damaged in (whole[:-1], whole[:50], b"", b"[]\n", b'{"format": 2, "sizes": {}}\n'):
        with pytest.raises(InputError, match="no packed history, or a part of it is missing"):
            PackedHistory.from_bytes(damaged)
    with pytest.raises(InputError, match="has kept no weights of step 1: give others"):
        pack_history(load_run(kept), [0, 1], rows=[])
    with pytest.raises(InputError, match="run has no history.bin"):
        read_packed_history(kept)


def test_the_shipped_history_is_that_of_the_table(shipped, articles_of_tiny):
    "Its few bits cost at most some hundredths of a nat (measured: 0.03), and of a share."
    history, model = shipped
    rows = {row["step"]: row for row in history.rows}
    assert list(rows.values()) == json.loads((ROOT / "benchmarks/results/history.json").read_text())
    assert list(history.packed) == [0, 100, 200, 300, 400, 440, 480, 600, 1000]
    for step in history.packed:
        model.load_state_dict(history.weights(step), strict=False)  # a tied matrix is there once
        found, row = measure(model, articles_of_tiny), rows[step]
        assert found["excess"] == pytest.approx(row["excess"], abs=0.05), step
        assert found["recall"] == pytest.approx(row["recall"], abs=0.06), step
        assert flat(found["looks"]) == pytest.approx(flat(row["looks"]), abs=0.08), step


def test_the_table_ends_with_the_shipped_model(articles_of_tiny):
    "Its last row is measured again here; `tiny` itself keeps no other whole weights."
    last = json.loads((ROOT / "benchmarks/results/history.json").read_text())[-1]
    run = load_run("tiny")
    row = measure(run.model, articles_of_tiny)
    row["induction"] = induction_scores(run.model).tolist()
    assert last["step"] == run.checkpoint["step"]
    assert row["recall"] == pytest.approx(last["recall"], abs=0.01)
    for name in ("excess", "looks", "induction"):
        for mine, its in zip(flat(row[name]), flat(last[name]), strict=True):
            assert mine == pytest.approx(its, abs=0.01), name


@pytest.mark.slow
def test_a_history_is_measured_step_by_step(articles_of_tiny):
    "The shipped run keeps no weights but its own, so that its table has one row."
    (row,) = learning_history(run := load_run("tiny"))
    assert row["step"] == run.checkpoint["step"]
    assert row["excess"] == measure(run.model, articles_of_tiny)["excess"]


def flat(value):
    if isinstance(value, dict):
        value = list(value.values())
    return [part for inner in value for part in flat(inner)] if isinstance(value, list) else [value]
