"""A mistake is told in one line with a non-zero exit, leaves nothing half-written, and the same
command works once its cause is gone."""

import json
import re
import shutil
import subprocess

import pytest
import torch
from conftest import SMALL, refusal

from tinytransformer.cli import main

TRAIN = ["train", "--config", "tiny", *SMALL]


@pytest.mark.parametrize(
    "args, said",
    [
        ("", "a command is missing: give one of prepare, train, evaluate"),
        ("trian", "there is no command 'trian'"),
        ("train", "--config is missing"),
        ("train --config nope", "no configuration 'nope': give tiny, wikitext2"),
        ("train --config tiny --model.num_layer 3", "unrecognized arguments: --model.num_layer"),
        ("train --config tiny --modle.num_layers 3", "unrecognized arguments: --modle.num_layers"),
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
        (
            "train --config tiny --data.dataset wikitext",
            "data.dataset is 'wikitext': give tinywiki or",
        ),
        ("prepare --config tiny --data.dataset ../..", "data.dataset is '../..': give tinywiki or"),
        (
            "prepare --config tiny --data.tokenizer a/../b",
            "data.tokenizer is 'a/../b': give bpe or",
        ),
        ("prepare --config wikitext2 --data.subset ../elsewhere", "'../elsewhere'"),
        ("prepare --config wikitext2 --data.dataset tinywiki", "tinywiki has no subsets"),
        ("prepare --config tiny --data.data_dir=", "data_dir is ''"),
        ("train --config tiny --sample.top_p 0", "top_p is 0"),
        ("evaluate nowhere", "nowhere is not a run folder"),
        ("generate nowhere hello", "nowhere is not a run folder"),
        ("evaluate runs/small --split tset", "--split: invalid choice: 'tset'"),
        ("generate runs/small", "arguments are required: PROMPT"),
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
        ("model: [1", "mine.yaml cannot be read as YAML: "),
        ("model:\n  num_layer: 3\n", "does not accept option 'model.num_layer'"),
        ("modle:\n  num_layers: 3\n", "does not accept option 'modle.num_layers'"),
        ("just words", "mine.yaml is not a configuration: give sections such as `model:`"),
    ],
)
def test_config_file_refused(tmp_path, text, said):
    (tmp_path / "mine.yaml").write_text(text)
    assert said in refusal("train", "--config", str(tmp_path / "mine.yaml"))


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
    # nothing half-made
    assert not any((here / "runs" / name).exists() for name in ("short", "big", "rich", "other"))
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
        r"training diverged at step \d: loss .*, gradient norm .*, first seen in (the"
        r" (weight|output|gradient) \S|the loss)",
        said,
    )
    assert re.search(
        r"last good checkpoint is that of step \d: to go on from there, resume it with"
        r" train.skip_non_finite true \(`tinytransformer train --resume runs/diverged"
        r" --train.skip_non_finite true`",
        said,
    )
    assert "diverged" in refusal("train", "--resume", "runs/diverged")  # and again, from there
    assert "no evaluation found a finite validation loss" in refusal(
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
        "runs/small already holds a run: resume it (`tinytransformer train --resume runs/small`"
        in refusal(*TRAIN, "--folder", "runs/small")
    )
    assert (here / "runs/small/last/model.safetensors").read_bytes() == before


def test_a_folder_of_the_users_is_never_overwritten(here):
    (here / "mine").mkdir(exist_ok=True)
    (here / "mine/notes.txt").write_text("precious")
    assert "mine is not empty" in refusal(*TRAIN, "--folder", "mine")
    assert (here / "mine/notes.txt").read_text() == "precious" and len(
        list((here / "mine").iterdir())
    ) == 1


@pytest.fixture
def own_data(small_run, tmp_path, monkeypatch):
    "A copy of the small run and its data that may be damaged."
    shutil.copytree(small_run, tmp_path, dirs_exist_ok=True)
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


CHECKPOINT = "the checkpoint runs/small/best is missing or damaged"
TOKENIZER = "runs/small/tokenizer.json is missing or damaged"
WEIGHTS, RECORD = "runs/small/best/model.safetensors", "runs/small/best/checkpoint.json"


@pytest.mark.parametrize(
    "name, damage, said",
    [
        (
            "config.yaml",
            "truncated",
            "runs/small/config.yaml: data.dataset is 'tin': give tinywiki",
        ),
        ("config.yaml", "missing", "runs/small is not a run folder: there is no config.yaml in it"),
        ("tokenizer.json", "truncated", TOKENIZER),
        ("tokenizer.json", "missing", TOKENIZER),
        (
            "best/model.safetensors",
            "truncated",
            f"{CHECKPOINT} (model.safetensors is not what was written)",
        ),
        (
            "best/model.safetensors",
            "missing",
            f"{CHECKPOINT} ([Errno 2] No such file or directory: '{WEIGHTS}')",
        ),
        ("best/checkpoint.json", "truncated", f"{CHECKPOINT} (Unterminated string"),
        (
            "best/checkpoint.json",
            "missing",
            f"{CHECKPOINT} ([Errno 2] No such file or directory: '{RECORD}')",
        ),
    ],
)
def test_damaged_run(own_data, name, damage, said):
    "The message names the file that is damaged; when that is put right, the same command works."
    path = own_data / "runs/small" / name
    data = path.read_bytes()
    path.unlink()
    if damage == "truncated":
        path.write_bytes(data[:20])
    assert said in refusal("generate", "runs/small", "hello")
    path.write_bytes(data)
    main(["generate", "runs/small", "hello"])


def test_other_data_than_trained_on(own_data):
    path = own_data / "runs/small/config.yaml"
    path.write_text(path.read_text().replace("articles: 60", "articles: 61"))
    assert "other data" in refusal("evaluate", "runs/small")


@pytest.mark.parametrize("limit", [20_000, 200_000])
def test_full_disk(commands, tmp_path, limit):
    """No file may grow beyond `limit` bytes, as on a disk that fills up: nothing half-written
    stays, and with room it works.
    """
    command = ["prepare", "--config", "tiny", "--data.articles", "600"]
    done = commands.run(tmp_path, *command, faults=dict(file_size=limit))
    assert (
        done.returncode != 0
        and done.stderr.startswith("tinytransformer: ")
        and len(done.stderr.strip().splitlines()) == 1
    ), done.stderr
    assert "File too large" in done.stderr
    assert not list((tmp_path / "data").glob("processed/*")) and not list(
        (tmp_path / "data").glob("raw/.*")
    )
    done = commands.run(tmp_path, *command)
    assert done.returncode == 0, done.stderr


def test_killed_while_preparing(commands, tmp_path):
    "What a killed run leaves behind is removed by the next."

    def prepare():
        assert (
            done := commands.run(tmp_path, "prepare", "--config", "tiny", *SMALL[:4])
        ).returncode == 0, done.stderr

    for folder in ("raw", "processed"):
        (tmp_path / "data" / folder).mkdir(parents=True)
    prepare()
    made = [p for folder in ("raw", "processed") for p in (tmp_path / "data" / folder).iterdir()]
    for path in made:
        path.rename(path.with_name(f".{path.name}.12345"))  # as if killed just before the rename
    for path in made:
        path.with_name(f".{path.name}.12346").symlink_to(tmp_path)
    prepare()
    assert sorted(
        p for folder in ("raw", "processed") for p in (tmp_path / "data" / folder).iterdir()
    ) == sorted(made)
