"""What bench.py times: decoding and training steps of Llamas with many adapters.

The adapters are a pool's, or random ones with gates that choose evenly among them. `args` are the
options of a command of bench.py.
"""

import itertools
import math
import random
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch

from common.devices import DTYPES, check_memory
from common.files import InputError
from common.options import numbers
from common.template import TEMPLATE, choose_template
from common.tokenizer import Tokenizer
from evaluation.peers import has, hf_llama, peft_llama, peft_trainer
from methods.meteora import MeteoraRun
from methods.ramole import RouterLoRA, candidate_rows, router_loras, set_candidates
from model import Llama, LlamaConfig
from moe_lora import KnownAdapterGate, MeteoraGate, SampleGate, attach, attached, set_gates
from pool.adapters import Adapter, linear_shapes, load_adapter, peft_config
from pool.folder import read_pool
from pool.gate_files import load_gates
from pool.load import TINY, compile_blocks, load_base, make_fast
from pool.slots import Pool, alloc_B_of, pool_bytes
from tasks.folders import Example, collate, encode, encode_all, load_tasks
from training.adapters import AdaptersRun, adapters_step
from training.gates import GateTermTraining, gates_step

LLAMA_3_8B = {"vocab_size": 2048, "hidden_size": 4096, "intermediate_size": 14336,
              "num_hidden_layers": 1, "num_attention_heads": 32, "num_key_value_heads": 8,
              "head_dim": 128}  # fmt: skip
Shapes = dict[str, tuple[int, int]]  # {module path: (o, i)}


def load(args) -> Llama:
    """The Llama of --model, or one block of --shape with random weights."""
    if not getattr(args, "shape", ""):
        return load_base(args.model or TINY, args.dtype, args.device)
    model = Llama(LlamaConfig(**LLAMA_3_8B)).to(args.device, DTYPES[args.dtype])
    return make_fast(model.requires_grad_(False).eval())


def seeded(args) -> torch.Generator:
    """Random numbers by --seed."""
    return torch.Generator().manual_seed(args.seed)


def random_names(count: int) -> list[str]:
    """The names of random_adapters()."""
    return [f"random{j}" for j in range(count)]


def random_adapters(args, e: int, shapes: Shapes) -> list[Adapter]:
    """e adapters of rank r on all Linears."""
    generator = seeded(args)
    dtype = DTYPES[args.dtype]
    check_memory(f"{e} adapters of rank {args.r}", pool_bytes(shapes, e, args.r, dtype))
    targets = sorted({path.rpartition(".")[2] for path in shapes})
    config = peft_config(args.r, 2 * args.r, 0.0, targets, "")
    adapters = []
    for name in random_names(e):
        A = {}
        B = {}
        for path, (o, i) in shapes.items():
            A[path] = (torch.randn(args.r, i, generator=generator) * 0.01).to(dtype)
            B[path] = (torch.randn(o, args.r, generator=generator) * 0.01).to(dtype)
        adapters.append(Adapter(name, A, B, dict.fromkeys(A, 2.0), config))
    return adapters


def random_pool(args, e: int, model: Llama, dtype: torch.dtype = torch.float32) -> Pool:
    """A pool of random_adapters()."""
    shapes = linear_shapes(model)
    return Pool.of(random_adapters(args, e, shapes), shapes, dtype, args.device, alloc_B_of(model))


def random_gates(args, e: int, shapes: Shapes) -> dict[str, MeteoraGate]:
    """{module path: gate} that choose evenly among e adapters."""
    generator = seeded(args)
    gates = {}
    for path, (_, i) in shapes.items():
        G = torch.randn(e, i, generator=generator).to(args.device, DTYPES[args.dtype])
        gates[path] = MeteoraGate(G, args.k).requires_grad_(False)
    return gates


def with_adapters(args, e: int, backend: str = "auto", folder: str = "") -> Llama:
    """load() with adapters and gates in it: those of a pool folder, or e random ones."""
    model = load(args)
    shapes = linear_shapes(model)
    dtype = DTYPES[args.dtype]
    if folder:
        adapters = read_pool(folder).adapters
        file = Path(folder) / "gates" / f"meteora_top{args.k}.safetensors"
        pool = Pool.load(adapters, shapes, dtype, args.device, alloc_B=alloc_B_of(model))
        gates = load_gates(file, pool, model.fingerprint(), dtype=dtype)
    else:
        pool = random_pool(args, e, model, dtype)
        gates = random_gates(args, e, shapes)
    attach_routed(args, model, pool, gates, 64, backend)
    return model


def attach_routed(args, model: Llama, pool: Pool, gates: dict, rows: int, backend: str = "auto") -> None:
    """Attaches gates {module path: gate} as methods/batch.py does: all of `rows` rows ask them."""
    sample_gates = {path: SampleGate(gate) for path, gate in gates.items()}
    routed = torch.ones(rows, dtype=torch.bool, device=args.device)
    set_gates(sample_gates.values(), None, None, routed)
    attach(model, pool, sample_gates, backend)


def pool_sizes(args) -> list[int]:
    """How many adapters: --pool's, or each of --e."""
    return [len(read_pool(args.pool).adapters)] if args.pool else numbers("--e", args.e)


def hf_models(args, e: int) -> Iterator[tuple[str, torch.nn.Module, Callable[[int], dict]]]:
    """(name, model, options of its forward for b rows) of transformers' Llama, and of peft's.

    peft's has the adapters of the pool, or e random ones. All rows use one of them or, in peft's
    mixed batch, each row another.
    """
    if not args.peers or getattr(args, "shape", "") or not has("transformers"):
        return
    folder = args.model or TINY
    dtype = DTYPES[args.dtype]
    yield "transformers", hf_llama(folder, dtype).to(args.device), lambda b: {}
    if has("peft"):
        if args.pool:
            paths = read_pool(args.pool).adapters
            adapters = [load_adapter(path, name) for name, path in paths.items()]
        else:
            adapters = random_adapters(args, e, linear_shapes(load(args)))
        names = [adapter.name for adapter in adapters]
        model = peft_llama(folder, dtype, adapters).to(args.device)
        yield "peft, one adapter", model, lambda b: {}

        def one_each(b):
            return {"adapter_names": [names[j % e] for j in range(b)]}

        yield "peft, mixed batch", model, one_each


def prompts(args, b: int, t: int, v: int) -> torch.Tensor:
    """Token ids (b, t): the tasks' prompts, packed until t are full, or random ones."""
    if not args.tasks:
        return torch.randint(3, v, (b, t), generator=seeded(args)).to(args.device)
    tokenizer = Tokenizer(args.model or TINY)
    folder = read_pool(args.pool or args.model or TINY)
    template, _ = choose_template("", folder.template, tokenizer)
    tasks = list(load_tasks(args.tasks, sorted(folder.adapters)).values())
    rows = []
    for row in range(b):
        ids = []
        examples = tasks[row % len(tasks)].test
        for example in examples * (t // len(examples) + 1):
            ids += encode(tokenizer, template, example).ids
        rows.append(ids[:t])
    return torch.tensor(rows, device=args.device)


@torch.inference_mode()
def prefill(model: Llama, ids: torch.Tensor) -> torch.Tensor:
    """The logits that follow the prompts `ids` (b, t), read into a new cache: (b, v)."""
    cache = model.new_cache(*ids.shape)
    return model.head(model.model(ids, cache)[:, -1])


class Decoder:
    """Decodes greedily: each call decodes `tokens` for each row, starting after `ids` (b, t), and
    returns what follows the prompts: (b, 1 + tokens), the first token computed with the prompt."""

    def __init__(self, model: Llama, ids: torch.Tensor, tokens: int):
        self.model = model
        self.t = ids.shape[1]
        self.tokens = tokens
        self.cache = model.new_cache(len(ids), self.t + tokens)
        self.cache.replayable = True
        with torch.inference_mode():
            self.first = model.head(model.model(ids, self.cache)[:, -1]).float().argmax(-1)

    @torch.inference_mode()
    def __call__(self) -> torch.Tensor:
        self.cache.lengths.fill_(self.t)
        self.cache.end = self.t
        written = [self.first]
        for _ in range(self.tokens):
            logits = self.model.head(self.model.model(written[-1][:, None], self.cache)[:, -1])
            written.append(logits.float().argmax(-1))
        return torch.stack(written, 1)


def with_requests(args, union: int) -> Llama:
    """A Llama with `union` random adapters, routers of random weights, and a batch of requests.

    Each of the args.requests rows has three adapters of its own set.
    """
    if not -(-union // 3) <= args.requests <= math.comb(union, 3):
        sets = f"{args.requests} sets of three adapters"
        raise InputError(f"--union: {sets} aren't {union} adapters together")
    model = load(args)
    dtype = DTYPES[args.dtype]
    pool = random_pool(args, union, model, dtype)
    routers = router_loras(pool, args.r, args.seed)
    for path, router in routers.items():
        router.B.data.copy_(torch.randn(router.B.shape, generator=seeded(args)))
        router.eval().to(dtype).requires_grad_(False).bind(pool.B[path], pool.scale[path])
    compile_blocks(model, True, saves=0, costs=0)
    retrieved = []
    for names in adapter_sets(args, pool.names):
        retrieved.append([(name, 0.0) for name in names])
    set_candidates(routers.values(), *candidate_rows(pool, retrieved, 3, device=args.device))
    attach_routed(args, model, pool, routers, args.requests)
    return model


def adapter_sets(args, names: list[str]) -> list[list[str]]:
    """args.requests different sets of three of the adapters `names`, together all of them."""
    rng = random.Random(args.seed)
    shuffled = rng.sample(names, len(names))
    sets = []
    for j in range(0, len(names), 3):
        sets.append(sorted((shuffled + shuffled)[j : j + 3]))
    while len(sets) < args.requests:
        more = sorted(rng.sample(names, 3))
        if more not in sets:
            sets.append(more)
    return sets


def bytes_read(model: Llama) -> int:
    """What one decode step has to read: weights but the embedding's, gates or routers, adapters.

    Of e adapters gates read k; routers read all, which their batch retrieved.
    """
    tied = model.config.tie_word_embeddings
    total = 0
    for name, param in model.named_parameters():
        if tied or "embed_tokens" not in name:
            total += param.nbytes
    for module in attached(model).values():
        gate = module.gate.inner
        e = len(module.A)
        total += (module.A.nbytes + module.B.nbytes) * getattr(gate, "k", e) // e
        if isinstance(gate, RouterLoRA):  # it scores with `inner`, which replaces its B
            total += gate.inner.nbytes - gate.B.nbytes
    return total


# Training -----------------------------------------------------------------------------------------------------------


def examples(args, names: list[str], v: int) -> dict[str, list[Example]]:
    """{name: what an adapter of that name learns}: random tokens, or examples of one of --tasks."""
    learnt = {}
    if not args.tasks:
        shape = (len(names), args.e * args.each, args.tokens)
        rows = torch.randint(3, v, shape, generator=seeded(args)).tolist()
        for name, some in zip(names, rows, strict=True):
            learnt[name] = [Example(ids, args.tokens // 2, name) for ids in some]
        return learnt
    tokenizer = Tokenizer(args.model or TINY)
    tasks = list(load_tasks(args.tasks).values())
    for j, name in enumerate(names):
        rows = tasks[j % len(tasks)].train[:64]
        learnt[name], _ = encode_all(tokenizer, TEMPLATE, rows, name, 512)
    return learnt


def steps_of(args, learnt: dict[str, list[Example]]) -> list[list[Example]]:
    """The examples of eight steps, args.e * args.each of them in each, of all names in turn."""
    count = args.e * args.each
    names = list(learnt)
    picked = []
    for position in range(8 * count):
        turn, j = divmod(position, len(names))
        some = learnt[names[j]]
        picked.append(some[turn % len(some)])
    return [picked[j : j + count] for j in range(0, 8 * count, count)]


class Trainer:
    """Optimizer steps of `params` with the gradients of step(examples).

    Each call takes the next of `batches` in turn, and returns how many tokens it had, without
    padding.
    """

    def __init__(self, params: list[torch.Tensor], step: Callable, batches: list[list[Example]]):
        self.step = step
        self.turn = itertools.cycle(batches)
        self.optimizer = torch.optim.AdamW(params, lr=1e-4)

    def __call__(self) -> int:
        picked = next(self.turn)
        self.optimizer.zero_grad()
        self.step(picked)
        self.optimizer.step()
        return sum(len(example.ids) for example in picked)


def adapters_trainer(args) -> Trainer:
    """A Trainer of args.e adapters at once."""
    model = load(args)
    compile_blocks(model, True, saves=0, costs=0)
    pool = random_pool(args, args.e, model)
    gate = KnownAdapterGate()
    attach(model, pool, gate)
    model.train()
    params = [stack.requires_grad_() for stack in (*pool.A.values(), *pool.B.values())]
    batches = steps_of(args, examples(args, pool.names, model.config.vocab_size))
    run = AdaptersRun(model="", tasks="", pool="")
    return Trainer(params, lambda picked: adapters_step(model, pool, gate, picked, run, 0), batches)


def one_adapter_trainer(args) -> Trainer:
    """A Trainer of peft's one adapter: as many examples a step, of one adapter, padded.

    The adapters' examples come one adapter after another.
    """
    model = load(args)
    targets = {path.rpartition(".")[2] for path in linear_shapes(model)}
    folder = args.model or TINY
    params, step = peft_trainer(folder, DTYPES[args.dtype], args.r, targets, args.device)
    learnt = examples(args, random_names(args.e), model.config.vocab_size)
    batches = [steps_of(args, {name: some})[0] for name, some in learnt.items()]
    return Trainer(params, lambda picked: step(collate(picked, args.device)), batches)


def gates_trainer(args, backend: str) -> Trainer:
    """A Trainer of the gates of args.gated adapters."""
    model = with_adapters(args, args.gated, backend)
    if backend == "auto":
        compile_blocks(model, True, saves=0, costs=0)
    gates = {}
    for path, linear in attached(model).items():
        gates[path] = linear.gate.inner.float().requires_grad_()
    pool = SimpleNamespace(slot=lambda name: int(name.removeprefix("random")))
    learnt = examples(args, random_names(args.gated), model.config.vocab_size)
    run = MeteoraRun(model="", tasks="", pool="", top_k=args.k)
    training = GateTermTraining(model, pool, gates, run)
    params = [param for gate in gates.values() for param in gate.parameters()]
    return Trainer(params, partial(gates_step, training, step=0), steps_of(args, learnt))
