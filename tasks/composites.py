"""Composite prompts: n questions of n tasks, answered by a numbered list (MeteoRA, section 4.3)."""

import random
from dataclasses import dataclass

from common.files import InputError
from common.template import fill
from common.tokenizer import Tokenizer
from tasks.folders import Example, PackedExample, Task

ANSWERS = "Answers:\n"  # ends the questions, of which there may be any number

Span = tuple[str, str | None]  # text, and its task, if it has one
Question = tuple[str, dict[str, str]]  # task, row


@dataclass
class Composite:
    """n questions of n tasks in one prompt, to be answered by a numbered list."""

    spans: list[Span]  # the whole prompt
    questions: list[Question]  # those at its end, which are to be answered

    @property
    def prompt(self) -> str:
        """The prompt as one text."""
        return "".join(text for text, _ in self.spans)


def composites(
    tasks: dict[str, Task],
    n: int,
    count: int,
    template: str,
    seed: int = 0,
    split: str = "test",
    shots: int = 2,
) -> list[Composite]:
    """`count` Composites of `n` tasks each.

    A prompt has `shots` solved lists of questions from the train split, then `n` questions of
    `split`. For each list n tasks are sampled anew. Every question has its number and is wrapped in
    the template by itself. Raises InputError where there are fewer than n tasks.
    """
    if n > len(tasks):
        found = f"there are {len(tasks)}: {', '.join(tasks)}"
        raise InputError(f"composite-{n} needs {n} tasks, {found}")
    for task in tasks.values():
        if shots and not task.train:
            needed = f"a composite's {shots} shots"
            raise InputError(f"task {task.name}: train.jsonl holds no example for {needed}")
    rng = random.Random(f"{seed}/composite-{n}/{split}")
    made = []
    for _ in range(count):
        spans = []
        for shot in range(shots + 1):
            solved = shot < shots
            asked = []
            for name in rng.sample(sorted(tasks), n):
                rows = tasks[name].train if solved else getattr(tasks[name], split)
                asked.append((name, rng.choice(rows)))
            spans += questions(asked, template)
            spans += answers(asked) if solved else []
        made.append(Composite(spans, asked))
    return made


def questions(asked: list[Question], template: str) -> list[Span]:
    """Spans of numbered questions, and of the line that ends them."""
    spans = []
    for number, (task, row) in enumerate(asked, 1):
        prompt = fill(template, row["prompt"]).rstrip("\n")
        spans.append((f"{number}. {prompt}\n", task))
    return [*spans, (ANSWERS, None)]


def answers(asked: list[Question]) -> list[Span]:
    """Spans of the numbered answers."""
    spans = []
    for number, (task, row) in enumerate(asked, 1):
        spans.append((f"{number}. {row['response'].strip()}\n", task))
    return spans


def check_composite(share: float, count: int) -> None:
    """Raises InputError unless `share` is 0, or at most 1 and at least 2 of `count` examples."""
    if not 0 <= share <= 1:
        raise InputError(f"--composite is {share}, expected 0 to 1")
    if share and round(share * count) < 2:
        found = f"--composite {share} of {count} examples a step"
        raise InputError(f"{found} is less than two: raise --batch_size")


def compose(
    examples: list[Example], tokenizer: Tokenizer, template: str, step: int, args
) -> list[Example | PackedExample]:
    """A training step's Examples, a share `args.composite` of them packed into composites.

    A composite is a PackedExample of at most `args.max_length` tokens: one to three rounds of up to
    ten questions and their answers. An Example that is left over stays alone, as does an answer of
    several lines, which would look like several answers.
    """
    rng = random.Random(f"{args.seed}/composite/{step}")
    count = round(args.composite * len(examples))
    mixed = sorted(rng.sample(examples, len(examples)), key=_has_lines) if count else examples
    count = min(count, len(mixed) - sum(map(_has_lines, mixed)))
    composed = mixed[count:]
    rest = mixed[:count]
    while rest:
        rounds = rng.randint(1, 3)
        size = rng.randint(2, 10)
        some = rest[: rounds * size]
        packed = _pack(some, rounds, tokenizer, template)
        while len(packed.ids) > args.max_length and len(some) > 1:
            fitting = len(some) * args.max_length // len(packed.ids)
            some = some[: max(1, min(len(some) - 1, fitting))]
            packed = _pack(some, rounds, tokenizer, template)
        composed.append(packed if len(some) > 1 else some[0])
        rest = rest[len(some) :]
    return composed


def _has_lines(example):
    return "\n" in example.row["response"].strip()


def _pack(examples, rounds, tokenizer, template):
    spans = []
    is_answer = []
    rounds = min(rounds, (len(examples) + 1) // 2)
    for j in range(rounds):
        asked = [(example.task, example.row) for example in examples[j::rounds]]
        asking = questions(asked, template)
        answering = answers(asked)
        spans += asking + answering
        is_answer += [False] * len(asking) + [True] * len(answering)
    ids, ends = cut(tokenizer, [text for text, _ in spans])
    parts = []
    begin = 0
    for (_, task), answer, end in zip(spans, is_answer, ends, strict=True):
        parts.append(Example(ids[begin:end], 0 if answer else end - begin, task or ""))
        begin = end
    parts[-1].ids.append(tokenizer.eos_id)
    return PackedExample(parts)


def cut(tokenizer: Tokenizer, texts: list[str]) -> tuple[list[int], list[int]]:
    """(ids of the texts tokenized as one, where each text ends in the ids).

    An end is the number of ids of the text up to it: exact where no token spans the border.
    """
    ids = tokenizer.encode("".join(texts))
    prefix = ""
    ends = []
    for text in texts:
        prefix += text
        end = min(len(tokenizer.encode(prefix)), len(ids))
        ends.append(max(end, ends[-1]) if ends else end)
    return ids, ends
