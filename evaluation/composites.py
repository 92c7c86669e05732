"""Answers and scores composite prompts (tasks/composites.py) with any method.

Beside the methods stands `oracle`: every question and every answer runs through its own task's
adapter.
"""

import numpy as np

from common.files import InputError
from common.pictures import svg_picture
from common.tokenizer import check_ids
from decoding.loop import decode
from decoding.prompts import by_length
from decoding.respond import trace_prompt
from decoding.sampling import Sampling
from methods.batch import find_method, force_adapters, retrieve, set_methods
from tasks.composites import cut
from tasks.metrics import COUNTED, draws, numbered, right, score, score_meteora


def answer_composites(mole, asked, method, temperature, args):
    """Greedy answers to Composites, in their order. `oracle` runs every span of the prompt through
    the adapter of its task, and answer j, from its number to the line's end, through question j's:
    the ceiling for any routing of adapters that were trained by themselves."""
    forced = find_method(mole, method).is_ceiling
    encoded = [encode_spans(mole, composite) for composite in asked]
    room = mole.model.config.max_position_embeddings
    texts = [""] * len(asked)
    for rows in by_length([ids for ids, _ in encoded], args.batch_size):
        n = len(asked[rows[0]].questions)
        ids = [encoded[j][0] for j in rows]
        budget = min(n * args.max_new_tokens, room)
        used = "base" if forced else method
        found = retrieve(mole, [used] * len(rows), [asked[j].prompt for j in rows], args.retrieve, (), ids)
        set_methods(mole, [used] * len(rows), args.top_k, temperature, retrieved=found)
        names = [[name for name, _ in asked[j].questions] for j in rows]
        if forced:
            longest = max(map(len, ids))
            force_adapters(mole, [encoded[j][1] + [None] * (longest - len(encoded[j][1])) for j in rows])
        begun = False
        for token in decode(mole, ids, Sampling(budget)):
            texts[rows[token.row]] += token.text
            if forced and ("\n" in token.text or not begun):
                lines = [sum(map(bool, map(str.strip, texts[j].split("\n")[:-1]))) for j in rows]
                force_adapters(mole, [own[min(line, n - 1)] for own, line in zip(names, lines, strict=True)])
                begun = True
    return texts


def encode_spans(mole, composite):
    """(ids, the task of each id): the prompt as one text, spans end where the text up to there
    ends. Raises InputError where the prompt doesn't fit into the context."""
    ids, ends = cut(mole.tokenizer, [text for text, _ in composite.spans])
    check_ids(ids, mole.model.config.vocab_size)
    room = mole.model.config.max_position_embeddings
    if len(ids) > room:
        raise InputError(f"a composite prompt of {len(composite.questions)} questions has {len(ids)} tokens, "
                         f"the context {room}: ask for fewer")  # fmt: skip
    counts = zip(composite.spans, [0, *ends[:-1]], ends, strict=True)
    return ids, [name for (_, name), begin, end in counts for _ in range(end - begin)]


def draw_composite(mole, composite, method, temperature, args):
    """One composite's prompt and answer as an SVG picture, each token in the colour of its heaviest
    adapter."""
    ids, _ = encode_spans(mole, composite)
    found = retrieve(mole, [method], [composite.prompt], args.retrieve, (), [ids])
    set_methods(mole, [method], args.top_k, temperature, retrieved=found)
    events = decode(mole, [ids], Sampling(len(composite.questions) * args.max_new_tokens), routing=True)
    prompt = [(row["text"], row["adapters"]) for row in trace_prompt(mole, ids, next(events)[0])]
    return svg_picture(prompt, [(token.text, token.adapters) for token in events])


def score_composites(asked, texts, tasks, args):
    """{"attempted": questions with an answer, "right": right answers (of tasks with a metric that
    knows right and wrong), both a prompt, with 95 % bootstrap intervals, "n": prompts, "tasks":
    {task: its metric's score}}."""
    attempted = []
    rights = []
    by_task = {}
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
        low, high = np.percentile(values[draws(len(values), args.seed)].mean(1), [2.5, 97.5])
        found |= {key: round(values.mean(), 3), f"{key}_low": round(low, 3), f"{key}_high": round(high, 3)}
    one = score_meteora if args.meteora_metrics else score
    scores = {
        name: one(tasks[name].metric, *zip(*pairs, strict=True), args.seed)
        for name, pairs in sorted(by_task.items())
    }
    return found | {
        "tasks": {name: {"score": s.score, "n": s.n, "metric": s.metric} for name, s in scores.items()}
    }


def choose_temperature(mole, trial, method, tasks, temperatures, args):
    """The gate temperature that gets most right on validation composites, made of training
    questions; the first of equals."""
    found = {
        t: score_composites(trial, answer_composites(mole, trial, method, t, args), tasks, args)["right"]
        for t in temperatures
    }
    return max(found, key=found.get)
