"""Trackers, against a real MLflow server on loopback and by reading TensorBoard's files back."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from conftest import SMALL
from test_bad_input import COMMAND, refusal

TRAIN = [COMMAND, "train", "--config", "tiny", *SMALL]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


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
    for _ in range(300):
        try:
            urllib.request.build_opener(urllib.request.ProxyHandler({})).open(
                f"http://{address}/health"
            )
        except OSError:
            time.sleep(0.2)
        else:
            break
    yield f"http://{address}"
    os.killpg(process.pid, 9)


def train(folder: Path, workspace: Path, *args: str, uri: str = "") -> subprocess.CompletedProcess:
    if not (folder / "data").exists():
        shutil.copytree(workspace / "data", folder / "data")
    env = dict(os.environ, MLFLOW_TRACKING_URI=uri, NO_PROXY="127.0.0.1")
    done = subprocess.run(
        [*TRAIN, *args] if "--resume" not in args else [COMMAND, "train", *args],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done


def local(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").open()]


def test_mlflow(server, workspace, tmp_path, monkeypatch):
    """Config, every step's metrics, curve, samples and the best model; a run that goes on stays one
    run.
    """
    from mlflow import MlflowClient

    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    train(tmp_path, workspace, "--train.track", "mlflow", uri=server)
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

    train(
        tmp_path,
        workspace,
        "--resume",
        "runs/tiny",
        "--train.max_steps",
        "8",
        "--train.track",
        "mlflow",
        uri=server,
    )
    (run,) = client.search_runs([experiment.experiment_id])
    assert max(m.step for m in client.get_metric_history(run.info.run_id, "loss")) == 8


def test_tensorboard(workspace, tmp_path):
    """Read back what was written: every step's numbers, the samples, the curve and the
    configuration.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(tmp_path, workspace, "--train.track", "tensorboard")
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


def test_tracker_that_is_down(workspace, tmp_path):
    "One line of warning, and the local record is complete; the other tracker goes on."
    done = train(
        tmp_path,
        workspace,
        "--train.track",
        "mlflow,tensorboard",
        uri=f"http://127.0.0.1:{free_port()}",
    )
    assert (
        done.stderr.count("mlflow does not answer") == 1
        and "training goes on without it" in done.stderr
        and "Traceback" not in done.stderr
    )
    assert (
        len(local(tmp_path / "runs/tiny")) == 6
        and (tmp_path / "runs/tiny/summary.json").exists()
        and list((tmp_path / "runs/tiny/tensorboard").glob("events*"))
    )


def test_tracker_not_installed(here, monkeypatch):
    "The line says which extra to install."
    import tinytransformer.train as module

    monkeypatch.setattr(module, "find_spec", lambda name: None)
    assert "the package mlflow is not installed: pip install 'tinytransformer[track]'" in refusal(
        "train", "--config", "tiny", *SMALL, "--folder", "runs/tracked", "--train.track", "mlflow"
    )
    assert not (here / "runs/tracked").exists()
