"""How the excess loss on TinyWiki falls with parameters, text and steps: python -m
benchmarks.scaling

The entropy of TinyWiki's text is known, so what is left of the loss above it can be told. Three
rows of trainings, each with one thing changed. Written to benchmarks/results/scaling.json.
"""

import argparse
import json
import os
import platform
import time
from dataclasses import replace
from datetime import date
from pathlib import Path

import torch

from benchmarks import run
from tinytransformer.corpus import prepare
from tinytransformer.data import DataConfig
from tinytransformer.devices import make_accelerator
from tinytransformer.fast import fast_loss
from tinytransformer.loop import fit
from tinytransformer.model import ModelConfig, Transformer, count_parameters
from tinytransformer.train import TrainConfig, evaluate

HERE = Path(__file__).parent
WIDE, DEEP, STEPS = 64, 2, 1500
SWEEPS = dict(
    parameters=[(width, 2) for width in (16, 24, 32, 48, 64, 96)],
    data=[1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1],
    steps=[190, 375, 750, 1500, 3000],
)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scaling", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--quick",
        action="store_true",
        help="one short training of each row, and nothing is written",
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    corpus, done, began = (
        prepare(DataConfig(data_dir=str(HERE.parent / "data"))),
        {},
        time.perf_counter(),
    )

    def excess(shape, share, steps):
        if (shape, share, steps) in done:
            return done[shape, share, steps]
        train = corpus.streams["train"][: round(share * len(corpus.streams["train"]))]
        cfg = TrainConfig(
            max_steps=20 if args.quick else steps,
            batch_size=16,
            learning_rate=1e-2,
            min_learning_rate=5e-4,
            warmup_steps=50,
            beta2=0.98,
            weight_decay=0.01,
            eval_every=10**9,
        )
        torch.manual_seed(0)
        model = Transformer(
            ModelConfig(
                vocab_size=corpus.vocab_size,
                seq_len=128,
                embed_dim=shape[0],
                num_heads=max(2, shape[0] // 32),
                num_layers=shape[1],
                tie_weights=True,
            )
        )
        fit(
            model,
            replace(corpus, streams=dict(train=train, validation=corpus.streams["validation"][:2])),
            cfg,
            loss=fast_loss,
            accelerator=make_accelerator(cfg),
        )
        row = dict(
            parameters=count_parameters(model),
            tokens=len(train),
            steps=steps,
            excess=evaluate(model, corpus.streams["validation"], loss=fast_loss)
            - corpus.floor("validation"),
        )
        done[shape, share, steps] = row
        print(
            f"{row['parameters']:9,} parameters, {row['tokens']:9,} tokens of text, {steps:5}"
            f" steps: {row['excess']:.4f} nats above the floor",
            flush=True,
        )
        return row

    base = dict(parameters=(WIDE, DEEP), data=1.0, steps=STEPS)
    rows = {
        name: [
            excess(*(base | {name: value}).values())
            for value in (values[:1] if args.quick else values)
        ]
        for name, values in SWEEPS.items()
    }
    if args.quick:
        return
    about = dict(
        date=str(date.today()),
        machine=f"{os.cpu_count()} cores, {platform.machine()}",
        threads=args.threads,
        torch=torch.__version__.split("+")[0],
        seconds=time.perf_counter() - began,
        floor=corpus.floor("validation"),
        sweeps=rows,
    )
    (HERE / "results" / "scaling.json").write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    run(main)
