"""Differences between methods over the same examples, with 95 % intervals of a paired bootstrap.

    difference = score(method) - score(other),   both over the same resampled examples

An example that is hard for one method is often hard for the other. This part of the variance cancels, so
the interval is narrower than those of the two scores suggest.
"""

import numpy as np

from evaluation.composites import count_right, numbered_pairs
from tasks.composites import Composite
from tasks.folders import Task
from tasks.metrics import draws, resampled_scores


def compare_on_tasks(rows: list[dict], tasks: dict[str, Task], other: str, seed: int) -> dict[str, dict]:
    """Rows of answers.jsonl -> {method: its mean over the tasks minus that of the method `other`}, each
    as differences() gives it. The examples of each task are resampled independently."""
    found = {}
    for method, answers in by_method(rows, "task").items():
        scores = []
        for name, texts in answers.items():
            targets = [row["response"] for row in tasks[name].test]
            seeds = [seed, *name.encode()]
            value, resampled = resampled_scores(tasks[name].metric, texts, targets, seeds)
            scores.append(np.array([value, *resampled]))
        found[method] = np.mean(scores, axis=0)
    return differences(found, other, digits=2)


def compare_on_composites(
    rows: list[dict], asked: dict[int, list[Composite]], tasks: dict[str, Task], other: str, seed: int
) -> dict[str, dict[str, dict]]:
    """Rows of answers.jsonl -> {questions a prompt: {method: its right answers a prompt minus those of
    the method `other`}}, each as differences() gives it."""
    found = {}
    for method, answers in by_method(rows, "composite").items():
        for n, texts in answers.items():
            pairs = map(numbered_pairs, asked[n], texts)
            right = np.array([count_right(some, tasks) for some in pairs], dtype=float)
            resampled = right[draws(len(right), seed)].mean(1)
            found.setdefault(str(n), {})[method] = np.array([right.mean(), *resampled])
    return {n: differences(scores, other, digits=3) for n, scores in found.items() if other in scores}


def by_method(rows: list[dict], key: str) -> dict[str, dict]:
    """Rows -> {method: {value of the field `key`: the method's answers, in order}}."""
    found = {}
    for row in rows:
        found.setdefault(row["method"], {}).setdefault(row[key], []).append(row["answer"])
    return found


def differences(scores: dict[str, np.ndarray], other: str, digits: int) -> dict[str, dict]:
    """{method: its score, then that of each resample} -> {method: {"difference", "low", "high"}}: the
    score minus that of `other`, with its 95 % interval. `other` itself is left out."""
    found = {}
    for method, values in scores.items():
        if method != other:
            value, *resampled = values - scores[other]
            numbers = (value, *np.percentile(resampled, [2.5, 97.5]))
            rounded = [round(float(number), digits) for number in numbers]
            found[method] = dict(zip(("difference", "low", "high"), rounded, strict=True))
    return found
