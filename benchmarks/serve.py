"""The server under 1, 8 and 64 clients at once: tokens per second, how long the first and each next
token takes, memory; and whether each client got what is its own.

python benchmarks/serve.py [--rounds 4]   # the run is `tiny`, trained first if there is none
"""

import argparse
import asyncio
import json
import os
import platform
import re
import subprocess
import sys
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path

import httpx
import numpy as np
import psutil

from tinytransformer.engine import complete
from tinytransformer.generate import SampleConfig
from tinytransformer.runs import load_run

HERE = Path(__file__).parent
PROMPTS, TOKENS = [" =", " = The", " = Nils", " = Edith"], 128


def expected(run, clients: int) -> list[str]:
    "What each client gets alone."
    return [
        complete(
            run.model,
            run.tokenizer,
            PROMPTS[k % len(PROMPTS)],
            SampleConfig(max_new_tokens=TOKENS, seed=k),
        )[0].removeprefix(PROMPTS[k % len(PROMPTS)])
        for k in range(clients)
    ]


async def ask(client: httpx.AsyncClient, model: str, k: int) -> tuple[str, list[float]]:
    "One text, and when its pieces came, in seconds after the request."
    began, text, times = time.perf_counter(), "", []
    async with client.stream(
        "POST",
        "/v1/completions",
        json=dict(
            model=model, prompt=PROMPTS[k % len(PROMPTS)], max_tokens=TOKENS, seed=k, stream=True
        ),
    ) as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            if not line.startswith("data: {"):
                continue
            text += json.loads(line[6:])["choices"][0]["text"]
            times.append(time.perf_counter() - began)
    return text, times


async def measure(url: str, wanted: list[str], rounds: int) -> dict:
    "All clients at once, each asking again as soon as it is answered."
    async with httpx.AsyncClient(
        base_url=url, timeout=300, limits=httpx.Limits(max_connections=None)
    ) as client:
        model = (await client.get("/v1/models")).json()["data"][0]["id"]
        await ask(client, model, 0)  # warm

        async def one(k):
            return [await ask(client, model, k) for _ in range(rounds)]

        began = time.perf_counter()
        found = await asyncio.gather(*(one(k) for k in range(len(wanted))))
        seconds = time.perf_counter() - began
    answers = [(wanted[k], text, times) for k, client in enumerate(found) for text, times in client]
    first, following = (
        [1000 * times[0] for *_, times in answers],
        np.concatenate([1000 * np.diff(times) for *_, times in answers]),
    )
    return dict(
        requests=len(answers),
        tokens_per_second=len(answers) * TOKENS / seconds,
        first_ms_p50=np.percentile(first, 50),
        first_ms_p99=np.percentile(first, 99),
        next_ms_p50=np.percentile(following, 50),
        next_ms_p99=np.percentile(following, 99),
        not_its_own=sum(own != text for own, text, _ in answers),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--rounds",
        type=int,
        default=4,
        help="texts that each client asks for, one after another; more where there are few clients",
    )
    args = parser.parse_args()
    run, rows = load_run("tiny"), []
    for clients, together in ((1, 16), (8, 16), (64, 16), (64, 64)):
        server = subprocess.Popen(
            [
                Path(sys.executable).with_name("tinytransformer"),
                "serve",
                run.folder,
                "--port",
                "0",
                "--rows",
                str(together),
            ],
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            url, memory = (
                re.search(r"http://\S+", server.stdout.readline())[0],
                psutil.Process(server.pid).memory_info,
            )
            idle = memory().rss
            found = asyncio.run(
                measure(url, expected(run, clients), max(args.rounds, 64 // clients))
            )
            rows.append(
                dict(
                    clients=clients,
                    rows=together,
                    **{
                        name: value if isinstance(value, int) else round(float(value), 2)
                        for name, value in found.items()
                    },
                    idle_megabytes=round(idle / 1e6),
                    megabytes=round(memory().rss / 1e6),
                )
            )
        finally:
            server.terminate()
        assert server.wait(60) == 0
        print(json.dumps(rows[-1]), flush=True)
    about = dict(
        date=str(date.today()),
        machine=(
            f"{os.cpu_count()} cores, {platform.machine()}; clients on the same machine, which"
            " others used too"
        ),
        threads=os.environ.get("OMP_NUM_THREADS", "all"),
        tokens=TOKENS,
        model=run.config["model"],
        versions={
            name: version(name)
            for name in ("tinytransformer", "torch", "fastapi", "uvicorn", "httpx")
        },
        rows=rows,
    )
    (HERE / "results").mkdir(exist_ok=True)
    (HERE / "results" / "serve.json").write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
