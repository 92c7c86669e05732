"""Writes composite prompts: n questions of n tasks in one prompt, a numbered list of answers
(MeteoRA, section 4.3)."""

import itertools
import random
from dataclasses import dataclass

from common.files import InputError
from tasks.folders import Example, PackedExample, fill

ANSWERS = "Answers:\n"  # says that the questions are over: the list that follows may be of any length


@dataclass
class Composite:
    """n questions of n tasks in one prompt, to be answered by a numbered list (MeteoRA, section
    4.3). `spans` is the prompt in pieces, [(text, its task or None)]; questions [(task name, row)]
    are what is asked at its end."""

    spans: list
    questions: list

    @property
    def prompt(self):
        """The prompt as one text."""
        return "".join(text for text, _ in self.spans)


def composites(tasks, n, count, template, seed=0, split="test", shots=2):
    """`count` Composites of `n` tasks each: first `shots` solved ones, of tasks drawn anew and with
    questions of the train split, then `n` questions of `split`. Every question has its number and
    is wrapped in the template by itself. Raises InputError where there are fewer than n tasks."""
    if n > len(tasks):
        raise InputError(f"composite-{n} needs {n} tasks, there are {len(tasks)}: {', '.join(tasks)}")
    for task in tasks.values():
        if shots and not task.train:
            raise InputError(
                f"task {task.name}: train.jsonl holds no example for a composite's {shots} shots"
            )
    rng = random.Random(f"{seed}/composite-{n}/{split}")
    made = []
    for _ in range(count):
        spans = []
        for shot in range(shots + 1):
            names = rng.sample(sorted(tasks), n)
            rows = [
                rng.choice(tasks[name].train if shot < shots else getattr(tasks[name], split))
                for name in names
            ]
            asked = list(zip(names, rows, strict=True))
            spans += questions(asked, template) + (answers(asked) if shot < shots else [])
        made.append(Composite(spans, asked))
    return made


def questions(asked, template):
    """Spans of numbered questions [(task, row)] and the line that ends them."""
    texts = [
        f"{j}. " + fill(template, row["prompt"]).rstrip("\n") + "\n" for j, (_, row) in enumerate(asked, 1)
    ]
    return [*zip(texts, (task for task, _ in asked), strict=True), (ANSWERS, None)]


def answers(asked):
    """Spans of numbered answers [(task, row)]."""
    return [(f"{j}. {row['response'].strip()}\n", task) for j, (task, row) in enumerate(asked, 1)]


def check_composite(share, count):
    """Raises InputError unless `--composite` is a share, and makes up at least one composite of a
    step's examples."""
    if not 0 <= share <= 1:
        raise InputError(f"--composite is {share}, expected 0 to 1")
    if share and round(share * count) < 2:
        raise InputError(
            f"--composite {share} of {count} examples a step is less than two: raise --batch_size"
        )


def compose(examples, tokenizer, template, step, args):
    """The Examples of a training step, a share `args.composite` of them put together in composites:
    PackedExamples of one to three rounds of up to ten questions and their answers, of at most
    `args.max_length` tokens. What is left over stays by itself, and so does an answer of several
    lines, which would look like several."""
    rng = random.Random(f"{args.seed}/composite/{step}")
    count = round(args.composite * len(examples))
    mixed = sorted(rng.sample(examples, len(examples)), key=_has_lines) if count else examples
    count = min(count, len(mixed) - sum(map(_has_lines, mixed)))
    made = mixed[count:]
    rest = mixed[:count]
    while rest:
        rounds = rng.randint(1, 3)
        size = rng.randint(2, 10)
        some = rest[: rounds * size]
        context = _context(some, rounds, tokenizer, template)
        while len(context.ids) > args.max_length and len(some) > 1:
            some = some[: max(1, min(len(some) - 1, len(some) * args.max_length // len(context.ids)))]
            context = _context(some, rounds, tokenizer, template)
        made.append(context if len(some) > 1 else some[0])
        rest = rest[len(some) :]
    return made


def _has_lines(example):
    return "\n" in example.row["response"].strip()


def _context(examples, rounds, tokenizer, template):
    pieces = []
    rounds = min(rounds, (len(examples) + 1) // 2)
    for j in range(rounds):
        asked = [(example.task, example.row) for example in examples[j::rounds]]
        pieces += [(*span, False) for span in questions(asked, template)] + [
            (*span, True) for span in answers(asked)
        ]
    ids, ends = cut(tokenizer, [text for text, *_ in pieces])
    parts = []
    for (_, task, is_answer), begin, end in zip(pieces, [0, *ends[:-1]], ends, strict=True):
        parts.append(Example(ids[begin:end], 0 if is_answer else end - begin, task or ""))
    parts[-1].ids.append(tokenizer.eos_id)
    return PackedExample(parts)


def cut(tokenizer, texts):
    """(ids of the texts tokenized as one, where each text ends among them): as many ids as the text
    up to there has, exact where no token spans the border."""
    ids = tokenizer.encode("".join(texts))
    lengths = (min(len(tokenizer.encode(prefix)), len(ids)) for prefix in itertools.accumulate(texts))
    return ids, [*itertools.accumulate(lengths, max)]
