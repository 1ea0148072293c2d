"""Settings of the data: which names are allowed, which values are refused, and why."""

import math

import pytest

from tinytransformer.data import DataConfig, is_hub_name
from tinytransformer.files import InputError
from tinytransformer.tinywiki import WIKI


@pytest.mark.parametrize("name", ["Salesforce/wikitext", "openai-community/gpt2", "a/b-1.0_c"])
def test_names_of_the_hub(name):
    assert is_hub_name(name)


@pytest.mark.parametrize(
    "name",
    "gpt2 a/b/c ../.. a/.. a/.b /b a/ a/b\\c a/é".split()
    + ["a/b\n", "a/b c", "a/b\0", "a/" + 97 * "b"],
)
def test_other_names(name):
    "Folders are named after them, so none may lead out of a folder."
    assert not is_hub_name(name)


def test_names_of_a_subset():
    assert is_hub_name("wikitext-2-raw-v1", parts=1) and not is_hub_name("..", parts=1)


@pytest.mark.parametrize(
    "wrong, said",
    [
        (dict(articles=3), "data.articles is 3: give 10 to 40000"),
        (dict(articles=40_001), "data.articles is 40001: give 10 to 40000"),
        (dict(seed=-1), "data.seed is -1: give 0 or more"),
        (dict(vocab_size=100), "data.vocab_size is 100: give 256"),
        (dict(vocab_size=2**20 + 1), "data.vocab_size is 1048577: give 256"),
        (dict(dataset="wikitext"), "data.dataset is 'wikitext': give tinywiki or the Hub's"),
        (dict(dataset="../.."), "data.dataset is '../..': give tinywiki or the Hub's"),
        (dict(tokenizer="bep"), "data.tokenizer is 'bep': give bpe or the Hub's"),
        (dict(tokenizer="a/../b"), "data.tokenizer is 'a/../b': give bpe or the Hub's"),
        (dict(subset="en"), "data.subset is 'en', but tinywiki has no subsets"),
        (dict(dataset="a/b", subset="../c"), "data.subset is '../c': give a name such as"),
        (dict(dataset="a/b", subset=""), "data.subset is '': give a name such as"),
        (dict(data_dir=""), "data.data_dir is '': give the path of a folder"),
        (dict(data_dir="a\0b"), r"data.data_dir is 'a\x00b': give the path of a folder"),
    ],
)
def test_settings_refused(wrong, said):
    with pytest.raises(InputError) as refused:
        DataConfig(**wrong)
    assert said in str(refused.value)


def test_home_is_found(monkeypatch):
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, "/home/anna")
    assert DataConfig(data_dir="~/data").data_dir == "/home/anna/data"


def test_titles_do_not_run_out():
    """No title of TinyWiki is used twice, which is why `DataConfig` allows 40,000 articles and no
    more. The grammar says how many titles there are.
    """
    kinds = (
        "woman_name woman_middle surname",
        "man_name man_middle surname",
        "village bank river",
        "adjective members town_name",
    )
    titles = sum(math.prod(len(WIKI[rule]) for rule in kind.split()) for kind in kinds)
    assert 40_000 + 2 * 4000 < 0.8 * titles  # in all three splits
