"""The installed command, as its users run it."""
import json, subprocess, sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import SMALL
from tinytransformer.cli import main

COMMAND = str(Path(sys.executable).with_name("tinytransformer"))


def snapshot(folder: Path) -> dict:
    return {str(f.relative_to(folder)): (f.stat().st_mtime_ns, f.read_bytes()) for f in sorted(folder.rglob("*")) if f.is_file() and f.name != ".lock"}


@pytest.mark.parametrize("args", ["--help", "prepare --help", "train --help", "evaluate --help", "generate --help", "--version"])
def test_help(args, capsys):
    with pytest.raises(SystemExit) as stop: main(args.split())
    out = capsys.readouterr().out
    assert stop.value.code in (0, None) and out
    if args.startswith("train"):
        for said in ("--model.num_layers", "type: int", "default: 4", "longest context"): assert said in " ".join(out.split())


def test_installed_command_trains(tmp_path):
    "A run folder with all it should hold, in a process of its own, quiet where there is no terminal."
    done = subprocess.run([COMMAND, "train", "--config", "tiny", *SMALL], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "validation loss" in done.stdout and "entropy floor" in done.stdout
    assert "it/s" not in done.stderr and "step/s" not in done.stderr
    run = tmp_path/"runs"/"tiny"
    assert {f.name for f in run.iterdir()} == {"config.yaml", "metrics.jsonl", "model.safetensors", "tokenizer.json", "summary.json", "curve.png", "samples.txt"}
    config = yaml.safe_load((run/"config.yaml").read_text())
    assert config["model"]["vocab_size"] == 300 and config["train"]["max_steps"] == 6 and set(config) == {"data", "model", "train", "sample"}
    assert [json.loads(line)["step"] for line in (run/"metrics.jsonl").open()] == [1, 2, 3, 4, 5, 6]
    assert (run/"curve.png").read_bytes().startswith(b"\x89PNG") and (run/"samples.txt").read_text().strip()


def test_same_seed_same_run(here):
    "Two runs of one configuration give identical losses and weights; another seed gives others."
    for name, seed in dict(a="0", b="0", c="1").items(): main(["train", "--config", "tiny", "--run", f"runs/{name}", *SMALL, "--train.seed", seed])
    read = {name: [(Path("runs")/name/file).read_bytes() for file in ("metrics.jsonl", "model.safetensors")] for name in "abc"}
    assert read["a"] == read["b"]
    assert read["a"][0] != read["c"][0] and read["a"][1] != read["c"][1]


def test_second_prepare_changes_nothing(here, capsys):
    before = snapshot(here/"data")
    main(["prepare", "--config", "tiny", *SMALL])
    assert "300 tokens" in capsys.readouterr().out
    assert before and snapshot(here/"data") == before


def test_evaluate_prints_the_loss_of_the_run(here, capsys):
    main(["evaluate", "runs/small"])
    row = capsys.readouterr().out.splitlines()[1].split()
    summary = json.loads((here/"runs/small/summary.json").read_text())
    assert row[0] == "validation" and float(row[2]) == pytest.approx(summary["val_loss"], abs=1e-3) and float(row[3]) == pytest.approx(summary["floor"], abs=1e-3)


def test_generate_continues_the_prompt(here, capsys):
    say = lambda *args: (main(["generate", "runs/small", " = The", *args]), capsys.readouterr().out)[1]
    assert say().startswith(" = The") and say() == say()
    assert say("--temperature", "0") == say("--temperature", "0", "--seed", "5")  # greedy draws nothing
    assert len(say("--max_new_tokens", "60")) > len(say())


def test_context_of_two_tokens(here, capsys):
    "Too short for a title to be the prompt of the samples."
    main(["train", "--config", "tiny", "--run", "runs/narrow", *SMALL, "--model.seq_len", "2"])
    assert "validation loss" in capsys.readouterr().out


def test_new_folder_for_each_run(tmp_path, monkeypatch):
    "A second run never overwrites the first."
    from tinytransformer.cli import new_folder
    monkeypatch.chdir(tmp_path)
    for wanted in ("runs/tiny", "runs/tiny-2", "runs/tiny-3"):
        folder = new_folder("tiny")
        assert folder == Path(wanted)
        folder.mkdir(parents=True)
