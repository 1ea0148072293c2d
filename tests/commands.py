"""The command `tinytransformer` in processes of its own.

Importing PyTorch takes longer than a small training. `CommandServer` therefore starts one parent
process that has imported everything and forks itself for each command. What it forks is a full
process: it has its own process group, can be killed at any moment, and ends as Python ends.

This file is also a script that runs the command, so that `torchrun` and `accelerate launch` can
start it. In both cases `FAULTS` in the environment (JSON) says what goes wrong in the process:

    hold: [n, path]      wait before step n + 1 of this process until the file `path` is deleted
                         or a signal arrives; a checkpoint that is loaded counts as a step, because
                         PyTorch takes one to make room for the optimizer's state
    kill_at_write: n     send itself SIGKILL before the nth flush, rename or deletion
    file_size: n         let no file grow beyond n bytes, as on a disk that fills up
    stand_in: true       let accelerate shard on two CPU processes, as it would on two GPUs
"""

import json
import os
import resource
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

COMMAND = str(Path(sys.executable).with_name("tinytransformer"))


def hold(after: int, path: str) -> None:
    "Wait before step `after` + 1 of this process, until `path` is deleted or a signal arrives."
    from torch.optim import AdamW
    from torch.optim.optimizer import register_optimizer_step_pre_hook

    begun = 0
    received, sent = os.pipe()  # Python writes a byte into it for each signal
    os.set_blocking(sent, False)
    signal.set_wakeup_fd(sent, warn_on_full_buffer=False)

    def wait(optimizer, args, kwargs):
        nonlocal begun
        begun += isinstance(optimizer, AdamW)
        while begun == after + 1 and os.path.exists(path):
            if select.select([received], [], [], 0.01)[0]:
                break

    register_optimizer_step_pre_hook(wait)


def kill_at_write(number: int) -> None:
    "Send this process SIGKILL just before its `number`th flush, rename or deletion."
    left = number

    def counted(function):
        def call(*args, **kwargs):
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    os.replace, os.fsync = counted(os.replace), counted(os.fsync)
    Path.rename, shutil.rmtree = counted(Path.rename), counted(shutil.rmtree)


def limit_file_size(size: int) -> None:
    "Let writing beyond `size` bytes of a file fail with an error, as on a full disk."
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def stand_in() -> None:
    "accelerate shards on accelerators alone: each of two CPU processes stands in for one."
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def run_command() -> None:
    "The command with the arguments and the faults of this process."
    faults = json.loads(os.environ.pop("FAULTS", "{}"))
    if "hold" in faults:
        hold(*faults["hold"])
    if "file_size" in faults:
        limit_file_size(faults["file_size"])
    if faults.get("stand_in"):
        stand_in()
    # tests started by nohup ignore it, and so would what they start
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    from tinytransformer.__main__ import begin

    if "kill_at_write" in faults:
        import tinytransformer.cli  # noqa: F401  (what writes has to be imported before)

        kill_at_write(faults["kill_at_write"])
    begin()


# --- the parent that is ready to fork


def import_everything() -> None:
    "What the commands import sooner or later."
    import datasets  # noqa: F401
    import matplotlib.backends.backend_agg  # noqa: F401
    import torch._dynamo  # noqa: F401  (PyTorch's optimizers import it when the first of them is made)

    import tinytransformer.cli  # noqa: F401

    try:
        import uvicorn  # noqa: F401

        import tinytransformer.serve  # noqa: F401
    except ImportError:
        pass  # the extra `serve` is not installed


def serve_forks(folder: Path) -> None:
    """Fork for each request, a line of JSON on stdin, and answer with its process id. Returns in
    the child only.
    """

    def reap(*_):
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            file = folder / f"{pid}.new"
            file.write_text(str(os.waitstatus_to_exitcode(status)))
            file.rename(folder / f"{pid}")

    signal.signal(signal.SIGCHLD, reap)
    for line in sys.stdin:
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
        if (pid := os.fork()) == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])
            become(json.loads(line))
            return
        print(pid, flush=True)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])
    os._exit(0)


def become(request: dict) -> None:
    "Turn this fork into a process as `subprocess.Popen` would have started it."
    os.setsid()
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    sys.argv = [COMMAND, *request["args"]]
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), number)


class CommandProcess:
    "A command that runs, with as much of `subprocess.Popen` as the tests use."

    def __init__(self, pid: int, folder: Path, out: Path, err: Path):
        self.pid, self.folder, self.out, self.err = pid, folder, out, err
        self.returncode = None

    def poll(self) -> int | None:
        file = self.folder / str(self.pid)
        if self.returncode is None and file.exists():
            self.returncode = int(file.read_text())
            file.unlink()
        return self.returncode

    def wait(self, timeout: float = 300) -> int:
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired(COMMAND, timeout)
            time.sleep(0.005)
        return self.returncode

    def communicate(self, timeout: float = 300) -> tuple[str, str]:
        self.wait(timeout)
        return self.out.read_text(), self.err.read_text()

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)


class CommandServer:
    "Starts commands by forking a process that has imported everything."

    def __init__(self, folder: Path):
        self.folder, self.started = folder, []
        self.parent = subprocess.Popen(
            [sys.executable, __file__, "--serve-forks", str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.parent.stdout.readline() == "ready\n"

    def start(
        self, cwd: Path, *args, faults: dict | None = None, env: dict | None = None
    ) -> CommandProcess:
        "A command in `cwd`, in a process group of its own; its output goes to files."
        number = len(self.started)
        out, err = self.folder / f"{number}.stdout", self.folder / f"{number}.stderr"
        out.touch()
        err.touch()
        request = dict(
            cwd=str(cwd),
            args=[str(arg) for arg in args],
            env=os.environ | dict(FAULTS=json.dumps(faults or {})) | (env or {}),
            stdout=str(out),
            stderr=str(err),
        )
        self.parent.stdin.write(json.dumps(request) + "\n")
        self.parent.stdin.flush()
        self.started.append(
            CommandProcess(int(self.parent.stdout.readline()), self.folder, out, err)
        )
        return self.started[-1]

    def run(self, cwd: Path, *args, **options) -> subprocess.CompletedProcess:
        "A command from its beginning to its end, as `subprocess.run` would report it."
        process = self.start(cwd, *args, **options)
        out, err = process.communicate()
        return subprocess.CompletedProcess(args, process.returncode, out, err)

    def close(self) -> None:
        for process in self.started:
            process.kill()
        self.parent.stdin.close()
        self.parent.wait(10)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve-forks"]:
        import_everything()
        print("ready", flush=True)
        serve_forks(Path(sys.argv[2]))
    run_command()
