"""`train.py lorahub`: for each task the weights that LoraHub's gradient-free search finds on a few examples."""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

from common.files import read_json, warn, write_json
from common.tokenizer import Tokenizer
from methods.baselines import lorahub, lorahub_search
from moe_lora import SampleGate, attach, fixed_rows
from pool.adapters import Pool, alloc_B_of, linear_shapes, read_pool
from pool.load import load_base
from tasks.folders import collate, draw, load_tasks, tokenize
from training.adapters import check_pool
from training.loop import lm_losses, required


@dataclass
class LorahubRun:
    model: str  # model folder
    tasks: str = ""  # folder of task folders
    pool: str = ""  # pool folder with the adapters; gets baselines/lorahub.json
    only: list[str] = field(default_factory=list)  # search for this task alone; repeatable; default all
    ood: bool = False  # without each task's own adapter, into baselines/lorahub_ood.json: what eval.py --ood needs
    shots: int = 5  # training examples the weights are judged by
    steps: int = 40  # weights tried a task (the paper's budget)
    l1: float = 0.05  # penalty on the mean size of the weights
    max_length: int = 512  # longer examples are left out
    seed: int = 0  # of the examples and of the search
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the base, auto = the file's
    device: str = "auto"  # auto = cuda where there is one, else cpu


def train_lorahub(o):
    """Writes POOL/baselines/lorahub.json or lorahub_ood.json, weights {task: {adapter: weight}}; tasks that it holds
    already, searched with these options over these adapters, are kept (LoraHub, section 2.2)."""
    known = read_pool(required(o, "pool"))
    tasks = load_tasks(required(o, "tasks"), o.only or None)
    model = load_base(o.model, o.dtype, o.device)
    tokenizer = Tokenizer(o.model)
    o.max_length = min(o.max_length, model.config.max_position_embeddings)
    check_pool(known, model, o, known.template)
    shapes = linear_shapes(model)
    like = model.head_weight
    pool = Pool.load(dict(sorted(known.adapters.items())), shapes, device=like.device, alloc_B=alloc_B_of(model))
    examples = tokenize(tasks, tokenizer, model.config.vocab_size, known.template, o.max_length)
    file, names = Path(known.path) / "baselines" / f"lorahub{'_ood' * o.ood}.json", sorted(pool.names)
    how = {"shots": o.shots, "steps": o.steps, "l1": o.l1, "seed": o.seed, "max_length": o.max_length}
    made = {"adapters": {name: pool.members[name].hash for name in names}, "options": how, "weights": {}}
    known_weights = read_json(file) if file.exists() else made
    if {key: known_weights.get(key) for key in ("adapters", "options")} != {
        key: made[key] for key in ("adapters", "options")
    }:
        warn(f"{file}: made for other adapters or with other options: begins anew")
        known_weights = made
    found = known_weights["weights"]
    gate, slot = SampleGate(), Pool(pool.shapes, 1, pool.rank, like.dtype, like.device, pool.alloc_B)
    attach(model, slot, gate)
    for task in tqdm([task for task in tasks if task not in found], file=sys.stderr):
        used = [name for name in names if not (o.ood and name == task)]
        batch = collate(draw(examples[task], task, 0, min(o.shots, len(examples[task])), o.seed), like.device)

        @torch.inference_mode()
        def loss(weights, batch=batch, used=used):
            for name in slot.names:
                slot.remove(name)
            adapter = lorahub(pool, dict(zip(used, weights, strict=True)))
            slot.add(adapter)
            gate.set(*fixed_rows(slot, [{adapter.name: 1.0}] * len(batch.tasks), like.device))
            return float(lm_losses(model, batch).mean())

        weights, _ = lorahub_search(loss, len(used), o.steps, o.seed, o.l1)
        found[task] = {name: round(float(w), 4) for name, w in zip(used, weights, strict=True)}
        write_json(file, made | {"weights": found})
    print(f"wrote {file}", file=sys.stderr)
