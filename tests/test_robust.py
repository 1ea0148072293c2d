"""What others ran into, in a run and around it: by-products that fail, diverged weights, signals,
odd files and paths, small containers, other folders."""

import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from commands import COMMAND
from conftest import SMALL, refusal, wait_for_address
from filelock import FileLock

from tinytransformer import cli, corpus, devices, runs, trackers
from tinytransformer.cli import main
from tinytransformer.config import read_config
from tinytransformer.data import DataConfig
from tinytransformer.files import InputError, digest, read_rows, whole_folder
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


def test_samples_on_a_full_disk(undisturbed, tmp_path, monkeypatch, capsys):
    "A real file that takes nothing: it fails again when it is closed, and the run is the same run."
    add = trackers.JsonLines.add

    def add_to_full_disk(self, row):
        if self.path.name == "samples.jsonl":
            self.file = self.file or open("/dev/full", "a", encoding="utf-8")
        add(self, row)

    monkeypatch.setattr(trackers.JsonLines, "add", add_to_full_disk)
    run = tmp_path / "run"
    train_run(run, data_in(undisturbed), SHAPE, SHORT, write=lambda model: "a text")
    said = capsys.readouterr().err
    assert said.count("No space left on device") == 1 and len(said.splitlines()) == 1
    for name in ("last/model.safetensors", "summary.json"):
        assert (run / name).read_bytes() == (undisturbed / "run" / name).read_bytes()


def test_tracker_that_fails_when_it_is_closed(undisturbed, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(trackers.TensorBoardTracker, "finish", fail)
    train = replace(SHORT, track="tensorboard")
    train_run(tmp_path / "run", data_in(undisturbed), SHAPE, train)
    said = capsys.readouterr().err
    assert said.count("tensorboard does not answer (broken in two lines)") == 1
    assert (tmp_path / "run/summary.json").exists()


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


# --- finiteness


def poison(run: Path) -> None:
    "A NaN in one weight of `best`, in files that are otherwise whole."
    best = run / "best"
    weights = safetensors.torch.load_file(best / "model.safetensors")
    next(iter(weights.values())).view(-1)[0] = torch.nan
    content = safetensors.torch.save(weights)
    (best / "model.safetensors").write_bytes(content)
    about = json.loads((best / "checkpoint.json").read_text())
    about["files"]["model.safetensors"] = digest(content)
    (best / "checkpoint.json").write_text(json.dumps(about))


@pytest.fixture
def own(small_run, tmp_path, monkeypatch) -> Path:
    "A copy of the small run and its data, as the current folder."
    shutil.copytree(small_run, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("command", ["evaluate RUN", "export RUN out", "generate RUN hello"])
def test_diverged_run_is_refused(own, command):
    poison(own / "runs/small")
    assert "not finite" in refusal(*command.replace("RUN", "runs/small").split())
    assert not (own / "out").exists()
    assert not (own / "runs/small/evaluation.json").exists()


def test_diverged_loss_is_refused(own, monkeypatch):
    "The weights are finite, but what they come to is not."
    monkeypatch.setattr(cli, "evaluate", lambda *args, **kwargs: math.nan)
    assert "the loss of runs/small on validation is nan" in refusal("evaluate", "runs/small")
    assert not (own / "runs/small/evaluation.json").exists()


def strict_json(text: str) -> object:
    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


def test_no_json_holds_nan(undisturbed, tmp_path, monkeypatch):
    "Where a validation loss, a share of facts and a floor are not finite."
    found = iter([2.0, math.nan, math.inf, math.nan])
    monkeypatch.setattr("tinytransformer.train.evaluate", lambda *a, **k: next(found))
    monkeypatch.setattr(runs, "evaluate", lambda *a, **k: math.inf)
    monkeypatch.setattr(runs, "fact_recall", lambda *a: math.nan)
    run = tmp_path / "run"
    train_run(run, data_in(undisturbed), SHAPE, SHORT)
    kept = [*run.rglob("*.json")]
    assert len(kept) >= 6
    for file in kept:
        strict_json(file.read_text())
    for line in (run / "metrics.jsonl").read_text().splitlines():
        strict_json(line)
    assert json.loads((run / "summary.json").read_text())["fact_recall"] is None
    # a checkpoint with null for its loss can be gone on from
    longer = replace(SHORT, max_steps=7)
    train_run(run, data_in(undisturbed), SHAPE, longer, resume=True, write=lambda model: "text")


def test_json_is_written_in_one_place():
    "What is written goes through `to_json`; digests and answers refuse what is not finite."
    package = Path(cli.__file__).parent
    for file in package.rglob("*.py"):
        for call in re.findall(r"json\.dumps?\((?:[^()]|\([^()]*\))*\)", file.read_text()):
            assert "allow_nan=False" in call, (file, call)


# --- interrupts


@pytest.mark.parametrize("seconds", [0.1, 0.3, 0.6, 1.0, 1.6, 2.5])
@pytest.mark.parametrize("command", ["evaluate tiny", "prepare --config tiny", "runs --help"])
def test_interrupted_early(tmp_path, command, seconds):
    "Ctrl-C while Python still imports: silent, and the status that a shell expects."

    def interrupt(after: float) -> tuple[int, str]:
        process = subprocess.Popen(
            [COMMAND, *command.split()],
            cwd=tmp_path,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        time.sleep(after)
        process.send_signal(signal.SIGINT)
        written = process.communicate(timeout=120)[1]
        return process.returncode, written

    status, written = interrupt(seconds)
    while "init_import_site" in written:  # a busy machine: Python itself had not begun yet
        seconds *= 2
        status, written = interrupt(seconds)
    # killed where not even Python has begun; a shell says 130 then, too
    assert (status, written) in [(130, ""), (-signal.SIGINT, ""), (0, "")]


# --- YAML and paths


@pytest.mark.parametrize(
    "text, said",
    [
        (
            "config: {}",
            "config is not a section of the configuration: give data, model, train, sample",
        ),
        ("folder: {}", "folder is not a section of the configuration"),
        ("resume: {seed: 1}", "resume is not a section of the configuration"),
        ("serve: {}", "serve is not a section of the configuration"),
        ("train:\n  seed: 1\n  max_steps: 2\n  seed: 3", "line 4: seed appears twice"),
        ("train: {}\nmodel: {}\ntrain: {}", "line 3: train appears twice"),
        ("train: {max_steps: 010}", "line 1: 010 would be read as an octal number"),
        ("train:\n  max_steps: 1:30", "line 2: 1:30 would be read as a time"),
        ("train: {learning_rate: 1:30.5}", "1:30.5 would be read as a time"),
        ("model: {dropout: -1:30}", "-1:30 would be read as a time"),
        ("data: {articles: ~}", "data.articles is null: give int"),
        ("data: {data_dir: null}", "data.data_dir is null: give str"),
        ("model:\n  seq_len:\n  dropout: 0.1", "model.seq_len is null: give int"),
        ("train: {optimizer: ~}", "train.optimizer is null: give adamw"),
        ("sample: {top_k: ~, seed: ~}", "sample.seed is null: give int"),
        ("data: {articles: 60, articles: 50}", "line 1: articles appears twice"),
        ("data: {articles: .inf}", "data.articles is 'inf': give int"),
        ("data: {articles: 2024-01-01}", "data.articles is '2024-01-01': give int"),
        ("data: {articles: yes}", "data.articles is 'True': give int"),
        ("train: {}\n---\ntrain: {}", "cannot be read as YAML"),
        ("a: &a [*a]", "is not a configuration"),
    ],
)
def test_surprises_of_yaml(tmp_path, text, said):
    (tmp_path / "mine.yaml").write_text(text)
    assert said in refusal("train", "--config", str(tmp_path / "mine.yaml"))


@pytest.mark.parametrize("value, said", [("010", "octal"), ("1:30", "a time")])
@pytest.mark.parametrize("form", ["{} {}", "{}={}"])
def test_surprises_of_numbers_in_options(here, value, said, form):
    option = form.format("--train.max_steps", value).split()
    assert f"train.max_steps: {value} would be read as" in refusal(
        "train", "--config", "tiny", *option
    )
    option = form.format("--top_k", value).split()
    assert said in refusal("generate", "runs/small", "010", *option)


def test_odd_yaml_that_is_fine(tmp_path):
    (tmp_path / "mine.yaml").write_text(
        "x: &x {seed: 0, max_steps: 1_000, learning_rate: 0.05}\ntrain:\n  <<: *x\n  seed: 0x10\n"
    )
    found = read_config(tmp_path / "mine.yaml")["train"]
    assert found == dict(seed=16, max_steps=1000, learning_rate=0.05)


@pytest.mark.parametrize(
    "args",
    [
        "train --config tiny --folder odd\udcff",
        "train --config tiny --folder=odd\udcff",
        "train --config tiny --data.data_dir odd\udcff",
        "train --resume odd\udcff",
        "evaluate odd\udcff",
        "export tiny odd\udcff",
        "runs odd\udcff",
    ],
)
def test_path_that_is_not_utf8(tmp_path, monkeypatch, args):
    monkeypatch.chdir(tmp_path)
    assert r"the path b'odd\xff' is not UTF-8: give another name" in refusal(*args.split())
    assert not list(tmp_path.iterdir())


def test_path_that_is_not_utf8_in_python(undisturbed, tmp_path):
    with pytest.raises(InputError, match="not UTF-8"):
        train_run(tmp_path / "odd\udcff", data_in(undisturbed), SHAPE, SHORT)
    assert not list(tmp_path.iterdir())


# --- small containers


def container(root: Path, monkeypatch, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(os.fsencode(text))
    monkeypatch.setattr(devices.cpu_quota, "__defaults__", (root,))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))


V1 = "sys/fs/cgroup/cpu,cpuacct/box/cpu.cfs_"


@pytest.mark.parametrize(
    "files, threads, why",
    [
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "200000 100000\n"}, 2, "2 CPUs"),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "390000 100000\n"}, 3, "3.9 CPUs"),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "50000 100000\n"}, 1, "0.5 CPUs"),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, 16, "16 of"),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/cpu.max": "300000 100000"}, 3, "quota"),
        (
            {
                "proc/self/cgroup": "3:memory:/box\n2:cpu,cpuacct:/box\n0::/\n",
                f"{V1}quota_us": "400000\n",
                f"{V1}period_us": "100000\n",
            },
            4,
            "quota",
        ),
        # two groups, one in the other: the lower quota counts, wherever it is
        (
            {
                "proc/self/cgroup": "0::/a/b\n",
                "sys/fs/cgroup/a/cpu.max": "200000 100000",
                "sys/fs/cgroup/a/b/cpu.max": "300000 100000",
            },
            2,
            "quota",
        ),
        # as Docker has it under version 1: the path is the host's, the files are the container's
        (
            {
                "proc/self/cgroup": "5:cpuset:/x\n4:cpu:/docker/abc\n1:name=systemd:/docker/abc\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "250000\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "50000\n",
            },
            5,
            "5 CPUs",
        ),
        (
            {
                "proc/self/cgroup": "2:cpu,cpuacct:/box\n",
                f"{V1}quota_us": "-1\n",
                f"{V1}period_us": "100000\n",
            },
            16,
            "16 of",
        ),
        (
            {"proc/self/cgroup": "0::/../../\udcff:a\n", "sys/fs/cgroup/cpu.max": "100000 100000"},
            1,
            "quota",
        ),
        ({}, 16, "16 of"),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "odd"}, 16, "16 of"),
    ],
)
def test_threads_in_a_container(tmp_path, monkeypatch, files, threads, why):
    container(tmp_path, monkeypatch, files)
    limit, reason = devices.thread_limit()
    assert limit == threads and why in reason


def test_environment_says_how_many_threads(tmp_path, monkeypatch, undisturbed):
    files = {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "100000 100000\n"}
    container(tmp_path, monkeypatch, files)
    monkeypatch.chdir(tmp_path)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        main(["runs", str(undisturbed)])
        assert torch.get_num_threads() == 1
        said = devices.thread_count()
    finally:
        torch.set_num_threads(before)
    assert said == dict(threads=1, threads_why="the quota of this container is 1 CPUs")
    kept = json.loads((undisturbed / "run/environment.json").read_text())[-1]
    assert kept["threads"] >= 1 and kept["threads_why"]


# --- a run opened from elsewhere


def tree(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.name != "evaluation.json"}


@pytest.fixture
def elsewhere(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "else/where"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    return folder


def test_evaluated_from_elsewhere(workspace, elsewhere, capsys):
    "The run's own data are found, though another `data` is nearer; nothing is made."
    (elsewhere / "data").mkdir()
    before = tree(workspace)
    main(["evaluate", str(workspace / "runs/small")])
    there = capsys.readouterr().out
    assert list(elsewhere.rglob("*")) == [elsewhere / "data"] and tree(workspace) == before
    os.chdir(workspace)
    main(["evaluate", "runs/small"])
    assert capsys.readouterr().out == there


def test_evaluated_without_its_data(workspace, elsewhere, capsys, monkeypatch):
    "TinyWiki is written again, and not kept; what only the Hub has is named."
    shutil.copytree(workspace / "runs/small", elsewhere / "moved")
    before = tree(elsewhere)
    main(["evaluate", "moved"])
    assert "validation" in capsys.readouterr().out and tree(elsewhere) == before
    config = elsewhere / "moved/config.yaml"
    config.write_text(config.read_text().replace("dataset: tinywiki", "dataset: owner/name"))
    message = refusal("evaluate", "moved")
    assert "neither in data nor" in message and "prepare --config moved/config.yaml" in message
    assert tree(elsewhere) == before


def test_resumed_from_elsewhere(own, tmp_path_factory, monkeypatch):
    "A run goes on with its own data wherever one stands, and nothing is made there."
    there = tmp_path_factory.mktemp("there")
    (there / "data").mkdir()
    monkeypatch.chdir(there)
    before = [path for path in own.rglob("*") if path.is_relative_to(own / "data")]
    main(["train", "--resume", str(own / "runs/small"), "--train.max_steps", "8"])
    assert list(there.rglob("*")) == [there / "data"]
    assert [path for path in own.rglob("*") if path.is_relative_to(own / "data")] == before
    assert "data_dir: data\n" in (own / "runs/small/config.yaml").read_text()
    assert json.loads((own / "runs/small/summary.json").read_text())["steps"] == 8


def test_resumed_where_its_data_are_gone(own, tmp_path_factory, monkeypatch, capsys):
    there = tmp_path_factory.mktemp("there")
    shutil.rmtree(own / "data")
    monkeypatch.chdir(there)
    main(["train", "--resume", str(own / "runs/small"), "--train.max_steps", "7"])
    assert "small were not found: preparing them again in data" in capsys.readouterr().err


def test_run_on_a_second_disk(own, tmp_path_factory, monkeypatch):
    "runs/ may be a link: the data are beside the link, not beside what it leads to."
    disk = tmp_path_factory.mktemp("disk")
    shutil.move(own / "runs", disk / "kept")
    (own / "runs").symlink_to(disk / "kept")
    monkeypatch.chdir(disk)
    main(["evaluate", str(own / "runs/small")])
    assert not (disk / "data").exists()


# --- signals outside of the steps


STOPPED = [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGUSR2, 140)]


@pytest.fixture
def fresh_signals():
    "The handlers of a new process; some library that another test has loaded may have set its own."
    before = {number: signal.signal(number, signal.SIG_DFL) for number, _ in STOPPED}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def ends_with(status: int, *args: str) -> None:
    with pytest.raises(SystemExit) as stop:
        main(list(args))
    assert stop.value.code == status


def send(number: int):
    "Something that is called in a place of the test's choice."

    def action(*args, **kwargs):
        signal.raise_signal(number)
        return 1.0

    return action


TRAIN = ["train", "--config", "tiny", *SMALL, "--folder", "runs/new"]


@pytest.mark.usefixtures("fresh_signals")
@pytest.mark.parametrize("number, status", STOPPED)
@pytest.mark.parametrize("command", ["train --config tiny", "prepare --config tiny"])
def test_stopped_while_data_are_prepared(tmp_path, monkeypatch, capsys, command, number, status):
    "One line, and nothing half-written stays."
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(corpus, "encode_rows", send(number))
    ends_with(status, *command.split(), *SMALL)
    name = signal.Signals(number).name
    assert capsys.readouterr().err == (
        f"tinytransformer: stopped by {name}; run the same command again\n"
    )
    assert not (tmp_path / "runs").exists()
    assert not list((tmp_path / "data/processed").iterdir())
    assert signal.getsignal(number) == signal.SIG_DFL


@pytest.mark.usefixtures("fresh_signals")
@pytest.mark.parametrize("number, status", [*STOPPED, (signal.SIGINT, 130)])
@pytest.mark.parametrize("place", ["environment", "compare_with_floor", "draw_curve"])
def test_stopped_around_the_training(own, monkeypatch, capsys, place, number, status):
    "Before the first step, in the last evaluation, and where the results are written."
    with monkeypatch.context() as patch:
        patch.setattr(runs, place, send(number))
        ends_with(status, *TRAIN)
    said = capsys.readouterr().err
    assert "Traceback" not in said
    if place == "environment":
        assert said.endswith("nothing is trained yet: run the same command again\n")
        main(TRAIN)
    else:
        assert said.endswith("go on with: tinytransformer train --resume runs/new\n")
        main(["train", "--resume", "runs/new"])
    same_as_small(own)


@pytest.mark.usefixtures("fresh_signals")
@pytest.mark.parametrize("number, status", [*STOPPED, (signal.SIGINT, 130)])
def test_stopped_in_the_last_evaluation(own, monkeypatch, capsys, number, status):
    "The step is finished, and the results can wait for the next start."
    save = runs.Checkpoints.save

    def save_and_send(self, model, optimizer, progress, row, better):
        if progress.step == 6:
            signal.raise_signal(number)
        save(self, model, optimizer, progress, row, better)

    with monkeypatch.context() as patch:
        patch.setattr(runs.Checkpoints, "save", save_and_send)
        ends_with(status, *TRAIN)
    assert "stopped after step 6; go on with" in capsys.readouterr().err
    main(["train", "--resume", "runs/new"])
    same_as_small(own)


def same_as_small(folder: Path) -> None:
    for name in ("last/model.safetensors", "best/model.safetensors", "samples.jsonl"):
        new, small = (folder / "runs" / run / name for run in ("new", "small"))
        assert new.read_bytes() == small.read_bytes(), name


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGXCPU])
def test_server_stopped(commands, own, number):
    "Any of the signals ends a server as SIGTERM does."
    server = commands.start(own, "serve", "runs/small", "--port", "0")
    wait_for_address(server, server.out)
    server.send_signal(number)
    assert server.communicate()[1] == "" and server.returncode == 0


def test_folder_that_was_being_replaced(tmp_path, monkeypatch):
    "Stopped or killed between two renames: the old one is still there."
    folder = tmp_path / "best"
    with whole_folder(folder) as new:
        (new / "file").write_text("old")
    rename, calls = Path.rename, []

    def second_fails(path, target):
        calls.append(path)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return rename(path, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "rename", second_fails)
        with whole_folder(folder) as new:
            (new / "file").write_text("new")
    assert (folder / "file").read_text() == "old"
    folder.rename(tmp_path / ".best.999999999.old")  # as a killed process would leave it
    with suppress(ZeroDivisionError), whole_folder(folder) as new:
        assert (folder / "file").read_text() == "old"
        fail()
    assert [path.name for path in tmp_path.iterdir()] == ["best"]


# --- a schedule that is stretched


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
def test_jump_of_the_learning_rate(undisturbed, tmp_path, capsys, schedule):
    "More steps stretch a schedule: the line has the rates that the two rows have."
    train = replace(SHORT, schedule=schedule)
    for most in (6, 600):
        longer = replace(train, max_steps=most, eval_every=most)
        with suppress(KeyboardInterrupt):
            train_run(
                tmp_path / "run",
                data_in(undisturbed),
                SHAPE,
                longer,
                resume=most > 6,
                log=lambda row: row["step"] == 7 and cut_power(),
            )
    said = re.findall("jumps from (\\S+) to (\\S+), (\\S+) times", capsys.readouterr().err)
    rows = read_rows(tmp_path / "run/metrics.jsonl")
    before, after = (row["learning_rate"] for row in rows[5:7])
    if schedule == "constant":
        assert not said and before == after
    else:
        assert after > 2 * before
        assert said == [(f"{before:.3g}", f"{after:.3g}", f"{after / before:.3g}")]


def cut_power():
    raise KeyboardInterrupt


def test_more_micro_batches_are_reported(undisturbed, tmp_path, capsys):
    "With dropout, its draws depend on how a batch is divided."
    shutil.copytree(undisturbed / "run", tmp_path / "run")
    longer = replace(SHORT, max_steps=7, micro_batches=2)
    train_run(tmp_path / "run", data_in(undisturbed), SHAPE, longer, resume=True)
    said = capsys.readouterr().err
    assert "train.micro_batches was 1 and is 2 now: resuming, but dropout draws" in said


# --- byte for byte


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_state_of_a_resumed_run(undisturbed, tmp_path, optimizer):
    "Also what the optimizer and the random generators keep is the same, byte for byte."
    train = replace(SHORT, optimizer=optimizer)

    def cut(row):
        if row["step"] == 4:
            raise PowerCut

    train_run(tmp_path / "whole", data_in(undisturbed), SHAPE, train)
    with pytest.raises(PowerCut):
        train_run(tmp_path / "cut", data_in(undisturbed), SHAPE, train, log=cut)
    train_run(tmp_path / "cut", data_in(undisturbed), SHAPE, train, resume=True)
    for name in ("last/state.pt", "best/state.pt", "last/model.safetensors"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_one_flipped_bit(own, split):
    "The tokens have a digest of their own, in every split."
    (file,) = (own / "data/processed").glob(f"*/{split}.pt")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert f"{split}.pt" in refusal("evaluate", "runs/small")


def swap_two_tokens(file: Path) -> bytes:
    "Let two tokens of a tokenizer.json have each other's ids; returns what was there before."
    before = file.read_bytes()
    about = json.loads(before)
    vocab = about["model"]["vocab"]
    one, two = (next(token for token, i in vocab.items() if i == n) for n in (40, 41))
    vocab[one], vocab[two] = 41, 40
    file.write_text(json.dumps(about))
    return before


@pytest.mark.parametrize(
    "command", ["generate RUN hello", "evaluate RUN", "export RUN o", "page RUN o"]
)
def test_tokenizer_of_another_run(own, command):
    "As many tokens as the right one, but not the same: each text would be nonsense."
    swap_two_tokens(own / "runs/small/tokenizer.json")
    assert "has other tokens than the model" in refusal(
        *command.replace("RUN", "runs/small").split()
    )
    main(["train", "--resume", "runs/small", "--train.max_steps", "7"])  # writes the right one


def test_older_runs_say_nothing_about_their_vocabulary(own):
    for name in ("last", "best"):
        about = own / "runs/small" / name / "checkpoint.json"
        known = json.loads(about.read_text())
        assert known.pop("vocabulary")
        about.write_text(json.dumps(known))
    main(["generate", "runs/small", "hello", "--max_new_tokens", "2"])


def test_tokenizer_that_was_changed_after_preparing(own):
    "It is made again from the rows, and the training is the same."
    (file,) = (own / "data/processed").glob("*/tokenizer.json")
    before = swap_two_tokens(file)
    main(TRAIN)
    assert file.read_bytes() == before
    same_as_small(own)


# --- locks, and what processes share


def test_waiting_for_a_lock(commands, own):
    "After a few seconds, one line says what is waited for, and who holds it."
    with FileLock(own / "data/.lock"):
        waiting = commands.start(own, "prepare", "--config", "runs/small/config.yaml")
        end = time.monotonic() + 120
        while not (said := waiting.err.read_text()):
            assert waiting.poll() is None and time.monotonic() < end
            time.sleep(0.05)
    assert waiting.wait() == 0
    assert said == f"waiting for data/.lock, which is held by process {os.getpid()}\n"


def test_compiled_kernels_are_kept_apart(monkeypatch):
    "Those of another instruction set or processor are in another folder."
    folders = set()
    for instructions in ("AVX2", "AVX512", "DEFAULT"):
        monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: instructions)
        runs.separate_compiled_kernels()
        folders.add(os.environ["TORCHINDUCTOR_CACHE_DIR"])
    assert len(folders) == 3
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "mine")
    runs.separate_compiled_kernels()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "mine"


def test_a_user_without_a_name(monkeypatch):
    "A container under a number that its system does not know: PyTorch's own folder needs a name."

    def no_name():
        raise KeyError("getpwuid(): uid not found: 12345")

    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setattr(runs.getpass, "getuser", no_name)
    runs.separate_compiled_kernels()
    assert f"torchinductor_{os.getuid()}_" in os.environ["TORCHINDUCTOR_CACHE_DIR"]


@pytest.mark.parametrize(
    "closed",
    ["0<&- 1>&- 2>&-", *(pytest.param(f"{n}<&-", marks=pytest.mark.slow) for n in (0, 1, 2))],
)
def test_closed_streams(tmp_path, closed):
    "As under some schedulers and services: Python has None in place of a closed stream."
    train = [COMMAND, "train", "--config", "tiny", *SMALL, "--folder", "run"]
    for args in (train, [COMMAND, "generate", "run", " ="]):
        line = f"exec {shlex.join(args)} {closed}"
        done = subprocess.run(["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert (tmp_path / "run/summary.json").exists()


@pytest.mark.parametrize("name", ["[a] b", "50 %", "-dash", "runs/./x/../y", "émoji 😀"])
def test_odd_names_of_folders(own, name, capsys):
    "Names that mean something to globs, formats, shells and parsers are names."
    main(["train", "--config", "tiny", *SMALL, f"--folder={name}"])
    main(["train", f"--resume={name}/", "--train.max_steps=7"])
    assert json.loads((own / name / "summary.json").read_text())["steps"] == 7
    main(["runs", str((own / name).parent)])
    assert (own / name).resolve().name in capsys.readouterr().out
