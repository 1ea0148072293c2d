"""This library beside its peers: python -m benchmarks [--quick] [--nanogpt FOLDER] [--mingpt
FOLDER] [--litgpt PYTHON] [--only WORD]

Each contestant is a process of its own. In every round each takes one step, one after the other, so
that whatever else the machine does meets all of them.
A ratio is that of a round, and what is told is the median over the rounds. The table and the
picture go to benchmarks/results/.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory

import matplotlib.pyplot as plt

from benchmarks import run

HERE = Path(__file__).parent
SMALL, MID = dict(V=50257, C=256, L=4, H=8, T=128, B=32), dict(V=50257, C=512, L=8, H=8, T=256, B=8)
TRAIN = dict(task="train", precision="fp32", compile=False, dropout=0.0, flags="own")
GENERATE = dict(TRAIN, task="generate", greedy=True, prompt=16)


def kinds() -> list[str]:
    """Precisions in which a comparison is fair: where bf16 is only imitated, we stay in float32 and
    the others do not.
    """
    import torch

    from tinytransformer.devices import has_bf16

    return ["fp32", "bf16"] if has_bf16(torch.device("cpu")) else ["fp32"]


def cases(quick: bool) -> list[dict]:
    "What is measured: name, task, rounds, and who takes part."
    if quick:
        tiny = dict(V=500, C=32, L=2, H=4, T=32, B=4)
        return [
            dict(name="quick training", rounds=2, peers=["transformers"], **TRAIN | tiny),
            dict(
                name="quick generation",
                rounds=2,
                peers=["transformers"],
                **GENERATE | tiny | dict(T=64, B=2, new=8),
            ),
        ]
    every, some = (
        ["nanoGPT", "transformers", "minGPT", "x-transformers", "litgpt"],
        ["nanoGPT", "transformers"],
    )
    found = []
    for size, shape in (("small", SMALL), ("mid", MID)):
        found += [
            dict(
                name=f"training {size}, fp32",
                rounds=5,
                peers=every if size == "small" else some,
                **TRAIN | shape,
            ),
            dict(
                name=f"training {size}, bf16",
                rounds=5,
                peers=some,
                **TRAIN | shape | dict(precision="bf16"),
            ),
            dict(
                name=f"training {size}, bf16, peers compiled",
                rounds=5,
                peers=some,
                compile_peers=True,
                **TRAIN | shape | dict(precision="bf16"),
            ),
        ]
        found += [
            dict(
                name=f"training {size}, {kind}, our flags for all",
                rounds=5,
                peers=some,
                **TRAIN | shape | dict(flags="ours", precision=kind),
            )
            for kind in ("fp32", "bf16")
        ]
    found += [
        dict(
            name="training small, dropout 0.2, fp32",
            rounds=5,
            peers=some,
            **TRAIN | SMALL | dict(dropout=0.2),
        ),
        dict(
            name="training small, dropout 0.2, fp32, our flags for all",
            rounds=5,
            peers=some,
            **TRAIN | SMALL | dict(dropout=0.2, flags="ours"),
        ),
        dict(
            name="training small, dropout 0.2, bf16",
            rounds=5,
            peers=some,
            **TRAIN | SMALL | dict(dropout=0.2, precision="bf16"),
        ),
    ]
    room = SMALL | dict(T=1040)
    for precision in ("fp32", "bf16"):
        found += [
            dict(
                name=f"1 prompt, {n} tokens, greedy, {precision}",
                rounds=5,
                peers=["transformers"] + ["x-transformers"] * (n == 128) + ["nanoGPT"] * (n == 128),
                **GENERATE | room | dict(B=1, new=n, precision=precision),
            )
            for n in (128, 512, 1024)
        ]
        found += [
            dict(
                name=f"16 prompts, {n} tokens, sampled, {precision}",
                rounds=3,
                peers=["transformers"],
                **GENERATE | room | dict(B=16, new=n, greedy=False, precision=precision),
            )
            for n in (128, 512)
        ]
        found += [
            dict(
                name=f"1 prompt, 128 tokens, sampled, {precision}",
                rounds=5,
                peers=["transformers"],
                **GENERATE | room | dict(B=1, new=128, greedy=False, precision=precision),
            ),
            dict(
                name=f"16 prompts, 128 tokens, greedy, {precision}",
                rounds=3,
                peers=["transformers"],
                **GENERATE | room | dict(B=16, new=128, precision=precision),
            ),
            dict(
                name=f"1 prompt, 128 tokens, greedy, {precision}, our flags for all",
                rounds=5,
                peers=["transformers"],
                **GENERATE | room | dict(B=1, new=128, precision=precision, flags="ours"),
            ),
            dict(
                name=f"16 prompts, 128 tokens, sampled, {precision}, our flags for all",
                rounds=3,
                peers=["transformers"],
                **GENERATE
                | room
                | dict(B=16, new=128, greedy=False, precision=precision, flags="ours"),
            ),
        ]
    for name, values in dict(T=(512, 2048), L=(2, 16), V=(1000, 8000), B=(1, 64)).items():
        found += [
            dict(
                name=f"growth: {name} = {value}",
                rounds=2,
                peers=["nanoGPT"],
                **TRAIN
                | SMALL
                | {name: value}
                | (dict(B=max(1, 4096 // value)) if name == "T" else {}),
            )
            for value in values
        ]
    return [case for case in found if case["precision"] in kinds()]


class Contestant:
    "A process that does one step at a time."

    def __init__(self, library: str, case: dict, args: argparse.Namespace):
        task = {
            key: value
            for key, value in case.items()
            if key not in ("name", "rounds", "peers", "compile_peers")
        } | dict(library=library, threads=args.threads)
        if library == "tinytransformer":
            task["flags"] = "ours"
        elif case.get("compile_peers"):
            task["compile"] = True
        if library in ("nanoGPT", "minGPT"):
            task["checkout"] = str(Path(getattr(args, library.lower())).resolve())
        python = args.litgpt if library == "litgpt" else sys.executable
        self.process = subprocess.Popen(
            [python, "-m", "benchmarks.contestants", json.dumps(task)],
            cwd=HERE.parent,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE if args.quiet else None,
            text=True,
        )
        self.read()

    def read(self) -> str:
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(
                self.process.communicate()[1] or f"a contestant ended with {self.process.wait()}"
            )
        return line

    def step(self) -> dict:
        print("step", file=self.process.stdin, flush=True)
        return json.loads(self.read())

    def end(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def race(case: dict, args: argparse.Namespace) -> list[dict]:
    "One row for each library: seconds, how many times as long as ours, peak memory."
    names = ["tinytransformer", *(p for p in case["peers"] if getattr(args, p.lower(), True))]
    contestants = {name: Contestant(name, case, args) for name in names}
    # the first step is not counted: memory is found, code is compiled
    for contestant in contestants.values():
        contestant.step()
    rounds = [
        {name: contestant.step() for name, contestant in contestants.items()}
        for _ in range(case["rounds"])
    ]
    for contestant in contestants.values():
        contestant.end()
    return [
        dict(
            case=case["name"],
            library=name,
            seconds=statistics.median(r[name]["seconds"] for r in rounds),
            times_ours=statistics.median(
                r[name]["seconds"] / r["tinytransformer"]["seconds"] for r in rounds
            ),
            peak_mb=max(r[name]["peak_mb"] for r in rounds),
        )
        for name in names
    ]


def start_up(rounds: int = 5) -> list[dict]:
    "Seconds until a command has answered."

    def seconds(*command):
        began = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        return time.perf_counter() - began

    commands = {
        "tinytransformer --help": ("tinytransformer", "--help"),
        "tinytransformer train --help": ("tinytransformer", "train", "--help"),
        "import torch": (sys.executable, "-c", "import torch"),
        "import transformers' GPT-2": (
            sys.executable,
            "-c",
            "from transformers import GPT2LMHeadModel",
        ),
    }
    return [
        dict(
            case="start",
            library=name,
            seconds=statistics.median(seconds(*command) for _ in range(rounds)),
        )
        for name, command in commands.items()
    ]


def tokenizing(hub: bool, rounds: int = 5) -> list[dict]:
    "Megabytes of text a second: row by row, and as `prepare` does it."
    from tinytransformer.config import config_file, make_config, read_config
    from tinytransformer.corpus import prepare, raw_rows
    from tinytransformer.data import DataConfig, encode_rows

    def seconds(way):
        began = time.perf_counter()
        way()
        return time.perf_counter() - began

    found = []
    for name in ("tiny", "wikitext2") if hub else ("tiny",):
        config = make_config(
            DataConfig,
            "data",
            read_config(config_file(name))["data"] | dict(data_dir=str(HERE.parent / "data")),
        )
        corpus, rows = prepare(config), raw_rows(config)["train"]["text"]
        size = sum(len(row.encode()) for row in rows) / 1e6
        ways = {
            "row by row": lambda: [corpus.tokenizer.encode(row).ids for row in rows],
            "as prepare does it": lambda: encode_rows(rows, corpus.tokenizer, "train"),
        }
        found += [
            dict(
                case=f"tokenizing for {name}",
                library=way,
                seconds=(s := statistics.median(seconds(run) for _ in range(rounds))),
                mb_per_second=size / s,
            )
            for way, run in ways.items()
        ]
    return found


def products(threads: int, quick: bool) -> list[dict]:
    """The best rate of products on this machine, in operations a second: what training could reach
    if it did nothing else.
    """
    import torch

    torch.set_num_threads(threads)

    def rate(n, name):
        kind = dict(fp32=torch.float32, bf16=torch.bfloat16)[name]
        a, b = torch.randn(n, n).to(kind), torch.randn(n, n).to(kind)

        def once():
            began = time.perf_counter()
            a @ b
            return 2 * n**3 / (time.perf_counter() - began)

        once()
        return statistics.median(once() for _ in range(9))

    return [
        dict(
            case="products",
            library=name,
            seconds=1e9
            / (best := max(rate(n, name) for n in ((256,) if quick else (1024, 2048, 4096)))),
            flops_per_second=best,
        )
        for name in kinds()
    ]


def scale(threads: int, quick: bool) -> list[dict]:
    """What it costs to make a batch fit, and what several processes on one machine gain: the mid
    model on TinyWiki, trained by the command.
    """
    model = (
        dict(embed_dim=32, num_heads=4, num_layers=2, seq_len=32)
        if quick
        else dict(embed_dim=512, num_heads=8, num_layers=8, seq_len=256)
    )
    train = dict(max_steps=3 if quick else 7, batch_size=8 if quick else 32, eval_every=100)
    ways = {
        "at once": (1, {}),
        "in 8 parts": (1, dict(micro_batches=8)),
        "computed again on the way back": (1, dict(recompute=True)),
        "both": (1, dict(micro_batches=8, recompute=True)),
        "2 processes": (2, {}),
        "4 processes": (4, {}),
    }
    if quick:
        ways = {name: ways[name] for name in ("at once", "both")}
    rows, script = [], Path(sys.executable).with_name
    with TemporaryDirectory() as folder:
        for name, (processes, more) in ways.items():
            start = (
                [script("torchrun"), "--nproc-per-node", str(processes), "--no-python"]
                if processes > 1
                else []
            )
            options = [
                f"--{section}.{key}={value}"
                for section, values in dict(
                    model=model, train=train | more, data=dict(articles=1000)
                ).items()
                for key, value in values.items()
            ]
            subprocess.run(
                [
                    *start,
                    script("tinytransformer"),
                    "train",
                    "--config",
                    "tiny",
                    *options,
                    "--folder",
                    run := f"{folder}/{name}",
                ],
                cwd=folder,
                check=True,
                capture_output=True,
                env=os.environ | dict(OMP_NUM_THREADS=str(max(1, threads // processes))),
            )
            steps = [
                json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()
            ][1:]
            rows.append(
                dict(
                    case="scale",
                    library=name,
                    seconds=train["batch_size"]
                    * model["seq_len"]
                    / statistics.median(s["tokens_per_second"] for s in steps),
                    mb_each=max(s["memory_mb"] for s in steps),
                )
            )
    return rows


def table(rows: list[dict]) -> str:
    lines = [
        "| what | library | seconds | times ours | peak MB | |",
        "|---|---|---:|---:|---:|---|",
    ]
    for row in rows:
        more = (
            f"{row['mb_per_second']:.1f} MB/s"
            if "mb_per_second" in row
            else (
                f"{row['mb_each']:,.0f} MB in each process"
                if "mb_each" in row
                else (
                    f"{row['flops_per_second'] / 1e9:,.0f} GFLOP/s"
                    if "flops_per_second" in row
                    else ""
                )
            )
        )
        lines.append(
            f"| {row['case']} | {row['library']} | {row['seconds']:.3g} |"
            f" {format(row['times_ours'], '.2f') if 'times_ours' in row else ''} |"
            f" {format(row['peak_mb'], ',.0f') if 'peak_mb' in row else ''} | {more} |"
        )
    return "\n".join(lines)


def picture(rows: list[dict], path: Path) -> None:
    "Times ours, for each case and peer."
    bars = [row for row in rows if row.get("times_ours") and row["library"] != "tinytransformer"]
    figure, axes = plt.subplots(figsize=(9, 0.2 * len(bars) + 1), layout="constrained")
    peers = sorted({row["library"] for row in bars})
    for i, row in enumerate(bars):
        axes.barh(i, row["times_ours"], color=f"C{peers.index(row['library'])}")
    axes.set_yticks(
        range(len(bars)), [f"{row['case']}: {row['library']}" for row in bars], fontsize=7
    )
    axes.axvline(1, color="black", lw=0.8)
    axes.invert_yaxis()
    axes.set(
        xlabel="time, in units of tinytransformer's",
        title="how many times as long the same work takes",
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__.split("\n")[0]
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a small case of each kind, to see that everything runs; nothing is kept",
    )
    parser.add_argument(
        "--nanogpt", help="folder of a checkout; without it, nanoGPT does not take part"
    )
    parser.add_argument("--mingpt", help="the same for minGPT")
    parser.add_argument(
        "--litgpt", help="a Python that has litgpt, which wants other versions than we do"
    )
    parser.add_argument(
        "--hub",
        action="store_true",
        help="tokenize WikiText-2 too, which comes from the Hugging Face Hub",
    )
    parser.add_argument(
        "--only",
        default="",
        help="only cases whose name contains this; the others stay as they were",
    )
    parser.add_argument(
        "--threads",
        type=int,
        default=(
            len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        ),
    )
    parser.add_argument(
        "--quiet",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="hide what the libraries print",
    )
    args = parser.parse_args()

    def of(name):
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    cpu = (
        next(
            (
                line.split(":")[1].strip()
                for line in open("/proc/cpuinfo")
                if line.startswith("model name")
            ),
            platform.processor(),
        )
        if Path("/proc/cpuinfo").exists()
        else platform.processor()
    )
    about = dict(
        machine=f"{args.threads} threads of {os.cpu_count()} cores, {cpu}",
        python=platform.python_version(),
        versions={name: of(name) for name in ("torch", "transformers", "x-transformers")},
    )
    path, old, rows = HERE / "results" / "speed.json", [], []
    if args.only and not args.quick:
        before = json.loads(path.read_text())
        if {key: before[key] for key in about} != about:
            sys.exit(
                f"{path} is from another machine or other versions: measure everything, without"
                " --only"
            )
        old = before["rows"]
    for case in cases(args.quick):
        if args.only not in case["name"]:
            continue
        rows += race(case, args)
        print(
            table(rows[-len([r for r in rows if r["case"] == case["name"]]) :]).split("\n", 2)[2],
            flush=True,
        )
    if args.only in "start":
        rows += start_up(1 if args.quick else 5)
    if args.only in "tokenizing":
        rows += tokenizing(args.hub, 1 if args.quick else 5)
    if args.only in "products":
        rows += products(args.threads, args.quick)
    if args.only in "scale":
        rows += scale(args.threads, args.quick)
    print(table([row for row in rows if "times_ours" not in row]), flush=True)
    if args.quick:
        return
    for row in rows:
        row["date"] = str(date.today())
    rows = [row for row in old if row["case"] not in {r["case"] for r in rows}] + rows
    path.write_text(json.dumps(about | dict(rows=rows), indent=1) + "\n")
    (HERE / "results" / "speed.md").write_text(
        f"Measured on {about['machine']}, "
        + ", ".join(f"{k} {v}" for k, v in about["versions"].items())
        + ", last on "
        + max(row["date"] for row in rows)
        + ".\n\n"
        + table(rows)
        + "\n"
    )
    picture(rows, HERE / "results" / "speed.png")


if __name__ == "__main__":
    run(main)
