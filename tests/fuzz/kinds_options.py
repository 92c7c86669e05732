"""Cases with hostile options, of every command, and hostile lines for --interactive."""

import typing
from dataclasses import fields

import bench
import eval
import generate
import train
from fuzz.plan import ANY, MUST, TRAIN_BASE, Plan, kind
from fuzz.values import HOSTILE, NEVER, NUMBER_TEXTS, PATTERNS

LONG = "d/" * 3000 + "x"
TEXTS = [*HOSTILE, *NUMBER_TEXTS[:20], *PATTERNS, LONG, "x" * 99999, "-", "=", "a=b", "a=b=c", "bee=bee"]
TEXTS += ["small", "pool", "questions", "/dev/null"]
TEXTS = [value for value in TEXTS if "\x00" not in value and value != "\ud800"]  # as of any command line
NUMBERS = [value for value in NUMBER_TEXTS if "\x00" not in value]
SLOW = {"compile", "tensorboard"}  # a compiler's seconds, a library that may be missing
WORK = {"steps", "composites", "prompts", "write_samples"}  # of which 2**31 is honest work
BEYOND = {("alpha", "1e308"), ("top_p", "1e-46"), ("batch_size", str(10**30)), ("r", str(10**30))}

POOLED = "--model small --pool pool"
TRAINERS = {
    "base": " ".join(TRAIN_BASE[2:]),
    "adapters": "--model small --pool new --tasks questions --steps 1",
    "drlora": "--model small --pool new --tasks questions --steps 2 --grow_every 1 --batch_size 3",
    "gates": f"{POOLED} --tasks questions --steps 1 --batch_size 3",
    "lorahub": f"{POOLED} --tasks questions --steps 1",
    "retriever": f"{POOLED} --tasks questions --steps 1 --prompts 3",
    "router": f"{POOLED} --tasks questions --steps 1 --batch_size 3",
    "samora": f"{POOLED} --tasks questions --steps 1 --batch_size 3",
}
ANSWER = f"generate.py {POOLED} --prompt hi --max_new_tokens 4 --json"
INIT = f"generate.py {POOLED} --init"
EXPORT = f"generate.py {POOLED} --mix ant=0.5,bee=0.5 --export new"
SCORE = f"eval.py {POOLED} --tasks questions --methods base --max_new_tokens 3 --limit 1"
BENCH = {
    "layer": bench.LayerBench, "decode": bench.DecodeBench, "prefill": bench.PrefillBench, "train": bench.TrainBench,
    "methods": bench.MethodsBench, "split": bench.SplitBench, "cache": bench.CacheBench,
}  # fmt: skip


def kind_of(cls, field):
    """int, float, bool, or str for all else."""
    hint = typing.get_type_hints(cls)[field.name]
    kinds = {part for part in (hint, *typing.get_args(hint)) if part in (int, float, bool)}
    return kinds.pop() if kinds else str


def option(rng, cls, argv, kinds=(int, float, bool, str)):
    """`argv` with one more option of these `kinds`, of any value."""
    able = [field for field in fields(cls) if field.name not in SLOW and kind_of(cls, field) in kinds]
    field = rng.choice(able)
    name, of = f"--{field.name.rstrip('_')}", kind_of(cls, field)
    if of is bool:
        return Plan([*argv, f"{name}={rng.choice(TEXTS)}"], f"{name}=TEXT", MUST)
    if of is str:
        value = rng.choice(TEXTS)
        expect = ANY
    else:
        value = rng.choice(NUMBERS)
        if field.name in WORK:
            value = rng.choice([value for value in NUMBERS if value not in (str(2**31), str(2**63))])
        no_int = of is int and not value.lstrip("-").replace("_", "").isdecimal()
        expect = MUST if value in NEVER or no_int or (field.name, value) in BEYOND else ANY
    return Plan([*argv, f"{name}={value}"], f"{name}={value[:60]!r}", expect)


@kind("options of generate.py", "small", "pool", "questions")
def generate_options(rng, folder):
    line = rng.choice([ANSWER] * 4 + [INIT, EXPORT])
    return option(rng, generate.Options, line.split())


@kind("options of train.py", "small", "pool", "questions")
def train_options(rng, folder):
    name = rng.choice(sorted(TRAINERS))
    return option(rng, train.COMMANDS[name][0], ["train.py", name, *TRAINERS[name].split()])


@kind("numbers of train.py", "small", "pool", "questions")
def train_numbers(rng, folder):
    name = rng.choice(sorted(TRAINERS))
    argv = ["train.py", name, *TRAINERS[name].split()]
    return option(rng, train.COMMANDS[name][0], argv, (int, float))


@kind("options of eval.py", "small", "pool", "questions")
def eval_options(rng, folder):
    return option(rng, eval.Options, SCORE.split())


@kind("options of bench.py", "small", "pool", "questions")
def bench_options(rng, folder):
    """Only those that must be refused: a benchmark takes its time."""
    name = rng.choice(sorted(BENCH))
    numbers = [field for field in fields(BENCH[name]) if kind_of(BENCH[name], field) in (int, float)]
    texts = [
        field for field in fields(BENCH[name]) if field.name in ("n", "width", "e", "k", "union", "slots")
    ]
    field = rng.choice([*numbers, *texts])
    value = rng.choice(sorted(NEVER - {"", " "}) + ["-1", "0.5", str(10**30)])
    argv = ["bench.py", name, f"--{field.name}={value}"]
    names = {field.name for field in fields(BENCH[name])}
    argv += ["--model", "small"] if "model" in names else []
    argv += ["--no-peers"] if "peers" in names else []
    able = field.name == "seed" or (kind_of(BENCH[name], field) is float and value == "0.5")
    return Plan(argv, f"--{field.name}={value[:60]!r}", ANY if able else MUST)


@kind("unknown options", "small")
def unknown(rng, folder):
    value = rng.choice(TEXTS)
    lines = [[f"--{value}"], [value], ["--promt", value], [f"--prompt={value}", f"--{value}={value}"]]
    line = rng.choice(lines)
    script = rng.choice(["generate.py", "train.py", "train.py gates", "eval.py", "bench.py layer"]).split()
    return Plan([*script, *line, "--nonsense"], f"{line!r}"[:100], MUST)


@kind("lines of --interactive", "small", "pool")
def interactive(rng, folder):
    words = ["/add ", "/add x=", "/mix ", "/mix ant=", "/method ", "/remove ", "/route", "/new ", "/x", ""]
    values = [value for value in TEXTS if "\n" not in value and len(value) < 9000]
    lines = [f"{rng.choice(words)}{rng.choice(values)}" for _ in range(6)]
    argv = f"generate.py {POOLED} --interactive --max_new_tokens 3 --no-routing".split()
    stdin = "\n".join(lines) + "\n"
    return Plan(argv, f"lines {[line[:60] for line in lines]!r}", ANY, stdin=stdin, several_errors=True)


@kind("standard input", "small")
def standard_input(rng, folder):
    value = rng.choice([*HOSTILE, *PATTERNS, "x" * 100000, "\x00" * 50])
    argv = ["generate.py", "--model", "small", "--prompt", "-", "--json", "--truncate", "left"]
    return Plan(argv, f"the prompt is {value[:60]!r}", ANY, stdin=value.replace("\ud800", ""))
