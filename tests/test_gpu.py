"""The script for a GPU, at toy size on the CPU, without the packages that such a machine lacks."""

import json
import os
import subprocess
import sys
from argparse import Namespace

import pytest
import torch
from conftest import ROOT
from torch.overrides import TorchFunctionMode

import benchmarks
from benchmarks import gpu, gpu_steps
from benchmarks.gpu_steps import Bench, Skipped, Step
from tinytransformer.fast import HeadLoss, head_loss
from tinytransformer.files import InputError
from tinytransformer.loop import Stopped
from tinytransformer.model import next_token_loss

HIDDEN = ("datasets", "nbdev", "fastcore", "jsonargparse")
HIDING = f"""
import importlib.metadata, sys
from importlib.machinery import PathFinder

HIDDEN = {HIDDEN}
from_name = importlib.metadata.Distribution.from_name


class Hiding(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in HIDDEN else super().find_spec(name, path, target)


def visible(name):
    if name in HIDDEN:
        raise importlib.metadata.PackageNotFoundError(name)
    return from_name(name)


sys.meta_path[sys.meta_path.index(PathFinder)] = Hiding
importlib.metadata.Distribution.from_name = visible
"""

PEER = """
from dataclasses import dataclass

import torch
from torch import nn


@dataclass
class GPTConfig:
    block_size: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int
    bias: bool


class GPT(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.token = nn.Embedding(cfg.vocab_size, cfg.n_embd)
        self.head = nn.Linear(cfg.n_embd, cfg.vocab_size)

    def forward(self, x, y):
        logits = self.head(self.token(x))
        return logits, nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        return torch.optim.AdamW(self.parameters(), lr=learning_rate, betas=betas)
"""

WORKER = """
import json, os, signal, sys, time


def tell(**message):
    print(json.dumps(message), flush=True)


tell(ready=True)
for line in sys.stdin:
    name = line.strip()
    tell(row=dict(what=name))
    if name == "crash":
        print("last words", file=sys.stderr, flush=True)
        os._exit(3)
    if name == "hang":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(60)
    if name == "slow training":
        signal.signal(signal.SIGTERM, lambda *_: (tell(end="stopped"), sys.exit()))
        time.sleep(60)
    if name == "fault":
        tell(end="failed", error="Traceback (most recent call last):\\nZeroDivisionError: here")
    else:
        tell(end="done")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "Prepared for a toy run, with a small model in nanoGPT's place."
    checkout = tmp_path_factory.mktemp("checkout")
    (checkout / "model.py").write_text(PEER)
    folder = tmp_path_factory.mktemp("prepared")
    gpu.prepare_folder(Namespace(folder=folder, nanogpt=checkout, toy=True))
    return folder


@pytest.fixture
def hiding(tmp_path):
    "An environment from which the packages are hidden that a machine with a GPU may lack."
    (tmp_path / "hiding").mkdir()
    (tmp_path / "hiding" / "sitecustomize.py").write_text(HIDING)
    path = os.pathsep.join([str(tmp_path / "hiding"), str(ROOT)])
    return os.environ | dict(PYTHONPATH=path, OMP_NUM_THREADS="1")


def run_toy(folder, result, env, *options):
    command = [sys.executable, "-m", "benchmarks.gpu", "run", folder, result, "--toy"]
    command += ["--device", "cpu", "--no-compile", *options]
    return subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=600)


def steps_of(result):
    return {(s["part"], s["name"]): s for s in json.loads(result.read_text())["steps"]}


def test_packages_are_hidden(hiding):
    lines = [
        "from importlib.metadata import PackageNotFoundError, version",
        f"for name in {HIDDEN}:",
        "    for look in (__import__, version):",
        "        try: look(name)",
        "        except (ModuleNotFoundError, PackageNotFoundError): continue",
        "        raise SystemExit(f'{name} is there')",
    ]
    subprocess.run([sys.executable, "-c", "\n".join(lines)], env=hiding, check=True)


@pytest.mark.slow
def test_every_part(folder, tmp_path, hiding):
    "All steps are done, all checks are met, and a second call has nothing left to do."
    result = tmp_path / "out" / "gpu.json"
    done = run_toy(folder, result, hiding, "--minutes", "30")
    assert done.returncode == 0, done.stdout + done.stderr
    found = steps_of(result)
    assert list(found) == [(step.part, step.name) for step in gpu.STEPS]
    assert {step["status"] for step in found.values()} == {"done"}, done.stdout
    checks = [row for step in found.values() for row in step["rows"] if "ok" in row]
    assert len(checks) > 30 and all(row["ok"] for row in checks)
    for name in ("tiny", gpu_steps.RECIPE):
        *curve, complete = found["recipe" if name != "tiny" else "tiny", name]["rows"]
        assert [row["step"] for row in curve] == [3, 6] and complete["what"] == "complete run"
        assert complete["val_loss"] == min(row["val_loss"] for row in curve)
    libraries = {row.get("library") for step in found.values() for row in step["rows"]}
    assert {"tinytransformer", "nanoGPT", "transformers"} <= libraries
    again = run_toy(folder, result, hiding)
    assert again.returncode == 0 and again.stdout == "" and steps_of(result) == found


@pytest.mark.slow
def test_a_fault_does_not_stop_the_next_step(folder, tmp_path, hiding):
    "A peer that cannot be imported: the traceback is kept, and a new worker takes what follows."
    broken = tmp_path / "folder"
    broken.mkdir()
    (broken / "data").symlink_to(folder / "data")
    (broken / "nanoGPT").mkdir()
    (broken / "nanoGPT" / "model.py").write_text("1 / 0\n")
    result = tmp_path / "gpu.json"
    done = run_toy(broken, result, hiding, "--parts", "speed")
    assert done.returncode == 1 and "1 steps with faults" in done.stderr, done.stdout + done.stderr
    ours, theirs, eager = steps_of(result).values()
    assert ours["status"] == eager["status"] == "done", done.stdout
    assert theirs["status"] == "failed" and "ZeroDivisionError" in theirs["error"]
    assert ours["rows"][0]["tokens_per_second"] > 0 and ours["rows"][1]["what"] == "profile"


def fake_parts(monkeypatch, folder, result, names, **options):
    "Run parts of one step each with a worker that only pretends."
    script = result.with_name("worker.py")
    script.write_text(WORKER)
    steps = [Step(name, name, 0.3, lambda bench: None) for name in names]
    for name, value in dict(
        STEPS=steps,
        PARTS=names,
        WORKER=[sys.executable, str(script)],
        GRACE_SECONDS=0.5,
        LEAST_SECONDS=0.1,
    ).items():
        monkeypatch.setattr(gpu, name, value)
    args = dict(minutes=1.0, parts=names, device="cpu", toy=True, compile=False) | options
    try:
        gpu.run_parts(Namespace(folder=folder, result=result, **args))
    except SystemExit as end:
        return steps_of(result), end.code
    return steps_of(result), 0


def test_faults_crashes_and_hangs(folder, tmp_path, monkeypatch):
    "Each is recorded with what is known of it, the file is whole at any time, the rest goes on."
    result, write, states = tmp_path / "gpu.json", gpu.Results.write, []

    def checked(results):
        write(results)
        states.append([step["status"] for step in json.loads(result.read_text())["steps"]])

    monkeypatch.setattr(gpu.Results, "write", checked)
    names = ["first", "fault", "crash", "hang", "slow training", "last"]
    found, code = fake_parts(monkeypatch, folder, result, names)
    status = {name: found[name, name]["status"] for name in names}
    assert status == dict(zip(names, ["done", "failed", "crashed", "ended", "stopped", "done"]))
    assert code.startswith("3 steps with faults")
    assert "ZeroDivisionError: here" in found["fault", "fault"]["error"]
    assert found["crash", "crash"]["error"] == "the process ended with 3\nlast words\n"
    assert "limit" in found["hang", "hang"]["error"] and found["hang", "hang"]["seconds"] < 20
    assert all(step["rows"] == [dict(what=step["name"])] for step in found.values())
    assert [] in states and ["running"] in states and ["done", "running"] in states


def test_going_on_with_a_file(folder, tmp_path, monkeypatch):
    "What is done stays as it is, and what is not is taken again."
    result = tmp_path / "gpu.json"
    before, _ = fake_parts(monkeypatch, folder, result, ["first", "slow training"])
    after, code = fake_parts(monkeypatch, folder, result, ["first", "slow training"])
    assert code == 0 and after["first", "first"] == before["first", "first"]
    training = after["slow training", "slow training"]
    assert training["status"] == "stopped" and len(training["rows"]) == 1
    result.write_text(result.read_text().replace('"device": "cpu"', '"device": "cuda"'))
    with pytest.raises(InputError, match="gpu.json was written with .*cuda.*: give another name"):
        fake_parts(monkeypatch, folder, result, ["first"])
    result.write_text("[]")
    with pytest.raises(InputError, match="holds no results of this command"):
        fake_parts(monkeypatch, folder, result, ["first"])


def test_no_time_left(folder, tmp_path, monkeypatch):
    found, code = fake_parts(monkeypatch, folder, tmp_path / "gpu.json", ["first"], minutes=1e-4)
    assert found["first", "first"]["status"] == "no time left" and code == 0


def test_a_worker_that_does_not_start(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("test_gpu.WORKER", "raise SystemExit('no such thing')")
    found, code = fake_parts(monkeypatch, folder, tmp_path / "gpu.json", ["first", "second"])
    assert [step["status"] for step in found.values()] == ["crashed", "crashed"]
    assert "no such thing" in found["second", "second"]["error"]


def test_how_a_step_ends(tmp_path):
    "In the worker: what a step raises decides what is answered."
    rows = []
    bench = Bench(tmp_path, tmp_path, torch.device("cpu"), True, False, rows.append)
    bench.tidy = lambda: None

    def raising(error):
        def run(bench):
            bench.report(dict(what="before"))
            raise error

        return gpu_steps.take_step(Step("part", "name", 1, run), bench)

    assert raising(Skipped("no checkout")) == dict(end="skipped", error="no checkout")
    assert raising(Stopped(15, 7)) == dict(end="stopped", error="stopped after step 7")
    failed = raising(ZeroDivisionError("here"))
    assert failed["end"] == "failed" and failed["error"].startswith("Traceback")
    assert failed["error"].endswith("ZeroDivisionError: here\n") and len(rows) == 3
    assert gpu_steps.finite(dict(a=[float("inf"), 1.0], b=2)) == dict(a=[None, 1.0], b=2)


@pytest.mark.parametrize(
    "options, said",
    [
        (["run", "NOWHERE", "gpu.json", "--device", "cpu"], "there is no folder"),
        (["run", "EMPTY", "gpu.json", "--device", "cpu"], "holds no tinywiki-"),
        (["run", "FOLDER", "gpu.json", "--device", "cpu"], "holds no tinywiki-"),
        (["run", "FOLDER", "EMPTY", "--device", "cpu", "--toy"], "is a folder: give the name"),
        (["run", "FOLDER", "a.json", "--minutes", "0", "--toy"], "--minutes is 0.0: give more"),
        (["prepare", "EMPTY", "--toy", "--nanogpt", "EMPTY"], "is no nanoGPT checkout"),
    ],
)
def test_bad_input_gets_one_line(folder, tmp_path, monkeypatch, options, said):
    (tmp_path / "empty").mkdir()
    places = dict(FOLDER=folder, EMPTY=tmp_path / "empty", NOWHERE=tmp_path / "nowhere")
    monkeypatch.setattr(sys, "argv", ["gpu", *(str(places.get(o, o)) for o in options)])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        benchmarks.run(gpu.main)
    assert said in end.value.code and "\n" not in end.value.code
    assert os.listdir(tmp_path) == ["empty"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_gpu(folder, tmp_path):
    args = dict(minutes=1.0, parts=gpu.PARTS, device="cuda", toy=True, compile=False)
    with pytest.raises(InputError, match="finds no CUDA device here: run this on a machine with"):
        gpu.run_parts(Namespace(folder=folder, result=tmp_path / "gpu.json", **args))


def test_a_folder_of_another_version(folder, tmp_path):
    "Text that does not belong to the tokens is found before anything is measured."
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", folder, copy], check=True)
    text = next(copy.rglob("train/*.arrow"))
    text.write_bytes(text.read_bytes() + b"more")
    with pytest.raises(InputError, match="does not fit the settings of this version: write it"):
        gpu.check_folder(copy, toy=True)


def test_time_covered_by_kernels():
    assert gpu_steps.covered([]) == 0
    assert gpu_steps.covered([(5, 6), (0, 2), (1, 3), (1, 2)]) == 4


class SumsInFloat32(TorchFunctionMode):
    "What autocast does on CUDA, and not on a CPU: sums of 16-bit values become float32."

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.sum and torch.is_autocast_enabled("cpu"):
            args = args[0].float(), *args[1:]
        return func(*args, **(kwargs or {}))


def test_loss_under_the_autocast_of_cuda():
    "The loss without logits casts by itself, so that autocast's own rules do not meet it."
    torch.manual_seed(0)
    h, weight = torch.randn(2, 8, 16, requires_grad=True), torch.randn(50, 16, requires_grad=True)
    y = torch.randint(50, (2, 8))
    assert HeadLoss.CHUNK > 16
    with SumsInFloat32(), torch.autocast("cpu", torch.bfloat16):
        loss = head_loss(h, weight, y)
    loss.backward()
    torch.testing.assert_close(loss, next_token_loss(h @ weight.T, y), rtol=1e-2, atol=0)
    assert h.grad.isfinite().all() and weight.grad.abs().sum() > 0
