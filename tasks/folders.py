"""Task folders in, tokenized batches out.

A task folder is NAME/train.jsonl, NAME/test.jsonl with {"prompt", "response"} a line, and
NAME/task.json with its metric. What a training step sees is a pure function of (seed, step): a
resumed run needs no more than its step number to go on with the same data.
"""

import functools
import random
from dataclasses import dataclass
from pathlib import Path

import torch

from common.files import InputError, read_json, read_jsonl, warn
from common.options import nearest
from common.tokenizer import check_ids
from tasks.metrics import METRICS


@dataclass
class Task:
    """One task folder; train and test are lists of {"prompt", "response"}."""

    name: str
    metric: str
    train: list
    test: list


def load_tasks(folder, only=None):
    """{name: Task} of a folder of task folders, `only` those named. Raises InputError for what is
    missing."""
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder of tasks")
    names = sorted(f.parent.name for f in folder.glob("[!.]*/task.json"))
    if not names:
        raise InputError(f"{folder}: no task folders (NAME/task.json) in it")
    for name in only or ():
        if name not in names:
            raise InputError(f"{folder}: no task {name!r}{nearest(name, names)}")
    return {name: _load_task(folder / name) for name in (only or names)}


def _load_task(folder):
    metric = read_json(folder / "task.json").get("metric")
    if metric not in METRICS:
        raise InputError(
            f"{folder / 'task.json'}: metric is {metric!r}, expected one of {', '.join(METRICS)}"
        )
    splits = [read_jsonl(folder / f"{split}.jsonl", ("prompt", "response")) for split in ("train", "test")]
    return Task(folder.name, metric, *splits)


# Tokens -------------------------------------------------------------------------------------------


@dataclass
class Example:
    """Token ids of prompt and response, EOS at the end; the first `n_prompt` of them are the
    prompt. `row` is what it was made of."""

    ids: list
    n_prompt: int
    task: str
    row: dict | None = None

    @property
    def parts(self):
        """Itself: a PackedExample of one."""
        return [self]


@dataclass
class PackedExample:
    """Several questions and answers in one text: parts are Examples, each a piece of it; a piece
    without a task ("") belongs to no adapter."""

    parts: list

    @property
    def ids(self):
        """Token ids of all parts."""
        return [index for part in self.parts for index in part.ids]


def fill(template, prompt):
    """The prompt as the model sees it. Not str.format: prompts may hold braces."""
    return template.replace("{prompt}", prompt)


def encode(tokenizer, template, row, task=""):
    """{"prompt", "response"} -> Example; prompt and response are tokenized apart and joined, EOS
    appended."""
    prompt = tokenizer.encode(fill(template, row["prompt"]))
    if tokenizer.eos_id is None:
        raise InputError("this tokenizer has no EOS token: a model could not learn where answers end")
    ids = [*prompt, *tokenizer.encode(row["response"], start=False), tokenizer.eos_id]
    return Example(ids, len(prompt), task, row)


def encode_all(tokenizer, template, rows, task, max_length):
    """Examples of at most `max_length` tokens, and how many were longer and left out."""
    examples = [encode(tokenizer, template, row, task) for row in rows]
    kept = [example for example in examples if len(example.ids) <= max_length]
    if not kept:
        raise InputError(
            f"task {task}: no training example of at most {max_length} tokens ({len(rows)} examples)"
        )
    return kept, len(examples) - len(kept)


def tokenize(tasks, tokenizer, vocab_size, template, max_length):
    """{task name: [Example]} of the train splits, those over `max_length` left out with a warning."""
    examples = {}
    long = 0
    for name, task in tasks.items():
        examples[name], dropped = encode_all(tokenizer, template, task.train, name, max_length)
        check_ids([index for example in examples[name] for index in example.ids], vocab_size)
        long += dropped
    if long:
        warn(f"{long} training examples of more than --max_length {max_length} tokens are left out")
    return examples


def draw(items, name, step, count, seed):
    """The `count` items of training step `step`: every epoch is a fresh shuffle, seeded by name and
    epoch."""
    picked = []
    for position in range(step * count, (step + 1) * count):
        epoch, index = divmod(position, len(items))
        picked.append(items[_order(seed, name, epoch, len(items))[index]])
    return picked


def pick(examples, step, args):
    """The args.batch_size examples of a step, of {task: [Example]} in turn."""
    names = sorted(examples)
    turns = [divmod(j, len(names)) for j in range(step * args.batch_size, (step + 1) * args.batch_size)]
    return [draw(examples[names[j]], names[j], turn, 1, args.seed)[0] for turn, j in turns]


def some_tasks(names, share, seed):
    """A random share of the task names, two at least, sorted: the same for every part that is
    trained on it. Raises InputError where it is no share."""
    if not 0 < share <= 1:
        raise InputError(f"--share is {share}, expected more than 0 and at most 1")
    names = sorted(names)
    count = min(len(names), max(2, round(share * len(names))))
    return sorted(random.Random(f"{seed}/share").sample(names, count))


@functools.lru_cache(maxsize=256)  # more tasks than a run has
def _order(seed, name, epoch, n):
    return random.Random(f"{seed}/{name}/{epoch}").sample(range(n), n)


def micro_batches(examples, max_tokens, padded=False):
    """Splits a step's examples, shortest first, into batches of at most `max_tokens` tokens each.
    Where rows are `padded`, that is with the padding, and in a batch no example is over 1.5 times
    (and 16 tokens) longer than another, so that padding stays a small part."""
    batches = []
    current = []
    total = 0
    for example in sorted(examples, key=lambda e: len(e.ids)):
        length = len(example.ids)
        shortest = len(current[0].ids) if current else length
        total = (len(current) + 1) * length if padded else total + length
        if current and (total > max_tokens or padded and length > max(1.5 * shortest, shortest + 16)):
            batches.append(current)
            current = []
            total = length
        current.append(example)
    return [*batches, current] if current else batches


@dataclass
class Batch:
    """ids (b, t), right-padded with 0; real (b, t): not padding; predicts (b, t): the next token is
    of a response; part (b, t) int64: which of `parts` (Examples) a token belongs to, at (b, t)
    int64: its place in it. lengths: how many tokens of each row are real."""

    ids: torch.Tensor
    real: torch.Tensor
    predicts: torch.Tensor
    part: torch.Tensor
    at: torch.Tensor
    parts: list
    lengths: list

    @property
    def tasks(self):
        """The task of each part, "" where it has none."""
        return [part.task for part in self.parts]

    @property
    def prompt(self):
        """(b, t): a real token of a prompt."""
        lengths = torch.tensor([part.n_prompt for part in self.parts], device=self.at.device)
        return self.real & (self.at < lengths[self.part])

    def slots(self, pool):
        """(b, t) int64: the slot of each token's own adapter, -100 for padding and where there is
        none."""
        slots = [pool.slot(task) if task else -100 for task in self.tasks]
        return torch.tensor(slots, device=self.part.device)[self.part].masked_fill(~self.real, -100)


def collate(examples, device=None):
    """Examples and PackedExamples -> Batch."""
    lengths = [len(example.ids) for example in examples]
    t = max(lengths)
    ids, part, at = (torch.zeros(len(examples), t, dtype=torch.int64) for _ in range(3))
    real = torch.zeros_like(ids, dtype=torch.bool)
    predicts = torch.zeros_like(ids, dtype=torch.bool)
    parts = []
    for row, example in enumerate(examples):
        begin = 0
        for piece in example.parts:
            end = begin + len(piece.ids)
            ids[row, begin:end] = torch.tensor(piece.ids)
            real[row, begin:end] = True
            predicts[row, max(0, begin + piece.n_prompt - 1) : max(0, end - 1)] = True
            part[row, begin:] = len(parts)
            at[row, begin:] = torch.arange(t - begin)
            parts.append(piece)
            begin = end
    return Batch(*(y.to(device) for y in (ids, real, predicts, part, at)), parts, lengths)
