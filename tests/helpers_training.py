"""What the tests of training share: two small tasks, a small run of each kind, and what a run left
behind."""

import dataclasses
import itertools
import os
import random
import sys
from pathlib import Path

import torch

import train
from common.files import write_json, write_jsonl
from common.template import TEMPLATE
from common.tensors import read_safetensors
from common.tokenizer import Tokenizer
from helpers_models import write_adapters
from methods.drlora import DRLoRARun
from methods.lorahub import LorahubRun
from methods.meteora import MeteoraRun
from methods.ramole import RouterRun
from methods.samora import SamoraRun
from model import load_llama
from moe_lora import KnownAdapterGate, MeteoraGate, attach
from pool.adapters import linear_shapes, load_adapter
from pool.folder import PoolFolder, write_pool
from pool.load import load_base
from pool.slots import Pool
from tasks.folders import encode
from training.adapters import AdaptersRun
from training.base import BaseRun
from training.gates import GatesRun

# Two tasks that a random base can learn: each always gives one answer, on words that the other
# never sees.
ANSWERS = {"animals": "the lazy dog", "plurals": "mouse"}
WORDS = {
    "animals": ["quick", "brown", "fox", "jumps", "over", "lazy"],
    "plurals": ["what", "is", "plural", "sort", "these", "words"],
}
KINDS = ("adapters", "top1", "top2", "base")
PAIRS = list(itertools.product(WORDS["animals"], WORDS["plurals"]))
TEXT = "\n\n".join(f"[{b}] the {a} fox [/{b}]\njumps over the {b} dog, {a} and {b}." for a, b in PAIRS) + "\n"
COMMANDS = {cls: (name, run) for name, (cls, run, _) in train.COMMANDS.items()}


def prompts(name, count, seed=0):
    rng = random.Random(f"{seed}/{name}")
    return [" ".join(rng.choices(WORDS[name], k=rng.randint(2, 7))) for _ in range(count)]


def write_tasks(folder, names=tuple(ANSWERS), count=11):
    """Task folders of `count` training examples and five held-out ones."""
    for name in names:
        rows = [{"prompt": p, "response": ANSWERS[name]} for p in prompts(name, count + 5)]
        write_json(folder / name / "task.json", {"metric": "exact_match"})
        write_jsonl(folder / name / "train.jsonl", rows[:count])
        write_jsonl(folder / name / "test.jsonl", rows[count:])
    return folder


def write_random_pool(folder, model, names=tuple(ANSWERS)):
    llama = load_llama(model)
    adapters = write_adapters(folder / "adapters", llama, names)
    write_pool(PoolFolder(folder, adapters, llama.fingerprint(), TEMPLATE))
    return folder


def options(kind, model, out, **more):
    """A small run of each kind that writes into `out`; its tasks and text lie beside it."""
    out = Path(out)
    tasks = write_tasks(out.parent / "tasks")
    paths = {"model": str(model), "tasks": str(tasks), "pool": str(out)}
    shared = paths | {"steps": 5, "save_every": 2, "lr": 1e-2}
    if kind == "adapters":
        return AdaptersRun(**shared | {"batch_size": 2, "r": 3, "alpha": 5.0, "dropout": 0.25} | more)
    if kind == "drlora":
        return DRLoRARun(**shared | {"batch_size": 3, "r": 2, "target_r": 3, "max_r": 5} | more)
    if kind == "samora":
        return SamoraRun(**shared | {"batch_size": 5, "r": 3, "experts": 2} | more)
    if kind == "base":
        (out.parent / "text.txt").write_text(TEXT)
        sizes = {"hidden_size": 24, "intermediate_size": 36, "num_hidden_layers": 2, "num_attention_heads": 4}
        sizes |= {"num_key_value_heads": 2, "vocab_size": 307, "block_size": 13}
        sizes |= {"batch_size": 5, "compile": False}
        paths = {"model": str(out), "text": str(out.parent / "text.txt")}
        return BaseRun(**paths | sizes | {"steps": 5, "save_every": 2} | more)
    write_random_pool(out, model)
    if kind == "router":
        for name in ANSWERS:
            rows = [{"prompt": text} for text in prompts(name, 3, seed=1)]
            write_jsonl(out / "adapters" / name / "samples.jsonl", rows)
        return RouterRun(**shared | {"share": 1.0, "r": 3, "retrieve": 2, "batch_size": 3} | more)
    if kind == "lorahub":
        return LorahubRun(**paths | {"steps": 4} | more)
    return MeteoraRun(**shared | {"top_k": int(kind[-1]), "batch_size": 3} | more)


def of_kind(o, kind):
    """The options of a run of gates, but of another kind: those that it has, too."""
    cls = train.KINDS[kind].Run
    names = {field.name for field in dataclasses.fields(cls)}
    shared = {name: value for name, value in vars(o).items() if name in names}
    return cls(**shared | {"kind": kind})


def run(o, **more):
    o = dataclasses.replace(o, **more)
    COMMANDS[MeteoraRun if isinstance(o, GatesRun) else type(o)][1](o)


class Killed(BaseException):
    """Stands for a kill: nothing in the program may catch it."""


def killed_at_write(monkeypatch, o, number, after):
    """Runs until the `number`-th file is put in its place, and ends just before or `after` that;
    was it reached?"""
    count, replace = 0, os.replace

    def dying_replace(source, target):
        nonlocal count
        count += 1
        if count == number and not after:
            raise Killed
        replace(source, target)
        if count == number:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", dying_replace)
        try:
            run(o)
        except Killed:
            return True
    return False


def run_folder(o):
    if isinstance(o, GatesRun):
        return Path(o.pool) / "runs" / f"gates_top{o.top_k}"
    if isinstance(o, BaseRun):
        return Path(o.model) / "runs" / "base"
    names = {RouterRun: "router", DRLoRARun: "drlora", SamoraRun: "samora"}
    return Path(o.pool) / "runs" / names.get(type(o), "adapters")


def contents(o):
    """{path: what is in it} of all that a run left, but the options (which name the folder itself)."""
    home = Path(o.model if isinstance(o, BaseRun) else o.pool)
    files = [f for f in sorted(home.rglob("*")) if f.is_file() and f != run_folder(o) / "config.json"]
    return {str(f.relative_to(home)): file_contents(f) for f in files}


def file_contents(file):
    """Bytes; of safetensors every tensor's bytes and the metadata, which the library writes in any
    order."""
    if file.suffix != ".safetensors":
        return file.read_bytes()
    tensors, metadata = read_safetensors(file)
    raw = {name: tensor.reshape(-1).view(torch.uint8).numpy().tobytes() for name, tensor in tensors.items()}
    return metadata | {name: (t.dtype, tuple(t.shape), raw[name]) for name, t in tensors.items()}


def assert_same(o, expected):
    found = contents(o)
    assert found.keys() == expected.keys()
    assert [name for name in found if found[name] != expected[name]] == []


def argv(o):
    """The command line of a run."""
    args = [COMMANDS[type(o)][0]]
    for name, value in dataclasses.asdict(o).items():
        if value is None:
            continue
        if isinstance(value, bool):
            args.append(f"--{name}" if value else f"--no-{name}")
        else:
            args += [f"--{name}={v}" for v in (value if isinstance(value, list) else [value])]
    return args


def main(monkeypatch, *args):
    """train.py's main() in this process: InputError is what the command would print as one line."""
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, args)])
    train.main()


def tensors_of(folder, name):
    return read_safetensors(Path(folder) / "adapters" / name / "adapter_model.safetensors")[0]


def assert_close(found, expected, tolerance=1e-5):
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(
            found[name], expected[name], rtol=tolerance, atol=tolerance, msg=lambda m: f"{name}: {m}"
        )


def pool_in_model(small_model, tmp_path, gates=None):
    """A model with two random adapters behind an KnownAdapterGate or the given gates (a function of
    the pool)."""
    model = load_base(small_model)
    shapes = linear_shapes(model)
    folders = write_adapters(tmp_path / "random", model, tuple(ANSWERS))
    pool = Pool.of([load_adapter(f, name, shapes) for name, f in folders.items()], shapes)
    gate = gates(pool) if gates else KnownAdapterGate()
    attach(model, pool, gate)
    return model, pool, gate


def examples(model, count, held_out=False):
    tokenizer = Tokenizer(model)
    rows = [
        (n, {"prompt": p, "response": ANSWERS[n]})
        for n in ANSWERS
        for p in prompts(n, count, seed=int(held_out))
    ]
    return [encode(tokenizer, TEMPLATE, row, name) for name, row in rows]


def meteora_gates_of(k):
    def make(pool):
        generator = torch.Generator().manual_seed(3)
        weights = {
            p: torch.randn(pool.capacity, A.shape[2], generator=generator) * 0.2 for p, A in pool.A.items()
        }
        return {p: MeteoraGate(G, k) for p, G in weights.items()}

    return make
