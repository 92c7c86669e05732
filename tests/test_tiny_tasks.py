"""The embedded tasks: exact answers, disjoint splits, the same on every machine, and a corpus without instructions."""

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny_tasks
from files import InputError, read_json, read_jsonl
from tiny_tasks import CATEGORY, TASKS, WORDS, corpus, examples, held_out

ROOT = Path(__file__).resolve().parent.parent
NAMES = sorted(TASKS)
ROMAN = {"I": 1, "V": 5, "X": 10, "L": 50, "C": 100}
NAMES_TO_NINETEEN = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen
sixteen seventeen eighteen nineteen"""
NAMES_OF_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
LINES = list(corpus(4000))


def roman_value(text):
    values = [ROMAN[letter] for letter in text]
    return sum(-v if v < after else v for v, after in zip(values, values[1:] + [0], strict=True))


def word_value(text):
    """Reads number words the way a person does: add what is said, times a hundred at 'hundred'."""
    names, tens = NAMES_TO_NINETEEN.split(), {word: 10 * n for n, word in enumerate(NAMES_OF_TENS.split(), 2)}
    total = 0
    for word in re.split("[ -]", text):
        total = total * 100 if word == "hundred" else total + (names.index(word) if word in names else tens[word])
    return total


def numbers(x):
    return [int(n) for n in re.findall(r"\d+", x)]


def odd_one(x):
    kinds = Counter(CATEGORY[word] for word in x.split(", "))
    (odd,) = [word for word in x.split(", ") if kinds[CATEGORY[word]] == 1]
    assert sorted(kinds.values()) == [1, 3]
    return odd


def longest(x):
    by_length = sorted(x.split(", "), key=len)
    assert len(by_length[-1]) > len(by_length[-2])
    return by_length[-1]


def tallest(x):
    """The one taller person who is nobody's shorter."""
    pairs = re.findall(r"(\w+) is taller than (\w+)", x)
    (top,) = {a for a, _ in pairs} - {b for _, b in pairs}
    return top


ORACLES = {  # (x, answer) -> whether it is right, without the module's own arithmetic
    "upper_case": lambda x, y: y.lower() == x and y.isupper(),
    "reverse_word": lambda x, y: list(y) == list(reversed(x)),
    "spell_word": lambda x, y: y.split(" ") == list(x),
    "count_letters": lambda x, y: int(y) == sum(1 for _ in x),
    "acronym": lambda x, y: y == "".join(re.findall(r"\b\w", x)).upper(),
    "sort_list": lambda x, y: y.split(", ") == sorted(x.split(", ")),
    "reverse_list": lambda x, y: y.split(", ")[::-1] == x.split(", "),
    "longest_word": lambda x, y: y == longest(x),
    "odd_one_out": lambda x, y: y == odd_one(x),
    "add": lambda x, y: sum(numbers(x)) == int(y) < 100,
    "subtract": lambda x, y: numbers(x)[0] == numbers(x)[1] + int(y) and int(y) > 0,
    "larger_number": lambda x, y: int(y) == sorted(numbers(x))[1] > sorted(numbers(x))[0],
    "next_number": lambda x, y: int(y) - int(x) == 1,
    "parity": lambda x, y: y == ("even" if x[-1] in "02468" else "odd"),
    "number_to_words": lambda x, y: word_value(y) == int(x),
    "words_to_number": lambda x, y: word_value(x) == int(y),
    "roman": lambda x, y: roman_value(y) == int(x) and not re.search(r"(.)\1\1\1|VV|LL", y),
    "true_or_false": lambda x, y: y == ("yes" if eval(x) else "no"),  # Python's own 'and', 'or' and '>'
    "tallest": lambda x, y: y == tallest(x),
}
LOOKED_UP = {  # facts from outside the module's rules: one wrong rule or row would show here
    "german": "dog Hund, water Wasser, white weiß", "spanish": "dog perro, water agua, white blanco",
    "italian": "dog cane, water acqua, white bianco",
    "plural": "dog dogs, child children, lady ladies, toy toys, box boxes, bench benches, mouse mice, wolf wolves",
    "past_tense": "go went, walk walked, try tried, stop stopped, bake baked, buy bought",
    "opposite": "hot cold, cold hot, young old, right-, old-, short-, hard-", "capital": "France Paris, Peru Lima",
    "color": "lemon yellow, snow white", "category": "dog animal, piano instrument, France country, hammer tool",
}  # fmt: skip


def inputs(name, split, n, seed=0):
    """The inputs of a split, found in its prompts by the phrasings, longest fixed text first."""
    found = set()
    for row in examples(name, split, n, seed):
        matches = [
            (len(p), m[1])
            for p in TASKS[name].phrasings
            if (m := re.fullmatch(re.escape(p).replace(re.escape("{x}"), "(.+)"), row["prompt"]))
        ]
        found.add(max(matches)[1])
    return found


def test_twenty_eight_tasks_with_relatives():
    """A family of one would leave a task without relatives when its own adapter is missing."""
    assert len(TASKS) == 28 and all(name == task.name and re.fullmatch("[a-z_]+", name) for name, task in TASKS.items())
    families = Counter(task.family for task in TASKS.values())
    assert len(families) >= 7 and min(families.values()) >= 2
    assert set(ORACLES) | set(LOOKED_UP) == set(TASKS)


@pytest.mark.parametrize("name", NAMES)
def test_phrasings(name):
    """Fewer phrasings, or two that are the same, and an adapter learns a string, not an instruction."""
    task = TASKS[name]
    assert len(set(task.phrasings)) == len(task.phrasings) >= 4
    assert all(p.count("{x}") == 1 and p == p.strip() and "|" not in p for p in task.phrasings)
    assert task.sentence.count("{x}") == 1 and task.sentence.count("{y}") == 1


def test_no_phrasing_is_shared():
    """The same prompt in two tasks would have two right answers, and no gate could know which is meant."""
    phrasings = Counter(p for task in TASKS.values() for p in task.phrasings)
    assert max(phrasings.values()) == 1
    prompts = {}
    for name in NAMES:
        for row in examples(name, "train", 400) + examples(name, "test", 100):
            assert prompts.setdefault(row["prompt"], (name, row["response"])) == (name, row["response"])


@pytest.mark.parametrize("name", NAMES)
def test_splits_are_disjoint(name):
    """An input in both splits would turn the test score into a memory score."""
    train, test = inputs(name, "train", 1000), inputs(name, "test", 100)
    assert train and test and not train & test
    rows = examples(name, "train", 1000)
    assert len({row["prompt"] for row in rows}) == len(rows)


@pytest.mark.parametrize("name", [n for n in NAMES if TASKS[n].answers])
def test_finite_tasks_are_used_up(name):
    """A finite task that repeats held-out inputs would show an interval narrower than its data allow."""
    held = [x for x in TASKS[name].answers if held_out(name, x)]
    assert 0.1 <= len(held) / len(TASKS[name].answers) <= 0.35
    assert len(examples(name, "test", 10**6)) == len(held) == len(inputs(name, "test", 10**6)) >= 15
    train = examples(name, "train", 10**6)
    assert len(train) == (len(TASKS[name].answers) - len(held)) * len(TASKS[name].phrasings)


@pytest.mark.parametrize("name", [n for n in NAMES if not TASKS[n].answers])
def test_endless_tasks_fill_every_request(name):
    """A generator that ran dry would silently give fewer examples than were asked for."""
    assert len(examples(name, "train", 1000)) == 1000 and len(examples(name, "test", 100)) == 100


@settings(max_examples=150, deadline=None)
@given(name=st.sampled_from(sorted(ORACLES)), rng=st.randoms(use_true_random=False))
def test_computed_answers(name, rng):
    """One wrong rule (a Roman 9, a tie for the longest word) would be learned as truth by base and adapters."""
    x, y = TASKS[name].make(rng)
    assert ORACLES[name](x, y), (x, y)


@pytest.mark.parametrize("name", [n for n in NAMES if n in ORACLES and TASKS[n].answers])
def test_every_finite_answer(name):
    """Sampling may miss the one number whose words or numeral are wrong."""
    assert all(ORACLES[name](x, y) for x, y in TASKS[name].answers.items())


@pytest.mark.parametrize("name", sorted(LOOKED_UP))
def test_known_facts(name):
    """A column read from the wrong place makes every answer wrong, consistently; 'x-' must not be asked at all."""
    for fact in LOOKED_UP[name].split(", "):
        x, _, answer = fact.partition(" ")
        if x in ("right-", "old-", "short-", "hard-"):
            assert x[:-1] not in TASKS[name].answers
        else:
            assert TASKS[name].answers[x] == answer


@pytest.mark.parametrize("name", NAMES)
def test_answers_are_short_and_clean(name):
    """A trailing space or an empty answer can't be matched exactly; a long one costs composites their context."""
    for row in examples(name, "train", 200) + examples(name, "test", 100):
        assert row["response"] == " ".join(row["response"].split()) != "" and len(row["response"].split()) <= 8
        assert row["prompt"] == " ".join(row["prompt"].split()) and "{" not in row["prompt"]


def test_no_key_twice():
    """A word listed twice would silently keep its last answer, so two rows of the world would contradict each other."""
    singles = [tiny_tasks.CAPITALS, tiny_tasks.PAST, tiny_tasks.PLURALS, tiny_tasks.DICTIONARY]
    for text in singles:
        keys = [row.split()[0] for row in text.split(";")]
        assert len(set(keys)) == len(keys), Counter(keys).most_common(3)
    for text in (tiny_tasks.CATEGORIES, tiny_tasks.COLORS):
        keys = [x for group in text.split(";") for x in group.split(":")[1].split()]
        assert len(set(keys)) == len(keys), Counter(keys).most_common(3)
    sides = tiny_tasks.OPPOSITES.replace(";", " ").split() + [r.split()[0] for r in tiny_tasks.ONE_WAY.split(";")]
    assert len(set(sides)) == len(sides), Counter(sides).most_common(3)
    assert all(len(row) == 4 for row in tiny_tasks.TRANSLATIONS)
    assert all(len(row.split()) == 2 for text in singles[:3] for row in text.split(";"))


def test_words_can_be_spelled():
    """A word of the letter tasks with a capital, a space or eight letters would be a harder task than it says."""
    assert len(WORDS) == len(set(WORDS)) >= 250 and all(re.fullmatch("[a-z]{3,6}", word) for word in WORDS)


def test_true_or_false_is_balanced():
    """If 'or' were mostly yes, a model that reads one word would look as if it could reason."""
    rows = Counter((" or " in r["prompt"].replace("yes or no", ""), r["response"])
                   for r in examples("true_or_false", "train", 1000))  # fmt: skip
    assert len(rows) == 4 and min(rows.values()) > 180


def test_corpus_has_no_instruction():
    """A base that has seen the instructions would need no adapter, and the gap that adapters close would vanish."""
    text = "\n".join(LINES)
    assert "INST" not in text and "?" not in text and all(LINES) and "{" not in text
    for task in TASKS.values():
        for phrasing in task.phrasings:
            before, after = phrasing.split("{x}")
            assert max(before, after, key=len).lower() not in text.lower(), phrasing
            assert not re.search(f"{re.escape(before)}.{{1,60}}{re.escape(after)}", text), phrasing


def test_corpus_shows_held_out_inputs_of_every_task():
    """An answer that the base has never met (a capital, a translation) can't be brought by an adapter either."""
    pairs = set()
    for line in corpus(40000):
        for pair in re.split(r" ; | \| ", line):
            pairs.add(tuple(re.split(r" -> | = | : ", pair)))
    for name in NAMES:
        rows = [(x, y) for x, y in (TASKS[name].answers or {}).items() if held_out(name, x)]
        if len(rows) < 150:  # the larger tables need the whole corpus
            assert all(row in pairs for row in rows), name


def fits(name, pairs):
    """Whether every (x, y) of `pairs` is a pair of task `name`."""
    if TASKS[name].answers is not None:
        return all(TASKS[name].answers.get(x) == y for x, y in pairs)
    try:
        return all(ORACLES[name](x, y) for x, y in pairs)
    except (SyntaxError, NameError, LookupError, ValueError, AssertionError, TypeError):  # input of another kind
        return False


def test_a_line_of_pairs_is_one_function():
    """With functions mixed in a line nothing in it would say which is meant, and the base would learn to guess."""
    seen, lines = set(), [line for line in LINES if re.search(" -> | = | : ", line)]
    assert 0.6 < len(lines) / len(LINES) < 0.8
    for line in lines:
        pairs = [re.split(" -> | = | : ", pair) for pair in re.split(r" ; | \| ", line)]
        assert len(dict(pairs)) == len(pairs) <= 8
        names = {name for name in NAMES if fits(name, pairs)}
        assert names, line
        seen |= names
    assert seen == set(NAMES)


def test_corpus_is_a_stream_and_a_prefix():
    """If the first lines depended on how many are asked for, a short trial would not be a part of the real run."""
    assert list(corpus(50)) == LINES[:50] and list(corpus(50, seed=1)) != LINES[:50] and list(corpus(0)) == []


def test_same_files_in_every_process(tmp_path):
    """Python's hash() is salted for each process: a split made with it would leak test inputs on the next run."""
    run = [sys.executable, "tiny_tasks.py", "--out", str(tmp_path / "a"), "--train", "60", "--test", "20"]
    salt = os.environ | {"PYTHONHASHSEED": "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"}
    subprocess.run([*run, "--corpus_lines", "300", "--seed", "3"], cwd=ROOT, env=salt, check=True)
    tiny_tasks.write(tmp_path / "b", 60, 20, 300, 3)
    files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*.*"))
    assert len(files) == 28 * 3 + 1
    assert all((tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files)


@pytest.mark.parametrize("name", NAMES)
def test_seed_changes_the_draw_not_the_split(name):
    """A split that moved with the seed would test adapters of one seed on the training inputs of another."""
    assert examples(name, "train", 50, 0) != examples(name, "train", 50, 1)
    assert not inputs(name, "test", 100, seed=0) & inputs(name, "train", 300, seed=1)


def test_write(tmp_path):
    """The folders are what training and evaluation read: a missing metric or field would stop them much later."""
    tiny_tasks.write(tmp_path, train=12, test=5, corpus_lines=20, seed=7)
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == NAMES
    for name in NAMES:
        assert read_json(tmp_path / name / "task.json") == {
            "name": name, "family": TASKS[name].family, "metric": "exact_match"}  # fmt: skip
        for split, n in (("train", 12), ("test", 5)):
            rows = read_jsonl(tmp_path / name / f"{split}.jsonl", ["prompt", "response"])
            assert rows == examples(name, split, n, 7) and len(rows) == n
    assert (tmp_path / "corpus.txt").read_text(encoding="utf-8").splitlines() == list(corpus(20, 7))


def test_bad_input(tmp_path):
    """A typo in a task's name or a negative size must be one clear line, not an empty data set."""
    with pytest.raises(InputError, match="no task 'germn'"):
        examples("germn", "test", 5)
    with pytest.raises(InputError, match="train: expected 0 or more, found -1"):
        tiny_tasks.write(tmp_path, train=-1)


def test_command_line_refuses(tmp_path):
    """A recipe that goes on after a bad option would train on nothing."""
    run = [sys.executable, "tiny_tasks.py", "--out", str(tmp_path), "--corpus_lines", "-4"]
    bad = subprocess.run(run, cwd=ROOT, capture_output=True, text=True)
    assert bad.returncode == 2 and bad.stderr == "error: corpus_lines: expected 0 or more, found -4\n"
