"""train.py router: what it learns from, what it never sees, and that it learns."""

import random
import shutil

import pytest
import torch

from common.files import InputError, read_json, write_json
from common.options import check_bounds
from common.tensors import read_metadata, read_safetensors
from evaluation.choose import seen_tasks
from generate import load
from helpers_training import prompts
from methods.batch import set_methods
from methods.ramole import RouterRun, draw_candidates, train_router
from model import load_llama
from moe_lora import attached
from pool.adapters import linear_shapes
from pool.folder import read_pool
from tasks.folders import some_tasks


@pytest.fixture
def run(trained, tmp_path):
    """The options of a small run over the two learned adapters, in a pool of its own."""
    shutil.copytree(trained.pool, tmp_path / "pool")
    shutil.rmtree(tmp_path / "pool" / "runs")
    return RouterRun(model=trained.model, tasks=trained.tasks, pool=str(tmp_path / "pool"), steps=30,
                     batch_size=6, lr=3e-2, r=5, share=1.0, candidates="random", drop=0.0,
                     retrieve=2)  # fmt: skip


def test_a_router_learns_which_of_two_adapters(run):
    """Weights that stay even are a mixture under another name: each prompt's own adapter must come
    to weigh more."""
    run.steps = 80
    train_router(run)
    mole = load(run.model, run.pool)
    for name in ("animals", "plurals"):
        asked = prompts(name, 5, seed=3)
        ids = [mole.tokenizer.encode(mole.template.replace("{prompt}", p)) for p in asked]
        set_methods(mole, ["ramole"], retrieved=[[("animals", 0.5), ("plurals", 0.5)]])
        weights = []
        for row in ids:
            for linear in attached(mole.model).values():
                linear.trace = torch.zeros(len(row), 2)
            with torch.inference_mode():
                mole.model(torch.tensor([row]))
            weights += [linear.trace[-3:].mean(0) for linear in attached(mole.model).values()]
        mean = torch.stack(weights).mean(0)
        assert mean[mole.pool.slot(name)] > 0.55, (name, mean)


def test_base_and_adapters_stay(run):
    before = {p: (a.clone(), b) for p, (a, b) in zip(*tensors(run), strict=True)}
    train_router(run)
    after = {p: (a, b) for p, (a, b) in zip(*tensors(run), strict=True)}
    assert all(torch.equal(before[p][0], after[p][0]) and before[p][1] == after[p][1] for p in before)
    metadata = read_metadata(f"{run.pool}/router.safetensors")
    assert metadata["base"] == load_llama(run.model).fingerprint() and metadata["tasks"] == "animals\nplurals"
    shapes = linear_shapes(load_llama(run.model))
    routers, _ = read_safetensors(f"{run.pool}/router.safetensors")
    assert {key: tuple(y.shape) for key, y in routers.items()} == {
        f"{path}.router_{part}.weight": (5, i) if part == "A" else (o, 5)
        for path, (o, i) in shapes.items() for part in "AB"
    }  # fmt: skip


def tensors(run):
    files = [path / "adapter_model.safetensors" for path in read_pool(run.pool).adapters.values()]
    found = [read_safetensors(file)[0] for file in files]
    names = [(file, key) for file, some in zip(files, found, strict=True) for key in some]
    return names, [(y, str(y.dtype)) for some in found for y in some.values()]


def test_resumed_is_the_uninterrupted_run(run, tmp_path, monkeypatch):
    """Killed in the middle, with candidates and dropout drawn at random, it must go on as if
    nothing had happened."""
    run.steps, run.save_every, run.drop = 6, 2, 0.5
    whole = RouterRun(**vars(run) | {"pool": str(tmp_path / "whole")})
    shutil.copytree(run.pool, whole.pool)
    train_router(whole)
    from methods import ramole as module

    calls, step = [], module.router_step

    def dies(*args):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return step(*args)

    monkeypatch.setattr(module, "router_step", dies)
    with pytest.raises(KeyboardInterrupt):
        train_router(run)
    monkeypatch.setattr(module, "router_step", step)
    run.resume = True
    train_router(run)
    one, two = (read_safetensors(f"{o.pool}/router.safetensors")[0] for o in (run, whole))
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_candidates():
    """The own one among the best retrieved; after the dropout two at least, the own one not always."""
    o = RouterRun(model="", retrieve=4, drop=0.5)
    scores = {"a": 0.1, "b": 0.9, "c": 0.5, "d": 0.7, "e": 0.3, "f": 0.2}
    drawn = [draw_candidates("a", scores, random.Random(seed), o) for seed in range(300)]
    assert {name for some in drawn for name, _ in some} == {"a", "b", "d", "c"}
    assert {len(some) for some in drawn} == {2, 3, 4}
    assert 0.4 < sum("a" in dict(some) for some in drawn) / 300 < 0.75
    assert all(score == scores[name] for some in drawn for name, score in some)
    o.drop = 0.0
    assert draw_candidates("a", scores, random.Random(0), o) == [
        ("a", 0.1),
        ("b", 0.9),
        ("d", 0.7),
        ("c", 0.5),
    ]
    o.candidates = "random"
    assert {n for s in range(99) for n, _ in draw_candidates("a", scores, random.Random(s), o)} == set(scores)


def test_a_share_of_the_tasks_and_no_other_adapter(run):
    """`share` is what makes "unseen" mean anything: neither examples nor adapters of the others may
    be touched."""
    names = [f"t{j}" for j in range(10)]
    some = some_tasks(names, 0.4, 0)
    assert len(some) == 4 and some == some_tasks(reversed(names), 0.4, 0) != some_tasks(names, 0.4, 1)
    shutil.copytree(f"{run.pool}/adapters/animals", f"{run.pool}/adapters/other")
    write_json(
        f"{run.pool}/pool.json",
        read_json(f"{run.pool}/pool.json") | {"adapters": ["animals", "other", "plurals"]},
    )
    run.share = 0.1
    shutil.copytree(f"{run.tasks}/animals", f"{run.tasks}/other", dirs_exist_ok=True)
    try:
        run.steps = 1
        train_router(run)
    finally:
        shutil.rmtree(f"{run.tasks}/other")
    mole = load(run.model, run.pool)
    assert (
        seen_tasks(mole) == set(some_tasks(["animals", "other", "plurals"], 0.1, 0))
        and len(seen_tasks(mole)) == 2
    )


SHARES = [("share", 0.0), ("share", 1.5), ("share", float("nan"))]


@pytest.mark.parametrize(("name", "value"), [("drop", 1.0), ("retrieve", 1), *SHARES])
def test_bad_options(name, value):
    with pytest.raises(InputError, match=f"--{name} is {value}"):
        check_bounds(RouterRun(model="", **{name: value}))
