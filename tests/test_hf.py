"""GPT-2 as we read it, runs as others read them: processes and libraries that have none of our
code, and training that begins from a GPT-2."""

import copy
import functools
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT, SMALL
from tokenizers import Tokenizer, models
from torch.testing import assert_close

from tinytransformer.cli import main
from tinytransformer.engine import complete
from tinytransformer.files import InputError
from tinytransformer.generate import KVCache, SampleConfig, generate, next_logits
from tinytransformer.hf import (
    END_TOKENS,
    PAD_TOKENS,
    export,
    from_hf,
    hf_names,
    is_transposed,
    neox_names,
    special_names,
    to_hf,
    with_special_tokens,
)
from tinytransformer.model import Transformer, next_token_loss
from tinytransformer.runs import load_run

WITHOUT_US = """
import json, sys
sys.modules["tinytransformer"] = None  # whoever imports it gets an error
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
ids = tokenizer(sys.argv[2], return_tensors="pt").input_ids
with torch.no_grad():
    logits = model(ids).logits[0, -1]
config = dict(type=model.config.model_type, activation=model.config.activation_function)
print(json.dumps(config | dict(ids=ids[0].tolist(), logits=logits.tolist())))
"""


SHAPES = [
    dict(n_layer=2, n_embd=16, n_head=4),
    dict(n_layer=1, n_embd=8, n_head=1, vocab_size=61),
    dict(n_layer=3, n_embd=48, n_head=3, n_positions=9),
    dict(n_layer=2, n_embd=32, n_head=2, activation_function="relu"),
    dict(n_layer=4, n_embd=24, n_head=8, activation_function="gelu_pytorch_tanh"),
    dict(n_layer=2, n_embd=16, n_head=2, tie_word_embeddings=False),
]


def twin(shape: dict):
    "A `GPT2LMHeadModel` in which every number is random, in evaluation mode."
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(
            **dict(vocab_size=97, n_positions=24, bos_token_id=None, eos_token_id=None) | shape
        )
    ).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(mean=float(bool(re.search(r"ln_\w\.weight", name))), std=0.2)
    return model


def opened(folder: Path, theirs) -> Transformer:
    theirs.save_pretrained(folder)
    return from_hf(str(folder))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_twins(shape, tmp_path):
    """Logits, the gradient of every parameter, and step by step the cache: all as Hugging Face
    computes them, in double precision.
    """
    theirs = twin(shape)
    mine = opened(tmp_path / "twin", theirs)
    assert not mine.training
    theirs, mine = theirs.double(), mine.double()
    tokens = torch.randint(theirs.config.vocab_size, (2, theirs.config.n_positions + 1))
    x, y = tokens[:, :-1], tokens[:, 1:]
    next_token_loss(mine(x), y).backward()
    next_token_loss(theirs(x).logits, y).backward()
    assert_close(mine(x), theirs(x).logits, rtol=1e-9, atol=1e-9)
    names = hf_names(mine.cfg)
    assert set(names.values()) == {name for name, _ in theirs.named_parameters()}
    for name, p in mine.named_parameters():
        there = theirs.get_parameter(names[name]).grad
        assert_close(p.grad, there.T if is_transposed(name) else there, rtol=1e-7, atol=1e-10)
    room, past = KVCache(mine, rows=2, capacity=x.shape[1]), None
    with torch.no_grad():
        for start, end in ((0, 3), (3, 4), (4, x.shape[1])):  # a prompt, a token, the rest
            out = theirs(x[:, start:end], past_key_values=past, use_cache=True)
            past = out.past_key_values
            assert_close(
                next_logits(mine, x[:, start:end], room), out.logits[:, -1], rtol=1e-9, atol=1e-9
            )
            for layer, (keys, values) in zip(past.layers, room.kv, strict=True):
                assert_close(keys[:, :, :end], layer.keys, rtol=1e-9, atol=1e-9)
                assert_close(values[:, :, :end], layer.values, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_there_and_back(shape, tmp_path):
    """Theirs, ours, theirs; and ours, theirs, ours, through folders: every number is what it was,
    and a tied matrix is one matrix.
    """
    from transformers import AutoModelForCausalLM

    theirs = twin(shape)
    mine = opened(tmp_path / "out", theirs)
    to_hf(mine).save_pretrained(tmp_path / "back")
    back, again = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "back"),
        from_hf(tmp_path / "back"),
    )
    assert back.state_dict().keys() == theirs.state_dict().keys()
    assert all(
        torch.equal(weight, back.state_dict()[name]) for name, weight in theirs.state_dict().items()
    )
    assert again.cfg == mine.cfg and all(
        torch.equal(p, q) for p, q in zip(mine.parameters(), again.parameters(), strict=True)
    )
    assert (again.head.weight is again.embeddings.token.weight) == theirs.config.tie_word_embeddings
    assert len([p for p in again.parameters() if p.requires_grad]) == len(list(theirs.parameters()))


def test_reading_draws_nothing(tmp_path):
    "No random number is drawn, and training the copy leaves the original alone."
    theirs = twin(SHAPES[0])
    before, state = copy.deepcopy(theirs.state_dict()), torch.get_rng_state()
    mine = from_hf(theirs)
    assert torch.equal(torch.get_rng_state(), state)
    with torch.no_grad():
        for p in mine.parameters():
            p.add_(1)
    assert all(torch.equal(weight, before[name]) for name, weight in theirs.state_dict().items())


def test_as_openai_wrote_it(tmp_path):
    """GPT-2's own file: names without prefix, the causal masks of each block, the tied matrix
    twice; and half precision.
    """
    import safetensors.torch

    theirs = twin(SHAPES[0])
    theirs.save_pretrained(tmp_path)
    old = {
        name.removeprefix("transformer."): weight.clone()
        for name, weight in theirs.state_dict().items()
    }
    old |= {
        f"h.{i}.attn.{name}": value
        for i in range(2)
        for name, value in (("bias", torch.ones(1, 1, 24, 24)), ("masked_bias", torch.tensor(-1e4)))
    }
    assert "lm_head.weight" in old
    safetensors.torch.save_file(old, tmp_path / "model.safetensors")
    found = from_hf(tmp_path)
    assert all(
        torch.equal(p, q)
        for p, q in zip(found.parameters(), from_hf(theirs).parameters(), strict=True)
    )
    safetensors.torch.save_file(
        {name: weight.half() for name, weight in old.items()}, tmp_path / "model.safetensors"
    )
    assert {p.dtype for p in from_hf(tmp_path).parameters()} == {torch.float32}


class OneModel(BaseHTTPRequestHandler):
    "What a Hub says about a single model, `someone/twin`, that lies in a folder."

    def do_GET(self):
        sha, files = "0" * 40, {f.name: f.read_bytes() for f in self.server.folder.iterdir()}
        name, headers = self.path.split("?")[0].rsplit("/", 1)[-1], {}
        if self.path.startswith("/api/models/someone/twin/tree/"):
            body = json.dumps(
                [dict(type="file", path=f, size=len(b), oid=sha) for f, b in files.items()]
            ).encode()
        elif self.path.startswith("/api/models/someone/twin"):
            body = json.dumps(
                dict(id="someone/twin", sha=sha, siblings=[dict(rfilename=f) for f in files])
            ).encode()
        elif self.path.startswith("/someone/twin/resolve/") and name in files:
            body, headers = files[name], {"X-Repo-Commit": sha, "ETag": f'"{name}"'}
        else:
            return self.send_error(404)
        self.server.asked.append(name)
        self.send_response(200)
        for k, v in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(k, v)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, *args):
        pass


def test_a_name_on_the_hub(tmp_path):
    "Fetched once, by name, and nothing that is not needed; afterwards the disk is enough."
    theirs = twin(SHAPES[0])
    theirs.save_pretrained(tmp_path / "model")
    (tmp_path / "model/pytorch_model.bin").write_bytes(b"could run any code")
    code = (
        "import sys; from tinytransformer.hf import from_hf;"
        " print(sum(p.double().sum().item() for p in"
        " from_hf('someone/twin').parameters()))"
    )
    with ThreadingHTTPServer(("127.0.0.1", 0), OneModel) as server:
        server.folder, server.asked = tmp_path / "model", []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        env = {
            name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"
        } | dict(
            HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}",
            HF_HOME=str(tmp_path / "home"),
            HF_HUB_DISABLE_XET="1",
            NO_PROXY="127.0.0.1",
        )
        found = [
            subprocess.run(
                [sys.executable, "-c", code],
                env=env | more,
                capture_output=True,
                text=True,
                check=True,
            ).stdout
            for more in ({}, {"HF_HUB_OFFLINE": "1"})
        ]
        server.shutdown()
    assert (
        found[0] == found[1]
        and abs(float(found[0]) - sum(p.double().sum().item() for p in theirs.parameters())) < 1e-6
    )
    assert "model.safetensors" in server.asked and "pytorch_model.bin" not in server.asked


@pytest.fixture(scope="session")
def exported(workspace):
    folder = workspace / "exported"
    main(["export", str(workspace / "runs/small"), str(folder)])
    return folder


def test_a_process_without_our_code_opens_it(exported, workspace):
    said = subprocess.run(
        [sys.executable, "-c", WITHOUT_US, str(exported), "The school"],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    ).stdout
    found, run = json.loads(said.splitlines()[-1]), load_run(workspace / "runs/small")
    assert (
        found["type"] == "gpt2"
        and found["activation"] == "relu"
        and found["ids"] == run.tokenizer.encode("The school").ids
    )
    with torch.no_grad():
        torch.testing.assert_close(
            torch.tensor(found["logits"]),
            run.model(torch.tensor([found["ids"]]))[0, -1],
            atol=1e-5,
            rtol=1e-5,
        )
    assert (
        not list(exported.glob("*.py")) and "auto_map" not in (exported / "config.json").read_text()
    )


def test_export_refuses(here, exported, capsys):
    "One line each, and what stood there stands there still."
    before = sorted(exported.iterdir())
    shutil.copytree("runs/small", "runs/other-tokenizer", dirs_exist_ok=True)
    tokenizer = json.loads(Path("runs/other-tokenizer/tokenizer.json").read_text())
    tokenizer["added_tokens"].append(
        dict(
            id=300,
            content="<new>",
            single_word=False,
            lstrip=False,
            rstrip=False,
            normalized=False,
            special=True,
        )
    )
    Path("runs/other-tokenizer/tokenizer.json").write_text(json.dumps(tokenizer))
    for args, message in (
        (["runs/small", str(exported)], "not empty"),
        (["runs/small", "runs/small/config.yaml"], "not empty"),
        (["runs/none", "new"], "runs/none"),
        (["runs/other-tokenizer", "new"], "tokenizer"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["export", *args])
        assert message in str(stop.value) and "\n" not in str(stop.value)
    assert sorted(exported.iterdir()) == before and not Path("new").exists()


# an exported folder in other programs. `OPENED` runs in a process of its own, without our code.
OPENED = """
import json, sys
sys.modules["tinytransformer"] = None  # whoever imports it gets an error
import transformers
folder, texts = sys.argv[1], json.loads(sys.argv[2])
transformers.logging.set_verbosity_error()
writer = transformers.pipeline("text-generation", model=folder, batch_size=2)
as_written = dict(clean_up_tokenization_spaces=False)
settings = dict(do_sample=False, max_new_tokens=8) | as_written
read, short = writer.tokenizer, texts[:3]
special = {role: read.special_tokens_map[role] for role in ("bos_token", "eos_token", "pad_token")}
found = dict(
    version=transformers.__version__,
    dtype=str(writer.model.dtype),
    single=[writer(text, **settings)[0]["generated_text"] for text in short],
    batch=[row[0]["generated_text"] for row in writer(short, **settings)],
    filled=len(writer(texts[0], return_tensors=True)[0]["generated_token_ids"]),
    keys=sorted(read(texts)),
    ids=[read(text).input_ids for text in texts],
    decoded=[read.decode(read(text).input_ids) for text in texts],
    special={role: [name, read.convert_tokens_to_ids(name)] for role, name in special.items()},
)
print(json.dumps(found))
"""
TEXTS = [
    "The school",
    "a",
    "in 1839 , n't",
    "He was born in 1839 , the eldest . It 's n't",
    "ÿ þ À õ Łódź – \U0001f600\t\r\n x",
]


def check_opened(exported: Path, workspace: Path, env: dict[str, str]) -> str:
    """Open an exported folder with the transformers of `env`, and return its version. Texts in a
    batch, with padding on the left, are those that our own decoding writes one by one, and every
    text is read as the same tokens; without a length, a text ends at the end of the context.
    """
    said = subprocess.run(
        [sys.executable, "-c", OPENED, str(exported), json.dumps(TEXTS)],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"} | env,
    )
    assert said.returncode == 0, said.stderr[-2000:]
    found, run = json.loads(said.stdout.splitlines()[-1]), load_run(workspace / "runs/small")
    settings = SampleConfig(max_new_tokens=8, temperature=0)
    wanted = [complete(run.model, run.tokenizer, text, settings)[0] for text in TEXTS[:3]]
    assert found["batch"] == found["single"] == wanted
    assert found["ids"] == [run.tokenizer.encode(text).ids for text in TEXTS]
    assert found["decoded"] == TEXTS
    assert found["keys"] == ["attention_mask", "input_ids"] and found["dtype"] == "torch.float32"
    assert found["filled"] <= run.model.cfg.seq_len
    names = {role: name for role, (name, _) in found["special"].items()}
    assert names == dict(bos_token=END_TOKENS[0], eos_token=END_TOKENS[0], pad_token=PAD_TOKENS[0])
    vocab = run.tokenizer.get_vocab()
    assert [found["special"][role][1] for role in ("eos_token", "pad_token")] == [
        vocab["ÿ"],
        vocab["þ"],
    ]
    return found["version"]


def test_it_opens_and_batches_in_the_installed_transformers(exported, workspace):
    "In the version that is installed here, 5 or later."
    assert int(check_opened(exported, workspace, {}).split(".")[0]) >= 5


@pytest.mark.slow
def test_it_opens_and_batches_in_transformers_4(exported, workspace, tmp_path):
    """In transformers 4.57.6 itself, which pip puts into a folder of its own; where pip cannot
    reach a registry the test is left out.
    """
    packages = "transformers==4.57.6 tokenizers==0.22.2 huggingface_hub==0.36.2".split()
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target"]
    env = os.environ | dict(PIP_CONSTRAINT="")
    got = subprocess.run(
        [*command, str(tmp_path), *packages], capture_output=True, text=True, env=env
    )
    if got.returncode:
        pytest.skip(f"pip cannot install transformers 4.57.6: {got.stderr[-200:]}")
    paths = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    version = check_opened(exported, workspace, dict(PYTHONPATH=paths))
    assert version == "4.57.6"
    for tied in (True, False):
        run = rotary_run(workspace, tie_weights=tied)
        export(run, tmp_path / f"tied {tied}")
        found = check_rotary(tmp_path / f"tied {tied}", run.model, dict(PYTHONPATH=paths))
        assert found == version


def test_fields_that_transformers_4_reads(exported):
    """The fields in which 4.57 and 5 differ, as 4.57 needs them. That it opens such a folder, the
    slow test above proves; this one keeps what was proved, on any machine.
    """
    tokenizer, config, generation = (
        json.loads((exported / name).read_text())
        for name in ("tokenizer_config.json", "config.json", "generation_config.json")
    )
    # 5 writes TokenizersBackend, which 4 does not know
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
    # 4 would add token_type_ids, and GPT-2 adds the embedding of token 0 to each position for them
    assert tokenizer["model_input_names"] == ["input_ids", "attention_mask"]
    assert tokenizer["clean_up_tokenization_spaces"] is False
    assert tokenizer["padding_side"] == "left" and tokenizer["model_max_length"] == 32
    assert config["dtype"] == config["torch_dtype"] == "float32"
    vocab = json.loads((exported / "tokenizer.json").read_text())["model"]["vocab"]
    for role in ("bos_token", "eos_token", "pad_token"):
        i = vocab[tokenizer[role]]
        assert config[f"{role}_id"] == generation[f"{role}_id"] == i < config["vocab_size"]
    assert generation["max_length"] == config["n_positions"]
    # otherwise a server would take the likeliest token whatever temperature it is asked for, and
    # 4 and 5 would draw from the 50 likeliest
    assert generation["do_sample"] is True and generation["top_k"] == 0


def rotary_run(workspace: Path, **settings):
    "The small run, but for its model: rotary positions and random weights."
    run = load_run(workspace / "runs/small")
    torch.manual_seed(0)
    model = Transformer(replace(run.model.cfg, positions="rotary", **settings)).eval()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, mean=0.02, std=0.3)
    return replace(run, model=model)


ROTARY = """
import json, sys, torch
from transformers import AutoModelForCausalLM, __version__
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
with torch.no_grad():
    logits = model(torch.tensor([json.loads(sys.argv[2])])).logits[0]
    print(__version__, json.dumps(logits.tolist()))
"""


def check_rotary(folder: Path, model: Transformer, env: dict[str, str]) -> str:
    "Open an exported model with rotary positions elsewhere; its logits are ours to 1e-5."
    ids = list(range(0, 290, 10))
    said = subprocess.run(
        [sys.executable, "-c", ROTARY, str(folder), json.dumps(ids)],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"} | env,
    ).stdout.splitlines()[-1]
    version, _, logits = said.partition(" ")
    with torch.no_grad():
        ours = model(torch.tensor([ids]))[0]
    assert_close(
        torch.tensor(json.loads(logits)), ours, atol=1e-5 * ours.abs().max().item(), rtol=0
    )
    return version


@pytest.mark.parametrize(
    "settings",
    [
        dict(),
        dict(activation="gelu", tie_weights=False),
        dict(num_heads=1, num_layers=3),
        dict(num_heads=2, dropout=0.1),
    ],
    ids=str,
)
def test_rotary_twins(workspace, settings):
    "A model with rotary positions and its GPT-NeoX: logits and gradients in double precision."
    mine = rotary_run(workspace, **settings).model
    cfg = mine.cfg
    theirs, mine = to_hf(mine).double(), mine.double()
    tokens = torch.randint(cfg.vocab_size, (2, cfg.seq_len + 1))
    x, y = tokens[:, :-1], tokens[:, 1:]
    next_token_loss(mine(x), y).backward()
    next_token_loss(theirs(x).logits, y).backward()
    # the angles are float32 in both
    assert_close(mine(x), theirs(x).logits, rtol=1e-5, atol=1e-5)
    names = neox_names(cfg)
    heads = 0 if cfg.tie_weights else 1
    assert len(names) + heads == len(list(theirs.parameters())) == len(list(mine.parameters()))
    for name, p in mine.named_parameters():
        there = (
            theirs.get_output_embeddings().weight
            if name == "head.weight"
            else theirs.get_parameter(names[name])
        ).grad
        if ".qkv." in name:
            there = there.unflatten(0, (cfg.num_heads, 3, -1)).transpose(0, 1).flatten(0, 2)
        assert_close(p.grad, there, rtol=1e-4, atol=1e-5)


def test_a_rotary_run_is_exported(workspace, tmp_path):
    "As a GPT-NeoX, in the installed transformers; and with the names that 4.57 reads."
    run = rotary_run(workspace)
    export(run, tmp_path / "twin")
    assert int(check_rotary(tmp_path / "twin", run.model, {}).split(".")[0]) >= 5
    config = json.loads((tmp_path / "twin/config.json").read_text())
    assert config["model_type"] == "gpt_neox" and config["rotary_pct"] == 1
    assert config["rotary_emb_base"] == 10_000 and config["torch_dtype"] == "float32"
    assert "GPT-NeoX" in (tmp_path / "twin/README.md").read_text()
    with pytest.raises(InputError, match="model_type is 'gpt_neox', not 'gpt2'"):
        from_hf(tmp_path / "twin")
    swiglu = Transformer(replace(run.model.cfg, activation="swiglu"))
    with pytest.raises(InputError, match="'swiglu', which neither GPT-2 nor GPT-NeoX has"):
        export(replace(run, model=swiglu), tmp_path / "other")


def test_a_rotary_export_batches(workspace, tmp_path):
    "Texts of different lengths, padded on their left, get the positions they have alone."
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run = rotary_run(workspace)
    export(run, tmp_path / "twin")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "twin")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "twin").eval()
    texts = ["a", " = The Mill = "]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    assert batch["attention_mask"][0, 0] == 0 and batch["attention_mask"].all(dim=1)[1]
    together = model.generate(**batch, max_new_tokens=6, do_sample=False)[:, -6:]
    for text, found in zip(texts, together):
        ids = torch.tensor([tokenizer(text).input_ids])
        ours = generate(run.model, ids, SampleConfig(max_new_tokens=6, temperature=0))
        assert found.tolist() == ours[0, -6:].tolist()


def test_special_tokens_are_kept(workspace, tmp_path):
    "A tokenizer with an end of text, as GPT-2's, keeps it, and its vocabulary is not touched."
    from transformers import AutoTokenizer

    run = load_run(workspace / "runs/small")
    tokenizer = Tokenizer.from_str(run.tokenizer.to_str())
    tokenizer.add_special_tokens([END_TOKENS[0]])
    V = tokenizer.get_vocab_size()
    model = Transformer(replace(run.model.cfg, vocab_size=V))
    export(replace(run, model=model, tokenizer=tokenizer), tmp_path / "twin")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "twin")
    assert theirs.bos_token_id == theirs.eos_token_id == theirs.pad_token_id == V - 1
    assert theirs.get_vocab() == tokenizer.get_vocab() and len(theirs) == V
    assert theirs.decode([V - 1]) == END_TOKENS[0]
    assert theirs.decode([V - 1], skip_special_tokens=True) == ""
    config = json.loads((tmp_path / "twin/generation_config.json").read_text())
    assert config["eos_token_id"] == config["pad_token_id"] == V - 1


def test_what_others_do_with_it(exported):
    """Each of these has failed for somebody with a model without special tokens: batches in which
    a text is classified by its last token, a collator for training, and a text from nothing.
    """
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
        DataCollatorForLanguageModeling,
    )

    read = AutoTokenizer.from_pretrained(exported)
    texts = ["The school", "a", "in 1839"]
    batch = read(texts, padding=True, return_tensors="pt")
    positions = (batch.attention_mask.cumsum(1) - 1).clamp(min=0)
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(exported, num_labels=2).eval()
    with torch.no_grad():
        single = [model(**read(text, return_tensors="pt")).logits[0] for text in texts]
        assert_close(model(**batch, position_ids=positions).logits, torch.stack(single))
    labels = DataCollatorForLanguageModeling(read, mlm=False)([read(text) for text in texts])
    # padding is not learned, and an end of text would be: it is a different token
    assert labels["labels"].eq(-100).equal(batch.attention_mask.eq(0))
    assert read.pad_token_id != read.eos_token_id
    writer = AutoModelForCausalLM.from_pretrained(exported)
    assert writer.generate(do_sample=False, max_new_tokens=4).shape == (1, 5)
    # a text that is longer than the context is cut by the tokenizer, if it is asked to
    assert read("The school " * 99, truncation=True, return_tensors="pt").input_ids.shape == (1, 32)
    # and ids alone say where padding is
    ids = dict(do_sample=False, max_new_tokens=4)
    assert writer.generate(batch.input_ids, **ids).equal(writer.generate(**batch, **ids))


def test_named_bytes_change_no_text():
    "Random text of all of Unicode gets the same tokens, and never the two that got names."
    ours = load_run("tiny").tokenizer
    theirs, roles = with_special_tokens(ours)
    special = {theirs.token_to_id(name) for name in roles.values()}
    draw = random.Random(0)
    assert len(special) == 2 and not set(special_names(ours))
    for _ in range(300):
        top = draw.choice([0x80, 0x800, 0x10000, 0x110000])
        codes = [draw.randrange(top) for _ in range(40)]
        text = "".join(chr(code) for code in codes if not 0xD800 <= code < 0xE000)
        ids = ours.encode(text).ids
        assert theirs.encode(text).ids == ids and not special & set(ids)
        assert theirs.decode(ids) == text
    # ours is as it was
    assert ours.token_to_id("ÿ") is not None and ours.token_to_id(END_TOKENS[0]) is None
    # where they would not do any more: no byte-level vocabulary, so nothing is renamed
    words = Tokenizer(models.WordLevel(dict(a=0, ÿ=1, þ=2), unk_token="a"))
    assert with_special_tokens(words)[1] == {}


def test_a_diverged_model_is_not_exported(workspace, tmp_path):
    run = load_run(workspace / "runs/small")
    with torch.no_grad():
        run.model.blocks[0].ffn[0].bias[0] = float("nan")
    with pytest.raises(InputError, match="blocks.0.ffn.0.bias holds numbers that are not finite"):
        export(run, tmp_path / "twin")
    assert not list(tmp_path.iterdir())


def test_its_card_has_the_commands(exported, workspace):
    "Python of the card runs as it stands, but for the folder's name; the shell's is parsed."
    card = (exported / "README.md").read_text().replace("FOLDER", str(exported))
    (code,) = re.findall(r"```python\n(.*?)```", card, re.S)
    said = subprocess.run(
        [sys.executable, "-c", code + "print(len(several))"],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    assert said.returncode == 0 and said.stdout.splitlines()[-1] == "2", said.stderr
    shell = "\n".join(re.findall(r"```sh\n(.*?)```", card, re.S)).replace("\\\n", "")
    (line,) = [line for line in shell.splitlines() if line.startswith("curl")]
    asked = json.loads(shlex.split(line)[-1])
    assert asked["model"] == str(exported) and asked["max_tokens"]
    subprocess.run(["bash", "-n", "-c", shell], check=True)


# --- the evaluation harness


def write_task(folder: Path, text: str) -> None:
    "A task of lm-evaluation-harness: how likely is this text?"
    folder.mkdir()
    (folder / "text.json").write_text(json.dumps(dict(text=text)))
    (folder / "ours.yaml").write_text(f"""
task: ours
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {folder / "text.json"}}}}}
validation_split: validation
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: bits_per_byte}}]
""")


def harness_nats(task: Path, **settings) -> float:
    "The nats of a task's text, as the harness finds them."
    import lm_eval
    from lm_eval.tasks import TaskManager

    found = lm_eval.simple_evaluate(
        **settings,
        tasks=["ours"],
        task_manager=TaskManager(include_path=str(task), include_defaults=False),
        bootstrap_iters=0,
    )["results"]["ours"]
    text = json.loads((task / "text.json").read_text())["text"]
    return found["bits_per_byte,none"] * len(text.encode()) * math.log(2)


def nats_after(run, before: int, ids: list[int]) -> float:
    "What the model finds for `ids` after the token `before`, in one window."
    with torch.no_grad():
        logits = run.model(torch.tensor([[before, *ids[:-1]]]))[0]
    return torch.nn.functional.cross_entropy(logits, torch.tensor(ids), reduction="sum").item()


def text_of_tokens(run, n: int) -> str:
    "A text of TinyWiki that is exactly so many tokens long."
    ids = run.tokenizer.encode(
        " = The Hollow Clock = \n The Hollow Clock is a statue . \n" * 9
    ).ids[:n]
    text = run.tokenizer.decode(ids)
    assert run.tokenizer.encode(text).ids == ids
    return text


def serving_arguments() -> dict[str, str]:
    "The `--model_args` of the command in *Serving*."
    cells = json.loads((ROOT / "nbs/appendix/serve.ipynb").read_text())["cells"]
    (text,) = ["".join(c["source"]) for c in cells if "local-completions" in "".join(c["source"])]
    command = re.search(r"lm_eval --model local-completions.*?(?=```)", text, re.S)
    words = shlex.split(command[0].replace("\\\n", ""))
    return dict(each.split("=", 1) for each in words[words.index("--model_args") + 1].split(","))


def test_the_harness_takes_it_as_it_is(exported, workspace, tmp_path, monkeypatch):
    "`lm_eval --model hf --model_args pretrained=FOLDER`, without a further argument."
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    run = load_run(workspace / "runs/small")
    text = text_of_tokens(run, run.model.cfg.seq_len)
    write_task(tmp_path / "task", text)
    found = harness_nats(
        tmp_path / "task", model="hf", model_args=f"pretrained={exported},device=cpu"
    )
    end = run.tokenizer.token_to_id("ÿ")
    assert found == pytest.approx(nats_after(run, end, run.tokenizer.encode(text).ids), rel=1e-4)


def test_the_harness_asks_our_server_for_full_windows(exported, workspace, tmp_path, monkeypatch):
    """With the arguments that *Serving* gives. The harness sends a prompt of T tokens and asks for
    one more, T + 1 in all, because it wants the log-probabilities of the prompt. The last token is
    only written, so there is room for it.
    """
    pytest.importorskip("tenacity")  # the harness asks for it where it speaks to a server
    import uvicorn

    from tinytransformer.serve import ServeConfig, make_app

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    run = load_run(workspace / "runs/small")
    T = run.model.cfg.seq_len
    text = text_of_tokens(run, T - 1)
    write_task(tmp_path / "task", text)
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(make_app(run, ServeConfig()), log_level="error"))
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/v1/completions"
        given = serving_arguments()
        assert int(given["max_length"]) == load_run("tiny").model.cfg.seq_len + 1
        given |= dict(model="small", base_url=url, tokenizer=exported, max_length=T + 1)
        try:
            found = harness_nats(
                tmp_path / "task",
                model="local-completions",
                model_args=",".join(f"{name}={value}" for name, value in given.items()),
            )
        finally:
            server.should_exit = True
            thread.join()
    end = run.tokenizer.token_to_id("ÿ")
    assert found == pytest.approx(nats_after(run, end, run.tokenizer.encode(text).ids), rel=1e-4)


# --- training that begins from a GPT-2

GENTLY = (
    "--train.learning_rate 1e-6 --train.min_learning_rate 1e-7 --train.warmup_steps 1"
    " --train.max_steps 4 --train.eval_every 2".split()
)


def step_losses(run: str) -> list[float]:
    return [json.loads(line)["loss"] for line in Path(run, "metrics.jsonl").open()]


def test_training_begins_from_it(here, exported):
    """Its weights, its shape, its tokenizer, whatever the file says; with a shorter context, if one
    is asked for. The run goes on when the folder is gone, as it would have with it.
    """
    source = here / "source"
    shutil.copytree(exported, source)
    # other text, and no shape
    args = [
        "train",
        "--config",
        "tiny",
        "--data.articles",
        "60",
        "--data.seed",
        "5",
        "--sample.max_new_tokens",
        "5",
        *GENTLY,
        "--train.init_from",
        str(source),
        "--model.seq_len",
        "16",
    ]
    main([*args, "--folder", "runs/tuned"])
    tuned, fresh = load_run("runs/tuned"), load_run("runs/small")
    assert tuned.model.cfg.seq_len == 16 and tuned.model.cfg.embed_dim == fresh.model.cfg.embed_dim
    # but for two bytes that stand in no text
    names = dict(zip("ÿþ", (END_TOKENS[0], PAD_TOKENS[0])))
    vocab = {names.get(token, token): i for token, i in fresh.tokenizer.get_vocab().items()}
    assert tuned.tokenizer.get_vocab() == vocab
    text = "The school of = Hill =\n stands in the north ."
    assert tuned.tokenizer.encode(text).ids == fresh.tokenizer.encode(text).ids
    assert_close(
        tuned.model.embeddings.token.weight, fresh.model.embeddings.token.weight, atol=1e-4, rtol=0
    )
    assert_close(
        tuned.model.embeddings.position.weight,
        fresh.model.embeddings.position.weight[:16],
        atol=1e-4,
        rtol=0,
    )
    assert not torch.equal(tuned.model.embeddings.token.weight, fresh.model.embeddings.token.weight)
    shutil.rmtree(source)
    main(["train", "--resume", "runs/tuned", "--train.max_steps", "6"])
    assert len(step_losses("runs/tuned")) == 6
    main(["evaluate", "runs/tuned"])


def test_killed_before_its_first_checkpoint(here, exported):
    """The run keeps the weights it began with: it ends with the very bytes of one that was not
    killed, and the same command begins and resumes.
    """
    source = here / "source-of-killed"
    shutil.copytree(exported, source)
    args = [
        "train",
        "--config",
        "tiny",
        *SMALL,
        *GENTLY,
        "--train.init_from",
        str(source),
        "--resume",
        "auto",
    ]
    main([*args, "--folder", "runs/whole"])
    shutil.copytree("runs/whole", "runs/killed")
    for name in ("last", "previous", "best"):
        shutil.rmtree(f"runs/killed/{name}", ignore_errors=True)
    for name in ("summary.json", "metrics.jsonl", "samples.jsonl", "curve.png"):
        Path("runs/killed", name).unlink()
    shutil.rmtree(source)
    main([*args, "--folder", "runs/killed"])
    assert step_losses("runs/killed") == step_losses("runs/whole")
    assert (
        Path("runs/killed/last/model.safetensors").read_bytes()
        == Path("runs/whole/last/model.safetensors").read_bytes()
    )
    Path("runs/killed/summary.json").unlink()
    for name in ("last", "previous", "best"):
        shutil.rmtree(f"runs/killed/{name}", ignore_errors=True)
    Path("runs/killed/start.safetensors").write_bytes(b"half")
    with pytest.raises(SystemExit, match="start.safetensors is damaged"):
        main(["train", "--resume", "runs/killed"])


def test_a_run_begun_before_a_setting_existed(here):
    "It had the default, and goes on with it."
    shutil.copytree("runs/small", "runs/old")
    for file in (Path("runs/old/config.yaml"), *Path("runs/old").glob("*/checkpoint.json")):
        found = yaml.safe_load(file.read_text())
        sections = found.get("config", found)
        for section, names in dict(
            model=("activation", "norm", "positions", "attention_dropout", "embedding_dropout"),
            train=("optimizer", "init_from"),
        ).items():
            for name in names:
                del sections[section][name]
        file.write_text(json.dumps(found))
    main(["train", "--resume", "runs/old", "--train.max_steps", "7"])
    assert len(step_losses("runs/old")) == 7


@pytest.mark.parametrize(
    "args, message",
    [
        (["--model.seq_len", "64"], "context of 32"),
        (["--data.vocab_size", "280"], "data.vocab_size is 280"),
        (["--model.embed_dim=32"], "model.embed_dim is 32"),
        (["--data.tokenizer", "openai-community/gpt2"], "data.tokenizer"),
        (["--model.activation", "gelu"], "model.activation is gelu"),
        (["--train.init_from", "nowhere"], "no folder 'nowhere'"),
        (["--train.init_from", "bare"], "no tokenizer.json"),
    ],
)
def test_what_does_not_fit_to_begin_from(here, exported, args, message):
    shutil.copytree(
        exported, "bare", ignore=shutil.ignore_patterns("tokenizer*"), dirs_exist_ok=True
    )
    with pytest.raises(SystemExit) as stop:
        main(
            [
                "train",
                "--config",
                "tiny",
                "--folder",
                "runs/never",
                *SMALL,
                "--train.init_from",
                str(exported),
                *args,
            ]
        )
    assert (
        message in str(stop.value)
        and "\n" not in str(stop.value)
        and not Path("runs/never").exists()
    )


@pytest.mark.slow
def test_transformers_serves_it(exported, workspace):
    "The same client as for our own server."
    openai = pytest.importorskip("openai")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [
        str(Path(sys.executable).with_name("transformers")),
        "serve",
        str(exported),
        "--port",
        str(port),
        "--device",
        "cpu",
    ]
    with subprocess.Popen(
        command,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as server:
        try:
            for _ in range(300):
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health")
                except OSError:
                    time.sleep(0.2)
                else:
                    break
            client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
            ask = functools.partial(
                client.completions.create, model=str(exported), prompt="The school", max_tokens=8
            )
            found = ask(temperature=0)
            drawn = {ask(temperature=2, seed=seed).choices[0].text for seed in range(4)}
        finally:
            os.killpg(server.pid, signal.SIGKILL)
    run = load_run(workspace / "runs/small")
    assert (
        "The school" + found.choices[0].text
        == complete(
            run.model, run.tokenizer, "The school", SampleConfig(max_new_tokens=8, temperature=0)
        )[0]
    )
    # temperatures count: without do_sample among its settings, each text would be the likeliest
    assert len(drawn) > 1
