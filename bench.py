"""Speed of the operation, of decoding, of prefill, of training; beside it the machine's limits and
other programs.

    python bench.py layer|decode|prefill|train [--model DIR] [--dtype float32]

What stands in one table was measured in one run and in turn (of `train` adapters, then gates, each
row in a process of its own): a repetition times every row once, in an order of its own, so that
what else the machine does, and what the row before left in its caches, hits all of them alike.
Shown are the median of the repetitions and the quartiles around it; the last line is all of it as
JSON. transformers, peft and llama-cpp-python (with --gguf) are measured on the same weights,
adapters, prompts and threads where they are installed; nothing here needs them.
"""

import json
import os
import platform
import random
import statistics
import sys
import time
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from common.devices import DTYPES, find_device
from common.files import InputError, run_script, warn
from common.options import numbers, parse_command
from evaluation.peers import PEERS, HfDecoder, LlamaCpp, has
from evaluation.timed import (
    Decoder,
    InSubprocess,
    adapters_trainer,
    bytes_read,
    gates_trainer,
    hf_models,
    load,
    one_adapter_trainer,
    pool_sizes,
    prompts,
    with_adapters,
    with_requests,
)
from fast.compiled import MAX_DECODE_ROWS, can_compile, compile_function, mark_dynamic_tokens
from fast.kernels import alloc_B, lora_mix
from fast.matmul import linear
from fast.moe_lora import once
from kernels import BACKENDS
from pool.adapters import linear_shapes
from pool.load import compile_blocks


@dataclass
class Bench:
    """Options that all benchmarks share."""

    dtype: Literal["float32", "bfloat16"] = "bfloat16"  # of base, adapters and gates
    device: str = "auto"  # auto = cuda where there is one, else cpu
    threads: int = 0  # of the CPU, 0 = one a core
    repeats: int = 20  # repetitions of every row
    k: int = 2  # adapters a token uses
    r: int = 8  # rank of the adapters
    seed: int = 0  # of adapters, gates and inputs


@dataclass
class LayerBench(Bench):
    """Options of `bench.py layer`."""

    n: str = "1,4,32,256,1024"  # tokens
    width: str = "576x1536,2048x2048,4096x4096,4096x14336"  # in and out features of the Linear
    e: str = "4,28,128"  # adapters in the pool
    k: str = "1,2,4"  # adapters a token uses


@dataclass
class ModelBench(Bench):
    """Options of benchmarks of a whole model."""

    model: str = ""  # model folder, default tiny/
    peers: bool = True  # also transformers and peft, where they are installed


@dataclass
class RoutedBench(ModelBench):
    """Options of benchmarks of a model with adapters and gates."""

    pool: str = (
        ""  # pool folder with meteora_topK gates; default: random adapters, and gates that choose evenly
    )
    tasks: str = ""  # task folders whose prompts are used; default: random tokens
    e: str = "28"  # random adapters in the pool; several, as 4,28,128, are a row each
    gguf: str = ""  # the model as GGUF file of the same dtype, for llama-cpp-python


@dataclass
class DecodeBench(RoutedBench):
    """Options of `bench.py decode`."""

    context: int = 64  # tokens of the prompt
    tokens: int = 16  # tokens decoded in a repetition
    batch_size: int = 8  # requests decoded together, beside one by itself
    requests: int = (
        0  # requests with other retrieved adapters each, decoded together by RAMoLE's router, 0 = none
    )
    union: str = "12,28,48"  # how many adapters those are together; several are a row each


@dataclass
class PrefillBench(RoutedBench):
    """Options of `bench.py prefill`."""

    tokens: int = 512  # of the prompt
    shape: Literal["", "llama-3-8b"] = ""  # one block of these sizes with random weights, instead of --model


@dataclass
class TrainBench(ModelBench):
    """Options of `bench.py train`."""

    e: int = 8  # adapters trained at once
    gated: int = 28  # adapters under the gates that are trained
    tokens: int = 128  # of an example, half of them the response's
    tasks: str = (
        ""  # task folders: real examples, of 512 tokens at most, instead of random ones of one length
    )
    each: int = 1  # examples a step and adapter


# Measuring ----------------------------------------------------------------------------------------------------------


def in_turn(rows, repeats, before=lambda: None):
    """{name: function} -> {name: [seconds of each repetition]}; each runs twice in advance,
    uncounted, and `before` is called before each repetition."""
    for run in (*rows.values(), *rows.values()):
        run()
    wait = torch.cuda.synchronize if torch.cuda.is_initialized() else lambda: None
    seconds = {name: [] for name in rows}
    for _ in range(repeats):
        for name, run in random.sample(list(rows.items()), len(rows)):
            before(), wait()
            begin = time.perf_counter()
            run()
            wait()
            seconds[name].append(time.perf_counter() - begin)
    return seconds


def spread(seconds):
    """Median and quartiles in milliseconds."""
    low, median, high = (
        statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else seconds * 3
    )
    return {"ms": 1e3 * median, "low": 1e3 * low, "high": 1e3 * high}


class Limits(NamedTuple):
    """What the machine can do, measured in this run: bytes read and floating-point operations, a
    second."""

    bytes: float
    flops: float


def bandwidth(dtype, device):
    """Bytes a second that the best of several kernels reads from a buffer of 1 GiB, too large for
    most caches."""
    W = torch.ones(2**30 // 8192 // dtype.itemsize, 8192, dtype=dtype, device=device)
    x = W[0].clone()
    y = torch.empty(len(W), dtype=dtype, device=device)
    rows = {"sum": lambda: W.view(torch.int64).sum(), "max": W.max, "mv": lambda: torch.mv(W, x, out=y)}
    if can_compile(W.device):
        sums = torch.compile(lambda W, x: (W * x).sum(-1, dtype=torch.float32))
        rows["compiled"] = lambda: sums(W, x)
    return W.nbytes / min(min(times) for times in in_turn(rows, 9).values())


def arithmetic(dtype, device):
    """Floating-point operations a second of a large matmul."""
    a, b = torch.ones(2, 2048, 2048, dtype=dtype, device=device)
    return 2 * 2048**3 / min(in_turn({"matmul": lambda: linear(a, b)}, 9)["matmul"])


def card(args):
    """What a figure depends on besides the code, and the limits."""
    load = os.getloadavg()[0]
    if load > 0.5:
        warn(f"the machine is busy (load {load:.1f}): ratios may hold, times don't")
    return {
        "device": torch.cuda.get_device_name(args.device) if args.device.startswith("cuda") else "cpu",
        "processor": processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads(), "dtype": args.dtype,
        "load": round(load, 2), "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", *PEERS) if has(name)},
    }  # fmt: skip


def processor():
    """The CPU's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(": ")[2] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


# The operation ------------------------------------------------------------------------------------------------------


def bench_layer(args, limits):
    """One Linear with its adapters: every backend, by itself and in a compiled block, and how far
    auto's choice is from the best of them."""
    table = []
    dtype = DTYPES[args.dtype]
    widths = [numbers("--width", width, comma="x") for width in args.width.split(",")]
    if min(numbers("--k", args.k)) > max(numbers("--e", args.e)):
        raise InputError(f"--k is {args.k!r}, expected adapters that a token uses of the {args.e} of --e")
    if any(len(width) != 2 for width in widths):
        raise InputError(f"--width is {args.width!r}, expected pairs of in and out features as 576x1536")
    for (i, out), e, n, k in product(widths, *(numbers(f"--{name}", getattr(args, name)) for name in "enk")):
        if k > e:
            continue
        g = torch.Generator().manual_seed(args.seed)
        shapes = (out, i), (n, i), (e, args.r, i), (e, out, args.r)
        W, x, A, B = (torch.randn(shape, generator=g).to(args.device, dtype) for shape in shapes)
        idx = torch.rand(n, e, generator=g).topk(k).indices.to(args.device)
        weight = torch.full((n, k), 1 / k, device=args.device)
        scale = torch.ones(e, device=args.device)
        B = alloc_B(e, out, args.r, device=args.device, dtype=dtype).copy_(B)  # laid out as a pool's
        row = layer_row(args, x, W, A, B, scale, idx, weight)
        table.append({"i": i, "o": out, "e": e, "n": n, "k": k, **row})
        print(json.dumps(table[-1]), file=sys.stderr)
    return table


def layer_row(args, x, W, A, B, scale, idx, weight):
    """Milliseconds {"Linear": ms, backend: ms, "auto / best": ratio, ...}, the same again with
    "compiled" behind. The weights are in no cache: in a model the layers before have swept it."""
    rows = {"Linear": lambda: linear(x, W)}
    sweep = torch.ones(2**25, device=x.device).sum
    for backend in BACKENDS:
        rows[backend] = lambda backend=backend: lora_mix(x, A, B, scale, idx, weight, backend)
    if can_compile(x.device):
        torch._dynamo.reset()
        mark_dynamic_tokens(x, idx, weight, decode=len(x) <= MAX_DECODE_ROWS)
        for backend in ("auto", "bmm", "dense"):
            run = compile_function(
                lambda *inputs, backend=backend: lora_mix(inputs[0], A, B, scale, *inputs[1:], backend)
            )
            rows[f"{backend}, compiled"] = lambda run=run: run(x, idx, weight)
    with torch.inference_mode():
        row = {name: spread(times)["ms"] for name, times in in_turn(rows, args.repeats, sweep).items()}
    for kind in ("", ", compiled") if can_compile(x.device) else ("",):
        best = min(row[backend + kind] for backend in BACKENDS[1:] if backend + kind in row)
        row[f"auto / best{kind}"] = row[f"auto{kind}"] / best
    return row


# Decoding and prefill -----------------------------------------------------------------------------------------------


def bench_decode(args, limits):
    """Milliseconds a step, one request and `batch_size` of them; the limit is the bytes a step
    reads."""
    base = load(args)
    rows = {}
    facts = {}
    one, many = (prompts(args, b, args.context, base.config.vocab_size) for b in (1, args.batch_size))

    def row(name, run, b=1, size=None):
        rows[name] = run
        facts[name] = (b, size)

    def both(name, model):
        compile_blocks(model, True, saves=0, costs=0)
        row(name, Decoder(model, one, args.tokens), 1, bytes_read(model))
        row(f"{name}, batch", Decoder(model, many, args.tokens), args.batch_size)

    both("base", base)
    for e in pool_sizes(args):
        both(f"{e} adapters", with_adapters(args, e, folder=args.pool))
    for backend in ("auto", "loop"):
        model = with_adapters(args, e, backend, args.pool)
        row(f"{e} adapters, {backend}, not compiled", Decoder(model, one, args.tokens))
    if args.requests:
        ids = prompts(args, args.requests, args.context, base.config.vocab_size)
        row(
            f"{args.requests} requests, base",
            Decoder(base, ids, args.tokens),
            args.requests,
            bytes_read(base),
        )
        for union in numbers("--union", args.union):
            model = with_requests(args, union)
            row(
                f"{args.requests} requests, {union} adapters",
                Decoder(model, ids, args.tokens),
                args.requests,
                bytes_read(model),
            )
    for name, model, options in hf_models(args, e):
        row(name, HfDecoder(model, one, args.tokens, **options(1)))
        row(
            f"{name}, batch", HfDecoder(model, many, args.tokens, **options(args.batch_size)), args.batch_size
        )
    if args.gguf:
        row("llama.cpp", LlamaCpp(args.gguf, one, args.tokens))
    table = []
    for name, times in in_turn(rows, args.repeats).items():
        step = spread([s / args.tokens for s in times])
        b, size = facts[name]
        share = size and size / limits().bytes / step["ms"] * 1e3
        table.append(
            {"row": name, "batch": b, **step, "tokens/s": b / step["ms"] * 1e3, "of the limit": share}
        )
    return table


def bench_prefill(args, limits):
    """Milliseconds for a prompt of `tokens`; the limit is the arithmetic of the base's matmuls."""
    base = load(args)
    ids = prompts(args, 1, args.tokens, base.config.vocab_size)
    flops = 2 * args.tokens * sum(out * i for out, i in linear_shapes(base).values())

    def prefill(model):
        @torch.inference_mode()
        def run():
            cache = model.new_cache(*ids.shape)
            return model.head(model.model(ids, cache)[:, -1])

        return run

    compile_blocks(base, True, saves=0, costs=0)
    rows = {"base": prefill(base)}
    for e in pool_sizes(args):
        model = with_adapters(args, e, folder=args.pool)
        compile_blocks(model, True, saves=0, costs=0)
        rows[f"{e} adapters"] = prefill(model)
    for backend in ("auto", "loop"):
        rows[f"{e} adapters, {backend}, not compiled"] = prefill(with_adapters(args, e, backend, args.pool))
    for name, model, options in hf_models(args, e):
        rows[name] = HfDecoder(model, ids, **options(1)).prefill
    if args.gguf:
        rows["llama.cpp"] = LlamaCpp(args.gguf, ids).prefill
    table = [{"row": name, **spread(times)} for name, times in in_turn(rows, args.repeats).items()]
    for line in table:
        line |= {"tokens/s": args.tokens / line["ms"] * 1e3, "/ base": line["ms"] / table[0]["ms"]}
        line["of the limit"] = flops / limits().flops / line["ms"] * 1e3
    return table


# Training -----------------------------------------------------------------------------------------------------------


def bench_train(args, limits):
    """Milliseconds of an optimizer step, and tokens a second without the padding: `e` adapters at
    once, then the gates of `gated` adapters by the LM term and the gate term. peft trains one
    adapter after another, on as many examples a step."""
    learners = {f"{args.e} adapters": adapters_trainer}
    if args.peers and has("peft"):
        learners["transformers + peft, one by one"] = one_adapter_trainer
    gates = {
        f"gates of {args.gated}, {name}": partial(gates_trainer, backend=name) for name in ("auto", "loop")
    }
    table = []
    for group in (
        learners,
        gates,
    ):  # in turn, each in a process of its own: loop's memory makes others a tenth slower
        rows = {name: InSubprocess(make, args) for name, make in group.items()}
        for name, times in in_turn(rows, args.repeats).items():
            rates = [tokens / seconds for tokens, seconds in zip(rows[name].results[2:], times, strict=True)]
            table.append({"row": name, **spread(times), "tokens/s": statistics.median(rates)})
        for row in rows.values():
            row.pipe.close()
    return table


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
    """A value as a table shows it."""
    return "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


COMMANDS = {
    "layer": (LayerBench, bench_layer), "decode": (DecodeBench, bench_decode),
    "prefill": (PrefillBench, bench_prefill), "train": (TrainBench, bench_train),
}  # fmt: skip


def check_gguf(file, device):
    """Raises InputError where llama.cpp can't be timed."""
    if not Path(file).is_file():
        raise InputError(f"--gguf: {file}: no such file")
    if not has("llama-cpp-python"):
        raise InputError("--gguf needs a package that is not here: pip install llama-cpp-python")
    if device != "cpu":
        raise InputError(f"--gguf: llama.cpp is timed on the CPU, and --device is {device}")


def main():
    """The command: measures, prints the card, the table and all of it as JSON."""
    options = {name: cls for name, (cls, _) in COMMANDS.items()}
    command, args = parse_command(options, description="Time the operation, decoding, prefill or training.")
    for name, value in vars(args).items():
        least = 0 if name in ("threads", "seed", "requests") else 1
        if type(value) is int and not least <= value < 2**63:
            raise InputError(f"--{name}: expected {least} or more, found {value}")
    if args.threads > os.cpu_count():
        raise InputError(f"--threads is {args.threads}, expected at most {os.cpu_count()}, the cores")
    torch.set_num_threads(args.threads or os.cpu_count())
    args.device = find_device(args.device)
    if getattr(args, "gguf", ""):
        check_gguf(args.gguf, args.device)
    facts = card(args)
    about = (DTYPES[args.dtype], args.device)
    limits = once(lambda: Limits(bandwidth(*about), arithmetic(*about)))  # once all input is read
    table = COMMANDS[command][1](args, limits)
    show(facts | {"GB/s": round(limits().bytes / 1e9, 1), "GFLOP/s": round(limits().flops / 1e9)}, table)


if __name__ == "__main__":
    run_script(main)
