"""Runs that are killed, stopped, shared or damaged go on as if nothing had happened; `--kills N`
kills N times at random."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from conftest import SMALL
from test_bad_input import COMMAND, refusal

from tinytransformer.cli import main

TORCHRUN = [str(Path(sys.executable).with_name("torchrun")), "--nproc-per-node", "2", "--no-python"]
LONGER = [
    *SMALL,
    "--train.max_steps",
    "240",
    "--train.eval_every",
    "20",
    "--model.dropout",
    "0.1",
]  # five epochs, twelve checkpoints
TRAIN = ["train", "--config", "tiny", *LONGER]
KILLED_WHILE_WRITING = """
import os, shutil, signal, sys
from pathlib import Path
left = int(sys.argv.pop(1))
def counted(function):
    def call(*args, **kwargs):
        global left
        left -= 1
        if left == 0: os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return call
from tinytransformer.cli import main
os.replace, os.fsync, Path.rename, shutil.rmtree = map(counted, (os.replace, os.fsync, Path.rename, shutil.rmtree))
main()
"""


def pytest_generate_tests(metafunc):
    if "kill" in metafunc.fixturenames:
        metafunc.parametrize("kill", range(metafunc.config.getoption("--kills")))


def start(folder: Path, *args: str, launcher=()) -> subprocess.Popen:
    "A command in a process group of its own, so that all of it can be killed at once."
    return subprocess.Popen(
        [*launcher, COMMAND, *args],
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen) -> str:
    "What it said, once it has ended well."
    said = process.communicate(timeout=300)[1]
    assert process.returncode == 0, said
    return said


def steps(run: Path) -> int:
    file = run / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def wait_for_step(process: subprocess.Popen, run: Path, step: int) -> None:
    while steps(run) < step:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.002)


def outcome(run: Path) -> dict:
    "Everything a run came to, but for what is measured by the clock."
    clock = ("tokens_per_second", "memory_mb")
    rows = [
        {name: value for name, value in json.loads(line).items() if name not in clock}
        for line in (run / "metrics.jsonl").open()
    ]
    return dict(
        rows=rows,
        **{
            name: (run / name).read_bytes()
            for name in (
                "last/model.safetensors",
                "best/model.safetensors",
                "samples.jsonl",
                "summary.json",
            )
        },
    )


@pytest.fixture(scope="module")
def runs(workspace, tmp_path_factory):
    "A folder with prepared data and runs that nobody has interrupted: one process, and two."
    folder = tmp_path_factory.mktemp("resume")
    shutil.copytree(workspace / "data", folder / "data")
    finish(start(folder, *TRAIN, "--folder", "runs/whole"))
    return folder


@pytest.fixture(scope="module")
def runs_of_two(runs):
    finish(start(runs, *TRAIN, "--folder", "runs/whole-two", launcher=TORCHRUN))
    return runs


def test_killed_at_a_random_step(runs, kill):
    """SIGKILL twice, at random steps and moments, mostly in the middle of an epoch; byte for byte
    the run that was never killed.
    """
    dice, run = random.Random(kill), runs / f"runs/killed-{kill}"
    args = [*TRAIN, "--folder", str(run)]
    for step in sorted(dice.sample(range(1, 235), 2)):
        process = start(runs, *args)
        wait_for_step(process, run, step)
        time.sleep(dice.random() / 100)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        args = ["train", "--resume", str(run)]
    assert not (run / "summary.json").exists()
    finish(start(runs, *args))
    assert outcome(run) == outcome(runs / "runs/whole")


def test_killed_while_writing(runs, kill):
    """SIGKILL just before a random flush, rename or deletion, most of them in the middle of writing
    a checkpoint.
    """
    dice, run = random.Random(kill), runs / f"runs/writing-{kill}"
    first = subprocess.run(
        [
            sys.executable,
            "-c",
            KILLED_WHILE_WRITING,
            str(dice.randrange(4, 130)),
            *TRAIN,
            "--folder",
            str(run),
        ],
        cwd=runs,
        capture_output=True,
        text=True,
    )
    assert first.returncode == -signal.SIGKILL, first.stderr
    finish(
        start(
            runs,
            *(
                ["train", "--resume", str(run)]
                if (run / "config.yaml").exists()
                else [*TRAIN, "--folder", str(run)]
            ),
        )
    )
    assert outcome(run) == outcome(runs / "runs/whole")
    assert not list(run.glob(".last.*")) and not list(
        run.glob(".best.*")
    )  # what the killed one left behind is swept away


def test_two_processes_killed(runs_of_two, kill):
    "All at once, or one rank alone: then the other ends by itself, with a line that says so."
    dice, run = random.Random(kill), runs_of_two / f"runs/two-{kill}"
    process = start(runs_of_two, *TRAIN, "--folder", str(run), launcher=TORCHRUN)
    wait_for_step(process, run, dice.randrange(1, 200))
    ranks = [child.pid for child in psutil.Process(process.pid).children()]
    if kill % 2:
        for pid in (process.pid, *ranks):
            os.kill(pid, signal.SIGKILL)
    else:
        os.kill(dice.choice(ranks), signal.SIGKILL)
        said = process.communicate(timeout=60)[1]
        assert (
            process.returncode != 0
            and "another process of this training has ended" in said
            and f"tinytransformer train --resume {run}" in said
        )
    process.wait()
    finish(start(runs_of_two, "train", "--resume", str(run), launcher=TORCHRUN))
    assert outcome(run) == outcome(runs_of_two / "runs/whole-two")


SWITCHES = [
    "--train.optimizer",
    "muon",
    "--model.positions",
    "rotary",
    "--model.activation",
    "swiglu",
    "--model.norm",
    "rms",
    "--train.max_steps",
    "40",
]


def test_every_switch(runs):
    """A run with Muon, rotary positions, SwiGLU and RMSNorm is stopped, goes on, and equals one
    that was not; it writes text, and GPT-2's form is refused in a line.
    """
    finish(start(runs, *TRAIN, *SWITCHES, "--folder", "runs/switched-whole"))
    process = start(runs, *TRAIN, *SWITCHES, "--folder", "runs/switched")
    wait_for_step(process, runs / "runs/switched", 23)
    process.kill()
    process.wait()
    finish(start(runs, "train", "--resume", "runs/switched"))
    assert outcome(runs / "runs/switched") == outcome(runs / "runs/switched-whole")
    for name, launcher in (("one", ()), ("two", TORCHRUN)):
        finish(
            start(
                runs,
                *TRAIN,
                *SWITCHES,
                "--model.dropout",
                "0",
                "--folder",
                f"runs/switched-{name}",
                launcher=launcher,
            )
        )
    one, two = (
        [json.loads(line)["loss"] for line in (runs / f"runs/switched-{name}/metrics.jsonl").open()]
        for name in ("one", "two")
    )
    assert one[:10] == pytest.approx(two[:10], rel=1e-3) and one[-1] < 0.9 * one[0]
    finish(start(runs, "generate", "runs/switched", "The", "--max_new_tokens", "5"))
    refused = subprocess.run(
        [COMMAND, "export", "runs/switched", "twin"], cwd=runs, capture_output=True, text=True
    )
    assert (
        refused.returncode != 0
        and "GPT-2 has not" in refused.stderr
        and "Traceback" not in refused.stderr
        and not (runs / "twin").exists()
    )


def test_two_processes_equal_one(runs):
    """Half of each batch in each of two processes, with gradients in two parts: the same losses,
    over 50 steps and more, within float tolerance.
    """
    same = ["--model.dropout", "0", "--train.max_steps", "60"]
    finish(start(runs, *TRAIN, *same, "--folder", "runs/of-one"))
    finish(start(runs, *TRAIN, *same, "--folder", "runs/of-two", launcher=TORCHRUN))
    finish(start(runs, *TRAIN, *same, "--folder", "runs/in-parts", "--train.micro_batches", "3"))
    one, two, parts = (
        outcome(runs / "runs" / name)["rows"] for name in ("of-one", "of-two", "in-parts")
    )
    assert (
        len(one) == 60
        and json.loads((runs / "runs/of-two/environment.json").read_text())[0]["processes"] == 2
    )
    for field in ("loss", "grad_norm"):
        wanted = pytest.approx([row[field] for row in one], rel=1e-4)
        assert [row[field] for row in two] == wanted and [row[field] for row in parts] == wanted
    assert two[-1]["val_loss"] == pytest.approx(one[-1]["val_loss"], rel=1e-5)


SHARDED = """
import sys
from accelerate.state import PartialState
from accelerate.utils import DistributedType
PartialState(cpu=True)
PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU  # accelerate shards on accelerators alone: here each of two CPU processes stands in for one
from tinytransformer.cli import main
main()
"""


def test_sharded(runs, tmp_path):
    """FSDP2 through accelerate's own options: the weights spread over two processes, tied matrix
    included; the same losses, and a checkpoint that one process can go on from.
    """
    (tmp_path / "sharded.py").write_text(SHARDED)
    launcher = [
        str(Path(sys.executable).with_name("accelerate")),
        "launch",
        "--use_fsdp",
        "--fsdp_version",
        "2",
        "--fsdp_auto_wrap_policy",
        "TRANSFORMER_BASED_WRAP",
        "--fsdp_transformer_layer_cls_to_wrap",
        "Block",
        "--num_processes",
        "2",
        str(tmp_path / "sharded.py"),
    ]
    same = [*TRAIN, "--model.dropout", "0", "--train.max_steps", "60"]
    finish(start(runs, *same, "--folder", "runs/unsharded"))
    process = subprocess.Popen(
        [*launcher, *same, "--folder", "runs/sharded"],
        cwd=runs,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    wait_for_step(process, runs / "runs/sharded", 30)
    for child in (process, *psutil.Process(process.pid).children(recursive=True)):
        os.kill(child.pid, signal.SIGKILL)
    process.wait()
    finish(start(runs, "train", "--resume", "runs/sharded"))
    one, two = (outcome(runs / "runs" / name)["rows"] for name in ("unsharded", "sharded"))
    assert [row["loss"] for row in two] == pytest.approx(
        [row["loss"] for row in one], rel=1e-4
    ) and len(one) == 60


def test_data_is_prepared_once(tmp_path):
    "Two processes that find no data: one writes it, the other waits and reads."
    finish(start(tmp_path, "train", "--config", "tiny", *SMALL, launcher=TORCHRUN))
    assert (
        len(list((tmp_path / "data/raw").iterdir()))
        == len(list((tmp_path / "data/processed").iterdir()))
        == 1
    )
    assert [run.name for run in (tmp_path / "runs").iterdir()] == ["tiny"] and steps(
        tmp_path / "runs/tiny"
    ) == 6  # one run, each row written once


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 0), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("launcher", [(), TORCHRUN], ids=["one", "two"])
def test_stopped(runs_of_two, number, status, launcher):
    "Ctrl-C and SIGTERM finish the step, write a checkpoint and say how to go on."
    run = runs_of_two / f"runs/stopped-{number}-{len(launcher)}"
    process = start(runs_of_two, *TRAIN, "--folder", str(run), launcher=launcher)
    wait_for_step(process, run, 33)
    os.kill(process.pid, number)
    said = process.communicate(timeout=60)[1]
    if not launcher:
        assert process.returncode == status  # torchrun has a status of its own
    assert f"go on with: tinytransformer train --resume {run}" in said and (
        "Traceback" not in said or launcher
    )
    stopped = json.loads((run / "last/checkpoint.json").read_text())["step"]
    assert 33 <= stopped == steps(run) < 240  # not one step lost
    finish(start(runs_of_two, "train", "--resume", str(run), launcher=launcher))
    assert outcome(run) == outcome(runs_of_two / ("runs/whole-two" if launcher else "runs/whole"))


def test_auto(runs, tmp_path):
    "One command for a scheduler: it begins a run, goes on with it, and has nothing left to do."
    shutil.copytree(runs / "data", tmp_path / "data")
    process = start(tmp_path, *TRAIN, "--resume", "auto")
    wait_for_step(process, tmp_path / "runs/tiny", 50)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    finish(start(tmp_path, *TRAIN, "--resume", "auto"))
    assert [run.name for run in (tmp_path / "runs").iterdir()] == ["tiny"] and outcome(
        tmp_path / "runs/tiny"
    ) == outcome(runs / "runs/whole")
    process = start(tmp_path, "train", "--resume", "auto")
    assert "nothing to resume" in process.communicate()[1] and process.returncode == 1


@pytest.fixture
def half(runs, tmp_path, monkeypatch):
    "A copy of a run that was stopped after its 100th step, as the current folder."
    if not (runs / "runs/half").exists():
        process = start(runs, *TRAIN, "--folder", "runs/half")
        wait_for_step(process, runs / "runs/half", 100)
        process.send_signal(signal.SIGTERM)
        process.communicate()
    for name in ("data", "runs/half"):
        shutil.copytree(runs / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs/half"


@pytest.mark.parametrize(
    "change, said",
    [
        ("--train.learning_rate 0.1", "begun with train.learning_rate 0.01, not 0.1"),
        ("--train.batch_size 8", "train.batch_size 12, not 8"),
        ("--model.num_layers 2", "model.num_layers 1, not 2"),
        ("--data.articles 70", "data.articles 60, not 70"),
        ("--train.seed 1", "train.seed 0, not 1"),
    ],
)
def test_resume_with_other_settings(half, change, said):
    before = outcome_files(half)
    assert said in refusal("train", "--resume", "runs/half", *change.split())
    assert outcome_files(half) == before


def outcome_files(run: Path) -> dict:
    return {f: f.read_bytes() for f in run.rglob("*") if f.is_file()}


def test_resume_for_longer(half):
    main(["train", "--resume", "runs/half", "--train.max_steps", "250", "--train.eval_every", "50"])
    assert steps(half) == 250 and json.loads((half / "summary.json").read_text())["steps"] == 250
    assert "complete after 250 steps, nothing is left to do" in refusal(
        "train", "--resume", "runs/half"
    )
    assert (
        len(json.loads((half / "environment.json").read_text())) == 2
    )  # both starts are on record


def test_damaged_last_falls_back(half, runs, capsys):
    file = half / "last/state.pt"
    file.write_bytes(file.read_bytes()[:-50])
    main(["train", "--resume", "runs/half"])
    said = capsys.readouterr().err
    assert (
        "last is missing or damaged (state.pt is not what was written)" in said
        and "going on from previous, step" in said
    )
    assert outcome(half) == outcome(runs / "runs/whole")


def test_damaged_beyond_repair(half):
    for name in ("last", "previous", "best"):
        (half / name / "model.safetensors").write_bytes(b"")
    before = outcome_files(half)
    assert "there is no other to go on from" in refusal("train", "--resume", "runs/half")
    assert outcome_files(half) == before


def test_best_is_enough(half, runs, capsys):
    "Who keeps only the best checkpoint can go on from it."
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
    before = outcome_files(half)
    assert "begun with train.learning_rate 0.01, not 0.02" in refusal(
        "train", "--resume", "runs/half"
    )
    file.write_text(
        file.read_text()
        .replace("learning_rate: 0.02\n", "learning_rate: 0.01\n")
        .replace("articles: 60", "articles: 70")
    )
    before = outcome_files(half)
    assert "trained on other data or with another tokenizer" in refusal(
        "train", "--resume", "runs/half"
    )
    assert outcome_files(half) == before


def test_refused_before_it_is_written(half):
    before = outcome_files(half)
    assert "give a multiple of 5" in refusal(
        "train", "--resume", "runs/half", "--train.micro_batches", "5"
    )
    assert "steps already" in refusal("train", "--resume", "runs/half", "--train.max_steps", "50")
    assert outcome_files(half) == before
    assert "give a multiple of 5" in refusal(
        "train", "--config", "tiny", *SMALL, "--train.micro_batches", "5"
    )
    assert [run.name for run in half.parent.iterdir()] == ["half"]  # no empty folder stays


@pytest.mark.parametrize("damage", ["", "{", "null", "[1]x"])
def test_damaged_records(half, runs, damage):
    "A damaged line or log never ends a training, or is told in one line."
    (half / "environment.json").write_text(damage)
    assert "environment.json is damaged: delete it" in refusal("train", "--resume", "runs/half")
    (half / "environment.json").unlink()
    rows = (half / "metrics.jsonl").read_text().splitlines(keepends=True)
    (half / "metrics.jsonl").write_text("".join(rows[:30] + [damage + "\n"] + rows[31:]))
    main(["train", "--resume", "runs/half"])
    assert (
        steps(half) == 239
        and (half / "summary.json").read_bytes() == (runs / "runs/whole/summary.json").read_bytes()
    )


def test_stopped_by_patience(half, runs):
    "To go on, patience has to grow."
    shutil.rmtree(half)
    quick = [
        "--train.learning_rate",
        "0.3",
        "--train.eval_every",
        "5",
        "--train.patience",
        "1",
        "--folder",
        "runs/half",
    ]
    main([*TRAIN, *quick])
    done = steps(half)
    assert done < 240 and "and a larger --train.patience" in refusal(
        "train", "--resume", "runs/half", "--train.max_steps", "300"
    )
    main(["train", "--resume", "runs/half", "--train.max_steps", "300", "--train.patience", "2"])
    assert steps(half) > done


def test_begun_at_the_same_moment(runs, tmp_path):
    "Each gets a folder of its own."
    shutil.copytree(runs / "data", tmp_path / "data")
    for process in [start(tmp_path, *TRAIN) for _ in range(3)]:
        finish(process)
    assert sorted(run.name for run in (tmp_path / "runs").iterdir()) == ["tiny", "tiny-2", "tiny-3"]


def test_nobody_reads(runs):
    "The lines on stderr are for whoever is there; training does not depend on it."
    process = start(runs, *TRAIN, "--folder", "runs/unread")
    process.stderr.close()
    assert process.wait(timeout=120) == 0 and steps(runs / "runs/unread") == 240


def test_runs_with_odd_ones_among_them(half, capsys):
    "A damaged run is left out and said so; a name with $ is no mathematics."
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
        file.write_text(file.read_text().replace('"data": "', '"data": "0'))
    assert "trained on other data or with another tokenizer" in refusal(
        "train", "--resume", "runs/half"
    )


def test_somebody_else_writes(half, runs):
    "The second of two trainings in one folder is refused, and the first does not notice."
    first = start(half.parent.parent, "train", "--resume", "runs/half")
    wait_for_step(first, half, steps(half) + 1)
    first.send_signal(signal.SIGSTOP)  # it must not be done before the second has asked
    assert "being written by another process" in refusal("train", "--resume", "runs/half")
    first.send_signal(signal.SIGCONT)
    finish(first)
    assert outcome(half) == outcome(runs / "runs/whole")


@pytest.mark.parametrize("limit", [9_000, 60_000])
def test_disk_full_in_the_middle_of_a_checkpoint(half, runs, limit):
    """No file may grow beyond `limit` bytes: the weights fit and the optimizer's state does not, or
    metrics outgrow it.
    """

    def no_room():
        signal.signal(
            signal.SIGXFSZ, signal.SIG_IGN
        )  # so that writing fails with an error, as it does on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    before = {
        name: content
        for name, content in outcome_files(half).items()
        if name.parent.name in ("last", "best")
    }
    done = subprocess.run(
        [COMMAND, "train", "--resume", "runs/half"],
        capture_output=True,
        text=True,
        preexec_fn=no_room,
    )
    assert (
        done.returncode == 1
        and "runs/half cannot be written (File too large)" in done.stderr
        and "Traceback" not in done.stderr
    ), done.stderr
    assert {
        name: content
        for name, content in outcome_files(half).items()
        if name.parent.name in ("last", "best")
    } == before
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
