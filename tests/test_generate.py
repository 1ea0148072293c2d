"""The controls at their edges, in their order, and beside Hugging Face's; the cache for every kind
of model; and what `generate` promises beyond what chapter 06 shows."""

import copy
import itertools
import math
import random
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from tokenizers import Tokenizer
from torch.testing import assert_close
from transformers import (
    MinPLogitsWarper,
    PrefixConstrainedLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from tinytransformer import variants  # noqa: F401 (rotary, rms and swiglu)
from tinytransformer.block import Block
from tinytransformer.files import InputError
from tinytransformer.generate import (
    KVCache,
    SampleConfig,
    bias_tokens,
    draw_token,
    encode_prompt,
    generate,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    keep_typical,
    next_distribution,
    next_logits,
    penalise_frequency,
    penalise_repetition,
    window_length,
)
from tinytransformer.model import ModelConfig, Transformer
from tinytransformer.runs import load_run
from tinytransformer.tinywiki import FIELD, WIKI, odds, readings, write_article

V = 1024


@pytest.fixture
def z():
    "Logits (B, V), from flat to peaked; no two are the same in a row."
    generator = torch.Generator().manual_seed(0)
    return torch.randn(64, V, generator=generator) * torch.linspace(0.1, 8, 64)[:, None]


@pytest.fixture
def ids():
    return torch.randint(V, (64, 30), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def run():
    return load_run("tiny")


@pytest.fixture(scope="module")
def starts(run):  # (4, 12)
    text = " = Greta Holt = \n Greta Holt ( 1839 – 1880 ) was a Danish painter of Dunham ."
    tokens = run.tokenizer.encode(4 * text).ids[:48]
    return torch.tensor(tokens).view(4, 12)


def count(logits):
    "Tokens that are left in a row, on average."
    return logits.isfinite().sum(dim=1).float().mean().item()


# --- controls at their edges


def test_temperature_from_greedy_to_noise(z):
    apart = z.topk(2).values.diff(dim=1)[:, 0].abs() > 0.02  # else T must be smaller still
    assert apart.float().mean() > 0.8
    greedily = torch.zeros_like(z).scatter(1, z.argmax(dim=1, keepdim=True), 1.0)
    assert_close((z / 0.001).softmax(1)[apart], greedily[apart])
    assert_close((z / 1e6).softmax(1), torch.full_like(z, 1 / V), rtol=1e-3, atol=1e-6)


def test_top_k_keeps_ties_and_knows_no_more_than_all(z):
    tied = torch.tensor([[3.0, 1.0, 1.0, 0.0]])
    assert keep_top_k(tied, 2).isfinite().tolist() == [[True, True, True, False]]
    assert keep_top_k(z, 1).argmax(1).equal(z.argmax(1)) and count(keep_top_k(z, 1)) == 1
    assert keep_top_k(z, V).equal(z) and keep_top_k(z, 10 * V).equal(z)


def test_top_p_keeps_at_least_one_token_and_at_most_all(z):
    assert torch.tensor(1e-300) == 0
    for p in (1e-9, 1e-300):
        assert keep_top_p(z, p).equal(keep_top_k(z, 1))
    assert keep_top_p(z, 1.0).equal(z)
    # rounded sums reach 1 too early: without its first line the function would drop tokens at p = 1
    wide = torch.randn(20, 50_000, generator=torch.Generator().manual_seed(0)).softmax(dim=1)
    wide = wide.sort(descending=True).values
    assert (wide.cumsum(dim=1) - wide >= 1).sum(dim=1).max() > 0


def test_min_p_of_one_is_greedy(z):
    assert keep_min_p(z, 1.0).equal(keep_top_k(z, 1))


def test_repetition_penalty_lowers_what_was_used(z, ids):
    used = torch.zeros_like(z).scatter(1, ids, 1.0).bool()
    after = penalise_repetition(z, ids, 1.5)
    assert (after < z)[used].all() and after[~used].equal(z[~used])
    assert penalise_repetition(z, ids, 1.0).equal(z)
    assert penalise_repetition(z, ids.repeat(1, 3), 1.5).equal(after)  # punished once
    three = torch.tensor([[2.0, -2.0, 0.0]])
    for penalty in (1e-300, 1e300):  # why the settings have limits
        after = penalise_repetition(three, torch.tensor([[0, 1, 2]]), penalty)
        assert after.softmax(dim=1).isnan().all()


def test_frequency_penalty_of_zero_changes_nothing(z, ids):
    counts = torch.randint(3, z.shape)
    assert penalise_frequency(z, counts, 0.0, 0.0).equal(z)
    once = penalise_frequency(z, counts.clamp(max=1), 0.0, 0.5)
    assert penalise_frequency(z, counts, 0.0, 0.5).equal(once)  # presence does not grow


def test_bias_adds_bans_and_forces():
    three = torch.tensor([[2.0, -2.0, 0.0]])
    assert bias_tokens(three, {1: 3.0}).tolist() == [[2.0, 1.0, 0.0]]
    assert bias_tokens(three, {0: -math.inf}).softmax(dim=-1)[0, 0] == 0
    forced = bias_tokens(three, {1: math.inf, 2: math.inf, 0: 5.0})
    assert forced.tolist() == [[-math.inf, -2.0, 0.0]]  # by the model's own odds


# --- beside Hugging Face's, each alone


def test_each_control_is_hugging_faces(z, ids):
    for T in (0.3, 1.0, 2.5):
        assert_close(z / T, TemperatureLogitsWarper(T)(ids, z))
    for k in (1, 10, 3 * V):
        assert_close(keep_top_k(z, k), TopKLogitsWarper(k)(ids, z))
    for p in (0.2, 0.9, 0.99, 1.0):
        assert_close(keep_top_p(z, p), TopPLogitsWarper(p)(ids, z))
    for m in (0.01, 0.3, 1.0):
        assert_close(keep_min_p(z, m), MinPLogitsWarper(m)(ids, z))
    for p in (0.2, 0.9, 0.99):
        assert_close(keep_typical(z, p), TypicalLogitsWarper(p)(ids, z))
    for penalty in (1.2, 3.0, 0.8):
        theirs = RepetitionPenaltyLogitsProcessor(penalty)(ids, z)
        assert_close(penalise_repetition(z, ids, penalty), theirs)
    for ours, theirs in (
        ({3: 1.5, 7: -2.0}, SequenceBiasLogitsProcessor([[[3], 1.5], [[7], -2.0]])),
        ({3: -math.inf, 7: -math.inf}, SuppressTokensLogitsProcessor([3, 7])),
        (
            {3: math.inf, 7: math.inf},
            PrefixConstrainedLogitsProcessor(lambda row, text: [3, 7], num_beams=1),
        ),
    ):
        assert_close(bias_tokens(z, ours), theirs(ids, z))


# --- settings, and the order of the controls


@pytest.mark.parametrize(
    "settings",
    [
        dict(max_new_tokens=0),
        dict(temperature=-1.0),
        dict(temperature=math.nan),
        dict(top_k=0),
        dict(top_p=0.0),
        dict(top_p=1.5),
        dict(min_p=1.5),
        dict(typical_p=0.0),
        dict(repetition_penalty=0.0),
        dict(repetition_penalty=1e-300),
        dict(repetition_penalty=1e300),
        dict(frequency_penalty=-101.0),
        dict(presence_penalty=math.nan),
        dict(logit_bias={5: math.nan}),
        dict(stop=[""]),
        dict(stop_tokens=["a"]),
        dict(seed=-1),
        dict(seed=2**63),
    ],
    ids=str,
)
def test_wrong_settings_are_refused(settings):
    with pytest.raises(InputError, match=f"sample.{next(iter(settings))} is .*: give"):
        SampleConfig(**settings)


def test_which_controls_may_change_places(z, ids):
    once = torch.ones_like(z)
    assert_close(penalise_repetition(z, ids, 1.5) / 0.7, penalise_repetition(z / 0.7, ids, 1.5))
    # what is added is divided by the temperature
    assert_close(bias_tokens(z, {3: 1.0}) / 0.5, bias_tokens(z / 0.5, {3: 2.0}))
    doubled = penalise_frequency(z / 0.5, once, 0.8, 0.2)
    assert_close(penalise_frequency(z, once, 0.4, 0.1) / 0.5, doubled)
    assert_close(keep_top_k(z / 0.7, 10), keep_top_k(z, 10) / 0.7)
    assert count(keep_top_p(z / 2, 0.9)) > count(keep_top_p(z, 0.9) / 2)
    k_first, p_first = keep_top_p(keep_top_k(z, 10), 0.9), keep_top_k(keep_top_p(z, 0.9), 10)
    assert not (k_first > p_first).any() and count(k_first) < count(p_first)
    five = z.topk(5).indices
    penalised_first = keep_top_k(penalise_repetition(z, five, 3.0), 5)
    assert not penalised_first.equal(penalise_repetition(keep_top_k(z, 5), five, 3.0))


def test_next_distribution(z, ids):
    for T in (0.0, 1e-38, 1e-7):
        p = next_distribution(z, ids, SampleConfig(temperature=T))
        assert (p.max(dim=1).values == 1).all() and p.argmax(dim=1).equal(z.argmax(dim=1))
    peaked = 100 * z[32:]
    cold = next_distribution(peaked, ids[32:], SampleConfig(temperature=1e-4))
    assert_close(cold, p[32:])  # close to zero, zero is what it comes to
    counts = torch.randint(3, z.shape)
    found = next_distribution(z, ids, SampleConfig(frequency_penalty=0.5), counts)
    assert_close(found, (z - 0.5 * counts).softmax(dim=-1))


def test_extremes_of_all_settings_give_a_distribution(z, ids):
    for penalty, T, k, p, m, typical in itertools.product(
        (0.01, 100.0),
        (0.0, 1e-6, math.inf),
        (1, 10**9),
        (1e-300, 1.0),
        (0.0, 1e-300, 1.0),
        (1e-300, 1.0),
    ):
        cfg = SampleConfig(1, T, k, p, m, typical, penalty)
        extreme = next_distribution(50 * z, ids, cfg)
        assert_close(extreme.sum(dim=1), torch.ones(len(z)))


# --- the draw


def test_draws_follow_the_probabilities():
    p = torch.tensor([0.5, 0.3, 0.0, 0.15, 0.05])
    # they share one generator, so the draws follow each other
    drawn = draw_token(p.expand(100_000, 5), [torch.Generator().manual_seed(0)] * 100_000)
    shares = drawn.bincount(minlength=5) / 100_000
    assert (shares - p).abs().max() < 0.01 and shares[2] == 0


# --- the cache


@pytest.mark.parametrize(
    "switches",
    [{}, dict(positions="rotary"), dict(activation="swiglu", norm="rms", positions="rotary")],
    ids=str,
)
def test_cache_changes_nothing(switches):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Transformer(ModelConfig(64, 32, 32, 4, 2, **switches)).double().eval()
        for weight in model.parameters():
            torch.nn.init.normal_(weight, std=0.3)
        ids = torch.randint(64, (3, 20))
    cache = KVCache(model, rows=3, capacity=20)
    with torch.no_grad():
        whole = model(ids)
    assert_close(next_logits(model, ids[:, :12], cache), whole[:, 11], atol=1e-9, rtol=0)
    for t in range(12, 20):
        found = next_logits(model, ids[:, t : t + 1], cache)
        assert_close(found, whole[:, t], atol=1e-9, rtol=0)
    with pytest.raises(InputError, match="do not fit into a cache"):
        next_logits(model, ids[:, :1], cache)


# --- the loop


def test_there_is_one_forward_pass(run, starts):
    "`generate` computes no block by itself: what is changed in a block, changes what is written."
    forward, cfg = Block.forward, SampleConfig(max_new_tokens=30, temperature=0.0)
    before = generate(run.model, starts, cfg)

    def halved(block, x, cache=None, positions=None, return_weights=False):
        return forward(block, x, cache, positions) / 2

    with patch.object(Block, "forward", halved):
        changed = generate(run.model, starts, cfg)
        text = starts
        for _ in range(30):
            with torch.no_grad():
                likeliest = run.model(text)[:, -1:].argmax(dim=-1)
            text = torch.cat([text, likeliest], dim=1)
        assert changed.equal(text)
    assert (changed != before).any(dim=1).all()


def test_dropout_is_off_and_the_mode_stays(run, starts):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Transformer(replace(run.model.cfg, dropout=0.5)).train()
        cfg = SampleConfig(max_new_tokens=20, temperature=0)
        assert generate(model, starts, cfg).equal(generate(model, starts, cfg))
        assert model.training
        assert not model(starts).equal(model(starts))  # what it would have drawn from otherwise


def test_a_row_does_not_depend_on_those_beside_it(run, starts):
    exact, cfg = copy.deepcopy(run.model).double(), SampleConfig(max_new_tokens=20)
    assert generate(exact, starts[:1], cfg)[0].equal(generate(exact, starts, cfg)[0])


def test_a_jump_sees_less_than_a_slide(run, starts):
    context = run.model.cfg.seq_len
    full = starts.flatten().repeat(5)[: context - 4][None]
    out = generate(run.model, full, SampleConfig(max_new_tokens=20, temperature=0))
    text = full
    for _ in range(5):  # up to the edge the loop without a cache agrees
        with torch.no_grad():
            likeliest = run.model(text[:, -context:])[:, -1:].argmax(dim=-1)
        text = torch.cat([text, likeliest], dim=1)
    assert out[:, : context + 1].equal(text)
    jumped = text[:, -window_length(context + 1, context) :]
    with torch.no_grad():
        slid, after_jump = run.model(text[:, 1:])[0, -1], run.model(jumped)[0, -1]
    assert jumped.shape[1] < context and not slid.allclose(after_jump)


def test_prompts_that_cannot_be_continued_are_refused(run, starts):
    cfg, context = SampleConfig(max_new_tokens=5), run.model.cfg.seq_len
    for message, ids in {
        "is empty": torch.zeros(1, 0, dtype=torch.long),
        "more than the context": starts.flatten().repeat(5)[: context + 1][None],
        "outside the vocabulary": torch.tensor([[0, V]]),
        "token id -1 ": torch.tensor([[-1]]),
    }.items():
        with pytest.raises(InputError, match=message):
            generate(run.model, ids, cfg)
    for message, settings in {
        "not in the vocabulary": dict(logit_bias={V: 1.0}),
        "bans every token": dict(logit_bias=dict.fromkeys(range(V), -math.inf)),
        "stop strings are looked for in text": dict(stop=["."]),
    }.items():
        with pytest.raises(InputError, match=message):
            generate(run.model, starts, replace(cfg, **settings))


# --- from text to tokens


def test_a_prompt_is_text(run):
    special = Tokenizer.from_str(run.tokenizer.to_str())
    special.add_special_tokens(["<|endoftext|>"])
    plain = encode_prompt(run.tokenizer, "<|endoftext|>")
    assert encode_prompt(special, "<|endoftext|>") == plain and len(plain) > 1
    with pytest.raises(InputError, match="half of a character"):
        encode_prompt(run.tokenizer, "\udcff")


# --- what the model writes, fact by fact


def forget(grammar, but=None):
    """The same grammar without memory, except for the fact `but`: what would be recalled is drawn
    again.
    """
    sources = {}  # fact -> whatever it may be set to: a rule, or a text
    for template in (template for options in grammar.values() for template in options):
        for fact, kind, source in FIELD.findall(template):
            if kind:
                sources.setdefault(fact, set()).add(f"{{{source}}}" if kind == ":" else source)

    def draw_again(field):
        fact, kind, source = field.groups()
        if fact == but:
            return field[0]
        if kind:
            return f"{{{source}}}" if kind == ":" else ""
        return f"{{any_{fact}}}" if fact in sources else field[0]

    free = {
        rule: {FIELD.sub(draw_again, template): p for template, p in zip(*odds(options))}
        for rule, options in grammar.items()
    }
    return free | {f"any_{fact}": sorted(options) for fact, options in sources.items()}


def split_articles(text):
    "Cut a text before each title row."
    articles = []
    for row in text.splitlines(keepends=True):
        if row.startswith(" = ") and not row.startswith(" = = "):
            articles.append("")
        articles[-1] += row
    return articles


def test_each_fact_is_recalled(run):
    """Written articles recall each fact far more often than chance: than spliced ones do, the title
    and first paragraph of one article with the rest of the next. The grammar's own always do.
    """
    rng, form = random.Random(1), forget(WIKI)
    own = [write_article(WIKI, rng).text for _ in range(160)]
    encoded = [run.tokenizer.encode(text.splitlines(keepends=True)[0]).ids for text in own]
    chosen = [i for i, ids in enumerate(encoded) if len(ids) == 8][:48]
    titles = torch.tensor([encoded[i] for i in chosen])
    ids = generate(run.model, titles, SampleConfig(max_new_tokens=140, temperature=0.8)).tolist()
    written = [split_articles(run.tokenizer.decode(row))[0] for row in ids]
    parts = [article.split("\n = = ", 1) for article in written if "\n = = " in article]
    spliced = ["\n = = ".join([one[0], two[1]]) for one, two in zip(parts, parts[1:] + parts[:1])]
    kinds = [[a for a in each if readings(form, a)] for each in (written, spliced, own)]

    def agree(articles, fact):
        "For each article that recalls this fact: whether it does so rightly."
        never, memory = form | {f"any_{fact}": []}, forget(WIKI, but=fact)
        return [bool(readings(memory, a)) for a in articles if not readings(never, a)]

    judged = {}
    for fact in [rule.removeprefix("any_") for rule in form if rule.startswith("any_")]:
        found = [agree(articles, fact) for articles in kinds]
        # facts that are stated and recalled on one side of the cut cannot be broken by it
        if min(map(len, found)) >= 12 and not all(found[1]):
            judged[fact] = [sum(each) / len(each) for each in found]
    assert len(judged) > 3 and all(of_own == 1 for _, _, of_own in judged.values())
    assert min(of_written for of_written, _, _ in judged.values()) > 0.8
    of_written, of_spliced, _ = map(sum, zip(*judged.values()))
    assert of_written > of_spliced + 0.1 * len(judged)
