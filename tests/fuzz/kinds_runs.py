"""Cases that damage what train.py and eval.py read: tasks, texts, interrupted runs, kept answers."""

import json

from fuzz.files import damage_bytes, damage_json_file, damage_jsonl_file, replace_file
from fuzz.plan import ANY, EVAL, MUST, POOL, SAME, TRAIN_BASE, Plan, kind
from fuzz.tensors import damage_header, damage_metadata, damage_tensor
from fuzz.values import FOLDER_NAMES, HOSTILE, NUMBERS, dump, json_value, text

TRAIN = ["--model", "small", "--steps", "1", "--batch_size", "1"]
RESUME = {
    "adapters": "adapters --model small --pool adapters/out --tasks adapters/tasks --steps 5 --batch_size 2 "
    "--lr 0.01 --r 3 --alpha 5.0 --dropout 0.25 --save_every 2 --resume",
    "top2": "gates --model small --pool top2/out --tasks top2/tasks --steps 5 --batch_size 3 --lr 0.01 --resume",
    "base": "base --model base/out --text base/text.txt --vocab_size 307 --hidden_size 24 --intermediate_size 36 "
    "--num_hidden_layers 2 --num_attention_heads 4 --num_key_value_heads 2 --block_size 13 --batch_size 5 "
    "--steps 5 --no-compile --resume",
}  # the options of helpers_training
RUNS = {"adapters": "adapters/out/runs/adapters", "top2": "top2/out/runs/gates_top2"}
RUNS["base"] = "base/out/runs/base"
WROTE = {"adapters": ["adapters/out/adapters/*/*.safetensors"], "top2": ["top2/out/gates/*"]}
WROTE["base"] = ["base/out/model.safetensors"]
BENCHMARKS = {"bbh": "bbh/parity.json", "bio": "Bio-Benchmark/RNA/folding.json"}
BENCHMARKS["gsm8k"] = "grade_school_math/data/train.jsonl"


@kind("tasks", "small", "pool", "questions")
def tasks(rng, folder):
    name = rng.choice(["task.json", "test.jsonl", "train.jsonl"])
    file = folder / "questions" / "bee" / name
    done = damage_json_file(rng, file) if name == "task.json" else damage_jsonl_file(rng, file)
    commands = [[*EVAL, "--tasks", "questions", "--out", "out"]]
    commands.append(["train.py", "adapters", *TRAIN, "--tasks", "questions", "--pool", "new"])
    commands.append(["train.py", "gates", *TRAIN, "--tasks", "questions", "--pool", "pool"])
    return Plan(rng.choice(commands), f"questions/bee/{done}", ANY)


@kind("benchmarks", "benchmarks")
def benchmarks(rng, folder):
    """What `python -m tasks.bbh` and its like read."""
    name = rng.choice(sorted(BENCHMARKS))
    file = folder / "benchmarks" / BENCHMARKS[name]
    done = damage_json_file(rng, file) if file.suffix == ".json" else damage_jsonl_file(rng, file)
    return Plan([f"tasks/{name}.py", "benchmarks", "--out", "out"], done, ANY)


@kind("names of tasks", "small", "questions")
def task_names(rng, folder):
    argv = ["train.py", "adapters", *TRAIN, "--tasks", "questions", "--pool", "new"]
    if rng.random() < 0.3:
        metric = rng.choice(HOSTILE)
        (folder / "questions" / "ant" / "task.json").write_text(json.dumps({"metric": metric}))
        return Plan(argv, f"a metric is {metric!r}", MUST)
    name = rng.choice(FOLDER_NAMES)
    (folder / "questions" / "bee").rename(folder / "questions" / name)
    if rng.random() < 0.5:
        argv += ["--only", name]
    return Plan(argv, f"a task is {name!r}", ANY)


@kind("a file of examples", "small", "pool")
def lines(rng, folder):
    done = damage_jsonl_file(rng, folder / "lines.jsonl", named=True)
    commands = [[*EVAL, "--tasks", "lines.jsonl", "--out", "out"]]
    commands.append(["train.py", "gates", *TRAIN, "--tasks", "lines.jsonl", "--pool", "pool"])
    commands.append(["train.py", "retriever", "--model", "small", "--tasks", "lines.jsonl", "--pool", "pool",
                     "--steps", "1", "--prompts", "3"])  # fmt: skip
    return Plan(rng.choice(commands), done, ANY)


@kind("prompts", "small", "pool")
def prompts(rng, folder):
    file = folder / "prompts.jsonl"
    if rng.random() < 0.5:
        done = damage_jsonl_file(rng, file, named=True)
    else:
        field = rng.choice(["prompt", "method", "stop", "method", "stop"])
        row = {"prompt": "hi"}
        row[field] = rng.choice([json_value(rng), text(rng), [text(rng)], rng.choice(HOSTILE)])
        file.write_text(dump(row) + "\n")
        done = f"prompts.jsonl: {field} is {str(row[field])[:80]!r}"
    argv = ["generate.py", "--model", "small", "--pool", "pool", "--prompts", "prompts.jsonl", *POOL[-5:]]
    return Plan(argv, done, ANY)


@kind("samples for --init", "small", "pool")
def init_samples(rng, folder):
    (folder / "peft").mkdir()
    (folder / "pool" / "adapters" / "ant").rename(folder / "peft" / "ant")
    name = rng.choice(["samples.jsonl", "samples.txt"])
    file = folder / name
    if name.endswith("txt"):
        file.write_text("the ant\nquick\n")
        done = damage_bytes(rng, file) if rng.random() < 0.5 else replace_file(rng, file, named=True)
    else:
        done = damage_jsonl_file(rng, file, named=True)
    argv = ["generate.py", "--model", "small", "--pool", "peft", "--init", "--samples", f"ant={name}"]
    return Plan(argv, done, ANY)


@kind("text of a base")
def base_text(rng, folder):
    file = folder / "text.txt"
    if rng.random() < 0.5:
        done = replace_file(rng, file, named=True)
    else:
        much = ["a b\n" * 99, "\n" * 500, " " * 999, "\x00" * 999, "x"]
        new = rng.choice([text(rng), rng.choice(HOSTILE) * 50, *much])
        file.write_bytes(new.encode("utf-8", "surrogatepass"))
        done = f"text is {new[:60]!r}"
    return Plan(TRAIN_BASE, done, ANY)


# Runs that were interrupted -----------------------------------------------------------------------


def resumed(name, done, expect):
    """Goes on with the run `name`."""
    return Plan(["train.py", *RESUME[name].split()], f"{name}: {done}", expect, results=WROTE[name])


@kind("checkpoints", "small", "adapters", "top2", "base")
def checkpoints(rng, folder):
    """A weight of a checkpoint that is another one can't be noticed; what is missing, or of another
    shape, can."""
    name = rng.choice(sorted(RUNS))
    file = folder / RUNS[name] / "checkpoint.safetensors"
    draw = rng.random()
    if draw < 0.3:
        return resumed(name, damage_tensor(rng, file)[0], ANY)
    if draw < 0.55:
        return resumed(name, damage_header(rng, file)[0], ANY)
    if draw < 0.8:
        return resumed(name, damage_metadata(rng, file)[0], ANY)
    if draw < 0.9:
        return resumed(name, damage_bytes(rng, file, rng.choice([8, 200, None])), ANY)
    return resumed(name, replace_file(rng, file), ANY)


@kind("config.json of a run", "small", "adapters", "top2", "base")
def run_config(rng, folder):
    name = rng.choice(sorted(RUNS))
    return resumed(name, damage_json_file(rng, folder / RUNS[name] / "config.json"), SAME)


@kind("log.csv", "small", "adapters", "top2", "base")
def log(rng, folder):
    name = rng.choice(sorted(RUNS))
    file = folder / RUNS[name] / "log.csv"
    if rng.random() < 0.6:
        return resumed(name, rng.choice([damage_bytes, replace_file])(rng, file), SAME)
    first = rng.choice([*HOSTILE, "²", "1" * 5000, '"', "1,2,3,4,5,6,7,8", *map(str, NUMBERS[:8])])
    file.write_bytes(file.read_bytes() + f"{first},0.5\n".encode("utf-8", "surrogatepass"))
    return resumed(name, f"log.csv has the line {first[:50]!r}", SAME)


@kind("kept answers", "small", "pool", "questions", "scores")
def cells(rng, folder):
    """An answer that is another text can't be noticed."""
    files = sorted((folder / "scores" / "cells").glob("*.json"))
    done = damage_json_file(rng, rng.choice(files))
    argv = [*EVAL, "--tasks", "questions", "--out", "scores"]
    return Plan(argv, done, ANY)


@kind("results of eval.py", "small", "pool", "questions", "scores")
def eval_outputs(rng, folder):
    """What an earlier run left is written anew, or refused."""
    names = ["results.json", "results.md", "timing.json", "answers.jsonl", "cells/meta.json"]
    file = folder / "scores" / rng.choice(names)
    argv = [*EVAL, "--tasks", "questions", "--out", "scores"]
    if rng.random() < 0.1:
        return Plan([*argv[:-1], "lines.jsonl"], "--out is a file", MUST)
    return Plan(argv, replace_file(rng, file), SAME, results=["scores/results.md"])
