"""The installed command, as its users run it."""

import fcntl
import json
import os
import pty
import re
import shutil
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
import yaml
from commands import COMMAND
from conftest import SMALL
from filelock import FileLock

from tinytransformer.__main__ import COMMANDS as DESCRIPTIONS
from tinytransformer.cli import main, parse
from tinytransformer.corpus import load_corpus


def snapshot(folder: Path) -> dict:
    return {
        str(f.relative_to(folder)): (f.stat().st_mtime_ns, f.read_bytes())
        for f in sorted(folder.rglob("*"))
        if f.is_file() and f.name != ".lock"
    }


@pytest.mark.parametrize(
    "args",
    [
        "--help",
        "prepare --help",
        "train --help",
        "evaluate --help",
        "generate --help",
        "compare --help",
        "export --help",
        "serve --help",
        "runs --help",
        "--version",
    ],
)
def test_help(args, capsys):
    with pytest.raises(SystemExit) as stop:
        main(args.split())
    out = capsys.readouterr().out
    assert stop.value.code in (0, None) and out
    if args.startswith("train"):
        for said in ("--model.num_layers", "type: int", "default: 4", "longest context"):
            assert said in " ".join(out.split())


def test_installed_command_trains(tmp_path):
    """A run folder with all it should hold, in a process of its own, quiet where there is no
    terminal.
    """
    done = subprocess.run(
        [COMMAND, "train", "--config", "tiny", *SMALL], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "validation loss" in done.stdout and "entropy floor" in done.stdout
    assert "it/s" not in done.stderr and "step/s" not in done.stderr
    run = tmp_path / "runs" / "tiny"
    assert {f.name for f in run.iterdir()} == {
        ".lock",
        "config.yaml",
        "environment.json",
        "tokenizer.json",
        "metrics.jsonl",
        "samples.jsonl",
        "summary.json",
        "curve.png",
        "last",
        "previous",
        "best",
    }
    assert all(
        {f.name for f in (run / name).iterdir()}
        == {"model.safetensors", "state.pt", "checkpoint.json"}
        for name in ("last", "previous", "best")
    )
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert (
        config["model"]["vocab_size"] == 300
        and config["train"]["max_steps"] == 6
        and set(config) == {"data", "model", "train", "sample"}
    )
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").open()] == [
        1,
        2,
        3,
        4,
        5,
        6,
    ]
    assert (run / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert [json.loads(line)["step"] for line in (run / "samples.jsonl").open()] == [3, 6]
    said = json.loads((run / "last/checkpoint.json").read_text())
    assert (
        said["step"] == 6
        and said["config"] == config
        and {"data", "versions", "commit", "metrics", "progress"} <= set(said)
    )
    # a line for each look, where there is no terminal
    assert [line.split()[1] for line in done.stderr.splitlines()] == ["3/6", "6/6"]


def test_bar_in_a_terminal(here):
    "One bar: steps, losses, rate and time left."
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 160, 0, 0))  # rows and columns
    with subprocess.Popen(
        [
            COMMAND,
            "train",
            "--config",
            "tiny",
            "--folder",
            "runs/watched",
            *SMALL,
            "--train.max_steps",
            "60",
        ],
        stdout=subprocess.DEVNULL,
        stderr=theirs,
    ) as process:
        os.close(theirs)
        shown = b""
        while chunk := read_or_nothing(ours):
            shown += chunk
    assert process.returncode == 0
    bar = (
        r"training: 100%.*60/60 \[\d\d:\d\d<\d\d:\d\d, .*step/s, loss=\d.*, val_loss=\d.*,"
        r" tokens=.*/s\]"
    )
    assert re.search(bar, shown.decode().replace("\r", "\n")), shown.decode()


def read_or_nothing(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65536)
    except OSError:
        return b""  # the other end has been closed


def test_same_seed_same_run(here):
    "Two runs of one configuration give identical losses and weights; another seed gives others."
    for name, seed in dict(a="0", b="0", c="1").items():
        main(
            ["train", "--config", "tiny", "--folder", f"runs/{name}", *SMALL, "--train.seed", seed]
        )

    def losses(name):
        return [json.loads(line)["loss"] for line in (Path("runs") / name / "metrics.jsonl").open()]

    read = {
        name: (losses(name), (Path("runs") / name / "last/model.safetensors").read_bytes())
        for name in "abc"
    }
    assert read["a"] == read["b"]
    assert read["a"][0] != read["c"][0] and read["a"][1] != read["c"][1]


def test_training_prepares_once(here, monkeypatch):
    "The text is checked and opened once for a training, because every file of it is hashed."
    opened = []

    def load(folder):
        opened.append(folder)
        return load_corpus(folder)

    monkeypatch.setattr("tinytransformer.corpus.load_corpus", load)
    main(["train", "--config", "tiny", "--folder", "runs/once", *SMALL])
    assert len(opened) == 1


def test_second_prepare_changes_nothing(here, capsys):
    before = snapshot(here / "data")
    main(["prepare", "--config", "tiny", *SMALL])
    assert "300 tokens" in capsys.readouterr().out
    assert before and snapshot(here / "data") == before


def test_evaluate(here, capsys):
    """The loss of the run, in a table and in the run's folder; with overlapping windows too, if
    they are asked for.
    """
    main(["evaluate", "runs/small"])
    row = capsys.readouterr().out.splitlines()[1].split()
    summary = json.loads((here / "runs/small/summary.json").read_text())
    assert (
        row[:4] == ["validation", "side", "by", "side"]
        and float(row[5]) == pytest.approx(summary["val_loss"], abs=1e-3)
        and float(row[6]) == pytest.approx(summary["floor"], abs=1e-3)
    )
    main(["evaluate", "runs/small", "--split", "test", "--stride", "8"])
    kept = json.loads((here / "runs/small/evaluation.json").read_text())
    assert set(kept) == {"validation", "test"} and set(kept["test"]) == {"side by side", "stride 8"}
    assert kept["validation"]["side by side"]["loss"] == pytest.approx(
        summary["val_loss"], rel=1e-5
    )
    assert set(kept["test"]["stride 8"]) == {
        "step",
        "tokens",
        "loss",
        "floor",
        "perplexity",
        "word_perplexity",
        "bits_per_byte",
    }


def test_runs_side_by_side(tmp_path, workspace, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("one", "two"):
        shutil.copytree(workspace / "runs/small", tmp_path / "runs" / name)
    (tmp_path / "runs/two/summary.json").unlink()
    main(["runs"])
    head, one, two = capsys.readouterr().out.splitlines()
    assert (
        head.split()[:4] == ["run", "state", "steps", "parameters"]
        and one.split()[:3] == ["one", "complete", "6/6"]
        and two.split()[:3] == ["two", "stopped", "6/6"]
    )
    main(["runs", "--plot", "curves.png"])
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out.splitlines()[-1] == "the loss curves are in curves.png"
    main(["runs", "--plot", "curves.svg"])
    assert "<svg" in (tmp_path / "curves.svg").read_text()
    with pytest.raises(SystemExit, match="--plot curves: give a file that ends in .png"):
        main(["runs", "--plot", "curves"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match="there are no runs in empty"):
        main(["runs", "empty"])


def test_runs_only_reads(tmp_path, workspace, monkeypatch, capsys):
    "The listing writes nothing, neither a picture nor a lock, and sees who is training."
    monkeypatch.chdir(tmp_path)
    for name in ("one", "two"):
        shutil.copytree(workspace / "runs/small", tmp_path / "runs" / name)
        (tmp_path / "runs" / name / "summary.json").unlink()
    (tmp_path / "runs/one/.lock").unlink()

    def everything():
        paths = [tmp_path, *sorted(tmp_path.rglob("*"))]
        return {path: path.stat().st_mtime_ns for path in paths}

    before = everything()
    main(["runs"])
    assert everything() == before
    with FileLock(tmp_path / "runs/two/.lock"):
        main(["runs"])
    states = [line.split()[:2] for line in capsys.readouterr().out.splitlines()]
    assert states[1:3] == [["one", "stopped"], ["two", "stopped"]]
    assert states[4:] == [["one", "stopped"], ["two", "training"]]


@pytest.mark.parametrize("option", ["--config tiny", "--config=tiny"])
def test_options_after_the_configuration_override_it(option):
    "Wherever `--folder` stands, and however it is written."
    args = ["train", "--folder=~/a", *option.split(), "--model.num_layers", "3"]
    command, settings = parse(args)
    assert command == "train" and settings.model.num_layers == 3 and settings.resume is None
    assert settings.folder == "~/a" and [Path(str(path)).stem for path in settings.config] == [
        "tiny"
    ]


def test_descriptions_stand_once(capsys):
    "What the command says before PyTorch is loaded is what the parser says."
    for name, description in DESCRIPTIONS.items():
        with pytest.raises(SystemExit):
            main([name, "--help"])
        assert description in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    "change",
    [
        pytest.param("--train.compile true", marks=pytest.mark.slow),
        "--train.label_smoothing 0.1",
        "--train.schedule wsd --train.micro_batches 2",
    ],
)
def test_switches(here, change, capsys):
    "Each trains to the end, and to about the same losses."
    name = change.split()[0].removeprefix("--train.")
    main(["train", "--config", "tiny", "--folder", f"runs/{name}", *SMALL, *change.split()])

    def losses(run):
        return [json.loads(line)["loss"] for line in (here / "runs" / run / "metrics.jsonl").open()]

    assert losses(name) == pytest.approx(losses("small"), rel=0.01)
    assert (losses(name) != losses("small")) or name == "compile"


@pytest.mark.parametrize("change", ["--train.precision bf16", "--train.optimizer muon"])
def test_bf16_where_the_device_has_it(here, change, monkeypatch, capsys):
    """Where it would only be imitated, which can take a hundred times as long, float32 takes its
    place.
    """

    def losses(has):
        for module in ("variants", "devices"):
            monkeypatch.setattr(f"tinytransformer.{module}.has_bf16", lambda device: has)
        run = here / "runs" / f"{change.split()[1]}-{has}"
        main(["train", "--config", "tiny", "--folder", str(run), *SMALL, *change.split()])
        bf16, said = change.endswith("bf16"), capsys.readouterr().err
        assert json.loads((run / "environment.json").read_text())[0]["precision"] == (
            "bf16" if bf16 and has else "fp32"
        ) and ("only imitates" in said) == (bf16 and not has)
        return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").open()]

    native, imitated = losses(True), losses(False)
    assert imitated == pytest.approx(native, rel=0.01) and imitated != native
    if change.endswith("bf16"):
        assert imitated == [
            json.loads(line)["loss"] for line in (here / "runs/small/metrics.jsonl").open()
        ]


def test_patience(here):
    """Training ends when the validation loss has not been lower for so many looks; the best weights
    are kept.
    """
    main(
        [
            "train",
            "--config",
            "tiny",
            "--folder",
            "runs/patient",
            *SMALL,
            "--train.max_steps",
            "100",
            "--train.eval_every",
            "1",
            "--train.patience",
            "3",
            "--train.learning_rate",
            "1.0",
            "--train.schedule",
            "constant",
        ]
    )
    summary = json.loads((here / "runs/patient/summary.json").read_text())
    assert summary["steps"] == summary["best_step"] + 3 < 100


def test_generate_continues_the_prompt(here, capsys):
    def say(*args):
        main(["generate", "runs/small", " = The", *args])
        return capsys.readouterr().out

    assert say().startswith(" = The") and say() == say()
    greedy = say("--temperature", "0")
    assert greedy == say("--temperature", "0", "--seed", "5")  # greedy draws nothing
    assert len(say("--max_new_tokens", "60")) > len(say())


def test_context_of_two_tokens(here, capsys):
    "Too short for a title to be the prompt of the samples."
    main(["train", "--config", "tiny", "--folder", "runs/narrow", *SMALL, "--model.seq_len", "2"])
    assert "validation loss" in capsys.readouterr().out


def test_new_folder_for_each_run(tmp_path, monkeypatch):
    "A second run never overwrites the first."
    from tinytransformer.cli import new_folder

    monkeypatch.chdir(tmp_path)
    for wanted in ("runs/tiny", "runs/tiny-2", "runs/tiny-3"):
        folder = new_folder("tiny")
        assert folder == Path(wanted) and folder.is_dir()


def test_compare(here, capsys):
    "A row and a text for each strategy; what is given on the command line holds for all of them."
    main(["compare", "runs/small", "The", "--max_new_tokens", "7", "--seed", "3"])
    table, *texts = capsys.readouterr().out.split("\n--- ")
    rows = {}
    for line in table.splitlines()[1:]:
        if line:
            name, *numbers = re.split(r" {2,}", line)
            rows[name] = numbers
    assert list(rows) == [text.split(" ---")[0] for text in texts] and len(rows) == 9
    assert all(
        float(perplexity) >= 1 and repetition.endswith("%") and diversity.endswith("%")
        for perplexity, repetition, diversity in rows.values()
    )
    main(
        [
            "generate",
            "runs/small",
            "The",
            "--max_new_tokens",
            "7",
            "--seed",
            "3",
            "--temperature",
            "0",
        ]
    )
    # greedy writes what generate writes
    assert capsys.readouterr().out.rstrip("\n") in "\n--- ".join(texts)


def test_loads_only_what_it_needs(here):
    """A command that does not train waits neither for PyTorch's compiler nor for its code for
    spread weights, nor for what draws.
    """
    script = (
        "import sys; from tinytransformer.cli import main; main(sys.argv[1:]);"
        " print({'torch._dynamo', 'torch.distributed.checkpoint', 'matplotlib', 'datasets'} &"
        " sys.modules.keys())"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "generate", "runs/small", "The", "--max_new_tokens", "3"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "set()", (
        done.stdout + done.stderr
    )


def test_fastcore_is_not_needed():
    "Only nbdev needs it, and the version that nbdev needs stands in the way of others."
    script = (
        "import sys; sys.modules['fastcore'] = None; from tinytransformer.cli import main;"
        " main(['train', '--help'])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0 and "longest context" in " ".join(done.stdout.split()), done.stderr
