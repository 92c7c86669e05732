"""The embedded tasks: generated, endless, exact answers.

28 small functions (tasks/functions.py) over one small world: a Llama of a few million parameters
can learn all of it on a laptop. `corpus` is the text that the base is
pretrained on: input-output pairs of every function without its name, plain sentences, and lists of
questions; never an instruction. So the knowledge is in the base and an adapter brings the task, as
with a large Llama. For the same reason held-out inputs are in the corpus: the test is whether an
adapter carries its task over to inputs that it was not trained on.
"""

if __name__ == "__main__":  # Ctrl-C while torch is imported, which takes seconds, ends in one line
    from common.signals import end_at_once

    end_at_once()

import hashlib
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated

from common.endings import run_script
from common.fields import Number
from common.files import InputError, write_json, write_jsonl, write_text
from common.options import Seed, Whole, check_bounds, parse_args
from tasks.functions import TASKS
from tasks.world import WORDS


@dataclass
class TinyTasksConfig:
    """Options of `python -m tasks.tiny`."""

    out: str  # folder that gets one task folder a task, and corpus.txt
    train: Whole = 1000  # most training examples a task (a finite task may have fewer prompts)
    test: Whole = 100  # most held-out examples a task (a finite task has each held-out input once)
    documents: Annotated[int, Number(int, 0, 100_000_000)] = 150000  # documents of pretraining text
    seed: Seed = 0  # same seed, same files


def held_out(name: str, x: str) -> bool:
    """Whether input `x` of task `name` is a test input: one in five, whatever machine and seed."""
    return int(hashlib.sha256(f"{name}/{x}".encode()).hexdigest()[:8], 16) % 5 == 0


def _phrased(task, rng, most):
    """((x, answer), phrasing): all of a finite task, shuffled, else `most` drawn ones."""
    if task.answers is None:
        for _ in range(most):
            yield task.make(rng), rng.choice(task.phrasings)
    else:
        every = list(product(task.answers.items(), task.phrasings))
        rng.shuffle(every)
        yield from every


def examples(name: str, split: str, n: int, seed: int = 0) -> list[dict[str, str]]:
    """Up to `n` rows {'prompt', 'response'} of a task, distinct by prompt, in 'test' also by input.

    A finite task may have fewer: then the rows have all its held-out inputs ('test') or all its
    prompts ('train'). Raises InputError for an unknown task or split.
    """
    if name not in TASKS or split not in ("train", "test"):
        known = f"splits are train and test, tasks: {', '.join(TASKS)}"
        raise InputError(f"no task {name!r} with split {split!r}; {known}")
    rng = random.Random(f"{seed}/{name}/{split}")
    rows = []
    seen = set()
    for (x, answer), phrasing in _phrased(TASKS[name], rng, 200 * n):
        if len(rows) == n:
            break
        prompt = phrasing.replace("{x}", x)
        key = x if split == "test" else prompt
        if held_out(name, x) == (split == "test") and key not in seen:
            seen.add(key)
            rows.append({"prompt": prompt, "response": answer + "\n"})
    return rows


def corpus(n: int, seed: int = 0) -> Iterator[str]:
    """`n` documents of pretraining text, none of them an instruction. Four kinds:

    - A line of 4 to 8 pairs of one function.
    - Sentences that state pairs.
    - The words of three instructions, each shuffled together with an input. This gives the words
      tokens and neighbours but no meaning.
    - Questions between tags, most of which show a function by example: one question and its answer,
      or one to three rounds of several, numbered, and their answers.
    """
    rng = random.Random(f"{seed}/corpus")
    tasks = list(TASKS.values())
    shares = [task.share for task in tasks]
    for _ in range(n):
        kind = rng.random()
        style = rng.choice([(" -> ", " ; "), (" = ", " ; "), (" : ", " | ")])
        if kind < 0.45:
            (task,) = rng.choices(tasks, shares)
            yield _line(_pairs(rng, task, rng.randint(4, 8)), style)
        elif kind < 0.65:
            told = rng.choices(tasks, shares, k=rng.randint(2, 5))
            yield " ".join(_statement(rng, task) for task in told)
        elif kind < 0.7:
            yield " ".join(_shuffled_words(rng, task) for task in rng.choices(tasks, k=3))
        else:
            tag = rng.choice(WORDS)
            bare = rng.random() < 0.5  # no arrow after the input in question
            tag = tag.upper() if rng.random() < 0.5 else tag
            count = 1 if kind < 0.83 else rng.randint(2, 10)
            rounds = 1 if kind < 0.83 else rng.randint(1, 3)
            asked = [rng.choices(tasks, shares, k=count) for _ in range(rounds)]
            yield "\n".join(_round(rng, some, tag, style, bare) for some in asked)


def _pairs(rng, task, count):
    """`count` pairs of one function, no input twice."""
    pairs = {}
    while len(pairs) < count:
        pairs.update([task.make(rng)])
    return list(pairs.items())


def _line(pairs, style):
    arrow, separator = style
    return separator.join(x + arrow + y for x, y in pairs)


def _statement(rng, task):
    x, y = task.make(rng)
    return task.sentence.replace("{x}", x).replace("{y}", y)


def _words(tasks):
    """The words of the tasks' phrasings."""
    text = " ".join(" ".join(task.phrasings) for task in tasks)
    return sorted(set(re.findall(r"\w+", text)) - {"x"})


_INSTRUCTING = _words(TASKS.values())


def _shuffled_words(rng, task):
    words = _words([task])
    return " ".join(rng.sample([*words, task.make(rng)[0]], len(words) + 1))


def _question(rng, task, shots, style, bare):
    """(text, answer): an input after up to `shots` examples of its function.

    Three times in ten the input stands among words of instructions instead. Then the answer is some
    of these words, so that it pays to read them.
    """
    *shown, (x, y) = _pairs(rng, task, rng.randint(2, shots + 1))
    if rng.random() >= 0.3:
        return f"{_line(shown, style)}{style[1]}{x}{'' if bare else style[0].rstrip()}", y
    words = rng.sample(_INSTRUCTING, rng.randint(3, 8))
    y = " ".join(rng.sample(words, rng.randint(1, 3)))
    words.insert(rng.randint(0, len(words)), x)
    return " ".join(words), y


def _round(rng, tasks, tag, style, bare):
    """Questions, then answers. A sole answer begins with a space, as text tokenized alone does."""
    questions = []
    answers = []
    for task in tasks:
        text, answer = _question(rng, task, 3 if len(tasks) == 1 else 2, style, bare)
        questions.append(f"[{tag}] {text} [/{tag}]")
        answers.append(answer)
    if len(tasks) == 1:
        return f"{questions[0]}\n {answers[0]}"
    return "\n".join([*_numbered(questions), "Answers:", *_numbered(answers)])


def _numbered(lines):
    return [f"{j}. {line}" for j, line in enumerate(lines, 1)]


def write(
    out: str | Path, train: int = 1000, test: int = 100, documents: int = 150000, seed: int = 0
) -> None:
    """Writes OUT/NAME/{train.jsonl, test.jsonl, task.json} for every task, and OUT/corpus.txt.

    The same seed gives the same bytes.
    """
    check_bounds(TinyTasksConfig(str(out), train, test, documents, seed))
    for name, task in TASKS.items():
        folder = Path(out) / name
        write_jsonl(folder / "train.jsonl", examples(name, "train", train, seed))
        write_jsonl(folder / "test.jsonl", examples(name, "test", test, seed))
        about = {"name": name, "family": task.family, "metric": "exact_match"}
        write_json(folder / "task.json", about)
    write_text(Path(out) / "corpus.txt", "\n\n".join(corpus(documents, seed)) + "\n")


def main() -> None:
    """The command: writes the task folders and the corpus."""
    args = parse_args(TinyTasksConfig, description=__doc__)
    write(args.out, args.train, args.test, args.documents, args.seed)


if __name__ == "__main__":
    run_script(main)
