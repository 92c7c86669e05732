"""What a case is: a command to run in a damaged copy of the world, and which outcomes are right."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

# What may come of a command, besides one line `error: ...` and exit status 2, which always may.
MUST = "must be refused"
SAME = "the undamaged answer"
ORACLE = "the answer of transformers and PEFT"
ANY = "an answer"  # where the damage can't be noticed, or makes something else that is as good

MODEL = ["--max_new_tokens", "4", "--dtype", "float32", "--json"]
GENERATE = ["generate.py", "--model", "hf", "--prompt", "the quick fox", "--raw", *MODEL]
CHAT = ["generate.py", "--model", "hf", "--prompt", "the quick fox", "--chat", *MODEL]
SHARDS = ["generate.py", "--model", "shards", "--prompt", "the quick fox", "--raw", *MODEL]
SMALL = ["generate.py", "--model", "small", "--prompt", "the quick fox", "--raw", *MODEL]
BEE = [*GENERATE, "--adapter", "bee=bee", "--method", "adapter:bee"]
LIST = ["generate.py", "--model", "small", "--pool", "pool", "--list"]
POOL = ["generate.py", "--model", "small", "--pool", "pool", "--prompt", "the quick fox", *MODEL]
EVAL = ["eval.py", "--model", "small", "--pool", "pool", "--methods", "base,mixture"]
EVAL += ["--max_new_tokens", "3", "--dtype", "float32"]
BASE_SIZES = "--vocab_size 300 --hidden_size 24 --intermediate_size 36 --num_hidden_layers 1 "
BASE_SIZES += "--num_attention_heads 4 --num_key_value_heads 2 --block_size 13 --steps 1 --no-compile"
TRAIN_BASE = f"train.py base --model new --text text.txt {BASE_SIZES}".split()


@dataclass
class Plan:
    """A command, how its folder was damaged, and what may come of it."""

    argv: list[str]
    damage: str
    expect: str
    stdin: str = ""
    results: list[str] = field(default_factory=list)  # files that are part of the answer, as globs
    several_errors: bool = False  # a loop that goes on after an error
    colours: bool = False  # the command was asked for a terminal's colours
    kind: str = ""
    number: int = 0
    folder: Path = Path()


@dataclass
class Kind:
    """A kind of file or option: which parts of the world it needs, and what damages them."""

    needs: tuple[str, ...]
    make: Callable[[random.Random, Path], Plan]


KINDS: dict[str, Kind] = {}


def kind(name: str, *needs: str) -> Callable:
    """Registers make(rng, folder) -> Plan as a kind of case; `folder` holds copies of `needs`."""

    def register(make):
        KINDS[name] = Kind(needs, make)
        return make

    return register
