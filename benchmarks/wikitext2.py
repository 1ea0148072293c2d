"""How good a small Transformer gets on WikiText-2.

python -m benchmarks.wikitext2 changes [--only WORD] [--minutes 3]   one change a row, each for as
long as the others
python -m benchmarks.wikitext2 search [--only WORD] [--minutes 6]    rates, dropouts and decays for
the recipe `wikitext2`, each for as long as the others
python -m benchmarks.wikitext2 recipe NAME [--seeds 0 1 2]           what `tinytransformer train
--config NAME` comes to, on the test split too

Perplexities are per word, rows' ends counted as words. Validation alone chooses; the test split is
looked at once for each trained recipe. All write to benchmarks/results/wikitext2.json, where a row
replaces the one of its name.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import asdict, replace
from datetime import date
from pathlib import Path

import numpy as np
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from benchmarks import run
from tinytransformer.config import config_file, make_config, read_config
from tinytransformer.corpus import Corpus, prepare
from tinytransformer.data import DataConfig
from tinytransformer.devices import make_accelerator
from tinytransformer.engine import complete
from tinytransformer.fast import fast_loss
from tinytransformer.files import read_json, read_rows
from tinytransformer.generate import SampleConfig
from tinytransformer.loop import Stopped, fit
from tinytransformer.model import ModelConfig, Transformer, count_parameters
from tinytransformer.runs import load_run, train_run
from tinytransformer.train import TrainConfig, evaluate, perplexities

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "wikitext2.json"
DATA = dict(
    dataset="Salesforce/wikitext",
    subset="wikitext-2-v1",
    vocab_size=8192,
    data_dir=str(HERE.parent / "data"),
)
MODEL = dict(
    seq_len=256,
    embed_dim=256,
    num_heads=4,
    num_layers=4,
    tie_weights=True,
    positions="rotary",
    dropout=0.1,
    attention_dropout=0.0,
)
TRAIN = dict(
    optimizer="muon",
    batch_size=16,
    learning_rate=8e-3,
    min_learning_rate=4e-4,
    warmup_steps=30,
    weight_decay=0.1,
    precision="bf16",
)

CHANGES = {  # name -> what is changed
    "as it is": {},
    "another seed": dict(seed=1),
    "a third seed": dict(seed=2),
    **{f"vocabulary {v:,}": dict(vocab_size=v) for v in (2048, 16384, 47000)},
    "head of its own": dict(tie_weights=False),
    "no dropout": dict(dropout=0.0),
    "dropout in attention too": dict(attention_dropout=0.1),
    "no dropout of embeddings": dict(embedding_dropout=0.0),
    "no weight decay": dict(weight_decay=0.0),
    "2 layers of 352": dict(num_layers=2, embed_dim=352),
    "7 layers of 192": dict(num_layers=7, embed_dim=192),
    "context 64": dict(seq_len=64, batch_size=64),
    "context 512": dict(seq_len=512, batch_size=8),
    "batch 8": dict(batch_size=8),
    "batch 32": dict(batch_size=32),
    "label smoothing 0.1": dict(label_smoothing=0.1),
    "constant rate": dict(schedule="constant"),
    "constant, mean of the last quarter": dict(schedule="constant", average="last quarter"),
    "constant, running mean": dict(schedule="constant", average=0.98),
    "late decay (wsd)": dict(schedule="wsd", decay_share=0.3),
    "twice the rate": dict(learning_rate=1.6e-2),
    "GELU": dict(activation="gelu"),
    "SwiGLU": dict(activation="swiglu"),
    "RMSNorm": dict(norm="rms"),
    "learned positions": dict(positions="learned"),
    "AdamW": dict(optimizer="adamw"),
    "AdamW, a quarter of the rate": dict(optimizer="adamw", learning_rate=2e-3),
    "a twentieth of the text": dict(share=0.05),
    "a twentieth, no dropout": dict(share=0.05, dropout=0.0),
    "a twentieth, dropout 0.3": dict(share=0.05, dropout=0.3),
}

SEARCH = {  # name -> what is changed in the recipe `wikitext2`
    "as it is": {},
    "as the project began": dict(precision="fp32", batch_size=32, learning_rate=5e-4, dropout=0.2),
    "dropout 0.1": dict(dropout=0.1),
    **{
        f"dropout 0.1, {what}": dict(dropout=0.1, **change)
        for what, change in {
            "half the rate": dict(learning_rate=1e-3),
            "twice the rate": dict(learning_rate=4e-3),
            "ten times the decay": dict(weight_decay=1.0),
        }.items()
    },
}


def sections(
    change: dict, data: dict = DATA, model: dict = MODEL, train: dict = TRAIN
) -> tuple[DataConfig, ModelConfig, TrainConfig]:
    "The settings with a change; the lowest rate stays the same share of the highest."
    data, model, new = (
        values
        | {
            name: value
            for name, value in change.items()
            if name in cls.__dataclass_fields__
            and not (cls is ModelConfig and name == "vocab_size")
        }
        for cls, values in ((DataConfig, data), (ModelConfig, model), (TrainConfig, train))
    )
    new["min_learning_rate"] *= new["learning_rate"] / train["learning_rate"]
    return (
        make_config(DataConfig, "data", data),
        make_config(ModelConfig, "model", model | dict(vocab_size=data["vocab_size"])),
        make_config(TrainConfig, "train", new),
    )


def searched(change: dict) -> tuple[DataConfig, ModelConfig, TrainConfig]:
    "The recipe `wikitext2` with a change, on the text of the benchmark."
    said = read_config(config_file("wikitext2"))
    return sections(
        change,
        said["data"] | dict(subset=DATA["subset"], data_dir=DATA["data_dir"]),
        said["model"],
        said["train"],
    )


def word_perplexity(
    model: Transformer, corpus: Corpus, split: str, stride: int | None = None
) -> float:
    return perplexities(
        evaluate(model, corpus.streams[split], stride, loss=fast_loss), corpus.about[split]
    )["word_perplexity"]


def averaging(how: float | str | None, model: torch.nn.Module) -> AveragedModel | None:
    """A running mean of the weights, or the mean over the last quarter of the steps (SWA; Izmailov
    et al., 2018).
    """
    return how and AveragedModel(
        model, multi_avg_fn=None if how == "last quarter" else get_ema_multi_avg_fn(how)
    )


def longer(model: Transformer, times: int) -> Transformer:
    "The same weights with a longer window; rotary positions need no table."
    other = Transformer(replace(model.cfg, seq_len=times * model.cfg.seq_len))
    other.load_state_dict(model.state_dict())
    return other.eval()


def steps_within(minutes: float, model: Transformer, corpus: Corpus, train: TrainConfig) -> int:
    "As many steps as fit into the time, found by timing the first ones."
    ends = []
    fit(
        deepcopy(model),
        corpus,
        replace(train, max_steps=12, eval_every=12),
        loss=fast_loss,
        log=lambda row: ends.append(time.perf_counter()),
        accelerator=make_accelerator(train),
    )
    return max(20, round(minutes * 60 / statistics.median(np.diff(ends[1:]))))


def trained(
    change: dict, data: DataConfig, shape: ModelConfig, train: TrainConfig, minutes: float
) -> tuple[dict, Transformer, Corpus]:
    "A row: as many steps as fit into the time."
    corpus = prepare(data)
    torch.manual_seed(train.seed)
    model = Transformer(shape)
    text = corpus.streams["train"][: round(change.get("share", 1) * len(corpus.streams["train"]))]
    # the looks that training takes cost nothing
    short = replace(corpus, streams=dict(train=text, validation=corpus.streams["validation"][:2]))
    steps = steps_within(minutes, model, short, train)
    average, curve = averaging(change.get("average"), model), []

    def log(row):
        if average and (change["average"] != "last quarter" or row["step"] > 0.75 * steps):
            average.update_parameters(model)
        if row["step"] % max(1, steps // 60) == 0:
            curve.append([row["step"], round(row["loss"], 4)])

    torch.manual_seed(train.seed)
    own = dict(loss=fast_loss, log=log, accelerator=make_accelerator(train))
    began = time.perf_counter()
    fit(model, short, replace(train, max_steps=steps, eval_every=steps), **own)
    seconds = time.perf_counter() - began
    best = (average.module if average else model).eval()
    tokens = steps * train.batch_size * shape.seq_len
    row = dict(
        change=change,
        parameters=count_parameters(model),
        steps=steps,
        epochs=tokens / len(text),
        seconds=seconds,
        tokens_per_second=tokens / seconds,
        validation=word_perplexity(best, corpus, "validation"),
        curve=curve,
    )
    return row, best, corpus


def keep(kind: str, name: str, row: dict) -> None:
    "Put a row into the file of results."
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    here = dict(
        date=str(date.today()),
        machine=f"{os.cpu_count()} cores, {platform.machine()}",
        threads=torch.get_num_threads(),
        torch=torch.__version__.split("+")[0],
    )
    rows = [r for r in found.get(kind, []) if r["name"] != name] + [dict(name=name, **row, **here)]
    found[kind] = sorted(
        rows, key=lambda r: list(CHANGES).index(r["name"]) if r["name"] in CHANGES else len(CHANGES)
    )
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")


def table(
    kind: str, rows: dict[str, dict], made: Callable, args: argparse.Namespace
) -> Iterator[tuple[str, Transformer, Corpus]]:
    "Train and keep the rows that are asked for."
    for name, change in rows.items():
        if args.only and args.only not in name:
            continue
        row, model, corpus = trained(change, *made(change), args.minutes)
        keep(kind, name, row | dict(minutes=args.minutes))
        print(
            f"{name:36} {row['parameters'] / 1e6:5.1f}M  {row['steps']:5} steps "
            f" {row['epochs']:.2f} epochs  validation {row['validation']:7.1f}",
            flush=True,
        )
        yield name, model, corpus


def changes(args: argparse.Namespace) -> None:
    for name, model, corpus in table("changes", CHANGES, sections, args):
        if CHANGES[name]:
            continue
        for times in (1, 2, 4):
            # each begins half of its length after the last
            value = word_perplexity(
                longer(model, times), corpus, "validation", times * model.cfg.seq_len // 2
            )
            keep(
                "windows",
                f"{times * model.cfg.seq_len:,} tokens",
                dict(times=times, validation=value),
            )
            print(
                f"windows of {times * model.cfg.seq_len} tokens, sliding: validation {value:.1f}",
                flush=True,
            )


def search(args: argparse.Namespace) -> None:
    for _ in table("search", SEARCH, searched, args):
        pass


def recipe(args: argparse.Namespace) -> None:
    "Train, or take the run that is there; then look at the test split."
    for seed in args.seeds:
        run = Path(args.runs) / f"{args.name}-seed{seed}"
        said = read_config(config_file(args.name))
        if args.subset:
            said["data"]["subset"] = args.subset
        data, model, train = (
            make_config(DataConfig, "data", said["data"] | dict(data_dir=DATA["data_dir"])),
            make_config(ModelConfig, "model", said["model"]),
            make_config(TrainConfig, "train", said["train"] | dict(seed=seed)),
        )
        try:
            if not (run / "summary.json").exists():
                train_run(run, data, model, train, resume=(run / "config.yaml").exists())
        except Stopped as stopped:
            raise SystemExit(f"{stopped}: the same command goes on from there") from None
        found, corpus, metrics = load_run(run), prepare(data), read_rows(run / "metrics.jsonl")
        stride = found.model.cfg.seq_len // 4
        tokens = [m["tokens_per_second"] for m in metrics]
        each = train.batch_size * found.model.cfg.seq_len
        sample = complete(
            found.model,
            found.tokenizer,
            " = The old bridge = \n",
            SampleConfig(max_new_tokens=120, temperature=0.8, top_p=0.95),
        )[0]
        # what the device had, not what was asked for
        row = dict(
            seed=seed,
            subset=data.subset,
            parameters=count_parameters(found.model),
            steps=metrics[-1]["step"],
            epochs=metrics[-1]["epoch"],
            best_step=read_json(run / "summary.json")["best_step"],
            precision=read_json(run / "environment.json")[0]["precision"],
            seconds=sum(each / t for t in tokens),
            tokens_per_second=statistics.median(tokens),
            memory_mb=max(m["memory_mb"] for m in metrics),
            # of the last batches, with dropout
            train=perplexities(
                statistics.mean(m["loss"] for m in metrics[-100:]), corpus.about["train"]
            )["word_perplexity"],
            **{
                f"{split}{kind}": word_perplexity(found.model, corpus, split, step)
                for split in ("validation", "test")
                for kind, step in (("", None), ("_sliding", stride))
            },
            curve=[
                [
                    m["step"],
                    round(
                        perplexities(m["val_loss"], corpus.about["validation"])["word_perplexity"],
                        2,
                    ),
                ]
                for m in metrics
                if "val_loss" in m
            ],
            config={
                s: asdict(v)
                for s, v in dict(
                    data=replace(data, data_dir="data"), model=model, train=train
                ).items()
            },
            sample=sample,
        )
        keep("recipes", f"{args.name}, seed {seed}", row)
        print(
            f"{args.name}, seed {seed}: validation {row['validation']:.1f}"
            f" ({row['validation_sliding']:.1f} sliding), test {row['test']:.1f}"
            f" ({row['test_sliding']:.1f} sliding)",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.wikitext2", description=__doc__.split("\n")[0]
    )
    sub = parser.add_subparsers(required=True)
    one, other = sub.add_parser("changes"), sub.add_parser("search")
    for p, do, minutes in ((one, changes, 3), (other, search, 6)):
        p.add_argument("--only", help="rows with this in their name")
        p.add_argument("--minutes", type=float, default=minutes, help="of training, for each row")
        p.set_defaults(do=do)
    two = sub.add_parser("recipe")
    two.add_argument("name", help="of a configuration")
    two.add_argument("--seeds", type=int, nargs="+", default=[0])
    two.add_argument("--subset", help="of the dataset, in place of the configuration's")
    two.add_argument("--runs", default=str(HERE.parent / "runs"), help="folder that holds the runs")
    two.set_defaults(do=recipe)
    for p in (one, other, two):
        p.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.do(args)


if __name__ == "__main__":
    run(main)
