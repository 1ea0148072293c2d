"""The engine on a model that is a simple sum, and text in pieces for every kind of tokenizer."""

import copy
import math
import random
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from tinytransformer import engine
from tinytransformer.engine import (
    Batch,
    ByteDecoder,
    StreamDecoder,
    complete,
    float64_copy,
    sample_tokens,
    start_batch,
    stream,
    token_bytes,
)
from tinytransformer.explorer import byte_table
from tinytransformer.files import InputError
from tinytransformer.generate import SampleConfig, encode_prompt, generate, window_length
from tinytransformer.runs import load_run

V, CONTEXT = 11, 16
WORDS = {"[UNK]": 0, "the": 1, "cat": 2, "sat": 3, "##s": 4, ".": 5, "on": 6, "mat": 7, "##ty": 8}
FRUIT = SampleConfig(max_new_tokens=6, temperature=0.0)


class MockModel:
    """What follows a text is a sum over the tokens that the cache shows, modulo V: so each token
    that is lost, doubled or taken from another row changes all that comes after it.
    """

    training = False
    cfg = SimpleNamespace(
        vocab_size=V, seq_len=CONTEXT, num_layers=1, num_heads=1, head_dim=1, embed_dim=1
    )
    head = torch.nn.Linear(V, V, bias=False).requires_grad_(False)
    head.weight.copy_(torch.eye(V))

    def __init__(self):
        self.shapes = []  # of all that was read

    def parameters(self):
        return iter([torch.zeros(1)])

    def hidden(self, ids, cache):  # (B, T) -> (B, T, V)
        self.shapes.append(tuple(ids.shape))
        cache.reserve(ids.shape[1])
        keys, _, mask = cache.layer(0).append(*[ids[:, None, :, None].float()] * 2)
        weights = torch.arange(1, keys.shape[2] + 1)  # the position counts too
        sums = (mask[:, 0] * weights * (keys[:, 0, :, 0] + 1)[:, None]).sum(dim=-1)  # (B, T)
        logits = torch.nn.functional.one_hot(sums.long() % V, V).float()
        return logits * 1.5  # 40 % of the probability for this token


def next_token(text):
    window = text[-window_length(len(text), CONTEXT) :]
    return sum(t * (token + 1) for t, token in enumerate(window, 1)) % V


def continued(text, n):
    "What the mock model writes greedily, computed without a cache."
    text = list(text)
    for _ in range(n):
        text.append(next_token(text))
    return text


@pytest.fixture
def model():
    return MockModel()


def finish(batch):
    rows = list(batch.rows)
    for _ in batch.run():
        pass
    return [row.ids for row in rows]


def test_each_row_is_as_if_alone(model):
    "Prompts of every length that the context allows, past its edge, all in one batch."
    prompts = [[(3 * n + i) % V for i in range(n)] for n in range(1, CONTEXT + 1)]
    batch = start_batch(model, prompts, SampleConfig(max_new_tokens=40, temperature=0.0))
    assert finish(batch) == [continued(prompt, 40) for prompt in prompts]


def test_rows_are_those_of_generate(model):
    "The same seed, the same tokens; rows that are alike draw apart."
    prompts = torch.tensor([[1, 2, 3], [4, 5, 6], [4, 5, 6], [9, 8, 7]])
    for settings in (
        {},
        dict(seed=5),
        dict(temperature=0.0),
        dict(top_p=0.7, temperature=1.5),
        dict(repetition_penalty=1.5),
        dict(frequency_penalty=0.7, presence_penalty=0.2),
        dict(logit_bias={3: 2.0, 4: -float("inf")}),
        dict(stop_tokens=[2, 7]),
    ):
        cfg = SampleConfig(max_new_tokens=30, **settings)
        plain = generate(model, prompts, cfg)
        rows = finish(start_batch(model, prompts.tolist(), cfg))
        for row, wanted in zip(rows, plain.tolist()):
            assert wanted[: len(row)] == row and set(wanted[len(row) :]) <= {row[-1]}, settings
    sampled = generate(model, prompts, SampleConfig(max_new_tokens=30))
    assert not sampled[1].equal(sampled[2])
    assert not sampled.equal(generate(model, prompts, SampleConfig(max_new_tokens=30, seed=1)))


def test_rows_come_and_go(model):
    "At random moments; whatever was in the batch, each text is its own."
    rng, batch, texts = random.Random(0), Batch(model, max_rows=5), []
    for _ in range(400):
        if len(batch.rows) < 5 and rng.random() < 0.4:
            prompt = rng.choices(range(V), k=rng.randint(1, CONTEXT))
            n = rng.randint(1, 30)
            row = batch.add(prompt, SampleConfig(max_new_tokens=n, temperature=0.0))
            texts.append((row, prompt))
        if batch.rows and rng.random() < 0.1:
            batch.remove(rng.choice(batch.rows))
        if batch.rows:
            batch.step()
    assert len(texts) > 30
    for row, prompt in texts:
        assert row.ids == continued(prompt, len(row.written))
        finished = len(row.written) == row.cfg.max_new_tokens
        assert (row.finish_reason == "length") == finished


def test_rows_of_different_settings_share_a_step(model):
    "One pass of the model for all of them, and each is drawn with its own settings."
    batch, alone = Batch(model, max_rows=4), []
    settings = [dict(), dict(temperature=0.0), dict(seed=3), dict(frequency_penalty=1.0)]
    for number, each in enumerate(settings):
        cfg = SampleConfig(max_new_tokens=9, **each)
        single = Batch(model, max_rows=1)
        row = single.add([number, 2], cfg, number)
        list(single.run())
        alone.append(row.ids)
        batch.add([number, 2], cfg, number)
    assert len({row.controls for row in batch.rows}) == 3  # a seed is no control
    model.shapes.clear()
    assert finish(batch) == alone
    assert model.shapes == [(4, 2)] + [(4, 1)] * 8


def test_removing_one_row_leaves_the_others_alone(model):
    batch = start_batch(model, [[1], [2], [3]], FRUIT)
    first, second, third = batch.rows
    batch.step()
    batch.remove(first)
    assert finish(batch) and first.ids == continued([1], 1)
    assert second.ids == continued([2], 6) and third.ids == continued([3], 6)
    with pytest.raises(InputError, match="the prompt is empty"):
        batch.add([], FRUIT)


def test_logprobs_are_the_models_own(model):
    "Whatever the settings: of the token that came and of the likeliest ones."
    batch = start_batch(model, [[1, 2]], SampleConfig(20, temperature=3.0), top_logprobs=2)
    row = batch.rows[0]
    for t, token in enumerate(batch.run(), 2):
        logits = torch.nn.functional.one_hot(torch.tensor(next_token(row.ids[:t])), V) * 1.5
        logprobs = logits.log_softmax(dim=-1)
        assert token.logprob == pytest.approx(logprobs[token.id].item(), abs=1e-6)
        best, other = token.top_logprobs.items()
        assert best == (logits.argmax().item(), pytest.approx(logprobs.max().item()))
        assert other[1] == pytest.approx(logprobs.min().item())


def test_broken_logits_are_refused(model):
    model.head = torch.nn.Linear(V, V, bias=False).requires_grad_(False)
    model.head.weight.fill_(float("nan"))
    with pytest.raises(InputError, match="training diverged"):
        start_batch(model, [[1]], FRUIT).step()
    with pytest.raises(InputError, match="training diverged"):
        generate(model, torch.tensor([[1]]), FRUIT)


# --- text, piece by piece


def wordpiece():
    tokenizer = Tokenizer(models.WordPiece(WORDS, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def byte_level():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({byte: i for i, byte in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def metaspace():
    pieces = [
        ("<unk>", 0.0),
        ("▁the", -1.0),
        ("▁cat", -2.0),
        ("s", -3.0),
        ("▁", -3.5),
        ("▁▁", -4.0),
    ]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


def bytes_as_fallback():
    "As in Llama: characters that have no token are written as bytes."
    names = ["▁the", "▁cat", "s", "▁", *(f"<0x{byte:02X}>" for byte in "☃é".encode())]
    vocab = {name: i for i, name in enumerate(dict.fromkeys(names))}
    tokenizer = Tokenizer(models.BPE(vocab, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return tokenizer


def word_ends():
    tokenizer = Tokenizer(models.BPE({"the</w>": 0, "ca": 1, "t</w>": 2, ".</w>": 3}, []))
    tokenizer.decoder = decoders.BPEDecoder()
    return tokenizer


def special_tokens():
    "Some are left out of the text; the words beside them keep their space."
    tokenizer = wordpiece()
    tokenizer.add_special_tokens(["[CLS]", "[SEP]"])
    return tokenizer


KINDS = [wordpiece, byte_level, metaspace, bytes_as_fallback, word_ends, special_tokens]


def join_pieces(tokenizer, ids, before=(), stop=()):
    decoder = StreamDecoder(tokenizer, stop, before)
    pieces = []
    for i in ids:
        pieces.append(decoder.add(i))
        if decoder.stopped:
            break
    return "".join([*pieces, decoder.end()])


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_pieces_join_to_the_text(kind):
    "Random tokens, piece by piece and at once, after nothing and after a prompt."
    tokenizer, rng = kind(), random.Random(0)
    for _ in range(300):
        ids = rng.choices(range(tokenizer.get_vocab_size()), k=rng.randint(1, 10))
        if kind is bytes_as_fallback:  # its bytes have to be characters
            groups = [tokenizer.encode(c).ids for c in "☃é"] + [[0], [1], [2], [3]]
            ids = [i for group in rng.choices(groups, k=6) for i in group]
        at = rng.randint(0, len(ids))
        whole, prompt = tokenizer.decode(ids), tokenizer.decode(ids[:at])
        assert join_pieces(tokenizer, ids) == whole
        if whole.startswith(prompt) and not prompt.endswith("\ufffd"):
            assert prompt + join_pieces(tokenizer, ids[at:], ids[:at]) == whole


def test_words_keep_their_spaces(model):
    "WordPiece writes a space between two words, but a word by itself has none."
    tokenizer = wordpiece()
    sentence = "the cats sat on the mat."
    ids = tokenizer.encode(sentence).ids
    assert tokenizer.decode(ids) == sentence == join_pieces(tokenizer, ids)
    assert " sat on the mat." == join_pieces(tokenizer, ids[3:], ids[:3])
    assert "the cats" == join_pieces(tokenizer, ids, stop=[" sat"])
    cfg = SampleConfig(max_new_tokens=12, seed=2, logit_bias={0: -100.0, 9: -100.0, 10: -100.0})
    wanted = generate(model, torch.tensor([tokenizer.encode("the cat").ids]), cfg)[0].tolist()
    text = complete(model, tokenizer, "the cat", cfg)[0]
    assert (
        text
        == tokenizer.decode(wanted)
        == "the cat" + "".join(stream(model, tokenizer, "the cat", cfg))
    )


def test_half_a_character_waits():
    tokenizer = byte_level()
    ids = tokenizer.encode("a☃é").ids
    decoder = StreamDecoder(tokenizer)
    assert [decoder.add(i) for i in ids] == ["a", "", "", "☃", "", "é"]
    decoder = StreamDecoder(tokenizer)
    assert decoder.add(ids[1]) == "" and decoder.end() == "\ufffd"  # the rest never came
    # a prompt may end in the middle of one: what follows is given as it is
    assert join_pieces(tokenizer, ids[2:], ids[:2]) == tokenizer.decode(ids[2:])


def test_bytes_that_are_no_text():
    "They cannot take back what was handed out, and what follows them is whole again."
    tokenizer = bytes_as_fallback()
    snowman = tokenizer.encode("☃").ids
    assert len(snowman) == 3
    ids = [0, *snowman, snowman[0], 2, 1]  # "the☃", half of another one, "s cat"
    assert tokenizer.decode(ids).endswith("s cat")
    assert join_pieces(tokenizer, ids).startswith("the☃")
    assert join_pieces(tokenizer, ids).endswith("s cat")


@pytest.mark.parametrize("kind", [byte_level, wordpiece], ids=lambda kind: kind.__name__)
def test_nothing_of_a_stop_string(kind):
    "What comes out is the text before the stop string that is complete first."
    tokenizer, rng = kind(), random.Random(1)
    letters = "ab☃ " if kind is byte_level else ["the", " cat", "s", " sat", " on", "."]
    for _ in range(300):
        ids = tokenizer.encode("".join(rng.choices(letters, k=10))).ids
        text = tokenizer.decode(ids)
        stop = [text[i : i + rng.randint(1, 4)] or "x" for i in rng.choices(range(len(text)), k=2)]
        beginnings = [tokenizer.decode(ids[: n + 1]) for n in range(len(ids))]
        met = [s for s in beginnings if any(each in s for each in stop)]
        wanted = met[0][: min(met[0].find(each) for each in stop if each in met[0])]
        assert join_pieces(tokenizer, ids, stop=stop) == wanted, (text, stop)


# --- bytes decide


def several_bytes():
    "Byte-level, with tokens of two and three bytes that begin and end anywhere, and a special one."
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    letter = {byte: each for each, byte in byte_table().items()}
    more = [
        b" \xe2\x80",
        b"\x94 ",
        b"\x9f\x98",
        b"\x8aab",
        b"\xf0\x9f",
        b"the",
        b"\xed\xa0",
        b"\xc3",
    ]
    names = ["".join(letter[b] for b in each) for each in more]
    vocab = {each: i for i, each in enumerate(dict.fromkeys([*letters, *names]))}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    return tokenizer


SEVERAL = several_bytes()
BYTE = {token_bytes(SEVERAL, i): i for i in range(SEVERAL.get_vocab_size())}
# any token, but often one whose bytes are a part of a character
TOKENS = st.lists(
    st.integers(0, SEVERAL.get_vocab_size() + 1) | st.sampled_from(sorted(BYTE.values())[-9:])
)


@given(TOKENS)
def test_any_tokens_whole_and_streamed(ids):
    "The pieces join to what decoding the whole gives, and no more than three bytes ever wait."
    decoder = StreamDecoder(SEVERAL)
    pieces = []
    for n, token in enumerate(ids, 1):
        pieces.append(decoder.add(token))
        assert len(decoder.pending) <= 3
        beginning = SEVERAL.decode(ids[:n])
        assert "".join(pieces) + "\ufffd" * bool(decoder.pending) == beginning
    assert "".join([*pieces, decoder.end()]) == SEVERAL.decode(ids)


@given(TOKENS, TOKENS)
def test_any_tokens_after_any_prompt(prompt, ids):
    "By itself, or joined to the prompt: then a character may begin there."
    assert join_pieces(SEVERAL, ids, prompt) == SEVERAL.decode(ids)
    decoder = StreamDecoder(SEVERAL, before=prompt, join=True)
    text = SEVERAL.decode(prompt)
    text = text[:-1] if decoder.pending else text
    text += "".join([decoder.add(i) for i in ids]) + decoder.end()
    assert text == SEVERAL.decode(prompt + ids)


@given(TOKENS)
def test_where_any_token_begins(ids):
    decoder, text, starts = ByteDecoder(SEVERAL), "", []
    for token in ids:
        piece = decoder.add(token)
        starts.append(len(text) + decoder.start)
        text += piece
    text += decoder.end()
    assert starts == sorted(starts)
    for token, at in zip(ids, starts):
        own = SEVERAL.decode([token])
        if "\ufffd" not in own:
            assert text[at : at + len(own)] == own


@given(TOKENS, st.lists(st.text("ab \u2014\U0001f60a\xe9", min_size=1, max_size=3), max_size=3))
def test_any_tokens_and_stop_strings(ids, stop):
    "They are found as soon as their bytes are there."
    written, wanted = b"", None
    for n, token in enumerate(ids, 1):
        written += token_bytes(SEVERAL, token)
        ends = [at for s in stop if (at := written.find(s.encode())) >= 0]
        if ends:
            wanted = n, written[: min(ends)].decode(errors="replace")
            break
    decoder, pieces = StreamDecoder(SEVERAL, stop), []
    for n, token in enumerate(ids, 1):
        pieces.append(decoder.add(token))
        if decoder.stopped:
            assert wanted == (n, "".join(pieces)) and decoder.end() == ""
            return
    assert wanted is None and "".join([*pieces, decoder.end()]) == SEVERAL.decode(ids)


def test_bytes_that_cannot_become_a_character():
    "Each leaves at once, however many there are."
    decoder = StreamDecoder(SEVERAL)
    assert [decoder.add(BYTE[b"\x80"]) for _ in range(100)] == ["\ufffd"] * 100
    assert not decoder.pending and decoder.end() == ""


class Forced(MockModel):
    "Writes these tokens of a byte-level tokenizer, one after the other."

    cfg = SimpleNamespace(
        vocab_size=300, seq_len=CONTEXT, num_layers=1, num_heads=1, head_dim=1, embed_dim=1
    )
    head = SimpleNamespace(weight=torch.eye(300))

    def __init__(self, tokens):
        super().__init__()
        self.tokens = iter(tokens)

    def hidden(self, ids, cache):
        cache.reserve(ids.shape[1])
        token = next(self.tokens)
        return torch.nn.functional.one_hot(torch.full(ids.shape, token), 300).float()


@pytest.mark.parametrize("most", [1, 5])
def test_stop_beside_half_a_character(most):
    "A space and half of a dash in one token: nothing of it is written, also at the last token."
    for stop in (" ", "<|endoftext|> ", "x"):
        model = Forced([BYTE[b" \xe2\x80"]] * 5)
        cfg = SampleConfig(most, temperature=0.0, stop=[stop])
        batch = start_batch(model, [[1]], cfg, SEVERAL)
        row, text = batch.rows[0], "".join(token.text for token in batch.run())
        if stop == " ":
            assert (text, row.finish_reason, len(row.written)) == ("", "stop", 1)
        else:
            assert (text, row.finish_reason) == (SEVERAL.decode(row.written), "length")


def test_stop_at_a_special_token():
    "By its name: the token ends the text, and so do the characters."
    special = SEVERAL.token_to_id("<|endoftext|>")
    spelled = [BYTE[bytes([b])] for b in b"<|endoftext|>"]
    for end in ([special], spelled):
        model = Forced([BYTE[b"a"], *end, BYTE[b"b"], BYTE[b"b"]])
        cfg = SampleConfig(15, temperature=0.0, stop=["z", "<|endoftext|>"])
        batch = start_batch(model, [[1]], cfg, SEVERAL)
        row, text = batch.rows[0], "".join(token.text for token in batch.run())
        assert (text, row.finish_reason, len(row.written)) == ("a", "stop", 1 + len(end))


def test_a_prompt_is_text():
    "Whatever it looks like, and whoever opened the tokenizer."
    tokenizer = byte_level()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    text = "a<|endoftext|>"
    assert len(tokenizer.encode(text).ids) == 2
    ids = encode_prompt(tokenizer, text)
    assert len(ids) == 14 and tokenizer.decode(ids) == text


# --- one row that cannot go on


class Poisoned(MockModel):
    "A prompt with token 9 in it makes its keys, and all that comes of them, no numbers."

    def hidden(self, ids, cache):
        cache.reserve(ids.shape[1])
        values = ids.float()
        if ids.shape[1] > 1:
            values[ids == 9] = float("nan")
        keys, _, mask = cache.layer(0).append(*[values[:, None, :, None]] * 2)
        weights = torch.arange(1, keys.shape[2] + 1)
        sums = (mask[:, 0] * weights * (keys[:, 0, :, 0] + 1)[:, None]).sum(dim=-1)  # (B, T)
        logits = torch.nn.functional.one_hot(sums.nan_to_num().long() % V, V).float()
        return logits.masked_fill(sums.isnan()[..., None], float("nan"))


@pytest.mark.parametrize("bad", [[5], [15], [0, 7, 15]])
def test_one_row_that_is_no_number(bad):
    "It gets an error, and the others go on; so does a new text in its place."
    prompts = [[1, i % 8, 2] for i in range(16)]
    for i in bad:
        prompts[i] = [1, 9, 2]
    batch = Batch(Poisoned(), 16)
    rows = [batch.add(prompt, FRUIT) for prompt in prompts]
    with pytest.raises(InputError, match="not finite"):
        list(batch.run())
    for i, row in enumerate(rows):
        if i in bad:
            assert row.error and row.written == [] and row.finish_reason is None
        else:
            assert row.ids == continued(prompts[i], 6) and not row.error
    again = [batch.add([1, i % 8, 2], FRUIT) for i in range(16)]  # where a NaN was
    assert finish(batch) == [continued([1, i % 8, 2], 6) for i in range(16)]
    assert not any(row.error for row in again)
    batch.add([1, 9, 2], FRUIT)
    with pytest.raises(InputError, match="not finite"):
        batch.step()  # no row is left
    assert batch.rows == []


# --- choices that rounding cannot change


@pytest.fixture(scope="module")
def tiny():
    return load_run("tiny")


def beside_others(batch, prompt, cfg, others):
    "What a row writes in this batch, with others of all lengths beside it."
    row = batch.add(prompt, cfg)
    for n in range(1, others + 1):
        batch.add(list(range(n, 3 * n)), cfg, n)
    finish(batch)
    return row.ids


@pytest.mark.parametrize("seed, prompt", [(33334, " = The"), (5, "A village"), (77, "1839")])
def test_the_same_seed_beside_others(tiny, seed, prompt):
    "In float32 too: where rounding could change a choice, it is made in float64."
    ids, cfg = encode_prompt(tiny.tokenizer, prompt), SampleConfig(max_new_tokens=120, seed=seed)
    exact = beside_others(Batch(float64_copy(tiny.model), 1), ids, cfg, 0)
    for others in (0, 15):
        assert beside_others(Batch(tiny.model, 16), ids, cfg, others) == exact


CONTROLS = [
    {},
    dict(temperature=0.0),
    dict(temperature=0.3, min_p=0.2),
    dict(temperature=1.7, top_k=5),
    dict(top_k=50, top_p=0.6),
    dict(top_p=0.95, temperature=2.0),
    dict(typical_p=0.8),
    dict(top_k=30, top_p=0.9, min_p=0.02, typical_p=0.9, temperature=1.3),
    dict(repetition_penalty=1.4, temperature=0.0),
    dict(repetition_penalty=0.7, frequency_penalty=0.5, presence_penalty=-0.3),
    dict(logit_bias={5: 3.0, 7: -math.inf}, top_p=0.9),
    dict(logit_bias={5: math.inf, 6: math.inf}),
]


@pytest.mark.parametrize("settings", CONTROLS, ids=str)
def test_what_is_not_in_doubt_cannot_change(settings):
    "Logits are moved by anything up to the bound, at random and as badly as one can."
    torch.manual_seed(0)
    cfg, B, V = SampleConfig(**settings), 500, 90
    ids, counts = torch.randint(V, (B, 12)), torch.randint(3, (B, V))
    doubts = 0.0
    for scale, size in ((1.0, 0.01), (4.0, 0.002), (4.0, 0.05), (0.1, 0.001)):
        logits = torch.randn(B, V).double() * scale
        u, error = torch.rand(B).double(), torch.full((B, 1), size).double()
        args = ids, cfg, u, counts
        tokens, in_doubt = sample_tokens(logits, *args, error)
        doubts += in_doubt.double().mean().item() / 4
        for moved in (
            torch.rand(B, V) * 2 - 1,
            torch.randn(B, V).sign(),
            torch.where(torch.arange(V) < torch.randint(V, (B, 1)), 1.0, -1.0),
            -torch.where(torch.arange(V) <= tokens[:, None], 1.0, -1.0),
            torch.where(torch.arange(V) < tokens[:, None], 1.0, -1.0),
            -logits.sign(),
        ):
            changed = sample_tokens(logits + moved * error, *args)[0]
            assert changed[~in_doubt].equal(tokens[~in_doubt])
    assert doubts < 0.9
    exactly = sample_tokens(logits, *args, torch.zeros(B, 1).double())
    assert exactly[0].equal(sample_tokens(logits, *args)[0])


@pytest.mark.parametrize("settings", CONTROLS, ids=str)
def test_settled_choices_are_always_the_same(tiny, monkeypatch, settings):
    "With a bound so wide that many choices are in doubt, and logits that are anywhere within it."
    monkeypatch.setattr(engine, "ROUNDINGS", 20_000)
    cfg = SampleConfig(max_new_tokens=40, seed=3, **settings)
    prompt = encode_prompt(tiny.tokenizer, " = The")
    wanted = beside_others(Batch(float64_copy(tiny.model), 1), prompt, cfg, 0)
    torch.manual_seed(0)
    asked = 0

    class Rounded(Batch):
        def read(self):
            logits = super().read()
            return logits + (torch.rand_like(logits) * 1.8 - 0.9) * engine.error_bound(logits)

        def exact_logits(self, row):
            nonlocal asked
            asked += 1
            return super().exact_logits(row)

    for others in (0, 3):
        assert beside_others(Rounded(tiny.model, 4), prompt, cfg, others) == wanted
    assert asked < 5 * 40


def test_float64_logits_of_a_window_that_jumps(tiny):
    "The float64 cache of a row begins again with the window, and gives what reading it gives."
    batch, context = Batch(tiny.model, 2), tiny.model.cfg.seq_len
    twin = float64_copy(tiny.model)
    row = batch.add(list(range(context - 3)), SampleConfig(max_new_tokens=50))
    for n in range(50):
        window = row.ids[-window_length(len(row.ids), context) :]
        if n % 3 == 0:
            found = batch.exact_logits(row)[0]
            with torch.no_grad():
                torch.testing.assert_close(found, twin(torch.tensor([window]))[0, -1])
        batch.step()


def test_other_weights_are_left_as_they_are(tiny):
    "For them no bound is known: nothing is computed twice."
    half = copy.deepcopy(tiny.model).to(torch.bfloat16)
    for model in (half, float64_copy(tiny.model), MockModel()):
        assert not Batch(model, 1).is_plain
    assert Batch(tiny.model, 1).is_plain
