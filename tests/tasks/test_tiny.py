"""The embedded tasks: exact answers, disjoint splits, the same on every machine, and a corpus
without instructions."""

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.files import InputError, read_json, read_jsonl
from tasks import tiny as tiny_tasks
from tasks import world
from tasks.composites import ANSWERS
from tasks.tiny import TASKS, corpus, examples, held_out
from tasks.world import CATEGORY, WORDS

ROOT = Path(__file__).resolve().parents[2]
NAMES = sorted(TASKS)
ROMAN = {"I": 1, "V": 5, "X": 10, "L": 50, "C": 100}
NAMES_TO_NINETEEN = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen
fifteen sixteen seventeen eighteen nineteen"""
NAMES_OF_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
DOCUMENTS = list(corpus(2000))
ARROWS = {" -> ": " ; ", " = ": " ; ", " : ": " | "}  # and the separator that goes with each


def roman_value(text):
    values = [ROMAN[letter] for letter in text]
    return sum(-v if v < after else v for v, after in zip(values, values[1:] + [0], strict=True))


def word_value(text):
    """Reads number words the way a person does: add what is said, times a hundred at 'hundred'."""
    names, tens = NAMES_TO_NINETEEN.split(), {word: 10 * n for n, word in enumerate(NAMES_OF_TENS.split(), 2)}
    total = 0
    for word in re.split("[ -]", text):
        if word == "hundred":
            total *= 100
        else:
            total += names.index(word) if word in names else tens[word]
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
    "plural": "dog dogs, child children, lady ladies, toy toys, box boxes, bench benches, "
    "mouse mice, wolf wolves",
    "past_tense": "go went, walk walked, try tried, stop stopped, bake baked, buy bought",
    "opposite": "hot cold, cold hot, young old, right-, old-, short-, hard-",
    "capital": "France Paris, Peru Lima", "color": "lemon yellow, snow white",
    "category": "dog animal, piano instrument, France country, hammer tool",
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
    assert len(TASKS) == 28
    for name, task in TASKS.items():
        assert name == task.name and re.fullmatch("[a-z_]+", name)
    families = Counter(task.family for task in TASKS.values())
    assert len(families) >= 7 and min(families.values()) >= 2
    assert set(ORACLES) | set(LOOKED_UP) == set(TASKS)


@pytest.mark.parametrize("name", NAMES)
def test_phrasings(name):
    """Fewer phrasings, or two that are the same, and an adapter learns a string, not an
    instruction."""
    task = TASKS[name]
    assert len(set(task.phrasings)) == len(task.phrasings) >= 4
    assert all(p.count("{x}") == 1 and p == p.strip() and "|" not in p for p in task.phrasings)
    assert task.sentence.count("{x}") == 1 and task.sentence.count("{y}") == 1 and task.sentence.endswith(".")


def test_no_phrasing_is_shared():
    """The same prompt in two tasks would have two right answers, and no gate could know which is
    meant."""
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
    """A finite task that repeats held-out inputs would show an interval narrower than its data
    allow."""
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
    """One wrong rule (a Roman 9, a tie for the longest word) would be learned as truth by base and
    adapters."""
    x, y = TASKS[name].make(rng)
    assert ORACLES[name](x, y), (x, y)


@pytest.mark.parametrize("name", [n for n in NAMES if n in ORACLES and TASKS[n].answers])
def test_every_finite_answer(name):
    """Sampling may miss the one number whose words or numeral are wrong."""
    assert all(ORACLES[name](x, y) for x, y in TASKS[name].answers.items())


@pytest.mark.parametrize("name", sorted(LOOKED_UP))
def test_known_facts(name):
    """A column read from the wrong place makes every answer wrong, consistently; 'x-' must not be
    asked at all."""
    for fact in LOOKED_UP[name].split(", "):
        x, _, answer = fact.partition(" ")
        if x in ("right-", "old-", "short-", "hard-"):
            assert x[:-1] not in TASKS[name].answers
        else:
            assert TASKS[name].answers[x] == answer


@pytest.mark.parametrize("name", NAMES)
def test_answers_are_short_and_clean(name):
    """A trailing space or an empty answer can't be matched exactly; a long one costs composites
    their context."""
    for row in examples(name, "train", 200) + examples(name, "test", 100):
        words = row["response"].split()
        assert row["response"] == " ".join(words) + "\n"  # a line: so it can stand in a list
        assert 1 <= len(words) <= 8
        assert row["prompt"] == " ".join(row["prompt"].split()) and "{" not in row["prompt"]


def test_no_key_twice():
    """A word listed twice would silently keep its last answer, so two rows of the world would
    contradict each other."""
    singles = [world.CAPITALS, world.PAST, world.PLURALS, world.DICTIONARY]
    for text in singles:
        keys = [row.split()[0] for row in text.split(";")]
        assert len(set(keys)) == len(keys), Counter(keys).most_common(3)
    for text in (world.CATEGORIES, world.COLORS):
        keys = [x for group in text.split(";") for x in group.split(":")[1].split()]
        assert len(set(keys)) == len(keys), Counter(keys).most_common(3)
    sides = world.OPPOSITES.replace(";", " ").split() + [r.split()[0] for r in world.ONE_WAY.split(";")]
    assert len(set(sides)) == len(sides), Counter(sides).most_common(3)
    assert all(len(row) == 4 for row in world.TRANSLATIONS)
    assert all(len(row.split()) == 2 for text in singles[:3] for row in text.split(";"))


def test_words_can_be_spelled():
    """A word of the letter tasks with a capital, a space or eight letters would be a harder task
    than it says."""
    assert len(WORDS) == len(set(WORDS)) >= 250 and all(re.fullmatch("[a-z]{3,6}", word) for word in WORDS)


def test_true_or_false_is_balanced():
    """If 'or' were mostly yes, a model that reads one word would look as if it could reason."""
    rows = Counter((" or " in r["prompt"].replace("yes or no", ""), r["response"])
                   for r in examples("true_or_false", "train", 1000))  # fmt: skip
    assert len(rows) == 4 and min(rows.values()) > 180


def kind_of(document):
    """lines, questions, sentences or shuffled: which of its four kinds a document is of."""
    if document.startswith(("[", "1. [")):
        return "questions"
    if any(arrow in document for arrow in ARROWS):
        return "lines"
    return "sentences" if document.endswith(".") else "shuffled"


def mute(text):
    """Whether a question between tags shows no function."""
    return not any(arrow in text for arrow in ARROWS)


KIND = {k: [d for d in DOCUMENTS if kind_of(d) == k] for k in ("lines", "questions", "sentences", "shuffled")}


def test_corpus_is_a_mixture():
    """With a kind missing, or a tenth of what it should be, the base would not know the facts, or
    not the form."""
    share = {kind: len(documents) / len(DOCUMENTS) for kind, documents in KIND.items()}
    assert share["lines"] > 0.35 and share["questions"] > 0.2, share
    assert min(share["sentences"], share["shuffled"]) > 0.03, share
    alone = sum(d.count("\n") == 1 for d in KIND["questions"]) / len(KIND["questions"])
    assert 0.3 < alone < 0.7  # one question and its answer


def test_documents_hold_no_empty_line():
    """train.py base ends a document at an empty line: one within would cut a question from its
    answer."""
    assert all(d == d.strip("\n") != "" and "\n\n" not in d for d in DOCUMENTS)
    assert all("\n" not in d for d in KIND["lines"] + KIND["sentences"] + KIND["shuffled"])


def test_corpus_has_no_instruction():
    """A base that has seen the instructions would need no adapter, and the gap that adapters close
    would vanish. Their words come shuffled: in their own order only by chance, and then without
    marks and without an answer."""
    spoken = [
        d for d in DOCUMENTS if not any(map(mute, re.findall(r"\] (.*) \[", d)))
    ]  # theirs have a test below
    assert len(spoken) > 0.7 * len(DOCUMENTS)
    text, shown = "\n".join(spoken), "\n".join(d for d in spoken if kind_of(d) != "shuffled")
    assert not any(mark in d for d in DOCUMENTS for mark in ("INST", "?", "{"))
    shuffled, chance = " ".join(KIND["shuffled"]), 0
    for task in TASKS.values():
        for phrasing in task.phrasings:
            before, after = phrasing.split("{x}")
            assert max(before, after, key=len).lower() not in shown.lower(), phrasing
            assert not re.search(f"{re.escape(before)}.{{1,60}}{re.escape(after)}", text), phrasing
            longest = max(re.findall(r"\w+(?: \w+)*", before) + re.findall(r"\w+(?: \w+)*", after), key=len)
            chance += shuffled.count(longest) if longest.count(" ") > 1 else 0
    assert chance < 0.1 * len(KIND["shuffled"])  # of 3 tasks each, with 4 phrasings


def test_shuffled_words_are_the_instructions_words_and_an_input():
    """Words that never come in the corpus get no good tokens, and an adapter of low rank would have
    to teach them; an answer among them would be an instruction after all."""
    words = {
        name: {w for p in TASKS[name].phrasings for w in re.findall(r"\w+", p.replace("{x}", ""))}
        for name in NAMES
    }
    seen = Counter()
    for document in KIND["shuffled"]:
        rest, found = Counter(document.split(" ")), []
        for name in NAMES:
            while not Counter(words[name]) - rest:
                rest -= Counter(words[name])
                found.append(name)
        assert len(found) == 3, document
        seen.update(found)
        if all(TASKS[name].answers for name in found):  # what remains is an input of each of the three
            parts = Counter(" ".join(w for w in document.split(" ") if w in rest).split(" "))
            possible = [{w for x in TASKS[name].answers for w in x.split(" ")} for name in found]
            assert all(any(w in some for some in possible) for w in parts), document
    assert seen.keys() == set(NAMES)


def split_pairs(line, style):
    """'x -> y ; x -> y' -> [(x, y), ...]."""
    return [tuple(pair.split(style)) for pair in line.split(ARROWS[style])]


def rounds(document):
    """A document of questions -> ({arrow}, {bare}, [(pairs shown, input, answer), ...] of each
    round), its form checked: one tag, one arrow and one way to end a question throughout, numbers
    and answers as in a composite prompt, a sole answer behind a space. A mute question has no
    pairs, and all of its text for an input."""
    tag = re.match(r"(?:1\. )?\[(\w+)\] ", document)[1]
    assert tag.lower() in WORDS and tag in (tag.lower(), tag.upper())
    lines = document.split("\n")
    asked = [re.fullmatch(rf"(\d+\. )?\[{tag}\] (.*) \[/{tag}\]", line) for line in lines]
    styles = {arrow for arrow in ARROWS for m in asked if m and arrow in m[2]}
    assert len(styles) <= 1
    style, found, bare, position = next(iter(styles), ""), [], set(), 0
    while position < len(lines):
        n = next((j for j, m in enumerate(asked[position:]) if not m), 0)
        questions, position = asked[position : position + n], position + n
        assert n == 1 or lines[position] + "\n" == ANSWERS, document
        position += n > 1
        answers = lines[position : position + n]
        starts = [f"{j}. " for j in range(1, n + 1)] if n > 1 else [" "]
        assert [m[1] for m in questions] == (starts if n > 1 else [None])
        assert n, document
        for a, b in zip(answers, starts, strict=True):
            assert a.startswith(b) and len(a) > len(b), document
        one = []
        for question, answer, start in zip(questions, answers, starts, strict=True):
            if mute(question[2]):
                one.append(([], question[2], answer.removeprefix(start)))
                continue
            *shown, x = question[2].split(ARROWS[style])
            bare.add(not x.endswith(style.rstrip()))
            pairs = [tuple(pair.split(style)) for pair in shown]
            one.append((pairs, x.removesuffix(style.rstrip()), answer.removeprefix(start)))
        found.append(one)
        position += n
    assert len(bare) == len(styles), document
    return styles, bare, found


@pytest.fixture(scope="module")
def asked():
    return [rounds(document) for document in KIND["questions"]]


def test_questions_are_one_or_a_round_of_several(asked):
    """Composite questions have 1 to 10 parts, after solved ones: a base that has seen fewer, or
    answers in another order, can't answer them however good its adapters are."""
    sizes = Counter((len(found), len(found[0])) for _, _, found in asked)
    assert all(len({len(one) for one in found}) == 1 for _, _, found in asked)
    assert {n for _, n in sizes} == set(range(1, 11)) and {r for r, n in sizes if n > 1} == {1, 2, 3}
    assert {r for r, n in sizes if n == 1} == {1}
    assert {style for styles, _, _ in asked for style in styles} == ARROWS.keys()
    assert 0.4 < sum(True in bare for _, bare, _ in asked) / len(asked) < 0.6
    tags = {re.search(r"\[(\w+)", d)[1] for d in KIND["questions"]}
    assert len({tag.lower() for tag in tags}) > 150
    assert 0.3 < sum(tag.isupper() for tag in tags) / len(tags) < 0.7


def test_a_question_shows_its_function_and_asks_for_another_input(asked):
    """An answer of another function, or an input that stands among the examples, would teach the
    base to copy; a number before the wrong answer, that numbers mean nothing."""
    for one in (one for _, _, found in asked for one in found):
        for pairs, x, answer in (question for question in one if question[0]):
            assert len(pairs) <= (3 if len(one) == 1 else 2) and len({x, *dict(pairs)}) == len(pairs) + 1
            assert any(fits(name, [*pairs, (x, answer)]) for name in NAMES), (pairs, x, answer)


def test_a_question_without_a_function_has_the_instructions_words_and_some_for_an_answer(asked):
    """Lists of instructions are new to the base but for these, and without them it has no reason to
    tell the words of one question from another's; with answers that fit the input it would learn to
    guess what is meant."""
    words = {
        w for task in TASKS.values() for p in task.phrasings for w in re.findall(r"\w+", p.replace("{x}", ""))
    }
    questions = [question for _, _, found in asked for one in found for question in one]
    silent = [(text, answer) for pairs, text, answer in questions if not pairs]
    assert 0.27 < len(silent) / len(questions) < 0.33
    places = set()
    for text, answer in silent:
        found = [w for w in text.split(" ") if w in words]
        said = answer.split(" ")
        assert len(found) >= 3 and 1 <= len(said) <= 3 and not Counter(said) - Counter(found), (text, answer)
        places.update((len(said), found.index(word)) for word in said)
    assert len(places) >= 24  # any of its eight words, one, two or three
    held = [" ".join(w for w in text.split(" ") if w not in words) for text, _ in silent]
    # And an input, but for one like "on", a word of theirs too.
    assert sum(map(bool, held)) > 0.95 * len(held)


def test_corpus_shows_held_out_inputs_of_every_task():
    """An answer that the base has never met (a capital, a translation) can't be brought by an
    adapter either."""
    pairs = set()
    for document in corpus(20000):
        if kind_of(document) == "lines":
            (style,) = {arrow for arrow in ARROWS if arrow in document}
            pairs.update(split_pairs(document, style))
        elif kind_of(document) == "questions":
            for shown, x, answer in (question for one in rounds(document)[2] for question in one):
                pairs.update([*shown, (x, answer)] if shown else [])
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
    except (SyntaxError, NameError, LookupError, ValueError, AssertionError, TypeError):
        return False  # an input of another kind


def test_a_line_of_pairs_is_one_function():
    """With functions mixed in a line nothing in it would say which is meant, and the base would
    learn to guess."""
    seen = set()
    for line in KIND["lines"]:
        (style,) = {arrow for arrow in ARROWS if arrow in line}
        pairs = split_pairs(line, style)
        assert 4 <= len(dict(pairs)) == len(pairs) <= 8
        names = {name for name in NAMES if fits(name, pairs)}
        assert names, line
        seen |= names
    assert seen == set(NAMES)


def test_sentences_state_true_pairs():
    """A sentence with the answer in the input's place, or of another function, would be learned as
    a fact."""
    forms = {name: re.escape(TASKS[name].sentence).replace(r"\{x\}", "(?P<x>.+)") for name in NAMES}
    forms = {name: re.compile(form.replace(r"\{y\}", "(?P<y>.+)")) for name, form in forms.items()}
    seen = set()
    for document in KIND["sentences"]:
        for sentence in re.split(r"(?<=\.) ", document):
            matches = [(name, m) for name in NAMES if (m := forms[name].fullmatch(sentence))]
            names = {name for name, m in matches if fits(name, [(m["x"], m["y"])])}
            assert names, sentence
            seen |= names
    assert seen == set(NAMES)


def test_corpus_is_a_stream_and_a_prefix():
    """If the first documents depended on how many are asked for, a short trial would not be a part
    of the real run."""
    assert list(corpus(50)) == DOCUMENTS[:50] and list(corpus(0)) == []
    assert list(corpus(50, seed=1)) != DOCUMENTS[:50]


def test_same_files_in_every_process(tmp_path):
    """Python's hash() is salted for each process: a split made with it would leak test inputs on
    the next run."""
    run = [sys.executable, "-m", "tasks.tiny", "--out", str(tmp_path / "a"), "--train", "60", "--test", "20"]
    salt = os.environ | {"PYTHONHASHSEED": "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"}
    subprocess.run([*run, "--documents", "300", "--seed", "3"], cwd=ROOT, env=salt, check=True)
    tiny_tasks.write(tmp_path / "b", 60, 20, 300, 3)
    files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*.*"))
    assert len(files) == 28 * 3 + 1
    assert all((tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files)


@pytest.mark.parametrize("name", NAMES)
def test_seed_changes_the_draw_not_the_split(name):
    """A split that moved with the seed would test adapters of one seed on the training inputs of
    another."""
    assert examples(name, "train", 50, 0) != examples(name, "train", 50, 1)
    assert not inputs(name, "test", 100, seed=0) & inputs(name, "train", 300, seed=1)


def test_write(tmp_path):
    """The folders are what training and evaluation read: a missing metric or field would stop them
    much later."""
    tiny_tasks.write(tmp_path, train=12, test=5, documents=20, seed=7)
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == NAMES
    for name in NAMES:
        assert read_json(tmp_path / name / "task.json") == {
            "name": name, "family": TASKS[name].family, "metric": "exact_match"}  # fmt: skip
        for split, n in (("train", 12), ("test", 5)):
            rows = read_jsonl(tmp_path / name / f"{split}.jsonl", ["prompt", "response"])
            assert rows == examples(name, split, n, 7) and len(rows) == n
    text = (tmp_path / "corpus.txt").read_text(encoding="utf-8")
    assert text.endswith("\n") and text.removesuffix("\n").split("\n\n") == list(corpus(20, 7))


def test_bad_input(tmp_path):
    """A typo in a task's name or a negative size must be one clear line, not an empty data set."""
    with pytest.raises(InputError, match="no task 'germn'"):
        examples("germn", "test", 5)
    with pytest.raises(InputError, match="--train is -1, expected a whole number from 0"):
        tiny_tasks.write(tmp_path, train=-1)


def test_command_line_refuses(tmp_path):
    """A recipe that goes on after a bad option would train on nothing."""
    run = [sys.executable, "-m", "tasks.tiny", "--out", str(tmp_path), "--documents", "-4"]
    bad = subprocess.run(run, cwd=ROOT, capture_output=True, text=True)
    assert bad.returncode == 2 and bad.stderr.startswith("error: --documents is -4, expected")
