"""Composite prompts: n questions of n tasks in one prompt, one numbered list of answers (MeteoRA, section 4.3).

Drawn from task folders, answered by any method, scored: how many questions were attempted, how many are right. Beside
the methods stands `oracle`: every question and every answer runs through its own task's adapter.
"""

import itertools
import random
from dataclasses import dataclass

import numpy as np

from common.files import InputError
from common.pictures import svg_picture
from common.tokenizer import check_ids
from generate import Sampling, by_length, decode, trace_prompt
from methods.session import force, retrieve, set_methods
from tasks.folders import Context, Example, fill
from tasks.metrics import COUNTED, draws, numbered, right, score, score_meteora

ANSWERS = "Answers:\n"  # says that the questions are over: the list that follows may be of any length


@dataclass
class Composite:
    """n questions of n tasks in one prompt, to be answered by a numbered list (MeteoRA, section 4.3). `spans` is the
    prompt in pieces, [(text, its task or None)]; questions [(task name, row)] are what is asked at its end."""

    spans: list
    questions: list

    @property
    def prompt(self):
        return "".join(text for text, _ in self.spans)


def composites(tasks, n, count, template, seed=0, split="test", shots=2):
    """`count` Composites of `n` tasks each: first `shots` solved ones, of tasks drawn anew and with questions of the
    train split, then `n` questions of `split`. Every question has its number and is wrapped in the template by itself.
    Raises InputError where there are fewer than n tasks."""
    if n > len(tasks):
        raise InputError(f"composite-{n} needs {n} tasks, there are {len(tasks)}: {', '.join(tasks)}")
    for task in tasks.values():
        if shots and not task.train:
            raise InputError(f"task {task.name}: train.jsonl holds no example for a composite's {shots} shots")
    rng, made = random.Random(f"{seed}/composite-{n}/{split}"), []
    for _ in range(count):
        spans = []
        for shot in range(shots + 1):
            names = rng.sample(sorted(tasks), n)
            rows = [rng.choice(tasks[name].train if shot < shots else getattr(tasks[name], split)) for name in names]
            asked = list(zip(names, rows, strict=True))
            spans += questions(asked, template) + (answers(asked) if shot < shots else [])
        made.append(Composite(spans, asked))
    return made


def questions(asked, template):
    """Spans of numbered questions [(task, row)] and the line that ends them."""
    texts = [f"{j}. " + fill(template, row["prompt"]).rstrip("\n") + "\n" for j, (_, row) in enumerate(asked, 1)]
    return [*zip(texts, (task for task, _ in asked), strict=True), (ANSWERS, None)]


def answers(asked):
    return [(f"{j}. {row['response'].strip()}\n", task) for j, (task, row) in enumerate(asked, 1)]


def check_composite(share, count):
    """Raises InputError unless `--composite` is a share, and makes up at least one composite of a step's examples."""
    if not 0 <= share <= 1:
        raise InputError(f"--composite is {share}, expected 0 to 1")
    if share and round(share * count) < 2:
        raise InputError(f"--composite {share} of {count} examples a step is less than two: raise --batch_size")


def compose(examples, tokenizer, template, step, o):
    """The Examples of a training step, a share `o.composite` of them put together in composites: Contexts of one to
    three rounds of up to ten questions and their answers, of at most `o.max_length` tokens. What is left over stays by
    itself, and so does an answer of several lines, which would look like several."""
    rng, count = random.Random(f"{o.seed}/composite/{step}"), round(o.composite * len(examples))
    mixed = sorted(rng.sample(examples, len(examples)), key=_has_lines) if count else examples
    count = min(count, len(mixed) - sum(map(_has_lines, mixed)))
    made, rest = mixed[count:], mixed[:count]
    while rest:
        rounds, size = rng.randint(1, 3), rng.randint(2, 10)
        some = rest[: rounds * size]
        context = _context(some, rounds, tokenizer, template)
        while len(context.ids) > o.max_length and len(some) > 1:
            some = some[: max(1, min(len(some) - 1, len(some) * o.max_length // len(context.ids)))]
            context = _context(some, rounds, tokenizer, template)
        made.append(context if len(some) > 1 else some[0])
        rest = rest[len(some) :]
    return made


def _has_lines(example):
    return "\n" in example.row["response"].strip()


def _context(examples, rounds, tokenizer, template):
    pieces, rounds = [], min(rounds, (len(examples) + 1) // 2)
    for j in range(rounds):
        asked = [(example.task, example.row) for example in examples[j::rounds]]
        pieces += [(*span, False) for span in questions(asked, template)] + [(*span, True) for span in answers(asked)]
    ids, ends = cut(tokenizer, [text for text, *_ in pieces])
    parts = []
    for (_, task, is_answer), begin, end in zip(pieces, [0, *ends[:-1]], ends, strict=True):
        parts.append(Example(ids[begin:end], 0 if is_answer else end - begin, task or ""))
    parts[-1].ids.append(tokenizer.eos_id)
    return Context(parts)


def answer_composites(mole, asked, method, temperature, o):
    """Greedy answers to Composites, in their order. `oracle` runs every span of the prompt through the adapter of its
    task, and answer j, from its number to the line's end, through question j's: the ceiling for any routing of adapters
    that were trained by themselves."""
    encoded = [encode_spans(mole, composite) for composite in asked]
    room, texts = mole.model.config.max_position_embeddings, [""] * len(asked)
    for rows in by_length([ids for ids, _ in encoded], o.batch_size):
        n = len(asked[rows[0]].questions)
        ids = [encoded[j][0] for j in rows]
        budget = min(n * o.max_new_tokens, room)
        used = "base" if method == "oracle" else method
        found = retrieve(mole, [used] * len(rows), [asked[j].prompt for j in rows], o.retrieve, (), ids)
        set_methods(mole, [used] * len(rows), o.top_k, temperature, retrieved=found)
        names = [[name for name, _ in asked[j].questions] for j in rows]
        if method == "oracle":
            longest = max(map(len, ids))
            force(mole, [encoded[j][1] + [None] * (longest - len(encoded[j][1])) for j in rows])
        begun = False
        for token in decode(mole, ids, Sampling(budget)):
            texts[rows[token.row]] += token.text
            if method == "oracle" and ("\n" in token.text or not begun):
                lines = [sum(map(bool, map(str.strip, texts[j].split("\n")[:-1]))) for j in rows]
                force(mole, [own[min(line, n - 1)] for own, line in zip(names, lines, strict=True)])
                begun = True
    return texts


def encode_spans(mole, composite):
    """(ids, the task of each id): the prompt as one text, spans end where the text up to there ends. Raises
    InputError where the prompt doesn't fit into the context."""
    ids, ends = cut(mole.tokenizer, [text for text, _ in composite.spans])
    check_ids(ids, mole.model.config.vocab_size)
    room = mole.model.config.max_position_embeddings
    if len(ids) > room:
        raise InputError(f"a composite prompt of {len(composite.questions)} questions has {len(ids)} tokens, "
                         f"the context {room}: ask for fewer")  # fmt: skip
    counts = zip(composite.spans, [0, *ends[:-1]], ends, strict=True)
    return ids, [name for (_, name), begin, end in counts for _ in range(end - begin)]


def cut(tokenizer, texts):
    """(ids of the texts tokenized as one, where each text ends among them): as many ids as the text up to there has,
    exact where no token spans the border."""
    ids = tokenizer.encode("".join(texts))
    lengths = (min(len(tokenizer.encode(prefix)), len(ids)) for prefix in itertools.accumulate(texts))
    return ids, [*itertools.accumulate(lengths, max)]


def draw_composite(mole, composite, method, temperature, o):
    """One composite's prompt and answer as an SVG picture, each token in the colour of its heaviest adapter."""
    ids, _ = encode_spans(mole, composite)
    found = retrieve(mole, [method], [composite.prompt], o.retrieve, (), [ids])
    set_methods(mole, [method], o.top_k, temperature, retrieved=found)
    events = decode(mole, [ids], Sampling(len(composite.questions) * o.max_new_tokens), routing=True)
    prompt = [(row["text"], row["adapters"]) for row in trace_prompt(mole, ids, next(events)[0])]
    return svg_picture(prompt, [(token.text, token.adapters) for token in events])


def score_composites(asked, texts, tasks, o):
    """{"attempted": questions with an answer, "right": right answers (of tasks with a metric that knows right and
    wrong), both a prompt, with 95 % bootstrap intervals, "n": prompts, "tasks": {task: its metric's score}}."""
    attempted, rights, by_task = [], [], {}
    for composite, text in zip(asked, texts, strict=True):
        answers = numbered(text, len(composite.questions))
        attempted.append(sum(bool(answer) for answer in answers))
        rights.append(0)
        for (name, row), answer in zip(composite.questions, answers, strict=True):
            metric = tasks[name].metric
            if metric in COUNTED:
                rights[-1] += right(metric, answer, row["response"])
            by_task.setdefault(name, []).append((answer or "", row["response"]))
    found = {"n": len(asked)}
    for key, values in (("attempted", attempted), ("right", rights)):
        values = np.array(values, dtype=float)
        low, high = np.percentile(values[draws(len(values), o.seed)].mean(1), [2.5, 97.5])
        found |= {key: round(values.mean(), 3), f"{key}_low": round(low, 3), f"{key}_high": round(high, 3)}
    one = score_meteora if o.meteora_metrics else score
    scores = {
        name: one(tasks[name].metric, *zip(*pairs, strict=True), o.seed) for name, pairs in sorted(by_task.items())
    }
    return found | {"tasks": {name: {"score": s.score, "n": s.n, "metric": s.metric} for name, s in scores.items()}}


def choose_temperature(mole, trial, method, tasks, temperatures, o):
    """The gate temperature that gets most right on validation composites, made of training questions; the first of
    equals."""
    found = {
        t: score_composites(trial, answer_composites(mole, trial, method, t, o), tasks, o)["right"]
        for t in temperatures
    }
    return max(found, key=found.get)
