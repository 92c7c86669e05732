"""Adapters that change under their name, and newcomers that a batch under way and trained gates don't
know."""

import json
import shutil

import pytest

from common.files import InputError
from generate import answer, load, stream
from helpers_commands import command
from helpers_models import random_adapter, write_adapters
from methods.session import add_adapter
from model import load_llama
from pool.adapters import linear_shapes, load_adapter, save_adapter

ASKED = {"max_new_tokens": 11}


@pytest.fixture(scope="module")
def shapes(small_model):
    return linear_shapes(load_llama(small_model))


@pytest.fixture
def folders(small_model, tmp_path):
    """Three adapters that a test may change."""
    return write_adapters(tmp_path / "mine", load_llama(small_model), ["one", "two", "three"])


@pytest.fixture
def other(shapes, tmp_path):
    """The folder of an adapter of rank 13, larger than those of `folders`."""
    save_adapter(random_adapter("other", shapes, 13, seed=99), tmp_path / "other")
    return tmp_path / "other"


def short(folder):
    return load_adapter(folder).hash[:12]


@pytest.mark.parametrize("resident", [0, 1])
def test_a_name_that_is_taken(small_model, folders, other, resident):
    """Without it whoever trained an adapter again and adds it is told that the name is taken, not
    whether the old one answers. `resident` 1: the first was never read."""
    mole = load(small_model, adapters={"three": folders["three"], "one": folders["one"]}, resident=resident)
    with pytest.raises(InputError, match="adapter 'one' is here already"):
        add_adapter(mole, "one", shutil.copytree(folders["one"], folders["one"].parent / "copy"))
    with pytest.raises(InputError, match="adapter 'one' differs") as refused:
        add_adapter(mole, "one", other)
    words = [short(folders["one"]), short(other), "first /remove one, then /add it", folders["one"], other]
    assert all(str(word) in str(refused.value) for word in words)
    mole.pool.remove("one")
    add_adapter(mole, "one", other)  # as it said
    fresh = load(small_model, adapters={"one": other})
    texts = [answer(m, "the quick fox", method="adapter:one", **ASKED) for m in (mole, fresh)]
    assert texts[0] == texts[1]


def test_files_that_changed_are_noticed_where_they_are_read_again(small_model, folders, other, capsys):
    """Without it a model that runs for days answers with an adapter that somebody trained meanwhile,
    and nothing says since when."""
    mole = load(small_model, adapters=folders, resident=1)
    before = answer(mole, "the quick fox", method="adapter:one", **ASKED)
    was = short(folders["one"])
    for file in other.iterdir():
        shutil.copy(file, folders["one"])
    assert answer(mole, "the quick fox", method="adapter:one", **ASKED) == before  # it is in its slot
    answer(mole, "the quick fox", method="adapter:two", **ASKED)
    assert "changed" not in capsys.readouterr().err
    after = answer(mole, "the quick fox", method="adapter:one", **ASKED)
    lines = [line for line in capsys.readouterr().err.splitlines() if "changed" in line]
    assert len(lines) == 1 and all(word in lines[0] for word in ("adapter one", was, short(other)))
    fresh = load(small_model, adapters={"one": other})
    assert after == answer(fresh, "the quick fox", method="adapter:one", **ASKED) and after != before
    answer(mole, "the quick fox", method="adapter:two", **ASKED)
    answer(mole, "the quick fox", method="adapter:one", **ASKED)
    assert "changed" not in capsys.readouterr().err  # said once


def test_files_that_are_gone_are_an_error_of_that_answer(small_model, folders):
    """Without it the pool is left half changed, and later answers fail as well."""
    mole = load(small_model, adapters=folders, resident=1)
    want = answer(mole, "the quick fox", method="adapter:two", **ASKED)
    answer(mole, "the quick fox", method="adapter:three", **ASKED)
    shutil.move(folders["two"], folders["two"].with_name("elsewhere"))
    with pytest.raises(InputError, match="two: no such adapter folder"):
        answer(mole, "the quick fox", method="adapter:two", **ASKED)
    shutil.move(folders["two"].with_name("elsewhere"), folders["two"])
    assert answer(mole, "the quick fox", method="adapter:two", **ASKED) == want


def test_gates_refuse_an_adapter_that_changed_on_disk(small_model, pool_with_every_part, tmp_path, other):
    """Without it gates send tokens to an adapter that they were not trained with."""
    pool = shutil.copytree(pool_with_every_part, tmp_path / "pool")
    mole = load(small_model, pool, resident=2)
    first, second, third = mole.pool.names
    asked = {"method": "meteora_top2", "exclude": [third], **ASKED}
    answer(mole, "the quick fox", **asked)
    answer(mole, "the quick fox", method=f"adapter:{third}", **ASKED)  # takes the slot of one of them
    (gone,) = {first, second} - set(mole.pool.resident)
    for file in other.iterdir():
        shutil.copy(file, pool / "adapters" / gone)
    with pytest.raises(InputError, match=rf"trained with other adapters: {gone} \(trained with"):
        answer(mole, "the quick fox", **asked)


@pytest.mark.parametrize("method", ["meteora_top2", "soft", "moe_top1", "uniform"])
def test_an_adapter_joins_while_an_answer_is_written(
    small_model, pool_with_every_part, other, method, capsys
):
    """The answer under way is the one that it would be alone; gates never choose the newcomer, which
    they say once, however often they are attached."""
    alone = load(small_model, pool_with_every_part)
    want = answer(alone, "the quick fox", method=method, **ASKED)
    mole = load(small_model, pool_with_every_part)
    text = ""
    for step, token in enumerate(stream(mole, "the quick fox", method=method, **ASKED)):
        text += token.text
        if step == 2:
            add_adapter(mole, "newcomer", other)  # of a larger rank
    assert text == want[0] and step > 4
    capsys.readouterr()
    if method != "uniform":  # which weighs all that there are
        for _ in range(2):
            assert answer(mole, "the quick fox", method=method, **ASKED) == want
            answer(mole, "the quick fox", method="adapter:newcomer", **ASKED)
        answer(mole, "the quick fox", method="arrow", **ASKED)
        assert answer(mole, "the quick fox", method=method, **ASKED) == want
        lines = [line for line in capsys.readouterr().err.splitlines() if "newcomer" in line]
        assert len(lines) == 1 and "has no row for newcomer: never chosen" in lines[0]


def test_an_adapter_joins_between_turns(small_model, pool_with_every_part, other):
    """Without it /add changes the answers of gates that don't know the newcomer, or those of the
    adapter that was asked before."""
    asked = ["generate.py", "--model", small_model, "--pool", pool_with_every_part, "--interactive"]
    asked += ["--json", "--max_new_tokens", "7"]
    texts = {}
    for add in ((), (f"/add newcomer={other}",)):
        lines = ["the quick fox", *add, "the lazy dog", "/method adapter:bee", "the quick fox"]
        done = command(*asked, "--method", "meteora_top2", stdin="\n".join(lines) + "\n")
        assert done.returncode == 0, done.stderr
        texts[add] = [json.loads(line)["text"] for line in done.stdout.splitlines()]
        assert done.stderr.count("newcomer") == len(add)
    without, with_newcomer = texts.values()
    assert len(without) == 3 and without == with_newcomer
