"""Trainers over adapters that other programs made: PEFT folders, --adapter, and the template."""

import dataclasses

import pytest

from common.files import InputError, read_json, read_jsonl, write_jsonl
from common.tensors import read_metadata
from generate import answer, load
from helpers_commands import command
from helpers_models import write_adapters
from helpers_training import ANSWERS, argv, options, prompts, run, write_tasks
from model import load_llama
from pool.folder import read_pool

MINE = "Q: {prompt}\nA:"


@pytest.fixture
def peft_folders(small_model, tmp_path):
    """A plain folder of PEFT folders, with prompts of each one's training data beside them."""
    folders = write_adapters(tmp_path / "peft", load_llama(small_model), ANSWERS, size=0.1)
    for name, folder in folders.items():
        write_jsonl(folder / "samples.jsonl", [{"prompt": text} for text in prompts(name, 5)])
    return folders


def over(kind, small_model, tmp_path, **more):
    """A small run of the kind over another pool than the one that options() writes."""
    return dataclasses.replace(options(kind, small_model, tmp_path / "other" / "pool", steps=2), **more)


@pytest.mark.parametrize("kind", ["top2", "router", "lorahub"])
def test_a_folder_of_peft_folders_learns_its_template(kind, small_model, tmp_path, peft_folders, capsys):
    """Gates that were trained under a template which nobody wrote down see other prompts when they
    are used, and answer noise."""
    pool = tmp_path / "peft"
    o = over(kind, small_model, tmp_path, pool=str(pool), template=MINE)
    run(o)
    assert f"template: {MINE!r} (as asked)" in capsys.readouterr().err
    kept = read_pool(pool)
    assert kept.template == MINE and kept.adapters == peft_folders
    assert kept.fingerprint == load_llama(small_model).fingerprint()
    assert "adapters" not in read_json(pool / "pool.json")
    mole = load(small_model, pool)
    method = {"top2": "meteora_top2", "router": "ramole", "lorahub": "lorahub:animals"}[kind]
    assert mole.template == MINE and answer(mole, "the fox", method=method, max_new_tokens=3, k=2)
    with pytest.raises(InputError, match=r"pool\.json: template is 'Q: .*, this run's '{prompt}'"):
        run(dataclasses.replace(o, template="", raw=True))


@pytest.mark.parametrize("kind", ["top2", "router", "lorahub"])
def test_adapters_named_one_by_one(kind, small_model, tmp_path, peft_folders):
    """Who has adapters here and there shouldn't have to move them: the new pool gets what is
    trained, and the same --adapter options use it."""
    pool = tmp_path / "new"
    named = [f"{name}={folder}" for name, folder in peft_folders.items()]
    run(over(kind, small_model, tmp_path, pool=str(pool), adapter=named, raw=True))
    assert read_pool(pool).template == "{prompt}" and not read_pool(pool).adapters
    method = {"top2": "meteora_top2", "router": "ramole", "lorahub": "lorahub:animals"}[kind]
    said = answer(load(small_model, pool, peft_folders), "the fox", method=method, max_new_tokens=3, k=2)
    line = ["--model", small_model, "--pool", pool, *(f"--adapter={one}" for one in named)]
    asked = ["--prompt", "the fox", "--method", method, "--max_new_tokens", 3, "--retrieve", 2]
    done = command("generate.py", *line, *asked)
    assert done.returncode == 0 and done.stdout == f"{said[0]}\n", done.stderr
    assert "template: '{prompt}' (from pool.json)" in done.stderr
    tasks = ["--tasks", write_tasks(tmp_path / "tasks"), "--out", tmp_path / "out"]
    done = command("eval.py", *line, *tasks, "--methods", "base,oracle", "--max_new_tokens", 3)
    assert done.returncode == 0, done.stderr


def test_a_retriever_of_adapters_named_one_by_one(small_model, tmp_path, peft_folders):
    """Without their vectors in the file each start embeds their samples again."""
    tasks = write_tasks(tmp_path / "tasks")
    named = [f"--adapter={name}={folder}" for name, folder in peft_folders.items()]
    line = ["--model", small_model, "--tasks", tasks, "--pool", tmp_path / "new", *named, "--steps", 2]
    done = command("train.py", "retriever", *line, "--share", 1)
    assert done.returncode == 0, done.stderr
    metadata = read_metadata(tmp_path / "new" / "retriever.safetensors")
    assert metadata["names"].split("\n") == sorted(ANSWERS)


def test_a_new_pool_keeps_the_template_of_its_adapters(small_model, tmp_path):
    """The default for new adapters is MeteoRA's; a pool that has another keeps it for later ones."""
    o = options("adapters", small_model, tmp_path / "out", template=MINE, only=["animals"])
    run(o)
    run(dataclasses.replace(o, template="", only=["plurals"], steps=3))
    kept = read_pool(tmp_path / "out")
    assert kept.template == MINE and kept.adapters.keys() == ANSWERS.keys()
    assert len(read_jsonl(kept.adapters["animals"] / "samples.jsonl", ["prompt"])) == 11


def test_templates_exclude_each_other_before_anything_is_read(small_model, tmp_path):
    """One of two would be ignored."""
    done = command("train.py", *argv(options("top1", small_model, tmp_path / "out")), "--raw", "--chat")
    assert done.returncode == 2 and "--chat and --raw exclude each other" in done.stderr
