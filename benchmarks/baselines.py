"""What a text costs without any network: python -m benchmarks.baselines [--dataset NAME --subset
NAME]

Word counts, interpolated Kneser-Ney n-grams (Ney, Essen and Kneser, 1994; Chen and Goodman, 1999,
equation 26) and two compressors, all as perplexity per word:
exp(nats of the text / its words), a row's end counted as a word. Validation chooses nothing here,
so both splits are simply told. Written to benchmarks/results/baselines.json.
"""

import argparse
import gzip
import json
import lzma
import math
import os
import platform
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import numpy as np

from benchmarks import run

HERE = Path(__file__).parent


def words(rows: list[str]) -> list[str]:
    return [word for row in rows for word in (*row.split(), "<eos>")]


class NGrams:
    """Interpolated Kneser-Ney over word ids, one discount for each order; `order` 1 with plain
    counts is the unigram model.
    """

    def __init__(self, stream: np.ndarray, vocab_size: int, order: int):
        self.vocab_size, self.levels = vocab_size, []
        # which (k-1)-gram ends at each place; at first, the empty one
        ends, grams = np.zeros(len(stream), np.int64), []
        for k in range(1, order + 1):
            # a k-gram is the (k-1)-gram one place to the left, and a word
            keys = self.keys(ends, stream, k)
            unique, first, inverse, counts = np.unique(
                keys[k - 1 :], return_index=True, return_inverse=True, return_counts=True
            )
            before, ends = ends, np.concatenate([np.full(k - 1, -1), inverse])
            grams.append((unique, first + k - 1, ends, counts, before))
        for k, (unique, first, ends, counts, before) in enumerate(grams, 1):
            # below the top: how many different words stand before it
            if k < order:
                counts = np.bincount(ends[grams[k][1]], minlength=len(unique))
            context = unique // vocab_size
            contexts = 1 if k == 1 else len(grams[k - 2][0])
            total, kinds = (
                np.bincount(context, counts, contexts),
                np.bincount(context, counts > 0, contexts),
            )
            ones, twos = (counts == 1).sum(), (counts == 2).sum()
            self.levels.append(
                (
                    unique,
                    counts,
                    total,
                    kinds,
                    0.0 if order == 1 else ones / max(1, ones + 2 * twos),
                )
            )

    def keys(self, ends: np.ndarray, stream: np.ndarray, k: int) -> np.ndarray:
        left = ends if k == 1 else np.concatenate([[-1], ends[:-1]])
        return np.where(left < 0, -1, left * self.vocab_size + stream)

    def probabilities(self, stream: np.ndarray) -> np.ndarray:
        "Of each word, given those before it."
        p, ends = np.full(len(stream), 1 / self.vocab_size), np.zeros(len(stream), np.int64)
        for k, (unique, counts, total, kinds, discount) in enumerate(self.levels, 1):
            context = ends if k == 1 else np.concatenate([[-1], ends[:-1]])
            key = self.keys(ends, stream, k)
            at = np.minimum(np.searchsorted(unique, key), len(unique) - 1)
            known = unique[at] == key
            here = np.where(context >= 0, total[context], 0)
            found = np.where(known, counts[at], 0)
            with np.errstate(invalid="ignore", divide="ignore"):
                q = (np.maximum(found - discount, 0) + discount * kinds[context] * p) / here
            p, ends = np.where(here > 0, q, p), np.where(known, at, -1)
        return p


def per_word(nats: float, count: int) -> float:
    return math.exp(nats / count)


def compressed(compress: Callable[[bytes], bytes], train: bytes, text: bytes) -> float:
    "Nats of `text` for one who has seen `train`: what it adds to the size."
    return (len(compress(train + text)) - len(compress(train))) * 8 * math.log(2)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.baselines", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--dataset", default="Salesforce/wikitext")
    parser.add_argument("--subset", default="wikitext-2-v1")
    args = parser.parse_args()
    from tinytransformer.corpus import raw_rows
    from tinytransformer.data import DataConfig

    rows = raw_rows(
        DataConfig(dataset=args.dataset, subset=args.subset, data_dir=str(HERE.parent / "data"))
    )
    texts = {split: words(rows[split]["text"]) for split in ("train", "validation", "test")}
    vocabulary = {word: i for i, word in enumerate(sorted(set(texts["train"])))}
    streams = {
        split: np.array([vocabulary[word] for word in text], np.int64)
        for split, text in texts.items()
    }
    found = []

    def add(name, seconds, nats):
        found.append(
            dict(
                name=name,
                seconds=seconds,
                **{
                    split: per_word(nats[split], len(texts[split]))
                    for split in ("validation", "test")
                },
            )
        )

    for name, order in (("unigram", 1), ("Kneser-Ney, 3 words", 3), ("Kneser-Ney, 5 words", 5)):
        began = time.perf_counter()
        model = NGrams(streams["train"], len(vocabulary), order)
        add(
            name,
            time.perf_counter() - began,
            {
                split: -np.log(model.probabilities(streams[split])).sum()
                for split in ("validation", "test")
            },
        )
    packed = {split: "".join(rows[split]["text"]).encode() for split in texts}
    for name, compress in (
        ("gzip", lambda text: gzip.compress(text, 9, mtime=0)),
        ("xz", lambda text: lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)),
    ):
        began = time.perf_counter()
        nats = {
            split: compressed(compress, packed["train"], packed[split])
            for split in ("validation", "test")
        }
        add(name, time.perf_counter() - began, nats)
    about = dict(
        date=str(date.today()),
        machine=f"{os.cpu_count()} cores, {platform.machine()}",
        dataset=args.dataset,
        subset=args.subset,
        words={split: len(text) for split, text in texts.items()},
        vocabulary=len(vocabulary),
        rows=found,
    )
    (HERE / "results" / "baselines.json").write_text(json.dumps(about, indent=1) + "\n")
    for row in found:
        print(f"{row['name']:20} validation {row['validation']:8.1f}  test {row['test']:8.1f}")


if __name__ == "__main__":
    run(main)
