"""Speed of the operation, of decoding, of prefill and of training, beside the machine's limits.

    python bench.py layer|decode|prefill|train|methods|split [--model DIR] [--dtype float32]
    python bench.py cache [--adapters 1000] [--slots 8,32,128,512]

`split` holds the pool in a process of its own. `cache` needs no model: it counts how many requests
find their adapter in one of the pool's slots.

The rows of one table are measured in one run and in turn: a repetition times every row once, in a
random order, so that other load on the machine, and what the row before left in the caches, hits
all rows alike. (`train` measures adapters first, then gates, and runs each row in a process of its
own.) A table shows the median of the repetitions and the quartiles; the last line is all of it as
JSON. transformers, peft and, with --gguf, llama-cpp-python are measured on the same weights,
adapters, prompts and threads where they are installed; nothing here needs them.
"""

if __name__ == "__main__":  # Ctrl-C while torch is imported, which takes seconds, ends in one line
    from common.signals import end_at_once

    end_at_once()

import json
import os
import statistics
import sys
from collections.abc import Callable
from functools import partial
from itertools import product

import torch

from common.devices import DTYPES, check_memory, find_device
from common.endings import run_script
from common.files import InputError
from common.hub import find_folder
from common.options import numbers, parse_command
from common.printable import printable
from common.tables import markdown
from evaluation.bench_options import Bench, DecodeBench, LayerBench, PrefillBench, TrainBench
from evaluation.cache import CacheBench, bench_cache
from evaluation.measure import InSubprocess, Limits, arithmetic, bandwidth, card, in_turn, spread
from evaluation.peers import HfDecoder, LlamaCpp, check_gguf, has
from evaluation.split import SplitBench, bench_split
from evaluation.timed import (
    Decoder,
    adapters_trainer,
    bytes_read,
    gates_trainer,
    hf_models,
    load,
    one_adapter_trainer,
    pool_sizes,
    prefill,
    prompts,
    with_adapters,
    with_requests,
)
from evaluation.timed_methods import MethodsBench, bench_methods
from fast.compiled import MAX_DECODE_ROWS, can_compile, compile_function, mark_dynamic_tokens
from fast.kernels import alloc_B, lora_mix
from fast.matmul import linear
from fast.moe_lora import once
from kernels import BACKENDS
from pool.adapters import linear_shapes
from pool.load import TINY, compile_blocks

# The operation ------------------------------------------------------------------------------------------------------


def bench_layer(args: LayerBench, limits: Callable[[], Limits]) -> list[dict]:
    """One Linear with its adapters: every backend, by itself and in a compiled block, and auto's choice."""
    widths = [numbers("--width", width, comma="x") for width in args.width.split(",")]
    e_sizes = numbers("--e", args.e)
    n_sizes = numbers("--n", args.n)
    k_sizes = numbers("--k", args.k)
    if min(k_sizes) > max(e_sizes):
        raise InputError(f"--k is {args.k!r}, expected adapters that a token uses of the {args.e} of --e")
    if any(len(width) != 2 for width in widths):
        raise InputError(f"--width is {args.width!r}, expected pairs of in and out features as 576x1536")
    for i, o in widths:
        size = i * o + (max(n_sizes) + max(e_sizes) * args.r) * (i + o)  # of W, x, y, A and B
        check_memory(f"--width {i}x{o}", size * DTYPES[args.dtype].itemsize, args.device)
    table = []
    for (i, o), e, n, k in product(widths, e_sizes, n_sizes, k_sizes):
        if k <= e:
            table.append({"i": i, "o": o, "e": e, "n": n, "k": k, **layer_row(args, i, o, e, n, k)})
            print(json.dumps(table[-1]), file=sys.stderr)
    return table


def layer_row(args: LayerBench, i: int, o: int, e: int, n: int, k: int) -> dict[str, float]:
    """{"Linear": ms, backend: ms, "auto / best": ratio, ...}, then the same with ", compiled".

    The weights are in no cache: in a model the layers before have replaced them.
    """
    dtype = DTYPES[args.dtype]
    generator = torch.Generator().manual_seed(args.seed)
    shapes = (o, i), (n, i), (e, args.r, i), (e, o, args.r)
    W, x, A, B = (torch.randn(shape, generator=generator).to(args.device, dtype) for shape in shapes)
    B = alloc_B(e, o, args.r, device=args.device, dtype=dtype).copy_(B)  # in the layout of a pool's
    idx = torch.rand(n, e, generator=generator).topk(k).indices.to(args.device)
    weight = torch.full((n, k), 1 / k, device=args.device)
    scale = torch.ones(e, device=args.device)
    rows = {"Linear": lambda: linear(x, W)}
    for backend in BACKENDS:
        rows[backend] = partial(lora_mix, x, A, B, scale, idx, weight, backend)
    kinds = [""]
    if can_compile(x.device):
        kinds.append(", compiled")
        torch._dynamo.reset()
        mark_dynamic_tokens(x, idx, weight, decode=len(x) <= MAX_DECODE_ROWS)
        for backend in ("auto", "bmm", "dense"):

            def mix(x, idx, weight, backend=backend):
                return lora_mix(x, A, B, scale, idx, weight, backend)

            rows[f"{backend}, compiled"] = partial(compile_function(mix), x, idx, weight)
    sweep = torch.ones(2**25, device=x.device).sum  # reads 128 MiB, which empties the caches
    row = {}
    with torch.inference_mode():
        for name, times in in_turn(rows, args.repeats, sweep).items():
            row[name] = spread(times)["ms"]
    for kind in kinds:
        best = min(row[backend + kind] for backend in BACKENDS[1:] if backend + kind in row)
        row[f"auto / best{kind}"] = row[f"auto{kind}"] / best
    return row


# Decoding and prefill -----------------------------------------------------------------------------------------------


def bench_decode(args: DecodeBench, limits: Callable[[], Limits]) -> list[dict]:
    """Milliseconds a step of one request and of `batch_size`; the limit is the bytes a step reads."""
    base = load(args)
    v = base.config.vocab_size
    one = prompts(args, 1, args.context, v)
    many = prompts(args, args.batch_size, args.context, v)
    rows = {}
    facts = {}  # {row: (requests, bytes that a step reads or None)}

    def row(name, decoder, ids, size=None):
        rows[name] = decoder
        facts[name] = (len(ids), size)

    def both(name, model):
        compile_blocks(model, True, saves=0, costs=0)
        row(name, Decoder(model, one, args.tokens), one, bytes_read(model))
        row(f"{name}, batch", Decoder(model, many, args.tokens), many)

    both("base", base)
    for e in pool_sizes(args):
        both(f"{e} adapters", with_adapters(args, e, folder=args.pool))
    for backend in ("auto", "loop"):
        model = with_adapters(args, e, backend, args.pool)
        row(f"{e} adapters, {backend}, not compiled", Decoder(model, one, args.tokens), one)
    if args.requests:
        ids = prompts(args, args.requests, args.context, v)
        models = {"base": base}
        for union in numbers("--union", args.union):
            models[f"{union} adapters"] = with_requests(args, union)
        for name, model in models.items():
            decoder = Decoder(model, ids, args.tokens)
            row(f"{args.requests} requests, {name}", decoder, ids, bytes_read(model))
    for name, model, options in hf_models(args, e):
        row(name, HfDecoder(model, one, args.tokens, **options(1)), one)
        row(f"{name}, batch", HfDecoder(model, many, args.tokens, **options(len(many))), many)
    if args.gguf:
        row("llama.cpp", LlamaCpp(args.gguf, one, args.tokens), one)
    table = []
    for name, times in in_turn(rows, args.repeats).items():
        step = spread([seconds / args.tokens for seconds in times])
        b, size = facts[name]
        share = size and size / limits().bytes / step["ms"] * 1e3
        rate = b / step["ms"] * 1e3
        table.append({"row": name, "batch": b, **step, "tokens/s": rate, "of the limit": share})
    return table


def bench_prefill(args: PrefillBench, limits: Callable[[], Limits]) -> list[dict]:
    """Milliseconds for a prompt of `tokens`; the limit is the arithmetic of the base's matmuls."""
    base = load(args)
    ids = prompts(args, 1, args.tokens, base.config.vocab_size)
    flops = 2 * args.tokens * sum(o * i for o, i in linear_shapes(base).values())
    compile_blocks(base, True, saves=0, costs=0)
    rows = {"base": partial(prefill, base, ids)}
    for e in pool_sizes(args):
        model = with_adapters(args, e, folder=args.pool)
        compile_blocks(model, True, saves=0, costs=0)
        rows[f"{e} adapters"] = partial(prefill, model, ids)
    for backend in ("auto", "loop"):
        model = with_adapters(args, e, backend, args.pool)
        rows[f"{e} adapters, {backend}, not compiled"] = partial(prefill, model, ids)
    for name, model, options in hf_models(args, e):
        rows[name] = HfDecoder(model, ids, **options(1)).prefill
    if args.gguf:
        rows["llama.cpp"] = LlamaCpp(args.gguf, ids).prefill
    table = []
    for name, times in in_turn(rows, args.repeats).items():
        row = {"row": name, **spread(times)}
        table.append(row)
        row["tokens/s"] = args.tokens / row["ms"] * 1e3
        row["/ base"] = row["ms"] / table[0]["ms"]
        row["of the limit"] = flops / limits().flops / row["ms"] * 1e3
    return table


# Training -----------------------------------------------------------------------------------------------------------


def bench_train(args: TrainBench, limits: Callable[[], Limits]) -> list[dict]:
    """Milliseconds of an optimizer step, and tokens a second without the padding.

    First `e` adapters at once, then the gates of `gated` adapters with LM loss and gate term. peft
    trains one adapter after another, on as many examples a step.
    """
    learners = {f"{args.e} adapters": adapters_trainer}
    if args.peers and has("peft"):
        learners["transformers + peft, one by one"] = one_adapter_trainer
    gates = {}
    for backend in ("auto", "loop"):
        gates[f"gates of {args.gated}, {backend}"] = partial(gates_trainer, backend=backend)
    table = []
    # Each row in a process of its own: loop's memory makes others in its process 10 % slower.
    for group in (learners, gates):
        rows = {name: InSubprocess(make, args) for name, make in group.items()}
        for name, times in in_turn(rows, args.repeats).items():
            tokens = rows[name].results[2:]  # without the uncounted runs
            rates = [count / seconds for count, seconds in zip(tokens, times, strict=True)]
            table.append({"row": name, **spread(times), "tokens/s": statistics.median(rates)})
        for row in rows.values():
            row.pipe.close()
    return table


# The command --------------------------------------------------------------------------------------------------------


def show(facts: dict, table: list[dict]) -> None:
    """Prints the facts, the table as Markdown, and all of it in one line of JSON."""
    for name, value in facts.items():
        print(printable(f"{name}: {value}"))
    columns = list(dict.fromkeys(name for row in table for name in row))
    rows = [map(cell, map(row.get, columns)) for row in table]
    print("", *markdown(columns, rows), "", json.dumps(facts | {"table": table}), sep="\n")


def cell(value: object) -> str:
    """A value as a table shows it."""
    if value is None:
        return ""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


COMMANDS = {
    "layer": (LayerBench, bench_layer), "decode": (DecodeBench, bench_decode),
    "prefill": (PrefillBench, bench_prefill), "train": (TrainBench, bench_train),
    "methods": (MethodsBench, bench_methods), "split": (SplitBench, bench_split),
    "cache": (CacheBench, bench_cache),
}  # fmt: skip


def main() -> None:
    """The command: measures, and prints what show() shows."""
    options = {name: cls for name, (cls, _) in COMMANDS.items()}
    about = "Time the operation, decoding, prefill, training, methods or a pool apart, or size a pool."
    command, args = parse_command(options, description=about)
    if not isinstance(args, Bench):  # nothing of it depends on the machine
        return show(vars(args), bench_cache(args))
    if args.threads > os.cpu_count():
        raise InputError(f"--threads is {args.threads}, expected at most {os.cpu_count()}, the cores")
    torch.set_num_threads(args.threads or os.cpu_count())
    args.device = find_device(args.device)
    if getattr(args, "gguf", ""):
        check_gguf(args.gguf, args.device)
    args.model = find_folder(getattr(args, "model", "") or TINY, "model")
    facts = card(args)
    limits = once(partial(measure_limits, DTYPES[args.dtype], args.device))
    table = COMMANDS[command][1](args, limits)
    show(facts | {"GB/s": round(limits().bytes / 1e9, 1), "GFLOP/s": round(limits().flops / 1e9)}, table)


def measure_limits(dtype: torch.dtype, device: str) -> Limits:
    """The machine's limits, by the kernels that fast/ uses."""
    compiled = can_compile(torch.device(device))
    return Limits(bandwidth(dtype, device, compiled), arithmetic(dtype, device, linear))


if __name__ == "__main__":
    run_script(main)
