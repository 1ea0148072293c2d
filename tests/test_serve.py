"""The server as its clients meet it: OpenAI's own, several at once, some that hang up, one that
sends nonsense, and a browser."""

import asyncio
import contextlib
import copy
import dataclasses
import json
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import httpx
import openai
import pytest
import schemathesis
import torch
import uvicorn
from axe_playwright_python.sync_playwright import Axe
from conftest import CONTEXT, ROOT, SWITCHES, Served, browser_or_skip, refusal
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from openai import OpenAI
from playwright.sync_api import sync_playwright
from schemathesis import GenerationMode
from schemathesis.checks import CHECKS

from tinytransformer.cli import main
from tinytransformer.engine import Batch, complete, start_batch, stream
from tinytransformer.generate import SampleConfig
from tinytransformer.runs import load_run, read_run_tokenizer
from tinytransformer.serve import ServeConfig, make_app

# a machine that has other work takes its time to answer
post, get = partial(httpx.post, timeout=120), partial(httpx.get, timeout=120)


@pytest.fixture(scope="module")
def run(served_run):
    return load_run(served_run)


@pytest.fixture
def serve(commands, tmp_path):
    "Starts the command on a free port, from the parent that has imported everything."

    def start(*args, **env):
        process = commands.start(tmp_path, "serve", *args, "--port", "0", env=env)
        return Served(process, process.out)

    return start


@pytest.fixture
def client(served):
    return OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)


@contextlib.contextmanager
def in_thread(run, cfg):
    """The server in a thread of this process, so that a test can reach into it: its address, and
    its decoder.
    """
    app, place = make_app(run, cfg), socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=2))
    thread = threading.Thread(target=server.run, kwargs=dict(sockets=[place]))
    thread.start()
    try:
        yield f"http://127.0.0.1:{place.getsockname()[1]}", app.state.decoder
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()


def slow_steps(monkeypatch, seconds: float = 0.02):
    step = Batch.step
    monkeypatch.setattr(Batch, "step", lambda self: (time.sleep(seconds), step(self))[1])


def until(true, seconds: float = 60):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it never came to be so"
        time.sleep(0.01)


def number(url: str, name: str) -> float:
    return float(re.search(rf"(?m)^tinytransformer_{name} (\S+)", get(f"{url}/metrics").text)[1])


# --- what OpenAI's client is told


def test_models(client):
    assert [m.id for m in client.models.list()] == ["small"] and client.models.retrieve(
        "small"
    ).object == "model"
    with pytest.raises(openai.NotFoundError) as error:
        client.models.retrieve("large")
    assert error.value.code == "model_not_found"


SETTINGS = [
    dict(temperature=0),
    dict(),
    dict(temperature=0.5, top_p=0.8),
    dict(presence_penalty=1.5, frequency_penalty=0.5),
    dict(logit_bias={40: 3.0, 50: -100.0}),
]
# what OpenAI does not have
MORE = [
    dict(top_k=5),
    dict(top_k=10**9),
    dict(min_p=0.2),
    dict(typical_p=0.7),
    dict(repetition_penalty=1.3),
]


@pytest.mark.parametrize("sample", [*SETTINGS, *MORE], ids=str)
def test_same_text_as_the_engine(client, run, sample):
    wanted = complete(
        run.model, run.tokenizer, " = The", SampleConfig(max_new_tokens=30, seed=7, **sample), n=2
    )
    said = (
        dict(extra_body=sample)
        if sample in MORE
        else sample
        | (
            {"logit_bias": {str(i): b for i, b in sample["logit_bias"].items()}}
            if "logit_bias" in sample
            else {}
        )
    )
    asked = dict(model="small", prompt=" = The", max_tokens=30, seed=7, n=2) | said
    got = client.completions.create(**asked)
    assert [" = The" + choice.text for choice in got.choices] == wanted and [
        choice.finish_reason for choice in got.choices
    ] == ["length"] * 2
    pieces = list(
        client.completions.create(**asked, stream=True, stream_options=dict(include_usage=True))
    )
    for k in (0, 1):
        own = [
            chunk.choices[0] for chunk in pieces if chunk.choices and chunk.choices[0].index == k
        ]
        assert " = The" + "".join(c.text for c in own) == wanted[k] and [
            c.finish_reason for c in own
        ] == [None] * (len(own) - 1) + ["length"]
    assert (
        pieces[-1].usage == got.usage
        and pieces[-1].choices == []
        and all(chunk.usage is None for chunk in pieces[:-1])
    )
    read = len(run.tokenizer.encode(" = The").ids)
    assert (got.usage.prompt_tokens, got.usage.completion_tokens, got.usage.total_tokens) == (
        read,
        60,
        read + 60,
    )


def test_forms_of_a_prompt(client, run):
    "Texts and tokens, one and several."

    def texts(prompt, **more):
        return [
            c.text
            for c in client.completions.create(
                model="small", prompt=prompt, temperature=0, max_tokens=8, **more
            ).choices
        ]

    ids = [run.tokenizer.encode(text).ids for text in (" = The", " He was")]
    assert texts([" = The", " He was"]) == texts(ids) == texts(" = The") + texts(ids[1])
    assert (
        texts([" = The"], echo=True) == [" = The" + texts(" = The")[0]] == texts(ids[0], echo=True)
    )
    assert texts([" = The", " He was"], n=2, seed=1) == [
        t for t in texts([" = The", " He was"]) for _ in (0, 1)
    ]


def test_async_client(served, run):
    async def ask():
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none") as client:
            whole = await client.completions.create(
                model="small", prompt=" =", seed=3, max_tokens=20
            )
            return whole.choices[0].text, "".join(
                [
                    c.choices[0].text
                    async for c in await client.completions.create(
                        model="small", prompt=" =", seed=3, max_tokens=20, stream=True
                    )
                ]
            )

    whole, streamed = asyncio.run(ask())
    assert (
        whole
        == streamed
        == "".join(stream(run.model, run.tokenizer, " =", SampleConfig(max_new_tokens=20, seed=3)))
    )


def test_defaults_are_openais(client):
    "16 tokens, one text, another seed each time; null is the default."
    got = client.completions.create(model="small", prompt=" =")
    assert (
        got.usage.completion_tokens == 16
        and len(got.choices) == 1
        and got.choices[0].logprobs is None
    )
    assert (
        client.completions.create(
            model="small",
            prompt=" =",
            extra_body=dict(
                max_tokens=None, temperature=None, stop=None, logit_bias=None, stream=None
            ),
        ).usage.completion_tokens
        == 16
    )
    assert (
        len(
            {
                client.completions.create(model="small", prompt=" =").choices[0].text
                for _ in range(3)
            }
        )
        == 3
    )
    assert (
        client.completions.create(model="small", prompt=" =", seed=-5).choices[0].text
        == client.completions.create(model="small", prompt=" =", seed=-5, user="me").choices[0].text
    )


@pytest.mark.parametrize("streamed", [False, True])
def test_stop(client, run, streamed):
    """What was written ends before the stop string, and nothing of it gets out; one that is never
    met changes nothing.
    """
    ask = dict(model="small", prompt=" =", seed=5, max_tokens=100)
    whole = client.completions.create(**ask).choices[0].text
    stops = [whole[20:24], whole[60:63]]

    def texts(**more):
        got = client.completions.create(**ask, **more, stream=streamed)
        choices = [chunk.choices[0] for chunk in got] if streamed else got.choices
        return "".join(c.text for c in choices), choices[-1].finish_reason

    assert texts(stop=stops) == (whole[: min(whole.find(s) for s in stops)], "stop")
    assert texts(stop=stops[1]) == (whole[: whole.find(stops[1])], "stop")
    assert texts(stop="\u2603\u2603") == texts(stop=[]) == (whole, "length")


@pytest.mark.parametrize("streamed", [False, True])
def test_bytes_that_are_no_text(client, run, streamed):
    "Each leaves at once as U+FFFD; none waits for what cannot come."
    token = run.tokenizer.encode("\u0400").ids[1]  # byte 0x80, which can only continue
    got = client.completions.create(
        model="small",
        prompt=" =",
        max_tokens=100,
        temperature=0,
        logit_bias={str(token): 100},
        stream=streamed,
    )
    texts = [c.choices[0].text for c in got] if streamed else list(got.choices[0].text)
    assert texts == ["\ufffd"] * 100


@pytest.mark.parametrize("streamed", [False, True])
def test_half_a_character_in_the_prompt(client, run, streamed):
    "With echo it is one character with the byte that is written, and one place for four tokens."
    smile = run.tokenizer.encode("\U0001f60a").ids
    assert len(smile) == 4
    ask = dict(
        model="small",
        prompt=[run.tokenizer.encode("a").ids[0], *smile[:3]],
        max_tokens=1,
        temperature=0,
        logit_bias={str(smile[3]): 100},
        logprobs=0,
        stream=streamed,
    )

    def texts(**more):
        got = client.completions.create(**ask | more)
        choices = [c.choices[0] for c in got] if streamed else got.choices
        offsets = [at for c in choices for at in c.logprobs.text_offset]
        return "".join(c.text for c in choices), offsets

    assert texts(echo=True) == ("a\U0001f60a", [0, 1, 1, 1, 1])
    assert texts(echo=True, max_tokens=0) == ("a\ufffd", [0, 1, 1, 1])
    assert texts() == ("\ufffd", [1])
    other = {str(run.tokenizer.encode("b").ids[0]): 100}
    assert texts(echo=True, logit_bias=other) == ("a\ufffdb", [0, 1, 1, 1, 2])


@pytest.fixture
def special_run(served_run, tmp_path):
    "The run with a tokenizer whose last token is special."
    folder = shutil.copytree(served_run, tmp_path / "special")
    run = load_run(folder)
    saved = json.loads((folder / "tokenizer.json").read_text())
    last = max(saved["model"]["vocab"], key=saved["model"]["vocab"].get)
    number = saved["model"]["vocab"].pop(last)
    saved["model"]["merges"].pop()
    like = dict.fromkeys(["single_word", "lstrip", "rstrip", "normalized"], False)
    saved["added_tokens"] = [dict(id=number, content="<|endoftext|>", special=True) | like]
    (folder / "tokenizer.json").write_text(json.dumps(saved))
    tokenizer = read_run_tokenizer(folder, run.model.cfg.vocab_size)  # other tokens than it had
    return dataclasses.replace(run, tokenizer=tokenizer), number


def test_text_that_looks_like_a_special_token(special_run):
    "In a prompt it is text; as a stop string it ends a text at the token, and at its letters."
    run, special = special_run
    text = "a <|endoftext|> b"
    ids = run.tokenizer.encode(text).ids
    assert special not in ids and run.tokenizer.decode(ids) == text
    with TestClient(make_app(run, ServeConfig())) as client:

        def ask(**fields):
            body = dict(model="special", prompt=text, temperature=0, max_tokens=5) | fields
            return client.post("/v1/completions", json=body).json()

        echoed = ask(max_tokens=0, echo=True)
        assert echoed["choices"][0]["text"] == text
        assert echoed["usage"]["prompt_tokens"] == len(ids)
        assert ask(prompt=[special], max_tokens=0, echo=True)["choices"][0]["text"] == ""
        ended = ask(logit_bias={str(special): 100}, stop="<|endoftext|>")
        assert ended["usage"]["completion_tokens"] == 1
        assert ended["choices"][0] | dict(logprobs=None) == dict(
            text="", index=0, logprobs=None, finish_reason="stop"
        )
        assert ask(logit_bias={str(special): 100})["usage"]["completion_tokens"] == 5


@pytest.mark.parametrize("prompt", [" = The", "caf\u00e9 \u2603"])
def test_logprobs(client, run, prompt):
    "Those of the model itself, for the prompt too; they do not depend on how the token was drawn."
    got = client.completions.create(
        model="small", prompt=prompt, max_tokens=20, seed=2, temperature=0.7, logprobs=3, echo=True
    ).choices[0]
    rows = (
        batch := start_batch(
            run.model,
            [run.tokenizer.encode(prompt).ids],
            SampleConfig(max_new_tokens=20, seed=2, temperature=0.7),
            run.tokenizer,
        )
    ).rows[:]
    for _ in batch.run():
        pass
    ids = rows[0].ids
    with torch.no_grad():
        logprobs = run.model(torch.tensor([ids]))[0].log_softmax(-1)
    told = got.logprobs
    assert (
        told.token_logprobs[0] is None
        and told.top_logprobs[0] is None
        and len(told.tokens) == len(told.text_offset) == len(ids)
    )
    for t, (p, top) in enumerate(zip(told.token_logprobs[1:], told.top_logprobs[1:])):
        assert (
            p == pytest.approx(logprobs[t, ids[t + 1]].item(), abs=1e-4) == top[told.tokens[t + 1]]
        )
        assert (
            sorted(top.values(), reverse=True)[:3]
            == pytest.approx(logprobs[t].topk(3).values.tolist(), abs=1e-4)
            and 3 <= len(top) <= 4
        )
    # bytes are no text, and the next token may complete them
    whole = [
        (token, at)
        for before, token, at in zip(["", *told.tokens], told.tokens, told.text_offset)
        if not before.startswith("\\x") and not token.startswith("\\x")
    ]
    assert len(whole) > 4 and all(got.text[at : at + len(token)] == token for token, at in whole)
    short = (
        client.completions.create(
            model="small", prompt=prompt, max_tokens=20, seed=2, temperature=0.7, logprobs=0
        )
        .choices[0]
        .logprobs
    )
    start = len(ids) - 20
    assert (short.tokens, short.text_offset) == (
        told.tokens[start:],
        told.text_offset[start:],
    ) and short.token_logprobs == pytest.approx(told.token_logprobs[start:], abs=1e-5)
    chunks = [
        c.choices[0].logprobs
        for c in client.completions.create(
            model="small",
            prompt=prompt,
            max_tokens=20,
            seed=2,
            temperature=0.7,
            logprobs=3,
            echo=True,
            stream=True,
        )
    ]
    assert [t for c in chunks for t in c.tokens] == told.tokens and [
        o for c in chunks for o in c.text_offset
    ] == told.text_offset


def test_only_read(client, run):
    "No token and the prompt with its log-probabilities: how a text is scored."
    got = client.completions.create(
        model="small", prompt=[" = The", " He"], max_tokens=0, echo=True, logprobs=0
    )
    assert (
        [c.text for c in got.choices] == [" = The", " He"]
        and got.usage.completion_tokens == 0
        and {c.finish_reason for c in got.choices} == {"length"}
    )
    assert (
        client.completions.create(model="small", prompt="x", max_tokens=0, echo=True)
        .choices[0]
        .logprobs
        is None
    )
    assert (
        client.completions.create(model="small", prompt="x", max_tokens=0, echo=True, best_of=3)
        .choices[0]
        .text
        == "x"
    )


def test_best_of(client):
    "Of four, those whose tokens are likeliest on average; all four are counted."
    ask = dict(model="small", prompt=" =", seed=9, max_tokens=12, logprobs=0)
    each = [
        (sum(c.logprobs.token_logprobs) / 12, c.text)
        for c in client.completions.create(**ask, n=4).choices
    ]
    best = client.completions.create(**ask, n=2, best_of=4)
    assert [c.text for c in best.choices] == [
        text for _, text in sorted(each, reverse=True)[:2]
    ] and [c.index for c in best.choices] == [0, 1]
    assert best.usage.completion_tokens == 48
    assert [
        c.text
        for c in client.completions.create(**ask | dict(logprobs=None), n=1, best_of=4).choices
    ] == [max(each)[1]]


def test_a_bias_bans_a_token(client, run):
    greedy = client.completions.create(
        model="small", prompt=" =", temperature=0, max_tokens=1, logprobs=0
    ).choices[0]
    banned = client.completions.create(
        model="small",
        prompt=" =",
        temperature=0,
        max_tokens=1,
        logprobs=0,
        logit_bias={
            str(
                run.tokenizer.token_to_id(greedy.text) or run.tokenizer.encode(greedy.text).ids[0]
            ): -100
        },
    ).choices[0]
    assert greedy.logprobs.tokens != banned.logprobs.tokens


def test_readme(served):
    "The script in the README, as it stands there but for the port."
    script = re.search(
        r"```python\n(from openai import OpenAI.*?)```", (ROOT / "README.md").read_text(), re.S
    )[1]
    assert "http://127.0.0.1:8000/v1" in script
    done = subprocess.run(
        [sys.executable, "-c", script.replace("http://127.0.0.1:8000", served.url)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and len(done.stdout) > 10, done.stderr


# --- what is refused


BAD = {  # what is wrong: fields, and what is said of it
    "temperature below 0": (dict(temperature=-0.1), "temperature"),
    "temperature above 2": (dict(temperature=2.1), "temperature"),
    "a number in quotes": (dict(temperature="1"), "temperature"),
    "top_p 0": (dict(top_p=0), "top_p"),
    "top_p above 1": (dict(top_p=1.01), "top_p"),
    "no texts": (dict(n=0), "n"),
    "true is no number": (dict(n=True), "n"),
    "too many texts": (dict(n=128), "n"),
    "no token": (dict(max_tokens=0), "max_tokens"),
    "fewer than none": (dict(max_tokens=-1), "max_tokens"),
    "more than the server writes": (dict(n=20, max_tokens=400), "max_tokens"),
    "half a token": (dict(max_tokens=1.5), "max_tokens"),
    "an endless number": (dict(max_tokens=10**400), "max_tokens"),
    "beyond the context": (dict(max_tokens=CONTEXT + 1), "max_tokens"),
    "a huge prompt": (dict(prompt="x " * 20_000), "prompt"),
    "an empty prompt": (dict(prompt=""), "prompt"),
    "empty among others": (dict(prompt=["a", ""]), "prompt"),
    "no prompts": (dict(prompt=[]), "prompt"),
    "an empty list of tokens": (dict(prompt=[[]]), "prompt"),
    "texts and tokens": (dict(prompt=["a", 1]), "prompt"),
    "no prompt": (dict(prompt=None), "prompt"),
    "no such token": (dict(prompt=[300]), "prompt"),
    "less than a token": (dict(prompt=[-1]), "prompt"),
    "a number too large for 64 bits": (dict(prompt=[2**70]), "prompt"),
    "six logprobs": (dict(logprobs=6), "logprobs"),
    "a suffix": (dict(suffix="end"), "suffix"),
    "fewer best than texts": (dict(n=3, best_of=2), "best_of"),
    "best of a stream": (dict(best_of=2, stream=True), "best_of"),
    "five stop strings": (dict(stop=list("abcde")), "stop"),
    "an empty stop string": (dict(stop=""), "stop"),
    "options of no stream": (dict(stream_options=dict(include_usage=True)), "stream_options"),
    "unknown": (dict(temprature=1), "temprature"),
    "a bias too far": (dict(logit_bias={"3": 101}), "logit_bias"),
    "a bias for no token": (dict(logit_bias={"300": 1}), "logit_bias"),
    "a bias for a word": (dict(logit_bias={"the": 1}), "logit_bias"),
    "top_k below -1": (dict(top_k=-2), "top_k"),
    "min_p above 1": (dict(min_p=1.1), "min_p"),
    "no penalty": (dict(repetition_penalty=0), "repetition_penalty"),
    "typical_p 0": (dict(typical_p=0), "typical_p"),
    "a huge seed": (dict(seed=2**63), "seed"),
}


@pytest.fixture(scope="module")
def local(run):
    with TestClient(make_app(run, ServeConfig()), raise_server_exceptions=False) as client:
        yield client


@pytest.mark.parametrize("name", BAD)
def test_bad_requests(local, name):
    "400 in OpenAI's form, with the field and one line."
    fields, param = BAD[name]
    answer = local.post("/v1/completions", json=dict(model="small", prompt="a") | fields)
    error = answer.json()["error"]
    assert (
        answer.status_code == 400
        and error["param"] == param
        and error["type"] == "invalid_request_error"
        and error["message"]
        and "\n" not in error["message"]
        and len(error["message"]) < 600
    ), error
    if name in ("beyond the context", "a huge prompt"):
        assert error["code"] == "context_length_exceeded"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"nonsense",
        b'{"model": "small", "prompt": "\\ud800"}',
        b'{"model": "small", "prompt": "a", "temperature": NaN}',
        b'{"model": "small", "prompt": "a", "stop": "\\udfff"}',
        b'{"\\ud800": 1, "model": "small", "prompt": "a"}',
        b'{"model": "small", "prompt": "a", "top_p": Infinity}',
        b'{"model": "small", "prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b"\xff\xfe{}",
        b'{"model": "small", "prompt": "a", "max_tokens": ' + b"9" * 5000 + b"}",
    ],
    ids=lambda body: repr(body[:60]),
)
def test_bad_bodies(local, body):
    answer = local.post(
        "/v1/completions", content=body, headers={"Content-Type": "application/json"}
    )
    assert (
        answer.status_code == 400
        and answer.json()["error"]["type"] == "invalid_request_error"
        and "Traceback" not in answer.text
    ), answer.text[:500]


def test_other_refusals(local):
    def error(answer, status):
        assert answer.status_code == status and set(answer.json()["error"]) == {
            "message",
            "type",
            "param",
            "code",
        }
        return answer

    assert (
        error(local.post("/v1/completions", json=dict(model="gpt-3", prompt="a")), 404).json()[
            "error"
        ]["code"]
        == "model_not_found"
    )
    error(local.get("/v1/nothing"), 404)
    error(local.get("/../../etc/passwd.js"), 404)
    assert error(local.get("/v1/completions"), 405).headers["allow"] == "POST"
    large = b'{"model": "small", "prompt": "' + b"x" * 300_000 + b'"}'
    error(local.post("/v1/completions", content=large), 413)
    # its length is not told beforehand
    error(
        local.post(
            "/v1/completions",
            content=iter([large[:200_000], large[200_000:]]),
            headers={"Content-Type": "application/json"},
        ),
        413,
    )
    error(local.post("/attention", json=dict(prompt="x")), 400)
    error(local.post("/attention", json=dict(prompt="x " * CONTEXT)), 400)
    assert all(
        "content-security-policy" in local.get(path).headers
        for path in ("/", "/health", "/v1/nothing")
    )


def test_key(run):
    with TestClient(make_app(run, ServeConfig(key="s3cret"))) as client:
        for shown in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": "Bearer"},
            {"Authorization": "Bearer s3cret2"},
            {"Authorization": b"Bearer \xff"},
        ):
            answer = client.get("/v1/models", headers=shown)
            assert (
                answer.status_code == 401
                and answer.json()["error"]["code"] == "invalid_api_key"
                and answer.headers["www-authenticate"] == "Bearer"
            )
        assert [
            client.get(path).status_code
            for path in (
                "/",
                "/health",
                "/serve.js",
                "/attention_map.js",
                "/metrics",
                "/openapi.json",
            )
        ] == [200] * 4 + [401] * 2
        assert (
            client.post("/attention", json=dict(prompt="abc")).status_code
            == client.post("/v1/completions", content=b"x" * 10**6).status_code
            == 401
        )
        assert (
            client.get("/v1/models", headers={"Authorization": "Bearer s3cret"}).status_code == 200
        )


def refused(*args) -> str:
    return refusal("serve", *map(str, args))


def test_refused_at_the_start(served_run, tmp_path):
    "One line each."
    assert "not a run folder" in refused(tmp_path)
    shutil.copytree(served_run, tmp_path / "bare")
    for weights in (tmp_path / "bare").rglob("model.safetensors"):
        weights.unlink()
    assert "model.safetensors" in refused(tmp_path / "bare")
    shutil.rmtree(tmp_path / "bare/best"), shutil.rmtree(tmp_path / "bare/last")
    assert "no checkpoint" in refused(tmp_path / "bare")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert "cannot listen at 127.0.0.1, port" in refused(
            served_run, "--port", taken.getsockname()[1]
        )
    assert "port" in refused(served_run, "--port", "70000") and "rows" in refused(
        served_run, "--rows", "0"
    )
    assert "port is 'many': give int" in refused(served_run, "--port", "many")
    # it would be seen in the list of processes
    assert "unrecognized arguments: --key" in refused(served_run, "--key", "s3cret")
    (tmp_path / "serve.yaml").write_text("serve: {prot: 80}")
    assert "serve.prot is not a setting" in refused(served_run, "--config", tmp_path / "serve.yaml")


def test_pickled_weights_are_not_read(served_run, tmp_path):
    shutil.copytree(served_run, tmp_path / "run")
    torch.save({}, tmp_path / "run/best/model.safetensors")  # a pickle by another name
    assert "model.safetensors" in refused(tmp_path / "run")


def test_help(capsys):
    with pytest.raises(SystemExit):
        main(["serve", "--help"])
    said = capsys.readouterr().out
    assert (
        "--port" in said
        and "texts that are written together" in " ".join(said.split())
        and "--key" not in said
    )


def test_interrupted(serve, served_run):
    "Ctrl-C is the usual way to stop it, and no error."
    served = serve(served_run)
    served.process.send_signal(signal.SIGINT)
    assert served.process.wait(60) == 0 and served.process.communicate()[1] == ""


def test_without_the_extra(served_run, capsys):
    "Other commands work, and serve says what to install."
    code = (
        "import sys; sys.modules['fastapi'] = None; from tinytransformer.cli import main;"
        " main(sys.argv[1:])"
    )

    def say(*args):
        return subprocess.run(
            [sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True
        )

    assert say("generate", served_run, " =").returncode == 0
    said = say("serve", served_run)
    assert (
        said.returncode == 1
        and "pip install 'tinytransformer[serve]'" in said.stderr
        and said.stderr.count("\n") == 1
    )


# --- many at once, and what goes wrong


def test_eight_clients(client, run):
    "Each gets what it gets alone, streamed or not."
    asked = [
        dict(prompt=prompt, seed=seed, temperature=0.3 + seed / 5, max_tokens=10 + 10 * seed)
        for seed, prompt in enumerate(
            [" =", " = The", " He was", "\n", " in", " = = Life", " She", "a"]
        )
    ]
    alone = [
        complete(
            run.model,
            run.tokenizer,
            a["prompt"],
            SampleConfig(a["max_tokens"], a["temperature"], seed=a["seed"]),
        )[0]
        for a in asked
    ]

    def ask(k):
        a = asked[k % 8]
        if k % 3 == 0:
            return a["prompt"] + client.completions.create(model="small", **a).choices[0].text
        return a["prompt"] + "".join(
            c.choices[0].text for c in client.completions.create(model="small", **a, stream=True)
        )

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, range(40))) == alone * 5


def test_they_are_written_together(run, monkeypatch):
    "Eight texts take as many steps as the longest of them, and a ninth waits for a row."
    sizes, step = [], Batch.step
    monkeypatch.setattr(
        Batch, "step", lambda self: (sizes.append(len(self.rows)), time.sleep(0.005), step(self))[2]
    )
    with in_thread(run, ServeConfig(rows=8)) as (url, _), ThreadPoolExecutor(9) as pool:
        answers = list(
            pool.map(
                lambda k: post(
                    f"{url}/v1/completions", json=dict(model="small", prompt="a", max_tokens=100)
                ).json(),
                range(9),
            )
        )
    assert (
        all(a["usage"]["completion_tokens"] == 100 for a in answers)
        and max(sizes) == 8
        and sum(sizes) == 900
        and len(sizes) < 300
    )


def test_full(run, monkeypatch):
    """Beyond the queue the answer is 429, with when to try again; those inside are not harmed, and
    afterwards there is room.
    """
    slow_steps(monkeypatch)
    with (
        in_thread(run, ServeConfig(rows=1, queue=1)) as (url, decoder),
        ThreadPoolExecutor(2) as pool,
    ):

        def ask():
            body = dict(model="small", prompt="a", max_tokens=30)
            return post(f"{url}/v1/completions", json=body)

        inside = [pool.submit(ask) for _ in range(2)]
        until(lambda: decoder.free == 0)
        refused = ask()
        assert (
            refused.status_code == 429
            and refused.headers["retry-after"] == "1"
            and refused.json()["error"]["code"] == "rate_limit_exceeded"
        )
        assert post(f"{url}/attention", json=dict(prompt="abc")).status_code == 429
        assert [f.result().status_code for f in inside] == [200, 200] and ask().status_code == 200
        assert (
            number(
                url,
                'requests_total{path="/v1/completions",status="429"}'.replace("{", r"\{").replace(
                    "}", r"\}"
                ),
            )
            == 1
        )


@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize("where", ["in its row", "in the queue"])
def test_hanging_up(run, monkeypatch, streamed, where):
    "The place is free at once, long before the text would have been done."
    slow_steps(monkeypatch)
    ask = dict(model="small", prompt="a", max_tokens=400)  # eight seconds
    with in_thread(run, ServeConfig(rows=1, queue=1)) as (url, decoder):
        gone, stays = httpx.Client(), httpx.Client()

        def hang_up():
            with (
                pytest.raises(httpx.HTTPError),
                gone.stream(
                    "POST", f"{url}/v1/completions", json=ask | dict(stream=streamed), timeout=0.3
                ) as answer,
            ):
                for _ in answer.iter_text():
                    time.sleep(0.31)
                    raise httpx.ReadTimeout("")

        if where == "in the queue":
            other = threading.Thread(
                target=stays.post,
                args=(f"{url}/v1/completions",),
                kwargs=dict(json=ask | dict(max_tokens=80)),
            )
            other.start()
            until(lambda: decoder.worker.running)
        hang_up()
        until(lambda: decoder.free == (2 if where == "in its row" else 1), 3)
        assert (
            len(decoder.worker.running) == (0 if where == "in its row" else 1)
            and not decoder.worker.waiting
        )
        if where == "in the queue":
            other.join()
        assert post(f"{url}/v1/completions", json=ask | dict(max_tokens=2)).status_code == 200


def test_some_stay_and_some_go(run, monkeypatch):
    "Hang-ups at all moments: those who stay get what is theirs, and every place comes back."
    slow_steps(monkeypatch, 0.002)
    wanted = [
        complete(run.model, run.tokenizer, "a", SampleConfig(max_new_tokens=60, seed=k))[0]
        for k in range(8)
    ]

    def ask(url, k):
        body = dict(
            model="small", prompt="a", max_tokens=60, seed=k % 8, stream=k % 2 == 0, echo=True
        )
        if k % 3:  # goes, while it waits or while it is being written
            with contextlib.suppress(httpx.TimeoutException), httpx.Client() as client:
                client.post(
                    f"{url}/v1/completions", json=body | dict(n=2), timeout=0.01 * (k % 17 + 1)
                )
            return True
        text = post(f"{url}/v1/completions", json=body).text
        parts = [
            json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")
        ] or [json.loads(text)]
        return "".join(part["choices"][0]["text"] for part in parts) == wanted[k % 8]

    with (
        in_thread(run, ServeConfig(rows=4, queue=40)) as (url, decoder),
        ThreadPoolExecutor(12) as pool,
    ):
        assert all(pool.map(lambda k: ask(url, k), range(90)))
        until(lambda: decoder.free == 44)
        assert (
            not decoder.worker.running
            and not decoder.worker.waiting
            and not decoder.worker.batch.rows
        )


@pytest.mark.parametrize("streamed", [True, False])
def test_a_step_that_fails(run, monkeypatch, streamed, caplog):
    "Those in the batch get an error without its innards; the log has them; the next is served."
    step, calls = Batch.step, []

    def fail(self):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("the secret cause")
        return step(self)

    monkeypatch.setattr(Batch, "step", fail)
    with in_thread(run, ServeConfig()) as (url, decoder):
        answer = post(
            f"{url}/v1/completions", json=dict(model="small", prompt="a", stream=streamed)
        )
        assert (
            answer.status_code == (200 if streamed else 500)
            and "secret" not in answer.text
            and "server_error" in answer.text
        )
        if streamed:
            with pytest.raises(openai.APIError, match="log says why"):
                calls.clear()
                for _ in OpenAI(
                    base_url=f"{url}/v1", api_key="x", max_retries=0
                ).completions.create(model="small", prompt="a", stream=True):
                    pass
        assert "secret" in caplog.text and decoder.free == 80
        assert (
            post(f"{url}/v1/completions", json=dict(model="small", prompt="a")).status_code == 200
        )


def test_one_bad_row(run, monkeypatch, caplog):
    "Its request gets an error that says why; the 15 beside it go on."
    read, together = Batch.read, []

    def read_with_a_fault(self):
        logits = read(self)
        together.append(len(self.rows))
        for i, row in enumerate(self.rows):
            if row.ids[0] == 7 and len(row.written) == 5:
                logits[i, 3] = float("nan")
        return logits

    slow_steps(monkeypatch)
    monkeypatch.setattr(Batch, "read", read_with_a_fault)
    with in_thread(run, ServeConfig()) as (url, decoder), ThreadPoolExecutor(16) as pool:

        def ask(i):
            body = dict(model="small", prompt=[i, 40], max_tokens=60, temperature=0)
            return post(f"{url}/v1/completions", json=body)

        for _ in range(2):
            answers = list(pool.map(ask, range(16)))
            assert [a.status_code for a in answers] == [500 if i == 7 else 200 for i in range(16)]
            assert "not finite" in answers[7].json()["error"]["message"]
        assert ask(7).status_code == 500  # alone
        assert ask(8).json()["choices"] == answers[8].json()["choices"]
        assert decoder.free == 80 and max(together) > 8
    assert "cannot go on" in caplog.text and "Traceback" not in caplog.text


def test_no_json_without_numbers(run):
    "Whatever a model full of NaN answers is an error, and its JSON is valid."
    broken = copy.deepcopy(run.model)
    for p in broken.parameters():
        p.data.fill_(float("nan"))

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    app = make_app(dataclasses.replace(run, model=broken), ServeConfig())
    with TestClient(app, raise_server_exceptions=False) as client:
        for body in (
            dict(logprobs=2),
            dict(logprobs=2, echo=True),
            dict(logprobs=2, echo=True, max_tokens=0),
            dict(stream=True, logprobs=0, echo=True),
            dict(n=3, best_of=4),
        ):
            got = client.post("/v1/completions", json=dict(model="small", prompt=" = The") | body)
            assert got.status_code == 500 or body.get("stream"), body
            for line in got.text.replace("data: ", "").split("\n\n"):
                assert "error" in json.loads(line, parse_constant=refuse)
        got = client.post("/attention", json=dict(prompt=" = The"))
        assert got.status_code == 500
        assert "error" in json.loads(got.text, parse_constant=refuse)


@pytest.mark.parametrize("streamed", [False, True])
def test_what_is_practically_impossible(run, monkeypatch, streamed):
    "Logits may be finite and a log-probability not, because it is the difference of two of them."
    read = Batch.read

    def read_far_apart(self):
        logits = torch.full_like(read(self), -3e38)
        logits[:, 5] = 3e38
        return logits

    monkeypatch.setattr(Batch, "read", read_far_apart)
    with TestClient(make_app(run, ServeConfig())) as client:
        asked = dict(model="small", prompt="a", max_tokens=1, logprobs=3, stream=streamed)
        answer = client.post("/v1/completions", json=asked)
    assert answer.status_code == 200, answer.text
    (choice,) = json.loads(answer.text.removeprefix("data: ").split("\n\n")[0])["choices"]
    assert set(choice["logprobs"]["top_logprobs"][0].values()) == {0, -9999}
    assert choice["logprobs"]["token_logprobs"][0] in (0, -9999)


def test_hanging_up_before_the_first_byte(run, monkeypatch):
    "Also if the connection is reset while the request is still being read."
    slow_steps(monkeypatch, 0.01)
    with in_thread(run, ServeConfig(rows=2, queue=40)) as (url, decoder):
        place = ("127.0.0.1", int(url.rsplit(":", 1)[1]))
        came, reserve = [], decoder.reserve
        decoder.reserve = lambda places: (came.append(places), reserve(places))
        for k in range(20):
            content = json.dumps(
                dict(model="small", prompt="a", max_tokens=1000, stream=k % 2 == 0)
            ).encode()
            head = (
                "POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\n"
                f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
            )
            with socket.create_connection(place) as gone:
                gone.sendall(head.encode() + content)
                until(lambda: len(came) > k // 4 or k % 4)
                if k % 3:  # closing it now resets the connection
                    gone.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        until(lambda: came and decoder.free == 42)
        assert not (decoder.listeners or decoder.worker.running or decoder.worker.waiting)


def test_a_fault_between_steps(run, monkeypatch, caplog):
    "One hangs up, and letting it go fails: the other gets an error, and the place of both is free."
    slow_steps(monkeypatch)
    ask = dict(model="small", prompt="a", max_tokens=400)
    with (
        in_thread(run, ServeConfig(rows=2, queue=0)) as (url, decoder),
        ThreadPoolExecutor(1) as pool,
    ):
        other = pool.submit(lambda: post(f"{url}/v1/completions", json=ask))
        until(lambda: decoder.worker.running)
        monkeypatch.setattr(decoder.worker.batch, "remove", lambda row: 1 / 0)
        with httpx.stream("POST", f"{url}/v1/completions", json=ask | dict(stream=True)):
            until(lambda: len(decoder.worker.running) == 2)
        assert other.result().status_code == 500
        until(lambda: decoder.free == 2)
        assert post(f"{url}/v1/completions", json=ask | dict(max_tokens=2)).status_code == 200


def test_a_fault_outside_the_loop(run, monkeypatch, caplog):
    monkeypatch.setattr("tinytransformer.serve.app.check_request", lambda *args: 1 / 0)
    with TestClient(make_app(run, ServeConfig())) as client:
        answer = client.post("/v1/completions", json=dict(model="small", prompt="a"))
        assert (
            answer.status_code == 500
            and answer.json()["error"]["type"] == "server_error"
            and "division" not in answer.text
            and "division" in caplog.text
        )


@pytest.mark.parametrize("seconds", ["60", "0"])
def test_sigterm(serve, served_run, seconds):
    """What is being written is finished, what waits is refused, and the process ends well; with no
    time left, what is being written ends with an error.
    """
    served = serve(served_run, "--rows", "1", "--shutdown_seconds", seconds)
    ask = dict(model="small", prompt="a", max_tokens=1500, seed=1)
    with (
        ThreadPoolExecutor(1) as pool,
        httpx.stream(
            "POST", f"{served.url}/v1/completions", json=ask | dict(stream=True), timeout=120
        ) as answer,
    ):
        lines = answer.iter_lines()
        next(lines)
        waiting = pool.submit(lambda: post(f"{served.url}/v1/completions", json=ask))
        until(lambda: number(served.url, "waiting") == 1)
        served.process.send_signal(signal.SIGTERM)
        rest = [line for line in lines if line]
        assert (
            waiting.result().status_code == 503
            and waiting.result().json()["error"]["code"] == "shutting_down"
        )
    if seconds == "60":
        assert rest[-1] == "data: [DONE]" and '"finish_reason": "length"' in rest[-2]
    else:
        assert "shutting_down" in rest[-1] and len(rest) < 1500
    assert served.process.wait(60) == 0 and served.process.communicate()[1] == ""
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{served.url}/health")


def test_settings_from_a_file(serve, served_run, tmp_path):
    "The section `serve`, options over it, and the key from the environment."
    (tmp_path / "serve.yaml").write_text("serve: {rows: 3, max_tokens: 7}")
    served = serve(
        served_run,
        "--config",
        tmp_path / "serve.yaml",
        "--max_tokens",
        "9",
        TINYTRANSFORMER_KEY="k",
    )
    client = OpenAI(base_url=f"{served.url}/v1", api_key="k", max_retries=0)
    assert (
        client.completions.create(model="small", prompt="a", max_tokens=9).usage.completion_tokens
        == 9
    )
    with pytest.raises(openai.BadRequestError, match="9 that this server"):
        client.completions.create(model="small", prompt="a", max_tokens=10)
    with pytest.raises(openai.AuthenticationError):
        OpenAI(base_url=f"{served.url}/v1", api_key="no", max_retries=0).models.list()
    assert served.end() == (0, "")


def test_numbers(run):
    with TestClient(make_app(run, ServeConfig())) as client:
        client.post(
            "/v1/completions", json=dict(model="small", prompt=[1, 2, 3], max_tokens=5, n=2)
        )
        text = client.get("/metrics").text
    for line in (
        "tokens_read_total 6.0",
        "tokens_written_total 10.0",
        "rows 0.0",
        "waiting 0.0",
        "first_token_seconds_count 2.0",
        "next_token_seconds_count 8.0",
        'requests_total{path="/v1/completions",status="200"} 1.0',
    ):
        assert f"tinytransformer_{line}\n" in text


def test_attention(local, run):
    from tinytransformer.attention_map import attention_map
    from tinytransformer.explorer import look, token_texts

    ids = run.tokenizer.encode(" = The cat").ids
    tokens = token_texts(run.tokenizer, ids)
    assert (
        local.post("/attention", json=dict(prompt=" = The cat")).json()
        == attention_map(look(run.model, ids, tokens).weights, tokens).data
    )


# --- nonsense, by the dozen


OPERATIONS = [
    "GET /v1/models",
    "GET /v1/models/{name}",
    "POST /v1/completions",
    "POST /attention",
    "GET /metrics",
    "GET /health",
]


@pytest.fixture(scope="module")
def described(served):
    return {
        op.label: op
        for op in (
            found.ok()
            for found in schemathesis.openapi.from_url(
                f"{served.url}/openapi.json"
            ).get_all_operations()
        )
    }


@pytest.mark.parametrize("examples", [10, pytest.param(60, marks=pytest.mark.slow)])
@pytest.mark.parametrize("mode", GenerationMode)
@pytest.mark.parametrize("name", OPERATIONS)
def test_as_described(described, name, mode, examples):
    """Whatever is sent, as described or not: an answer that the OpenAPI document knows, no fault of
    the server, and nothing that hangs.
    """
    assert set(described) == set(OPERATIONS)
    tried = []

    @given(described[name].as_strategy(generation_mode=mode))
    @settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    def ask(case):
        # that a text fits into the context no document can say
        tried.append(
            case.call_and_validate(
                timeout=60, excluded_checks=CHECKS.get_by_names(["positive_data_acceptance"])
            ).status_code
        )

    try:
        ask()
    except Unsatisfiable:
        # where nothing is asked for, nothing can be wrong
        assert mode == GenerationMode.NEGATIVE and name.startswith("GET")
    if name == "POST /v1/completions":
        assert len(tried) >= 0.8 * examples and (
            mode == GenerationMode.POSITIVE or set(tried) == {400}
        )


# --- the page, in a real browser


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        with browser_or_skip():
            browser = playwright.chromium.launch(
                executable_path=shutil.which("chromium"), args=SWITCHES
            )
        yield browser
        browser.close()


@pytest.fixture
def visit(browser):
    """Opens the page of a server; afterwards nothing may have been asked of another, and nothing
    may have gone wrong.
    """
    contexts, asked, wrong, homes, expected = [], [], [], [], []

    def open_page(url, refusals=(), **options):
        contexts.append(browser.new_context(**options))
        page = contexts[-1].new_page()
        homes.append(url)
        expected.extend(refusals)
        page.on(
            "request",
            lambda r: (
                asked.append(r.url) if not r.url.startswith((*homes, "data:", "blob:")) else None
            ),
        )
        page.on("pageerror", lambda e: wrong.append(str(e)))
        page.on(
            "console",
            lambda m: (
                wrong.append(m.text)
                if m.type == "error"
                and not any(f"status of {status}" in m.text for status in expected)
                else None
            ),
        )
        page.goto(url)
        page.locator("html[data-ready]").wait_for()
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not asked and not wrong, (asked, wrong)


def write(page, prompt=None, **knobs):
    "Fill in what is given, press the button, wait for the end: what was written."
    if prompt is not None:
        page.get_by_label("Prompt").fill(prompt)
    for name, value in knobs.items():
        page.locator(f"[name={name}]").fill(str(value))
    page.get_by_role("button", name="Write").click()
    page.locator("#said", has_text="ended by").wait_for()
    return page.locator("#tokens").evaluate("node => node.textContent")


def test_page_writes(visit, served, client):
    "What the knobs say is what is asked for."
    page = visit(served.url)
    page.locator("#model", has_text="small").wait_for()
    said = dict(temperature=0.8, top_p=0.9, min_p=0.05, top_k=40, max_tokens=30, seed=11)
    wanted = (
        client.completions.create(
            model="small",
            prompt=" = The",
            **{k: v for k, v in said.items() if k not in ("min_p", "top_k")},
            extra_body=dict(min_p=0.05, top_k=40),
        )
        .choices[0]
        .text
    )
    assert (
        write(page, **said) == wanted
        and page.locator("[name=temperature]").evaluate(
            "node => node.previousElementSibling.textContent"
        )
        == "0.8"
    )
    assert write(page, **said | dict(seed=12)) != wanted


def test_page_streams(visit, run, monkeypatch):
    "Tokens can be seen while others are still to come; Stop gives the place back."
    slow_steps(monkeypatch, 0.05)
    with in_thread(run, ServeConfig(rows=1, queue=0)) as (url, decoder):
        page = visit(url)
        page.locator("[name=max_tokens]").fill("400")
        page.get_by_role("button", name="Write").click()
        page.locator("[role=option]").nth(3).wait_for()
        assert decoder.worker.running and page.locator("#said").inner_text() == "writing \u2026"
        page.get_by_role("button", name="Stop").click()
        page.get_by_text("stopped").wait_for()
        until(lambda: decoder.free == 1 and not decoder.worker.running, 2)
        page.close()


def test_page_probabilities(visit, served, client):
    "Of each token, pointed at or gone to with the keys: those of the API."
    page = visit(served.url)
    write(page, seed=4, max_tokens=12, temperature=1)
    told = (
        client.completions.create(model="small", prompt=" = The", seed=4, max_tokens=12, logprobs=5)
        .choices[0]
        .logprobs
    )
    options = page.locator("[role=option]")
    counts = [node.evaluate("node => node.logprobs.tokens.length") for node in options.all()]
    assert sum(counts) == 12

    def shares():
        return page.locator("#token td:nth-child(2)").all_inner_texts()

    def wanted(place):
        values = [
            sorted(told.top_logprobs[t].values(), reverse=True)
            for t in range(sum(counts[:place]), sum(counts[: place + 1]))
        ]
        return [2.718281828**p * 100 for group in values for p in group]

    options.nth(2).hover()
    assert [float(s.split()[0]) for s in shares()] == pytest.approx(wanted(2), rel=0.06, abs=0.06)
    page.locator("#tokens").focus()
    for key, place in [
        ("Home", 0),
        ("ArrowRight", 1),
        ("ArrowRight", 2),
        ("ArrowLeft", 1),
        ("End", len(counts) - 1),
        ("ArrowRight", len(counts) - 1),
    ]:
        page.keyboard.press(key)
        assert (
            options.nth(place).get_attribute("aria-selected") == "true"
            and page.locator("[aria-selected=true]").count() == 1
        )
        assert [float(s.split()[0]) for s in shares()] == pytest.approx(
            wanted(place), rel=0.06, abs=0.06
        )


def test_page_draws_the_map(visit, served, run):
    page = visit(served.url)
    text = " = The" + write(page, seed=4, max_tokens=12, temperature=0.3)
    page.get_by_role("button", name="Attention map").click()
    page.locator("#map [data-ready]").wait_for()
    tokens = page.evaluate("document.querySelector('#map [data-ready]').attentionMap.tokens")
    assert (
        len(tokens) == len(run.tokenizer.encode(text).ids)
        and page.locator("#map canvas.heat").is_visible()
    )
    write(page)
    assert page.locator("#map > *").count() == 0  # it belonged to another text


def test_page_by_keyboard(visit, served):
    "From the prompt to the text and its tokens without a mouse, and one sees where one is."
    page = visit(served.url)
    page.get_by_label("Prompt").focus()
    page.keyboard.press("End")
    page.keyboard.type(" cat")
    visited = []
    for _ in range(7):
        page.keyboard.press("Tab")
        visited.append(
            page.evaluate("document.activeElement.name || document.activeElement.textContent")
        )
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    assert visited == ["temperature", "top_p", "min_p", "top_k", "max_tokens", "seed", "Write"]
    page.keyboard.press("Enter")
    page.locator("#said", has_text="ended by").wait_for()
    for _ in range(2):
        page.keyboard.press("Tab")
    page.keyboard.press("Tab") if page.evaluate("document.activeElement.id") != "tokens" else None
    assert (
        page.evaluate("document.activeElement.id") == "tokens"
        and page.locator("#token table").count() >= 1
    )


def test_page_never_runs_what_it_shows(visit, served):
    page = visit(served.url)
    nasty = "<script>window.ran = 1</script><img src=x onerror='window.ran = 1'></textarea>"
    write(page, nasty, max_tokens=5)
    page.get_by_role("button", name="Attention map").click()
    page.locator("#map [data-ready]").wait_for()
    assert (
        page.locator("#prompted").inner_text() == nasty
        and page.evaluate("window.ran") is None
        and page.locator("#text img, #text script").count() == 0
    )
    policy = get(served.url).headers["content-security-policy"]
    assert (
        "script-src 'self';" in policy
        and "default-src 'none'" in policy
        and "unsafe-eval" not in policy
    )


def test_page_says_what_is_wrong(visit, served):
    page = visit(served.url, refusals=[400])
    page.locator("[name=max_tokens]").fill("100000")
    page.get_by_role("button", name="Write").click()
    page.locator("#said.wrong", has_text="more than the 4096").wait_for()
    assert page.get_by_role("button", name="Write").is_enabled()


def test_page_asks_for_the_key(visit, run):
    with in_thread(run, ServeConfig(key="k3y")) as (url, _):
        page = visit(url, refusals=[401])
        page.get_by_label("Key of this server").fill("k3y")
        page.keyboard.press("Tab")
        page.locator("#model", has_text="small").wait_for()
        assert write(page, max_tokens=5)
        page.close()


@pytest.mark.parametrize(
    "media",
    [
        dict(color_scheme="light"),
        dict(color_scheme="dark"),
        dict(viewport=dict(width=360, height=740)),
    ],
    ids=str,
)
def test_page_is_accessible(visit, served, media):
    page = visit(served.url, **media)
    write(page, max_tokens=40)
    page.locator("[role=option]").nth(3).hover()
    page.get_by_role("button", name="Attention map").click()
    page.locator("#map [data-ready]").wait_for()
    found = [
        f"{v['id']}: {v['nodes'][0]['html'][:200]}"
        for v in Axe().run(page).response["violations"]
        if v["impact"] in ("serious", "critical")
    ]
    assert not found, found
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    paper = [
        int(c)
        for c in re.findall(
            r"\d+", page.evaluate("getComputedStyle(document.body).backgroundColor")
        )
    ]
    assert max(paper) < 40 if media.get("color_scheme") == "dark" else min(paper) > 240
