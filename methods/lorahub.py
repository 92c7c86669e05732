"""LoraHub (arXiv 2307.13269): one merged adapter for a task, its weights w searched on examples.

    (sum of w_i s_i B_i)(sum of w_i A_i)

The search is free of gradients, sees five examples of the task, and has a penalty on |w|.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from common.fields import FLOAT32, check, read_field
from common.files import InputError, read_json, say, warn, write_json
from common.locks import alone
from common.options import Count, NotNegative, Seed, nearest
from common.progress import track
from methods.protocol import Merged
from methods.session import Mole, Ranking
from moe_lora import SampleGate, attach, fixed_rows
from parallel.processes import one_process
from pool.adapters import Adapter
from pool.slots import Pool
from pool.stacks import derived_adapter, member_stacks
from tasks.folders import collate, draw, load_tasks, tokenize
from training.adapters_help import check_adapters_help
from training.inputs import PoolOptions, data_of, keep_template, load_with_pool, named_pool
from training.loop import required
from training.losses import lm_losses


def lorahub(pool: Pool, weights: dict[str, float]) -> Adapter:
    """(sum of w s B)(sum of w A) over `weights` {name: w}: an Adapter of scale 1. A weight counts
    twice: B A goes with its square."""
    names = sorted(weights)
    if not names:
        raise InputError("lorahub: every adapter is excluded")
    w = torch.tensor([float(weights[name]) for name in names])
    merged = {}
    for path, A, B in member_stacks(pool, names):
        each = w.to(A.device)
        merged[path] = torch.tensordot(each, A, 1), torch.tensordot(each, B, 1)
    return derived_adapter(pool, "lorahub", merged)


def lorahub_search(loss, e: int, steps=40, seed=0, l1=0.05, bound=1.5) -> tuple[list[float], float]:
    """Minimises loss(w: list of e floats) + l1 * mean |w| over |w| <= bound, in `steps` calls of
    `loss`, the first at zeros (the base alone). Returns (best w, its value with the penalty).

    The paper's objective, start, bounds and budget; it searches by nevergrad, this is a (1+1)
    evolution strategy with the one-fifth rule: a step that helps makes steps larger by 1.5, four
    that don't undo that.
    """
    generator = torch.Generator().manual_seed(seed)
    best = math.inf
    w = torch.zeros(e)
    step = 0.4
    for turn in range(steps):
        new = w
        if turn:
            # A fifth of the weights at a time: where one adapter of 28 is to be found, that leaves
            # 0.80 of the error, and a step of all weights 0.90.
            some = torch.rand(e, generator=generator) < 0.2
            some[torch.randint(e, (1,), generator=generator)] = True
            new = (w + step * some * torch.randn(e, generator=generator)).clamp(-bound, bound)
        value = float(loss(new.tolist())) + l1 * float(new.abs().mean())
        better = value < best
        if better:
            best = value
            w = new
        if turn:
            step *= 1.5 if better else 1.5**-0.25
    return w.tolist(), best


def read_searched(file: Path) -> dict:
    """A lorahub.json: {"adapters": {name: hash}, "weights": {task: {adapter: weight}}, "data": {task:
    hash}, ...}. Raises InputError where a weight is no number, or that of an adapter it doesn't
    know, and for a name that is there twice."""
    found = read_json(file, once=True)
    try:
        adapters = read_field(file, found, "adapters", {str: str})
        read_field(file, found, "data", {str: str}, {})
        for task, some in read_field(file, found, "weights", {str: dict}).items():
            if not some.keys() <= adapters.keys():
                raise InputError(f"{file}: {task}: expected a weight for some of its adapters")
            for name, w in some.items():
                check(f"{file}: {task}: the weight of {name}", w, FLOAT32)
    except InputError as error:
        raise InputError(f"{error}: python train.py lorahub searches again") from None
    return found


class LoraHub(Merged):
    """A merged adapter of a task's own weights."""

    pattern = "lorahub(?::(.+))?"
    names = ("lorahub:TASK",)
    about = "LoraHub: weights searched without gradients on five examples a task"
    paper = "2307.13269"
    made_by = "train.py lorahub"
    decides = "per task, merged"
    per_task = "lorahub:{}"

    def __init__(self, name, top_k, task):
        super().__init__(name, top_k)
        self.task = task
        self.per_task = "" if task else LoraHub.per_task
        self.answers_composites = bool(task)  # with one task's weights; not with one for each task

    def check(self, mole: Mole) -> None:
        """The file has to know the task."""
        known = read_searched(self.file(mole))["weights"]
        if self.task not in known:
            hint = nearest(self.task, known) or ", only for " + ", ".join(known)
            raise InputError(f"method {self.name}: no weights for {self.task!r}{hint}")

    def check_adapters(self, mole: Mole) -> None:
        """The weights have to be those of the pool's adapters."""
        self.known_weights(mole)

    def file(self, mole: Mole, ood=False) -> Path:
        """POOL/baselines/lorahub.json, or lorahub_ood.json, searched without each task's own
        adapter. Raises InputError where it isn't there."""
        name = f"lorahub{'_ood' * ood}.json"
        file = mole.folder.path / "baselines" / name if mole.folder else None
        self.need(file, "train.py lorahub" + " --ood" * ood)
        return file

    def known_weights(self, mole: Mole, ood=False) -> dict[str, dict[str, float]]:
        """{task: {adapter: weight}} of the file. Raises InputError where other adapters made it."""
        file = self.file(mole, ood)
        found = read_searched(file)
        mole.pool.need(mole.pool.names)  # an adapter's hash is known when it was loaded
        if found.get("adapters") != {name: member.hash for name, member in mole.pool.members.items()}:
            hint = "python train.py lorahub makes it again"
            raise InputError(f"{file}: searched over other adapters than the pool's: {hint}")
        return found["weights"]

    def merge(self, mole: Mole, found: Ranking, exclude: tuple) -> Adapter:
        """The merged adapter of the task's weights, without the adapters of `exclude`."""
        weights = self.known_weights(mole, self.task in exclude).get(self.task, {})
        return lorahub(mole.pool, {name: w for name, w in weights.items() if name not in exclude})


@dataclass(kw_only=True)
class LorahubRun(PoolOptions):
    """Options of `train.py lorahub`."""

    model: str  # folder or hub name ORG/NAME[@REVISION]
    only: list[str] = field(default_factory=list)  # search for this task; repeatable; default all
    ood: bool = False  # without each task's own adapter, into lorahub_ood.json, for eval.py --ood
    shots: Count = 5  # training examples the weights are judged by
    steps: Count = 40  # weights tried a task (the paper's budget)
    l1: NotNegative = 0.05  # penalty on the mean size of the weights
    max_length: Count = 512  # longer examples are left out
    seed: Seed = 0  # of the examples and of the search
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the base, auto = the file's
    device: str = "auto"  # auto = cuda where there is one, else cpu


def train_lorahub(args: LorahubRun) -> None:
    """Writes POOL/baselines/lorahub.json or lorahub_ood.json, weights {task: {adapter: weight}};
    tasks that it holds already, searched with these options, this base, these adapters and this
    data, are kept (LoraHub, section 2.2)."""
    one_process("train.py lorahub")
    known = named_pool(args)
    tasks = load_tasks(required(args, "tasks"), args.only or None, known.adapters)
    with alone(known.path / "runs" / "lorahub"):
        _train_lorahub(known, tasks, args)


def _train_lorahub(known, tasks, args):
    model, tokenizer, pool = load_with_pool(args, known, sorted(known.adapters), torch.float32)
    like = model.head_weight
    examples = tokenize(tasks, tokenizer, model.config.vocab_size, known.template, args.max_length)
    file = Path(known.path) / "baselines" / f"lorahub{'_ood' * args.ood}.json"
    keep_template(known, model)
    names = sorted(pool.names)
    searched = {"base": model.fingerprint()}
    searched["adapters"] = {name: pool.members[name].hash for name in names}
    options = ("shots", "steps", "l1", "seed", "max_length")
    searched["options"] = {name: getattr(args, name) for name in options}
    hashes = data_of(tasks, examples)
    data = {}
    found = {}
    if file.exists():
        earlier = read_searched(file)
        found = earlier.pop("weights", {})
        data = earlier.pop("data", {})
        if earlier != searched:
            warn(f"{file}: searched over other adapters or with other options: begins anew")
            found = {}
            data = {}
    for task in tasks:
        if data.get(f"data of {task}") != hashes[f"data of {task}"]:
            found.pop(task, None)
    own = {task: examples[task] for task in tasks if task in pool.members and task not in found}
    if own:
        check_adapters_help(model, tokenizer, pool, own, known.template, args.seed)
    gate = SampleGate()
    slot = Pool(pool.shapes, 1, pool.rank, like.dtype, like.device, pool.alloc_B)
    attach(model, slot, gate)
    for task in track([task for task in tasks if task not in found], "lorahub"):
        used = [name for name in names if not (args.ood and name == task)]
        count = min(args.shots, len(examples[task]))
        batch = collate(draw(examples[task], task, 0, count, args.seed), like.device)

        @torch.inference_mode()
        def loss(weights, batch=batch, used=used):
            for name in slot.names:
                slot.remove(name)
            adapter = lorahub(pool, dict(zip(used, weights, strict=True)))
            slot.add(adapter)
            gate.set(*fixed_rows(slot, [{adapter.name: 1.0}] * len(batch.tasks), like.device))
            return float(lm_losses(model, batch).mean())

        weights, _ = lorahub_search(loss, len(used), args.steps, args.seed, args.l1)
        found[task] = {name: round(float(w), 4) for name, w in zip(used, weights, strict=True)}
        data[f"data of {task}"] = hashes[f"data of {task}"]
        write_json(file, searched | {"data": data, "weights": found})
    say(f"wrote {file}")
