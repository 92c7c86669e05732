"""Exact match, yes/no, final number, BLEU, ROUGE: strings in, numbers from 0 to 100 out.

An empty answer is a wrong answer, never dropped. BLEU is sacrebleu's corpus level; the other scores are means over
examples. Intervals are 95 % percentile bootstraps over the examples, seeded; where all examples score alike, as at 0 or
100 %, a bootstrap has no width and says nothing about what other examples would give.
"""

import re
from dataclasses import dataclass
from decimal import Decimal

import numpy as np

from files import InputError

METRICS = ("exact_match", "yes_no", "gsm8k", "bleu", "rouge_l")


@dataclass
class Score:
    """`score` with its 95 % interval `low`..`high` over `n` examples, all 0 to 100."""

    score: float
    low: float
    high: float
    n: int
    metric: str


def normalise(text):
    """For exact match: surrounding space and a final full stop go, runs of space become one, case is kept."""
    return re.sub(r"\s+", " ", text).strip().removesuffix(".").rstrip()


def exact_match(answer, target):
    return float(normalise(answer) == normalise(target) and normalise(answer) != "")


def yes_no(answer, target):
    """Do answer and target begin with the same of 'yes' and 'no'?"""
    first = [re.match(r"\W*(yes|no)\b", text, re.IGNORECASE) for text in (answer, target)]
    return float(all(first) and first[0][1].lower() == first[1][1].lower())


def final_number(text):
    """The first number after '####', as GSM8K marks its answers, else the last one in the text; None without any."""
    _, mark, marked = text.partition("####")
    numbers = re.findall(r"(?:(?<!\d)-)?(?:\d[\d,]*\.?\d*|\.\d+)", marked if mark else text)
    return Decimal(numbers[0 if mark else -1].replace(",", "")) if numbers else None  # exact at any length


def gsm8k(answer, target):
    return float(final_number(answer) is not None and final_number(answer) == final_number(target))


def rouge_l(answers, targets):
    """ROUGE-L F1 of each answer (rouge-score, with stemming)."""
    scorer = _optional("rouge_score.rouge_scorer", "rouge-score").RougeScorer(["rougeL"], use_stemmer=True)
    return [scorer.score(t, a)["rougeL"].fmeasure for a, t in zip(answers, targets, strict=True)]


def score(metric, answers, targets, seed=0, resamples=1000):
    """Scores `answers` against `targets` (lists of strings of the same length) -> Score."""
    if len(answers) != len(targets) or not answers:
        raise ValueError(f"{len(answers)} answers for {len(targets)} targets")
    draws = np.random.default_rng(seed).integers(0, len(answers), (resamples, len(answers)))
    if metric == "bleu":
        bleu = _optional("sacrebleu").BLEU()
        mean = bleu.corpus_score(answers, [targets]).score
        # Corpus BLEU is a function of summed n-gram counts: resampled sums, not resampled texts.
        counts = np.array([_bleu_counts(bleu, a, t) for a, t in zip(answers, targets, strict=True)])
        resampled = [_bleu_of(bleu, counts[draw].sum(0)) for draw in draws]
    else:
        one = {"exact_match": exact_match, "yes_no": yes_no, "gsm8k": gsm8k}.get(metric)
        values = rouge_l(answers, targets) if metric == "rouge_l" else list(map(one, answers, targets))
        values = 100 * np.array(values)
        mean, resampled = values.mean(), values[draws].mean(1)
    low, high = np.percentile(resampled, [2.5, 97.5])
    return Score(*(round(float(y), 2) for y in (mean, low, high)), len(answers), metric)


def _bleu_counts(bleu, answer, target):
    """[correct 1..4, total 1..4, answer length, target length] of one sentence."""
    one = bleu.corpus_score([answer], [[target]])
    return [*one.counts, *one.totals, one.sys_len, one.ref_len]


def _bleu_of(bleu, counts):
    return bleu.compute_bleu(
        correct=list(counts[:4]), total=list(counts[4:8]), sys_len=int(counts[8]), ref_len=int(counts[9]),
        smooth_method="exp",
    ).score  # fmt: skip


def _optional(module, package=None):
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError:
        raise InputError(f"this metric needs a package that is not here: pip install {package or module}") from None
