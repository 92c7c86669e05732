"""What bench.py times: Llamas with many adapters and gates that choose evenly among them, decoding,
training steps.

Also what runs one of these in a process of its own (InSubprocess), which has to import it from a
module, not from the script.

`args` are the options of a command of bench.py.
"""

import itertools
import math
import multiprocessing
import os
import random
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import torch

from common.devices import DTYPES, find_device
from common.files import InputError
from common.options import numbers
from common.tokenizer import Tokenizer
from evaluation.peers import has, hf_llama, peft_llama, peft_trainer
from methods.meteora import GateLoss
from methods.ramole import RouterLoRA, candidate_rows, router_loras, set_candidates
from model import Llama, LlamaConfig
from moe_lora import (
    KnownAdapterGate,
    MeteoraGate,
    SampleGate,
    attach,
    attached,
    set_gates,
)
from pool.adapters import TEMPLATE, Adapter, linear_shapes, load_adapter, peft_config
from pool.folder import read_pool
from pool.gate_files import load_gates, parameters_of
from pool.load import TINY, compile_blocks, load_base, make_fast
from pool.slots import Pool, alloc_B_of
from tasks.folders import Example, collate, encode, encode_all, load_tasks
from training.adapters import AdaptersRun, adapters_step
from training.gates import GatesRun, gates_step

LLAMA_3_8B = {"vocab_size": 2048, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 1,
              "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}  # fmt: skip


def load(args):
    """The Llama of --model, or one block of --shape with random weights."""
    if not getattr(args, "shape", ""):
        return load_base(args.model or TINY, args.dtype, args.device)
    model = Llama(LlamaConfig(**LLAMA_3_8B)).to(args.device, DTYPES[args.dtype])
    return make_fast(model.requires_grad_(False).eval())


def random_adapters(args, e, shapes):
    """e adapters of rank r on all Linears."""
    generator = torch.Generator().manual_seed(args.seed)
    dtype = DTYPES[args.dtype]
    config = peft_config(args.r, 2 * args.r, 0.0, sorted({p.rpartition(".")[2] for p in shapes}), "")
    adapters = []
    for index in range(e):
        A = {p: torch.randn(args.r, i, generator=generator) * 0.01 for p, (_, i) in shapes.items()}
        B = {p: torch.randn(out, args.r, generator=generator) * 0.01 for p, (out, _) in shapes.items()}
        A, B = ({p: y.to(dtype) for p, y in part.items()} for part in (A, B))
        adapters.append(Adapter(f"random{index}", A, B, dict.fromkeys(A, 2.0), config))
    return adapters


def random_gates(args, e, shapes):
    """Gates that choose evenly among e adapters."""
    generator = torch.Generator().manual_seed(args.seed)
    dtype = DTYPES[args.dtype]
    weights = {
        path: torch.randn(e, i, generator=generator).to(args.device, dtype) for path, (_, i) in shapes.items()
    }
    return {path: MeteoraGate(G, args.k).requires_grad_(False) for path, G in weights.items()}


def with_adapters(args, e, backend="auto", folder=""):
    """A Llama like load()'s with adapters and gates in it: those of a pool folder, or e random
    ones."""
    model = load(args)
    shapes = linear_shapes(model)
    dtype = DTYPES[args.dtype]
    if folder:
        pool = Pool.load(read_pool(folder).adapters, shapes, dtype, args.device, alloc_B=alloc_B_of(model))
        gates = load_gates(
            Path(folder) / "gates" / f"meteora_top{args.k}.safetensors", pool, model.fingerprint, dtype=dtype
        )
    else:
        pool = Pool.of(random_adapters(args, e, shapes), shapes, dtype, args.device, alloc_B_of(model))
        gates = random_gates(args, e, shapes)
    asked = {path: SampleGate(gate) for path, gate in gates.items()}
    for gate in asked.values():  # as methods/batch.py asks gates
        gate.set(None, None, torch.ones(64, dtype=torch.bool, device=args.device))
    attach(model, pool, asked, backend)
    return model


def pool_sizes(args):
    """How many adapters: --pool's, or each of --e."""
    return [len(read_pool(args.pool).adapters)] if args.pool else numbers("--e", args.e)


def hf_models(args, e):
    """(name, model, options of its forward for b rows) of transformers' Llama, and of peft's with
    the adapters of the pool or e random ones: one of them, and peft's mixed batch, another for each
    row."""
    if not args.peers or getattr(args, "shape", "") or not has("transformers"):
        return
    folder = args.model or TINY
    dtype = DTYPES[args.dtype]
    yield "transformers", hf_llama(folder, dtype).to(args.device), lambda b: {}
    if has("peft"):
        if args.pool:
            adapters = [load_adapter(path, name) for name, path in read_pool(args.pool).adapters.items()]
        else:
            adapters = random_adapters(args, e, linear_shapes(load(args)))
        names = [adapter.name for adapter in adapters]
        model = peft_llama(folder, dtype, adapters).to(args.device)
        yield "peft, one adapter", model, lambda b: {}
        yield "peft, mixed batch", model, lambda b: {"adapter_names": [names[j % e] for j in range(b)]}


def prompts(args, b, t, v):
    """Token ids (b, t): of the tasks' prompts, one after another until t are full, or random."""
    if not args.tasks:
        return torch.randint(3, v, (b, t), generator=torch.Generator().manual_seed(args.seed)).to(args.device)
    tokenizer = Tokenizer(args.model or TINY)
    folder = read_pool(args.pool or args.model or TINY)
    tasks = list(load_tasks(args.tasks, sorted(folder.adapters)).values())
    rows = []
    for row in range(b):
        ids = []
        examples = tasks[row % len(tasks)].test
        for example in examples * (t // len(examples) + 1):
            ids += encode(tokenizer, folder.template, example).ids
        rows.append(ids[:t])
    return torch.tensor(rows, device=args.device)


class Decoder:
    """A model that goes on from `ids` (b, t) again and again, greedily; called, it decodes `tokens`
    for each row."""

    def __init__(self, model, ids, tokens):
        self.model = model
        self.t = ids.shape[1]
        self.tokens = tokens
        self.cache = model.new_cache(len(ids), self.t + tokens)
        self.cache.replayable = True
        with torch.inference_mode():
            self.first = model.head(model.model(ids, self.cache)[:, -1]).float().argmax(-1)

    @torch.inference_mode()
    def __call__(self):
        self.cache.lengths.fill_(self.t)
        self.cache.end = self.t
        ids = self.first
        for _ in range(self.tokens):
            logits = self.model.head(self.model.model(ids[:, None], self.cache)[:, -1])
            ids = logits.float().argmax(-1)
        return ids


def with_requests(args, union):
    """A Llama with `union` random adapters, routers that weigh them at random, and a batch of
    args.requests rows with three adapters each, no two rows with the same ones, all of them
    together the union."""
    if not -(-union // 3) <= args.requests <= math.comb(union, 3):
        raise InputError(f"--union: {args.requests} sets of three adapters aren't {union} adapters together")
    model = load(args)
    rng = random.Random(args.seed)
    shapes = linear_shapes(model)
    pool = Pool.of(
        random_adapters(args, union, shapes), shapes, DTYPES[args.dtype], args.device, alloc_B_of(model)
    )
    names = rng.sample(pool.names, union)
    sets = [sorted((names + names)[j : j + 3]) for j in range(0, union, 3)]
    while len(sets) < args.requests:
        if (more := sorted(rng.sample(pool.names, 3))) not in sets:
            sets.append(more)
    routers = {path: router.eval() for path, router in router_loras(pool, args.r, args.seed).items()}
    for path, router in routers.items():
        router.B.data.copy_(torch.randn(router.B.shape, generator=torch.Generator().manual_seed(args.seed)))
        router.to(DTYPES[args.dtype]).requires_grad_(False).bind(pool.B[path], pool.scale[path])
    asked = {path: SampleGate(router) for path, router in routers.items()}
    compile_blocks(model, True, saves=0, costs=0)
    retrieved = candidate_rows(
        pool, [[(name, 0.0) for name in found] for found in sets], 3, device=args.device
    )
    set_candidates(routers.values(), *retrieved)
    nothing = torch.zeros(args.requests, 1, device=args.device)
    set_gates(asked.values(), nothing.long(), nothing, nothing[:, 0] == 0)
    attach(model, pool, asked)
    return model


def bytes_read(model):
    """What one step has to read: every weight but the embedding's, gates or what routers score
    with, and of the adapters k of e by gates, all by routers, whose batch retrieved them."""
    tied = model.config.tie_word_embeddings
    total = sum(p.nbytes for name, p in model.named_parameters() if tied or "embed_tokens" not in name)
    for module in attached(model).values():
        gate = module.gate.inner
        e = len(module.A)
        total += (module.A.nbytes + module.B.nbytes) * getattr(gate, "k", e) // e
        total += gate.inner.nbytes - gate.B.nbytes if isinstance(gate, RouterLoRA) else 0  # B is in `inner`
    return total


def examples(args, names, v):
    """{name: Examples that an adapter of that name learns}: random tokens, or for each those of one
    of --tasks."""
    if not args.tasks:
        generator = torch.Generator().manual_seed(args.seed)
        shape = (len(names), args.e * args.each, args.tokens)
        rows = torch.randint(3, v, shape, generator=generator).tolist()
        return {
            name: [Example(ids, args.tokens // 2, name) for ids in some]
            for name, some in zip(names, rows, strict=True)
        }
    tokenizer = Tokenizer(args.model or TINY)
    tasks = list(load_tasks(args.tasks).values())
    rows = {name: tasks[j % len(tasks)].train[:64] for j, name in enumerate(names)}
    return {name: encode_all(tokenizer, TEMPLATE, some, name, 512)[0] for name, some in rows.items()}


def steps_of(args, learnt):
    """The examples of eight steps, args.e * args.each of them in each, {name: Examples} in turn."""
    names = list(learnt)
    count = args.e * args.each
    turns = [divmod(j, len(names)) for j in range(8 * count)]
    picked = [learnt[names[j]][turn % len(learnt[names[j]])] for turn, j in turns]
    return [picked[j : j + count] for j in range(0, 8 * count, count)]


class Trainer:
    """Optimizer steps of `params` with the gradients of step(examples), called once for each of
    `batches` in turn: gives how many tokens, without padding, it saw."""

    def __init__(self, params, step, batches):
        self.step = step
        self.turn = itertools.cycle(batches)
        self.optimizer = torch.optim.AdamW(params, lr=1e-4)

    def __call__(self):
        picked = next(self.turn)
        self.optimizer.zero_grad()
        self.step(picked)
        self.optimizer.step()
        return sum(len(example.ids) for example in picked)


class InSubprocess:
    """make(args) in a process of its own, whose memory no other row of a table scatters; called, it
    runs there once, and `results` are what came of it."""

    def __init__(self, make, args):
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        process = context.Process(
            target=_child, args=(theirs, make, SimpleNamespace(**vars(args))), daemon=True
        )
        heard = signal.signal(
            signal.SIGINT, signal.SIG_IGN
        )  # inherited: Ctrl-C is for the process that waits
        process.start()
        signal.signal(signal.SIGINT, heard)
        theirs.close()  # so that its end is heard of
        self.results = []
        self._take()  # it is made

    def _take(self):
        try:
            result = self.pipe.recv()
        except EOFError:
            raise InputError(
                "a process that was to be timed has ended; was there too little memory?"
            ) from None
        if isinstance(result, Exception):
            raise result
        return result

    def __call__(self):
        self.pipe.send(None)
        self.results.append(self._take())


def _child(pipe, make, args):
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # with the end of its locks
    torch.set_num_threads(args.threads or os.cpu_count())
    try:
        find_device(args.device)  # torch's current one is each process's own
        run = make(args)
        result = None
        while True:
            pipe.send(result)
            pipe.recv()
            result = run()
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
    except EOFError:
        pass  # nobody asks any more
    except Exception as error:
        pipe.send(error)


def adapters_trainer(args):
    """A Trainer of args.e adapters at once."""
    model = load(args)
    compile_blocks(model, True, saves=0, costs=0)
    shapes = linear_shapes(model)
    pool = Pool.of(
        random_adapters(args, args.e, shapes), shapes, device=args.device, alloc_B=alloc_B_of(model)
    )
    gate = KnownAdapterGate()
    attach(model, pool, gate)
    model.train()
    params = [stack.requires_grad_() for stacks in (pool.A, pool.B) for stack in stacks.values()]
    batches = steps_of(args, examples(args, pool.names, model.config.vocab_size))
    run = AdaptersRun(model="", tasks="", pool="")
    return Trainer(params, lambda picked: adapters_step(model, pool, gate, picked, run), batches)


def one_adapter_trainer(args):
    """peft's adapter, for which one adapter's examples come after another's: as many in a step,
    padded."""
    model = load(args)
    targets = {path.rpartition(".")[2] for path in linear_shapes(model)}
    params, step = peft_trainer(args.model or TINY, DTYPES[args.dtype], args.r, targets, args.device)
    learnt = examples(args, [f"random{j}" for j in range(args.e)], model.config.vocab_size)
    batches = [steps_of(args, {name: some})[0] for name, some in learnt.items()]
    return Trainer(params, lambda picked: step(collate(picked, args.device)), batches)


def gates_trainer(args, backend):
    """A Trainer of the gates of args.gated adapters."""
    model = with_adapters(args, args.gated, backend)
    if backend == "auto":
        compile_blocks(model, True, saves=0, costs=0)
    gates = {path: linear.gate.inner.float().requires_grad_() for path, linear in attached(model).items()}
    pool = SimpleNamespace(slot=lambda name: int(name.removeprefix("random")))
    batches = steps_of(
        args, examples(args, [f"random{j}" for j in range(args.gated)], model.config.vocab_size)
    )
    run = GatesRun(model="", tasks="", pool="", top_k=args.k)
    loss = GateLoss(gates)
    params = list(parameters_of(gates).values())
    return Trainer(params, lambda picked: gates_step(model, pool, loss, None, picked, run), batches)
