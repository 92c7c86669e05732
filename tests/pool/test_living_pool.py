"""A pool that lives: adapters on disk, few of them resident, others that come and go while answers
are written."""

import gc
import json
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.files import InputError
from generate import answer, load, stream
from helpers_commands import ROOT, assert_refused, command
from helpers_models import random_adapter, write_adapters
from helpers_training import write_random_pool
from methods.ramole import router_loras, save_routers
from methods.session import PromptMask, add_adapter
from methods.smear import smear_routers
from model import load_llama
from pool.adapters import linear_shapes, load_adapter, save_adapter
from pool.gate_files import save_gates
from pool.slots import Pool

NAMES = [f"a{j}" for j in range(11)]


@pytest.fixture(scope="module")
def folders(small_model, tmp_path_factory):
    folders = write_adapters(tmp_path_factory.mktemp("many"), load_llama(small_model), NAMES)
    for name, folder in folders.items():
        (folder / "samples.jsonl").write_text(json.dumps({"prompt": f"the fox {name}"}) + "\n")
    return folders


@pytest.fixture(scope="module")
def shapes(small_model):
    return linear_shapes(load_llama(small_model))


def slots_hold(pool, whole):
    """Every resident's slot is what the pool that holds all has for it; free slots are zero."""
    used = set()
    for name in pool.resident:
        slot, other = pool.members[name].slot, whole.slot(name)
        used.add(slot)
        for mine, theirs in ((pool.A, whole.A), (pool.B, whole.B), (pool.scale, whole.scale)):
            assert all(torch.equal(mine[path][slot], theirs[path][other]) for path in mine)
    for slot in set(range(pool.capacity)) - used:
        assert not any(stack[slot].any() for part in (pool.A, pool.B) for stack in part.values())
    return len(used) == len(pool.resident)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.lists(st.sampled_from(NAMES), min_size=1, max_size=4), max_size=12))
def test_the_least_recently_needed_leaves(folders, shapes, needs):
    """Against a list that is kept by hand; in another order a popular adapter would be read from
    disk all the time."""
    pool, whole = Pool.load(folders, shapes, resident=4), Pool.load(folders, shapes)
    recent = NAMES[:4]
    for names in needs:
        pool.need(names)
        names = list(dict.fromkeys(names))
        recent = ([n for n in recent if n not in names] + names)[-4:]
        assert pool.resident == recent and slots_hold(pool, whole)
    assert sorted(pool.names) == sorted(NAMES) and pool.capacity == 4


def test_more_than_fit_is_refused_and_changes_nothing(folders, shapes):
    pool = Pool.load(folders, shapes, resident=4)
    before, version = pool.resident, pool.version
    with pytest.raises(InputError, match="5 adapters are needed at once, 4 fit: --resident 5"):
        pool.need(NAMES[3:8])
    with pytest.raises(InputError, match="no adapter 'a99' in the pool, did you mean"):
        pool.need(["a5", "a99"])
    assert pool.resident == before and pool.version == version


def test_add_and_remove_in_a_limited_pool(folders, shapes, tmp_path):
    pool = Pool.load(folders, shapes, resident=4)
    new = random_adapter("new", shapes, 3, seed=77)
    save_adapter(new, tmp_path / "new")
    new.folder = tmp_path / "new"
    assert pool.add(new) is None and pool.capacity == 4  # full: it waits on disk
    pool.need(["new"])
    assert pool.members["new"].hash == new.hash
    pool.remove("new")
    pool.remove("a9")  # one that is on disk
    assert "new" not in pool.members and len(pool.resident) == 3
    assert pool.add(new) is not None


def test_an_adapter_that_is_nowhere_on_disk_stays(folders, shapes):
    """Without it an adapter that was computed in memory leaves its slot for another and is lost."""
    pool = Pool.load(folders, shapes, resident=3)
    pool.remove(pool.resident[0])
    new = random_adapter("new", shapes, 3, seed=77)
    slot = pool.add(new)
    for names in (NAMES[1:3], NAMES[5:7]):
        pool.need(names)
        assert set(pool.resident) == {"new", *names} and pool.slot("new") == slot
    before = pool.resident
    with pytest.raises(InputError, match="4 adapters are needed at once, 3 fit: --resident 4"):
        pool.need(NAMES[1:4])
    assert pool.resident == before


def test_every_answer_is_that_of_a_pool_that_holds_all(small_model, folders):
    """Whatever was evicted in between: a stale slot, matrix or candidate would answer for another
    adapter."""
    whole, few = (load(small_model, adapters=folders, resident=n) for n in (0, 3))
    rng = random.Random(0)
    for turn in range(17):
        prompts = [f"the fox {rng.choice(NAMES)}" for _ in range(2)]
        methods = [rng.choice(["selection", f"adapter:{rng.choice(NAMES)}", "base"]) for _ in prompts]
        methods = ["fusion", "fusion"] if turn % 5 == 4 else methods
        texts = [answer(mole, prompts, method=methods, k=1, max_new_tokens=5) for mole in (whole, few)]
        assert texts[0] == texts[1]
    assert len(few.pool.resident) == 3 and len(whole.pool.resident) == 11


def test_memory_stays_flat(folders, shapes):
    """What leaves must be let go: no tensor more after a hundred evictions than after one."""
    pool, counts = Pool.load(folders, shapes, resident=2), []
    for turn in range(101):
        pool.need([NAMES[turn % 11]])
        if turn in (10, 100):
            gc.collect()
            counts.append(sum(type(x) is torch.Tensor for x in gc.get_objects()))
    assert counts[0] == counts[1]


def test_adding_and_removing_while_an_answer_is_written(small_model, folders, tmp_path):
    """The answer under way is that of a pool that nobody touched."""
    mole = load(small_model, adapters={name: folders[name] for name in NAMES[:5]})
    want = answer(mole, "the quick fox", method="adapter:a2", max_new_tokens=13)[0]
    text = ""
    for step, token in enumerate(stream(mole, "the quick fox", method="adapter:a2", max_new_tokens=13)):
        text += token.text
        if step == 2:
            add_adapter(mole, "a7", folders["a7"])
        if step == 4:
            mole.pool.remove("a0")
        if step == 6:
            add_adapter(mole, "again", folders["a0"])
    assert text == want and sorted(mole.pool.names) == ["a1", "a2", "a3", "a4", "a7", "again"]


@pytest.mark.parametrize("change", ["removed", "replaced", "evicted by a request that is refused"])
def test_an_adapter_that_leaves_ends_the_answers_that_use_it(change, small_model, folders):
    """Going on with an empty slot, or with another's weights, would be a wrong answer without a
    word."""
    mole = load(small_model, adapters={name: folders[name] for name in NAMES[:4]}, resident=2)
    answers = stream(mole, "the quick fox", method="adapter:a2", max_new_tokens=13)
    next(answers), next(answers)
    if change.startswith("evicted"):
        with pytest.raises(InputError, match="adapters are needed at once, 2 fit"):
            answer(mole, ["x", "y"], method=["logo", "logo"])
        assert "a2" in mole.pool.resident  # refused before anything leaves
        mole.pool.need(["a0", "a1"])
    else:
        mole.pool.remove("a2")
        if change == "replaced":
            add_adapter(mole, "a2", folders["a7"])
    with pytest.raises(RuntimeError, match="adapter a2 left its slot while an answer used it"):
        list(answers)


@pytest.mark.parametrize("method", ["ramole", "smear"])
def test_answers_go_on_when_a_larger_adapter_joins(method, small_model, folders, tmp_path):
    """Routers and merges bound to the smaller stacks must neither fail nor see the newcomer."""
    folder = write_random_pool(tmp_path / "pool", small_model)
    base = load_llama(small_model)
    for name in ("animals", "plurals"):
        (folder / "adapters" / name / "samples.jsonl").write_text(json.dumps({"prompt": name}) + "\n")
    pool = load(small_model, folder).pool
    save_routers(folder / "router.safetensors", random_weights(router_loras(pool, 5)), base, {})
    smear = random_weights(smear_routers(pool, PromptMask()))
    save_gates(folder / "gates" / "smear.safetensors", smear, pool, 2, pool.names, base.fingerprint())
    texts = []
    for joins in (False, True):
        mole, text = load(small_model, folder), ""
        for step, token in enumerate(stream(mole, "the quick fox", method=method, max_new_tokens=9)):
            text += token.text
            if step == 2 and joins:
                add_adapter(mole, "larger", folders["a5"])  # of rank 13
        texts.append(text)
    assert texts[0] == texts[1] and mole.pool.rank == 13


def random_weights(modules):
    generator = torch.Generator().manual_seed(5)
    for module in modules.values():
        for param in module.parameters():
            param.data.copy_(torch.randn(param.shape, generator=generator))
    return modules


def test_a_limit_above_the_number_of_adapters(folders, shapes):
    """--resident 5 of two adapters: three more fit, the fourth waits on disk, or is refused where it
    lies on none."""
    pool = Pool.load({name: folders[name] for name in NAMES[:2]}, shapes, resident=5)
    slots = [pool.add(load_adapter(folders[name], name, shapes)) for name in NAMES[2:6]]
    assert slots == [2, 3, 4, None] and pool.capacity == 5
    with pytest.raises(InputError, match="adapter new: all 5 slots are taken, and no folder to wait in"):
        pool.add(random_adapter("new", shapes, 3))


def test_only_what_a_method_uses_has_to_fit(small_model, folders):
    """selection uses one of the adapters that it finds: two requests fit into two slots."""
    mole = load(small_model, adapters={name: folders[name] for name in NAMES[:4]}, resident=2)
    assert len(answer(mole, ["the fox a1", "the fox a3"], method="selection", k=3, max_new_tokens=2)) == 2


def test_bytes_that_are_no_text(small_model):
    """A prompt loop must survive what a terminal of another encoding sends; JSON may hold half a
    surrogate pair."""
    args = ["--model", small_model, "--interactive", "--max_new_tokens", "2", "--method", "base"]
    line = [sys.executable, ROOT / "generate.py", *args]
    done = subprocess.run(line, input=b"caf\xff\nthe fox\n", capture_output=True)
    assert done.returncode == 0 and done.stderr.count(b"error: the text: character 3 is") == 1, done.stderr
    assert len(done.stdout.splitlines()) >= 1
    with pytest.raises(InputError, match="half a surrogate pair"):
        answer(load(small_model), ["\ud800"], method="base")


def test_interactive(small_model, folders):
    """The loop that the README shows: what is typed wrong costs one line, not the program."""
    lines = ["/adapters", f"/add second={folders['a3']}", "/method adapter:second"]
    lines += ["the quick fox", "/remove first"]
    lines += ["/adapters", "/method nope", "/remove nobody", "/what", "/add broken", "the lazy dog"]
    lines += ["/remove second", "/adapters", "/quit", "never"]
    args = ["generate.py", "--model", small_model, "--adapter", f"first={folders['a2']}", "--interactive"]
    done = command(*args, "--max_new_tokens", "3", stdin="\n".join(lines) + "\n")
    assert done.returncode == 0, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 3 and "no method 'nope'" in errors[0] and "no adapter 'nobody'" in errors[1], errors
    listed = [line.split()[0] for line in done.stdout.splitlines() if "  r " in line]
    assert listed == ["first", "second"] and "/add NAME=DIR" in done.stdout and "never" not in done.stdout
    assert "no adapters" in done.stdout


def test_prompts_from_a_file(small_model, folders, tmp_path):
    """One batch, each line with its own method; the answers name what was retrieved."""
    file = tmp_path / "requests.jsonl"
    rows = [{"prompt": "the fox a1", "method": "selection"}, {"prompt": "the lazy dog"}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    adapters = [part for name in NAMES[:3] for part in ("--adapter", f"{name}={folders[name]}")]
    args = ["generate.py", "--model", small_model, *adapters, "--max_new_tokens", "3"]
    done = command(
        *args, "--prompts", file, "--method", "base", "--retrieve", "2", "--exclude", "a0", "--json"
    )
    assert done.returncode == 0, done.stderr
    first, second = map(json.loads, done.stdout.splitlines())
    assert (first["method"], second["method"]) == ("selection", "base") and second["retrieved"] == []
    assert {name for name, _ in first["retrieved"]} == {"a1", "a2"} and "retrieved: a" in done.stderr
    file.write_text('{"prompt": "x", "method": 3}\n')
    assert_refused(command(*args, "--prompts", file), "method is 3")
    assert_refused(command(*args, "--prompt", "x", "--exclude", "a9"), "no adapter 'a9'")
    assert_refused(command(*args, "--prompt", "x", "--retrieve", "0"), "--retrieve is 0")


def resident_bytes():
    return 1024 * int(re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


@pytest.mark.slow
def test_a_thousand_adapters_of_which_32_are_resident(small_model, shapes, tmp_path):
    """Joining takes under a second, seven hundred requests no more memory than a hundred, and
    every answer is that of a pool that holds all."""
    names = [f"n{j}" for j in range(1000)]
    for j, name in enumerate(names):
        save_adapter(random_adapter(name, shapes, 3, seed=j), tmp_path / name)
    adapters = {name: tmp_path / name for name in names[:-1]}
    few, whole = (load(small_model, adapters=adapters, resident=n) for n in (32, 0))
    begin = time.perf_counter()
    add_adapter(few, names[-1], tmp_path / names[-1])
    assert time.perf_counter() - begin < 1
    add_adapter(whole, names[-1], tmp_path / names[-1])
    rng, sizes = random.Random(0), {}
    for turn in range(700):
        method = f"adapter:{rng.choice(names)}"
        texts = [answer(mole, "the quick fox", method=method, max_new_tokens=3) for mole in (few, whole)]
        assert texts[0] == texts[1] and len(few.pool.resident) == 32
        if turn in (99, 699):
            gc.collect()
            sizes[turn] = resident_bytes()
    assert sizes[699] < 1.02 * sizes[99], sizes
