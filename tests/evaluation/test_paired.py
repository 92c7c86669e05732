"""evaluation/paired.py: differences over the same examples, against numpy by hand."""

import math
import random

import numpy as np
import pytest

from evaluation.paired import compare_on_composites, compare_on_tasks
from evaluation.tables import composite_table, table
from tasks.composites import Composite
from tasks.folders import Task
from tasks.metrics import score

SIZES = {"ant": 37, "bee": 41}  # examples
WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog"]


def targets(name):
    draw = random.Random(name)
    return [" ".join(draw.choices(WORDS, k=7)) for _ in range(SIZES[name])]


def tasks(metric="exact_match"):
    rows = {name: [{"prompt": "", "response": text} for text in targets(name)] for name in SIZES}
    return {name: Task(name, metric, [], rows[name]) for name in SIZES}


def rights(name, seed, share=0.5):
    """Which of a task's answers are right."""
    draw = random.Random(f"{seed} {name}")
    return [draw.random() < share for _ in range(SIZES[name])]


def rows_of(method, right):
    """Rows of answers.jsonl; `right` {task: which answers are right}, the others have one wrong word."""
    rows = []
    for name, flags in right.items():
        for text, flag in zip(targets(name), flags, strict=True):
            answer = text if flag else f"no {text}"
            rows.append({"method": method, "task": name, "prompt": "", "response": text, "answer": answer})
    return rows


def both(seed, flips):
    """Answers of a method, and those of one that differs from it in `flips` examples a task."""
    one = {name: rights(name, seed) for name in SIZES}
    other = {name: [not flag for flag in flags[:flips]] + flags[flips:] for name, flags in one.items()}
    return one, other


@pytest.mark.parametrize("metric", ["exact_match", "bleu", "rouge_l"])
def test_equal_answers_differ_by_exactly_nothing(metric):
    """Resampled apart, two equal methods would seem to differ by the width of an interval."""
    one = {name: rights(name, 3) for name in SIZES}
    rows = rows_of("x", one) + rows_of("y", one)
    assert compare_on_tasks(rows, tasks(metric), "x", 0) == {"y": {"difference": 0, "low": 0, "high": 0}}


def test_difference_and_interval_are_numpys():
    """Over other examples for the two, over tasks of other sizes as if they were one, or of the wrong
    sign."""
    one, other = both(7, 11)
    found = compare_on_tasks(rows_of("x", one) + rows_of("y", other), tasks(), "x", 5)["y"]
    total = np.zeros(1000)
    mean = 0
    for name, n in SIZES.items():
        gain = np.array(other[name], float) - np.array(one[name], float)
        drawn = np.random.default_rng([5, *name.encode()]).integers(0, n, (1000, n))
        total += 100 * gain[drawn].mean(1) / 2
        mean += 100 * gain.mean() / 2
    assert found["difference"] == round(mean, 2) != 0
    assert [found["low"], found["high"]] == [round(x, 2) for x in np.percentile(total, [2.5, 97.5])]


def test_a_metric_of_the_whole_corpus_is_paired_too():
    """Corpus BLEU is no mean over examples: its differences need its own resampled scores."""
    one, other = both(7, 11)
    found = compare_on_tasks(rows_of("x", one) + rows_of("y", other), tasks("bleu"), "x", 0)["y"]
    mean = 0
    for name in SIZES:
        for sign, right in ((-1, one), (1, other)):
            answers = [row["answer"] for row in rows_of("z", right) if row["task"] == name]
            mean += sign * score("bleu", answers, targets(name)).score / 2
    assert found["difference"] == pytest.approx(mean, abs=0.02) and found["low"] < mean < found["high"]


def test_pairing_makes_the_interval_narrower():
    """That is what it is for: methods fail on the same examples."""
    one, other = both(7, 3)
    found = compare_on_tasks(rows_of("x", one) + rows_of("y", other), tasks(), "x", 0)["y"]
    halves = []
    for name in SIZES:
        for right in (one, other):
            answers = [row["answer"] for row in rows_of("z", right) if row["task"] == name]
            scored = score("exact_match", answers, targets(name))
            halves.append((scored.high - scored.low) / 2 / len(SIZES))
    assert 0 < found["high"] - found["low"] < 2 * math.hypot(*halves) / 1.5


def test_composites_are_paired_by_prompt():
    """The same for the questions that a prompt gets right."""
    questions = [("ant", {"response": "the fox"}), ("bee", {"response": "the dog"})]
    asked = {2: [Composite([], questions)] * 23}
    draw = random.Random(1)
    counts = {"x": [draw.randrange(3) for _ in range(23)], "y": [draw.randrange(3) for _ in range(23)]}
    texts = ["1. no", "1. the fox\n2. no", "1. the fox\n2. the dog"]
    rows = [{"method": method, "composite": 2, "answer": texts[right]}
            for method, some in counts.items() for right in some]  # fmt: skip
    found = compare_on_composites(rows, asked, tasks(), "x", 3)
    gain = np.array(counts["y"], float) - np.array(counts["x"], float)
    low, high = np.percentile(gain[np.random.default_rng(3).integers(0, 23, (1000, 23))].mean(1), [2.5, 97.5])
    numbers = {"difference": gain.mean(), "low": low, "high": high}
    assert found == {"2": {"y": {key: round(value, 3) for key, value in numbers.items()}}}
    assert compare_on_composites(rows, asked, tasks(), "z", 3) == {}  # z answers no composites


def test_the_tables_show_the_differences():
    """A difference in another method's column, or to another method."""
    cell = {"score": 50.0, "low": 20.0, "high": 80.0, "n": 7, "metric": "bleu"}
    results = {name: {"mean": 50.0, "plus_minus": 1.0, "tasks": {"t": cell}} for name in "xyz"}
    results["z"]["routing"] = {"ess": 1.254}
    less = {"y": {"difference": 1.26, "low": -0.5, "high": 3.0}}
    less["z"] = {"difference": -2.0, "low": -3.0, "high": 0.0}
    against = {"method": "x", "tasks": less, "composite": {"3": less}}
    lines = table(results, ["t"], None, against).splitlines()
    assert lines[-3:] == [
        "| mean less x |  |  | +1.3 [-0.5, +3.0] | -2.0 [-3.0, +0.0] |",
        "",
        "effective number of adapters a token: z 1.25",
    ]
    scores = {"attempted": 1, "attempted_low": 1, "attempted_high": 1, "n": 7}
    scores |= {"right": 1, "right_low": 1, "right_high": 1}
    composite = {"3": dict.fromkeys("xy", scores), "5": {"x": scores}}
    lines = composite_table(results, composite, against).splitlines()
    assert (
        lines[0]
        == "| method | tasks | 3: attempted | 3: right | 3: right, less x | 5: attempted | 5: right |"
    )
    shown = "1.00 [1.00, 1.00]"
    assert lines[3] == f"| y | 50.0 | {shown} | {shown} | +1.26 [-0.50, +3.00] |  |  |"
