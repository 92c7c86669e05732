"""Speed of the operation, of decoding, of prefill, of training; beside it the machine's limits and other programs.

    python bench.py layer|decode|prefill|train [--model DIR] [--dtype float32]

What stands in one table was measured in one run and in turn: a repetition times every row once, so that whatever else
the machine does hits all of them alike. Shown are the median of the repetitions and the quartiles around it; the last
line is all of it as JSON. transformers, peft and llama-cpp-python (with --gguf) are measured on the same weights,
adapters, prompts and threads where they are installed; nothing here needs them.
"""

import json
import os
import platform
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F

from adapters import Adapter, Pool, linear_shapes, load_adapter, peft_config, read_pool, save_adapter
from baselines import Prompt
from compiled import possible
from config import parse_command
from files import InputError, run_script, warn
from generate import TINY
from kernels import SPELLINGS, choose, lora_mix
from model import DTYPES, KVCache, Llama, LlamaConfig, load_llama
from moe_lora import GateLoss, MeteoraGate, SampleGate, attach, attached, load_gates, parameters_of
from tasks import Example, encode, load_tasks
from tokenizer import Tokenizer
from train_adapters import AdaptersRun, adapters_step
from train_gates import GatesRun, gates_step

PEERS = ("transformers", "peft", "llama-cpp-python")


@dataclass
class Bench:
    dtype: Literal["float32", "bfloat16"] = "bfloat16"  # of base, adapters and gates
    threads: int = 0  # of the CPU, 0 = one a core
    repeats: int = 20  # repetitions of every row
    k: str = "2"  # adapters a token uses; several, as 1,2,4, in layer
    r: int = 8  # rank of the adapters
    seed: int = 0  # of adapters, gates and inputs


@dataclass
class LayerBench(Bench):
    n: str = "1,4,32,256,1024"  # tokens
    width: str = "576x1536,2048x2048,4096x4096,4096x14336"  # in and out features of the Linear
    e: str = "4,28,128"  # adapters in the pool
    k: str = "1,2,4"  # adapters a token uses


@dataclass
class ModelBench(Bench):
    model: str = ""  # model folder, default tiny/
    pool: str = ""  # pool folder with meteora_topK gates; default: random adapters, and gates that choose evenly
    tasks: str = ""  # task folders whose prompts are used; default: random tokens
    e: str = "28"  # random adapters in the pool; several, as 4,28,128, are a row each
    peers: bool = True  # transformers, and peft with random adapters, where they are installed


@dataclass
class DecodeBench(ModelBench):
    context: int = 64  # tokens of the prompt
    tokens: int = 16  # tokens decoded in a repetition
    batch_size: int = 8  # requests decoded together, beside one by itself
    gguf: str = ""  # the model as GGUF file of the same dtype, for llama-cpp-python


@dataclass
class PrefillBench(ModelBench):
    tokens: int = 512  # of the prompt
    shape: Literal["", "llama-3-8b"] = ""  # one block of these sizes with random weights, instead of --model
    gguf: str = ""  # the model as GGUF file of the same dtype, for llama-cpp-python


@dataclass
class TrainBench(ModelBench):
    e: str = "8"  # adapters trained at once
    gated: int = 28  # adapters under the gates that are trained
    tokens: int = 128  # of an example, half of them the response's
    each: int = 1  # examples a step and adapter


# Measuring ----------------------------------------------------------------------------------------------------------


def in_turn(rows, repeats):
    """{name: function} -> {name: [seconds of each repetition]}; each runs twice before, uncounted."""
    for run in (*rows.values(), *rows.values()):
        run()
    seconds = {name: [] for name in rows}
    for _ in range(repeats):
        for name, run in rows.items():
            begin = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - begin)
    return seconds


def spread(seconds):
    """Median and quartiles in milliseconds."""
    low, median, high = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else seconds * 3
    return {"ms": 1e3 * median, "low": 1e3 * low, "high": 1e3 * high}


def bandwidth(dtype):
    """Bytes a second that the best of several kernels reads from a buffer of 1 GiB, too large for most caches."""
    W = torch.ones(2**30 // 8192 // dtype.itemsize, 8192, dtype=dtype)
    x, y = torch.ones(8192, dtype=dtype), torch.empty(len(W), dtype=dtype)
    rows = {"sum": lambda: W.view(torch.int64).sum(), "max": W.max, "product": lambda: torch.mv(W, x, out=y)}
    if possible(torch.device("cpu")):
        product = torch.compile(lambda W, x: (W * x).sum(-1, dtype=torch.float32))
        rows["compiled"] = lambda: product(W, x)
    return W.nbytes / min(min(times) for times in in_turn(rows, 9).values())


def arithmetic(dtype):
    """Floating-point operations a second of a large product."""
    a, b = torch.ones(2, 2048, 2048, dtype=dtype)
    return 2 * 2048**3 / min(in_turn({"product": lambda: a @ b}, 9)["product"])


def card(o):
    """What a figure depends on besides the code, and the machine's limits in this run."""
    load = os.getloadavg()[0]
    if load > 0.5:
        warn(f"the machine is busy (load {load:.1f}): ratios may hold, times don't")
    return {
        "processor": processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads(), "dtype": o.dtype,
        "load": round(load, 2), "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", *PEERS) if has(name)},
        "GB/s": round(bandwidth(DTYPES[o.dtype]) / 1e9, 1),
        "GFLOP/s": round(arithmetic(DTYPES[o.dtype]) / 1e9),
    }  # fmt: skip


def processor():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(": ")[2] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def has(package):
    try:
        return bool(version(package))
    except PackageNotFoundError:
        return False


# Models, pools, prompts ---------------------------------------------------------------------------------------------

LLAMA_3_8B = {"vocab_size": 2048, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 1,
              "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}  # fmt: skip


def load(o):
    """The Llama of --model, or one block of --shape with random weights."""
    if not getattr(o, "shape", ""):
        return load_llama(o.model or TINY, DTYPES[o.dtype])
    model = Llama(LlamaConfig(**LLAMA_3_8B)).to(DTYPES[o.dtype])
    return model.requires_grad_(False).eval()


def random_pool(shapes, e, o):
    """e adapters of rank r on all Linears, and gates that choose among them evenly."""
    generator, dtype = torch.Generator().manual_seed(o.seed), DTYPES[o.dtype]
    adapters = []
    for index in range(e):
        A = {p: torch.randn(o.r, i, generator=generator) * 0.01 for p, (_, i) in shapes.items()}
        B = {p: torch.randn(out, o.r, generator=generator) * 0.01 for p, (out, _) in shapes.items()}
        A, B = ({p: y.to(dtype) for p, y in part.items()} for part in (A, B))
        config = peft_config(o.r, 2 * o.r, 0.0, sorted({p.rpartition(".")[2] for p in shapes}), "")
        adapters.append(Adapter(f"random{index}", A, B, dict.fromkeys(A, 2.0), config))
    gates = {p: torch.randn(e, i, generator=generator).to(dtype) for p, (_, i) in shapes.items()}
    return adapters, {p: MeteoraGate(G, int(o.k)).requires_grad_(False) for p, G in gates.items()}


def with_adapters(o, e, spelling="auto"):
    """A Llama like load()'s with adapters in it: those of --pool with their gates, or e random ones."""
    model = load(o)
    shapes = linear_shapes(model)
    if o.pool:
        folders = read_pool(o.pool).adapters
        pool = Pool.of([load_adapter(path, name, shapes) for name, path in folders.items()], shapes, DTYPES[o.dtype])
        gates = load_gates(Path(o.pool) / "gates" / f"meteora_top{o.k}.safetensors", pool, dtype=DTYPES[o.dtype])
    else:
        adapters, gates = random_pool(shapes, e, o)
        pool = Pool.of(adapters, shapes, DTYPES[o.dtype])
    asked = {path: SampleGate(gate) for path, gate in gates.items()}
    for gate in asked.values():  # as methods.py asks gates
        gate.set(None, None, torch.ones(64, dtype=torch.bool))
    attach(model, pool, asked, spelling)
    return model


def prompts(o, b, t, v):
    """Token ids (b, t): of the tasks' prompts, one after another until t are full, or random."""
    if not o.tasks:
        return torch.randint(3, v, (b, t), generator=torch.Generator().manual_seed(o.seed))
    tokenizer, folder = Tokenizer(o.model or TINY), read_pool(o.pool or o.model or TINY)
    tasks, rows = list(load_tasks(o.tasks, sorted(folder.adapters)).values()), []
    for row in range(b):
        ids, examples = [], tasks[row % len(tasks)].test
        for example in examples * (t // len(examples) + 1):
            ids += encode(tokenizer, folder.template, example).ids
        rows.append(ids[:t])
    return torch.tensor(rows)


# The operation ------------------------------------------------------------------------------------------------------


def bench_layer(o):
    """One Linear with its adapters: every spelling, and how far auto's choice is from the best of them."""
    table, dtype = [], DTYPES[o.dtype]
    for width in o.width.split(","):
        i, out = map(int, width.split("x"))
        g = torch.Generator().manual_seed(o.seed)
        W = torch.randn(out, i, generator=g).to(dtype)
        for e in numbers(o.e):
            A = torch.randn(e, o.r, i, generator=g).to(dtype)
            B = torch.randn(e, o.r, out, generator=g).to(dtype).transpose(1, 2)  # laid out as a pool's
            scale = torch.ones(e)
            for n in numbers(o.n):
                x = torch.randn(n, i, generator=g).to(dtype)
                for k in (k for k in numbers(o.k) if k <= e):
                    idx = torch.rand(n, e, generator=g).topk(k).indices
                    weight = torch.full((n, k), 1 / k)
                    table.append(
                        {"i": i, "o": out, "e": e, "n": n, "k": k, **layer_row(o, x, W, A, B, scale, idx, weight)}
                    )
                    print(json.dumps(table[-1]), file=sys.stderr)
    return table


def layer_row(o, x, W, A, B, scale, idx, weight):
    n, k = len(x), idx.shape[1]
    rows = {"Linear": lambda: F.linear(x, W)}
    for spelling in SPELLINGS[1:]:
        if spelling == "bmm" and n * k * o.r * sum(W.shape) * x.element_size() > 2**31:
            continue  # it would gather gigabytes
        rows[spelling] = lambda spelling=spelling: lora_mix(x, A, B, scale, idx, weight, spelling)
    seconds = in_turn(rows, o.repeats)
    medians = {name: spread(times)["ms"] for name, times in seconds.items()}
    best = min(ms for name, ms in medians.items() if name != "Linear")
    auto = choose(n, len(A), k)
    return {"auto": auto, "auto / best": medians[auto] / best, **medians}


def numbers(text):
    """ "1,2,4" -> [1, 2, 4]. Raises InputError."""
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise InputError(f"{text!r}: expected whole numbers with commas between them") from None


# Decoding and prefill -----------------------------------------------------------------------------------------------


class Decoder:
    """A model that goes on from `ids` (b, t) again and again, greedily; called, it decodes `tokens` for each row."""

    def __init__(self, model, ids, tokens):
        self.model, self.t, self.tokens = model, ids.shape[1], tokens
        self.cache = KVCache(model.config, len(ids), self.t + tokens, model.model.embed_tokens.weight.dtype)
        self.cache.steady = True
        with torch.inference_mode():
            self.first = model.head(model.model(ids, self.cache)[:, -1]).argmax(-1)

    @torch.inference_mode()
    def __call__(self):
        self.cache.lengths.fill_(self.t)
        self.cache.end, ids = self.t, self.first
        for _ in range(self.tokens):
            ids = self.model.head(self.model.model(ids[:, None], self.cache)[:, -1]).argmax(-1)
        return ids


def bytes_read(model):
    """What one token of one sequence has to read: every weight but the embedding's, gates, and k of e adapters."""
    tied = model.config.tie_word_embeddings
    total = sum(p.nbytes for name, p in model.named_parameters() if tied or "embed_tokens" not in name)
    for linear in attached(model).values():
        k, e = linear.gate.inner.k, len(linear.A)
        total += (linear.A.nbytes + linear.B.nbytes) * k // e
    return total


def bench_decode(o):
    """Milliseconds a step, one request and `batch_size` of them; the limit is the bytes a step reads."""
    base, rows, facts = load(o), {}, {}
    v = base.config.vocab_size

    def row(name, run, b, model=None):
        rows[name], facts[name] = run, {"batch": b, "bytes": bytes_read(model) if model else None}

    one, many = prompts(o, 1, o.context, v), prompts(o, o.batch_size, o.context, v)
    base.model.compile()
    row("base", Decoder(base, one, o.tokens), 1, base)
    row("base, batch", Decoder(base, many, o.tokens), o.batch_size)
    for e in numbers(o.e):
        model = with_adapters(o, e)
        model.model.compile()
        row(f"{e} adapters", Decoder(model, one, o.tokens), 1, model)
        row(f"{e} adapters, batch", Decoder(model, many, o.tokens), o.batch_size)
    row(f"{e} adapters, loop", Decoder(with_adapters(o, e, "loop"), one, o.tokens), 1)
    if o.peers:
        for name, model, options in hf_models(o, e):
            for suffix, ids in (("", one), (", batch", many)):
                names = [f"random{j % e}" for j in range(len(ids))]
                row(
                    name + suffix,
                    HfDecoder(model, ids, o.tokens, {"adapter_names": names} if options else {}),
                    len(ids),
                )
    if o.gguf:
        row("llama.cpp", LlamaCpp(o, one, o.tokens), 1)
    seconds = in_turn(rows, o.repeats)
    limit = bandwidth(DTYPES[o.dtype])
    table = []
    for name, times in seconds.items():
        step = spread([s / o.tokens for s in times])
        share = facts[name]["bytes"] and facts[name]["bytes"] / limit / step["ms"] * 1e3
        table.append(
            {
                "row": name,
                "batch": facts[name]["batch"],
                **step,
                "tokens/s": facts[name]["batch"] / step["ms"] * 1e3,
                "of the limit": share,
            }
        )
    return table


def bench_prefill(o):
    """Milliseconds for a prompt of `tokens`; the limit is the arithmetic of the products."""
    base = load(o)
    ids = prompts(o, 1, o.tokens, base.config.vocab_size)

    def prefill(model):
        @torch.inference_mode()
        def run():
            cache = KVCache(model.config, *ids.shape, model.model.embed_tokens.weight.dtype)
            return model.head(model.model(ids, cache)[:, -1])

        return run

    flops = 2 * o.tokens * sum(out * i for out, i in linear_shapes(base).values())
    base.model.compile()
    rows = {"base": prefill(base)}
    for e in numbers(o.e):
        model = with_adapters(o, e)
        model.model.compile()
        rows[f"{e} adapters"] = prefill(model)
    rows[f"{e} adapters, loop"] = prefill(with_adapters(o, e, "loop"))
    if o.peers and not o.shape:
        for name, model, options in hf_models(o, e):
            rows[name] = HfDecoder(model, ids, 0, {"adapter_names": ["random0"]} if options else {}).prefill
    if o.gguf:
        rows["llama.cpp"] = LlamaCpp(o, ids, 0).prefill
    seconds = in_turn(rows, o.repeats)
    limit = arithmetic(DTYPES[o.dtype])
    table = [{"row": name, **spread(times)} for name, times in seconds.items()]
    for line in table:
        line |= {"tokens/s": o.tokens / line["ms"] * 1e3, "/ base": line["ms"] / table[0]["ms"]}
        line["of the limit"] = flops / limit / line["ms"] * 1e3
    return table


# Training -----------------------------------------------------------------------------------------------------------


def bench_train(o):
    """Milliseconds of an optimizer step on random tokens, half of them a response's: `e` adapters at once, then the
    gates of `gated` adapters by the LM term and the gate term. peft trains one adapter on as many examples."""
    rows, tokens = {}, int(o.e) * o.each * o.tokens
    rows[f"{o.e} adapters"] = adapters_trainer(o, int(o.e))
    if o.peers and has("peft"):
        rows["transformers + peft, one adapter"] = hf_trainer(o, int(o.e) * o.each)
    for spelling in ("auto", "loop"):
        rows[f"gates of {o.gated}, {spelling}"] = gates_trainer(o, spelling)
    return [{"row": name, **spread(times), "tokens/s": tokens / statistics.median(times)}
            for name, times in in_turn(rows, o.repeats).items()]  # fmt: skip


def examples(o, names, count, v):
    """`count` examples of random tokens, of the tasks `names` in turn."""
    g = torch.Generator().manual_seed(o.seed)
    rows = torch.randint(3, v, (count, o.tokens), generator=g).tolist()
    return [Example(ids, o.tokens // 2, names[j % len(names)]) for j, ids in enumerate(rows)]


def trainer(params, step):
    """One optimizer step with `step`'s gradients of `params`."""
    optimizer = torch.optim.AdamW(params, lr=1e-4)

    def run():
        optimizer.zero_grad()
        step()
        optimizer.step()

    return run


def adapters_trainer(o, e):
    model = load(o)
    model.model.compile()
    adapters, _ = random_pool(linear_shapes(model), e, o)
    pool, gate = Pool.of(adapters, linear_shapes(model)), SampleGate()
    attach(model, pool, gate)
    model.train()
    params = [stack.requires_grad_() for stacks in (pool.A, pool.B) for stack in stacks.values()]
    picked, run = examples(o, pool.names, e * o.each, model.config.vocab_size), AdaptersRun(model="", tasks="", pool="")
    return trainer(params, lambda: adapters_step(model, pool, gate, picked, run))


def gates_trainer(o, spelling):
    model = with_adapters(replace(o, pool=""), o.gated, spelling)
    if spelling == "auto":
        model.model.compile()
    gates = {path: linear.gate.inner.float().requires_grad_() for path, linear in attached(model).items()}
    pool = SimpleNamespace(slot=lambda name: int(name.removeprefix("random")))
    picked = examples(o, [f"random{j}" for j in range(o.gated)], int(o.e) * o.each, model.config.vocab_size)
    run, loss = GatesRun(model="", tasks="", pool="", top_k=int(o.k)), GateLoss(gates)
    params = list(parameters_of(gates).values())
    return trainer(params, lambda: gates_step(model, pool, loss, Prompt(), picked, run))


def hf_trainer(o, count):
    """transformers and peft training one adapter of rank r on all Linears."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(o.model or TINY, dtype=DTYPES[o.dtype])
    targets = sorted({path.rpartition(".")[2] for path in linear_shapes(model)})
    model = get_peft_model(model, LoraConfig(r=o.r, lora_alpha=2 * o.r, target_modules=targets)).train()
    ids = torch.tensor([example.ids for example in examples(o, [""], count, model.config.vocab_size)])
    labels = ids.clone()
    labels[:, : o.tokens // 2] = -100
    return trainer(
        [p for p in model.parameters() if p.requires_grad], lambda: model(ids, labels=labels).loss.backward()
    )


# Other programs -----------------------------------------------------------------------------------------------------


def hf_models(o, e):
    """(name, model, whether it has adapters) of transformers' Llama, and of peft's with the same adapters."""
    if not has("transformers"):
        return
    from transformers import AutoModelForCausalLM

    def plain():
        return AutoModelForCausalLM.from_pretrained(o.model or TINY, dtype=DTYPES[o.dtype]).eval()

    yield "transformers", plain(), False
    if has("peft"):
        from peft import PeftModel

        with tempfile.TemporaryDirectory() as folder:
            for adapter in random_pool(linear_shapes(load(o)), e, o)[0]:
                save_adapter(adapter, Path(folder) / adapter.name)
            first, model = Path(folder) / "random0", plain()
            model = PeftModel.from_pretrained(model, first, adapter_name="random0", autocast_adapter_dtype=False)
            for j in range(1, e):
                model.load_adapter(Path(folder) / f"random{j}", f"random{j}", autocast_adapter_dtype=False)
        yield "peft, an adapter a request", model.eval(), True


class HfDecoder:
    """Decoder, with transformers' model and cache."""

    def __init__(self, model, ids, tokens, options):
        self.model, self.ids, self.tokens, self.options = model, ids, tokens, options
        self.out = self.prefill()

    @torch.inference_mode()
    def prefill(self):
        return self.model(self.ids, use_cache=True, logits_to_keep=1, **self.options)

    @torch.inference_mode()
    def __call__(self):
        cache, ids = self.out.past_key_values, self.out.logits[:, -1:].argmax(-1)
        if beyond := cache.get_seq_length() - self.ids.shape[1]:
            cache.crop(-beyond)
        for _ in range(self.tokens):
            ids = self.model(ids, past_key_values=cache, use_cache=True, **self.options).logits[:, -1:].argmax(-1)
        return ids


class LlamaCpp:
    """Decoder, with llama-cpp-python."""

    def __init__(self, o, ids, tokens):
        from llama_cpp import Llama as Program

        threads = torch.get_num_threads()
        self.ids, self.tokens = ids[0].tolist(), tokens
        self.program = Program(o.gguf, n_ctx=len(self.ids) + tokens + 8, n_batch=512, n_ubatch=512, n_threads=threads,
                               n_threads_batch=threads, verbose=False)  # fmt: skip
        self.prefill()

    def prefill(self):
        self.program.reset()
        self.program.eval(self.ids)

    def __call__(self):
        self.program.n_tokens = len(self.ids)
        for _ in range(self.tokens):
            logits = np.ctypeslib.as_array(self.program._ctx.get_logits(), shape=(self.program.n_vocab(),))
            self.program.eval([int(logits.argmax())])


# The command --------------------------------------------------------------------------------------------------------


def show(facts, table):
    """The card, the table as Markdown, and all of it in one line of JSON."""
    for name, value in facts.items():
        print(f"{name}: {value}")
    columns = list(dict.fromkeys(name for line in table for name in line))
    print("", "| " + " | ".join(columns) + " |", "|" + "---|" * len(columns), sep="\n")
    for line in table:
        print("| " + " | ".join(cell(line.get(name)) for name in columns) + " |")
    print(f"\n{json.dumps(facts | {'table': table})}")


def cell(value):
    return "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


def main():
    commands = {"layer": LayerBench, "decode": DecodeBench, "prefill": PrefillBench, "train": TrainBench}
    command, o = parse_command(commands, description="Time the operation, decoding, prefill or training.")
    torch.set_num_threads(o.threads or os.cpu_count())
    facts = card(o)
    show(
        facts,
        {"layer": bench_layer, "decode": bench_decode, "prefill": bench_prefill, "train": bench_train}[command](o),
    )


if __name__ == "__main__":
    run_script(main)
