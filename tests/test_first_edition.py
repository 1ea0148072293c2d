"""A run folder that the first edition of this project wrote still does everything a run can do."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT
from fastapi.testclient import TestClient

from tinytransformer.cli import main
from tinytransformer.config import make_config, read_config
from tinytransformer.corpus import prepare
from tinytransformer.data import DataConfig
from tinytransformer.runs import load_run

OLD = ROOT / "tests" / "first_edition"


@pytest.fixture
def run(tmp_path, monkeypatch) -> Path:
    "A copy of the old run, in a folder without data."
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(OLD, tmp_path / "old"))


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_resumes(run):
    """Its text is made again, and the next steps are those that the first edition took.

    The first edition knew its text by a digest of the files that `datasets` writes. A version of
    `datasets` that writes them differently makes it another text, and then that is what is said.
    """
    config = read_config(run / "config.yaml")
    text = prepare(make_config(DataConfig, "data", config["data"])).fingerprint
    if text != json.loads((OLD / "last" / "checkpoint.json").read_text())["data"]:
        with pytest.raises(SystemExit, match="was trained on other data"):
            main(["train", "--resume", str(run), "--train.max_steps", "16"])
        return
    main(["train", "--resume", str(run), "--train.max_steps", "16"])
    found, wanted = rows(run / "metrics.jsonl"), rows(OLD / "continued.jsonl")
    assert [row["step"] for row in found] == list(range(1, 17))
    for new, old in zip(found[12:], wanted, strict=True):
        assert (new["step"], new["learning_rate"]) == (old["step"], old["learning_rate"])
        for name in ("loss", "grad_norm"):
            assert math.isclose(new[name], old[name], rel_tol=1e-3)
    assert json.loads((run / "summary.json").read_text())["steps"] == 16


def test_settings_of_the_run_are_kept(run):
    "What a run keeps for life may not change when it is resumed, as in a run of today."
    with pytest.raises(SystemExit, match="train.learning_rate"):
        main(["train", "--resume", str(run), "--train.learning_rate", "0.5"])


def test_evaluates(run):
    "The loss is the one that the first edition measured."
    main(["evaluate", str(run)])
    found = json.loads((run / "evaluation.json").read_text())["validation"]["side by side"]["loss"]
    wanted = json.loads((OLD / "summary.json").read_text())["val_loss"]
    assert math.isclose(found, wanted, rel_tol=1e-4)


def test_generates(run, capsys):
    main(["generate", str(run), " =", "--max_new_tokens", "5", "--temperature", "0"])
    assert capsys.readouterr().out.startswith(" =")


def test_is_listed(run, capsys):
    main(["runs", str(run.parent)])
    assert "old" in capsys.readouterr().out


def test_exports(run, tmp_path):
    "And transformers computes the same logits from what it gets."
    from transformers import AutoModelForCausalLM

    main(["export", str(run), str(tmp_path / "hf")])
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    x = torch.arange(32)[None]
    with torch.no_grad():
        torch.testing.assert_close(theirs(x).logits, load_run(run).model(x), rtol=1e-4, atol=1e-4)


def test_serves(run):
    from tinytransformer.serve import ServeConfig, make_app

    with TestClient(make_app(load_run(run), ServeConfig())) as client:
        answer = client.post("/v1/completions", json=dict(model="old", prompt=" =", max_tokens=3))
        assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] == 3


def test_a_run_that_began_from_a_gpt2(run):
    "A first edition kept the GPT-2 that a run began from among the model's settings."
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["model"]["from_hf"] = "openai-community/gpt2"
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    assert load_run(run).model(torch.arange(4)[None]).shape == (1, 4, 300)
