"""`bench.py methods`: what each method of choosing adapters costs in a decode step."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from common.options import BatchSize, Count
from evaluation.bench_options import Bench
from evaluation.measure import Limits, in_turn, spread
from evaluation.timed import Decoder, prompts
from methods.batch import check_name, for_task, retrieve, set_methods, split_methods
from methods.session import Mole, find_mole, load_weights
from pool.load import TINY


@dataclass
class MethodsBench(Bench):
    """Options of `bench.py methods`."""

    model: str = ""  # folder or hub name ORG/NAME[@REVISION], default tiny/
    pool: str = ""  # pool with the methods' parts, default the model's own
    tasks: str = ""  # task folders whose prompts are used; default: random tokens
    methods: str = "base,meteora_top1,meteora_top2,ramole"  # separated by commas
    top_k: Count = 2  # adapters a token uses, where the method's name leaves it open
    retrieve: Count = 3  # adapters retrieved for a prompt
    context: Count = 64  # tokens of the prompt
    tokens: Count = 16  # tokens decoded in a repetition
    batch_size: BatchSize = 16  # requests decoded together; one alone is timed too


def bench_methods(args: MethodsBench, limits: Callable[[], Limits]) -> list[dict]:
    """A row for each method: milliseconds a step, and their ratio to the first method's, for one request
    and for `batch_size`. No row is compiled, as some methods can't be. Each method and batch size has a
    model of its own in memory. Raises InputError where the pool lacks a method's parts."""
    methods = split_methods(args.methods)
    mole = find_mole(args.model or TINY, args.pool or None)
    for method in methods:
        requests(mole, args, method, 1)  # what is wrong is refused before weights are read
    rows = {}
    for method in methods:
        rows[method, 1] = decoder(args, method, 1)
        rows[method, args.batch_size] = decoder(args, method, args.batch_size)
    times = in_turn(rows, args.repeats)
    table = []
    for method in methods:
        row = {"row": method}
        for name, b in (("", 1), (f", batch of {args.batch_size}", args.batch_size)):
            step = spread([seconds / args.tokens for seconds in times[method, b]])
            row |= {f"{key}{name}": value for key, value in step.items()}
            first = table[0] if table else row
            row[f"/ {methods[0]}{name}"] = row[f"ms{name}"] / first[f"ms{name}"]
        table.append(row)
    return table


def requests(mole: Mole, args: MethodsBench, method: str, b: int) -> list[str]:
    """The method's name in each of b requests. If it has another name for each task, the requests take the
    tasks in turn or, where these can't share a batch, all the first. Raises InputError where the pool
    lacks its parts."""
    tasks = mole.pool.names or [""]
    names = [for_task(mole, method, tasks[row % len(tasks)]) for row in range(b)]
    keys = {check_name(mole, name, args.top_k).key for name in names}
    return names if len(keys) == 1 else names[:1] * b


def decoder(args: MethodsBench, method: str, b: int) -> Decoder:
    """A Decoder of b requests that `method` routes, with a model of its own. Raises InputError."""
    mole = find_mole(args.model or TINY, args.pool or None)
    names = requests(mole, args, method, b)
    load_weights(mole, args.dtype, args.device)
    ids = prompts(args, b, args.context, mole.model.config.vocab_size)
    texts = [mole.tokenizer.decode(row) for row in ids.tolist()]
    found = retrieve(mole, names, texts, args.retrieve, (), ids.tolist())
    set_methods(mole, names, args.top_k, retrieved=found)
    mole.prompt.mask = torch.ones_like(ids, dtype=torch.bool)  # for methods that decide by the prompt
    made = Decoder(mole.model, ids, args.tokens)
    mole.prompt.mask = None
    return made
