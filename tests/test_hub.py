"""The real download path, against the Hub or a mirror of it: `pytest --hub`."""

import json
import math
import os
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

pytestmark = pytest.mark.hub
COMMAND = str(Path(sys.executable).with_name("tinytransformer"))
NOWHERE = "http://127.0.0.1:9"  # nobody listens there
HUB = os.environ.get("HF_ENDPOINT", constants.ENDPOINT)


def run(folder: Path, args: str, endpoint: str = HUB) -> subprocess.CompletedProcess:
    """Run the command in `folder`, with a cache of its own, so that nothing is answered from an
    older download.
    """
    env = dict(
        os.environ,
        HF_ENDPOINT=endpoint,
        HF_HOME=str(folder / "cache"),
        HF_HUB_DISABLE_XET="1",
        NO_PROXY="127.0.0.1",
    )
    return subprocess.run(
        [COMMAND, *args.split()], cwd=folder, env=env, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    "A folder where WikiText-2 was prepared once."
    folder = tmp_path_factory.mktemp("hub")
    done = run(folder, "prepare --config wikitext2")
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_wikitext2(prepared):
    "The published numbers of words; every row's tokens, one after another."
    from datasets import load_from_disk
    from tokenizers import Tokenizer

    folder, out = prepared
    assert "217,646" in out and "245,569" in out  # words of validation and test, as published
    rows = load_from_disk(folder / "data/raw/wikitext-2-raw-v1")["validation"]["text"]
    processed = folder / "data/processed/wikitext-2-raw-v1_gpt2"
    tokenizer = Tokenizer.from_file(str(processed / "tokenizer.json"))
    tokens = torch.load(processed / "validation.pt", mmap=True, weights_only=True)["tokens"]
    assert tokens.dtype == torch.uint16 and tokenizer.get_vocab_size() == 50257
    assert tokens.tolist() == [i for row in rows for i in tokenizer.encode(row).ids]
    assert tokenizer.decode(tokens.tolist()) == "".join(rows)


def test_no_hub_afterwards(prepared):
    "Once prepared, nothing is asked of any network, and nothing is downloaded or tokenized again."
    folder, _ = prepared
    before = {
        f: f.stat().st_mtime_ns
        for f in (folder / "data").rglob("*")
        if f.is_file() and f.name != ".lock"
    }
    env = dict(os.environ, HF_ENDPOINT=NOWHERE, HF_HOME=str(folder / "empty"), NO_PROXY="127.0.0.1")
    process = subprocess.Popen(
        [
            COMMAND,
            *"train --config wikitext2 --folder runs/apart --train.batch_size 4 --model.seq_len 32"
            " --model.embed_dim 16 --model.num_layers 1 --model.num_heads 2".split(),
        ],
        cwd=folder,
        env=env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    while (
        not (rows := folder / "runs/apart/metrics.jsonl").exists() or not rows.read_text()
    ):  # until its first step: a look at all of the validation split would take a minute
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.1)
    process.kill()
    process.communicate()
    assert {
        f: f.stat().st_mtime_ns
        for f in (folder / "data").rglob("*")
        if f.is_file() and f.name != ".lock"
    } == before


@pytest.mark.parametrize("recipe", ["wikitext2-cpu", "wikitext2-gpu"])
def test_recipes(prepared, recipe):
    """The recipes on the word-level text: the published numbers of words, a vocabulary learned from
    it, and steps that Muon takes, from the first to the last without the Hub.
    """
    folder, _ = prepared
    done = run(folder, f"prepare --config {recipe}")
    assert done.returncode == 0, done.stderr
    done = run(
        folder,
        f"train --config {recipe} --folder runs/{recipe} --train.max_steps 2 --train.warmup_steps 1"
        " --train.batch_size 4 --train.eval_every 100 --train.compile false --model.seq_len 64"
        " --model.embed_dim 16 --model.num_layers 1 --model.num_heads 2 --sample.max_new_tokens 5",
        NOWHERE,
    )
    assert done.returncode == 0, done.stderr
    splits = json.loads((folder / "data/processed/wikitext-2-v1_bpe8192/about.json").read_text())[
        "splits"
    ]
    assert {split: about["words"] for split, about in splits.items()} == dict(
        train=2_088_628, validation=217_646, test=245_569
    )
    assert "entropy floor" not in done.stdout  # of real text it is not known
    rows = [json.loads(line) for line in (folder / "runs" / recipe / "metrics.jsonl").open()]
    assert (
        len(rows) == 2
        and abs(rows[0]["loss"] / math.log(8192) - 1) < 0.02
        and rows[1]["loss"] < rows[0]["loss"] + 0.1
    )


class Faulty(BaseHTTPRequestHandler):
    "Passes requests on to the Hub, but cuts every large file off half-way, or hangs up at once."

    def do_GET(self):
        if self.server.fault == "gone":
            return self.connection.close()
        request = urllib.request.Request(
            HUB + self.path,
            method=self.command,
            headers={k: v for k, v in self.headers.items() if k.lower() != "host"},
        )
        try:
            answer = urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request)
        except urllib.error.HTTPError as error:
            answer = error
        body = answer.read()
        self.send_response(answer.status)
        for k, v in answer.headers.items():
            if k.lower() not in ("transfer-encoding", "connection", "content-length"):
                self.send_header(k, v)
        self.send_header("Content-Length", answer.headers.get("Content-Length", str(len(body))))
        self.end_headers()
        if self.command == "HEAD":
            return
        cut = self.server.fault == "cut" and len(body) > 100_000
        self.wfile.write(body[: len(body) // 2] if cut else body)
        self.close_connection = True

    do_HEAD = do_POST = do_GET

    def log_message(self, *args):
        pass


def test_faults_then_cure(tmp_path):
    """A Hub that hangs up, then one that cuts the download: one clear line each time, nothing half-
    written, and the same command works afterwards.
    """
    server = ThreadingHTTPServer(("127.0.0.1", 0), Faulty)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    for server.fault in ("gone", "cut"):
        done = run(tmp_path, "prepare --config wikitext2", endpoint)
        assert done.returncode != 0
        assert (
            done.stderr.strip().splitlines()[-1].startswith("tinytransformer: could not get ")
            and "Traceback" not in done.stderr
        )
        assert not list((tmp_path / "data").glob("raw/*")) and not list(
            (tmp_path / "data").glob("processed/*")
        )
    server.fault = None
    done = run(tmp_path, "prepare --config wikitext2", endpoint)
    assert done.returncode == 0, done.stderr
    server.shutdown()
