"""Exact match, yes/no, final number, recovery of a sequence, BLEU, ROUGE: strings in, 0 to 100 out.

An empty answer is a wrong answer, never dropped. BLEU is sacrebleu's corpus BLEU; the other scores
are means over examples. For BLEU and ROUGE a letter of a script without spaces is a word. Intervals
are 95 % percentile bootstraps over the examples, seeded. Where all examples score alike, as at 0 or
100 %, a bootstrap has no width and says nothing about other examples. This file also has the scores
that MeteoRA's released code would give, and reads the numbered answers to a composite prompt.
"""

import functools
import importlib.metadata
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from itertools import pairwise

import numpy as np

from common.files import InputError

COUNTED = ("exact_match", "yes_no", "gsm8k")  # by these an answer is right or wrong
ROUGE = {"rouge_l": "rougeL", "rouge_1": "rouge1", "rouge_2": "rouge2"}  # -> rouge-score's name
METRICS = (*COUNTED, "bleu", *ROUGE, "recovery")
STRUCTURE = ".()[]{}<>"  # a dot-bracket structure: unpaired bases and pairs
NUMBER = re.compile(r"^[^\S\n]*([0-9]{1,3})[.)](?!\S)", re.MULTILINE)

SIGNED = re.compile(r"((?<!\d)(?P<minus>[-\u2212])\\?[$€£¥]?)?(?P<digits>\d[\d,]*\.?\d*|\.\d+)")
# Scripts written without spaces between words: Thai, Lao, Burmese, Khmer, kana, Han.
UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u30ff\u31f0-\u31ff\u3400-\u4dbf"
    "\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff]"
)


@dataclass
class Score:
    """`score` with its 95 % interval `low`..`high` over `n` examples, all 0 to 100."""

    score: float
    low: float
    high: float
    n: int
    metric: str


def normalise(text: str) -> str:
    """Removes space around the text and a final full stop; runs of space become one."""
    return re.sub(r"\s+", " ", text).strip().removesuffix(".").rstrip()


def exact_match(answer: str, target: str) -> float:
    """Whether answer and target, normalised, are the same text and not empty."""
    return float(normalise(answer) == normalise(target) and normalise(answer) != "")


def _first_yes_or_no(text):
    found = re.match(r"\W*(yes|no)\b", text, re.IGNORECASE)
    return found[1].lower() if found else None


def yes_no(answer: str, target: str) -> float:
    """Whether answer and target begin with the same of 'yes' and 'no'."""
    first = _first_yes_or_no(target)
    return float(first is not None and _first_yes_or_no(answer) == first)


def final_number(text: str) -> Decimal | None:
    """The number after the last '####', GSM8K's mark of an answer, that has one; None where no mark
    has one, and without a mark the last number, if any.

    Commas between digits, LaTeX's {,} among them, and a currency sign after the minus are ignored.
    """
    before, *marked = text.replace("{,}", ",").split("####")
    for part in reversed(marked):
        if found := SIGNED.search(part):
            return _number(found)
    numbers = [] if marked else list(SIGNED.finditer(before))
    return _number(numbers[-1]) if numbers else None


def _number(found):
    sign = -1 if found["minus"] else 1
    return sign * Decimal(found["digits"].replace(",", ""))  # exact at any length


def gsm8k(answer: str, target: str) -> float:
    """Whether the final numbers of answer and target are the same."""
    number = final_number(answer)
    return float(number is not None and number == final_number(target))


def right(metric: str, answer: str | None, target: str) -> bool:
    """Whether an answer is right by one of COUNTED; None, an answer that is missing, is wrong."""
    if metric not in COUNTED:
        expected = f"one of {', '.join(COUNTED)}"
        raise ValueError(f"by {metric!r} no single answer is right or wrong: expected {expected}")
    one = {"exact_match": exact_match, "yes_no": yes_no, "gsm8k": gsm8k}[metric]
    return bool(one(answer or "", target))


def recovery(answer: str, target: str) -> float:
    """Bio-benchmark's recovery rate: the share of the target's positions at which the last sequence in
    the answer has the target's character, 0 to 1.

    A sequence is a run of at least 5 capital letters, or of STRUCTURE's characters where the target
    begins with one; of a target of fewer than 5 characters, a run of its length. What is longer than
    the target is cut. A position that the run doesn't reach is wrong, so an empty answer, or one
    without a sequence, gets 0; so does every answer to an empty target.
    """
    target = target.strip()
    characters = re.escape(STRUCTURE) if target[:1] in STRUCTURE else "A-Z"
    least = min(5, len(target))
    runs = re.findall(f"[{characters}]{{{least},}}", answer) if target else []
    if not runs:
        return 0.0
    same = [a == b for a, b in zip(runs[-1], target, strict=False)]
    return sum(same) / len(target)


def space_out(text: str) -> str:
    """Puts spaces around each letter, with its marks, of a script that is written without them."""
    spaced = ""
    for character in text:
        if not UNSPACED.match(character):
            spaced += character
        elif unicodedata.category(character)[0] == "M":  # it belongs to the letter before it
            spaced = f"{spaced.rstrip(' ')}{character} "
        else:
            spaced += f" {character} "
    return spaced


class EveryScript:
    """rouge-score's tokens, and the words that it drops: it keeps a-z and 0-9 alone, so that a
    Russian text has no tokens, and a Japanese one only its numbers. A word in which it finds
    nothing is one token; of a script without spaces each letter is."""

    def __init__(self):
        tokenizers = _optional("rouge_score.tokenizers", "rouge-score")
        self.english = tokenizers.DefaultTokenizer(use_stemmer=True)

    def tokenize(self, text: str) -> list[str]:
        """Text -> its tokens, in order; those of an English text are rouge-score's."""
        kept = ""
        for character in space_out(text.lower()):
            kind = unicodedata.category(character)
            keep = kind[0] in "LM" or kind in ("Nd", "Nl")  # letters, their marks, digits, 〇
            kept += character if keep else " "
        tokens = []
        for word in kept.split():
            whole = [unicodedata.normalize("NFC", word)] if any(map(str.isalnum, word)) else []
            tokens += self.english.tokenize(word) or whole
        return tokens


def rouge(metric: str, answers: list[str], targets: list[str]) -> list[float]:
    """F1 of each answer by rouge_1, rouge_2 or rouge_l, 0 to 1: rouge-score's with stemming, for
    the tokens of EveryScript."""
    name = ROUGE[metric]
    scorers = _optional("rouge_score.rouge_scorer", "rouge-score")
    scorer = scorers.RougeScorer([name], tokenizer=EveryScript())
    return [scorer.score(t, a)[name].fmeasure for a, t in zip(answers, targets, strict=True)]


def score(metric: str, answers: list[str], targets: list[str], seed: int = 0, resamples: int = 1000) -> Score:
    """Scores `answers` against `targets`, lists of the same length."""
    value, resampled = resampled_scores(metric, answers, targets, seed, resamples)
    return _score(metric, value, resampled, len(answers))


def resampled_scores(
    metric: str, answers: list[str], targets: list[str], seed: int | list[int] = 0, resamples: int = 1000
) -> tuple[float, np.ndarray]:
    """(The score, that of each bootstrap resample (resamples,)). Other answers to the same targets
    are resampled alike: the difference of two such arrays is that of paired examples."""
    _check(metric, answers, targets)
    if metric == "bleu":
        return _resampled_bleu(answers, targets, seed, resamples)
    if metric in ROUGE:
        values = rouge(metric, answers, targets)
    else:
        score_one = recovery if metric == "recovery" else functools.partial(right, metric)
        values = [score_one(answer, target) for answer, target in zip(answers, targets, strict=True)]
    return _resampled_means(values, seed, resamples)


def _resampled_bleu(answers, targets, seed, resamples):
    bleu = _optional("sacrebleu").BLEU()
    answers = list(map(space_out, answers))
    targets = list(map(space_out, targets))
    value = bleu.corpus_score(answers, [targets]).score
    # Corpus BLEU is a function of summed n-gram counts: resample the counts, not the texts.
    pairs = zip(answers, targets, strict=True)
    counts = np.array([_bleu_counts(bleu, answer, target) for answer, target in pairs])
    resampled = [_bleu_of(bleu, counts[drawn].sum(0)) for drawn in draws(len(counts), seed, resamples)]
    return value, np.array(resampled)


def score_meteora(
    metric: str, answers: list[str], targets: list[str], seed: int = 0, resamples: int = 1000
) -> Score:
    """The score that MeteoRA's released code would print, to compare with its tables only.

    Written from a description of that code's faults, not from its lines; none of that code was run.
    The description leaves three things open. Here an answer of nothing but space is empty too, case
    counts, and no target is shortened.
    - Empty answers are dropped before scoring; n counts the others. With none left the score is 0.
    - exact_match, yes_no and gsm8k all become its "fuzzy" test: the stripped target is anywhere in
      the answer. So for the target "1" the answer "12" is right, and every answer has an empty
      target.
    - BLEU gets [[t1], [t2], ...]: each target is a stream of references for one sentence. So only
      the first answer is scored, against all targets at once. One sentence has no interval: low =
      high = score.
    - ROUGE is ROUGE, of the answers that were kept. So is recovery, which that code hasn't got.
    """
    _check(metric, answers, targets)
    kept = [pair for pair in zip(answers, targets, strict=True) if pair[0].strip()]
    if not kept:
        return Score(0.0, 0.0, 0.0, 0, metric)
    answers, targets = map(list, zip(*kept, strict=True))
    if metric == "bleu":
        streams = [[target] for target in targets]
        value = _optional("sacrebleu").BLEU().corpus_score(answers, streams).score
        return _score(metric, value, [value], len(kept))
    if metric in ROUGE:
        values = rouge(metric, answers, targets)
    elif metric == "recovery":
        values = [recovery(answer, target) for answer, target in kept]
    else:
        values = [target.strip() in answer for answer, target in kept]
    return mean_score(metric, values, seed, resamples)


def signature(metric: str) -> str:
    """One line that says what `score` computes: sacrebleu's own signature for BLEU."""
    if metric == "bleu":
        bleu = _optional("sacrebleu").BLEU()
        bleu.corpus_score(["a"], [["a"]])  # the signature needs the number of references
        return str(bleu.get_signature())
    if metric in ROUGE:
        _optional("rouge_score", "rouge-score")
        version = importlib.metadata.version("rouge-score")
        options = "measure:f1|stemmer:porter|other scripts:words or letters|mean:examples"
        return f"{ROUGE[metric]}|{options}|version:rouge-score {version}"
    return {
        "exact_match": "equal but for surrounding space, runs of space and one final full stop; case counts",
        "yes_no": "the first word is the target's yes or no; case and marks before it are ignored",
        "gsm8k": "the number after the last '####' that has one, else the last, is the target's; commas are ignored",
        "recovery": "% of the target's positions that are right in the last run of capitals, or of dots and brackets",
    }[metric]


def numbered(text: str, n: int) -> list[str | None]:
    """The answers 1 to n of a numbered list, in order; None where a number is missing.

    - A number is "j." or "j)" at the beginning of a line, with a space or the line's end after it.
      Spaces may come before it. j has at most three digits. So "15", "3.5 km" and a year are none.
    - A number larger than the current answer's begins answer j. Any other is part of that answer:
      after "3." a "2. x" comes too late, and answer 2 is None.
    - An answer runs over lines to the next number, and is stripped. A number over n ends it and
      begins nothing. Text before the first number is ignored.
    - "2." with nothing after it gives "": answer 2 is there, but was not attempted.
    """
    cuts = []  # (number, begin of its mark, end of its mark)
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


def draws(n: int, seed: int | list[int], resamples: int = 1000) -> np.ndarray:
    """(resamples, n): the examples of each bootstrap resample."""
    return np.random.default_rng(seed).integers(0, n, (resamples, n))


def mean_score(metric: str, values: Sequence[float], seed: int, resamples: int = 1000) -> Score:
    """The Score of the mean of `values`, each 0 to 1."""
    return _score(metric, *_resampled_means(values, seed, resamples), len(values))


def _resampled_means(values, seed, resamples):
    values = 100 * np.array(values, dtype=float)
    return values.mean(), values[draws(len(values), seed, resamples)].mean(1)


def _score(metric, value, resampled, n):
    bounds = np.percentile(resampled, [2.5, 97.5])
    rounded = [round(float(number), 2) for number in (value, *bounds)]
    return Score(*rounded, n, metric)


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
        install = f"pip install {package or module}"
        raise InputError(f"this metric needs a package that is not here: {install}") from None
