"""Answers and scores composite prompts (tasks/composites.py) with any method.

One of them is `oracle`: each question and each answer runs through its own task's adapter.
"""

from collections.abc import Iterable

import numpy as np

from common.files import InputError
from common.progress import track
from common.tokenizer import check_ids
from decoding.loop import decode
from decoding.prompts import by_length
from decoding.respond import trace_prompt
from decoding.sampling import Sampling
from methods.batch import find_method, force_adapters, retrieve, set_methods
from methods.session import Mole
from pictures.svg import svg_picture
from tasks.composites import Composite, cut
from tasks.folders import Task
from tasks.metrics import COUNTED, draws, numbered, right, score, score_meteora

Asked = list[Composite]


def answer_composites(mole: Mole, asked: Asked, method: str, temperature: float, args) -> list[str]:
    """Greedy answers to composites, in their order.

    With `oracle` each span of the prompt runs through the adapter of its task, and answer j, from
    its number to the line's end, through that of question j. For adapters that were trained apart
    this is the ceiling of any routing.
    """
    forced = find_method(mole, method).is_ceiling
    used = "base" if forced else method
    encoded = [encode_spans(mole, composite) for composite in asked]
    texts = [""] * len(asked)
    batches = by_length([ids for ids, _ in encoded], args.batch_size)
    for rows in track(batches, f"batches of {method}"):
        ids = [encoded[row][0] for row in rows]
        route(mole, [asked[row] for row in rows], ids, used, temperature, args)
        if forced:
            force_adapters(mole, padded([encoded[row][1] for row in rows]))
        n = len(asked[rows[0]].questions)
        budget = min(n * args.max_new_tokens, mole.model.config.context)
        begun = False
        for token in decode(mole, ids, Sampling(budget)):
            texts[rows[token.row]] += token.text
            if forced and ("\n" in token.text or not begun):
                force_adapters(mole, [answering(asked[row], texts[row]) for row in rows])
                begun = True
    return texts


def route(mole: Mole, asked: Asked, ids: list[list[int]], method: str, temperature: float, args) -> None:
    """Sets the model up for one batch of composites, all routed by one method; `ids` are theirs."""
    methods = [method] * len(asked)
    prompts = [composite.prompt for composite in asked]
    found = retrieve(mole, methods, prompts, args.retrieve, (), ids)
    set_methods(mole, methods, args.top_k, temperature, retrieved=found)


def padded(rows: list[list]) -> list[list]:
    """The rows, None at the end of those that are shorter than the longest."""
    longest = max(map(len, rows))
    return [row + [None] * (longest - len(row)) for row in rows]


def answering(composite: Composite, text: str) -> str:
    """The task of the answer that comes next: `text` is the list of answers so far."""
    complete = text.split("\n")[:-1]
    count = sum(bool(line.strip()) for line in complete)
    name, _ = composite.questions[min(count, len(composite.questions) - 1)]
    return name


def encode_spans(mole: Mole, composite: Composite) -> tuple[list[int], list[str | None]]:
    """(ids, the task of each id): the prompt is tokenized as one text.

    A span ends where the text up to there ends. Raises InputError where the prompt doesn't fit into
    the context.
    """
    ids, ends = cut(mole.tokenizer, [text for text, _ in composite.spans])
    check_ids(ids, mole.model.config.vocab_size)
    room = mole.model.config.context
    if len(ids) > room:
        found = f"a composite prompt of {len(composite.questions)} questions has {len(ids)} tokens"
        raise InputError(f"{found}, the context {room}: ask for fewer")
    names = []
    for (_, name), end in zip(composite.spans, ends, strict=True):
        names += [name] * (end - len(names))
    return ids, names


def draw_composite(mole: Mole, composite: Composite, method: str, temperature: float, args) -> str:
    """A composite's questions and the answer as SVG, in colour; its solved examples are left out."""
    ids, _ = encode_spans(mole, composite)
    route(mole, [composite], [ids], method, temperature, args)
    budget = len(composite.questions) * args.max_new_tokens
    events = decode(mole, [ids], Sampling(budget), routing=True)
    prompt = [(row["text"], row["adapters"]) for row in trace_prompt(mole, ids, next(events)[0])]
    _, ends = cut(mole.tokenizer, [text for text, _ in composite.spans])
    begin = [0, *ends][-len(composite.questions) - 2]  # of the questions; one span more ends them
    return svg_picture(prompt[begin:], [(token.text, token.adapters) for token in events])


def score_composites(asked: Asked, texts: list[str], tasks: dict[str, Task], args) -> dict:
    """Means over prompts: "attempted" questions have an answer, "right" ones a right answer.

    Both come with 95 % bootstrap intervals ("right_low", ...); right and wrong are known of tasks
    with some metrics only. Besides "n", the number of prompts, and "tasks" {task: its score}.
    """
    attempted = []
    rights = []
    by_task = {}  # {task: [(answer, response)]}
    for composite, text in zip(asked, texts, strict=True):
        pairs = numbered_pairs(composite, text)
        attempted.append(sum(bool(answer) for _, answer, _ in pairs))
        rights.append(count_right(pairs, tasks))
        for name, answer, response in pairs:
            by_task.setdefault(name, []).append((answer or "", response))
    found = {"n": len(asked)}
    for key, values in (("attempted", attempted), ("right", rights)):
        values = np.array(values, dtype=float)
        low, high = np.percentile(values[draws(len(values), args.seed)].mean(1), [2.5, 97.5])
        found[key] = round(values.mean(), 3)
        found |= {f"{key}_low": round(low, 3), f"{key}_high": round(high, 3)}
    score_one = score_meteora if args.meteora_metrics else score
    found["tasks"] = {}
    for name, pairs in sorted(by_task.items()):
        scored = score_one(tasks[name].metric, *zip(*pairs, strict=True), args.seed)
        found["tasks"][name] = {"score": scored.score, "n": scored.n, "metric": scored.metric}
    return found


def numbered_pairs(composite: Composite, text: str) -> list[tuple[str, str | None, str]]:
    """[(task, answer, response)] of a composite's questions; None where the text has no answer."""
    answers = numbered(text, len(composite.questions))
    questions = zip(composite.questions, answers, strict=True)
    return [(name, answer, row["response"]) for (name, row), answer in questions]


def count_right(pairs: list[tuple[str, str | None, str]], tasks: dict[str, Task]) -> int:
    """How many of the answers of numbered_pairs() are right, by tasks' metrics that know."""
    count = 0
    for name, answer, response in pairs:
        metric = tasks[name].metric
        count += metric in COUNTED and right(metric, answer, response)
    return count


def choose_temperature(
    mole: Mole, trial: Asked, method: str, tasks: dict[str, Task], temperatures: Iterable[float], args
) -> float:
    """The gate temperature that gets most right on `trial`, composites of training questions.

    Of equally good ones it is the first.
    """
    found = {}
    for temperature in temperatures:
        texts = answer_composites(mole, trial, method, temperature, args)
        found[temperature] = score_composites(trial, texts, tasks, args)["right"]
    return max(found, key=found.get)
