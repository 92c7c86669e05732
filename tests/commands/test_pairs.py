"""What one command writes every other reads: each command of train.py before each other command."""

import json
import shutil
import sys

import pytest

import eval as evaluation
import generate
import train
from common.files import InputError, read_jsonl, write_jsonl
from common.tensors import read_safetensors
from helpers_training import write_tasks

KINDS = ("meteora", "soft", "loraflow", "smear", "moe")
# What each command writes, and the method that reads it (beside those that read adapters alone).
WRITERS = {
    "adapters": ("", ["base", "adapter:animals", "uniform", "svd", "ties_ba", "arrow", "logo"]),
    "adapters again": ("adapters --only animals --steps 1 --batch_size 1", ["adapter:plurals"]),
    "joint": ("adapters --joint lora_b --steps 1 --batch_size 1", ["lora_b"]),
    "adapters_too": ("gates --adapters_too NEW --steps 1 --batch_size 2", ["meteora", "adapter:animals"]),
    "fit": ("gates --fit own --top_k 1 --steps 1 --batch_size 8", ["meteora_top1"]),
    "lorahub": ("lorahub --steps 2", ["lorahub:animals"]),
    "drlora": ("drlora --steps 2 --grow_every 1 --batch_size 2", ["drlora", "adapter:animals"]),
    "retriever": ("retriever --steps 1 --prompts 5", ["selection", "mixture", "fusion", "adaptersoup"]),
    "samora": ("samora --steps 1 --batch_size 2", ["samora", "samora:animals"]),
    "router": ("router --share 1 --steps 1 --batch_size 2", ["ramole"]),
}
for kind in KINDS:
    name = {"meteora": "meteora_top2", "moe": "moe_top1"}.get(kind, kind)
    k = 1 if kind == "moe" else 2
    WRITERS[kind] = (f"gates --kind {kind} --top_k {k} --steps 1 --batch_size 2", [name])
TRAINERS = ["adapters again", "joint", "fit", "lorahub", "retriever", "router", *KINDS]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("pairs") / "tasks")


@pytest.fixture(scope="module")
def pools(small_model, tasks):
    """A function of a writer's name: the pool folder that it has written into."""
    first = tasks.parent / "first"
    made = {}

    def pool(name):
        if name not in made:
            folder = tasks.parent / name.replace(" ", "_")
            if first.exists():
                shutil.copytree(first, folder)
            new = folder.with_name(folder.name + "_new")
            trains = WRITERS[name][0].replace("NEW", str(new))
            if trains:
                run_train(small_model, tasks, new if name == "drlora" else folder, trains)
            made[name] = new if new.exists() else folder
        return made[name]

    run_train(small_model, tasks, first, "adapters --steps 1 --batch_size 1")
    return pool


def run(module, *args):
    """A command's main() in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["command", *map(str, args)])
        module.main()


def run_train(model, tasks, pool, line):
    run(train, *line.split(), "--model", model, "--tasks", tasks, "--pool", pool)


@pytest.mark.parametrize("writer", WRITERS)
def test_generate_reads_what_train_wrote(writer, small_model, pools, capsys):
    """Without it a trainer's file is refused, or is a traceback, when somebody at last asks."""
    where = ["--model", small_model, "--pool", pools(writer)]
    run(generate, *where, "--list")
    run(generate, *where, "--prompt", "the fox", "--max_new_tokens", 2)  # by the default method
    for method in WRITERS[writer][1]:
        run(generate, *where, "--prompt", "the fox", "--max_new_tokens", 2, "--method", method)
    assert "another base" not in capsys.readouterr().err


@pytest.mark.parametrize("writer", WRITERS)
def test_eval_reads_what_train_wrote(writer, small_model, tasks, pools, tmp_path, capsys):
    """Without it the table of a run that took a night is a line that says what it can't read."""
    methods = ",".join(WRITERS[writer][1])
    where = ["--model", small_model, "--pool", pools(writer), "--tasks", tasks, "--out", tmp_path / "out"]
    run(evaluation, *where, "--methods", methods, "--limit", 1, "--max_new_tokens", 2)
    assert (tmp_path / "out" / "results.json").exists()


@pytest.mark.parametrize("reader", TRAINERS)
@pytest.mark.parametrize("writer", WRITERS)
def test_train_reads_what_train_wrote(writer, reader, small_model, tasks, pools, tmp_path, capsys):
    """Without it the second step of a recipe refuses what the first has written, or adapters of
    another run come under its gates."""
    pool = shutil.copytree(pools(writer), tmp_path / "pool")
    run_train(small_model, tasks, pool, WRITERS[reader][0])


def test_a_retriever_before_its_adapters(small_model, tasks, tmp_path, capsys):
    """README's `--pool OUT --test`: tuned in a folder without adapters, it is for those that join."""
    pool = tmp_path / "pool"
    run_train(small_model, tasks, pool, "retriever --share 0.5 --steps 1 --prompts 5")
    run_train(small_model, tasks, pool, "adapters --steps 1 --batch_size 1")
    run(generate, "--model", small_model, "--pool", pool, "--prompt", "x", "--method", "selection")
    for name in ("router", "meteora"):
        run_train(small_model, tasks, pool, WRITERS[name][0])
    run(generate, "--model", small_model, "--pool", pool, "--prompt", "the fox", "--method", "ramole")


@pytest.mark.parametrize("trainer", TRAINERS)
def test_no_trainer_takes_another_base(trainer, small_model, tasks, pools, tmp_path, capsys):
    """Adapters trained on another base are noise: what learns over them learns noise."""
    pool = shutil.copytree(pools("adapters"), tmp_path / "pool")
    raw = json.loads((pool / "pool.json").read_text())
    (pool / "pool.json").write_text(json.dumps(raw | {"base": "f" * 32}))
    with pytest.raises(InputError, match="pool.json: trained on base ffffffffffff"):
        run_train(small_model, tasks, pool, WRITERS[trainer][0])


def test_a_base_of_our_own(tasks, tmp_path, capsys):
    """The folder that `train.py base` writes is a model folder and, later, a pool."""
    model = tmp_path / "base"
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. what is the plural of mouse?\n\n" * 99)
    sizes = "--hidden_size 24 --intermediate_size 36 --num_hidden_layers 2 --num_attention_heads 4"
    sizes += " --num_key_value_heads 2 --vocab_size 300 --block_size 64 --batch_size 2 --steps 1"
    run(train, "base", "--model", model, "--text", text, *sizes.split())
    run(generate, "--model", model, "--prompt", "the fox", "--max_new_tokens", 2)
    run_train(model, tasks, model, "adapters --steps 1 --batch_size 1")
    for name in ("meteora", "retriever", "router", "lorahub", "joint"):
        run_train(model, tasks, model, WRITERS[name][0])
    for method in ("meteora", "ramole", "selection", "lorahub:animals", "lora_b"):
        run(generate, "--model", model, "--prompt", "the fox", "--max_new_tokens", 2, "--method", method)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_few_lines_of_each_adapter(count, small_model, tasks, pools, tmp_path, capsys):
    """Who has one, two or three examples of each adapter, in one file, must get gates, a router and
    LoraHub's weights, and a retriever or one line that says why there is none, not a traceback or
    weights of NaN."""
    pool = shutil.copytree(pools("adapters"), tmp_path / "pool")
    file = tmp_path / "examples.jsonl"
    lines = []
    for name in ("animals", "plurals"):
        for row in read_jsonl(tasks / name / "train.jsonl", ("prompt", "response"))[:count]:
            lines.append({"adapter": name} | row)
    write_jsonl(file, lines)
    if count == 1:
        with pytest.raises(InputError, match="one prompt of each of 2 tasks, expected two or more"):
            run_train(small_model, file, pool, "retriever")
    else:
        run_train(small_model, file, pool, "retriever --steps 3")
    for reader in ("router", "meteora", "loraflow", "lorahub", "joint", "adapters again"):
        run_train(small_model, file, pool, WRITERS[reader][0])
    for saved in pool.rglob("*.safetensors"):
        for name, tensor in read_safetensors(saved)[0].items():
            assert tensor.isfinite().all(), (saved, name)


def test_eval_scores_the_lines_of_a_file(small_model, tasks, pools, tmp_path, capsys):
    """All lines are asked, each by its own adapter where oracle answers; composites would show
    the lines that they ask as solved."""
    file = tmp_path / "examples.jsonl"
    write_jsonl(file, [{"adapter": "plurals", "prompt": "mouse", "response": "x"}] * 3)
    where = ["--model", small_model, "--pool", pools("adapters"), "--tasks", file, "--only", "plurals"]
    where += ["--max_new_tokens", 2, "--methods", "oracle,adapter:plurals,adapter:animals"]
    run(evaluation, *where, "--out", tmp_path / "out")
    rows = read_jsonl(tmp_path / "out" / "answers.jsonl", ("prompt", "response", "answer"))
    answers = [row["answer"] for row in rows]
    assert answers[:3] == answers[3:6] and len(answers) == 9
    results = json.loads((tmp_path / "out" / "results.json").read_text())["methods"]
    task = results["oracle"]["tasks"]["plurals"]
    assert (task["n"], task["metric"], task["score"]) == (3, "exact_match", 0.0)
    with pytest.raises(InputError, match="--composite solves training examples"):
        run(evaluation, *where, "--out", tmp_path / "out", "--composite", "2")
    with pytest.raises(InputError, match="no line for 1 of 2 adapters: animals"):
        run(evaluation, "--model", small_model, "--pool", pools("adapters"), "--tasks", file)
