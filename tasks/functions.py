"""The functions that the embedded tasks teach: 28 in eight families, how each is asked for.

All are over one small world of a few hundred common words (tasks/world.py).
"""

import operator
import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import permutations, product

from tasks import world
from tasks.world import CATEGORY, WORDS, number_words


@dataclass(frozen=True)
class TinyTask:
    """One small function: how it is asked for, and how pairs of it are made."""

    name: str
    family: str
    phrasings: tuple[str, ...]  # instructions, each with one {x}
    sentence: str  # states a pair {x}, {y}; for the corpus only
    make: Callable[[random.Random], tuple[str, str]]  # -> (x, answer)
    answers: dict[str, str] | None  # every x of a finite task, None where there are too many
    share: int  # weight in the corpus, larger where a small model learns slowly


# The functions ------------------------------------------------------------------------------------


def _table(inputs, answer):
    """{x: answer(x)} as text."""
    return {str(x): str(answer(x)) for x in inputs}


def _of_two(pairs, answer):
    """{"a and b": answer(a, b)} as text."""
    return {f"{a} and {b}": str(answer(a, b)) for a, b in pairs}


def _from_words(count, link, answer, fits=lambda words: True):
    """rng -> (`count` words joined by `link`, answer(words)), of words for which `fits` holds."""

    def make(rng):
        words = rng.sample(WORDS, count)
        while not fits(words):
            words = rng.sample(WORDS, count)
        return link.join(words), answer(words)

    return make


def _capitals(words):
    return " ".join(words).upper()


def _initials(words):
    return [word[0] for word in words]


def _acronym(words):
    return "".join(_initials(words)).upper()


def _distinct_initials(words):
    return len(set(_initials(words))) == len(words)


def _sorted_list(words):
    return ", ".join(sorted(words))


def _reversed_list(words):
    return ", ".join(reversed(words))


def _longest(words):
    return max(words, key=len)


def _far_apart(words):
    lengths = sorted(map(len, words))
    return lengths[-1] >= lengths[-2] + 2  # one right answer, and not by a hair


def _odd_one_out(rng):
    kind, other = rng.sample(sorted(set(CATEGORY.values())), 2)
    words = rng.sample(_of_category(kind), 3)
    odd = rng.choice(_of_category(other))
    words.insert(rng.randrange(4), odd)
    return ", ".join(words), odd


def _of_category(kind):
    return [word for word in CATEGORY if CATEGORY[word] == kind]


def _true_or_false(rng):
    word = rng.choice(["and", "or"])
    answer = rng.choice([True, False])  # drawn first: the link word alone says nothing about it
    while True:
        a, b, c, d = rng.sample(range(1, 10), 4)
        if ((a > b and c > d) if word == "and" else (a > b or c > d)) == answer:
            return f"{a} > {b} {word} {c} > {d}", "yes" if answer else "no"


def _tallest(rng):
    a, b, c = rng.sample(world.PEOPLE.split(), 3)
    return " and ".join(rng.sample([f"{a} is taller than {b}", f"{b} is taller than {c}"], 2)), a


# The tasks ----------------------------------------------------------------------------------------


def _task(family, name, share, pairs, text):
    """A TinyTask. `pairs` is {x: answer}, or rng -> (x, answer) where there are too many to list.

    `text` holds the phrasings and, last, the sentence, with " | " between them.
    """
    *phrasings, sentence = " ".join(text.split()).split(" | ")
    if callable(pairs):
        return TinyTask(name, family, tuple(phrasings), sentence, pairs, None, share)
    items = list(pairs.items())

    def make(rng):
        return rng.choice(items)

    return TinyTask(name, family, tuple(phrasings), sentence, make, pairs, share)


def _dictionary(language, column):
    answers = {row[0]: row[column] for row in world.TRANSLATIONS}
    text = """
        Translate into LANGUAGE: {x} | What is {x} in LANGUAGE? |
        How do you say {x} in LANGUAGE? | Give the LANGUAGE word for {x}. |
        A translation of {x} into LANGUAGE is {y}."""
    return _task("languages", language.lower(), 4, answers, text.replace("LANGUAGE", language))


_DESCENDING = [(a, b) for a in range(2, 61) for b in range(1, a)]  # subtract has no negative answer

# Family, name, share of the corpus, pairs, phrasings and, last, the sentence.
# fmt: off
_TASKS = (
    _task("letters", "upper_case", 2, _from_words(2, " ", _capitals), """
        Write in capital letters: {x} | Convert {x} to upper case. |
        How does {x} look in all capitals? | Make every letter a capital: {x} |
        In capital letters {x} looks like {y}."""),
    _task("letters", "reverse_word", 3, _table(WORDS, lambda word: word[::-1]), """
        Reverse the word: {x} | Write {x} backwards. | What is {x} spelled backwards? |
        Give the letters of {x} in reverse order. | Backwards the word {x} reads {y}."""),
    _task("letters", "spell_word", 3, _table(WORDS, " ".join), """
        Spell the word: {x} | How do you spell {x}? | What are the letters of {x}? |
        Write {x} letter by letter. | The word {x} is spelled {y}."""),
    _task("letters", "count_letters", 3, _table(WORDS, len), """
        Count the letters: {x} | How many letters are in {x}? | How long is the word {x}? |
        Give the number of letters in {x}. | The number of letters in the word {x} is {y}."""),
    _task("letters", "acronym", 2, _from_words(3, " ", _acronym), """
        Make an acronym of: {x} | What is the acronym for {x}? | Which initials does {x} have? |
        Abbreviate {x} to its first letters. | The acronym of {x} is {y}."""),

    _task("lists", "sort_list", 4, _from_words(3, ", ", _sorted_list, _distinct_initials), """
        Sort the words: {x} | Put in alphabetical order: {x} | Sort {x} from A to Z. |
        Arrange alphabetically: {x} | The words {x} in alphabetical order are {y}."""),
    _task("lists", "reverse_list", 1, _from_words(3, ", ", _reversed_list), """
        Reverse the list: {x} | Write the list from last to first: {x} | Flip the order of {x}. |
        What is the list {x} in reverse? | The list {x} from the last to the first is {y}."""),
    _task("lists", "longest_word", 2, _from_words(3, ", ", _longest, _far_apart), """
        Find the longest word: {x} | Which word is the longest: {x}? |
        Which of {x} has the most letters? | Pick the longest of {x}. |
        The longest word of {x} is {y}."""),
    _task("lists", "odd_one_out", 3, _odd_one_out, """
        Find the odd one out: {x} | Which does not belong: {x}? |
        Which of {x} is not like the others? | Pick the word that does not fit: {x} |
        The odd one out of {x} is {y}."""),

    _task("numbers", "add", 5, _of_two(product(range(1, 50), repeat=2), operator.add), """
        Add {x}. | What is the sum of {x}? | How much are {x} together? | Find the total of {x}. |
        The sum of {x} is {y}."""),
    _task("numbers", "subtract", 6, _of_two(_DESCENDING, operator.sub), """
        What is the difference of {x}? | How far apart are {x}? |
        Subtract the smaller from the larger: {x} | Find the difference between {x}. |
        The difference of {x} is {y}."""),
    _task("numbers", "larger_number", 3, _of_two(permutations(range(10, 100), 2), max), """
        Which is larger: {x}? | Pick the larger of {x}. | Which number is bigger, {x}? |
        Find the maximum of {x}. | The larger of the two numbers {x} is {y}."""),
    _task("numbers", "next_number", 1, _table(range(999), lambda n: n + 1), """
        Which number comes after {x}? | What is the next number after {x}? | Count on from {x}. |
        Give the number that follows {x}. | After the number {x} comes {y}."""),
    _task("numbers", "parity", 1, _table(range(1000), lambda n: ("even", "odd")[n % 2]), """
        Is {x} odd or even? | Is the number {x} even or odd? | Odd or even: {x} |
        What is the parity of {x}? | The number {x} is {y}."""),

    _task("numerals", "number_to_words", 1, _table(range(1000), number_words), """
        Write {x} in words. | Spell out the number {x}. | How is {x} written in words? |
        Convert the digits to words: {x} | In words the number {x} is {y}."""),
    _task("numerals", "words_to_number", 1, {number_words(n): str(n) for n in range(1000)}, """
        Write {x} in digits. | Which number is {x}? | Convert the words to digits: {x} |
        Give the digits of {x}. | In digits {x} is {y}."""),
    _task("numerals", "roman", 2, _table(range(1, 300), world.roman), """
        Write {x} as a Roman numeral. | Convert to Roman numerals: {x} |
        What is {x} in Roman numerals? | How did the Romans write {x}? |
        The Roman numeral of {x} is {y}."""),

    _dictionary("German", 1),
    _dictionary("Spanish", 2),
    _dictionary("Italian", 3),

    _task("grammar", "plural", 2, world.PLURAL, """
        What is the plural of {x}? | Give the plural: {x} | Make {x} plural. |
        How do you call more than one {x}? | The plural of {x} is {y}."""),
    _task("grammar", "past_tense", 2, world.PAST_TENSE, """
        What is the past tense of {x}? | Give the past: {x} | Put the verb {x} into the past. |
        Change {x} to the past tense. | The past tense of {x} is {y}."""),
    _task("grammar", "opposite", 2, world.OPPOSITE, """
        What is the opposite of {x}? | Give the opposite: {x} | Name the antonym of {x}. |
        Find a word that means the reverse of {x}. | The opposite of {x} is {y}."""),

    _task("world", "capital", 2, world.CAPITAL, """
        What is the capital of {x}? | Give the capital: {x} | Name the capital city of {x}. |
        From which city is {x} governed? | The capital of {x} is {y}."""),
    _task("world", "color", 2, world.COLOR, """
        What color is {x}? | Which color does {x} have? | Give the color: {x} |
        Name the color of {x}. | The color of {x} is {y}."""),
    _task("world", "category", 1, CATEGORY, """
        What kind of thing is {x}? | Which category does {x} belong to? |
        Name the category of {x}. | Classify the word {x}. | A kind of {y} is {x}."""),

    _task("logic", "true_or_false", 4, _true_or_false, """
        Is it true that {x}? | Answer yes or no: {x} | Does this hold: {x}? |
        Check the statement: {x} | On whether {x} the answer is {y}."""),
    _task("logic", "tallest", 4, _tallest, """
        If {x}, who is the tallest? | Who is the tallest? {x}. | Name the tallest person: {x} |
        {x}. Who stands above the others? | Given that {x}, the tallest is {y}."""),
)
# fmt: on
TASKS: dict[str, TinyTask] = {task.name: task for task in _TASKS}
