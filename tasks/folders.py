"""Task folders in, tokenized batches out.

A task folder holds NAME/train.jsonl and NAME/test.jsonl with {"prompt", "response"} a line, and
NAME/task.json with its metric. A file with {"adapter", "prompt", "response"} a line will do in
their place: each adapter's lines are a task of its name.

The data of a training step is a pure function of (seed, step), so a resumed run needs only its step
number to go on with the same data.
"""

import functools
import random
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from common.files import InputError, read_json, read_jsonl, warn
from common.options import nearest
from common.printable import shown
from common.template import encode_wrapped
from common.tokenizer import Tokenizer, check_ids
from pool.folder import check_adapter_name, is_folder_name
from pool.slots import Pool
from tasks.metrics import METRICS


@dataclass
class Task:
    """A task folder, or an adapter's lines of a file; train and test are lists of {"prompt", "response"}."""

    name: str
    metric: str
    train: list[dict[str, str]]
    test: list[dict[str, str]]


def load_tasks(
    path: str | Path, only: list[str] | None = None, adapters: Collection[str] = ()
) -> dict[str, Task]:
    """{name: Task} of a folder of task folders, all or `only` those named.

    `path` may also be a file with {"adapter", "prompt", "response"} a line. All lines of an adapter
    are its task's train split and its test split, and the metric is exact_match: task folders hold
    other metrics. `adapters` are the names that the lines may have, () for any.

    Raises InputError for what is missing, and for lines of an adapter that is not in `adapters`.
    """
    folder = Path(path)
    if folder.is_file():
        return _load_lines(folder, only, adapters)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder of tasks, nor a file of examples")
    names = sorted(file.parent.name for file in folder.glob("[!.]*/task.json"))
    if not names:
        raise InputError(f"{folder}: no task folders (NAME/task.json) in it")
    for name in names:
        check_adapter_name(name, folder, "task")
    for name in only or ():
        if name not in names:
            raise InputError(f"{folder}: no task {name!r}{nearest(name, names)}")
    return {name: _load_task(folder / name) for name in (only or names)}


def _load_task(folder):
    metric = read_json(folder / "task.json").get("metric")
    if metric not in METRICS:
        expected = f"one of {', '.join(METRICS)}"
        raise InputError(f"{folder / 'task.json'}: metric is {shown(metric)}, expected {expected}")
    train = read_jsonl(folder / "train.jsonl", ("prompt", "response"))
    test = read_jsonl(folder / "test.jsonl", ("prompt", "response"))
    return Task(folder.name, metric, train, test)


def _load_lines(file, only, adapters):
    rows = {}  # {adapter: [{"prompt", "response"}]}
    for row in read_jsonl(file, ("adapter", "prompt", "response")):
        rows.setdefault(row.pop("adapter"), []).append(row)
    if not rows:
        raise InputError(f"{file}: no example in it")
    for name in rows:
        if not is_folder_name(name):
            expected = "expected one that can name a folder"
            raise InputError(f"{file}: adapter is {name!r}, {expected}")
        if adapters and name not in adapters:
            hint = nearest(name, adapters) or f", it has {', '.join(sorted(adapters))}"
            found = f"adapter {name!r} (in {len(rows[name])} lines) is not in the pool"
            raise InputError(f"{file}: {found}{hint}")
    names = only or sorted(rows)
    if missing := [name for name in names if name not in rows]:
        found = f"no line for {len(missing)} of {len(names)} adapters: {', '.join(missing)}"
        hint = nearest(missing[0], rows) if len(missing) == 1 else ""
        raise InputError(f"{file}: {found}{hint}")
    return {name: Task(name, "exact_match", rows[name], rows[name]) for name in names}


# Tokens -------------------------------------------------------------------------------------------


@dataclass
class Example:
    """Token ids of prompt and response, EOS at the end."""

    ids: list[int]
    n_prompt: int  # so many ids, from the first on, are the prompt
    task: str
    row: dict | None = None  # the task's row that was tokenized

    @property
    def parts(self) -> list["Example"]:
        """[self], as in a PackedExample of one."""
        return [self]


@dataclass
class PackedExample:
    """Several questions and answers in one text; a part without a task ("") has no adapter."""

    parts: list[Example]

    @property
    def ids(self) -> list[int]:
        """Token ids of all parts."""
        return [index for part in self.parts for index in part.ids]


def encode(tokenizer: Tokenizer, template: str, row: dict[str, str], task: str = "") -> Example:
    """{"prompt", "response"} -> Example. Prompt and response are tokenized separately."""
    prompt = encode_wrapped(tokenizer, template, row["prompt"])
    if tokenizer.eos_id is None:
        problem = "a model could not learn where answers end"
        raise InputError(f"this tokenizer has no EOS token: {problem}")
    ids = [*prompt, *tokenizer.encode(row["response"], start=False), tokenizer.eos_id]
    return Example(ids, len(prompt), task, row)


def encode_all(
    tokenizer: Tokenizer, template: str, rows: list[dict[str, str]], task: str, max_length: int
) -> tuple[list[Example], int]:
    """The Examples of at most `max_length` tokens, and how many were longer and left out."""
    examples = [encode(tokenizer, template, row, task) for row in rows]
    kept = [example for example in examples if len(example.ids) <= max_length]
    if not kept:
        problem = f"no training example of at most {max_length} tokens"
        raise InputError(f"task {task}: {problem} ({len(rows)} examples)")
    return kept, len(examples) - len(kept)


def tokenize(
    tasks: dict[str, Task], tokenizer: Tokenizer, vocab_size: int, template: str, max_length: int
) -> dict[str, list[Example]]:
    """{task name: [Example]} of the train splits; a warning counts those over `max_length`."""
    examples = {}
    long = 0
    for name, task in tasks.items():
        examples[name], dropped = encode_all(tokenizer, template, task.train, name, max_length)
        check_ids([max(example.ids) for example in examples[name]], vocab_size)
        long += dropped
    if long:
        warn(f"{long} training examples of more than --max_length {max_length} tokens are left out")
    return examples


def draw(items: list, name: str, step: int, count: int, seed: int) -> list:
    """The `count` items of training step `step`; each epoch is shuffled by (seed, name, epoch)."""
    picked = []
    for position in range(step * count, (step + 1) * count):
        epoch, index = divmod(position, len(items))
        picked.append(items[_order(seed, name, epoch, len(items))[index]])
    return picked


def pick(examples: dict[str, list[Example]], step: int, args) -> list[Example]:
    """The args.batch_size examples of a step, one of each task in turn."""
    names = sorted(examples)
    picked = []
    for position in range(step * args.batch_size, (step + 1) * args.batch_size):
        turn, index = divmod(position, len(names))
        name = names[index]
        picked += draw(examples[name], name, turn, 1, args.seed)
    return picked


def some_tasks(names: Iterable[str], share: float, seed: int) -> list[str]:
    """A random share of the task names, at least two, sorted; the same for the same seed."""
    names = sorted(names)
    count = min(len(names), max(2, round(share * len(names))))
    return sorted(random.Random(f"{seed}/share").sample(names, count))


@functools.lru_cache(maxsize=256)  # more than the tasks of a run
def _order(seed, name, epoch, n):
    return random.Random(f"{seed}/{name}/{epoch}").sample(range(n), n)


def micro_batches(
    examples: list[Example | PackedExample], max_tokens: int, padded: bool = False
) -> list[list[Example | PackedExample]]:
    """Splits a step's examples, shortest first, into batches of at most `max_tokens` tokens each.

    With `padded` rows, padding counts too. Then the longest example of a batch has at most 1.5
    times the tokens of the shortest, or 16 more, so that padding stays a small share.
    """
    batches = []
    current = []
    total = 0
    for example in sorted(examples, key=lambda example: len(example.ids)):
        length = len(example.ids)
        shortest = len(current[0].ids) if current else length
        total = (len(current) + 1) * length if padded else total + length
        too_long = padded and length > max(1.5 * shortest, shortest + 16)
        if current and (total > max_tokens or too_long):
            batches.append(current)
            current = []
            total = length
        current.append(example)
    return [*batches, current] if current else batches


@dataclass
class Batch:
    """Examples as right-padded rows of token ids."""

    ids: torch.Tensor  # (b, t) int64, padded with 0
    real: torch.Tensor  # (b, t) bool: not padding
    predicts: torch.Tensor  # (b, t) bool: the next token belongs to a response
    part: torch.Tensor  # (b, t) int64: which of `parts` a token belongs to
    at: torch.Tensor  # (b, t) int64: the token's position in its part
    parts: list[Example]
    lengths: list[int]  # real tokens of each row
    seed: str = ""  # of the run and the step, for random numbers

    @property
    def tasks(self) -> list[str]:
        """The task of each part, "" where it has none."""
        return [part.task for part in self.parts]

    @property
    def prompt(self) -> torch.Tensor:
        """(b, t): a real token of a prompt."""
        lengths = torch.tensor([part.n_prompt for part in self.parts], device=self.at.device)
        return self.real & (self.at < lengths[self.part])

    def random_of_parts(self, what: str) -> torch.Tensor:
        """(parts,) float32 from 0 to 1, on the CPU, by `what`, the seed and the part's ids alone: so the
        rest of the batch doesn't matter."""
        keys = [f"{self.seed}/{what}/{part.ids}" for part in self.parts]
        return torch.tensor([random.Random(key).random() for key in keys])

    def slots(self, pool: Pool) -> torch.Tensor:
        """(b, t) int64: the slot of the adapter of each token's task, -100 where there is none."""
        slots = [pool.slot(task) if task else -100 for task in self.tasks]
        return torch.tensor(slots, device=self.part.device)[self.part].masked_fill(~self.real, -100)


def collate(
    examples: list[Example | PackedExample],
    device: str | torch.device | None = None,
    seed: str = "",
) -> Batch:
    """Examples and PackedExamples -> Batch."""
    lengths = [len(example.ids) for example in examples]
    t = max(lengths)
    ids = torch.zeros(len(examples), t, dtype=torch.int64)
    part = torch.zeros_like(ids)
    at = torch.zeros_like(ids)
    real = torch.zeros_like(ids, dtype=torch.bool)
    predicts = torch.zeros_like(ids, dtype=torch.bool)
    parts = []
    for row, example in enumerate(examples):
        begin = 0
        for one in example.parts:
            end = begin + len(one.ids)
            ids[row, begin:end] = torch.tensor(one.ids)
            real[row, begin:end] = True
            predicts[row, max(0, begin + one.n_prompt - 1) : max(0, end - 1)] = True
            part[row, begin:] = len(parts)
            at[row, begin:] = torch.arange(t - begin)
            parts.append(one)
            begin = end
    tensors = [tensor.to(device) for tensor in (ids, real, predicts, part, at)]
    return Batch(*tensors, parts, lengths, seed)
