"""Metrics: equal to sacrebleu and rouge-score, empty answers are wrong answers, intervals mean what they say."""

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu import corpus_bleu
from sacrebleu.metrics import BLEU

import metrics
from metrics import METRICS, exact_match, final_number, gsm8k, normalise, rouge_l, score, yes_no

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dogs", "and", "runs", ",", "far", "away", "."]


def sentences(count, seed=0):
    """Targets, and answers that share most of their words with them; one answer is empty."""
    rng = random.Random(seed)
    targets = [" ".join(rng.choices(WORDS, k=rng.randint(4, 15))) for _ in range(count)]
    answers = [" ".join(w for w in target.split() if rng.random() < 0.85) for target in targets]
    answers[count // 2] = ""
    return answers, targets


@pytest.mark.parametrize("count", [2, 9, 40])
def test_bleu_is_sacrebleu(count):
    """Without it the score is not the one that papers report: references in the wrong shape (only the first answer
    scored), a mean of sentence scores, empty answers dropped."""
    answers, targets = sentences(count)
    found = score("bleu", answers, targets, resamples=10)
    assert 1 < found.score < 99
    assert found.score == pytest.approx(corpus_bleu(answers, [targets]).score, abs=0.005)
    assert (found.n, found.metric) == (count, "bleu")


def test_bleu_has_the_default_signature():
    """Without it another tokenizer or smoothing makes the numbers incomparable: 'don't' and 'don ' t' differ."""
    bleu = BLEU()
    answers, targets = ["I don't know, maybe 3.5 (or not)."] * 2, ["I don't know; maybe 3.5 (or so)."] * 2
    expected = bleu.corpus_score(answers, [targets]).score
    assert "tok:13a|smooth:exp" in str(bleu.get_signature())
    assert score("bleu", answers, targets, resamples=3).score == pytest.approx(expected, abs=0.005)


def test_resampled_bleu_counts_equal_resampled_texts():
    """Without it the interval is that of some other score: corpus BLEU is no mean, only its counts add up."""
    answers, targets = sentences(9)
    bleu = BLEU()
    counts = np.array([metrics._bleu_counts(bleu, a, t) for a, t in zip(answers, targets, strict=True)])
    for seed in range(5):
        draw = np.random.default_rng(seed).integers(0, 9, 9)
        texts = corpus_bleu([answers[j] for j in draw], [[targets[j] for j in draw]]).score
        assert metrics._bleu_of(bleu, counts[draw].sum(0)) == pytest.approx(texts, abs=1e-9)


def test_rouge_l_is_rouge_score():
    """Without it the score is another ROUGE: no stemming, recall for F1, targets and answers swapped."""
    answers, targets = sentences(9)
    answers[0], targets[0] = "running dogs jumped", "the dog runs and jumps"
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    expected = [scorer.score(t, a)["rougeL"].fmeasure for a, t in zip(answers, targets, strict=True)]
    assert rouge_l(answers, targets) == expected
    assert 0 < expected[0] < 1
    found = score("rouge_l", answers, targets, resamples=10)
    assert found.score == pytest.approx(100 * np.mean(expected), abs=0.005)


@pytest.mark.parametrize(
    "answer, target, right",
    [
        ("mice", "mice", True),
        ("  mice \n", "mice", True),
        ("mice.", "mice", True),
        ("mice", "mice.", True),
        ("a  b\tc", "a b c", True),
        ("mice .", "mice", True),
        ("Mice", "mice", False),  # case is part of the answer
        ("mice, mice", "mice", False),
        ("mice..", "mice", False),
        ("ab", "a b", False),
        ("1", "12", False),  # no substring test
        ("12", "1", False),
        ("1.2", "12", False),  # the full stop at the end alone
        ("", "mice", False),
        ("", "", False),
        (".", "", False),
    ],
)
def test_exact_match(answer, target, right):
    """Without it spaces decide, or near misses and empty answers count."""
    assert exact_match(answer, target) == float(right)


@given(st.text(max_size=20))
def test_normalising_twice_changes_nothing_but_full_stops(text):
    """Without it a target that went through it once would not match itself."""
    once = normalise(text)
    assert once == once.strip() and "  " not in once
    if not once.endswith("."):
        assert normalise(once) == once
    assert exact_match(text, text) == float(once != "")


@pytest.mark.parametrize(
    "answer, target, right",
    [
        ("yes", "yes", True),
        ("Yes, it is.", "yes", True),
        (" \n**No**, never", "no", True),
        ("NO", "no.", True),
        ("no", "yes", False),
        ("yes", "no", False),
        ("It is: yes", "yes", False),  # begins with neither
        ("yesterday", "yes", False),
        ("nothing", "no", False),
        ("not", "no", False),
        ("", "no", False),
        ("maybe", "maybe", False),
    ],
)
def test_yes_no(answer, target, right):
    """Without it a word that begins like an answer is one, or case and marks decide."""
    assert yes_no(answer, target) == float(right)


@pytest.mark.parametrize(
    "text, number",
    [
        ("He has 3 and 4, so 7 in all. #### 7", 7),
        ("#### 1,234", 1234),
        ("1,234,567 dollars", 1234567),
        ("$1,000.50.", 1000.5),
        ("it is 12.", 12),
        ("-5", -5),
        ("#### -17", -17),
        ("5 #### 6 #### 7", 6),
        ("#### 42\n\nQ: There are 7 apples", 42),
        ("5-3", 3),
        ("first 3, then 4", 4),
        ("0.50", 0.5),
        ("#### 42\nIs that all?", 42),
        ("no number", None),
        ("", None),
        ("1 2 ####", None),
        ("-", None),
        ("3, 4, and so on", 4),
    ],
)
def test_final_number(text, number):
    """Without it thousands, signs, full stops or the working before '####' change the answer that is scored."""
    assert final_number(text) == number


def test_a_number_may_begin_with_its_point():
    """Without it .5 is read as 5: half a dollar is five dollars."""
    assert final_number("it costs .5") == 0.5
    assert final_number("-.25") == -0.25
    assert gsm8k("5", ".5") == 0.0


def test_large_numbers_stay_apart():
    """Without it two different long answers are equal: both are infinite as floats, or rounded to the same."""
    assert gsm8k("9" * 400, "1" * 400) == 0.0
    assert gsm8k("9007199254740993", "9007199254740992") == 0.0
    assert gsm8k("9" * 400, "#### " + "9" * 400) == 1.0


@pytest.mark.parametrize(
    "answer, target, right",
    [("so 18", "#### 18", True), ("18.0", "#### 18", True), ("1", "12", False), ("", "#### 0", False), ("", "", False)],
)
def test_gsm8k(answer, target, right):
    """Without it a substring, or nothing at all, counts as the number."""
    assert gsm8k(answer, target) == float(right)


@given(st.text(alphabet=st.one_of(st.characters(), st.sampled_from("0123456789,.-#$")), max_size=30))
def test_any_answer_can_be_scored(text):
    """Without it one strange answer of a model ends an evaluation of hours."""
    for metric in (exact_match, yes_no, gsm8k):
        assert metric(text, "12") in (0.0, 1.0)
    assert 0 <= rouge_l([text], ["12"])[0] <= 1


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("target", ["yes", "no 12", "#### 7", "", "the quick brown fox jumps over it"])
def test_empty_answers_are_wrong_for_every_metric(metric, target):
    """Without it a model that says nothing scores, or its silence is left out of the mean."""
    for empty in ("", " ", "\n"):
        found = score(metric, [empty] * 3, [target] * 3, resamples=20)
        assert (found.score, found.low, found.high, found.n) == (0, 0, 0, 3)
    if metric not in ("yes_no", "gsm8k", "bleu") and target:
        assert score(metric, [target, ""], [target, target], resamples=20).score == 50


@pytest.mark.parametrize("metric", METRICS)
def test_intervals_hold_the_score_shrink_and_repeat(metric):
    """Without it a table's intervals mean nothing: off the score, as wide for 400 examples as for 20, or other ones at
    every run."""
    found = []
    for count in (20, 400):
        answers, targets = sentences(count)
        if metric not in ("bleu", "rouge_l"):
            rng = random.Random(1)
            targets = [rng.choice(["yes 1", "no 2"]) for _ in range(count)]
            answers = [t if rng.random() < 0.6 else "" for t in targets]
        found.append(score(metric, answers, targets, resamples=300))
        again = score(metric, answers, targets, resamples=300)
        assert again == found[-1]
        assert 0 <= again.low < again.score < again.high <= 100
    others = [score(metric, answers, targets, seed=seed, resamples=300) for seed in (1, 2, 3)]
    assert {other.score for other in others} == {again.score}
    assert len({(other.low, other.high) for other in others}) > 1
    few, many = (y.high - y.low for y in found)
    assert many < 0.5 * few  # sqrt(20) = 4.5 times narrower but for chance


def test_the_interval_is_the_95_percent_one():
    """Without it another percentile would go unnoticed: of 100 coin tosses it is 1.96 * 5 to each side."""
    answers, targets = ["a", "b"] * 50, ["a"] * 100
    found = score("exact_match", answers, targets, resamples=4000)
    assert found.score == 50
    assert found.low == pytest.approx(50 - 9.8, abs=1.01) and found.high == pytest.approx(50 + 9.8, abs=1.01)


def test_lists_of_other_lengths_are_refused():
    """Without it a lost answer shifts all the others against their targets."""
    for answers, targets in ((["a"], ["a", "b"]), ([], []), (["a"], [])):
        with pytest.raises(ValueError, match="answers for"):
            score("exact_match", answers, targets)
