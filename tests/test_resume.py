"""Runs that are killed, stopped, shared or damaged go on as if nothing had happened.

`--kills N` kills N times at random. A process that is to be interrupted waits before a step that
the test has chosen (see commands.py), so that no machine is too fast or too slow for it."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from commands import COMMAND, CommandProcess
from commands import __file__ as SCRIPT
from conftest import SMALL, free_port, refusal

from tinytransformer.cli import main

BIN = Path(sys.executable).parent
TORCHRUN = [str(BIN / "torchrun"), "--nproc-per-node", "2"]
STEPS = 60  # several epochs, twelve checkpoints
LONGER = [*SMALL, "--data.articles", "20", "--model.dropout", "0.1"]
TRAIN = [
    "train",
    "--config",
    "tiny",
    *LONGER,
    "--train.max_steps",
    str(STEPS),
    "--train.eval_every",
    "5",
]


def pytest_generate_tests(metafunc):
    if "kill" in metafunc.fixturenames:
        metafunc.parametrize("kill", range(metafunc.config.getoption("--kills")))


def start_installed(folder: Path, *args: str, launcher=(COMMAND,), faults=None) -> subprocess.Popen:
    "The installed command, or a launcher's, in a process group of its own."
    return subprocess.Popen(
        [*launcher, *args],
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | dict(FAULTS=json.dumps(faults or {})),
    )


def finish(*processes: subprocess.Popen | CommandProcess) -> str:
    "What the first has written to stderr, once all have ended well."
    written = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), written
    return written[0]


@pytest.fixture(scope="session")
def start(commands):
    "Starts a command in a folder."
    return commands.start


@pytest.fixture(scope="session")
def start_two(commands):
    "Starts the two processes of a training, as `torchrun` would."

    def start(folder: Path, *args: str, **options) -> list[CommandProcess]:
        where = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
        ranks = [where | dict(RANK=rank, LOCAL_RANK=rank) for rank in "01"]
        return [commands.start(folder, *args, env=env, **options) for env in ranks]

    return start


def steps(run: Path) -> int:
    file = run / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def checkpoint_step(run: Path) -> int:
    file = run / "last/checkpoint.json"
    return json.loads(file.read_text())["step"] if file.exists() else 0


def wait_for_step(process: subprocess.Popen | CommandProcess, run: Path, step: int) -> None:
    while steps(run) < step:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.005)


def kill_all(process: subprocess.Popen | CommandProcess) -> None:
    "The process and all that it has started."
    for child in psutil.Process(process.pid).children(recursive=True):
        child.kill()
    process.kill()
    process.wait()


def outcome(run: Path) -> dict:
    "Everything a run came to, except what is measured by the clock."
    clock = ("tokens_per_second", "memory_mb")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    rows = [{name: value for name, value in row.items() if name not in clock} for row in rows]
    names = ("last/model.safetensors", "best/model.safetensors", "samples.jsonl", "summary.json")
    return dict(rows=rows, **{name: (run / name).read_bytes() for name in names})


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in outcome(run)["rows"]]


def contents(run: Path) -> dict:
    return {f: f.read_bytes() for f in run.rglob("*") if f.is_file()}


@pytest.fixture
def held(tmp_path) -> Path:
    "Processes with the fault hold: [n, held] wait before step n + 1 while this file is there."
    (tmp_path / "held").touch()
    return tmp_path / "held"


# --- runs that nobody has interrupted, and half of one: made once for all workers


def copy_of(folder: Path, tmp_path_factory) -> Path:
    return shutil.copytree(folder, tmp_path_factory.mktemp("resume"), dirs_exist_ok=True)


@pytest.fixture(scope="session")
def runs(once, start, tmp_path_factory) -> Path:
    """A folder with prepared data and two runs: `whole`, and `half`, which was stopped after 25
    steps.
    """

    def make(folder: Path) -> None:
        finish(start(folder, *TRAIN, "--folder", "runs/whole"))
        (folder / "held").touch()
        half = start(
            folder, *TRAIN, "--folder", "runs/half", faults=dict(hold=[24, str(folder / "held")])
        )
        wait_for_step(half, folder / "runs/half", 24)
        half.terminate()
        half.wait()
        assert steps(folder / "runs/half") == checkpoint_step(folder / "runs/half") == 25

    return copy_of(once("resume", make), tmp_path_factory)


@pytest.fixture(scope="session")
def runs_of_two(once, runs, start_two, tmp_path_factory) -> Path:
    "A folder with prepared data and a whole run of two processes."

    def make(folder: Path) -> None:
        shutil.copytree(runs / "data", folder / "data")
        finish(*start_two(folder, *TRAIN, "--folder", "runs/whole"))

    return copy_of(once("resume-two", make), tmp_path_factory)


@pytest.fixture
def half(runs, tmp_path, monkeypatch) -> Path:
    "A copy of the run that was stopped after its 25th step, with its data, in the current folder."
    for name in ("data", "runs/half"):
        shutil.copytree(runs / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs/half"


# --- killed


def test_killed_at_a_random_step(start, runs, held, kill):
    """SIGKILL twice, at random steps and moments, mostly in the middle of an epoch: byte for byte
    the run that was never killed.
    """
    dice, run = random.Random(kill), runs / f"runs/killed-{kill}"
    args = [*TRAIN, "--folder", str(run)]
    for step in sorted(dice.sample(range(1, STEPS - 5), 2)):
        last = STEPS - 2 - checkpoint_step(run)  # should the kill be late, the process waits for it
        process = start(runs, *args, faults=dict(hold=[last, str(held)]))
        wait_for_step(process, run, step)
        time.sleep(dice.random() / 100)
        os.killpg(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        args = ["train", "--resume", str(run)]
    assert not (run / "summary.json").exists()
    finish(start(runs, *args))
    assert outcome(run) == outcome(runs / "runs/whole")


def test_installed_command_killed(runs, held):
    "The same through the installed command: killed, resumed, and equal."
    run = runs / "runs/killed-installed"
    faults = dict(hold=[STEPS - 2, str(held)])
    command = [sys.executable, SCRIPT]  # the command with a fault
    process = start_installed(runs, *TRAIN, "--folder", str(run), launcher=command, faults=faults)
    wait_for_step(process, run, 33)
    kill_all(process)
    finish(start_installed(runs, "train", "--resume", str(run)))
    assert outcome(run) == outcome(runs / "runs/whole")


def test_killed_while_writing(start, runs, kill):
    """SIGKILL just before a random flush, rename or deletion, most of them while a checkpoint is
    written.
    """
    dice, run = random.Random(kill), runs / f"runs/writing-{kill}"
    first = start(
        runs, *TRAIN, "--folder", str(run), faults=dict(kill_at_write=dice.randrange(4, 130))
    )
    assert first.wait() == -signal.SIGKILL, first.communicate()
    again = (
        ["train", "--resume", str(run)]
        if (run / "config.yaml").exists()
        else [*TRAIN, "--folder", str(run)]
    )
    finish(start(runs, *again))
    assert outcome(run) == outcome(runs / "runs/whole")
    assert not list(run.glob(".last.*")) and not list(run.glob(".best.*"))  # leftovers are removed


def test_two_processes_killed(start_two, runs_of_two, held, kill):
    "One rank alone, and the other ends by itself with a line that says so; or both at once."
    dice, run = random.Random(kill), runs_of_two / f"runs/two-{kill}"
    step = dice.randrange(1, STEPS - 10)
    ranks = start_two(
        runs_of_two, *TRAIN, "--folder", str(run), faults=dict(hold=[STEPS - 2, str(held)])
    )
    wait_for_step(ranks[0], run, step)
    killed = ranks if kill % 2 else [dice.choice(ranks)]
    for rank in killed:
        rank.kill()
    held.unlink()
    for rank in ranks:
        rank.wait()
        if rank in killed:
            continue
        written = rank.communicate()[1]
        assert rank.returncode != 0 and "could not talk to each other" in written, written
        assert f"tinytransformer train --resume {run}" in written
    finish(*start_two(runs_of_two, "train", "--resume", str(run)))
    assert outcome(run) == outcome(runs_of_two / "runs/whole")


@pytest.mark.slow
def test_torchrun_loses_a_process(runs_of_two, held):
    """torchrun itself: one of its ranks is killed, the other says so, and torchrun goes on with the
    run.
    """
    run = runs_of_two / "runs/torchrun"
    faults = dict(hold=[STEPS - 2, str(held)])
    launcher = [*TORCHRUN, SCRIPT]
    process = start_installed(
        runs_of_two, *TRAIN, "--folder", str(run), launcher=launcher, faults=faults
    )
    wait_for_step(process, run, 33)
    os.kill(psutil.Process(process.pid).children()[1].pid, signal.SIGKILL)
    held.unlink()
    written = process.communicate(timeout=300)[1]
    assert process.returncode != 0 and "could not talk to each other" in written
    assert f"tinytransformer train --resume {run}" in written
    launcher = [*TORCHRUN, "--no-python", COMMAND]
    finish(start_installed(runs_of_two, "train", "--resume", str(run), launcher=launcher))
    assert outcome(run) == outcome(runs_of_two / "runs/whole")


@pytest.mark.slow
def test_every_switch(commands, start, start_two, runs, held):
    """A run with Muon, rotary positions, SwiGLU and RMSNorm is killed, goes on, and equals one that
    was not; two processes come to the same losses as one; it writes text, and GPT-2's form is
    refused in a line.
    """
    changes = (
        "--train.optimizer muon --model.positions rotary --model.activation swiglu --model.norm rms"
    )
    switched = [*TRAIN, *changes.split(), "--train.max_steps", "40", "--folder"]
    finish(start(runs, *switched, "runs/switched-whole"))
    process = start(runs, *switched, "runs/switched", faults=dict(hold=[30, str(held)]))
    wait_for_step(process, runs / "runs/switched", 23)
    process.kill()
    process.wait()
    finish(start(runs, "train", "--resume", "runs/switched"))
    assert outcome(runs / "runs/switched") == outcome(runs / "runs/switched-whole")

    finish(start(runs, *switched, "runs/switched-one", "--model.dropout", "0"))
    finish(*start_two(runs, *switched, "runs/switched-two", "--model.dropout", "0"))
    one, two = losses(runs / "runs/switched-one"), losses(runs / "runs/switched-two")
    assert one[:10] == pytest.approx(two[:10], rel=1e-3) and one[-1] < 0.9 * one[0]

    finish(start(runs, "generate", "runs/switched", "The", "--max_new_tokens", "5"))
    refused = commands.run(runs, "export", "runs/switched", "twin")
    assert refused.returncode != 0 and "which neither GPT-2 nor GPT-NeoX has" in refused.stderr
    assert "Traceback" not in refused.stderr and not (runs / "twin").exists()


def test_two_processes_equal_one(start, start_two, runs):
    """Half of each batch in each of two processes, with gradients in two parts: the same losses
    over 60 steps, within float tolerance."""
    same = [*TRAIN, "--model.dropout", "0", "--folder"]
    finish(start(runs, *same, "runs/of-one"))
    finish(*start_two(runs, *same, "runs/of-two"))
    finish(start(runs, *same, "runs/in-parts", "--train.micro_batches", "3"))
    one, two, parts = (
        outcome(runs / "runs" / name)["rows"] for name in ("of-one", "of-two", "in-parts")
    )
    environment = json.loads((runs / "runs/of-two/environment.json").read_text())
    assert len(one) == 60 and environment[0]["processes"] == 2
    for field in ("loss", "grad_norm"):
        wanted = pytest.approx([row[field] for row in one], rel=1e-4)
        assert [row[field] for row in two] == wanted and [row[field] for row in parts] == wanted
    assert two[-1]["val_loss"] == pytest.approx(one[-1]["val_loss"], rel=1e-5)


@pytest.mark.slow
def test_sharded(start, runs, held):
    """FSDP2 through accelerate's own options: the weights spread over two processes, tied matrix
    included; the same losses, and a checkpoint that one process can go on from.
    """
    options = (
        "--use_fsdp --fsdp_version 2 --fsdp_auto_wrap_policy TRANSFORMER_BASED_WRAP"
        " --fsdp_transformer_layer_cls_to_wrap Block --num_processes 2"
    )
    launcher = [str(BIN / "accelerate"), "launch", *options.split(), SCRIPT]
    same = [*TRAIN, "--model.dropout", "0", "--folder"]
    finish(start(runs, *same, "runs/unsharded"))
    faults = dict(hold=[STEPS - 2, str(held)], stand_in=True)
    process = start_installed(runs, *same, "runs/sharded", launcher=launcher, faults=faults)
    wait_for_step(process, runs / "runs/sharded", 30)
    kill_all(process)
    finish(start(runs, "train", "--resume", "runs/sharded"))
    one, two = losses(runs / "runs/unsharded"), losses(runs / "runs/sharded")
    assert two == pytest.approx(one, rel=1e-4) and len(one) == STEPS


def test_data_is_prepared_once(start_two, tmp_path):
    "Two processes that find no data: one writes it, the other waits and reads."
    finish(*start_two(tmp_path, "train", "--config", "tiny", *SMALL))
    raw, processed = ((tmp_path / "data" / name).iterdir() for name in ("raw", "processed"))
    assert len(list(raw)) == len(list(processed)) == 1
    assert [run.name for run in (tmp_path / "runs").iterdir()] == ["tiny"]
    assert steps(tmp_path / "runs/tiny") == 6  # one run, each row written once


# --- stopped


@pytest.mark.parametrize(
    "processes, number, status",
    [
        (1, signal.SIGTERM, 143),
        (2, signal.SIGINT, 130),
        (1, signal.SIGUSR1, 138),  # of schedulers, as SIGUSR2 and SIGXCPU
        pytest.param(1, signal.SIGINT, 130, marks=pytest.mark.slow),
        pytest.param(2, signal.SIGTERM, 143, marks=pytest.mark.slow),
        pytest.param(1, signal.SIGHUP, 129, marks=pytest.mark.slow),  # a terminal that is closed
        pytest.param(2, signal.SIGUSR2, 140, marks=pytest.mark.slow),
        pytest.param(1, signal.SIGXCPU, 152, marks=pytest.mark.slow),
    ],
)
def test_stopped(start, start_two, runs, runs_of_two, held, processes, number, status):
    "These signals finish the step, write a checkpoint and say how to go on."
    folder, begin = (
        (runs, lambda *a, **k: [start(*a, **k)]) if processes == 1 else (runs_of_two, start_two)
    )
    run = folder / f"runs/stopped-{number}"
    ranks = begin(folder, *TRAIN, "--folder", str(run), faults=dict(hold=[33, str(held)]))
    wait_for_step(ranks[0], run, 33)
    for rank in ranks:
        rank.send_signal(number)
    written = [rank.communicate(timeout=300)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [status] * processes, written
    assert f"go on with: tinytransformer train --resume {run}" in written[0]
    assert not any("Traceback" in each for each in written)
    assert checkpoint_step(run) == steps(run) == 34  # not one step lost
    finish(*begin(folder, "train", "--resume", str(run)))
    assert outcome(run) == outcome(folder / "runs/whole")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_torchrun_stopped(start_two, runs_of_two, held, number):
    "What torchrun is sent reaches its ranks, which write a checkpoint and say how to go on."
    run = runs_of_two / f"runs/torchrun-stopped-{number}"
    faults = dict(hold=[33, str(held)])
    launcher = [*TORCHRUN, SCRIPT]
    process = start_installed(
        runs_of_two, *TRAIN, "--folder", str(run), launcher=launcher, faults=faults
    )
    wait_for_step(process, run, 33)
    process.send_signal(number)
    written = process.communicate(timeout=300)[1]
    assert f"go on with: tinytransformer train --resume {run}" in written
    assert checkpoint_step(run) == steps(run) == 34
    finish(*start_two(runs_of_two, "train", "--resume", str(run)))
    assert outcome(run) == outcome(runs_of_two / "runs/whole")


def test_auto(start, runs, held, tmp_path):
    "One command for a scheduler: it begins a run, goes on with it, and has nothing left to do."
    shutil.copytree(runs / "data", tmp_path / "data")
    process = start(tmp_path, *TRAIN, "--resume", "auto", faults=dict(hold=[40, str(held)]))
    wait_for_step(process, tmp_path / "runs/tiny", 38)
    process.kill()
    process.wait()
    finish(start(tmp_path, *TRAIN, "--resume", "auto"))
    assert [run.name for run in (tmp_path / "runs").iterdir()] == ["tiny"]
    assert outcome(tmp_path / "runs/tiny") == outcome(runs / "runs/whole")
    process = start(tmp_path, "train", "--resume", "auto")
    assert "nothing to resume" in process.communicate()[1] and process.returncode == 1


# --- resumed with other settings, or damaged


@pytest.mark.parametrize(
    "change, said",
    [
        ("--train.learning_rate 0.1", "started with train.learning_rate 0.01, not 0.1"),
        ("--train.batch_size 8", "train.batch_size 12, not 8"),
        ("--model.num_layers 2", "model.num_layers 1, not 2"),
        ("--data.articles 70", "data.articles 20, not 70"),
        ("--train.seed 1", "train.seed 0, not 1"),
    ],
)
def test_resume_with_other_settings(half, change, said):
    before = contents(half)
    assert said in refusal("train", "--resume", "runs/half", *change.split())
    assert contents(half) == before


def test_resume_for_longer(half):
    main(["train", "--resume", "runs/half", "--train.max_steps", "70", "--train.eval_every", "20"])
    assert steps(half) == 70 and json.loads((half / "summary.json").read_text())["steps"] == 70
    assert "complete after 70 steps, so nothing is left to do" in refusal(
        "train", "--resume", "runs/half"
    )
    # both starts are on record
    assert len(json.loads((half / "environment.json").read_text())) == 2


def test_damaged_last_falls_back(half, runs, capsys):
    file = half / "last/state.pt"
    file.write_bytes(file.read_bytes()[:-50])
    main(["train", "--resume", "runs/half"])
    said = capsys.readouterr().err
    assert "last is missing or damaged (state.pt is not what was written)" in said
    assert "going on from previous, step" in said
    assert outcome(half) == outcome(runs / "runs/whole")


def test_damaged_beyond_repair(half):
    for name in ("last", "previous", "best"):
        (half / name / "model.safetensors").write_bytes(b"")
    before = contents(half)
    assert "there is no other to go on from" in refusal("train", "--resume", "runs/half")
    assert contents(half) == before


def test_best_is_enough(half, runs, capsys):
    "Someone who keeps only the best checkpoint can go on from it."
    for name in ("last", "previous"):
        shutil.rmtree(half / name)
    main(["train", "--resume", "runs/half"])
    assert "going on from best, step" in capsys.readouterr().err
    assert outcome(half) == outcome(runs / "runs/whole")


def test_edited_config(half):
    """What an option may not change, an edited file may not change either; and nothing is written
    before that is known.
    """
    file = half / "config.yaml"
    file.write_text(file.read_text().replace("learning_rate: 0.01\n", "learning_rate: 0.02\n"))
    before = contents(half)
    assert "started with train.learning_rate 0.01, not 0.02" in refusal(
        "train", "--resume", "runs/half"
    )
    text = file.read_text().replace("learning_rate: 0.02\n", "learning_rate: 0.01\n")
    file.write_text(text.replace("articles: 20", "articles: 70"))
    before = contents(half)
    assert "trained on other data or with another tokenizer" in refusal(
        "train", "--resume", "runs/half"
    )
    assert contents(half) == before


def test_refused_before_it_is_written(half):
    before = contents(half)
    assert "give a multiple of 5" in refusal(
        "train", "--resume", "runs/half", "--train.micro_batches", "5"
    )
    assert "already has 25 steps" in refusal(
        "train", "--resume", "runs/half", "--train.max_steps", "20"
    )
    assert contents(half) == before
    assert "give a multiple of 5" in refusal(*TRAIN, "--train.micro_batches", "5")
    assert [run.name for run in half.parent.iterdir()] == ["half"]  # no empty folder stays


@pytest.mark.parametrize("damage", ["", "{", "null", "[1]x"])
def test_damaged_records(half, runs, damage):
    "A damaged line of a log never ends a training; a damaged record is reported in one line."
    (half / "environment.json").write_text(damage)
    assert "environment.json is damaged: delete it" in refusal("train", "--resume", "runs/half")
    (half / "environment.json").unlink()
    rows = (half / "metrics.jsonl").read_text().splitlines(keepends=True)
    (half / "metrics.jsonl").write_text("".join(rows[:10] + [damage + "\n"] + rows[11:]))
    main(["train", "--resume", "runs/half"])
    assert steps(half) == STEPS - 1
    assert (half / "summary.json").read_bytes() == (runs / "runs/whole/summary.json").read_bytes()


def test_stopped_by_patience(half):
    "To go on, patience has to grow."
    shutil.rmtree(half)
    quick = (
        "--train.learning_rate 0.3 --train.eval_every 5 --train.patience 1 --train.max_steps 240"
    )
    main([*TRAIN, *quick.split(), "--folder", "runs/half"])
    done = steps(half)
    assert done < 240
    message = refusal("train", "--resume", "runs/half", "--train.max_steps", "300")
    assert "and a larger train.patience" in message
    main(["train", "--resume", "runs/half", "--train.max_steps", "300", "--train.patience", "2"])
    assert steps(half) > done


def test_begun_at_the_same_moment(start, runs, tmp_path):
    "Each gets a folder of its own."
    shutil.copytree(runs / "data", tmp_path / "data")
    finish(*[start(tmp_path, *TRAIN, "--train.max_steps", "10") for _ in range(3)])
    assert sorted(run.name for run in (tmp_path / "runs").iterdir()) == ["tiny", "tiny-2", "tiny-3"]


def test_nobody_reads(runs):
    "The lines on stderr are for whoever is there; training does not depend on them."
    process = start_installed(runs, *TRAIN, "--folder", "runs/unread")
    process.stderr.close()
    assert process.wait(timeout=300) == 0 and steps(runs / "runs/unread") == STEPS


def test_runs_with_odd_ones_among_them(half, capsys):
    "A damaged run is left out with a warning; a name with $ is no mathematics."
    shutil.copytree(half, half.parent / "a $$ b")
    (half.parent / "odd").mkdir()
    (half.parent / "odd/config.yaml").write_text("{}")
    main(["runs"])
    said = capsys.readouterr()
    assert "odd is left out" in said.err and "a $$ b" in said.out and "half" in said.out


def test_checkpoint_of_another_run(half):
    "Its text, its tokenizer, its model: each is noticed."
    for name in ("last", "previous"):
        file = half / name / "checkpoint.json"
        said = file.read_text().replace('"data": "', '"data": "0')
        file.write_text(said.replace('"tokens": "', '"tokens": "0'))
    assert "trained on other data or with another tokenizer" in refusal(
        "train", "--resume", "runs/half"
    )


def test_somebody_else_writes(start, half, runs, held):
    "The second of two trainings in one folder is refused, and the first does not notice."
    first = start(
        half.parent.parent, "train", "--resume", "runs/half", faults=dict(hold=[5, str(held)])
    )
    wait_for_step(first, half, 28)
    assert "being written by another process" in refusal("train", "--resume", "runs/half")
    held.unlink()
    finish(first)
    assert outcome(half) == outcome(runs / "runs/whole")


@pytest.mark.parametrize("limit", [9_000, 60_000])
def test_disk_full_in_the_middle_of_a_checkpoint(commands, half, runs, limit):
    """No file may grow beyond `limit` bytes: the weights fit and the optimizer's state does not, or
    the metrics outgrow it.
    """
    before = {
        name: content
        for name, content in contents(half).items()
        if name.parent.name in ("last", "best")
    }
    done = commands.run(
        half.parent.parent, "train", "--resume", "runs/half", faults=dict(file_size=limit)
    )
    assert done.returncode == 1 and "runs/half cannot be written (File too large)" in done.stderr, (
        done.stderr
    )
    assert "Traceback" not in done.stderr
    after = {
        name: content
        for name, content in contents(half).items()
        if name.parent.name in ("last", "best")
    }
    assert after == before
    main(["train", "--resume", "runs/half"])  # there is room again
    assert outcome(half) == outcome(runs / "runs/whole")


def test_folder_that_cannot_be_written(here):
    (here / "a-file").write_text("")
    assert "a-file" in refusal("train", "--config", "tiny", *SMALL, "--folder", "a-file/run")
    assert "cannot be written" in refusal(
        "train", "--config", "tiny", *SMALL, "--folder", "/proc/run"
    )


@pytest.mark.parametrize(
    "args, said",
    [
        ("--resume runs/nowhere", "nothing to resume in runs/nowhere"),
        ("--resume auto --folder runs/nowhere", "nothing to resume"),
        ("--config tiny --train.track wandb", "train.track is 'wandb': give tensorboard, mlflow"),
    ],
)
def test_refused(here, args, said):
    assert said in refusal("train", *args.split())
