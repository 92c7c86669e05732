"""Composite prompts: what they are drawn from, whose each token is, what counts as right, and the
oracle's ceiling."""

import re
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sacrebleu import corpus_bleu
from torch import nn

from common.files import InputError
from common.template import TEMPLATE
from evaluation import composites as answered
from evaluation.composites import answer_composites, choose_temperature, encode_spans, score_composites
from generate import answer, load
from helpers_models import tokenizer_bytes, write_adapters, write_llama
from model import load_llama
from moe_lora import MeteoraGate
from pool.adapters import linear_shapes, load_adapter
from pool.folder import PoolFolder, write_pool
from pool.gate_files import save_gates
from pool.slots import Pool
from tasks.composites import ANSWERS, Composite, compose, composites
from tasks.folders import Example, PackedExample, Task, encode

NAMES = ("ant", "bee", "cat", "dog", "eel")
ROOM = 409  # tokens of context: the small tokenizer spells brackets and digits in bytes


def row(name, split, j):
    return {"prompt": f"{name} {split} {j}", "response": f"said {name} {split} {j}"}


def make_tasks(names=NAMES, metric="exact_match"):
    """Tasks whose every text says where it comes from; 7 training examples and 5 test ones each."""
    return {
        n: Task(n, metric, *([row(n, s, j) for j in range(c)] for s, c in (("train", 7), ("test", 5))))
        for n in names
    }


def options(**more):
    some = {"batch_size": 3, "max_new_tokens": 7, "top_k": 2, "seed": 0}
    return SimpleNamespace(**some | {"meteora_metrics": False, "retrieve": 3} | more)


# What they are made of ----------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 5),
    st.integers(1, 4),
    st.integers(0, 99),
    st.sampled_from(["test", "train"]),
    st.integers(0, 3),
)
def test_shots_are_solved_training_examples_and_questions_are_of_the_split(n, count, seed, split, shots):
    """A shot from the test split gives an answer away, two questions of one task make n easier, and
    a question without its own template is one that no adapter was trained on."""
    tasks = make_tasks()
    drawn = composites(tasks, n, count, "<{prompt}>\n\n", seed, split, shots)
    assert len(drawn) == count
    for c in drawn:
        spans = iter(c.spans)
        for shot in range(shots + 1):
            asked = [next(spans) for _ in range(n)]
            names = [name for _, name in asked]
            assert len(set(names)) == n
            rows = [dict(zip(("name", "split", "j"), text[4:-2].split(), strict=True)) for text, _ in asked]
            said = list(enumerate(rows, 1))
            assert [text for text, _ in asked] == [
                f"{i}. <{r['name']} {r['split']} {r['j']}>\n" for i, r in said
            ]
            assert [r["name"] for r in rows] == names
            assert next(spans) == (ANSWERS, None)  # the list's beginning is no task's
            assert {r["split"] for r in rows} == ({"train"} if shot < shots else {split})
            if shot < shots:
                solved = [next(spans) for _ in range(n)]
                assert [text for text, _ in solved] == [
                    f"{i}. said {r['name']} {r['split']} {r['j']}\n" for i, r in said
                ]
                assert [name for _, name in solved] == names
        assert next(spans, None) is None
        assert c.questions == [(r["name"], row(r["name"], r["split"], r["j"])) for r in rows]
        assert c.prompt == "".join(text for text, _ in c.spans)


def test_the_seed_decides_and_everything_is_drawn():
    """Other prompts at each run can't be compared; prompts that depend on the folder's order, or
    never ask some of the questions, or ask all shots of the same tasks, measure something else than
    they say."""
    tasks = make_tasks()
    drawn = composites(tasks, 3, 97, TEMPLATE, 5)
    assert drawn == composites(tasks, 3, 97, TEMPLATE, 5)
    assert drawn == composites(dict(reversed(tasks.items())), 3, 97, TEMPLATE, 5)
    assert drawn[:11] == composites(tasks, 3, 11, TEMPLATE, 5)  # more prompts are more of the same
    assert drawn != composites(tasks, 3, 97, TEMPLATE, 6)
    asked = {row["prompt"] for c in drawn for _, row in c.questions}
    assert asked == {row["prompt"] for task in tasks.values() for row in task.test}
    orders = [[name for _, name in c.spans[j : j + 3]] for c in drawn for j in (0, 7, 14)]
    assert len({tuple(order) for order in orders}) == 60  # of 5 * 4 * 3
    assert sum(orders[j] == orders[j + 1] for j in range(0, len(orders), 3)) < 15
    trial = composites(tasks, 3, 97, TEMPLATE, 5, split="train")
    assert [[n for n, _ in c.questions] for c in trial] != [[n for n, _ in c.questions] for c in drawn]


def test_more_questions_than_tasks_are_refused():
    """Without it composite-10 of 5 tasks is a traceback from random, or asks a task twice."""
    with pytest.raises(InputError, match="composite-6 needs 6 tasks, there are 5: ant, bee, cat, dog, eel"):
        composites(make_tasks(), 6, 1, TEMPLATE)


# Answering ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mole(tmp_path_factory):
    """A random small Llama with room for composites, an adapter for each task and random top-2
    gates."""
    folder = tmp_path_factory.mktemp("composites")
    write_llama(folder / "small", max_position_embeddings=ROOM)
    (folder / "small" / "tokenizer.model").write_bytes(tokenizer_bytes())
    base = load_llama(folder / "small")
    paths = write_adapters(folder / "pool" / "adapters", base, NAMES, size=0.1)
    write_pool(PoolFolder(folder / "pool", paths, base.fingerprint(), TEMPLATE))
    pool = Pool.of([load_adapter(path, name) for name, path in paths.items()], linear_shapes(base))
    generator = torch.Generator().manual_seed(1)
    gates = {p: MeteoraGate(torch.randn(5, A.shape[2], generator=generator), 2) for p, A in pool.A.items()}
    save_gates(
        folder / "pool" / "gates" / "meteora_top2.safetensors", gates, pool, 2, pool.names, base.fingerprint()
    )
    mole = load(folder / "small", folder / "pool")
    mole.paths = folder / "small", paths
    return mole


def owners(mole, composite):
    """The task of each token, by another way than encode_spans: every span begins with an ASCII
    sign and ends in a line break, here both tokens of their own, so that it is tokenized alike
    alone, but for sentencepiece's space before."""
    pieces = mole.tokenizer.backend.pieces
    counts = [len(pieces.encode(text)) - 1 for text, _ in composite.spans]
    counts[0] += 2  # BOS, and the space that only a text's beginning has
    return [name for (_, name), count in zip(composite.spans, counts, strict=True) for _ in range(count)]


# No "<": special tokens written out are cut out before sentencepiece sees the text, which `owners`
# doesn't know.
TEXTS = st.text(
    st.characters(exclude_categories=("C",), exclude_characters="<") | st.sampled_from("日é🎉ß ▁�\n"),
    max_size=12,
)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("[19("), TEXTS, st.sampled_from(NAMES)), min_size=1, max_size=5))
def test_every_token_belongs_to_the_span_that_it_ends_in(mole, parts):
    """One token off, the ceiling is no ceiling: each answer's first tokens run through its
    neighbour's adapter. Bytes of one character come as several tokens, without a text until the
    last."""
    composite = Composite([(f"{first}{text}\n", name) for first, text, name in parts], [])
    ids, names = encode_spans(mole, composite)
    assert ids == mole.tokenizer.encode(composite.prompt)
    assert names == owners(mole, composite)


def test_a_special_token_written_out_shifts_no_span(mole):
    """Templates hold them; a token without a text must not move all that follow into an earlier
    span."""
    alone = encode_spans(mole, Composite([("[a</s>\n", "ant")], []))[1]
    ids, names = encode_spans(mole, Composite([("[a</s>\n", "ant"), ("[b\n", "bee")], []))
    assert names == alone + ["bee"] * 3 and len(ids) == len(names) and ids.count(2) == 1


def test_drawn_prompts_too(mole):
    """The real thing, with adjacent spans of one task and of different ones."""
    tasks = make_tasks()
    for task in tasks.values():
        task.train[0] = {"prompt": "Straße 日本 🎉", "response": "é🎉"}
    for composite in composites(tasks, 2, 11, TEMPLATE):
        ids, names = encode_spans(mole, composite)
        assert len(ids) == len(names) > 100 and names == owners(mole, composite)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 23), st.sampled_from([0.0, 0.3, 1.0]), st.sampled_from([60, 300, 2000]), st.integers(0, 9)
)
def test_a_step_in_composites_has_the_same_questions_and_answers(mole, count, share, room, step):
    """Without it composites in training lose, repeat or mix up examples, have another form than
    those of the test, or don't fit."""
    tasks = make_tasks()
    rows = [(name, tasks[name].train[j % 7]) for j, name in zip(range(count), NAMES * 5, strict=False)]
    examples = [encode(mole.tokenizer, TEMPLATE, row, name) for name, row in rows]
    o = SimpleNamespace(composite=share, max_length=room, seed=3)
    composed = compose(examples, mole.tokenizer, TEMPLATE, step, o)
    assert composed == compose(examples, mole.tokenizer, TEMPLATE, step, o)
    alone = [example for example in composed if isinstance(example, Example)]
    contexts = [example for example in composed if isinstance(example, PackedExample)]
    assert all(example in examples for example in alone) and len(alone) >= count - round(share * count)
    assert share > 0 or composed == examples
    found = [(example.task, example.row) for example in alone]
    for context in contexts:
        assert len(context.ids) <= room and context.ids[-1] == mole.tokenizer.eos_id
        text = "".join(mole.tokenizer.decode(context.ids[:-1]))
        *rounds, rest = re.split(r"(?<=\n)(?=1\. \[INST\])", text)
        asked = []
        for one in [*rounds, rest]:
            asks, _, replies = one.partition(ANSWERS)
            numbers = [re.findall(r"^(\d+)\. ", part, re.MULTILINE) for part in (asks, replies)]
            assert numbers[0] == numbers[1] == [str(j + 1) for j in range(len(numbers[0]))]
            asked += re.findall(r"^\d+\. said (\w+) train (\d)$", replies, re.MULTILINE)
            assert re.findall(r"(\w+) train (\d) \[/INST\]$", asks, re.MULTILINE) == asked[-len(numbers[0]) :]
        found += [(name, tasks[name].train[int(j)]) for name, j in asked]
        answers = [part for part in context.parts if part.n_prompt == 0]
        assert [part.task for part in answers] == [name for name, _ in asked]
        assert all(part.n_prompt in (0, len(part.ids)) for part in context.parts)
    key = lambda pair: (pair[0], pair[1]["prompt"])  # noqa: E731
    assert sorted(found, key=key) == sorted(rows, key=key)


def test_composites_in_training_are_of_every_shape(mole):
    """Of one round, or of two questions, or the same in every step, they would teach less than the
    test asks."""
    tasks = make_tasks()
    examples = [encode(mole.tokenizer, TEMPLATE, row, name) for name in NAMES for row in tasks[name].train]

    def shapes(step, seed):
        o = SimpleNamespace(composite=1.0, max_length=10_000, seed=seed)
        texts = [mole.tokenizer.decode(x.ids) for x in compose(examples, mole.tokenizer, TEMPLATE, step, o)]
        return texts, {text.count(ANSWERS) for text in texts}, {text.count("[INST]") for text in texts}

    found = [shapes(step, 3) for step in range(17)]
    assert set().union(*(rounds for _, rounds, _ in found)) >= {1, 2, 3}  # 0: what is left stays by itself
    assert len(set().union(*(sizes for *_, sizes in found))) > 11
    assert len({str(texts) for texts, *_ in found}) == 17 and shapes(0, 4) != found[0]


def test_an_answer_of_several_lines_stays_by_itself(mole):
    """In a numbered list its second line could be the next answer."""
    rows = [{"prompt": f"ant {j}", "response": "one\n2. two\n" if j % 2 else "one\n"} for j in range(11)]
    examples = [encode(mole.tokenizer, TEMPLATE, row, "ant") for row in rows]
    o = SimpleNamespace(composite=0.9, max_length=10_000, seed=0)
    alone = [x for x in compose(examples, mole.tokenizer, TEMPLATE, 0, o) if isinstance(x, Example)]
    assert sorted(x.row["prompt"] for x in alone) == sorted(
        row["prompt"] for row in rows if "two" in row["response"]
    )


def test_a_prompt_over_the_context_is_refused_with_both_numbers(mole):
    """Cut off in silence it would lose its shots, or end in an index error of the cache."""
    n = len(mole.tokenizer.encode("[fox]\n" * 97))
    assert n > ROOM
    for method in ("oracle", "uniform"):
        with pytest.raises(InputError, match=f"of 3 questions has {n} tokens, the context {ROOM}"):
            answer_composites(
                mole, [Composite([("[fox]\n" * 97, "ant")], [("ant", {})] * 3)], method, 1.0, options()
            )


@pytest.mark.parametrize("method", ["base", "adapter:cat", "uniform", "meteora", "average_ab"])
def test_an_answer_is_what_generate_says_to_the_prompt(mole, method):
    """The same method must mean the same in eval.py: no second template around the prompt, as many
    tokens as n answers may have, each prompt's own answer in its place whatever its length, the
    gates at the temperature asked for."""
    asked = composites(make_tasks(), 2, 3, TEMPLATE, seed=3)
    assert len({len(mole.tokenizer.encode(c.prompt)) for c in asked}) > 1
    said = {t: answer_composites(mole, asked, method, t, options()) for t in (1.0, 0.03)}
    for t, texts in said.items():
        want = [
            answer(mole, c.prompt, raw=True, method=method, max_new_tokens=14, gate_temperature=t)[0]
            for c in asked
        ]
        assert texts == want
    assert (said[1.0] != said[0.03]) == (method == "meteora")


class EachToken(nn.Module):
    """W x + s B A x, by the adapter that `names` gives to each position, or W x: no gates, no
    kernels, no cache."""

    def __init__(self, base, parts):
        super().__init__()
        self.base, self.parts, self.names = base, parts, []

    def forward(self, x):
        y = self.base(x)
        for name in {*self.names} - {None}:
            A, B, scale = self.parts[name]
            at = [t for t, owner in enumerate(self.names) if owner == name]
            y[at] += scale * (x[at] @ A.T @ B.T)
        return y


def line_breaks(mole):
    """A rule that turns some of the tokens that the model likes best into line breaks, so that it
    writes lines."""
    (newline,) = mole.tokenizer.encode("\n", start=False)[1:]

    def choose(logits, *_):
        best = logits.argmax(-1)
        return torch.where(best % 2 == 1, newline, best)

    return newline, choose


@torch.no_grad()
def by_hand(mole, composite, budget):
    """Token by token, the whole text anew each time: prompt tokens by their owners, a generated
    token by the question whose line it stands in or, a line break, ends up in."""
    folder, paths = mole.paths
    model, (newline, choose) = load_llama(folder), line_breaks(mole)
    adapters = {name: load_adapter(path, name) for name, path in paths.items()}
    linears = []
    for path in linear_shapes(model):
        parent, _, last = path.rpartition(".")
        parts = {name: (a.A[path], a.B[path], a.scale[path]) for name, a in adapters.items()}
        linears.append(EachToken(model.get_submodule(path), parts))
        setattr(model.get_submodule(parent), last, linears[-1])
    ids, names, said = mole.tokenizer.encode(composite.prompt), owners(mole, composite), []
    order = [name for name, _ in composite.questions]
    while len(said) < budget:
        for linear in linears:
            linear.names = names
        chosen = int(choose(model(torch.tensor([ids + said]))[:, -1]))
        if chosen in mole.eos_ids:
            break
        said.append(chosen)
        lines = sum(
            at > 0 and index == newline != said[at - 1] for at, index in enumerate(said)
        )  # those with text
        names = [*names, order[min(lines, len(order) - 1)]]
    return said


def test_the_ceiling_runs_each_span_and_each_line_through_its_own_adapter(mole, monkeypatch):
    """A ceiling that runs anything through another adapter is beaten by routing, or makes routing
    look good. Compared with a loop that has neither gates nor a cache; and a line's end really is
    where the adapter changes."""
    newline, choose = line_breaks(mole)
    monkeypatch.setattr("decoding.loop.sample", choose)
    asked = composites(make_tasks(), 3, 3, TEMPLATE, seed=2, shots=1)
    texts = answer_composites(mole, asked, "oracle", 1.0, options(max_new_tokens=5))
    said = [by_hand(mole, composite, 15) for composite in asked]
    assert texts == [mole.tokenizer.decode(ids) for ids in said]
    # All three adapters had their turn, the last beyond its line.
    assert max(ids.count(newline) for ids in said) >= 3
    # The prompt as it was, other adapters answer.
    swapped = [Composite(c.spans, c.questions[::-1]) for c in asked]
    assert answer_composites(mole, swapped, "oracle", 1.0, options(max_new_tokens=5)) != texts
    moved = [Composite([(text, "eel") for text, _ in c.spans], c.questions) for c in asked]  # and the reverse
    assert answer_composites(mole, moved, "oracle", 1.0, options(max_new_tokens=5)) != texts


@pytest.mark.parametrize("method", ["oracle", "meteora"])
def test_rows_of_a_batch_are_each_alone(mole, monkeypatch, method):
    """A row whose line ended, or which is shorter, must not move its neighbours to their next
    adapter."""
    monkeypatch.setattr("decoding.loop.sample", line_breaks(mole)[1])
    asked = composites(make_tasks(), 2, 5, TEMPLATE, seed=7, shots=1)
    texts = answer_composites(mole, asked, method, 1.0, options(batch_size=5))
    assert texts == [answer_composites(mole, [c], method, 1.0, options())[0] for c in asked]
    assert len(set(texts)) > 1 and len({text.count("\n") for text in texts}) > 1


# Scoring ------------------------------------------------------------------------------------------


def scored(metrics, prompts, **more):
    """score_composites of prompts [[(task, response), ...], text]; `metrics` {task: metric}."""
    tasks = {name: Task(name, metric, [], []) for name, metric in metrics.items()}
    asked = [
        Composite([], [(name, {"prompt": "?", "response": said}) for name, said in rows])
        for rows, _ in prompts
    ]
    return score_composites(asked, [text for _, text in prompts], tasks, options(**more))


METRICS = {"ant": "exact_match", "bee": "yes_no", "cat": "bleu", "dog": "gsm8k", "eel": "rouge_l"}
SENTENCE = "the quick brown fox jumps over the lazy dog"
PROMPTS = [
    ([("ant", "blue"), ("cat", SENTENCE), ("bee", "yes")], f"well\n1. blue\n2. {SENTENCE} now\n3. no"),
    ([("dog", "so it is #### 42"), ("ant", "red"), ("eel", SENTENCE)], f"1) 42\n2)\n3) {SENTENCE}"),
    ([("bee", "no"), ("cat", SENTENCE), ("dog", "7")], "3. it is 7.\nsays the fox"),
    ([("ant", "blue"), ("bee", "yes"), ("dog", "1")], ""),
]


def test_scores_by_hand():
    """The headline figures of the paper: attempted counts answers that are not empty, right only
    those of metrics that know right and wrong, both a prompt; a missing answer is a wrong answer of
    its task, not one question fewer."""
    got = scored(METRICS, PROMPTS)
    assert (got["n"], got["attempted"], got["right"]) == (4, (3 + 2 + 1 + 0) / 4, (1 + 1 + 1 + 0) / 4)
    assert 0 <= got["attempted_low"] < got["attempted"] < got["attempted_high"] <= 3
    assert 0 <= got["right_low"] < got["right"] < got["right_high"] == 1  # at most 1 in any of them
    bleu = corpus_bleu([f"{SENTENCE} now", ""], [[SENTENCE, SENTENCE]]).score
    assert got["tasks"] == {
        "ant": {"score": 33.33, "n": 3, "metric": "exact_match"},
        "bee": {"score": 0.0, "n": 3, "metric": "yes_no"},
        "cat": {"score": pytest.approx(bleu, abs=0.005), "n": 2, "metric": "bleu"},
        "dog": {"score": 66.67, "n": 3, "metric": "gsm8k"},
        "eel": {"score": 100.0, "n": 1, "metric": "rouge_l"},
    }
    assert 30 < bleu < 70  # half of it said, the rest empty
    assert list(got["tasks"]) == sorted(METRICS)


def test_the_interval_is_over_prompts():
    """An interval over single questions would be narrower than prompts, which are what is drawn,
    allow."""
    rows, right, wrong = [("ant", "x"), ("bee", "yes")], "1. x\n2. yes", "1. y\n2. no"
    alike = scored(METRICS, [(rows, right)] * 7)
    assert [alike[key] for key in ("right", "right_low", "right_high", "attempted", "attempted_low")] == [
        2.0
    ] * 5
    got = scored(METRICS, [(rows, right), (rows, wrong)] * 50)
    width = 2 * 1.96 * 1 / 10  # of a mean of 100 values of which half are 2 and half 0: standard deviation 1
    assert got["right"] == 1.0 and got["right_high"] - got["right_low"] == pytest.approx(width, rel=0.15)
    assert got["attempted_low"] == got["attempted_high"] == 2.0
    again = [scored(METRICS, [(rows, right), (rows, wrong)] * 50, seed=seed) for seed in range(7)]
    assert again[0] == got and len({found["right_low"] for found in again}) > 1


def test_meteora_metrics_change_the_tasks_scores_alone():
    """--meteora_metrics compares with the released code's tables; attempted and right stay what they say."""
    ours, theirs = scored(METRICS, PROMPTS), scored(METRICS, PROMPTS, meteora_metrics=True)
    assert {k: v for k, v in ours.items() if k != "tasks"} == {
        k: v for k, v in theirs.items() if k != "tasks"
    }
    assert theirs["tasks"]["ant"] == {
        "score": 100.0,
        "n": 1,
        "metric": "exact_match",
    }  # the empty ones are dropped
    assert theirs["tasks"]["dog"] == {
        "score": 50.0,
        "n": 2,
        "metric": "gsm8k",
    }  # "#### 42" isn't in "42", "7" is


# The picture --------------------------------------------------------------------------------------


@pytest.mark.parametrize("shots", [0, 1, 2])
def test_the_picture_has_the_questions_that_are_answered(mole, monkeypatch, shots):
    """Without it the solved examples take most of the picture and its colours, or a question is
    cut off."""
    drawn = []
    monkeypatch.setattr(answered, "svg_picture", lambda prompt, answer: drawn.extend((prompt, answer)))
    (composite,) = composites(make_tasks(), 2, 1, "<{prompt}>", shots=shots)
    answered.draw_composite(mole, composite, "meteora_top2", 1.0, options())
    prompt, answer = ("".join(text for text, _ in trace) for trace in drawn)
    rows = [row["prompt"] for _, row in composite.questions]
    assert prompt.strip() == f"1. <{rows[0]}>\n2. <{rows[1]}>\n{ANSWERS}".strip()
    assert answer == answer_composites(mole, [composite], "meteora_top2", 1.0, options())[0]


# The temperature ----------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(st.floats(0.1, 50), st.integers(0, 3)), min_size=1, max_size=5, unique_by=lambda p: p[0]
    )
)
def test_the_temperature_that_gets_most_right_the_first_of_equals(found):
    """Attempted instead of right, the last of equals or the largest of all would be chosen without
    a sign of it."""
    trial = [Composite([], [("ant", {"prompt": "?", "response": "x"})] * 3) for _ in range(2)]
    seen = []

    def say(mole, asked, method, temperature, o):
        seen.append(temperature)
        assert (mole, asked, method) == ("mole", trial, "meteora")
        right = dict(found)[temperature]
        return ["\n".join(f"{j}. {'x' if j <= right else 'wrong'}" for j in range(1, 4 if right else 2))] * 2

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(answered, "answer_composites", say)
        tasks = {"ant": Task("ant", "exact_match", [], [])}
        got = choose_temperature("mole", trial, "meteora", tasks, [t for t, _ in found], options())
    most = max(right for _, right in found)
    assert got == next(t for t, right in found if right == most)
    assert seen == [t for t, _ in found]
