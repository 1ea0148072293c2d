"""Runs as others read them: processes and libraries that have none of our code, and training that begins from a GPT-2."""
import json, os, shutil, signal, socket, subprocess, sys, time, urllib.request
from pathlib import Path

import pytest
import torch
from conftest import SMALL
from tinytransformer.cli import main
from tinytransformer.generate import SampleConfig, complete
from tinytransformer.train import load_run

WITHOUT_US = """
import json, sys
sys.modules["tinytransformer"] = None  # whoever imports it gets an error
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model, tokenizer = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval(), AutoTokenizer.from_pretrained(sys.argv[1])
ids = tokenizer(sys.argv[2], return_tensors="pt").input_ids
with torch.no_grad(): logits = model(ids).logits[0, -1]
print(json.dumps(dict(type=model.config.model_type, activation=model.config.activation_function, ids=ids[0].tolist(), logits=logits.tolist())))
"""


@pytest.fixture(scope="module")
def exported(workspace):
    folder = workspace/"exported"
    main(["export", str(workspace/"runs/small"), str(folder)])
    return folder


def test_a_process_without_our_code_opens_it(exported, workspace):
    said = subprocess.run([sys.executable, "-c", WITHOUT_US, str(exported), "The school"], capture_output=True, text=True, check=True, env=os.environ | {"HF_HUB_OFFLINE": "1"}).stdout
    found, run = json.loads(said.splitlines()[-1]), load_run(workspace/"runs/small")
    assert found["type"] == "gpt2" and found["activation"] == "relu" and found["ids"] == run.tokenizer.encode("The school").ids
    with torch.no_grad(): torch.testing.assert_close(torch.tensor(found["logits"]), run.model(torch.tensor([found["ids"]]))[0, -1], atol=1e-5, rtol=1e-5)
    assert not list(exported.glob("*.py")) and "auto_map" not in (exported/"config.json").read_text()


def test_export_refuses(here, exported, capsys):
    "One line each, and what stood there stands there still."
    before = sorted(exported.iterdir())
    shutil.copytree("runs/small", "runs/other-tokenizer", dirs_exist_ok=True)
    tokenizer = json.loads(Path("runs/other-tokenizer/tokenizer.json").read_text())
    tokenizer["added_tokens"].append(dict(id=300, content="<new>", single_word=False, lstrip=False, rstrip=False, normalized=False, special=True))
    Path("runs/other-tokenizer/tokenizer.json").write_text(json.dumps(tokenizer))
    for args, message in ((["runs/small", str(exported)], "not empty"), (["runs/small", "runs/small/config.yaml"], "not empty"), (["runs/none", "new"], "runs/none"), (["runs/other-tokenizer", "new"], "tokenizer")):
        with pytest.raises(SystemExit) as stop: main(["export", *args])
        assert message in str(stop.value) and "\n" not in str(stop.value)
    assert sorted(exported.iterdir()) == before and not Path("new").exists()


def test_training_begins_from_it(here, exported, capsys):
    "The first loss is that of a trained model; the run goes on when the folder it came from is gone, as it would have with it."
    source = here/"source"
    shutil.copytree(exported, source)
    options = [*SMALL, "--data.vocab_size", "300", "--train.max_steps", "4", "--train.learning_rate", "1e-6", "--train.min_learning_rate", "1e-7", "--train.warmup_steps", "1", "--train.eval_every", "2"]
    main(["train", "--config", "tiny", "--folder", "runs/tuned", *options, "--model.from_hf", str(source), "--model.seq_len", "16"])
    tuned, fresh = load_run("runs/tuned"), load_run("runs/small")
    assert tuned.model.cfg.seq_len == 16 and tuned.model.cfg.embed_dim == fresh.model.cfg.embed_dim
    torch.testing.assert_close(tuned.model.embeddings.token.weight, fresh.model.embeddings.token.weight, atol=1e-4, rtol=0)
    assert not torch.equal(tuned.model.embeddings.token.weight, fresh.model.embeddings.token.weight)
    shutil.rmtree(source)
    main(["train", "--resume", "runs/tuned", "--train.max_steps", "6"])
    assert json.loads(Path("runs/tuned/metrics.jsonl").read_text().splitlines()[-1])["step"] == 6


@pytest.mark.parametrize("args, message", [(["--model.seq_len", "64"], "context of 32"), (["--data.vocab_size", "280"], "has 280 tokens"), (["--model.from_hf", "nowhere"], "nowhere cannot be read")])
def test_what_does_not_fit_to_begin_from(here, exported, args, message):
    with pytest.raises(SystemExit) as stop: main(["train", "--config", "tiny", "--folder", "runs/never", *SMALL, "--model.from_hf", str(exported), *args])
    assert message in str(stop.value) and "\n" not in str(stop.value) and not Path("runs/never").exists()


def test_transformers_serves_it(exported, workspace):
    "The same client as for our own server."
    openai = pytest.importorskip("openai")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [str(Path(sys.executable).with_name("transformers")), "serve", str(exported), "--port", str(port), "--device", "cpu"]
    with subprocess.Popen(command, env=os.environ | {"HF_HUB_OFFLINE": "1"}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True) as server:
        try:
            for _ in range(300):
                try: urllib.request.urlopen(f"http://127.0.0.1:{port}/health")
                except OSError: time.sleep(0.2)
                else: break
            client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
            found = client.completions.create(model=str(exported), prompt="The school", max_tokens=8, temperature=0)
        finally: os.killpg(server.pid, signal.SIGKILL)
    run = load_run(workspace/"runs/small")
    assert "The school" + found.choices[0].text == complete(run.model, run.tokenizer, "The school", SampleConfig(max_new_tokens=8, temperature=0))[0]
