"""Exact match, yes/no, final number, BLEU, ROUGE: strings in, numbers from 0 to 100 out.

An empty answer is a wrong answer, never dropped. BLEU is sacrebleu's corpus level; the other scores
are means over examples. Intervals are 95 % percentile bootstraps over the examples, seeded; where
all examples score alike, as at 0 or 100 %, a bootstrap has no width and says nothing about what
other examples would give. Beside them stand the scores that MeteoRA's released code would give, and
the reading of a composite question's numbered answers.
"""

import importlib.metadata
import re
from dataclasses import dataclass
from decimal import Decimal
from itertools import pairwise

import numpy as np

from common.files import InputError

COUNTED = (
    "exact_match",
    "yes_no",
    "gsm8k",
)  # an answer is right or wrong; of a BLEU or ROUGE task it is neither
ROUGE = {"rouge_l": "rougeL", "rouge_1": "rouge1", "rouge_2": "rouge2"}  # our name -> rouge-score's
METRICS = (*COUNTED, "bleu", *ROUGE)
NUMBER = re.compile(r"^[^\S\n]*([0-9]{1,3})[.)](?!\S)", re.MULTILINE)


@dataclass
class Score:
    """`score` with its 95 % interval `low`..`high` over `n` examples, all 0 to 100."""

    score: float
    low: float
    high: float
    n: int
    metric: str


def normalise(text):
    """For exact match: surrounding space and a final full stop go, runs of space become one, case
    is kept."""
    return re.sub(r"\s+", " ", text).strip().removesuffix(".").rstrip()


def exact_match(answer, target):
    """Whether answer and target, normalised, are the same text and not empty."""
    return float(normalise(answer) == normalise(target) and normalise(answer) != "")


def yes_no(answer, target):
    """Do answer and target begin with the same of 'yes' and 'no'?"""
    first = [re.match(r"\W*(yes|no)\b", text, re.IGNORECASE) for text in (answer, target)]
    return float(all(first) and first[0][1].lower() == first[1][1].lower())


def final_number(text):
    """The first number after '####', as GSM8K marks its answers, else the last one in the text;
    None without any."""
    _, mark, marked = text.partition("####")
    numbers = re.findall(r"(?:(?<!\d)-)?(?:\d[\d,]*\.?\d*|\.\d+)", marked if mark else text)
    return Decimal(numbers[0 if mark else -1].replace(",", "")) if numbers else None  # exact at any length


def gsm8k(answer, target):
    """Whether the final numbers of answer and target are the same."""
    return float(final_number(answer) is not None and final_number(answer) == final_number(target))


def right(metric, answer, target):
    """Is this one answer right, by one of COUNTED? None, `numbered`'s answer that is not there, is
    wrong."""
    if metric not in COUNTED:
        raise ValueError(
            f"by {metric!r} no single answer is right or wrong: expected one of {', '.join(COUNTED)}"
        )
    one = {"exact_match": exact_match, "yes_no": yes_no, "gsm8k": gsm8k}[metric]
    return bool(one(answer or "", target))


def rouge(metric, answers, targets):
    """F1 of each answer by rouge_1, rouge_2 or rouge_l (rouge-score, with stemming), 0 to 1."""
    name = ROUGE[metric]
    scorer = _optional("rouge_score.rouge_scorer", "rouge-score").RougeScorer([name], use_stemmer=True)
    return [scorer.score(t, a)[name].fmeasure for a, t in zip(answers, targets, strict=True)]


def score(metric, answers, targets, seed=0, resamples=1000):
    """Scores `answers` against `targets` (lists of strings of the same length) -> Score."""
    _check(metric, answers, targets)
    if metric != "bleu":
        pairs = zip(answers, targets, strict=True)
        values = (
            rouge(metric, answers, targets) if metric in ROUGE else [right(metric, a, t) for a, t in pairs]
        )
        return mean_score(metric, values, seed, resamples)
    bleu = _optional("sacrebleu").BLEU()
    value = bleu.corpus_score(answers, [targets]).score
    # Corpus BLEU is a function of summed n-gram counts: resampled sums, not resampled texts.
    counts = np.array([_bleu_counts(bleu, a, t) for a, t in zip(answers, targets, strict=True)])
    resampled = [_bleu_of(bleu, counts[draw].sum(0)) for draw in draws(len(counts), seed, resamples)]
    return _score(metric, value, resampled, len(counts))


def score_meteora(metric, answers, targets, seed=0, resamples=1000):
    """What MeteoRA's released code would print: for a comparison with its tables and for nothing
    else -> Score.

    Written after a description of that code's faults, not after its lines; none of that code was run. The description
    leaves open, and it is chosen here, that nothing but space is empty too, case counts, and no target is shortened.
    - Empty answers are dropped before scoring; n counts the others. None left: 0.
    - exact_match, yes_no and gsm8k all become its "fuzzy" test: the target, stripped, stands somewhere in the answer.
      So where the target is "1" the answer "12" is right, and an empty target is in every answer.
    - BLEU gets [[t1], [t2], ...]: each target a stream of references for one sentence. So only the first answer is
      scored, against all the targets at once. One sentence has no interval: low = high = score.
    - ROUGE is ROUGE, of the answers that were kept.
    """
    _check(metric, answers, targets)
    kept = [(a, t) for a, t in zip(answers, targets, strict=True) if a.strip()]
    answers = [a for a, _ in kept]
    targets = [t for _, t in kept]
    if not kept:
        return Score(0.0, 0.0, 0.0, 0, metric)
    if metric == "bleu":
        value = _optional("sacrebleu").BLEU().corpus_score(answers, [[t] for t in targets]).score
        return _score(metric, value, [value], len(kept))
    values = rouge(metric, answers, targets) if metric in ROUGE else [t.strip() in a for a, t in kept]
    return mean_score(metric, values, seed, resamples)


def signature(metric):
    """One line that says which score `score` gives: sacrebleu's own for BLEU, version and options
    for ROUGE."""
    if metric == "bleu":
        bleu = _optional("sacrebleu").BLEU()
        bleu.corpus_score(["a"], [["a"]])  # before its first score it knows no number of references
        return str(bleu.get_signature())
    if metric in ROUGE:
        _optional("rouge_score", "rouge-score")
        version = importlib.metadata.version("rouge-score")
        return f"{ROUGE[metric]}|measure:f1|stemmer:porter|mean:examples|version:rouge-score {version}"
    return {
        "exact_match": "equal but for surrounding space, runs of space and one final full stop; case counts",
        "yes_no": "the first word is the target's yes or no; case and marks before it are ignored",
        "gsm8k": "the first number after '####', else the last one, equals the target's; commas are ignored",
    }[metric]


def numbered(text, n):
    """The answers 1 to n of a numbered list, in order: a string each, None where number j is not
    there.

    A number is "j." or "j)" at the beginning of a line, spaces before it allowed, with a space or
    the line's end behind it, j of at most three digits: "15" and "3.5 km" are none, nor is a year.
    It begins answer j where it is larger than the last one that did, else it is part of that
    answer's text: after "3." a "2. x" comes too late, and 2 is None. An answer runs over lines to
    the next number, and is stripped; a number over n ends it and begins nothing. Text before the
    first number is ignored. "2." with nothing behind it is "": there, but not attempted; attempted
    is a text that is not empty.
    """
    cuts = []  # number, where its mark begins and ends
    last = 0
    for mark in NUMBER.finditer(text):
        if (number := int(mark[1])) > last:
            cuts.append((number, *mark.span()))
            last = number if number <= n else last
    answers = [None] * n
    for (number, _, begin), (_, end, _) in pairwise([*cuts, (n + 1, len(text), None)]):
        if number <= n:
            answers[number - 1] = text[begin:end].strip()
    return answers


def _check(metric, answers, targets):
    if metric not in METRICS:
        raise ValueError(f"no metric {metric!r}: expected one of {', '.join(METRICS)}")
    if len(answers) != len(targets) or not answers:
        raise ValueError(f"{len(answers)} answers for {len(targets)} targets")


def draws(n, seed, resamples=1000):
    """(resamples, n): the examples of each bootstrap resample."""
    return np.random.default_rng(seed).integers(0, n, (resamples, n))


def mean_score(metric, values, seed, resamples=1000):
    """Score of a mean over examples, `values` 0 to 1."""
    values = 100 * np.array(values, dtype=float)
    return _score(metric, values.mean(), values[draws(len(values), seed, resamples)].mean(1), len(values))


def _score(metric, value, resampled, n):
    low, high = np.percentile(resampled, [2.5, 97.5])
    return Score(*(round(float(y), 2) for y in (value, low, high)), n, metric)


def _bleu_counts(bleu, answer, target):
    """[correct 1..4, total 1..4, answer length, target length] of one sentence."""
    one = bleu.corpus_score([answer], [[target]])
    return [*one.counts, *one.totals, one.sys_len, one.ref_len]


def _bleu_of(bleu, counts):
    sizes = {"sys_len": int(counts[8]), "ref_len": int(counts[9])}
    return bleu.compute_bleu(list(counts[:4]), list(counts[4:8]), **sizes, smooth_method="exp").score


def _optional(module, package=None):
    try:
        return importlib.import_module(module)
    except ImportError:
        raise InputError(
            f"this metric needs a package that is not here: pip install {package or module}"
        ) from None
