"""Everything that has to be known about a GPU, by one command that needs no network.

python -m benchmarks.gpu prepare FOLDER [--nanogpt CHECKOUT]    beforehand, where there is a network
python -m benchmarks.gpu run FOLDER RESULT.json [--minutes 11]  on the machine with the GPU

In this order: correctness, the training of `tiny`, speed, writing, and the recipe `wikitext2-gpu`
for the minutes that are left. Each step has a time limit and runs in a worker process, so that a
fault or a hang in one does not stop the next. RESULT.json is written after every row; the same
command with the same file takes the steps that are not done yet, and goes on with the recipe where
it stopped.
"""

import argparse
import json
import math
import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

import torch

from benchmarks import run as call
from benchmarks.gpu_steps import CORPORA, ROOT, STEPS, Step, data_config
from tinytransformer.corpus import is_current, prepare, processed_dir
from tinytransformer.files import check, write_whole
from tinytransformer.runs import git_commit

WORKER = [sys.executable, "-m", "benchmarks.gpu_steps", "work"]
PARTS = list(dict.fromkeys(step.part for step in STEPS))
PART_SECONDS = dict(correctness=210, tiny=150, speed=210, writing=90)  # limits of whole parts
START_SECONDS = 120  # for a worker to import everything
GRACE_SECONDS = 20  # for a training to write its checkpoint when it is asked to stop
LEAST_SECONDS = 5  # with less than this left, a step is not begun
TOY_PATIENCE = 4  # a toy run may meet a busy CPU: its limits are this many times as long


# ---- prepare ----


def prepare_folder(args: argparse.Namespace) -> None:
    "Texts, tokenizers and, if a checkout is given, nanoGPT's model, in one folder to carry."
    if args.nanogpt:
        source = args.nanogpt / "model.py"
        check(source.is_file(), f"{args.nanogpt} is no nanoGPT checkout: it holds no model.py")
    for name in (None, *(() if args.toy else CORPORA)):
        cfg = data_config(args.folder, name, toy=name is None)
        tokens = len(prepare(cfg).streams["train"])
        print(f"{processed_dir(cfg)}: {tokens:,} tokens to train on")
    if args.nanogpt:
        (args.folder / "nanoGPT").mkdir(exist_ok=True)
        shutil.copy(source, args.folder / "nanoGPT" / "model.py")
        print(f"{args.folder / 'nanoGPT'}: model.py")


def check_folder(folder: Path, toy: bool) -> None:
    "Refuse a folder that was not prepared, or for other settings than those of this version."
    check(folder.is_dir(), f"there is no folder {folder}: {preparing(folder, toy)}")
    for name in CORPORA:
        cfg = data_config(folder, name, toy)
        found = processed_dir(cfg)
        check(found.is_dir(), f"{folder} holds no {found.name}: {preparing(folder, toy)}")
        good = is_current(cfg, found)
        check(good, f"{found} does not fit the settings of this version: {preparing(folder, toy)}")


def preparing(folder: Path, toy: bool) -> str:
    command = f"python -m benchmarks.gpu prepare {folder}{' --toy' if toy else ''}"
    return f"write it with `{command}` where `datasets` is installed and the Hub can be reached"


# ---- results ----


class Results:
    "The file of results, written whole after every change."

    def __init__(self, path: Path, about: dict):
        self.path = path
        check(not path.is_dir(), f"{path} is a folder: give the name of a file")
        self.found = dict(about=about, steps=[])
        if path.exists():
            self.go_on(about)

    def go_on(self, about: dict) -> None:
        "Keep what an earlier call has found, if it was the same kind of call."
        try:
            found = json.loads(self.path.read_text())
            before = {key: found["about"][key] for key in ("device", "toy")}
            self.found["steps"] = list(found["steps"])
        except (ValueError, KeyError, TypeError):
            before = None
        check(
            before is not None, f"{self.path} holds no results of this command: give another name"
        )
        now = {key: about[key] for key in before}
        check(before == now, f"{self.path} was written with {before}, not {now}: give another name")

    def is_done(self, step: Step) -> bool:
        return any(
            (row["part"], row["name"]) == (step.part, step.name) and row["status"] == "done"
            for row in self.found["steps"]
        )

    def begin(self, step: Step) -> dict:
        "The entry of a step, in place of one that an earlier call left unfinished."
        name = (step.part, step.name)
        kept = [s for s in self.found["steps"] if (s["part"], s["name"]) != name]
        entry = dict(part=step.part, name=step.name, status="running", started=now(), rows=[])
        order = [(s.part, s.name) for s in STEPS]
        kept.append(entry)
        known = [s for s in kept if (s["part"], s["name"]) in order]
        self.found["steps"] = sorted(known, key=lambda s: order.index((s["part"], s["name"])))
        self.write()
        return entry

    def write(self) -> None:
        write_whole(self.path, json.dumps(self.found, indent=1) + "\n")


def now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


# ---- one worker and its steps ----


class Worker:
    "A process that takes steps, one after the other."

    def __init__(self, settings: dict, fixed_workspace: bool, log: Path):
        self.fixed_workspace, self.log = fixed_workspace, log
        environment = os.environ | dict(TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")
        environment.pop("CUBLAS_WORKSPACE_CONFIG", None)
        if fixed_workspace:
            environment["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
        if settings["device"] == "cpu":
            environment["ACCELERATE_USE_CPU"] = "true"
        with log.open("a") as stderr:
            self.process = subprocess.Popen(
                [*WORKER, json.dumps(settings)],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                start_new_session=True,
            )
        self.lines = queue.Queue()
        threading.Thread(target=self.listen, daemon=True).start()

    def listen(self) -> None:
        for line in self.process.stdout:
            self.lines.put(json.loads(line))
        self.lines.put(None)

    def read(self, seconds: float) -> dict | None:
        "The next message, or None once there will be no more; `queue.Empty` if none comes in time."
        return self.lines.get(timeout=None if math.isinf(seconds) else max(0.01, seconds))

    def ask(self, step: Step) -> None:
        try:
            print(step.name, file=self.process.stdin, flush=True)
        except BrokenPipeError:
            pass  # the next read says that it has ended

    def kill(self) -> None:
        "End the process and all that it has started."
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait()


def take(worker: Worker, step: Step, seconds: float, report: Callable[[dict], None]) -> dict:
    "Let the worker take a step: its status and, if it went wrong, what was said."
    logged = worker.log.stat().st_size
    worker.ask(step)
    until, asked_to_stop = time.monotonic() + seconds, False
    limit = f"ended at its limit of {seconds:.0f} s"
    while True:
        try:
            message = worker.read(until - time.monotonic())
        except queue.Empty:
            if asked_to_stop:
                return dict(status="ended", error=limit)
            worker.process.terminate()
            until, asked_to_stop = time.monotonic() + GRACE_SECONDS, True
            continue
        if message is None and asked_to_stop:
            return dict(status="ended", error=limit)
        if message is None:
            code = worker.process.wait()
            said = worker.log.read_bytes()[logged:].decode(errors="replace")[-4000:]
            return dict(status="crashed", error=f"the process ended with {code}\n{said}")
        if "row" in message:
            report(message["row"])
        else:
            error = message.get("error")
            return dict(status=message["end"]) | (dict(error=error) if error else {})


class Supervisor:
    "Takes the steps in their order until the time is up, with a new worker after any fault."

    def __init__(self, args: argparse.Namespace, results: Results):
        self.results, self.worker = results, None
        self.ends = time.monotonic() + 60 * args.minutes
        self.patience = TOY_PATIENCE if args.toy else 1
        self.log = args.result.with_suffix(".log")
        self.settings = dict(
            folder=str(args.folder.resolve()),
            runs=str(args.result.resolve().with_suffix("")),
            device=args.device,
            toy=args.toy,
            compile=args.compile,
        )

    def ready_worker(self, step: Step) -> Worker | None:
        "The worker that is there, or a new one with the step's settings; None if none starts."
        if self.worker and self.worker.fixed_workspace != step.fixed_workspace:
            self.end_worker()
        if self.worker is None:
            self.worker = Worker(self.settings, step.fixed_workspace, self.log)
            try:
                message = self.worker.read(min(START_SECONDS, self.seconds_left()))
            except queue.Empty:
                message = None
            if message is None:
                self.end_worker()
        return self.worker

    def end_worker(self) -> None:
        if self.worker:
            self.worker.kill()
            self.worker = None

    def seconds_left(self) -> float:
        return self.ends - time.monotonic()

    def allowed(self, step: Step, part_ends: float) -> float:
        "Seconds that a step may take; one without a limit of its own leaves time for a checkpoint."
        rest = self.seconds_left()
        if math.isinf(step.seconds):
            return rest - GRACE_SECONDS
        return min(self.patience * step.seconds, rest, part_ends - time.monotonic())

    def take_part(self, steps: list[Step]) -> None:
        limit = self.patience * PART_SECONDS.get(steps[0].part, math.inf)
        part_ends = time.monotonic() + limit
        for step in steps:
            if self.results.is_done(step):
                continue
            entry = self.results.begin(step)
            began = time.monotonic()
            entry |= self.try_step(step, entry["rows"], part_ends)
            entry["seconds"] = round(time.monotonic() - began, 2)
            self.results.write()
            if entry["status"] not in ("done", "skipped"):
                self.end_worker()
            print(line(entry), flush=True)

    def try_step(self, step: Step, rows: list[dict], part_ends: float) -> dict:
        def report(row: dict) -> None:
            rows.append(row)
            self.results.write()

        if self.allowed(step, part_ends) < LEAST_SECONDS:
            return dict(status="no time left")
        worker = self.ready_worker(step)
        if worker is None:
            said = self.log.read_text(errors="replace")[-4000:]
            return dict(status="crashed", error=f"the worker did not start\n{said}")
        seconds = self.allowed(step, part_ends)
        if seconds < LEAST_SECONDS:
            return dict(status="no time left")
        return take(worker, step, seconds, report)


def line(entry: dict) -> str:
    "One line about a step for whoever is watching."
    wrong = [row for row in entry["rows"] if row.get("ok") is False]
    text = f"{entry['part']:12} {entry['name']:68} {entry['seconds']:7.1f} s  {entry['status']}"
    if wrong:
        text += f", {len(wrong)} of {len(entry['rows'])} checks are not met"
    if entry.get("error"):
        text += f": {entry['error'].strip().splitlines()[-1]}"
    return text


def run_parts(args: argparse.Namespace) -> None:
    "All parts, or those asked for; exits with 1 if anything went wrong."
    check(0 < args.minutes < math.inf, f"--minutes is {args.minutes}: give more than 0")
    check_folder(args.folder, args.toy)
    cuda = args.device != "cuda" or torch.cuda.is_available()
    check(
        cuda,
        f"torch {torch.__version__} finds no CUDA device here: run this on a machine with a GPU, "
        "or try it with --device cpu --toy",
    )
    about = dict(
        started=now(),
        minutes=args.minutes,
        device=args.device,
        toy=args.toy,
        compile=args.compile,
        commit=git_commit(),
    )
    results = Results(args.result, about)
    results.write()
    args.result.with_suffix(".log").touch()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    supervisor = Supervisor(args, results)
    try:
        for part in PARTS:
            if part in args.parts:
                supervisor.take_part([step for step in STEPS if step.part == part])
    finally:
        supervisor.end_worker()
    steps = results.found["steps"]
    faults = [step for step in steps if step["status"] in ("failed", "crashed", "ended")]
    unmet = [row for step in steps for row in step["rows"] if row.get("ok") is False]
    if faults or unmet:
        sys.exit(f"{len(faults)} steps with faults, {len(unmet)} checks not met: see {args.result}")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    first = commands.add_parser("prepare", help="write a folder with texts and tokenizers")
    first.add_argument("folder", type=Path, metavar="FOLDER")
    first.add_argument("--nanogpt", type=Path, metavar="CHECKOUT", help="take nanoGPT along")
    first.add_argument("--toy", action="store_true", help="only the text for a toy run")
    first.set_defaults(do=prepare_folder)
    second = commands.add_parser("run", help="measure, and write the results at once")
    second.add_argument("folder", type=Path, metavar="FOLDER")
    second.add_argument("result", type=Path, metavar="RESULT.json")
    second.add_argument("--minutes", type=float, default=11, help="for everything (default: 11)")
    second.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="only these")
    second.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    second.add_argument("--toy", action="store_true", help="models and texts for seconds on a CPU")
    second.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="let the compiled variants use torch.compile",
    )
    second.set_defaults(do=run_parts)
    args = parser.parse_args()
    args.do(args)


if __name__ == "__main__":
    call(main)
