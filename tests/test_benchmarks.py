"""The benchmarks run; how fast is not asked here."""
import lzma, subprocess, sys
from collections import Counter

import numpy as np
import pytest
from benchmarks.baselines import NGrams, compressed
from conftest import ROOT


def test_quick():
    "Every kind of case, beside the one peer that is always installed."
    done = subprocess.run([sys.executable, "-m", "benchmarks", "--quick", "--threads", "1"], cwd=ROOT, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    for row in ("| quick training | tinytransformer |", "| quick training | transformers |", "| quick generation | tinytransformer |", "| quick generation | transformers |",
                "| start | tinytransformer --help |", "| tokenizing for tiny | as prepare does it |", "| products | bf16 |", "| scale | both |"): assert row in done.stdout, row


def counted_by_hand(train: list[int], vocab_size: int, order: int):
    "Interpolated Kneser-Ney as its formula reads, with nothing but dictionaries."
    grams = {k: [tuple(train[i - k:i]) for i in range(k, len(train) + 1)] for k in range(1, order + 1)}
    counts = {k: Counter(grams[k]) if k == order else Counter(gram[1:] for gram in set(grams[k + 1])) for k in grams}
    def discount(k): return 0 if order == 1 else (ones := list(counts[k].values()).count(1)) / max(1, ones + 2 * list(counts[k].values()).count(2))
    def probability(history, word):
        p = 1 / vocab_size
        for k in range(1, min(order, len(history) + 1) + 1):
            seen = {gram[-1]: n for gram, n in counts[k].items() if gram[:-1] == tuple(history[len(history) - k + 1:])}
            if seen: p = (max(seen.get(word, 0) - discount(k), 0) + discount(k) * len(seen) * p) / sum(seen.values())
        return p
    return probability


@pytest.mark.parametrize("order", [1, 2, 4])
def test_n_grams(order):
    "Equal to the formula on a text that it has not seen, and a distribution after every history."
    rng = np.random.default_rng(0)
    train, text = rng.zipf(1.5, 300) % 20, rng.zipf(1.5, 40) % 20
    model, right = NGrams(train, 20, order), counted_by_hand(train.tolist(), 20, order)
    assert np.allclose(model.probabilities(text), [right(text[:i].tolist(), word) for i, word in enumerate(text.tolist())], rtol=1e-12)
    for length in range(6):
        history = text[:length]
        assert sum(model.probabilities(np.append(history, word))[-1] for word in range(20)) == pytest.approx(1)


def test_compressors_learn_from_the_train_split():
    text = bytes(np.random.default_rng(0).integers(0, 256, 4000, np.uint8))
    assert compressed(lzma.compress, text, text) < 0.1 * compressed(lzma.compress, b"", text)
