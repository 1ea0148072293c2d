"""The benchmarks run; how fast is not asked here."""

import lzma
import shutil
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import ROOT

from benchmarks import wikitext2
from benchmarks.__main__ import kinds
from benchmarks.baselines import NGrams, compressed


@pytest.mark.slow
def test_quick():
    "Every kind of case, beside the one peer that is always installed."
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "--quick", "--threads", "1"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr
    for row in (
        "| quick training | tinytransformer |",
        "| quick training | transformers |",
        "| quick generation | tinytransformer |",
        "| quick generation | transformers |",
        "| start | tinytransformer --help |",
        "| tokenizing for tiny | as prepare does it |",
        "| products | fp32 |",
        *(f"| products | {kind} |" for kind in kinds()),
        "| scale | both |",
    ):
        assert row in done.stdout, row


def counted_by_hand(train: list[int], vocab_size: int, order: int):
    "Interpolated Kneser-Ney as its formula reads, with nothing but dictionaries."
    grams = {
        k: [tuple(train[i - k : i]) for i in range(k, len(train) + 1)] for k in range(1, order + 1)
    }
    counts = {
        k: Counter(grams[k]) if k == order else Counter(gram[1:] for gram in set(grams[k + 1]))
        for k in grams
    }

    def discount(k):
        return (
            0
            if order == 1
            else (ones := list(counts[k].values()).count(1))
            / max(1, ones + 2 * list(counts[k].values()).count(2))
        )

    def probability(history, word):
        p = 1 / vocab_size
        for k in range(1, min(order, len(history) + 1) + 1):
            seen = {
                gram[-1]: n
                for gram, n in counts[k].items()
                if gram[:-1] == tuple(history[len(history) - k + 1 :])
            }
            if seen:
                p = (max(seen.get(word, 0) - discount(k), 0) + discount(k) * len(seen) * p) / sum(
                    seen.values()
                )
        return p

    return probability


def test_text_that_cannot_be_had(tmp_path, monkeypatch):
    "One line says so, and the results stay as they are."
    for name in ("HF_HOME", "HF_DATASETS_CACHE"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    shutil.copytree(ROOT / "benchmarks", tmp_path / "benchmarks")
    before = {path: path.read_bytes() for path in (tmp_path / "benchmarks" / "results").iterdir()}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.baselines"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert (
        done.returncode == 1
        and done.stderr.count("\n") == 1
        and "Salesforce/wikitext" in done.stderr
    ), done.stderr
    assert before == {
        path: path.read_bytes() for path in (tmp_path / "benchmarks" / "results").iterdir()
    }


@pytest.mark.parametrize("order", [1, 2, 4])
def test_n_grams(order):
    "Equal to the formula on a text that it has not seen, and a distribution after every history."
    rng = np.random.default_rng(0)
    train, text = rng.zipf(1.5, 300) % 20, rng.zipf(1.5, 40) % 20
    model, right = NGrams(train, 20, order), counted_by_hand(train.tolist(), 20, order)
    assert np.allclose(
        model.probabilities(text),
        [right(text[:i].tolist(), word) for i, word in enumerate(text.tolist())],
        rtol=1e-12,
    )
    for length in range(6):
        history = text[:length]
        assert sum(
            model.probabilities(np.append(history, word))[-1] for word in range(20)
        ) == pytest.approx(1)


def test_compressors_learn_from_the_train_split():
    text = bytes(np.random.default_rng(0).integers(0, 256, 4000, np.uint8))
    assert compressed(lzma.compress, text, text) < 0.1 * compressed(lzma.compress, b"", text)


@pytest.mark.parametrize(
    "made, changes",
    [(wikitext2.sections, wikitext2.CHANGES), (wikitext2.searched, wikitext2.SEARCH)],
)
def test_changes_on_wikitext2(made, changes):
    """Each row is a model that can be made, and differs from the one as it is in what it says and
    nothing else.
    """
    base = made({})
    for name, change in changes.items():
        settings = made(change)
        with torch.device("meta"):
            wikitext2.Transformer(settings[1])
        other = {
            field
            for old, new in zip(base, settings)
            for field in old.__dataclass_fields__
            if getattr(old, field) != getattr(new, field)
        }
        assert other - {"min_learning_rate"} == change.keys() - {"average", "share"}, name
    assert len({str(change) for change in changes.values()}) == len(changes)


def test_longer_windows_are_the_same_model():
    torch.manual_seed(0)
    model = wikitext2.Transformer(
        wikitext2.ModelConfig(
            vocab_size=50, seq_len=8, embed_dim=16, num_heads=2, num_layers=2, positions="rotary"
        )
    ).eval()
    long, ids = wikitext2.longer(model, 2), torch.randint(50, (3, 16))
    with torch.no_grad():
        torch.testing.assert_close(long(ids[:, :8]), model(ids[:, :8]))
        assert long(ids).shape == (3, 16, 50)


def test_mean_of_weights():
    "The running mean follows its formula; the plain one is the mean."
    for how, wanted in (
        (0.5, 0.5 * (0.5 * 1 + 0.5 * 2) + 0.5 * 4),
        ("last quarter", (1 + 2 + 4) / 3),
    ):
        model = torch.nn.Linear(1, 1, bias=False)
        mean = wikitext2.averaging(how, model)
        for value in (1.0, 2.0, 4.0):
            torch.nn.init.constant_(model.weight, value)
            mean.update_parameters(model)
        assert mean.module.weight.item() == pytest.approx(wanted)


@pytest.mark.slow
def test_scaling_runs():
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.scaling", "--quick", "--threads", "1"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0 and done.stdout.count("nats above the floor") == 3, done.stderr
