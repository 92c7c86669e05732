"""Tasks: what a step sees is a function of its number alone, whole epochs, masks that end where
answers end."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.files import InputError, write_json, write_jsonl
from common.template import TEMPLATE, fill
from common.tokenizer import Tokenizer
from helpers_models import tokenizer_bytes
from tasks.folders import (
    Example,
    PackedExample,
    collate,
    draw,
    encode,
    encode_all,
    load_tasks,
    micro_batches,
)
from tasks.metrics import METRICS

lengths = st.lists(st.integers(1, 60), min_size=1, max_size=25)


def make_examples(sizes, n_prompt=1):
    """An Example of each size; its ids tell which one it is."""
    return [
        Example([1000 * j + t + 1 for t in range(size)], n_prompt, f"task {j % 3}")
        for j, size in enumerate(sizes)
    ]


def write_task(folder, rows=({"prompt": "p", "response": "r"},), **fields):
    write_json(folder / "task.json", {"metric": "exact_match"} | fields)
    for split in ("train", "test"):
        write_jsonl(folder / f"{split}.jsonl", rows)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "tokenizer.model").write_bytes(tokenizer_bytes())
    return Tokenizer(folder)


# Draws --------------------------------------------------------------------------------------------


@given(st.integers(1, 23), st.integers(1, 7), st.integers(0, 3))
def test_every_epoch_holds_every_example_once(size, count, seed):
    """Without it some examples are never learned from, wherever the batch size does not divide
    their number."""
    steps = 3 * size  # three epochs of steps of any size
    drawn = [x for step in range(steps) for x in draw(range(size), "a", step, count, seed)]
    assert len(drawn) == steps * count
    for start in range(0, len(drawn), size):
        epoch = drawn[start : start + size]
        assert len(set(epoch)) == len(epoch)
        assert len(epoch) < size or set(epoch) == set(range(size))


@given(st.integers(1, 23), st.integers(1, 7), st.lists(st.integers(0, 40), min_size=1, max_size=6))
def test_a_step_is_a_function_of_its_number(size, count, steps):
    """Without it a resumed run goes on with other data than the killed one had ahead of it."""
    forward = {step: draw(range(size), "a", step, count, 0) for step in sorted(steps)}
    assert {step: draw(range(size), "a", step, count, 0) for step in reversed(sorted(steps))} == forward


def test_seeds_names_and_epochs_shuffle_differently():
    """Without it every task and every epoch would come in the same order."""
    order = draw(range(30), "a", 0, 30, 0)
    others = [draw(range(30), "a", 0, 30, 1), draw(range(30), "b", 0, 30, 0), draw(range(30), "a", 1, 30, 0)]
    assert order != list(range(30))
    assert all(other != order for other in others)
    # Known once and for all: another Python must train the same model.
    assert draw(range(10), "a", 0, 10, 0) == [0, 2, 5, 8, 6, 9, 3, 7, 1, 4]


# Batches ------------------------------------------------------------------------------------------


@given(lengths, st.integers(1, 150), st.booleans())
def test_micro_batches_keep_every_example_within_the_limit(sizes, max_tokens, padded):
    """Without it an example is lost or doubled between parts, or a part is larger than the memory
    it was cut for."""
    examples = make_examples(sizes)
    parts = micro_batches(examples, max_tokens, padded)
    kept = [example.ids[0] for part in parts for example in part]
    assert sorted(kept) == sorted(example.ids[0] for example in examples)
    widths = [[len(example.ids) for example in part] for part in parts]
    for some in widths:
        assert len(some) == 1 or (len(some) * max(some) if padded else sum(some)) <= max_tokens
        assert not padded or max(some) <= max(1.5 * min(some), min(some) + 16)
    for some, after in zip(widths, widths[1:], strict=False):  # no part ends where the next example had room
        room = (len(some) + 1) * after[0] if padded else sum(some) + after[0]
        assert room > max_tokens or padded and after[0] > max(1.5 * min(some), min(some) + 16)


def test_micro_batches_fill_their_limit_and_repeat():
    """Without it one example a part would pass for batching; and a resumed step would be cut in
    another way."""
    examples = make_examples([7, 5, 7, 5, 6])
    assert [len(part) for part in micro_batches(examples, 100)] == [5]
    cut = {padded: micro_batches(examples, 17, padded) for padded in (False, True)}
    assert {padded: [[len(e.ids) for e in part] for part in parts] for padded, parts in cut.items()} == {
        False: [[5, 5, 6], [7, 7]],
        True: [[5, 5], [6, 7], [7]],
    }
    assert micro_batches(examples, 17) == cut[False]
    assert micro_batches([], 15) == []


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=6))
def test_predicts_marks_what_comes_before_each_response_token(sizes):
    """Without it the prompt is trained on, padding is, or EOS is not and answers never end."""
    rows = [
        Example([10 + t for t in range(p)] + [50 + t for t in range(r - 1)] + [2], p, "a") for p, r in sizes
    ]
    batch = collate(rows)
    t = max(p + r for p, r in sizes)
    assert batch.ids.shape == batch.real.shape == batch.predicts.shape == (len(sizes), t)
    for row, (p, r) in enumerate(sizes):
        ids = batch.ids[row].tolist()
        assert ids == rows[row].ids + [0] * (t - p - r)
        assert batch.real[row].tolist() == [j < p + r for j in range(t)]
        predicted = [
            ids[j + 1] for j in range(t) if batch.predicts[row, j]
        ]  # never the last: nothing follows it
        assert predicted == rows[row].ids[p:] and predicted[-1] == 2
    assert batch.tasks == ["a"] * len(sizes)


def test_an_empty_prompt_predicts_from_the_second_token_on():
    """Without it an example whose prompt has no token (no BOS, a template of {prompt} alone) trains
    nothing at all: nothing comes before its first token, but every later one can be predicted."""
    batch = collate([Example([7, 8, 2], 0, "a"), Example([5, 6, 7, 8, 2], 2, "a")])
    assert batch.predicts.tolist() == [[True, True, False, False, False], [False, True, True, True, False]]


PARTS = st.lists(
    st.tuples(st.integers(0, 4), st.integers(0, 4), st.sampled_from(["a", "b", ""])), min_size=1, max_size=5
)


@given(st.lists(PARTS.filter(lambda parts: sum(p + r for p, r, _ in parts) > 0), min_size=1, max_size=4))
def test_in_a_context_every_token_knows_its_part(rows):
    """Without it an answer that follows another task's text is predicted by nothing, or labelled
    with its neighbour."""
    counter = itertools.count(3)
    contexts = [
        PackedExample([Example([next(counter) for _ in range(p + r)], p, task) for p, r, task in parts])
        for parts in rows
    ]
    batch = collate(contexts)
    pool = SimpleNamespace(slot={"a": 5, "b": 7}.__getitem__)
    slots = batch.slots(pool)
    parts = iter(batch.parts)
    for row, context in enumerate(contexts):
        want = [(j < part.n_prompt, part.task) for part in context.parts for j in range(len(part.ids))]
        n = len(want)
        assert [next(parts) for _ in context.parts] == context.parts and context.ids == batch.ids[
            row, :n
        ].tolist()
        assert batch.real[row].tolist() == [t < n for t in range(batch.ids.shape[1])]
        assert batch.prompt[row, :n].tolist() == [is_prompt for is_prompt, _ in want]
        assert batch.predicts[row, :n].tolist() == [not is_prompt for is_prompt, _ in want[1:]] + [False]
        assert slots[row, :n].tolist() == [{"a": 5, "b": 7, "": -100}[task] for _, task in want]
        rest = (~batch.real[row], batch.prompt[row], batch.predicts[row], slots[row] >= 0)
        assert [bool(mark[n:].any()) for mark in rest] == [n < batch.ids.shape[1], False, False, False]


# Tokens -------------------------------------------------------------------------------------------


def test_prompt_and_response_are_tokenized_apart(tokenizer):
    """Without it training sees tokens that span the border, which generation, given the prompt
    alone, never meets."""
    row = {"prompt": "the quick", "response": " brown fox"}
    example = encode(tokenizer, "{prompt}", row, "words")
    prompt, response = tokenizer.encode("the quick"), tokenizer.encode(" brown fox", start=False)
    assert example.ids == [*prompt, *response, tokenizer.eos_id]
    assert example.n_prompt == len(prompt) and example.task == "words"
    assert example.ids.count(tokenizer.bos_id) == 1 and example.ids[0] == tokenizer.bos_id
    assert example.ids.count(tokenizer.eos_id) == 1
    split = encode(tokenizer, "{prompt}", {"prompt": "the quick bro", "response": "wn fox"})
    whole = tokenizer.encode("the quick brown fox")
    assert split.ids[:-1] != whole  # a border inside a word stays a border
    assert tokenizer.decode(split.ids[: split.n_prompt]) == "the quick bro"


def test_braces_in_a_prompt_are_text():
    """Without it a prompt with code or JSON in it is a KeyError, or has its {prompt} filled in."""
    assert fill(TEMPLATE, "{x} {0} {} }{") == "[INST] {x} {0} {} }{ [/INST]\n"
    assert fill("<{prompt}>", "say {prompt}") == "<say {prompt}>"


def test_long_examples_are_counted_and_left_out(tokenizer):
    """Without it one long example takes all the memory, or a task is silently cut to nothing."""
    rows = [{"prompt": "dog " * n, "response": "fox"} for n in (1, 40, 2)]
    sizes = [len(encode(tokenizer, TEMPLATE, row).ids) for row in rows]
    kept, dropped = encode_all(tokenizer, TEMPLATE, rows, "dogs", sizes[2])
    assert [len(example.ids) for example in kept] == [sizes[0], sizes[2]] and dropped == 1
    with pytest.raises(InputError, match="task dogs: no training example of at most 5 tokens"):
        encode_all(tokenizer, TEMPLATE, rows, "dogs", 5)


@settings(max_examples=50)
@given(st.text(max_size=30), st.text(max_size=30))
def test_any_text_becomes_an_example(tokenizer, prompt, response):
    """Without it a character that the tokenizer never saw loses tokens or shifts the border."""
    example = encode(tokenizer, TEMPLATE, {"prompt": prompt, "response": response})
    assert 0 < example.n_prompt < len(example.ids) and example.ids[-1] == tokenizer.eos_id
    assert example.ids[: example.n_prompt] == tokenizer.encode(fill(TEMPLATE, prompt))
    predicts = collate([example]).predicts[0]
    assert torch.equal(predicts.nonzero()[:, 0], torch.arange(example.n_prompt - 1, len(example.ids) - 1))


# Task folders -------------------------------------------------------------------------------------


def test_tasks_load_by_name_in_order(tmp_path):
    """Without it the order of a folder listing, which differs between machines, decides which data
    a task gets."""
    for name in ("zebra", "ant", "mole"):
        write_task(tmp_path / name, [{"prompt": name, "response": "r"}], metric="bleu")
    (tmp_path / "notes").mkdir()  # no task.json: no task
    tasks = load_tasks(tmp_path)
    assert list(tasks) == ["ant", "mole", "zebra"]
    for name, task in tasks.items():
        assert (task.name, task.metric) == (name, "bleu")
        assert task.train == task.test == [{"prompt": name, "response": "r"}]
    assert list(load_tasks(tmp_path, ["zebra"])) == ["zebra"]


def test_unknown_tasks_get_the_nearest_name(tmp_path):
    """Without it a typo is a KeyError, or an empty run."""
    write_task(tmp_path / "plural")
    with pytest.raises(InputError, match=r"no task 'plurals', did you mean plural\?"):
        load_tasks(tmp_path, ["plurals"])


def test_missing_folders_say_which(tmp_path):
    """Without it a wrong path is a traceback from deep inside."""
    with pytest.raises(InputError, match="nowhere: no such folder of tasks"):
        load_tasks(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"no task folders \(NAME/task\.json\)"):
        load_tasks(tmp_path)


def test_broken_task_folders_say_what_is_wrong(tmp_path):
    """Without it a task without a metric is trained for an hour before its first score fails."""
    for metric in ("exactmatch", None, 3, ["bleu"]):
        write_task(tmp_path / "plural", metric=metric)
        with pytest.raises(
            InputError, match="metric is .*expected one of exact_match, yes_no, gsm8k, bleu, rouge_l"
        ):
            load_tasks(tmp_path)
    write_task(tmp_path / "plural", [{"prompt": "p", "answer": "r"}])
    with pytest.raises(InputError, match=r"train\.jsonl:1: .*'response'"):
        load_tasks(tmp_path)
    write_task(tmp_path / "plural")
    (tmp_path / "plural" / "test.jsonl").unlink()
    with pytest.raises(InputError, match=r"test\.jsonl"):
        load_tasks(tmp_path)
    for metric in METRICS:
        write_task(tmp_path / "plural", metric=metric)
        assert load_tasks(tmp_path)["plural"].metric == metric


def test_empty_training_data_is_refused(tokenizer, tmp_path):
    """Without it an empty train.jsonl is a division by zero in the first step."""
    write_task(tmp_path / "plural", [])
    with pytest.raises(InputError, match="plural"):
        encode_all(tokenizer, TEMPLATE, load_tasks(tmp_path)["plural"].train, "plural", 100)


# A file of examples -------------------------------------------------------------------------------

LINES = [
    {"adapter": "plural", "prompt": "mouse", "response": "mice"},
    {"adapter": "add", "prompt": "2 3", "response": "5"},
    {"adapter": "plural", "prompt": "ox", "response": "oxen", "source": "here"},
]


def test_a_file_of_examples_is_its_folders(tmp_path):
    """Who has a dozen examples in one file would have to write a folder an adapter, and get the
    same tasks from it."""
    file = tmp_path / "examples.jsonl"
    write_jsonl(file, LINES)
    for name in ("plural", "add"):
        rows = [{key: row[key] for key in row if key != "adapter"} for row in LINES if row["adapter"] == name]
        write_task(tmp_path / "folders" / name, rows)
    assert load_tasks(file) == load_tasks(tmp_path / "folders")
    assert list(load_tasks(file)) == ["add", "plural"]
    assert load_tasks(file, ["plural"], ["add", "plural"]) == load_tasks(tmp_path / "folders", ["plural"])


@pytest.mark.parametrize(
    ("line", "only", "adapters", "expected"),
    [
        ({"prompt": "p", "response": "r"}, None, (), r"examples\.jsonl:4: .*'adapter'"),
        ({"adapter": "add", "prompt": "p"}, None, (), r"examples\.jsonl:4: .*'response'"),
        (
            {"adapter": "plurals"},
            None,
            ["add", "plural"],
            r"'plurals' \(in 1 lines\) is not in the pool, did you mean plural\?",
        ),
        ({"adapter": "x"}, None, ["add", "plural"], "is not in the pool, it has add, plural"),
        ({"adapter": "../x"}, None, (), r"adapter is '\.\./x', expected one that can name a folder"),
        ({"adapter": "add"}, ["plurl"], (), r"no line for 1 of 1 adapters: plurl, did you mean plural\?"),
        ({"adapter": "add"}, ["add", "x", "y"], (), r"examples\.jsonl: no line for 2 of 3 adapters: x, y$"),
    ],
)
def test_broken_lines_say_what_is_wrong(line, only, adapters, expected, tmp_path):
    """A typo would silently leave an adapter without its examples, or write one outside its pool."""
    if "adapter" in line and "prompt" not in line:
        line = line | {"prompt": "p", "response": "r"}
    write_jsonl(tmp_path / "examples.jsonl", [*LINES, line])
    with pytest.raises(InputError, match=expected):
        load_tasks(tmp_path / "examples.jsonl", only, adapters)


def test_a_file_without_lines(tmp_path):
    """An empty file would train nothing and say nothing."""
    (tmp_path / "examples.jsonl").write_text("\n")
    with pytest.raises(InputError, match=r"examples\.jsonl: no example in it"):
        load_tasks(tmp_path / "examples.jsonl")
