"""Trackers, against a real MLflow server on loopback and by reading TensorBoard's files back."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from conftest import SMALL, free_port, refusal


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    "The address of an MLflow server with a SQLite store."
    folder, address = tmp_path_factory.mktemp("mlflow"), f"127.0.0.1:{free_port()}"
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "mlflow",
            "server",
            "--backend-store-uri",
            f"sqlite:///{folder}/runs.db",
            "--artifacts-destination",
            str(folder / "artifacts"),
            "--host",
            "127.0.0.1",
            "--port",
            address.split(":")[1],
            "--workers",
            "1",
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        wait_until_healthy(process, address)
        yield f"http://{address}"
    finally:
        os.killpg(process.pid, signal.SIGKILL)


def wait_until_healthy(process: subprocess.Popen, address: str, seconds: float = 120) -> None:
    end, directly = (
        time.monotonic() + seconds,
        urllib.request.build_opener(urllib.request.ProxyHandler({})),
    )
    while True:
        try:
            return directly.open(f"http://{address}/health").close()
        except OSError:
            time.sleep(0.2)
        assert process.poll() is None, "the MLflow server has ended"
        assert time.monotonic() < end, f"the MLflow server does not answer after {seconds} seconds"


@pytest.fixture
def train(commands, workspace, tmp_path):
    "Trains in `tmp_path`, with the server at `uri`, and returns what was written to stderr."
    shutil.copytree(workspace / "data", tmp_path / "data")

    def run(*args: str, uri: str = "") -> str:
        command = (
            ["train", *args] if "--resume" in args else ["train", "--config", "tiny", *SMALL, *args]
        )
        done = commands.run(
            tmp_path, *command, env=dict(MLFLOW_TRACKING_URI=uri, NO_PROXY="127.0.0.1")
        )
        assert done.returncode == 0, done.stderr
        return done.stderr

    return run


def local(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").open()]


@pytest.mark.slow
def test_mlflow(server, train, tmp_path, monkeypatch):
    """Config, every step's metrics, curve, samples and the best model; a run that goes on stays one
    run.
    """
    from mlflow import MlflowClient

    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    train("--train.track", "mlflow", uri=server)
    client = MlflowClient(server)
    experiment = client.get_experiment_by_name("tinytransformer")
    (run,) = client.search_runs([experiment.experiment_id])
    rows = local(tmp_path / "runs/tiny")
    for field in (
        "loss",
        "learning_rate",
        "grad_norm",
        "tokens_per_second",
        "memory_mb",
        "epoch",
        "val_loss",
    ):
        wanted = {row["step"]: row[field] for row in rows if field in row}
        assert {
            m.step: m.value for m in client.get_metric_history(run.info.run_id, field)
        } == pytest.approx(wanted)
    assert run.info.run_name == "tiny" and run.info.status == "FINISHED"
    assert (
        run.data.params["train.learning_rate"] == "0.01"
        and run.data.params["model.num_layers"] == "1"
        and run.data.params["sample.top_k"] == "None"
    )
    kept = {a.path for a in client.list_artifacts(run.info.run_id)}
    assert {"curve.png", "samples.jsonl", "summary.json", "config.yaml", "model", "samples"} <= kept
    model = Path(client.download_artifacts(run.info.run_id, "model", str(tmp_path)))
    assert (model / "model.safetensors").read_bytes() == (
        tmp_path / "runs/tiny/best/model.safetensors"
    ).read_bytes()

    train("--resume", "runs/tiny", "--train.max_steps", "8", "--train.track", "mlflow", uri=server)
    (run,) = client.search_runs([experiment.experiment_id])
    assert max(m.step for m in client.get_metric_history(run.info.run_id, "loss")) == 8


def test_tensorboard(train, tmp_path):
    """Read back what was written: every step's numbers, the samples, the curve and the
    configuration.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train("--train.track", "tensorboard")
    files = EventAccumulator(str(tmp_path / "runs/tiny/tensorboard"))
    files.Reload()
    rows = local(tmp_path / "runs/tiny")
    for field in ("loss", "learning_rate", "grad_norm", "val_loss"):
        assert {e.step: e.value for e in files.Scalars(field)} == pytest.approx(
            {row["step"]: row[field] for row in rows if field in row}, rel=1e-5
        )
    samples = [json.loads(line) for line in (tmp_path / "runs/tiny/samples.jsonl").open()]
    assert {
        e.step: e.tensor_proto.string_val[0].decode() for e in files.Tensors("sample/text_summary")
    } == {sample["step"]: sample["text"] for sample in samples}
    assert files.Images("curve")[0].width > 300
    assert any((tmp_path / "runs/tiny/tensorboard").rglob("hparams.yml"))


@pytest.mark.slow
def test_killed_and_resumed(commands, workspace, tmp_path):
    """After SIGKILL, twice, between two checkpoints, both trackers show one value a step: that of
    the run's own record.
    """
    from mlflow import MlflowClient
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    shutil.copytree(workspace / "data", tmp_path / "data")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    env = dict(MLFLOW_TRACKING_URI=uri, NO_PROXY="127.0.0.1")
    (tmp_path / "held").touch()
    train = ["train", "--config", "tiny", *SMALL, "--train.track", "mlflow,tensorboard"]
    run = tmp_path / "runs/tiny"
    for done, args in ((5, train), (5, ["train", "--resume", "runs/tiny"])):
        # killed after step 5 of 6, with a checkpoint of step 3; then after step 7 of 12, with one
        # of step 6 (loading a checkpoint counts as a step)
        faults = dict(hold=[done, str(tmp_path / "held")])
        args = [*args, *(["--train.max_steps", "12"] if "--resume" in args else [])]
        process = commands.start(tmp_path, *args, faults=faults, env=env)
        wait_for_rows(process, run, 5 if "--config" in args else 7)
        process.kill()
        process.wait()
    last = commands.run(tmp_path, "train", "--resume", "runs/tiny", env=env)
    assert last.returncode == 0, last.stderr
    rows = local(run)
    assert [row["step"] for row in rows] == list(range(1, 13))
    client = MlflowClient(uri)
    (experiment,) = client.search_experiments(filter_string="name = 'tinytransformer'")
    (kept,) = client.search_runs([experiment.experiment_id])
    files = EventAccumulator(str(run / "tensorboard"))
    files.Reload()
    for field in ("loss", "val_loss", "learning_rate", "tokens_per_second"):
        wanted = {row["step"]: row[field] for row in rows if field in row}
        for found in (client.get_metric_history(kept.info.run_id, field), files.Scalars(field)):
            assert [each.step for each in found] == list(wanted), field
            values = [each.value for each in found]
            assert values == pytest.approx(list(wanted.values()), rel=1e-5), field


def wait_for_rows(process, run: Path, n: int, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not (run / "metrics.jsonl").exists() or len(local(run)) < n:
        assert time.monotonic() < end, f"there are not {n} rows after {seconds} seconds"
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)


def test_tracker_that_is_down(train, tmp_path):
    "One line of warning, and the local record is complete; the other tracker goes on."
    written = train("--train.track", "mlflow,tensorboard", uri=f"http://127.0.0.1:{free_port()}")
    assert (
        written.count("mlflow does not answer") == 1
        and "training goes on without it" in written
        and "Traceback" not in written
    )
    assert (
        len(local(tmp_path / "runs/tiny")) == 6
        and (tmp_path / "runs/tiny/summary.json").exists()
        and list((tmp_path / "runs/tiny/tensorboard").glob("events*"))
    )


def test_tracker_not_installed(here, monkeypatch):
    "The line says which extra to install."
    import tinytransformer.trackers as module

    monkeypatch.setattr(module, "find_spec", lambda name: None)
    assert "the package mlflow is not installed: pip install 'tinytransformer[track]'" in refusal(
        "train", "--config", "tiny", *SMALL, "--folder", "runs/tracked", "--train.track", "mlflow"
    )
    assert not (here / "runs/tracked").exists()
