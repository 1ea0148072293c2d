"""A message names a cause only where the code has established it, and nothing else is hidden."""

import errno
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from tinytransformer import cli
from tinytransformer.corpus import load_corpus
from tinytransformer.data import Blocks, encode_rows
from tinytransformer.files import is_write_error, read_rows
from tinytransformer.generate import draw_token, encode_prompt
from tinytransformer.runs import train_run
from tinytransformer.trackers import Trackers

COMMAND = str(Path(sys.executable).with_name("tinytransformer"))
RUN = Path("some/run")


@pytest.mark.parametrize(
    "error, is_it",
    [
        (OSError(errno.ENOSPC, "No space left on device"), True),  # comes without a file name
        (OSError(errno.EROFS, "Read-only file system", "elsewhere"), True),
        (PermissionError(errno.EACCES, "Permission denied", "some/run/config.yaml"), True),
        (
            NotADirectoryError(errno.ENOTDIR, "Not a directory", "some"),
            True,
        ),  # a file where a folder should be
        (
            FileNotFoundError(errno.ENOENT, "No such file or directory", "some/run"),
            True,
        ),  # as in /proc
        (PermissionError(errno.EACCES, "Permission denied", "/etc/shadow"), False),
        (
            FileNotFoundError(errno.ENOENT, "No such file or directory", "some/run/rows.arrow"),
            False,
        ),
        (ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"), False),
        (OSError("no number"), False),
    ],
    ids=str,
)
def test_what_a_failed_write_is(error, is_it):
    assert is_write_error(error, RUN) == is_it


@pytest.mark.parametrize(
    "error, refused",
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (
            RuntimeError(
                "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate"
                " memory"
            ),
            True,
        ),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (RuntimeError("channels_last memory_format is not supported"), False),
    ],
    ids=str,
)
def test_memory_is_blamed_only_when_it_has_run_out(monkeypatch, error, refused):
    def fail(cfg):
        raise error

    monkeypatch.setattr(cli, "runs_command", fail)
    with pytest.raises(SystemExit if refused else type(error)) as caught:
        cli.main(["runs", "anywhere"])
    assert not refused or "not enough memory" in str(caught.value)


def test_traceback_on_request(tmp_path):
    "One line without it; with it, where the error came from, and the same line at the end."
    command = [COMMAND, "evaluate", "nowhere"]
    plain = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    full = subprocess.run([*command, "--traceback"], cwd=tmp_path, capture_output=True, text=True)
    assert plain.returncode == full.returncode == 1 and plain.stderr.count("\n") == 1
    assert full.stderr.startswith("Traceback") and "load_run" in full.stderr
    assert full.stderr.endswith(plain.stderr)


def test_a_reader_that_has_gone_is_no_error(here):
    "As in `tinytransformer runs | head -1`: no message, and the status that a shell expects."
    process = subprocess.Popen([COMMAND, "runs"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 141


def test_prompts_get_no_special_tokens(workspace):
    "A tokenizer may add them to every text; the training text had none, so a prompt has none."
    tokenizer = load_corpus(next((workspace / "data/processed").iterdir())).tokenizer
    tokenizer.post_processor = TemplateProcessing(single="! $A !", special_tokens=[("!", 0)])
    assert tokenizer.encode("The").ids != encode_prompt(tokenizer, "The")
    assert encode_rows(["The"], tokenizer, "row").tolist() == encode_prompt(tokenizer, "The")


def test_an_unknown_argument_is_refused():
    with pytest.raises(TypeError, match="resumee"):
        inspect.signature(train_run).bind("run", None, None, None, resumee=True)


def test_an_epoch_ends_when_the_shuffle_begins_again(workspace):
    "Blocks that do not fill a batch belong to no epoch."
    run = workspace / "runs/small"
    config = json.loads((run / "last/checkpoint.json").read_text())["config"]
    corpus = load_corpus(next((workspace / "data/processed").iterdir()))
    blocks = len(Blocks(corpus.streams["train"], config["model"]["seq_len"]))
    steps = blocks // config["train"]["batch_size"]
    for row in read_rows(run / "metrics.jsonl"):
        assert row["epoch"] == pytest.approx(row["step"] / steps, abs=1e-4)


def test_no_tracker_leaves_the_environment_alone(tmp_path, monkeypatch):
    for name in list(os.environ):
        if name.startswith("MLFLOW_"):
            monkeypatch.delenv(name)
    Trackers(None, tmp_path, {})
    assert not [name for name in os.environ if name.startswith("MLFLOW_")]


def test_draws_are_made_on_the_cpu():
    "Whatever the device, float64 stays on the CPU: Apple's GPUs have none."

    class NoFloat64(torch.Tensor):
        "Stands in for a tensor on such a device."

        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            if func is torch.Tensor.cpu:
                return args[0].as_subclass(torch.Tensor).clone()
            assert func is not torch.Tensor.double, "float64 on a device that may have none"
            return super().__torch_function__(func, types, args, kwargs or {})

    probabilities = torch.tensor([[0.1, 0.9], [1.0, 0.0]])
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    same = [torch.Generator().manual_seed(0) for _ in range(2)]
    drawn = draw_token(probabilities.as_subclass(NoFloat64), generators)
    assert drawn.tolist() == draw_token(probabilities, same).tolist()
