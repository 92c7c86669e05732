"""`train.py router`: RAMoLE's RouterLoRA, which weighs the adapters retrieved for a request token by token.

Base and adapters are frozen; the routers learn from the LM loss on a share of the tasks and then serve all adapters,
those of other tasks and those that join later.
"""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from common.devices import DTYPES
from common.files import InputError
from common.tokenizer import Tokenizer
from methods.router import candidate_rows, router_loras, save_routers, set_candidates
from methods.session import Mole, retriever_of
from moe_lora import SampleGate, attach, set_gates
from pool.adapters import Pool, alloc_B_of, linear_shapes, read_pool
from pool.load import load_base
from tasks.folders import collate, load_tasks, micro_batches, pick, some_tasks, tokenize
from training.adapters import check_pool
from training.loop import Checkpoint, Run, compile_for, finished, fit, lm_losses, required


@dataclass
class RouterRun(Run):
    tasks: str = ""  # folder of task folders, one named like each adapter
    pool: str = ""  # pool folder with the adapters, and with the retriever where candidates are retrieved
    share: float = 0.4  # of the tasks: the others are never seen
    r: int = 8  # rank of A_r, B_r
    retrieve: int = 4  # candidates of an example before the dropout, its own adapter among them
    candidates: Literal["retrieved", "random"] = "retrieved"  # how they are drawn: retrieved, or random
    drop: float = 0.5  # LoRA dropout: how likely each candidate is left out of a step; two or more stay
    divisor: float = 0.0  # of the scores, 0 = sqrt(r)
    scaled: bool = True  # the adapters' scale is part of what is scored
    prior: float = 0.0  # temperature of the retrieval scores that are added to the router's, 0 = not added
    max_length: int = 512  # longer examples are left out; at most the model's context
    batch_size: int = 16  # examples a step, of all tasks in turn
    lr: float = 3e-3  # peak learning rate
    save_dtype: Literal["float32", "bfloat16"] = "float32"  # of the saved router


def train_router(o):
    """Trains RouterLoRA on the LM loss and writes POOL/router.safetensors."""
    known = read_pool(required(o, "pool"))
    names = some_tasks(known.adapters, o.share, o.seed)
    tasks = load_tasks(required(o, "tasks"), names)
    model = load_base(o.model, o.dtype, o.device)
    tokenizer = Tokenizer(o.model)
    o.max_length = min(o.max_length, model.config.max_position_embeddings)
    check_pool(known, model, o, known.template)
    shapes = linear_shapes(model)
    # Without the other tasks' adapters: as candidates that are never right they would be learnt to be avoided.
    like = model.head_weight
    pool = Pool.load(
        {name: known.adapters[name] for name in names}, shapes, like.dtype, like.device, alloc_B=alloc_B_of(model)
    )
    bound = [f"{name} {pool.members[name].hash}" for name in pool.names]
    file = Path(known.path) / "router.safetensors"
    checkpoint = Checkpoint(file.parent / "runs" / "router", o, [*names, *bound, f"base {model.fingerprint}"])
    if checkpoint.finished:
        return finished(checkpoint)
    examples = tokenize(tasks, tokenizer, model.config.vocab_size, known.template, o.max_length)
    scores = None
    if o.candidates == "retrieved" or o.prior:
        retriever = retriever_of(Mole(model, tokenizer, shapes, pool, known, known.template))
        rows = list({id(row): row for step in range(o.steps) for row in pick(examples, step, o)}.values())
        if silent := [name for name in names if name not in retriever.vectors]:
            raise InputError(f"adapter {silent[0]}: no samples.jsonl, so it can't be retrieved: --candidates random")
        found = retriever([row.row["prompt"] for row in rows], len(names))
        scores = {id(row): dict(pairs) for row, pairs in zip(rows, found, strict=True)}
    routers = router_loras(pool, o.r, o.seed, o.divisor, o.scaled, o.prior)
    attach(model, pool, {path: SampleGate(router) for path, router in routers.items()})
    params = {f"{path}.{n}": getattr(router, n) for path, router in routers.items() for n in "AB"}
    gates = [linear.gate for linear in (model.get_submodule(path) for path in routers)]
    compile_for(model, o, pick(examples, 0, o))

    def step_loss(step):
        picked = pick(examples, step, o)
        rng = random.Random(f"{o.seed}/candidates/{step}")
        known = scores or {id(row): dict.fromkeys(names, 0.0) for row in picked}
        drawn = {id(row): draw_candidates(row.task, known[id(row)], rng, o) for row in picked}
        return router_step(model, pool, routers, gates, picked, drawn, o)

    fit(checkpoint, params, o, step_loss)
    for param in params.values():
        param.data = param.data.to(DTYPES[o.save_dtype])
    save_routers(file, routers, model, {"tasks": "\n".join(names)})
    checkpoint.finish(file)


def draw_candidates(task, scores, rng, o):
    """The candidates of an example, [(adapter, score), ...] of `scores` {adapter: score}, the best first: its own among
    `retrieve` (of those retrieved, or random ones), then the dropout, which may take its own too, so that the router
    doesn't learn "always the own"."""
    others = sorted(scores) if o.candidates == "random" else sorted(scores, key=scores.get, reverse=True)
    others = [name for name in others if name != task]
    others = rng.sample(others, len(others)) if o.candidates == "random" else others
    found = [task, *others[: o.retrieve - 1]]
    kept = [name for name in found if rng.random() >= o.drop]
    while len(kept) < min(2, len(found)):
        kept.append(rng.choice([name for name in found if name not in kept]))
    return [(name, scores[name]) for name in kept]


def router_step(model, pool, routers, gates, picked, drawn, o):
    """Forward and backward of one step: the mean loss of a response token."""
    n, total = sum(len(example.ids) - example.n_prompt for example in picked), 0.0
    for some in micro_batches(picked, o.micro_tokens):
        device = model.head_weight.device
        batch = collate(some, device)
        rows = candidate_rows(pool, [drawn[id(example)] for example in some], o.retrieve, o.prior, device)
        set_candidates(routers.values(), *rows)
        nothing = torch.zeros(len(some), 1, device=device)
        set_gates(gates, nothing.long(), nothing, nothing[:, 0] == 0)
        loss = lm_losses(model, batch).sum() / n
        loss.backward()
        total += loss.item()
    return {"loss": total}


def check_router_options(o):
    if o.candidates not in ("retrieved", "random"):
        raise InputError(f"--candidates is {o.candidates!r}, expected retrieved or random")
    if not 0 <= o.drop < 1:
        raise InputError(f"--drop is {o.drop}, expected 0 or more and less than 1")
    if o.retrieve < 2:
        raise InputError(f"--retrieve is {o.retrieve}, expected 2 or more: among one there is nothing to weigh")
