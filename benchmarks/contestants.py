"""One library doing one task in a process of its own, a step whenever it is told to; `python -m
benchmarks` starts several of them and lets them take turns.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext

import torch

LEARNING_RATE = 1e-3


def ids(*shape: int, vocab_size: int) -> torch.Tensor:
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(0))


def autocast(task: dict):
    return torch.autocast("cpu", torch.bfloat16) if task["precision"] == "bf16" else nullcontext()


def trainer(model, loss_of: Callable, task: dict, optimizer=None) -> Callable[[], None]:
    "A step as most people write it: loss, backward, clip, AdamW."
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    model.train()
    if task["compile"]:
        model = torch.compile(model)
    x, y = ids(task["B"], task["T"] + 1, vocab_size=task["V"]).unfold(1, task["T"], 1).unbind(1)

    def step():
        with autocast(task):
            loss = loss_of(model, x.contiguous(), y.contiguous())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def cross_entropy(logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())


def tinytransformer(task: dict) -> Callable[[], None]:
    from tinytransformer.devices import make_accelerator
    from tinytransformer.engine import start_batch
    from tinytransformer.fast import fast_loss, use_fast_kernels
    from tinytransformer.generate import SampleConfig
    from tinytransformer.loop import Objective, compute_gradients
    from tinytransformer.model import ModelConfig, Transformer
    from tinytransformer.train import TrainConfig, make_optimizer

    model = Transformer(
        ModelConfig(
            vocab_size=task["V"],
            seq_len=task["T"],
            embed_dim=task["C"],
            num_heads=task["H"],
            num_layers=task["L"],
            dropout=task["dropout"],
            tie_weights=True,
        )
    )
    use_fast_kernels(model)
    if task["task"] == "generate":
        prompts = ids(task["B"], task["prompt"], vocab_size=task["V"])
        settings = dict(temperature=0.0) if task["greedy"] else dict(temperature=0.8, top_k=50)
        if task["precision"] == "bf16":
            model = model.bfloat16()
        cfg = SampleConfig(max_new_tokens=task["new"], **settings)
        return lambda: list(start_batch(model.eval(), prompts.tolist(), cfg).run())
    cfg = TrainConfig(
        batch_size=task["B"], learning_rate=LEARNING_RATE, precision=task["precision"]
    )
    accelerator = make_accelerator(cfg)
    if task["compile"]:
        for block in model.blocks:
            block.compile()
    objective, optimizer = accelerator.prepare(
        Objective(model.train(), fast_loss), make_optimizer(model, cfg)
    )
    x, y = ids(task["B"], task["T"] + 1, vocab_size=task["V"]).unfold(1, task["T"], 1).unbind(1)

    def step():
        compute_gradients(objective, optimizer, x, y, cfg, accelerator)
        optimizer.step()

    return step


def transformers(task: dict) -> Callable[[], None]:
    from transformers import GPT2Config, GPT2LMHeadModel

    p = task["dropout"]
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=task["V"],
            n_positions=task["T"],
            n_embd=task["C"],
            n_head=task["H"],
            n_layer=task["L"],
            activation_function="relu",
            resid_pdrop=p,
            embd_pdrop=p,
            attn_pdrop=p,
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    if task["task"] == "generate":
        prompts = ids(task["B"], task["prompt"], vocab_size=task["V"])
        settings = (
            dict(do_sample=False)
            if task["greedy"]
            else dict(do_sample=True, temperature=0.8, top_k=50)
        )
        if task["precision"] == "bf16":
            model = model.bfloat16()
        model.eval()
        return lambda: model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=task["new"],
            min_new_tokens=task["new"],
            pad_token_id=0,
            **settings,
        )
    return trainer(model, lambda m, x, y: cross_entropy(m(x).logits, y), task)


def karpathy(module: str, task: dict) -> Callable[[], None]:
    "nanoGPT and minGPT, from a checkout."
    sys.path.insert(0, task["checkout"])
    sizes, p = (
        dict(
            vocab_size=task["V"],
            block_size=task["T"],
            n_layer=task["L"],
            n_head=task["H"],
            n_embd=task["C"],
        ),
        task["dropout"],
    )
    if module == "nanoGPT":
        from model import GPT, GPTConfig

        model = GPT(GPTConfig(**sizes, dropout=p, bias=True))
        optimizer = model.configure_optimizers(0.1, LEARNING_RATE, (0.9, 0.95), "cpu")
    else:
        from mingpt.model import GPT

        cfg = GPT.get_default_config()
        cfg.merge_from_dict(dict(sizes, model_type=None, resid_pdrop=p, embd_pdrop=p, attn_pdrop=p))
        model, train = (
            GPT(cfg),
            type(
                "Train", (), dict(weight_decay=0.1, learning_rate=LEARNING_RATE, betas=(0.9, 0.95))
            ),
        )
        optimizer = model.configure_optimizers(train)
    if task["task"] == "generate":
        prompts = ids(task["B"], task["prompt"], vocab_size=task["V"])
        if task["precision"] == "bf16":
            model = model.bfloat16()
        return lambda: model.eval().generate(
            prompts,
            task["new"],
            **(dict(top_k=1) if task["greedy"] else dict(temperature=0.8, top_k=50)),
        )
    return trainer(model, lambda m, x, y: m(x, y)[1], task, optimizer)


def x_transformers(task: dict) -> Callable[[], None]:
    from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper

    p = task["dropout"]
    model = TransformerWrapper(
        num_tokens=task["V"],
        max_seq_len=task["T"],
        tie_embedding=True,
        emb_dropout=p,
        attn_layers=Decoder(
            dim=task["C"],
            depth=task["L"],
            heads=task["H"],
            attn_dim_head=task["C"] // task["H"],
            attn_flash=True,
            attn_dropout=p,
            ff_dropout=p,
        ),
    )
    if task["task"] == "generate":
        wrapper, prompts = (
            AutoregressiveWrapper(model).eval(),
            ids(task["B"], task["prompt"], vocab_size=task["V"]),
        )
        if task["precision"] == "bf16":
            wrapper = wrapper.bfloat16()
        settings = (
            dict(temperature=0.0)
            if task["greedy"]
            else dict(temperature=0.8, filter_kwargs=dict(k=50), filter_logits_fn="top_k")
        )
        return lambda: wrapper.generate(prompts, task["new"], cache_kv=True, **settings)
    return trainer(model, lambda m, x, y: cross_entropy(m(x), y), task)


def litgpt(task: dict) -> Callable[[], None]:
    from litgpt import GPT, Config

    model = GPT(
        Config(
            block_size=task["T"],
            vocab_size=task["V"],
            padded_vocab_size=task["V"],
            n_layer=task["L"],
            n_head=task["H"],
            n_embd=task["C"],
            bias=True,
            rotary_percentage=0.0,
            parallel_residual=False,
            mlp_class_name="GptNeoxMLP",
            gelu_approximate="tanh",
        )
    )
    return trainer(model, lambda m, x, y: cross_entropy(m(x), y), task)


LIBRARIES = dict(
    tinytransformer=tinytransformer,
    transformers=transformers,
    nanoGPT=lambda task: karpathy("nanoGPT", task),
    minGPT=lambda task: karpathy("minGPT", task),
    **{"x-transformers": x_transformers},
    litgpt=litgpt,
)


def process_flags(whose: str):
    "Our own process-wide settings, for us or for a peer as well."
    if whose == "own":
        return nullcontext()
    from tinytransformer.devices import fast_products

    return fast_products()


def main() -> None:
    task = json.loads(sys.argv[1])
    answer, sys.stdout = sys.stdout, sys.stderr  # what libraries print goes elsewhere
    torch.set_num_threads(task["threads"])
    torch.manual_seed(0)
    with process_flags(task["flags"]):
        step = LIBRARIES[task["library"]](task)
        print("ready", file=answer, flush=True)
        for line in sys.stdin:
            began = time.perf_counter()
            step()
            print(
                json.dumps(
                    dict(
                        seconds=time.perf_counter() - began,
                        peak_mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10,
                    )
                ),
                file=answer,
                flush=True,
            )


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
