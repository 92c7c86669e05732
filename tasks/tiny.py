"""The embedded tasks: generated, endless, exact answers.

28 small functions in eight families of relatives, over one small world of a few hundred common
words, so that a Llama of a few million parameters can learn all of it on a laptop. `corpus` is what
the base is pretrained on: input-output pairs of every function, none of them named, plain
sentences, and lists of questions; never an instruction. So the knowledge is in the base and an
adapter brings the task, as with a large Llama. Held-out inputs are in the corpus for the same
reason: what is tested is whether an adapter carries its task over to inputs that it was not trained
on.
"""

import hashlib
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path

from common.files import InputError, run_script, write_json, write_jsonl, write_text
from common.options import parse_args


@dataclass
class TinyTasksConfig:
    """Options of `python -m tasks.tiny`."""

    out: str  # folder that gets one task folder a task, and corpus.txt
    train: int = 1000  # training examples a task, at the most (a finite task may have fewer distinct prompts)
    test: int = 100  # held-out examples a task, at the most (a finite task has each held-out input once)
    documents: int = 150000  # of pretraining text
    seed: int = 0  # same seed, same files


@dataclass(frozen=True)
class TinyTask:
    """One small function: how it is asked for, and how pairs of it are made."""

    name: str
    family: str
    phrasings: tuple[str, ...]  # instructions, each with one {x}
    sentence: str  # plain statement of a pair {x}, {y}, for the corpus only
    make: Callable  # random.Random -> (x, answer)
    answers: dict[str, str] | None  # every x of a finite task, None where there are too many to list
    share: int  # how often its pairs come in the corpus: the functions that take a small model longest come more often


# The world ----------------------------------------------------------------------------------------------------------
# Words with two common translations, opposites, categories or colors are left out: every answer is
# the only one.

DICTIONARY = """dog Hund perro cane; cat Katze gato gatto; horse Pferd caballo cavallo; cow Kuh vaca mucca; pig Schwein
cerdo maiale; sheep Schaf oveja pecora; goat Ziege cabra capra; mouse Maus ratón topo; bird Vogel pájaro uccello; fish
Fisch pez pesce; lion Löwe león leone; tiger Tiger tigre tigre; bear Bär oso orso; wolf Wolf lobo lupo; fox Fuchs zorro
volpe; rabbit Kaninchen conejo coniglio; duck Ente pato anatra; frog Frosch rana rana; snake Schlange serpiente
serpente; spider Spinne araña ragno; monkey Affe mono scimmia; apple Apfel manzana mela; pear Birne pera pera; lemon
Zitrone limón limone; grape Traube uva uva; bread Brot pan pane; cheese Käse queso formaggio; milk Milch leche latte;
water Wasser agua acqua; tea Tee té tè; coffee Kaffee café caffè; sugar Zucker azúcar zucchero; salt Salz sal sale; egg
Ei huevo uovo; house Haus casa casa; door Tür puerta porta; window Fenster ventana finestra; table Tisch mesa tavolo;
chair Stuhl silla sedia; bed Bett cama letto; kitchen Küche cocina cucina; key Schlüssel llave chiave; knife Messer
cuchillo coltello; sun Sonne sol sole; moon Mond luna luna; star Stern estrella stella; sky Himmel cielo cielo; rain
Regen lluvia pioggia; snow Schnee nieve neve; fire Feuer fuego fuoco; sea Meer mar mare; river Fluss río fiume; forest
Wald bosque bosco; tree Baum árbol albero; flower Blume flor fiore; leaf Blatt hoja foglia; stone Stein piedra pietra;
ice Eis hielo ghiaccio; head Kopf cabeza testa; eye Auge ojo occhio; ear Ohr oreja orecchio; nose Nase nariz naso; mouth
Mund boca bocca; tooth Zahn diente dente; hand Hand mano mano; foot Fuß pie piede; arm Arm brazo braccio; leg Bein
pierna gamba; finger Finger dedo dito; heart Herz corazón cuore; blood Blut sangre sangue; man Mann hombre uomo; woman
Frau mujer donna; child Kind niño bambino; mother Mutter madre madre; father Vater padre padre; brother Bruder hermano
fratello; sister Schwester hermana sorella; son Sohn hijo figlio; friend Freund amigo amico; king König rey re; queen
Königin reina regina; doctor Arzt médico medico; book Buch libro libro; school Schule escuela scuola; bridge Brücke
puente ponte; street Straße calle strada; city Stadt ciudad città; train Zug tren treno; ship Schiff barco nave; hat Hut
sombrero cappello; shirt Hemd camisa camicia; shoe Schuh zapato scarpa; gold Gold oro oro; day Tag día giorno; night
Nacht noche notte; summer Sommer verano estate; winter Winter invierno inverno; red rot rojo rosso; green grün verde
verde; blue blau azul blu; yellow gelb amarillo giallo; white weiß blanco bianco; black schwarz negro nero; gray grau
gris grigio; big groß grande grande; small klein pequeño piccolo; new neu nuevo nuovo; young jung joven giovane; good
gut bueno buono; cold kalt frío freddo; strong stark fuerte forte; full voll lleno pieno; sad traurig triste triste; dry
trocken seco secco; clean sauber limpio pulito; life Leben vida vita; death Tod muerte morte; war Krieg guerra guerra;
song Lied canción canzone"""

CATEGORIES = """animal: dog cat horse cow pig goat sheep lion tiger wolf rabbit monkey zebra camel donkey mouse; fruit:
apple pear banana cherry grape peach plum mango melon apricot lemon papaya strawberry; vegetable: carrot onion potato
cabbage spinach broccoli lettuce garlic radish leek turnip; color: red green blue yellow white black brown pink purple
gray beige; body part: head eye ear nose mouth hand foot arm leg knee neck finger elbow shoulder; clothing: shirt shoe
hat coat glove sock skirt jacket scarf sweater trousers boot; furniture: table chair bed sofa desk bench shelf stool
armchair couch bookcase; tool: hammer axe drill shovel rake wrench chisel spade; vehicle: car bus truck train tram
bicycle airplane ship boat taxi van scooter; drink: water milk tea coffee juice wine beer lemonade cider cocoa;
instrument: piano guitar violin flute drum trumpet harp cello clarinet banjo; metal: iron gold silver copper tin steel
zinc bronze nickel; job: doctor teacher baker farmer nurse pilot painter lawyer judge barber plumber dentist tailor;
sport: tennis football golf hockey boxing rugby baseball skiing judo basketball; flower: rose tulip daisy lily orchid
poppy daffodil sunflower; shape: circle square triangle rectangle oval hexagon pentagon; relative: mother father brother
sister son daughter uncle aunt cousin; country: France Spain Italy Germany Japan China Egypt Kenya Canada Cuba Chile
Norway; city: Paris Madrid Rome Berlin Tokyo Vienna Cairo Nairobi Ottawa Lima Oslo Moscow"""

COLORS = """yellow: lemon banana sun corn canary duckling sunflower mustard butter; white: snow milk salt sugar flour
chalk cotton swan rice pearl tooth igloo; black: coal tar soot crow raven panther ink tire; green: grass leaf frog pea
cucumber spinach lettuce broccoli cactus clover moss fern ivy lime emerald; red: blood tomato strawberry ruby cherry
ladybug lobster ketchup raspberry brick; blue: sky sea sapphire ocean blueberry jeans; orange: carrot pumpkin
tangerine apricot mandarin basketball; brown: chocolate mud wood bark soil bear walnut chestnut cocoa cinnamon acorn;
pink: pig flamingo piglet bubblegum salmon; gray: elephant mouse ash cement donkey rhino shark dolphin koala concrete;
purple: plum eggplant lavender amethyst"""

CAPITALS = """France Paris; Germany Berlin; Italy Rome; Spain Madrid; Portugal Lisbon; England London; Ireland Dublin;
Scotland Edinburgh; Wales Cardiff; Norway Oslo; Sweden Stockholm; Denmark Copenhagen; Finland Helsinki; Iceland
Reykjavik; Poland Warsaw; Austria Vienna; Hungary Budapest; Greece Athens; Turkey Ankara; Russia Moscow; Ukraine Kyiv;
Romania Bucharest; Bulgaria Sofia; Serbia Belgrade; Croatia Zagreb; Slovakia Bratislava; Albania Tirana; Belgium
Brussels; Switzerland Bern; Latvia Riga; Lithuania Vilnius; Estonia Tallinn; Belarus Minsk; Malta Valletta; Cyprus
Nicosia; Georgia Tbilisi; Armenia Yerevan; Egypt Cairo; Libya Tripoli; Tunisia Tunis; Algeria Algiers; Morocco Rabat;
Sudan Khartoum; Kenya Nairobi; Uganda Kampala; Tanzania Dodoma; Rwanda Kigali; Somalia Mogadishu; Nigeria Abuja; Ghana
Accra; Senegal Dakar; Mali Bamako; Niger Niamey; Angola Luanda; Zambia Lusaka; Zimbabwe Harare; Namibia Windhoek; Gabon
Libreville; Gambia Banjul; Jordan Amman; Lebanon Beirut; Syria Damascus; Iraq Baghdad; Iran Tehran; Qatar Doha; Oman
Muscat; Afghanistan Kabul; Pakistan Islamabad; Nepal Kathmandu; Bangladesh Dhaka; Thailand Bangkok; Vietnam Hanoi; Laos
Vientiane; Japan Tokyo; China Beijing; Taiwan Taipei; Australia Canberra; Fiji Suva; Canada Ottawa; Cuba Havana; Jamaica
Kingston; Colombia Bogota; Venezuela Caracas; Ecuador Quito; Peru Lima; Chile Santiago; Uruguay Montevideo; Paraguay
Asuncion; Brazil Brasilia"""

PLURALS = """sheep sheep; man men; woman women; child children; foot feet; tooth teeth; mouse mice; goose geese; ox
oxen; leaf leaves; knife knives; wolf wolves; wife wives; life lives; loaf loaves; shelf shelves; thief thieves; potato
potatoes; tomato tomatoes; hero heroes"""

NOUNS = """bird bear fox duck frog snake bee ant spider whale egg onion house door window key spoon plate bottle lamp
mirror star cloud river lake island forest tree stone eye ear nose hand arm leg brother sister friend king queen book
school church bridge street city hat shirt shoe day night week month year hour song word box brush glass watch dress
beach peach lady party story toy boy girl wall road ball cup pen ring"""

PAST = """go went; see saw; eat ate; come came; take took; give gave; make made; know knew; get got; find found; think
thought; say said; tell told; run ran; write wrote; read read; sing sang; swim swam; drink drank; begin began; drive
drove; ride rode; fly flew; grow grew; throw threw; draw drew; blow blew; buy bought; catch caught; teach taught; fight
fought; sleep slept; keep kept; feel felt; leave left; meet met; send sent; spend spent; build built; lose lost; win
won; sit sat; stand stood; hold held; hear heard; speak spoke; break broke; steal stole; choose chose; wear wore; forget
forgot; hide hid; bite bit; fall fell; cut cut; put put; hit hit; pay paid; sell sold; feed fed; shake shook; rise rose;
do did; have had; walk walked; talk talked; play played; work worked; look looked; ask asked; call called; help helped;
jump jumped; open opened; close closed; wash washed; watch watched; push pushed; pull pulled; cook cooked; clean
cleaned; paint painted; wait waited; need needed; live lived; love loved; like liked; move moved; dance danced; bake
baked; smile smiled; use used; hope hoped; try tried; cry cried; carry carried; stop stopped; plan planned; drop
dropped; climb climbed; count counted; answer answered; listen listened; turn turned; laugh laughed; kick kicked; finish
finished"""

OPPOSITES = """hot cold; warm cool; big small; fast slow; early late; rich poor; full empty; wet dry; clean dirty; happy
sad; good bad; up down; in out; on off; day night; black white; yes no; north south; east west; love hate; win lose; buy
sell; push pull; give take; come go; first last; above below; near far; inside outside; before after; always never; more
less; most least; many few; high low; wide narrow; strong weak; deep shallow; smooth rough; tight loose; safe dangerous;
cheap expensive; true false; front back; top bottom; alive dead; asleep awake; wise foolish; summer winter; laugh cry;
friend enemy; war peace; male female; import export; include exclude; increase decrease; ancient modern; borrow lend;
forget remember; positive negative; possible impossible; lucky unlucky; pack unpack; appear disappear; agree disagree;
honest dishonest; guilty innocent; public private; sunrise sunset; birth death; everything nothing"""
ONE_WAY = """thick thin; closed open; rude polite; tall short; long short; young old; new old; dark light; heavy light;
left right; wrong right; loud quiet"""

PEOPLE = "Tom Ann Bob Eva Max Lea Ben Mia Sam Zoe Jim Amy Leo Kim Dan Sue Paul Nora Karl Lisa"
SMALL_NUMBERS = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen
seventeen eighteen nineteen"""
TENS = "twenty thirty forty fifty sixty seventy eighty ninety"


def _rows(text):
    return [row.split() for row in text.split(";")]


def _groups(text):
    """'answer: x x x; ...' as {x: answer}."""
    groups = [group.split(":") for group in text.split(";")]
    return {x: " ".join(answer.split()) for answer, xs in groups for x in xs.split()}


def plural(noun):
    """The regular plural."""
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + ("es" if noun.endswith(("s", "x", "ch", "sh")) else "s")


TRANSLATIONS = _rows(DICTIONARY)
CATEGORY = _groups(CATEGORIES)
COLOR = _groups(COLORS)
_COUNTABLE = ("animal", "furniture", "tool", "vehicle", "instrument", "job", "flower", "shape")
_NOUNS = NOUNS.split() + [noun for noun, kind in CATEGORY.items() if kind in _COUNTABLE]
PLURAL = {noun: plural(noun) for noun in _NOUNS} | dict(_rows(PLURALS))
PAIRS = _rows(OPPOSITES)
OPPOSITE = dict(PAIRS) | {b: a for a, b in PAIRS} | dict(_rows(ONE_WAY))
_SPELLABLE = {row[0] for row in TRANSLATIONS} | CATEGORY.keys() | COLOR.keys() | PLURAL.keys()
WORDS = sorted(w for w in _SPELLABLE if 3 <= len(w) <= 6 and w.isalpha() and w.islower())


# The functions ------------------------------------------------------------------------------------------------------


def number_words(n):
    """0 to 999 in English words, American style: 'three hundred twenty-one'."""
    small = SMALL_NUMBERS.split()
    if n >= 100:
        return f"{small[n // 100]} hundred" + (f" {number_words(n % 100)}" if n % 100 else "")
    if n < 20:
        return small[n]
    tens = TENS.split()[n // 10 - 2]
    return f"{tens}-{small[n % 10]}" if n % 10 else tens


def roman(n):
    """1 to 399 as a Roman numeral."""
    ones = ["", "I", "II", "III", "IV", "V", "VI", "VII", "VIII", "IX"]
    tens = ["", "X", "XX", "XXX", "XL", "L", "LX", "LXX", "LXXX", "XC"]
    return "C" * (n // 100) + tens[n // 10 % 10] + ones[n % 10]


def _from_words(count, link, answer, fits=lambda words: True):
    """rng -> (`count` words joined by `link`, answer(words)), of words for which `fits` holds."""

    def make(rng):
        words = rng.sample(WORDS, count)
        while not fits(words):
            words = rng.sample(WORDS, count)
        return link.join(words), answer(words)

    return make


def _far_apart(words):
    lengths = sorted(map(len, words))
    return lengths[-1] >= lengths[-2] + 2  # one right answer, and not by a hair


def _initials(words):
    return "".join(word[0] for word in words)


def _odd_one_out(rng):
    kind, other = rng.sample(sorted(set(CATEGORY.values())), 2)
    words = rng.sample([w for w in CATEGORY if CATEGORY[w] == kind], 3)
    odd = rng.choice([w for w in CATEGORY if CATEGORY[w] == other])
    words.insert(rng.randrange(4), odd)
    return ", ".join(words), odd


def _true_or_false(rng):
    word = rng.choice(["and", "or"])
    answer = rng.choice([True, False])
    while True:  # drawn so, the link word alone says nothing about the answer
        a, b, c, d = rng.sample(range(1, 10), 4)
        if ((a > b and c > d) if word == "and" else (a > b or c > d)) == answer:
            return f"{a} > {b} {word} {c} > {d}", "yes" if answer else "no"


def _tallest(rng):
    a, b, c = rng.sample(PEOPLE.split(), 3)
    return " and ".join(rng.sample([f"{a} is taller than {b}", f"{b} is taller than {c}"], 2)), a


# The tasks ----------------------------------------------------------------------------------------------------------


def _task(family, name, source, share, text):
    """`source`: {x: answer}, or rng -> (x, answer) where there are too many; `text`: 'phrasing |
    ... # sentence'."""
    phrasings, sentence = text.split(" # ")
    answers = source if isinstance(source, dict) else None
    items = list(answers.items()) if answers else []
    make = (lambda rng: rng.choice(items)) if items else source
    return TinyTask(name, family, tuple(phrasings.split(" | ")), sentence, make, answers, share)


# fmt: off
def _dictionary(language, column):
    return _task("languages", language.lower(), {row[0]: row[column] for row in TRANSLATIONS}, 4,
        f"Translate into {language}: {{x}} | What is {{x}} in {language}? | How do you say {{x}} in {language}? | "
        f"Give the {language} word for {{x}}. # A translation of {{x}} into {language} is {{y}}.")


def _all_tasks():
    return [
        _task("letters", "upper_case", _from_words(2, " ", lambda words: " ".join(words).upper()), 2,
            "Write in capital letters: {x} | Convert {x} to upper case. | How does {x} look in all capitals? | "
            "Make every letter a capital: {x} # In capital letters {x} looks like {y}."),
        _task("letters", "reverse_word", {w: w[::-1] for w in WORDS}, 3,
            "Reverse the word: {x} | Write {x} backwards. | What is {x} spelled backwards? | Give the letters of "
            "{x} in reverse order. # Backwards the word {x} reads {y}."),
        _task("letters", "spell_word", {w: " ".join(w) for w in WORDS}, 3,
            "Spell the word: {x} | How do you spell {x}? | What are the letters of {x}? | Write {x} letter by "
            "letter. # The word {x} is spelled {y}."),
        _task("letters", "count_letters", {w: str(len(w)) for w in WORDS}, 3,
            "Count the letters: {x} | How many letters are in {x}? | How long is the word {x}? | Give the number "
            "of letters in {x}. # The number of letters in the word {x} is {y}."),
        _task("letters", "acronym", _from_words(3, " ", lambda words: _initials(words).upper()), 2,
            "Make an acronym of: {x} | What is the acronym for {x}? | Which initials does {x} have? | Abbreviate "
            "{x} to its first letters. # The acronym of {x} is {y}."),
        _task("lists", "sort_list", _from_words(3, ", ", lambda words: ", ".join(sorted(words)),
            lambda words: len(set(_initials(words))) == 3), 4,
            "Sort the words: {x} | Put in alphabetical order: {x} | Sort {x} from A to Z. | Arrange "
            "alphabetically: {x} # The words {x} in alphabetical order are {y}."),
        _task("lists", "reverse_list", _from_words(3, ", ", lambda words: ", ".join(words[::-1])), 1,
            "Reverse the list: {x} | Write the list from last to first: {x} | Flip the order of {x}. | What is "
            "the list {x} in reverse? # The list {x} from the last to the first is {y}."),
        _task("lists", "longest_word", _from_words(3, ", ", lambda words: max(words, key=len), _far_apart), 2,
            "Find the longest word: {x} | Which word is the longest: {x}? | Which of {x} has the most letters? | "
            "Pick the longest of {x}. # The longest word of {x} is {y}."),
        _task("lists", "odd_one_out", _odd_one_out, 3,
            "Find the odd one out: {x} | Which does not belong: {x}? | Which of {x} is not like the others? | "
            "Pick the word that does not fit: {x} # The odd one out of {x} is {y}."),
        _task("numbers", "add", {f"{a} and {b}": str(a + b) for a in range(1, 50) for b in range(1, 50)}, 5,
            "Add {x}. | What is the sum of {x}? | How much are {x} together? | Find the total of {x}. # The sum "
            "of {x} is {y}."),
        _task("numbers", "subtract", {f"{a} and {b}": str(a - b) for a in range(2, 61) for b in range(1, a)}, 6,
            "What is the difference of {x}? | How far apart are {x}? | Subtract the smaller from the larger: {x} "
            "| Find the difference between {x}. # The difference of {x} is {y}."),
        _task("numbers", "larger_number",
            {f"{a} and {b}": str(max(a, b)) for a, b in permutations(range(10, 100), 2)}, 3,
            "Which is larger: {x}? | Pick the larger of {x}. | Which number is bigger, {x}? | Find the maximum "
            "of {x}. # The larger of the two numbers {x} is {y}."),
        _task("numbers", "next_number", {str(n): str(n + 1) for n in range(999)}, 1,
            "Which number comes after {x}? | What is the next number after {x}? | Count on from {x}. | Give the "
            "number that follows {x}. # After the number {x} comes {y}."),
        _task("numbers", "parity", {str(n): ("even", "odd")[n % 2] for n in range(1000)}, 1,
            "Is {x} odd or even? | Is the number {x} even or odd? | Odd or even: {x} | What is the parity of "
            "{x}? # The number {x} is {y}."),
        _task("numerals", "number_to_words", {str(n): number_words(n) for n in range(1000)}, 1,
            "Write {x} in words. | Spell out the number {x}. | How is {x} written in words? | Convert the digits "
            "to words: {x} # In words the number {x} is {y}."),
        _task("numerals", "words_to_number", {number_words(n): str(n) for n in range(1000)}, 1,
            "Write {x} in digits. | Which number is {x}? | Convert the words to digits: {x} | Give the digits of "
            "{x}. # In digits {x} is {y}."),
        _task("numerals", "roman", {str(n): roman(n) for n in range(1, 300)}, 2,
            "Write {x} as a Roman numeral. | Convert to Roman numerals: {x} | What is {x} in Roman numerals? | "
            "How did the Romans write {x}? # The Roman numeral of {x} is {y}."),
        _dictionary("German", 1), _dictionary("Spanish", 2), _dictionary("Italian", 3),
        _task("grammar", "plural", PLURAL, 2,
            "What is the plural of {x}? | Give the plural: {x} | Make {x} plural. | How do you call more than "
            "one {x}? # The plural of {x} is {y}."),
        _task("grammar", "past_tense", dict(_rows(PAST)), 2,
            "What is the past tense of {x}? | Give the past: {x} | Put the verb {x} into the past. | Change {x} "
            "to the past tense. # The past tense of {x} is {y}."),
        _task("grammar", "opposite", OPPOSITE, 2,
            "What is the opposite of {x}? | Give the opposite: {x} | Name the antonym of {x}. | Find a word that "
            "means the reverse of {x}. # The opposite of {x} is {y}."),
        _task("world", "capital", dict(_rows(CAPITALS)), 2,
            "What is the capital of {x}? | Give the capital: {x} | Name the capital city of {x}. | From which "
            "city is {x} governed? # The capital of {x} is {y}."),
        _task("world", "color", COLOR, 2,
            "What color is {x}? | Which color does {x} have? | Give the color: {x} | Name the color of {x}. # "
            "The color of {x} is {y}."),
        _task("world", "category", CATEGORY, 1,
            "What kind of thing is {x}? | Which category does {x} belong to? | Name the category of {x}. | "
            "Classify the word {x}. # A kind of {y} is {x}."),
        _task("logic", "true_or_false", _true_or_false, 4,
            "Is it true that {x}? | Answer yes or no: {x} | Does this hold: {x}? | Check the statement: {x} # On "
            "whether {x} the answer is {y}."),
        _task("logic", "tallest", _tallest, 4,
            "If {x}, who is the tallest? | Who is the tallest? {x}. | Name the tallest person: {x} | {x}. Who "
            "stands above the others? # Given that {x}, the tallest is {y}."),
    ]


# fmt: on
TASKS: dict[str, TinyTask] = {task.name: task for task in _all_tasks()}


# Examples, corpus, files --------------------------------------------------------------------------------------------


def held_out(name, x):
    """Whether input `x` belongs to the test split of task `name`: one in five, the same on every
    machine, any seed."""
    return int(hashlib.sha256(f"{name}/{x}".encode()).hexdigest()[:8], 16) % 5 == 0


def examples(name, split, n, seed=0) -> list[dict]:
    """Up to `n` rows {'prompt', 'response'} of task `name`, distinct by prompt, those of 'test'
    distinct by input too.

    A finite task may have fewer: then all its held-out inputs ('test') or all its prompts ('train')
    are there. Raises InputError for an unknown task or split.
    """
    if name not in TASKS or split not in ("train", "test"):
        raise InputError(
            f"no task {name!r} with split {split!r}; splits are train and test, tasks: {', '.join(TASKS)}"
        )
    task = TASKS[name]
    rng = random.Random(f"{seed}/{name}/{split}")
    if task.answers is None:
        drawn = (task.make(rng) for _ in range(200 * n))
        pairs = ((x, y, rng.choice(task.phrasings)) for x, y in drawn)
    else:
        pairs = [(x, y, phrasing) for x, y in task.answers.items() for phrasing in task.phrasings]
        rng.shuffle(pairs)
    rows = []
    seen = set()
    for x, y, phrasing in pairs:
        if len(rows) == n:
            break
        prompt = phrasing.replace("{x}", x)
        key = x if split == "test" else prompt
        if held_out(name, x) == (split == "test") and key not in seen:
            seen.add(key)
            rows.append({"prompt": prompt, "response": y + "\n"})
    return rows


def corpus(n, seed=0) -> Iterator[str]:
    """`n` documents of pretraining text, none of them an instruction.

    Lines of 4 to 8 pairs of one function; sentences that state pairs; the words of the
    instructions, shuffled, beside an input, which gives them tokens and company but no meaning; and
    questions between tags, in most of them a function shown by example: one question and its
    answer, or one to three rounds of several, numbered, and their answers.
    """
    rng = random.Random(f"{seed}/corpus")
    tasks = list(TASKS.values())
    shares = [task.share for task in tasks]
    for _ in range(n):
        kind = rng.random()
        style = rng.choice([(" -> ", " ; "), (" = ", " ; "), (" : ", " | ")])
        if kind < 0.45:
            (task,) = rng.choices(tasks, shares)
            yield _line(_pairs(rng, task, rng.randint(4, 8)), style)
        elif kind < 0.65:
            told = ((task, *task.make(rng)) for task in rng.choices(tasks, shares, k=rng.randint(2, 5)))
            yield " ".join(task.sentence.replace("{x}", x).replace("{y}", y) for task, x, y in told)
        elif kind < 0.7:
            yield " ".join(_shuffled_words(rng, task) for task in rng.choices(tasks, k=3))
        else:
            tag = rng.choice(WORDS)
            bare = rng.random() < 0.5  # bare: no arrow after the input in question
            tag = tag.upper() if rng.random() < 0.5 else tag
            count, rounds = (1, 1) if kind < 0.83 else (rng.randint(2, 10), rng.randint(1, 3))
            asked = [rng.choices(tasks, shares, k=count) for _ in range(rounds)]
            yield "\n".join(_round(rng, some, tag, style, bare) for some in asked)


def _pairs(rng, task, count):
    """`count` pairs of one function, no input twice."""
    pairs = {}
    while len(pairs) < count:
        pairs.update([task.make(rng)])
    return list(pairs.items())


def _line(pairs, style):
    arrow, separator = style
    return separator.join(x + arrow + y for x, y in pairs)


def _words(task):
    return sorted({word for phrasing in task.phrasings for word in re.findall(r"\w+", phrasing)} - {"x"})


_INSTRUCTING = sorted({word for task in TASKS.values() for word in _words(task)})


def _shuffled_words(rng, task):
    words = _words(task)
    return " ".join(rng.sample([*words, task.make(rng)[0]], len(words) + 1))


def _question(rng, task, shots, style, bare):
    """(text, answer): an input behind up to `shots` examples of its function or, three times in
    ten, among words of instructions: then the answer is any of these words, so that it pays to read
    them."""
    *shown, (x, y) = _pairs(rng, task, rng.randint(2, shots + 1))
    if rng.random() >= 0.3:
        return f"{_line(shown, style)}{style[1]}{x}{'' if bare else style[0].rstrip()}", y
    words = rng.sample(_INSTRUCTING, rng.randint(3, 8))
    y = " ".join(rng.sample(words, rng.randint(1, 3)))
    words.insert(rng.randint(0, len(words)), x)
    return " ".join(words), y


def _round(rng, tasks, tag, style, bare):
    """Questions, then answers; a space before a sole answer: one that is tokenized by itself begins
    with it too."""
    asked = [_question(rng, task, 3 if len(tasks) == 1 else 2, style, bare) for task in tasks]
    questions = [f"[{tag}] {text} [/{tag}]" for text, _ in asked]
    answers = [y for _, y in asked]
    if len(tasks) == 1:
        return f"{questions[0]}\n {answers[0]}"
    return "\n".join([*_numbered(questions), "Answers:", *_numbered(answers)])


def _numbered(lines):
    return [f"{j}. {line}" for j, line in enumerate(lines, 1)]


def write(out, train=1000, test=100, documents=150000, seed=0):
    """Writes OUT/NAME/{train.jsonl, test.jsonl, task.json} for every task and OUT/corpus.txt; same
    seed, same bytes."""
    for field, count in (("train", train), ("test", test), ("documents", documents)):
        if count < 0:
            raise InputError(f"{field}: expected 0 or more, found {count}")
    for name, task in TASKS.items():
        for split, n in (("train", train), ("test", test)):
            write_jsonl(Path(out) / name / f"{split}.jsonl", examples(name, split, n, seed))
        write_json(
            Path(out) / name / "task.json", {"name": name, "family": task.family, "metric": "exact_match"}
        )
    write_text(Path(out) / "corpus.txt", "\n\n".join(corpus(documents, seed)) + "\n")


def main():
    """The command: writes the task folders and the corpus."""
    config = parse_args(TinyTasksConfig, description=__doc__)
    write(config.out, config.train, config.test, config.documents, config.seed)


if __name__ == "__main__":
    run_script(main)
