"""Everything that a model does on an accelerator that has no float64, as Apple's GPUs have none: a
stand-in computes on the CPU and refuses what such a device refuses."""

import json
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from fastapi.testclient import TestClient
from stand_in import DEVICE, OnDevice, stand_in

from tinytransformer import cli, devices
from tinytransformer.attention_map import attention_map
from tinytransformer.corpus import prepare
from tinytransformer.data import DataConfig
from tinytransformer.engine import STRATEGIES, beam_search, compare, complete, stream
from tinytransformer.explorer import AttentionExplorer, ablation, look, token_texts
from tinytransformer.generate import SampleConfig, encode_prompt, generate
from tinytransformer.model import ModelConfig
from tinytransformer.model_page import model_page
from tinytransformer.runs import load_run, train_run
from tinytransformer.serve import ServeConfig, make_app
from tinytransformer.train import TrainConfig, evaluate

PROMPT = " = The"


@pytest.fixture
def device(monkeypatch):
    "The stand-in, as the device that a training finds."
    shared = devices.processes()._shared_state
    monkeypatch.setitem(shared, "device", DEVICE)
    monkeypatch.setattr(devices, "on_cpu", lambda: False)
    monkeypatch.setattr(torch.mps, "current_allocated_memory", lambda: 0)
    with stand_in(monkeypatch):
        yield DEVICE
    AcceleratorState._reset_state()


@pytest.fixture
def run(device):
    "The shipped run, on the device."
    run = load_run("tiny")
    run.model.to(device)
    return run


def test_the_stand_in_refuses(run):
    "What the other tests rely on."
    weight = next(run.model.parameters())
    assert isinstance(weight, OnDevice) and weight.device == DEVICE
    for widen in (
        lambda: weight.double(),
        lambda: weight.to(torch.float64),
        lambda: weight.sum(dtype=torch.float64),
        lambda: torch.zeros(2, dtype=torch.float64, device=DEVICE),
        lambda: torch.zeros(2, dtype=torch.float64).to(DEVICE),
        lambda: weight.new_zeros(2, dtype=torch.float64),
    ):
        with pytest.raises(TypeError, match="no float64"):
            widen()
    with pytest.raises(AssertionError, match="two devices"):
        weight[0] + torch.zeros(weight.shape[1])
    assert weight.cpu().double().device.type == "cpu"


VARIANTS = dict(positions="rotary", activation="swiglu", norm="rms")


@pytest.mark.parametrize("optimizer, shape", [("adamw", {}), ("muon", VARIANTS)])
def test_training(device, tmp_path, shape, optimizer):
    "A run with samples, evaluations, facts asked for and a resumption."
    data = DataConfig(articles=60, vocab_size=300, data_dir=str(tmp_path / "data"))
    model = ModelConfig(seq_len=32, embed_dim=16, num_heads=2, num_layers=1, **shape)
    train = TrainConfig(
        max_steps=4,
        warmup_steps=2,
        eval_every=2,
        batch_size=4,
        optimizer=optimizer,
        label_smoothing=0.1,
        micro_batches=2,
    )
    tokenizer, seen = prepare(data).tokenizer, []

    def write(net):
        seen.append(next(net.parameters()).device)
        return complete(net, tokenizer, " The", SampleConfig(max_new_tokens=5))[0]

    run = tmp_path / "run"
    train_run(run, data, model, train, write=write)
    longer = TrainConfig(**vars(train) | dict(max_steps=6))
    train_run(run, data, model, longer, write=write, resume=True)
    assert seen == [DEVICE] * 3
    assert len((run / "samples.jsonl").read_text().splitlines()) == 3
    assert json.loads((run / "summary.json").read_text())["steps"] == 6


def test_evaluation(run):
    text = torch.randint(run.model.cfg.vocab_size, (1000,), generator=torch.Generator())
    found = evaluate(run.model, text, stride=17)
    run.model.cpu()
    assert found == pytest.approx(evaluate(run.model, text, stride=17), rel=1e-6)


@pytest.mark.parametrize("name", STRATEGIES)
def test_sampling(run, name):
    "Every control, in the plain loop, in a batch and as a stream: the texts of the CPU."
    cfg = SampleConfig(max_new_tokens=6, seed=3, **STRATEGIES[name])
    ids = torch.tensor([encode_prompt(run.tokenizer, PROMPT)])

    def texts():
        where = next(run.model.parameters()).device
        yield generate(run.model, ids.to(where), cfg).tolist()
        yield list(stream(run.model, run.tokenizer, PROMPT, cfg))
        yield complete(run.model, run.tokenizer, PROMPT, cfg, n=2)

    found = list(texts())
    run.model.cpu()
    assert found == list(texts())


def test_searching_and_comparing(run):
    ids = encode_prompt(run.tokenizer, PROMPT)
    cfg = SampleConfig(max_new_tokens=6)
    assert beam_search(run.model, ids, 3, 5)
    assert len(compare(run.model, run.tokenizer, PROMPT, cfg, n=2)) == len(STRATEGIES)


def test_looking(run):
    "The map, the statistics of its heads, and what a head that is switched off costs."
    ids = encode_prompt(run.tokenizer, " = The Mill = \n The Mill is")
    tokens = token_texts(run.tokenizer, ids)
    seen = look(run.model, ids, tokens)
    shown = attention_map(seen.weights, seen.tokens, vectors=seen.vectors)
    losses = ablation(run.model, ids)
    attention_map(seen.weights, seen.tokens, statistics={"loss without it": losses})
    weights, logits = seen.weights.cpu(), seen.logits.cpu()
    explorer = AttentionExplorer(run.model, run.tokenizer, " = The Mill")
    assert "token" in explorer.report()
    run.model.cpu()
    there = look(run.model, ids, tokens)
    torch.testing.assert_close(weights, there.weights)
    torch.testing.assert_close(logits, there.logits)
    assert losses == pytest.approx(ablation(run.model, ids), abs=1e-5)
    same = attention_map(there.weights, there.tokens, vectors=there.vectors)
    assert same.data["weights"] == shown.data["weights"]


def test_page(run):
    "The page that holds the model is the same file."
    there = model_page(run).html
    run.model.cpu()
    assert model_page(run).html == there


def test_server(run):
    "Completions with every field that computes something, whole and streamed, and the map."
    with TestClient(make_app(run, ServeConfig())) as client:
        asked = dict(
            model=Path(run.folder).name,
            prompt=[PROMPT, " ="],
            max_tokens=6,
            logprobs=3,
            seed=1,
            n=2,
            best_of=3,
            echo=True,
            frequency_penalty=0.5,
            presence_penalty=0.1,
            logit_bias={"5": 1.5},
            top_p=0.9,
        )
        answer = client.post("/v1/completions", json=asked)
        assert answer.status_code == 200, answer.text
        del asked["best_of"]
        answer = client.post("/v1/completions", json=asked | dict(stream=True))
        assert answer.status_code == 200 and '"error"' not in answer.text, answer.text
        answer = client.post("/attention", json=dict(prompt=" = The Mill"))
        assert answer.status_code == 200, answer.text


def test_commands(device, tmp_path, monkeypatch, capsys):
    "`fast_products` measures in float64, too."
    monkeypatch.chdir(tmp_path)
    cli.main(["generate", "tiny", PROMPT, "--max_new_tokens", "5"])
    assert PROMPT in capsys.readouterr().out
