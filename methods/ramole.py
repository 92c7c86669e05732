"""RAMoLE (arXiv 2406.16989): a small trained router weighs the adapters retrieved for a request,
token by token.

    q = A_r x,   v_j = s_j B_j A_j x,   key_j = B_r^T v_j       (Eqs. 6 to 11, from others' notes)
    weight = softmax over the retrieved j of  <q, key_j> / sqrt(r_q),   y = W x + sum_j weight_j v_j

Only A_r (r_q, i) and B_r (o, r_q) are trained, by the LM loss on a share of the tasks. Their size
doesn't depend on the pool, so an adapter of another task, or one added later, needs no training. In
a training step each candidate is left out with probability --drop, but at least two stay, so that
the router doesn't learn "always the task's own". Retrieval is LoraRetriever's: pool/retriever.py.
"""

import hashlib
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.devices import DTYPES
from common.fields import Number, parse_number
from common.files import InputError, read_bytes
from common.locks import alone
from common.options import ABOVE_0, Above0OrOff, BatchSize, Count, NotNegative, Rank, ShareAbove0
from common.tensors import cast_finite, read_safetensors, write_safetensors
from kernels import linear_in, sum_dtype
from methods.protocol import ByText, Gated
from methods.session import Mole, Ranking, retriever_of
from moe_lora import AX, Mixture, SampleGate, attach, attached, set_gates
from parallel.processes import share_of
from pool.folder import check_base
from pool.slots import Pool
from tasks.folders import collate, load_tasks, micro_batches, pick, some_tasks, tokenize
from training.adapters_help import check_adapters_help
from training.checkpoint import Checkpoint
from training.inputs import PoolOptions, bound_to, data_of, keep_template, load_with_pool, named_pool
from training.loop import Run, compile_for, finished, fit, required
from training.losses import lm_losses


class Ramole(ByText, Gated):
    """The retrieved adapters, weighed by the router."""

    pattern = "ramole"
    names = ("ramole",)
    about = "RAMoLE: those retrieved, weighed token by token"
    paper = "2406.16989"
    made_by = "train.py router"
    decides = "per request, then per token and Linear"
    has_temperature = False
    follows_the_pool = True

    def check(self, mole: Mole) -> None:
        """The router's file has to be there."""
        self.need(self.file(mole), self.made_by)

    def file(self, mole: Mole) -> Path | None:
        """POOL/router.safetensors, None without a pool folder."""
        return mole.folder.path / "router.safetensors" if mole.folder else None

    def in_memory(self, mole: Mole, found: Ranking, exclude: tuple) -> list[str]:
        """Those retrieved: the router knows none."""
        return [name for name, _ in found]

    def gates(self, mole: Mole, pool: Pool, temperature: float, exclude: tuple) -> dict[str, nn.Module]:
        """The file's routers, bound to what the slots hold now."""
        mole.router_version = pool.version
        return load_routers(self.file(mole), pool, mole.model, mole.dtype)

    def prepare(self, mole: Mole, requests: list[tuple]) -> None:
        """Gives the routers the batch's candidates, and the adapters that are in the slots now."""
        routers = {path: linear.gate.inner for path, linear in attached(mole.model).items()}
        if mole.router_version != mole.pool.version:
            for path, router in routers.items():
                router.bind(mole.pool.B[path], mole.pool.scale[path])
            mole.router_version = mole.pool.version
        retrieved = [found if isinstance(method, Ramole) else [] for method, found in requests]
        k = max([1, *map(len, retrieved)])
        prior = next(iter(routers.values())).prior
        rows = candidate_rows(mole.pool, retrieved, k, prior, mole.device)
        set_candidates(routers.values(), *rows)


class RouterLoRA(nn.Module):
    """RAMoLE's router for one Linear (Eqs. 6 to 11): the equations above, with A_r and B_r as A, B.

    <q, key_j> is q . inner_j (A_j x) with inner_j = s_j B_r^T B_j (r_q, r): no adapter's full
    output is formed to be scored. `divisor` is sqrt(r_q) by default; `scaled` says whether s_j is
    part of the scored v_j. Those notes leave both open.

    `idx` (b, k) int64 and `bias` (b, k) float32 are the batch's candidates. The bias is added to
    the scores: -inf where a row has fewer candidates, else 0, as in the paper. With a `prior` it is
    the retrieval score / prior, so that a router trusts the retriever where it knows nothing.
    """

    per_row = ("idx", "bias")
    linear_in = staticmethod(linear_in)

    def __init__(self, A: Tensor, B: Tensor, divisor: float | None = None, scaled=True, prior=0.0):
        super().__init__()
        self.A = nn.Parameter(A)
        self.B = nn.Parameter(B)
        self.scaled = scaled
        self.prior = prior
        self.divisor = divisor or len(A) ** 0.5
        self.stacks = self.inner = None  # the pool's, set by bind()
        self.idx = self.bias = None  # the batch's, set by set_candidates()

    def bind(self, B: Tensor, scale: Tensor) -> None:
        """The pool's B (e, o, r) and scale (e,) of this Linear, anew where they have changed."""
        self.stacks = (B, scale)
        inner = None if self.training else self._inner().detach()
        if self.inner is None or inner is None or self.inner.shape != inner.shape:
            self.inner = inner
        else:  # in place: a compiled or captured step holds it
            self.inner.copy_(inner)

    def _inner(self):
        """(e, r_q, r) float32."""
        B, scale = self.stacks
        inner = torch.einsum("oq,eor->eqr", self.B.to(sum_dtype(B)), B.to(sum_dtype(B)))
        return inner * scale[:, None, None].to(inner.dtype) if self.scaled else inner

    def forward(self, x: Tensor, sample: Tensor, ax: AX) -> Mixture:
        """x (n, i), sample (n,) -> Mixture of the row's candidates."""
        inner = self._inner() if self.inner is None else self.inner
        idx = self.idx[sample]  # (n, k)
        bias = self.bias[sample]
        q = self.linear_in(x, self.A, inner.dtype)  # (n, r_q)
        a = ax(idx)[..., : inner.shape[-1]]  # (n, k, r); higher ranks joined after bind()
        if self.inner is None:  # training: a gather whose gradient adds in a fixed order
            picks = F.one_hot(idx, len(inner)).to(inner.dtype)
            inner = (picks @ inner.flatten(1)).unflatten(-1, inner.shape[1:])
        else:
            inner = inner[idx]
        key = (inner * a.to(inner.dtype)[:, :, None]).sum(-1)  # (n, k, r_q)
        score = (key * q[:, None]).sum(-1) / self.divisor + bias
        weight = torch.exp(score - score.amax(-1, keepdim=True).clamp(min=-3e38))  # no row is NaN
        return Mixture(idx, weight / weight.sum(-1, keepdim=True).clamp(min=1e-30))


def router_loras(pool: Pool, r=8, seed=0, divisor=None, scaled=True, prior=0.0) -> dict:
    """{module path: RouterLoRA} untrained: A_r uniform within 1/sqrt(i), B_r zero, so that weights
    are even at the start; were both zero, neither would get a gradient."""
    generator = torch.Generator().manual_seed(seed)
    routers = {}
    for path, A in pool.A.items():
        i = A.shape[2]
        o = pool.B[path].shape[1]
        A_r = (torch.rand(r, i, generator=generator) * 2 - 1) * i**-0.5
        B_r = torch.zeros(o, r, device=A.device)
        routers[path] = RouterLoRA(A_r.to(A.device), B_r, divisor, scaled, float(prior))
        routers[path].bind(pool.B[path], pool.scale[path])
    return routers


def set_candidates(routers, idx: Tensor, bias: Tensor) -> None:
    """Gives RouterLoRAs the candidates of a batch: idx (b, k) int64, bias (b, k) float32."""
    for router in routers:
        router.idx = idx
        router.bias = bias


def candidate_rows(
    pool: Pool, retrieved: list[Ranking], k: int, prior=0.0, device=None
) -> tuple[Tensor, Tensor]:
    """A ranking for each row, k adapters at most -> idx (b, k), bias (b, k) for RouterLoRA."""
    idx = torch.zeros(len(retrieved), k, dtype=torch.int64)
    bias = torch.full((len(retrieved), k), float("-inf"))
    for row, pairs in enumerate(retrieved):
        for column, (name, score) in enumerate(pairs):
            idx[row, column] = pool.slot(name)
            bias[row, column] = score / prior if prior else 0.0
    return idx.to(device), bias.to(device)


# Files --------------------------------------------------------------------------------------------


def save_routers(file, routers: dict[str, RouterLoRA], model, about: dict[str, str]) -> None:
    """{module path: RouterLoRA} -> POOL/router.safetensors, bound to the base alone. `about` {key:
    text}: how it was trained."""
    tensors = {}
    for path, router in routers.items():
        tensors[f"{path}.router_A.weight"] = router.A.detach()
        tensors[f"{path}.router_B.weight"] = router.B.detach()
    first = next(iter(routers.values()))
    how = {"divisor": repr(float(first.divisor)), "scaled": str(int(first.scaled))}
    how["prior"] = repr(float(first.prior))
    write_safetensors(file, tensors, {"base": model.fingerprint(), **how, **about})


def load_routers(file, pool: Pool, model, dtype=torch.float32) -> dict[str, RouterLoRA]:
    """File -> {module path: RouterLoRA} for the pool's Linears. Raises InputError where it was
    trained on another base or lacks one of them."""
    tensors, metadata = read_safetensors(file)
    if lacks := {"base", "divisor", "scaled", "prior"} - metadata.keys():
        lacks = ", ".join(sorted(lacks))
        raise InputError(f"{file}: metadata lacks {lacks}: not a router of this project")
    check_base(file, metadata["base"], model.fingerprint(), "python train.py router trains it again")
    divisor = parse_number(f"{file}: divisor", metadata["divisor"], ABOVE_0)
    scaled = parse_number(f"{file}: scaled", metadata["scaled"], Number(int, 0, 1)) == 1
    prior = parse_number(f"{file}: prior", metadata["prior"], Number(float, 1e-6, 1e6, or_0=True))
    routers = {}
    for path, A in pool.A.items():
        A_r = tensors.get(f"{path}.router_A.weight")
        B_r = tensors.get(f"{path}.router_B.weight")
        i = A.shape[2]
        o = pool.B[path].shape[1]
        found = [None if part is None else tuple(part.shape) for part in (A_r, B_r)]
        r = found[0][0] if found[0] else 0
        if found != [(r, i), (o, r)]:
            expected = f"router_A (r, {i}) and router_B ({o}, r)"
            raise InputError(f"{file}: {path}: expected {expected}, found {found}")
        A_r = cast_finite(file, f"{path}.router_A.weight", A_r, dtype).to(A.device)
        B_r = cast_finite(file, f"{path}.router_B.weight", B_r, dtype).to(A.device)
        routers[path] = RouterLoRA(A_r, B_r, divisor, scaled, prior)
        routers[path].requires_grad_(False).eval().bind(pool.B[path], pool.scale[path])
    return routers


# Training -----------------------------------------------------------------------------------------


Candidates = Annotated[int, Number(int, 2, 1_000_000)]
Drop = Annotated[float, Number(float, 0, 0.99)]


@dataclass
class RouterRun(PoolOptions, Run):
    """Options of `train.py router`."""

    share: ShareAbove0 = 1.0  # share of the tasks; the others and their adapters are never seen
    r: Rank = 8  # rank of A_r, B_r
    retrieve: Candidates = 4  # candidates before the dropout, the own one among them
    candidates: Literal["retrieved", "random"] = "retrieved"  # how they are drawn
    drop: Drop = 0.5  # how likely a candidate is left out of a step; two or more stay
    divisor: Above0OrOff = 0.0  # of the scores, 0 = sqrt(r)
    scaled: bool = True  # the adapters' scale is part of what is scored
    prior: Above0OrOff = 0.0  # temperature of retrieval scores added to the router's, 0 = not added
    max_length: Count = 512  # longer examples are left out; at most the model's context
    batch_size: BatchSize = 16  # examples a step, of all tasks in turn
    lr: NotNegative = 3e-3  # peak learning rate
    save_dtype: Literal["float32", "bfloat16"] = "float32"  # of the saved router


def train_router(args: RouterRun) -> None:
    """Trains RouterLoRA on the LM loss and writes POOL/router.safetensors."""
    known = named_pool(args)
    names = some_tasks(known.adapters, args.share, args.seed)
    tasks = load_tasks(required(args, "tasks"), names, known.adapters)
    run = known.path / "runs" / "router"
    with alone(run):
        _train_router(known, names, tasks, run, args)


def _train_router(known, names, tasks, run, args):
    # The other tasks' adapters would never be right here: the router would learn to avoid them.
    model, tokenizer, pool = load_with_pool(args, known, names)
    file = known.path / "router.safetensors"
    examples = tokenize(tasks, tokenizer, model.config.vocab_size, known.template, args.max_length)
    bound = bound_to(model, pool) | data_of(tasks, examples)
    retrieves = args.candidates == "retrieved" or args.prior > 0
    if retrieves:
        bound["retriever"] = _hash_of_retriever(known, pool)
    checkpoint = Checkpoint(run, args, bound)
    if checkpoint.finished:
        return finished(checkpoint)
    if not checkpoint.file.exists():
        check_adapters_help(model, tokenizer, pool, examples, known.template, args.seed)
    scores = None
    if retrieves:
        retriever = retriever_of(Mole(model, tokenizer, pool.shapes, pool, known, known.template))
        if silent := [name for name in names if name not in retriever.vectors]:
            found = f"adapter {silent[0]}: no samples.jsonl"
            raise InputError(f"{found}, so it can't be retrieved: --candidates random")
        rows = {}
        for step in range(args.steps):
            rows |= {id(row): row for row in pick(examples, step, args)}
        rankings = retriever([row.row["prompt"] for row in rows.values()], len(names))
        scores = dict(zip(rows, map(dict, rankings), strict=True))
    routers = router_loras(pool, args.r, args.seed, args.divisor, args.scaled, args.prior)
    attach(model, pool, {path: SampleGate(router) for path, router in routers.items()})
    params = {}
    for path, router in routers.items():
        params |= {f"{path}.A": router.A, f"{path}.B": router.B}
    gates = [model.get_submodule(path).gate for path in routers]
    compile_for(model, args, pick(examples, 0, args))

    def step_loss(step):
        picked = pick(examples, step, args)
        rng = random.Random(f"{args.seed}/candidates/{step}")
        known = scores or {id(row): dict.fromkeys(names, 0.0) for row in picked}
        drawn = {id(row): draw_candidates(row.task, known[id(row)], rng, args) for row in picked}
        return router_step(model, pool, routers, gates, picked, drawn, args)

    fit(checkpoint, params, args, step_loss)
    for param in params.values():
        param.data = param.data.to(DTYPES[args.save_dtype])
    keep_template(known, model)
    save_routers(file, routers, model, {"tasks": "\n".join(names)})
    checkpoint.finish(file, [file])


def _hash_of_retriever(known, pool):
    """Of all that decides which adapters are retrieved: the encoder and the adapters' samples."""
    file = known.path / "retriever.safetensors"
    digest = hashlib.sha256(read_bytes(file) if file.exists() else b"")
    for name in sorted(pool.names):
        digest.update(repr((name, pool.members[name].adapter.samples)).encode())
    return digest.hexdigest()


def draw_candidates(task: str, scores: dict[str, float], rng: random.Random, args) -> Ranking:
    """The candidates of an example of `task`, by `scores` {adapter: score}: its own adapter and the
    best or random others, `retrieve` in all. Then the dropout, which may take its own too, so that
    the router doesn't learn "always the own"."""
    random_ones = args.candidates == "random"
    others = sorted(scores) if random_ones else sorted(scores, key=scores.get, reverse=True)
    others.remove(task)
    others = rng.sample(others, len(others)) if random_ones else others
    found = [task, *others[: args.retrieve - 1]]
    kept = [name for name in found if rng.random() >= args.drop]
    while len(kept) < min(2, len(found)):
        kept.append(rng.choice([name for name in found if name not in kept]))
    return [(name, scores[name]) for name in kept]


def router_step(model, pool, routers, gates, picked, drawn, args) -> dict[str, float]:
    """Forward and backward of one step: the mean loss of a response token."""
    n = sum(len(example.ids) - example.n_prompt for example in picked)
    total = 0.0
    for some in micro_batches(share_of(picked), args.micro_tokens):
        device = model.head_weight.device
        batch = collate(some, device)
        rankings = [drawn[id(example)] for example in some]
        set_candidates(routers.values(), *candidate_rows(pool, rankings, args.retrieve, args.prior, device))
        set_gates(gates, None, None, torch.ones(len(some), dtype=torch.bool, device=device))
        loss = lm_losses(model, batch).sum() / n
        loss.backward()
        total += loss.item()
    return {"loss": total}
