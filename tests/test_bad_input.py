"""A mistake is told in one line with a non-zero exit, leaves nothing half-written, and the same
command works once its cause is gone."""

import json
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import SMALL

from tinytransformer.cli import main

COMMAND = str(Path(sys.executable).with_name("tinytransformer"))


def refusal(*args: str) -> str:
    "The one line with which a command refuses."
    with pytest.raises(SystemExit) as stop:
        main(list(args))
    message = stop.value.code
    assert (
        isinstance(message, str)
        and message.startswith("tinytransformer: ")
        and "\n" not in message
        and "Traceback" not in message
    )
    return message


TRAIN = ["train", "--config", "tiny", *SMALL]


@pytest.mark.parametrize(
    "args, said",
    [
        ("", "a command is missing: give one of prepare, train, evaluate"),
        ("trian", "there is no command 'trian'"),
        ("train", "--config is missing"),
        ("train --config nope", "no configuration 'nope': give tiny, wikitext2"),
        ("train --config tiny --model.num_layer 3", "--model.num_layer"),
        ("train --config tiny --modle.num_layers 3", "--modle.num_layers"),
        ("train --config tiny --model.num_layers many", "model.num_layers is 'many': give int"),
        ("train --config tiny --model.num_heads 3", "num_heads 3 does not divide"),
        ("train --config tiny --model.dropout 1.5", "dropout is 1.5"),
        ("train --config tiny --model.seq_len 0", "seq_len is 0"),
        ("train --config tiny --train.learning_rate -1", "learning_rate is -1"),
        ("train --config tiny --train.batch_size 0", "batch_size is 0"),
        ("train --config tiny --data.articles 1", "articles is 1"),
        ("prepare --config tiny --data.articles 50000", "articles is 50000: give 10 to 40000"),
        ("train --config tiny --data.vocab_size 100", "vocab_size is 100"),
        (
            "prepare --config tiny --data.vocab_size 2000000",
            "vocab_size is 2000000: give 256, one for each byte, to 1048576",
        ),
        ("train --config tiny --data.dataset wikitext", "'wikitext'"),
        ("prepare --config tiny --data.dataset ../..", "'../..'"),
        ("prepare --config tiny --data.tokenizer a/../b", "'a/../b'"),
        ("prepare --config wikitext2 --data.subset ../elsewhere", "'../elsewhere'"),
        ("prepare --config wikitext2 --data.dataset tinywiki", "tinywiki has no subsets"),
        ("prepare --config tiny --data.data_dir=", "data_dir is ''"),
        ("train --config tiny --sample.top_p 0", "top_p is 0"),
        ("evaluate nowhere", "nowhere is no run folder"),
        ("generate nowhere hello", "nowhere is no run folder"),
        ("evaluate runs/small --split tset", "'tset'"),
        ("generate runs/small", "PROMPT"),
        ("generate runs/small hello --temperature -1", "temperature is -1"),
        ("generate runs/small hello --temperature hot", "temperature is 'hot': give float"),
        ("generate runs/small hello --top_k 0", "top_k is 0"),
        ("generate runs/small hello --temperature nan", "temperature is 'nan'"),
        (
            "generate runs/small hello --repetition_penalty 1e300",
            "repetition_penalty is 1e+300: give 0.01 to 100",
        ),
        ("generate runs/small hello --seed 99999999999999999999", "seed is 99999999999999999999"),
        ("generate runs/small half-\udcff", "half of a character"),
    ],
)
def test_refused(here, args, said):
    assert said in refusal(*args.split())


@pytest.mark.parametrize(
    "text, said",
    [
        ("model: [1", "cannot be read as YAML|nable"),
        ("model:\n  num_layer: 3\n", "num_layer"),
        ("modle:\n  num_layers: 3\n", "modle"),
        ("just words", "words|config"),
    ],
)
def test_config_file_refused(tmp_path, text, said):
    (tmp_path / "mine.yaml").write_text(text)
    assert re.search(said, refusal("train", "--config", str(tmp_path / "mine.yaml")))


def test_prompts_refused(here):
    assert "empty" in refusal("generate", "runs/small", "")
    assert "context of 32" in refusal("generate", "runs/small", "far too long " * 30)


def test_text_too_short_or_small(here):
    assert "text has" in refusal(*TRAIN, "--folder", "runs/short", "--model.seq_len", "100000")
    assert "batch_size is 100000" in refusal(
        *TRAIN, "--folder", "runs/big", "--train.batch_size", "100000"
    )
    assert "different pieces" in refusal(
        *TRAIN, "--folder", "runs/rich", "--data.vocab_size", "50000"
    )
    assert "leave it out" in refusal(*TRAIN, "--folder", "runs/other", "--model.vocab_size", "301")
    assert not any(
        (here / "runs" / name).exists() for name in ("short", "big", "rich", "other")
    )  # nothing half-made
    main([*TRAIN, "--folder", "runs/short"])  # the same command with its cause gone


def test_diverged(here):
    """It stops, says at which step, where and from what one can go on; or leaves such steps out, if
    it is told to.
    """
    wild = [
        *TRAIN,
        "--train.learning_rate",
        "1e30",
        "--train.warmup_steps",
        "4",
        "--train.eval_every",
        "1",
    ]
    said = refusal(*wild, "--folder", "runs/diverged")
    assert re.search(
        r"training diverged at step \d: loss .*, gradient norm .*, first seen in (the (weight|output|gradient) \S|the loss)",
        said,
    )
    assert re.search(
        r"last good checkpoint is that of step \d: to go on from it, add --train.skip_non_finite true to `tinytransformer train --resume runs/diverged`",
        said,
    )
    assert "diverged" in refusal("train", "--resume", "runs/diverged")  # and again, from there
    assert "no look at the validation split found a finite loss" in refusal(
        "train", "--resume", "runs/diverged", "--train.skip_non_finite", "true"
    )
    rows = [json.loads(line) for line in (here / "runs/diverged/metrics.jsonl").open()]
    assert (
        len(rows) == 6
        and rows[-1]["skipped"]
        and "NaN" not in (here / "runs/diverged/metrics.jsonl").read_text()
    )


def test_too_large_for_the_memory(here):
    assert "not enough memory" in refusal(
        *TRAIN, "--folder", "runs/vast", "--model.embed_dim", "100000000", "--model.num_heads", "1"
    )
    assert not (here / "runs/vast").exists()


def test_run_folder_is_never_overwritten(here):
    before = (here / "runs/small/last/model.safetensors").read_bytes()
    assert (
        "runs/small holds a run already: go on with it by `tinytransformer train --resume runs/small`"
        in refusal(*TRAIN, "--folder", "runs/small")
    )
    assert (here / "runs/small/last/model.safetensors").read_bytes() == before


def test_a_folder_of_the_users_is_never_overwritten(here):
    (here / "mine").mkdir(exist_ok=True)
    (here / "mine/notes.txt").write_text("precious")
    assert "mine holds something already" in refusal(*TRAIN, "--folder", "mine")
    assert (here / "mine/notes.txt").read_text() == "precious" and len(
        list((here / "mine").iterdir())
    ) == 1


@pytest.fixture
def own_data(workspace, tmp_path, monkeypatch):
    "A copy of the workspace that may be damaged."
    shutil.copytree(workspace, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_data_dir_that_cannot_be_written(tmp_path, monkeypatch):
    "A file in the place of the folder, or of one below it."
    monkeypatch.chdir(tmp_path)
    command = ["prepare", "--config", "tiny", *SMALL[:4]]
    (tmp_path / "data").write_text("mine")
    assert "cannot write data (" in refusal(*command) and (tmp_path / "data").read_text() == "mine"
    (tmp_path / "data").rename("mine")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/raw").write_text("mine too")
    assert (
        "cannot write data/raw (" in refusal(*command)
        and (tmp_path / "data/raw").read_text() == "mine too"
    )
    (tmp_path / "data/raw").unlink()
    main(command)


def test_home_is_expanded(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path))
    main(["prepare", "--config", "tiny", *SMALL[:4], "--data.data_dir=~/kept"])
    assert (tmp_path / "kept/processed").is_dir() and not list((tmp_path / "here").iterdir())


def test_tiny_top_p_keeps_the_likeliest(here, capsys):
    main(["generate", "runs/small", " =", "--temperature", "0"])
    greedy = capsys.readouterr().out
    main(["generate", "runs/small", " =", "--top_p", "1e-300"])
    assert capsys.readouterr().out == greedy


WRONG = dict(
    list=[1, 2],
    fractions=torch.zeros(9),
    matrix=torch.zeros(3, 3, dtype=torch.int32),
    short=torch.zeros(9, dtype=torch.int32),
    none=torch.zeros(0, dtype=torch.int32),
)


@pytest.mark.parametrize("damage", ["truncated", "foreign", "pickle", "empty", *WRONG])
def test_damaged_tensors(own_data, damage):
    path = next((own_data / "data/processed").glob("*/train.pt"))
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    if damage == "foreign":
        torch.save(dict(tokens=torch.zeros(9), fingerprint="of another text"), path)
    if damage == "pickle":
        torch.save(dict(tokens=subprocess.run), path)  # code, not numbers: never loaded
    if damage == "empty":
        path.write_bytes(b"")
    if damage in WRONG:
        torch.save(dict(tokens=WRONG[damage], fingerprint=torch.load(path)["fingerprint"]), path)
    message = refusal("evaluate", "runs/small")
    assert "train.pt" in message and "delete" in message
    shutil.rmtree(path.parent)  # what the message says
    main(["evaluate", "runs/small"])


@pytest.mark.parametrize(
    "wrong",
    [dict(tokens="many"), dict(words=None), dict(bytes=-1), dict(nats="few"), dict(rows=0.5)],
)
def test_damaged_numbers(own_data, wrong):
    "The numbers beside the tensors can be read, but are none."
    path = next((own_data / "data/processed").glob("*/about.json"))
    about = json.loads(path.read_text())
    about["splits"]["test"] |= wrong
    path.write_text(json.dumps(about))
    assert "delete it and run again" in refusal("evaluate", "runs/small")
    shutil.rmtree(path.parent)
    main(["evaluate", "runs/small"])


def test_damaged_rows(own_data):
    path = next((own_data / "data/raw").glob("*/train/*.arrow"))
    path.write_bytes(path.read_bytes()[:200])
    assert "data/raw" in refusal("evaluate", "runs/small")
    shutil.rmtree(path.parent.parent)
    main(["evaluate", "runs/small"])


@pytest.mark.parametrize(
    "name", ["config.yaml", "best/model.safetensors", "tokenizer.json", "best/checkpoint.json"]
)
@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_damaged_run(own_data, name, damage):
    path = own_data / "runs/small" / name
    data = path.read_bytes()
    path.unlink()
    if damage == "truncated":
        path.write_bytes(data[:20])
    refusal("generate", "runs/small", "hello")
    path.write_bytes(data)
    main(["generate", "runs/small", "hello"])


def test_other_data_than_trained_on(own_data):
    path = own_data / "runs/small/config.yaml"
    path.write_text(path.read_text().replace("articles: 60", "articles: 61"))
    assert "other data" in refusal("evaluate", "runs/small")


@pytest.mark.parametrize("limit", [20_000, 200_000])
def test_full_disk(tmp_path, limit):
    """No file may grow beyond `limit` bytes, as on a disk that fills up: nothing half-written
    stays, and with room it works.
    """

    def no_room():
        import signal

        signal.signal(
            signal.SIGXFSZ, signal.SIG_IGN
        )  # so that writing fails with an error, as it does on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    command = [COMMAND, "prepare", "--config", "tiny", "--data.articles", "600"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, preexec_fn=no_room)
    assert (
        done.returncode != 0
        and done.stderr.startswith("tinytransformer: ")
        and len(done.stderr.strip().splitlines()) == 1
    ), done.stderr
    assert not list((tmp_path / "data").glob("processed/*")) and not list(
        (tmp_path / "data").glob("raw/.*")
    )
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_killed_while_preparing(tmp_path):
    "What a killed run leaves behind is swept away by the next."
    for folder in ("raw", "processed"):
        (tmp_path / "data" / folder).mkdir(parents=True)
    done = subprocess.run(
        [COMMAND, "prepare", "--config", "tiny", *SMALL[:4]],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    made = [p for folder in ("raw", "processed") for p in (tmp_path / "data" / folder).iterdir()]
    for path in made:
        path.rename(path.with_name(f".{path.name}.12345"))  # as if killed just before the rename
    for path in made:
        path.with_name(f".{path.name}.12346").symlink_to(tmp_path)
    done = subprocess.run(
        [COMMAND, "prepare", "--config", "tiny", *SMALL[:4]],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert sorted(
        p for folder in ("raw", "processed") for p in (tmp_path / "data" / folder).iterdir()
    ) == sorted(made)
