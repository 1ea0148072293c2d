"""Does the recipe `tiny` always work? Each training is a run of the command, in a process of its
own.

python -m benchmarks.tiny          twenty trainings: ten seeds, one thread and two, three sets of
processor instructions
python -m benchmarks.tiny --quick  five of them
python -m benchmarks.tiny --variants   the recipe without one of its three peculiarities each, for
the same seeds
python -m benchmarks.tiny ship     train once on one thread, and put the run into the package

Every training is written to benchmarks/results/tiny.json as soon as it ends, and one that stands
there already is not
repeated, so that a table that was stopped goes on where it was. Exit status 1 means that a training
missed the bar.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path

import torch

from benchmarks import run
from tinytransformer.config import config_file, read_config
from tinytransformer.files import digest, read_json, write_whole
from tinytransformer.runs import TRAINED_FOLDER, near_floor, processor

COMMAND = str(Path(sys.executable).with_name("tinytransformer"))
RESULTS = Path(__file__).parent / "results" / "tiny.json"
CAPABILITIES = (None, "avx2", "default")  # of ATen's kernels; None is the best that the machine has

TRAININGS = [
    dict(seed=seed, threads=threads, capability=CAPABILITIES[(seed + threads) % 3])
    for threads in (1, 2)
    for seed in range(10)
]
QUICK = [
    training
    for training in TRAININGS
    if (training["seed"], training["threads"]) in ((0, 1), (1, 1), (2, 2), (3, 2), (5, 1))
]
VARIANT_TRAININGS = [dict(seed=seed, threads=1, capability=None) for seed in (0, 5)]
VARIANTS = {
    "AdamW instead of Muon": ["--train.optimizer", "adamw"],
    "first weights of 0.02": ["--model.init_std", "0.02"],
    "positions begin at random": ["--model.position_start", "normal"],
}


def train(
    folder: Path, seed: int, threads: int, capability: str | None, options: list[str]
) -> dict:
    """Run the command in `folder`; what its summary says, and the seconds that it took with
    everything.
    """
    variables = {name: value for name, value in os.environ.items() if name != "ATEN_CPU_CAPABILITY"}
    variables |= dict(OMP_NUM_THREADS=str(threads), TQDM_DISABLE="1")
    if capability:
        variables["ATEN_CPU_CAPABILITY"] = capability
    command = [COMMAND, "train", "--config", "tiny", "--train.seed", str(seed), *options]
    start = time.perf_counter()
    done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"a training failed:\n{done.stderr}")
    found = json.loads((folder / "runs/tiny/summary.json").read_text())
    return dict(seconds=round(time.perf_counter() - start, 1), **found)


def measure(training: dict, variant: str, options: list[str]) -> dict:
    "One row of the table."
    with tempfile.TemporaryDirectory() as folder:
        found = train(Path(folder), **training, options=options)
    kept = ("seconds", "steps", "val_loss", "sliding_loss", "floor", "fact_recall")
    row = dict(variant=variant, **training, **{name: found[name] for name in kept})
    return row | dict(
        near_floor=near_floor(found),
        date=str(date.today()),
        machine=processor()["processor"],
        torch=torch.__version__,
    )


def report(row: dict) -> str:
    "One line about a training."
    return (
        f"{row['variant'] or 'the recipe':28}  seed {row['seed']}  {row['threads']} threads "
        f" {row['capability'] or 'native':7}  blocks {row['val_loss']:.3f}  sliding"
        f" {row['sliding_loss']:.3f}  floor {row['floor']:.3f}  facts {row['fact_recall']:.1%} "
        f" {row['seconds']:.0f} s{'' if row['near_floor'] else '  missed the bar'}"
    )


def digest_of_recipe() -> str:
    """A digest of all settings but the seed, so that rows of another recipe are not taken for rows
    of this one.
    """
    sections = read_config(config_file("tiny"))
    del sections["train"]["seed"]
    return digest(json.dumps(sections, sort_keys=True))


def measure_all(trainings: list[dict], variants: dict[str, list[str]]) -> list[dict]:
    """Those trainings that are not in the results yet, as many at once as the cores allow; all
    their rows.
    """
    recipe = digest_of_recipe()
    kept = read_json(RESULTS)
    rows = kept["rows"] if kept.get("recipe") == recipe else []

    def known(training: dict, variant: str) -> dict | None:
        return next(
            (row for row in rows if row["variant"] == variant and row.items() >= training.items()),
            None,
        )

    def work(job: tuple[dict, str]) -> None:
        row = measure(*job, variants[job[1]])
        rows.append(row)
        write_whole(RESULTS, json.dumps(dict(recipe=recipe, rows=rows), indent=1) + "\n")
        print(report(row), flush=True)

    wanted = [(training, variant) for variant in variants for training in trainings]
    missing = [job for job in wanted if known(*job) is None]
    for threads in sorted({training["threads"] for training, _ in missing}):
        with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // threads)) as pool:
            list(pool.map(work, [job for job in missing if job[0]["threads"] == threads]))
    return [known(*job) for job in wanted]


def ship() -> None:
    "Train with the recipe's own seed on one thread, and put the run into the package."
    with tempfile.TemporaryDirectory() as folder:
        seed = read_config(config_file("tiny"))["train"]["seed"]
        train(Path(folder), seed, threads=1, capability=None, options=[])
        trained, target = Path(folder) / "runs/tiny", TRAINED_FOLDER / "tiny"
        shutil.rmtree(target, ignore_errors=True)
        keep = (
            "config.yaml",
            "environment.json",
            "metrics.jsonl",
            "samples.jsonl",
            "summary.json",
            "tokenizer.json",
        )
        for name in (*keep, "best/checkpoint.json", "best/model.safetensors"):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(trained / name, target / name)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", nargs="?", choices=["measure", "ship"], default="measure")
    parser.add_argument("--quick", action="store_true", help="five trainings instead of twenty")
    parser.add_argument(
        "--variants",
        action="store_true",
        help="also train without one of the recipe's three peculiarities each",
    )
    given = parser.parse_args()
    if given.action == "ship":
        ship()
        return
    rows = measure_all(QUICK if given.quick else TRAININGS, {"": []})
    if given.variants:
        measure_all(VARIANT_TRAININGS, VARIANTS)
    missed = [row for row in rows if not row["near_floor"]]
    print(f"{len(rows) - len(missed)} of {len(rows)} trainings are near the floor")
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    run(main)
