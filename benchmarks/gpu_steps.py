"""What `python -m benchmarks.gpu run` measures, one function for each step.

The steps run in a worker process: `python -m benchmarks.gpu_steps work SETTINGS` reads the names of
steps from its standard input and answers on its standard output, one JSON object a line: a row as
soon as it is known, and how the step ended.
"""

import gc
import importlib.util
import json
import math
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import accelerate
import safetensors.torch
import torch
import transformers

from benchmarks.wikitext2 import word_perplexity
from tinytransformer.config import config_file, make_config, read_config
from tinytransformer.corpus import Corpus, load_corpus, processed_dir
from tinytransformer.data import DataConfig
from tinytransformer.devices import has_bf16, make_accelerator, memory_mb
from tinytransformer.engine import complete
from tinytransformer.fast import drop, fast_loss, head_loss
from tinytransformer.files import InputError, read_json, read_rows
from tinytransformer.generate import KVCache, SampleConfig, generate, next_logits
from tinytransformer.hf import to_hf
from tinytransformer.loop import Stopped, fit
from tinytransformer.model import ModelConfig, Transformer, count_parameters, next_token_loss
from tinytransformer.runs import load_run, near_floor, train_run
from tinytransformer.train import TrainConfig, evaluate, perplexities
from tinytransformer.variants import flops_per_token

ROOT = Path(__file__).resolve().parent.parent
RECIPE = "wikitext2-gpu"
CORPORA = ("tiny", "wikitext2", RECIPE)  # the configurations whose text the steps read
TOY_DATA = dict(articles=60, vocab_size=300)
TOY_MODEL = dict(seq_len=32, embed_dim=32, num_heads=2, num_layers=2)
TOY_TRAIN = dict(max_steps=6, eval_every=3, batch_size=4, warmup_steps=2)
# GPT-2's 124M; nanoGPT pads the vocabulary to a multiple of 64, so both libraries get that one
GPT2 = dict(vocab_size=50304, seq_len=1024, embed_dim=768, num_heads=12, num_layers=12)
# dense bf16 operations a second by the makers' data sheets; the first name found in the card's own
PEAKS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
}


class Skipped(Exception):
    "A step that cannot be taken here, and why."


class Enough(Exception):
    "As many training steps as were to be timed."


@dataclass
class Bench:
    "Where the steps find what they need, and whom they tell."

    folder: Path  # written by `python -m benchmarks.gpu prepare`
    runs: Path  # keeps the recipe's run, to be resumed
    device: torch.device
    toy: bool  # seconds on a CPU
    compile: bool  # False: compiled variants run without torch.compile
    report: Callable[[dict], None]  # gets each row at once

    def data(self, name: str) -> DataConfig:
        "The text of a configuration, as it lies in the folder."
        return data_config(self.folder, name, self.toy)

    def corpus(self, name: str) -> Corpus:
        return load_corpus(processed_dir(self.data(name)))

    def settings(self, name: str) -> tuple[DataConfig, ModelConfig, TrainConfig]:
        "The sections of a configuration."
        sections = read_config(config_file(name))
        model = make_config(ModelConfig, "model", sections["model"])
        train = make_config(TrainConfig, "train", sections["train"])
        if self.toy:
            model, train = replace(model, **TOY_MODEL), replace(train, **TOY_TRAIN)
        if not self.compile:
            train = replace(train, compile=False)
        return self.data(name), model, train

    @property
    def fast_precision(self) -> str:
        "In which `fit` trains here when it is asked for bf16."
        return "bf16" if has_bf16(self.device) else "fp32"

    def precisions(self) -> list[str]:
        "In which the checks are made; a CPU without bf16 can at least imitate it."
        return ["fp32", "bf16"] if self.toy or has_bf16(self.device) else ["fp32"]

    def compilations(self) -> list[bool]:
        "Eager, and compiled if that is not switched off."
        return [False, True] if self.compile else [False]

    def autocast(self, precision: str):
        bf16 = precision == "bf16"
        return torch.autocast(self.device.type, torch.bfloat16) if bf16 else nullcontext()

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def tidy(self) -> None:
        "Forget what the last step left in memory."
        gc.collect()
        torch._dynamo.reset()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def data_config(folder: Path, name: str, toy: bool) -> DataConfig:
    "The text of a configuration with its data in the prepared folder."
    where = dict(data_dir=str(folder / "data"))
    if toy:
        return DataConfig(**TOY_DATA, **where)
    return make_config(DataConfig, "data", read_config(config_file(name))["data"] | where)


def relative_error(found: Iterable[torch.Tensor], exact: Iterable[torch.Tensor]) -> float:
    "The norm of the difference by the norm of what is right, over all tensors together."
    pairs = [(a.detach().cpu().double(), b.detach().cpu().double()) for a, b in zip(found, exact)]
    off = sum((a - b).square().sum() for a, b in pairs)
    return (off / sum(b.square().sum() for _, b in pairs)).sqrt().item()


# ---- the machine ----


def product_rate(device: torch.device, dtype: torch.dtype, n: int) -> float:
    "Operations a second of one product of two n x n matrices, the best of five tries."
    a, b = torch.randn(2, n, n, device=device).to(dtype)
    times = []
    for _ in range(6):
        began = time.perf_counter()
        (a @ b).sum().item()  # waits for the product
        times.append(time.perf_counter() - began)
    return 2 * n**3 / min(times[1:])


def machine(bench: Bench) -> None:
    "What the numbers were measured on, and the best rate of its products."
    row = dict(
        python=platform.python_version(),
        torch=torch.__version__,
        transformers=transformers.__version__,
        accelerate=accelerate.__version__,
        cores=os.cpu_count(),
        device=f"{platform.machine()}, {os.cpu_count()} cores",
    )
    if bench.device.type == "cuda":
        card = torch.cuda.get_device_properties(bench.device)
        row |= dict(
            device=card.name,
            memory_gib=card.total_memory / 2**30,
            capability=f"{card.major}.{card.minor}",
            cuda=torch.version.cuda,
            peak_bf16=peak(bench.device),
        )
    bench.report(row)
    n = 256 if bench.toy else 8192
    for precision in bench.precisions():
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        rate = product_rate(bench.device, dtype, n)
        bench.report(dict(products=precision, flops_per_second=rate))


def peak(device: torch.device) -> float | None:
    "Operations a second by the data sheet, in bf16; None for a card that is not in the table."
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((rate for card, rate in PEAKS.items() if card in name), None)


# ---- correctness ----


def small_model(bench: Bench, name: str, **changes) -> Transformer:
    "An untrained model of a configuration's shape with at most two layers, on the CPU."
    data, model, _ = bench.settings(name)
    layers = min(2, model.num_layers)
    without = dict(dropout=0.0, attention_dropout=None, embedding_dropout=None)
    shape = dict(num_layers=layers, vocab_size=data.vocab_size) | without | changes
    torch.manual_seed(0)
    return Transformer(replace(model, **shape))


def random_tokens(bench: Bench, model: Transformer, batch_size: int) -> torch.Tensor:
    "(B, T + 1) ids on the CPU."
    shape = (batch_size, model.cfg.seq_len + 1)
    generator = torch.Generator().manual_seed(0)
    return torch.randint(model.cfg.vocab_size, shape, generator=generator)


def gradients(model: Transformer) -> list[torch.Tensor]:
    return [p.grad for p in model.parameters()]


def model_against_cpu(bench: Bench, name: str) -> None:
    "Logits and gradients on the device against float64 on the CPU."
    model = small_model(bench, name)
    tokens = random_tokens(bench, model, batch_size=2)
    x, y = tokens[:, :-1], tokens[:, 1:]
    exact = deepcopy(model).double()
    exact_logits = exact(x)
    next_token_loss(exact_logits, y).backward()
    limits = dict(fp32=(1e-5, 1e-4), bf16=(2e-2, 5e-2))
    for precision in bench.precisions():
        for compiled in bench.compilations():
            net = deepcopy(model).to(bench.device)
            if compiled:
                for block in net.blocks:
                    block.compile()
            with bench.autocast(precision):
                logits = net(x.to(bench.device))
                loss = fast_loss(net, x.to(bench.device), y.to(bench.device))
            loss.backward()
            errors = dict(
                logits=relative_error([logits], [exact_logits]),
                gradients=relative_error(gradients(net), gradients(exact)),
            )
            for limit, (what, error) in zip(limits[precision], errors.items()):
                bench.report(
                    dict(
                        what=f"{what} against the CPU in float64",
                        model=name,
                        precision=precision,
                        compiled=compiled,
                        relative_error=error,
                        limit=limit,
                        ok=error < limit,
                    )
                )


def loss_without_logits(bench: Bench) -> None:
    "The loss that never holds all logits and its gradients, against the plain loss in float64."
    N, C, V = (70, 32, 301) if bench.toy else (3000, 256, 50257)
    generator = torch.Generator().manual_seed(0)
    h, weight = (torch.randn(n, C, generator=generator) for n in (N, V))
    y = torch.randint(V, (N,), generator=generator)
    y[0] = (weight @ h[0]).argmin()
    cases = {"random targets": 1.0, "one target of probability below 1e-30": 40.0}
    for what, scale in cases.items():
        x = torch.cat([scale * h[:1], h[1:]]) / math.sqrt(C)
        exact = loss_and_gradients(x.double(), weight.double(), y, next_token_loss_of)
        for precision in bench.precisions():
            with bench.autocast(precision):
                found = loss_and_gradients(*(t.to(bench.device) for t in (x, weight, y)), head_loss)
            limit = 1e-5 if precision == "fp32" else 2e-2
            for part, a, b in zip(("loss", "gradients"), found, exact):
                if precision == "bf16" and scale > 1 and part == "gradients":
                    continue  # rounding such logits to bf16 changes the gradient itself
                error = relative_error(a, b)
                bench.report(
                    dict(
                        what=f"{part} without logits, {what}",
                        precision=precision,
                        relative_error=error,
                        limit=limit,
                        ok=error < limit,
                    )
                )


def next_token_loss_of(h: torch.Tensor, weight: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return next_token_loss(h @ weight.T, y)


def loss_and_gradients(
    h: torch.Tensor, weight: torch.Tensor, y: torch.Tensor, loss_function: Callable
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    h, weight = h[None].detach().requires_grad_(), weight.detach().requires_grad_()
    loss = loss_function(h, weight, y[None])
    loss.backward()
    return [loss.detach()], [h.grad, weight.grad]


@torch.no_grad()
def cached_against_uncached(bench: Bench) -> None:
    "Logits of a text read token by token with the cache, against one pass over all of it."
    for name in ("tiny", RECIPE):
        for precision in bench.precisions():
            model = small_model(bench, name).eval().to(bench.device)
            if precision == "bf16":
                model = model.bfloat16()
            x = random_tokens(bench, model, batch_size=3)[:, :-1].to(bench.device)
            T = x.shape[1]
            cache = KVCache(model, len(x), T)
            read = [next_logits(model, x[:, : T // 2], cache)]
            for t in range(T // 2, min(T, T // 2 + 16)):
                read.append(next_logits(model, x[:, t : t + 1], cache))
            whole = model(x)[:, T // 2 - 1 : T // 2 - 1 + len(read)]
            error = relative_error([torch.stack(read, dim=1)], [whole])
            limit = 1e-5 if precision == "fp32" else 3e-2
            bench.report(
                dict(
                    what="cached against uncached logits",
                    model=name,
                    precision=precision,
                    relative_error=error,
                    limit=limit,
                    ok=error < limit,
                )
            )


def dropout_seeds(bench: Bench) -> None:
    "Dropout draws the same mask for a seed and another for another one, and keeps the mean."
    x, p = torch.ones(10**6, device=bench.device), 0.2

    def drawn(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return drop(x, p)

    first, share = drawn(0), (drawn(0) == 0).double().mean().item()
    spread = math.sqrt(p * (1 - p) / len(x))
    checks = {
        "one seed, one mask": torch.equal(first, drawn(0)),
        "another seed, another mask": not torch.equal(first, drawn(1)),
        "the share dropped is p, within five standard errors": abs(share - p) < 5 * spread,
        "what is kept is divided by 1 - p": abs(first.max().item() - 1 / (1 - p)) < 1e-4,
    }
    for what, ok in checks.items():
        bench.report(dict(what=f"dropout: {what}", ok=ok))
    for compiled in bench.compilations():
        model = small_model(bench, RECIPE, dropout=0.2).to(bench.device)
        if compiled:
            for block in model.blocks:
                block.compile()
        tokens = random_tokens(bench, model, batch_size=2).to(bench.device)
        losses = []
        for seed in (0, 0, 1):
            torch.manual_seed(seed)
            losses.append(fast_loss(model, tokens[:, :-1], tokens[:, 1:]).item())
        bench.report(
            dict(
                what="dropout: a model's loss, once for a seed and different for another",
                compiled=compiled,
                losses=losses,
                ok=losses[0] == losses[1] != losses[2],
            )
        )


@contextmanager
def deterministic_algorithms(on: bool) -> Iterator[None]:
    "PyTorch's deterministic algorithms for the time of the block, where they are asked for."
    torch.use_deterministic_algorithms(on)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def repeated_and_resumed(bench: Bench, precision: str, compiled: bool, exact: bool) -> None:
    "Two trainings of the same settings, and a third that is killed and resumed."
    _, model, train = bench.settings(RECIPE if compiled else "tiny")
    layers = min(2, model.num_layers)
    model = replace(model, num_layers=layers, dropout=0.1, attention_dropout=0.1)
    compiled = compiled and bench.compile
    changes = dict(max_steps=12, eval_every=4, precision=precision, compile=compiled)
    settings = bench.data("tiny"), model, replace(train, **changes)
    with deterministic_algorithms(exact), TemporaryDirectory() as folder:
        whole, again, killed = (Path(folder) / name for name in ("whole", "again", "killed"))
        train_run(whole, *settings)
        train_run(again, *settings)
        train_and_be_killed(killed, settings, at_step=6, exact=exact)
        train_run(killed, *settings, resume=True)
        for what, run in {"two trainings": again, "killed and resumed": killed}.items():
            equal, difference, step = compare_runs(whole, run)
            bench.report(
                dict(
                    what=what,
                    precision=precision_of(run),
                    compiled=compiled,
                    deterministic_algorithms=exact,
                    equal_bytes=equal,
                    relative_difference=difference,
                    first_step_with_another_loss=step,
                    **(dict(ok=equal) if exact else {}),
                )
            )


def train_and_be_killed(run: Path, settings: tuple, at_step: int, exact: bool) -> None:
    "Train in a process of its own, which is killed by SIGKILL as it ends a step."
    sections = dict(zip(("data", "model", "train"), map(asdict, settings)))
    task = json.dumps(dict(run=str(run), at_step=at_step, exact=exact, **sections))
    command = [sys.executable, "-m", "benchmarks.gpu_steps", "killed", task]
    code = subprocess.run(command, cwd=ROOT).returncode
    if code != -signal.SIGKILL:
        raise RuntimeError(f"the training that was to be killed ended with {code}")


def killed_training(task: dict) -> None:
    "The process of `train_and_be_killed`."

    def kill(row: dict) -> None:
        if row["step"] == task["at_step"]:
            os.kill(os.getpid(), signal.SIGKILL)

    sections = (
        DataConfig(**task["data"]),
        ModelConfig(**task["model"]),
        TrainConfig(**task["train"]),
    )
    with deterministic_algorithms(task["exact"]):
        train_run(Path(task["run"]), *sections, log=kill)


def precision_of(run: Path) -> str:
    "In which a run was trained, whatever it was asked for."
    return read_json(run / "environment.json", list)[0]["precision"]


def compare_runs(a: Path, b: Path) -> tuple[bool, float, int | None]:
    "Whether the last weights are the same bytes, how far apart they are, and since which step."
    files = [run / "last" / "model.safetensors" for run in (a, b)]
    equal = files[0].read_bytes() == files[1].read_bytes()
    weights = [safetensors.torch.load_file(file) for file in files]
    difference = relative_error(*([w[name] for name in sorted(w)] for w in weights))
    losses = zip(*(read_rows(run / "metrics.jsonl") for run in (a, b)))
    step = next((one["step"] for one, other in losses if one["loss"] != other["loss"]), None)
    return equal, difference, step


# ---- trainings of the recipes ----


def train_recipe(bench: Bench, name: str, run: Path) -> None:
    "Train a configuration in the folder `run`, or go on with it; its validation curve as it comes."
    data, model, train = bench.settings(name)
    about = bench.corpus(name).about["validation"]
    began = time.perf_counter()

    def log(row: dict) -> None:
        if "val_loss" in row:
            seconds = time.perf_counter() - began
            units = perplexities(row["val_loss"], about)
            shown = ("step", "epoch", "loss", "val_loss", "tokens_per_second", "memory_mb")
            bench.report({key: row[key] for key in shown} | units | dict(seconds=seconds))

    if not (run / "summary.json").exists():
        resume = (run / "config.yaml").exists()
        try:
            train_run(run, data, model, train, resume=resume, log=log)
        except InputError as error:
            if not isinstance(error.__cause__, torch._dynamo.exc.TorchDynamoException):
                raise
            bench.report(dict(what="trained without torch.compile", reason=str(error)))
            resume = (run / "config.yaml").exists()
            train_run(run, data, model, replace(train, compile=False), resume=resume, log=log)
    report_run(bench, name, run)


def report_run(bench: Bench, name: str, run: Path) -> None:
    "What a complete run came to, on both ways of reading the validation split, and a text of it."
    found, corpus = load_run(run), bench.corpus(name)
    model = found.model.to(bench.device)
    stride = max(1, model.cfg.seq_len // 4)
    metrics = read_rows(run / "metrics.jsonl")
    each = found.config["train"]["batch_size"] * model.cfg.seq_len
    sliding = evaluate(model, corpus.streams["validation"], stride, loss=fast_loss)
    summary = read_json(run / "summary.json")
    kept = ("steps", "best_step", "val_loss", "word_perplexity", "floor", "fact_recall")
    bench.report(
        dict(what="complete run", parameters=count_parameters(model))
        | {key: summary[key] for key in kept if key in summary}
        | (dict(ok=near_floor(summary)) if name == "tiny" and not bench.toy else {})
        | dict(
            val_loss_sliding=sliding,
            stride=stride,
            test_word_perplexity=word_perplexity(model, corpus, "test"),
            training_seconds=sum(each / m["tokens_per_second"] for m in metrics),
            tokens_per_second=statistics.median(m["tokens_per_second"] for m in metrics),
            memory_mb=max(m["memory_mb"] for m in metrics),
            precision=precision_of(run),
            text=sample_text(found, model),
        )
    )


def sample_text(run, model: Transformer) -> str:
    cfg = SampleConfig(max_new_tokens=60, temperature=0.8)
    return complete(model, run.tokenizer, " =", cfg)[0]


def train_tiny(bench: Bench) -> None:
    "`tiny` to its floor, in a folder that is not kept."
    with TemporaryDirectory() as folder:
        train_recipe(bench, "tiny", Path(folder) / "tiny")


def train_wikitext2(bench: Bench) -> None:
    "The recipe for a GPU, in a folder beside the results, so that it can go on another time."
    train_recipe(bench, RECIPE, bench.runs / RECIPE)


# ---- speed ----


def gpt2_config(bench: Bench) -> ModelConfig:
    "The 124M shape."
    shape = TOY_MODEL | dict(vocab_size=TOY_DATA["vocab_size"]) if bench.toy else GPT2
    return ModelConfig(**shape, tie_weights=True, activation="gelu")


def batch_size(bench: Bench) -> int:
    "Texts in a step of the speed trainings: fewer on a card with little memory."
    if bench.toy:
        return 2
    if bench.device.type == "cuda":
        memory = torch.cuda.get_device_properties(bench.device).total_memory
        return 16 if memory > 40e9 else 4
    return 1


def speed_row(bench: Bench, library: str, compiled: bool, seconds: float) -> dict:
    "Tokens a second of training, the share of the card's peak, and the most memory it took."
    cfg, B = gpt2_config(bench), batch_size(bench)
    tokens = B * cfg.seq_len / seconds
    flops = 3 * sum(flops_per_token(cfg, cfg.seq_len).values()) * tokens
    best = peak(bench.device)
    return dict(
        what="training at the 124M shape",
        library=library,
        precision=bench.fast_precision,
        compiled=compiled and bench.compile,
        batch_size=B,
        seq_len=cfg.seq_len,
        seconds_per_step=seconds,
        tokens_per_second=tokens,
        flops_per_second=flops,
        mfu=best and flops / best,
        peak_memory_mb=memory_mb(bench.device),
    )


class StepClock:
    "Times the steps of a training after a few that warm up, and then profiles some more."

    def __init__(self, bench: Bench, timed: Callable[[float], None]):
        self.bench, self.timed, self.steps = bench, timed, 0
        self.warm_up, self.count, self.profiled = (1, 2, 1) if bench.toy else (5, 20, 5)
        activities = [torch.profiler.ProfilerActivity.CPU]
        if bench.device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self.profiler = torch.profiler.profile(activities=activities)

    def __call__(self, row: dict | None = None) -> None:
        "At the end of each step."
        self.steps += 1
        if self.steps == self.warm_up:
            self.bench.synchronize()
            self.began = time.perf_counter()
        if self.steps == self.warm_up + self.count:
            self.bench.synchronize()
            self.timed((time.perf_counter() - self.began) / self.count)
            self.profiler.start()
            self.began = time.perf_counter()
        if self.steps == self.warm_up + self.count + self.profiled:
            self.bench.synchronize()
            self.seconds = (time.perf_counter() - self.began) / self.profiled
            self.profiler.stop()
            raise Enough


def speed_ours(bench: Bench, compiled: bool) -> None:
    "Our own training loop, as `tinytransformer train` runs it."
    torch.manual_seed(0)
    corpus = bench.corpus("wikitext2")
    cfg = TrainConfig(
        max_steps=10**6,
        eval_every=10**6,
        batch_size=batch_size(bench),
        learning_rate=6e-4,
        min_learning_rate=6e-5,
        precision=bench.fast_precision,
        compile=compiled and bench.compile,
    )

    def timed(seconds: float) -> None:
        bench.report(speed_row(bench, "tinytransformer", compiled, seconds))

    clock = StepClock(bench, timed)
    try:
        fit(
            Transformer(gpt2_config(bench)),
            corpus,
            cfg,
            loss=fast_loss,
            log=clock,
            accelerator=make_accelerator(cfg),
        )
    except Enough:
        profile = profile_row(clock)
        bench.report(dict(library="tinytransformer", compiled=cfg.compile) | profile)


def nanogpt_module(bench: Bench):
    "The file model.py of the checkout in the folder."
    path = bench.folder / "nanoGPT" / "model.py"
    if not path.is_file():
        raise Skipped("the folder holds no nanoGPT: prepare it with --nanogpt PATH")
    spec = importlib.util.spec_from_file_location("nanogpt_model", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclass looks for itself there
    spec.loader.exec_module(module)
    return module


def nanogpt_batches(bench: Bench, stream: torch.Tensor, T: int) -> Iterator[list[torch.Tensor]]:
    "Random pieces of the text, copied to the GPU beside its work, as nanoGPT's train.py does."
    generator = torch.Generator().manual_seed(0)
    while True:
        starts = torch.randint(len(stream) - T, (batch_size(bench),), generator=generator)
        pieces = torch.stack([stream[s : s + T + 1].long() for s in starts.tolist()])
        pair = [pieces[:, :-1].contiguous(), pieces[:, 1:].contiguous()]
        if bench.device.type == "cuda":
            pair = [t.pin_memory() for t in pair]
        yield [t.to(bench.device, non_blocking=True) for t in pair]


def speed_nanogpt(bench: Bench, compiled: bool) -> None:
    "nanoGPT's model and optimizer in the loop of its train.py."
    module, cfg = nanogpt_module(bench), gpt2_config(bench)
    torch.manual_seed(0)
    sizes = dict(n_layer=cfg.num_layers, n_head=cfg.num_heads, n_embd=cfg.embed_dim)
    shape = module.GPTConfig(vocab_size=cfg.vocab_size, block_size=cfg.seq_len, bias=False, **sizes)
    model = module.GPT(shape).to(bench.device)
    optimizer = model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), bench.device.type)
    net = torch.compile(model) if compiled and bench.compile else model

    def timed(seconds: float) -> None:
        bench.report(speed_row(bench, "nanoGPT", compiled, seconds))

    clock = StepClock(bench, timed)
    pairs = nanogpt_batches(bench, bench.corpus("wikitext2").streams["train"], cfg.seq_len)
    x, y = next(pairs)
    with tf32_products():
        try:
            while True:
                with bench.autocast(bench.fast_precision):
                    _, loss = net(x, y)
                x, y = next(pairs)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                clock()
        except Enough:
            profile = profile_row(clock)
            bench.report(dict(library="nanoGPT", compiled=compiled and bench.compile) | profile)


@contextmanager
def tf32_products() -> Iterator[None]:
    "TF32 for products of float32, as nanoGPT's train.py allows it."
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def covered(spans: list[tuple[float, float]]) -> float:
    "The length of the union of spans (start, end)."
    total, reached = 0.0, -math.inf
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def profile_row(clock: StepClock) -> dict:
    """How long the GPU worked and idled in each profiled step, and how long the host waited for it.

    The profiler slows the host, so a step takes longer than without it.
    """
    events, steps = clock.profiler.events(), clock.profiled
    cuda = torch.autograd.DeviceType.CUDA
    spans = [(e.time_range.start, e.time_range.end) for e in events if e.device_type == cuda]
    waits = [e for e in events if "Synchronize" in e.name and e.device_type != cuda]
    items = [e for e in events if e.name == "aten::_local_scalar_dense"]
    row = dict(what="profile", milliseconds_per_step=1e3 * clock.seconds)
    if spans:
        busy = covered(spans) / 1e3 / steps  # the profiler counts microseconds
        waited = sum(e.time_range.end - e.time_range.start for e in waits) / 1e3 / steps
        row |= dict(
            gpu_busy_ms=busy,
            gpu_idle_ms=1e3 * clock.seconds - busy,
            host_waiting_ms=waited,
            synchronizations=len(waits) / steps,
            kernels=len(spans) / steps,
        )
    return row | dict(values_read_by_host=len(items) / steps)


# ---- writing ----


def write_texts(bench: Bench, texts: int) -> None:
    "Greedy texts by our `generate` and by transformers, the same weights in both, in turns."
    torch.manual_seed(0)
    cfg = gpt2_config(bench)
    ours = Transformer(cfg).eval()
    theirs = to_hf(ours).to(bench.device)
    ours = ours.to(bench.device)
    prompt, new = (4, 8) if bench.toy else (16, 128)
    prompts = torch.randint(cfg.vocab_size, (texts, prompt), device=bench.device)
    with torch.no_grad():
        error = relative_error([ours(prompts)], [theirs(prompts).logits])
    what = "logits against transformers, float32"
    bench.report(dict(what=what, texts=texts, relative_error=error, limit=1e-4, ok=error < 1e-4))
    if bench.fast_precision == "bf16":
        ours, theirs = ours.bfloat16(), theirs.bfloat16()
    writers = {
        "tinytransformer": partial(
            generate, ours, prompts, SampleConfig(max_new_tokens=new, temperature=0.0)
        ),
        "transformers": partial(
            theirs.generate,
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            pad_token_id=0,
        ),
    }
    rounds = timed_rounds(bench, writers, 1 if bench.toy else 3)
    for library in writers:
        seconds = statistics.median(r[library][0] for r in rounds)
        ratio = statistics.median(r[library][0] / r["tinytransformer"][0] for r in rounds)
        bench.report(
            dict(
                what="writing at the 124M shape",
                library=library,
                precision=bench.fast_precision,
                texts=texts,
                new_tokens=new,
                seconds=seconds,
                tokens_per_second=texts * new / seconds,
                times_ours=ratio,
                peak_memory_mb=max(r[library][1] for r in rounds),
            )
        )


def timed_rounds(bench: Bench, ways: dict[str, Callable], count: int) -> list[dict]:
    "Rounds in which each way is taken once, after one that warms up: its seconds and memory."
    rounds = []
    for _ in range(count + 1):
        rounds.append({})
        for name, way in ways.items():
            if bench.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            began = time.perf_counter()
            way()
            bench.synchronize()
            rounds[-1][name] = time.perf_counter() - began, memory_mb(bench.device)
    return rounds[1:]


# ---- the steps in their order ----


@dataclass(frozen=True)
class Step:
    "A measurement that can fail, hang or run out of time without taking the others down."

    part: str
    name: str
    seconds: float  # its time limit
    run: Callable[[Bench], None]
    fixed_workspace: bool = False  # CUBLAS_WORKSPACE_CONFIG, which PyTorch asks for, is set


def exact_step(name: str, seconds: float, run: Callable[[Bench], None]) -> Step:
    return Step("correctness", name, seconds, run, fixed_workspace=True)


def repeated(precision: str, compiled: bool, exact: bool) -> Step:
    name = f"repeated and resumed: {precision}, {'compiled' if compiled else 'eager'}"
    name += ", deterministic algorithms" if exact else ", without deterministic algorithms"
    run = partial(repeated_and_resumed, precision=precision, compiled=compiled, exact=exact)
    return Step("correctness", name, 75, run, fixed_workspace=exact)


STEPS = [
    Step("machine", "machine", 60, machine, fixed_workspace=True),
    exact_step("model: tiny", 75, partial(model_against_cpu, name="tiny")),
    exact_step(f"model: {RECIPE}", 90, partial(model_against_cpu, name=RECIPE)),
    exact_step("loss without logits", 45, loss_without_logits),
    exact_step("cache", 45, cached_against_uncached),
    exact_step("dropout", 60, dropout_seeds),
    repeated("fp32", compiled=False, exact=True),
    repeated("bf16", compiled=False, exact=True),
    repeated("bf16", compiled=True, exact=True),
    repeated("bf16", compiled=True, exact=False),
    Step("tiny", "tiny", 150, train_tiny),
    Step("speed", "tinytransformer, compiled", 90, partial(speed_ours, compiled=True)),
    Step("speed", "nanoGPT, compiled", 120, partial(speed_nanogpt, compiled=True)),
    Step("speed", "tinytransformer, eager", 45, partial(speed_ours, compiled=False)),
    Step("writing", "one text", 45, partial(write_texts, texts=1)),
    Step("writing", "64 texts", 60, partial(write_texts, texts=64)),
    Step("recipe", RECIPE, math.inf, train_wikitext2),
]


# ---- the worker ----


def finite(value: object) -> object:
    "The same with None for numbers that JSON does not know."
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def take_step(step: Step, bench: Bench) -> dict:
    "How a step ended."
    try:
        bench.tidy()
        step.run(bench)
    except Skipped as reason:
        return dict(end="skipped", error=str(reason))
    except Stopped as stopped:
        return dict(end="stopped", error=str(stopped))
    except Exception:
        return dict(end="failed", error=traceback.format_exc())
    return dict(end="done")


def work(settings: dict) -> None:
    "Take the steps whose names come in, and answer with their rows."
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries and child processes print goes to the log

    def tell(message: dict) -> None:
        print(json.dumps(finite(message), allow_nan=False), file=answers, flush=True)

    bench = Bench(
        folder=Path(settings["folder"]),
        runs=Path(settings["runs"]),
        device=torch.device(settings["device"]),
        toy=settings["toy"],
        compile=settings["compile"],
        report=lambda row: tell(dict(row=row)),
    )
    steps = {step.name: step for step in STEPS}
    tell(dict(ready=True))
    for line in sys.stdin:
        tell(take_step(steps[line.strip()], bench))


if __name__ == "__main__":
    dict(work=work, killed=killed_training)[sys.argv[1]](json.loads(sys.argv[2]))
