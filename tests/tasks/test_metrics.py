"""Metrics: equal to sacrebleu and rouge-score, empty answers are wrong answers, intervals mean what
they say; lists."""

import random
import re
import sys
from importlib.metadata import version

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu import corpus_bleu
from sacrebleu.metrics import BLEU

from common.files import InputError
from tasks import metrics
from tasks.metrics import (
    COUNTED,
    METRICS,
    ROUGE,
    Score,
    exact_match,
    final_number,
    gsm8k,
    normalise,
    numbered,
    recovery,
    right,
    rouge,
    score,
    score_meteora,
    signature,
    yes_no,
)

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dogs", "and", "runs"]
WORDS += [",", "far", "away", "."]


def sentences(count, seed=0):
    """Targets, and answers that share most of their words with them; one answer is empty."""
    rng = random.Random(seed)
    targets = [" ".join(rng.choices(WORDS, k=rng.randint(4, 15))) for _ in range(count)]
    answers = [" ".join(w for w in target.split() if rng.random() < 0.85) for target in targets]
    answers[count // 2] = ""
    return answers, targets


@pytest.mark.parametrize("count", [2, 9, 40])
def test_bleu_is_sacrebleu(count):
    """Without it the score is not the one that papers report: references in the wrong shape (only
    the first answer scored), a mean of sentence scores, empty answers dropped."""
    answers, targets = sentences(count)
    found = score("bleu", answers, targets, resamples=10)
    assert 1 < found.score < 99
    assert found.score == pytest.approx(corpus_bleu(answers, [targets]).score, abs=0.005)
    assert (found.n, found.metric) == (count, "bleu")


def test_bleu_of_chinese_is_sacrebleus_with_its_chinese_tokenizer():
    """Without it a sentence without spaces is one word, and the BLEU of a right answer is 0."""
    targets = ["東京是日本的首都。", "我喜歡吃蘋果，也喜歡吃梨。"]
    answers = ["東京是中國的首都。", "我喜歡吃蘋果，不喜歡吃梨。"]
    expected = corpus_bleu(answers, [targets], tokenize="zh").score
    assert 10 < expected < 90
    assert score("bleu", answers, targets, resamples=3).score == pytest.approx(expected, abs=0.005)
    for text in ("東京は日本の首都です", "กรุงเทพเป็นเมืองหลวง", "Москва это столица России"):
        assert score("bleu", [text], [text], resamples=3).score == 100


def test_bleu_has_the_default_signature():
    """Without it another tokenizer or smoothing makes the numbers incomparable: 'don't' and 'don '
    t' differ."""
    bleu = BLEU()
    answers, targets = ["I don't know, maybe 3.5 (or not)."] * 2, ["I don't know; maybe 3.5 (or so)."] * 2
    expected = bleu.corpus_score(answers, [targets]).score
    assert "tok:13a|smooth:exp" in str(bleu.get_signature())
    assert score("bleu", answers, targets, resamples=3).score == pytest.approx(expected, abs=0.005)


def test_resampled_bleu_counts_equal_resampled_texts():
    """Without it the interval is that of some other score: corpus BLEU is no mean, only its counts
    add up."""
    answers, targets = sentences(9)
    bleu = BLEU()
    counts = np.array([metrics._bleu_counts(bleu, a, t) for a, t in zip(answers, targets, strict=True)])
    for seed in range(5):
        draw = np.random.default_rng(seed).integers(0, 9, 9)
        texts = corpus_bleu([answers[j] for j in draw], [[targets[j] for j in draw]]).score
        assert metrics._bleu_of(bleu, counts[draw].sum(0)) == pytest.approx(texts, abs=1e-9)


@pytest.mark.parametrize(
    "metric, name", [("rouge_1", "rouge1"), ("rouge_2", "rouge2"), ("rouge_l", "rougeL")]
)
def test_rouge_is_rouge_score(metric, name):
    """Without it the score is another ROUGE: no stemming, recall for F1."""
    answers, targets = sentences(9)
    answers[0], targets[0] = "running dogs jumped", "the dog runs and jumps"
    scorer = RougeScorer([name], use_stemmer=True)
    expected = [scorer.score(t, a)[name].fmeasure for a, t in zip(answers, targets, strict=True)]
    assert rouge(metric, answers, targets) == expected
    assert 0 < expected[0] < 1 or metric == "rouge_2"
    found = score(metric, answers, targets, resamples=10)
    assert found.score == pytest.approx(100 * np.mean(expected), abs=0.005)
    assert (found.n, found.metric) == (9, metric)


ENGLISH = st.text(
    st.characters(max_codepoint=127) | st.sampled_from("\u2019\u201c\u2014éïöﬁ€²°❤\ufe0f 😀"), max_size=40
)


@given(ENGLISH.map(lambda text: f"the café {text}"), ENGLISH)
def test_rouge_of_english_is_rouge_scores(answer, target):
    """Without it tokens for other scripts change the scores that papers report: an accent, a curly
    quote or an emoji within English makes no other token."""
    target = re.sub(r"(?<![a-zA-Z0-9])[éïöﬁ]+(?![a-zA-Z0-9])", "", target)
    answer = re.sub(r"(?<![a-zA-Z0-9])[éïöﬁ]+(?![a-zA-Z0-9])", "", answer)
    for metric, name in ROUGE.items():
        expected = RougeScorer([name], use_stemmer=True).score(target, answer)[name].fmeasure
        assert rouge(metric, [answer], [target]) == [expected]


@pytest.mark.parametrize(
    "text",
    [
        "東京は日本の首都です。",
        "我喜歡吃蘋果",
        "Привет, мир!",
        "กรุงเทพเป็นเมืองหลวง",
        "ພາສາລາວ",
        "हिन्दी भाषा",
        "한국어 문장",
        "اللغة العربية",
        "Ελληνική γλώσσα",
        "à é",
    ],
)
def test_rouge_of_a_text_with_itself_is_1(text):
    """Without it every right answer in another script scores 0."""
    assert [rouge(metric, [text], [text]) for metric in ROUGE] == [[1.0]] * 3
    assert [rouge(metric, ["English words"], [text]) for metric in ROUGE] == [[0.0]] * 3


@pytest.mark.parametrize(
    "answer, target, one, two, longest",
    [
        ("Привет, МИР", "мир привет", 1, 0, 1 / 2),  # 2 words, no pair in order
        ("2024年は夏", "2024年は冬", 3 / 4, 2 / 3, 3 / 4),  # 4 tokens; without 年は夏 it would be 1
        ("iPhone を買う", "iPhone を売る", 2 / 4, 1 / 3, 2 / 4),
        ("จำได้", "จำได", 3 / 4, 2 / 3, 3 / 4),  # จ ำ ไ ด้: a tone mark belongs to its letter
        ("हिन्दी", "हिन्दू", 0, 0, 0),  # the vowel signs count
        ("\u0438\u0306", "\u0439", 1, 0, 1),  # й in two characters and in one
    ],
)
def test_rouge_of_other_scripts_by_hand(answer, target, one, two, longest):
    """Without it a Japanese answer is scored by its numbers alone, or Hindi by its consonants."""
    for metric, expected in (("rouge_1", one), ("rouge_2", two), ("rouge_l", longest)):
        assert rouge(metric, [answer], [target]) == [pytest.approx(expected)]


@pytest.mark.parametrize(
    "answer, target, one, two, longest",
    [
        ("the cat sat", "the cat ran", 2 / 3, 1 / 2, 2 / 3),
        ("sat cat the", "the cat sat", 1, 0, 1 / 3),  # the same words, other order
        ("the cat", "the cat sat on it", 4 / 7, 2 / 5, 4 / 7),  # precision 1, recall 2/5: F1
        ("running dogs", "run dog", 1, 1, 1),  # stems
    ],
)
def test_rouge_by_hand(answer, target, one, two, longest):
    """Without it two of the names could stand for the same ROUGE: the oracle is asked by the same
    table of names."""
    for metric, expected in (("rouge_1", one), ("rouge_2", two), ("rouge_l", longest)):
        assert rouge(metric, [answer], [target])[0] == pytest.approx(expected)


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
        ("5 #### 6 #### 7", 7),
        ("#### Step 1: 3 + 4 = 7 #### Step 2 #### 10", 10),
        ("#### Step 1 ... #### 10", 10),
        ("so #### 10\n#### Done", 10),
        ("#### 10 dollars for 3", 10),
        ("8{,}000", 8000),
        ("#### 1{,}234{,}567", 1234567),
        ("#### -$3", -3),
        ("#### -\\$3{,}000.50", -3000.5),
        ("he lost \u221217", -17),
        ("it cost $5-$3", 3),
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
    """Without it thousands, signs, full stops, steps with a mark of their own or the working before
    '####' change the answer that is scored."""
    assert final_number(text) == number


def test_a_number_may_begin_with_its_point():
    """Without it .5 is read as 5: half a dollar is five dollars."""
    assert final_number("it costs .5") == 0.5
    assert final_number("-.25") == -0.25
    assert gsm8k("5", ".5") == 0.0


def test_large_numbers_stay_apart():
    """Without it two different long answers are equal: both are infinite as floats, or rounded to
    the same."""
    assert gsm8k("9" * 400, "1" * 400) == 0.0
    assert gsm8k("9007199254740993", "9007199254740992") == 0.0
    assert gsm8k("9" * 400, "#### " + "9" * 400) == 1.0


@pytest.mark.parametrize(
    "answer, target, right",
    [
        ("so 18", "#### 18", True),
        ("18.0", "#### 18", True),
        ("1", "12", False),
        ("", "#### 0", False),
        ("", "", False),
    ],
)
def test_gsm8k(answer, target, right):
    """Without it a substring, or nothing at all, counts as the number."""
    assert gsm8k(answer, target) == float(right)


@pytest.mark.parametrize(
    "answer, target, score",
    [
        ("MKVLAAG", "MKVLAAG", 1),
        ("MKVLAAG", "MKVLAAC", 6 / 7),
        ("The DNA first: GGGGGGG, then: MKVLAAG.", "MKVLAAG", 1),  # the last run counts
        ("THE ANSWER: MKVLAAG", "MKVLAAG", 1),
        ("MKVLA", "MKVLAAGNN", 5 / 9),  # no credit for what is missing
        ("NNNNN", "MKVLAAGNN", 0),
        ("MKVLAAGCCCCCCC", "MKVLAAG", 1),  # nor a fine for what is too much
        ("KVLAAGM", "MKVLAAG", 1 / 7),  # of A at the fifth position: nothing is aligned
        ("mkvlaag", "MKVLAAG", 0),
        ("MKVL", "MKVLAAG", 0),  # too short to be told from a word
        ("", "MKVLAAG", 0),
        ("no sequence", "MKVLAAG", 0),
        ("MKVLAAG", "", 0),
        ("MKVLAAG", " \n", 0),
        ("ACG", "ACG", 1),
        ("AC", "ACG", 0),
        ("((..))", "((..))", 1),
        ("ACGUAC folds to ((...)", "((..))", 5 / 6),
        ("..[[..]]{}<>", "..[[..]]{}<>", 1),
        ("ACGUAC", "((..))", 0),
        ("Sure.....", "......", 5 / 6),
    ],
)
def test_recovery(answer, target, score):
    """Without it a designed sequence is all or nothing, or credit goes to padding, to a sequence that
    was quoted from the question, or to prose."""
    assert recovery(answer, target) == pytest.approx(score)


def test_recovery_is_a_mean_over_examples():
    """Without it a long sequence counts more than a short one, or a silent answer not at all."""
    found = score("recovery", ["ACGTA", "", "AAAAAAAAAA"], ["ACGTC", "ACGTC", "AAAAACCCCC"])
    assert (found.score, found.n) == (round(100 * (0.8 + 0 + 0.5) / 3, 2), 3)
    assert (
        score_meteora("recovery", ["ACGTA", "", "AAAAAAAAAA"], ["ACGTC", "ACGTC", "AAAAACCCCC"]).score == 65
    )


@given(st.text(alphabet=st.one_of(st.characters(), st.sampled_from("0123456789,.-#$")), max_size=30))
def test_any_answer_can_be_scored(text):
    """Without it one strange answer of a model ends an evaluation of hours."""
    for metric in (exact_match, yes_no, gsm8k):
        assert metric(text, "12") in (0.0, 1.0)
        assert right(metric.__name__, text, "12") == bool(metric(text, "12"))
    assert 0 <= rouge("rouge_l", [text], ["12"])[0] <= 1
    assert 0 <= recovery(text, "ACGTA") <= 1 and 0 <= recovery(text, "((.))") <= 1
    assert len(numbered(text, 3)) == 3


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("target", ["yes", "no 12", "#### 7", "", "the quick brown fox jumps over it"])
def test_empty_answers_are_wrong_for_every_metric(metric, target):
    """Without it a model that says nothing scores, or its silence is left out of the mean."""
    for empty in ("", " ", "\n"):
        found = score(metric, [empty] * 3, [target] * 3, resamples=20)
        assert (found.score, found.low, found.high, found.n) == (0, 0, 0, 3)
    if metric in ("exact_match", "rouge_1", "rouge_l") and target:
        assert score(metric, [target, ""], [target, target], resamples=20).score == 50


@pytest.mark.parametrize("metric", METRICS)
def test_intervals_hold_the_score_shrink_and_repeat(metric):
    """Without it a table's intervals mean nothing: off the score, as wide for 400 examples as for
    20, or other ones at every run."""
    found = []
    for count in (20, 400):
        answers, targets = sentences(count)
        if metric in COUNTED:
            rng = random.Random(1)
            targets = [rng.choice(["yes 1", "no 2"]) for _ in range(count)]
            answers = [t if rng.random() < 0.6 else "" for t in targets]
        elif metric == "recovery":
            answers, targets = (
                [re.sub("[^A-Z]", "", text.upper()) for text in x] for x in (answers, targets)
            )
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
    """Without it another percentile would go unnoticed: of 100 coin tosses it is 1.96 * 5 to each
    side."""
    answers, targets = ["a", "b"] * 50, ["a"] * 100
    found = score("exact_match", answers, targets, resamples=4000)
    assert found.score == 50
    assert found.low == pytest.approx(50 - 9.8, abs=1.01) and found.high == pytest.approx(50 + 9.8, abs=1.01)


def test_lists_of_other_lengths_are_refused():
    """Without it a lost answer shifts all the others against their targets."""
    for answers, targets in ((["a"], ["a", "b"]), ([], []), (["a"], [])):
        with pytest.raises(ValueError, match="answers for"):
            score("exact_match", answers, targets)


def test_what_is_counted():
    """Without it a composite counts a BLEU task's answer as right, or a missing answer ends the
    evaluation."""
    assert set(METRICS) == {*COUNTED, "bleu", *ROUGE, "recovery"} and len(METRICS) == 8
    for metric, target in (("exact_match", "mice"), ("yes_no", "yes"), ("gsm8k", "so 3\n#### 3")):
        assert [right(metric, a, target) for a in (target, "4", "", None)] == [True, False, False, False]
        assert score(metric, [target, "4", ""], [target] * 3, resamples=3).score == 33.33
    assert right("yes_no", "Yes.", "yes") and not right("exact_match", "Yes.", "yes")
    assert right("gsm8k", "3.0", "3")
    for metric in ("bleu", "rouge_1", "recovery", "exact"):
        with pytest.raises(ValueError, match="expected one of exact_match, yes_no, gsm8k$"):
            right(metric, "a", "a")
    for function in (score, score_meteora):
        with pytest.raises(ValueError, match="no metric 'exact'.*rouge_2, recovery"):
            function("exact", ["a"], ["a"])


# Signatures ---------------------------------------------------------------------------------------


def test_signatures_say_what_was_scored():
    """Without it a table's BLEU can't be compared with another's: which tokenizer, which smoothing,
    which version."""
    answers, targets = sentences(5)
    bleu = BLEU()
    bleu.corpus_score(answers, [targets])
    assert signature("bleu") == str(bleu.get_signature())
    assert signature("bleu") == f"nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:{version('sacrebleu')}"
    for metric in ROUGE:
        shown = signature(metric)
        assert f"rouge-score {version('rouge-score')}" in shown and "f1" in shown and "stemmer" in shown
    lines = [signature(metric) for metric in METRICS]
    assert len(set(lines)) == len(METRICS) and all(line and "\n" not in line for line in lines)


@pytest.mark.parametrize("metric, package", [("bleu", "sacrebleu"), ("rouge_1", "rouge-score")])
def test_a_missing_package_is_named(metric, package, monkeypatch):
    """Without it hours of generating end in a traceback about an import, of a name that pip doesn't
    know."""
    for module in ("sacrebleu", "rouge_score", "rouge_score.rouge_scorer"):
        monkeypatch.setitem(sys.modules, module, None)
    for call in (lambda: signature(metric), lambda: score(metric, ["a"], ["a"])):
        with pytest.raises(InputError, match=f"pip install {package}$"):
            call()
    assert signature("gsm8k") and score("gsm8k", ["1"], ["1"]).score == 100


# As MeteoRA's code scored -------------------------------------------------------------------------


def test_meteora_drops_empty_answers():
    """Without it the comparison is not with what their tables show: silence costs them nothing."""
    answers, targets = ["mice", "", "rats", " \n"], ["mice", "mice", "mice", "mice"]
    found = score_meteora("exact_match", answers, targets)
    assert (found.score, found.n, found.metric) == (50, 2, "exact_match")
    assert 0 == found.low < found.high == 100
    assert score("exact_match", answers, targets).score == 25
    for metric in METRICS:
        assert score_meteora(metric, ["", " "], ["yes 1", ""]) == Score(0, 0, 0, 0, metric)
        with pytest.raises(ValueError, match="answers for"):
            score_meteora(metric, ["a"], ["a", "b"])


@pytest.mark.parametrize("metric", COUNTED)
@pytest.mark.parametrize(
    "answer, target, right",
    [
        ("12", "1", True),
        ("1", "12", False),
        ("no, yes", "yes", True),
        ("so 18.", " 18\n", True),
        ("Mice", "mice", False),
    ],
)
def test_meteora_accuracy_is_a_substring_test(metric, answer, target, right):
    """Without it our stricter accuracy would be set beside their looser one, and read as a worse
    model."""
    assert score_meteora(metric, [answer], [target]).score == 100 * right


def test_meteora_bleu_is_of_the_first_answer_alone():
    """Without it their BLEU, one sentence against every target of the task, passes for a corpus
    BLEU."""
    answers, targets = ["", "a b c d e f", "x"], ["y", "a b c d e g", "a b q d e f"]
    found = score_meteora("bleu", answers, targets)
    # Of all the n-grams of "a b c d e f" only "c d e f" stands in neither target: 2 of its three
    # 4-grams are found.
    assert found == Score(90.36, 90.36, 90.36, 2, "bleu")  # 100 * (1 * 1 * 1 * 2/3) ** (1/4)
    assert found == score_meteora("bleu", ["a b c d e f", "a b q d e f"], targets[1:])
    want = corpus_bleu(answers[1:], [["a b c d e g"], ["a b q d e f"]]).score
    assert found.score == pytest.approx(want, abs=0.005)
    assert score("bleu", answers, targets).score < 60
    assert score_meteora("bleu", ["A b c d e f"], ["a b c d e f"]).score < 90  # case counts, as in ours
    answers, targets = sentences(9)
    wrong = corpus_bleu(
        [a for a in answers if a], [[t] for a, t in zip(answers, targets, strict=True) if a]
    ).score
    assert score_meteora("bleu", answers, targets).score == pytest.approx(wrong, abs=0.005)


@pytest.mark.parametrize("metric", ROUGE)
def test_meteora_rouge_is_rouge_of_the_kept(metric):
    """Without it a difference in ROUGE might come from another ROUGE and not from the dropped
    answers."""
    answers, targets = sentences(9)
    kept = [(a, t) for a, t in zip(answers, targets, strict=True) if a]
    assert len(kept) == 8
    expected = score(metric, *map(list, zip(*kept, strict=True)), seed=3, resamples=50)
    assert score_meteora(metric, answers, targets, seed=3, resamples=50) == expected


# Numbered lists -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, answers",
    [
        ("1. mice\n2. yes\n3. 12\n", ["mice", "yes", "12"]),
        ("1) mice\n 2) yes\n\t3)\t12", ["mice", "yes", "12"]),
        ("1. mice\r\n2.\r\n3. 12\r\n", ["mice", "", "12"]),
        ("Here are the answers:\n\n1. mice\n2. yes\n3. 12", ["mice", "yes", "12"]),
        ("mice", [None, None, None]),
        ("", [None, None, None]),
        ("1. mice\n3. 12", ["mice", None, "12"]),
        ("2. yes", [None, "yes", None]),
        ("1. mice\n3. 12\n2. yes", ["mice", None, "12\n2. yes"]),  # too late
        ("1. a\n1. b\n2. c", ["a\n1. b", "c", None]),
        ("1. a b\nc\n\n  d\n2. yes", ["a b\nc\n\n  d", "yes", None]),
        ("1.\nmice\n2.\n\n3. ", ["mice", "", ""]),  # there, but not attempted
        ("1. a\n2. b\n3. c\n4. d\n5. e", ["a", "b", "c"]),  # it went on with a fourth
        ("1. a\n2. b\n4. d\nmore", ["a", "b", None]),
        ("1. a\n20. x\n2. b", ["a", "b", None]),
        ("1. 15\n2. 3.5 km\n3. 2. and 3.", ["15", "3.5 km", "2. and 3."]),
        ("1. so\n15\n2.5 km\n3)4\n2. b", ["so\n15\n2.5 km\n3)4", "b", None]),
        ("1. born in\n1999. \n2. b", ["born in\n1999.", "b", None]),
        ("1.mice 2. yes", [None, None, None]),  # no space; not at the beginning of a line
        ("1. mice 2. yes 3. 12", ["mice 2. yes 3. 12", None, None]),
        ("01. a\n0. b\n-2. c\n2: d", ["a\n0. b\n-2. c\n2: d", None, None]),
        ("9" * 5000 + ". a\n1. b", ["b", None, None]),
    ],
)
def test_numbered(text, answers):
    """Without it a question gets another one's answer, or a number within an answer is taken for
    the next question."""
    assert numbered(text, 3) == answers
    assert [bool(a) for a in numbered(text, 3)] == [a not in ("", None) for a in answers]


def test_the_tenth_is_not_the_first():
    """Without it a list of ten ends at nine, or its 10 is read as 1."""
    assert numbered("\n".join(f"{j}. a{j}" for j in range(1, 11)), 10) == [f"a{j}" for j in range(1, 11)]
    assert numbered("1. a\n10. b", 10) == ["a", *[None] * 8, "b"]


LINE = st.text(st.one_of(st.characters(), st.sampled_from("0123456789.) -\t")), max_size=12).filter(
    lambda line: line == line.strip() and "\n" not in line
)
LATER = LINE.filter(lambda line: not re.match(r"[0-9]+[.)](\s|$)", line))
ANSWER = st.tuples(LINE, st.lists(LATER, max_size=2)).map(
    lambda parts: "\n".join([parts[0], *parts[1]]).strip("\n")
)


@given(
    st.lists(st.none() | ANSWER, min_size=1, max_size=12),
    st.sampled_from([".", ")"]),
    st.sampled_from(["", "  "]),
)
def test_a_list_that_was_written_is_read_again(answers, mark, indent):
    """Without it some answer, a number, a mark, two lines or nothing at all, shifts or cuts those
    after it."""
    lines = [f"{indent}{j}{mark} {a}" for j, a in enumerate(answers, 1) if a is not None]
    assert numbered("\n".join(lines), len(answers)) == answers
    assert numbered("\n".join(["Answers:", *lines, f"{len(answers) + 1}. more"]), len(answers)) == answers
