"""Published benchmarks as task folders: what is written is read and scored, every line is on the side
that its prompt says, and a strange entry is named in one line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.files import InputError, read_jsonl
from helpers_commands import ROOT, command
from tasks import bio, sources
from tasks.folders import Task, load_tasks
from tasks.gsm8k import read_split
from tasks.metrics import METRICS, score
from tasks.sources import in_test, split, write_tasks

QUESTIONS = 23
STEPS = "She sells 48/2 = <<48/2=24>>24 clips in May.\nTogether <<48+24=72>>1,072.\n#### 1,072"


def write_bbh(folder):
    """A checkout of BIG-Bench Hard with one file."""
    file = folder / "bbh" / "parity.json"
    file.parent.mkdir(parents=True)
    examples = [{"input": f"Is {j} even?", "target": "no" if j % 2 else "yes"} for j in range(QUESTIONS)]
    file.write_text(json.dumps({"canary": "a canary", "examples": examples}))
    return file


def write_bio(folder, answer="ACGUA", eval_="Recovery rate", name="RNA folding", wrap=False, **other):
    """A checkout of Bio-benchmark with one more file."""
    file = folder / "Bio-Benchmark" / "RNA-benchmark" / f"{name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    entry = {"category": "c", "answer": answer, "eval": eval_} | other
    entries = [{"no": f"RNA_{j}", "question": f"Fold {j}."} | entry for j in range(QUESTIONS)]
    file.write_text(json.dumps({"RNA": entries} if wrap else entries))
    return file


def write_gsm8k(folder, train=5, test=3):
    """A checkout of grade-school-math."""
    data = folder / "grade_school_math" / "data"
    data.mkdir(parents=True)
    for name, count in (("train", train), ("test", test)):
        lines = [json.dumps({"question": f"{name} {j}?", "answer": STEPS}) for j in range(count)]
        (data / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return data


def wrote(script, *options, cwd):
    """The tasks that `python -m tasks.SCRIPT source --out out` wrote."""
    done = command(f"tasks/{script}.py", "source", "--out", "out", *options, cwd=cwd)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    return load_tasks(cwd / "out")


def refused(script, *options, cwd):
    """The one line with which it is refused; nothing was written."""
    before = sorted(cwd.rglob("*"))
    done = command(f"tasks/{script}.py", "source", "--out", "out", *options, cwd=cwd)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    (line,) = [line for line in done.stderr.splitlines() if not line.startswith("warning: ")]
    assert sorted(cwd.rglob("*")) == before
    return line


# The three commands -------------------------------------------------------------------------------


def test_bbh(tmp_path):
    """Without it the folders can't be read back, or questions are lost, doubled or in both splits."""
    write_bbh(tmp_path / "source")
    tasks = wrote("bbh", cwd=tmp_path)
    task = tasks["parity"]
    assert list(tasks) == ["parity"] and task.metric == "exact_match"
    prompts = [row["prompt"] for row in (*task.train, *task.test)]
    assert sorted(prompts) == sorted(f"Is {j} even?" for j in range(QUESTIONS))
    assert {"prompt": "Is 7 even?", "response": "no"} in task.train + task.test
    responses = [row["response"] for row in task.test]
    assert score(task.metric, responses, responses).score == 100


def test_gsm8k(tmp_path):
    """Without it a final number keeps its comma, which no other number of the task has, or the model
    learns to write a calculator's marks."""
    write_gsm8k(tmp_path / "source")
    task = wrote("gsm8k", cwd=tmp_path)["gsm8k"]
    assert (len(task.train), len(task.test), task.metric) == (5, 3, "gsm8k")
    assert task.test[1] == {"prompt": "test 1?", "response": "1072"}
    steps = wrote("gsm8k", "--steps", "--out", "steps", cwd=tmp_path) and load_tasks(tmp_path / "steps")
    worked = steps["gsm8k"].train[0]["response"]
    assert worked == "She sells 48/2 = 24 clips in May.\nTogether 1,072.\n#### 1,072"
    for answer in ("1072", "So it is $1,072.", worked):
        assert score("gsm8k", [answer] * 2, [worked, "1072"]).score == 100


@pytest.mark.parametrize("final", ["72", "-72", "7.25", ".5", "1,450", "10,000,000"])
def test_gsm8k_reads_every_form_of_a_number(final, tmp_path):
    """Without it a whole benchmark is refused for one line, or a part of a number is its answer."""
    file = tmp_path / "train.jsonl"
    file.write_text(json.dumps({"question": "q", "answer": f"so 3\n#### {final}\n"}))
    assert read_split(file, steps=False)[0]["response"] == final.replace(",", "")


@pytest.mark.parametrize(
    ("answer", "eval_", "response", "metric"),
    [
        ("B", "Accuracy", "B", "exact_match"),
        (0, "Accuracy", "0", "exact_match"),
        ("E", "Accuracy, POINTS", "E", "exact_match"),
        ({"病": "感冒", "证": "风寒"}, "Accuracy, Macro-F1", "病: 感冒\n证: 风寒", "exact_match"),
        ("HHHHEEC", "Prediction accuracy", "HHHHEEC", "recovery"),
        ("ACGUA", "recovery rate", "ACGUA", "recovery"),
        ("acguacgu\nacg ua", "recovery rate", "ACGUACGUACGUA", "recovery"),
        ("((..))", "Graph distance", "((..))", "recovery"),
        (["a first report", "a second"], "Rouge", "a first report", "rouge_l"),
        (
            {"free_form_answer": "a cold", "must_have": ["cold"]},
            "Word Composition, Semantic Similarities, Factuality",
            "a cold",
            "rouge_l",
        ),
    ],
)
def test_bio(answer, eval_, response, metric, tmp_path):
    """Without it an answer that isn't a text stops the command, or is a Python object's repr."""
    file = write_bio(tmp_path / "source", answer, eval_)
    task = bio.read_file(file, 0.3)
    assert (task.name, task.metric) == ("RNA folding", metric)
    assert {row["response"] for row in (*task.train, *task.test)} == {response}
    assert score(metric, [response], [response]).score == 100
    write_bio(tmp_path / "source", answer, eval_, wrap=True)  # as its protein and RNA sets are
    assert bio.read_file(file, 0.3) == task


def test_bio_writes_what_can_be_scored(tmp_path):
    """Without it one set that needs another program keeps all others away, or gets a score of 0."""
    write_bio(tmp_path / "source", wrap=True)
    write_bio(tmp_path / "source", None, "Hmmscan", name="Pfam_design")
    file = write_bio(tmp_path / "source", 1, name="binding")
    file.write_text(file.read_text().replace('"eval": "Recovery rate"', '"Accuracy": "binary"'))
    tasks = wrote("bio", "--test", "0.4", cwd=tmp_path)
    assert {name: task.metric for name, task in tasks.items()} == {
        "RNA folding": "recovery", "binding": "exact_match"}  # fmt: skip
    (tmp_path / "other" / "source").mkdir(parents=True)
    write_bio(tmp_path / "other" / "source", None, "Infernal cm")
    assert refused("bio", cwd=tmp_path / "other").endswith("no file in it that a metric here can score")


def test_every_eval_has_a_metric_that_exists():
    """Without it a folder is written that load_tasks refuses."""
    assert set(bio.METRIC_OF.values()) - {None} <= set(METRICS)
    assert all(name == name.lower() for name in bio.METRIC_OF)


# The split ----------------------------------------------------------------------------------------


@given(st.lists(st.text(max_size=3), min_size=1, max_size=30), st.floats(0.01, 0.99), st.randoms())
def test_a_prompts_side_depends_on_it_alone(prompts, share, rng):
    """Without it a question that is removed, added or doubled upstream moves others from the test
    split into the training split of the next run."""
    rows = [{"prompt": prompt, "response": str(j)} for j, prompt in enumerate(prompts)]
    shuffled = rng.sample(rows, len(rows))
    try:
        task = split(Path("a.json"), "bleu", rows, share)
    except InputError:
        return
    assert not {row["prompt"] for row in task.train} & {row["prompt"] for row in task.test}
    again = split(Path("a.json"), "bleu", [*shuffled, shuffled[0]], share)
    for row in rows:
        assert (row in again.test) == (row in task.test) == in_test(row["prompt"], share)


def test_a_share_is_a_share():
    """Without it --test 0.2 keeps another share, or a larger share drops questions of a smaller one."""
    prompts = [f"question {j}" for j in range(2000)]
    kept = {share: {p for p in prompts if in_test(p, share)} for share in (0.05, 0.2, 0.5, 0.95)}
    for share, found in kept.items():
        assert abs(len(found) / 2000 - share) < 0.04  # 3.6 standard deviations at 0.5
    assert kept[0.05] < kept[0.2] < kept[0.5] < kept[0.95]
    # On every machine: `printf "question 0" | sha256sum` begins with 61, that of 2 with bf.
    assert not in_test("question 0", 0x61 / 256) and in_test("question 2", 0xC0 / 256)


# Writing ------------------------------------------------------------------------------------------


def a_task(name="ant", response="r"):
    return Task(name, "bleu", [{"prompt": "p", "response": response}], [{"prompt": "q", "response": "s"}])


def test_a_kill_leaves_no_half_task(tmp_path, monkeypatch):
    """Without it a run that was killed leaves a task with one split of this run and one of another, or
    the next run is refused."""
    tasks = [a_task("ant"), a_task("bee")]
    for count in range(6):
        left = [count]

        def killed(path, value, write, left=left):
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
            write(path, value)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            for name in ("write_json", "write_jsonl"):
                write = getattr(sources, name)
                patch.setattr(sources, name, lambda p, v, write=write, killed=killed: killed(p, v, write))
            write_tasks(tmp_path / str(count), tasks)
        found = load_tasks(tmp_path / str(count)) if count >= 3 else {}
        assert found == {task.name: task for task in tasks[: count // 3]}
        write_tasks(tmp_path / str(count), tasks)
        assert load_tasks(tmp_path / str(count)) == {task.name: task for task in tasks}
        assert not list((tmp_path / str(count)).glob(".*"))


def test_a_task_that_is_there_stays(tmp_path):
    """Without it a second run with another --test replaces the questions that adapters were tested on,
    or a folder of that name that somebody wrote by hand."""
    write_tasks(tmp_path, [a_task()])
    before = (tmp_path / "ant" / "train.jsonl").stat().st_mtime_ns
    write_tasks(tmp_path, [a_task(), a_task("bee")])
    assert (tmp_path / "ant" / "train.jsonl").stat().st_mtime_ns == before
    for others in ([a_task("cat"), a_task("ant", "another")], [a_task("cat"), a_task("dog")]):
        (tmp_path / "dog").mkdir(exist_ok=True)
        with pytest.raises(InputError, match="(ant|dog): holds other examples: remove it"):
            write_tasks(tmp_path, others)
    assert not (tmp_path / "cat").exists()
    with pytest.raises(InputError, match="lists a name twice: 'eel'"):
        write_tasks(tmp_path, [a_task("eel"), a_task("eel")])


# What is refused ----------------------------------------------------------------------------------

ENTRIES = [
    ({"question": None}, "entry 0: question is None, expected a text"),
    ({"question": {"1": "a"}}, "entry 0: question is {'1': 'a'}, expected a text"),
    ({"question": " "}, "entry 0: question is ' ', expected a text that isn't empty"),
    ({"answer": None}, "entry 0: answer is None, expected a text or a whole number"),
    ({"answer": []}, "entry 0: answer is None, expected a text or a whole number"),
    ({"answer": True}, "entry 0: answer is True, expected a text or a whole number"),
    ({"answer": {}}, "entry 0: answer is '', expected a text that isn't empty"),
    ({"answer": {"a": 5}}, "entry 0: answer is {'a': 5}, expected an object of texts"),
    (
        {"eval": "Recovery rate", "answer": "ACGU-A"},
        "entry 0: answer is 'ACGU-A', expected letters alone, or .()",
    ),
    ({"eval": "F1"}, "entry 0: eval is 'F1', expected one of accuracy; "),
    ({"eval": None}, "entry 0: eval is None, expected one of accuracy; "),
    ({"eval": ["Accuracy"]}, "entry 0: eval is ['Accuracy'], expected one of accuracy; "),
]


@pytest.mark.parametrize(("change", "says"), ENTRIES)
def test_a_strange_entry_of_bio_is_named(change, says, tmp_path):
    """Without it a field that changed upstream is a traceback, or the text 'None' as an answer."""
    file = write_bio(tmp_path, **{"eval_" if k == "eval" else k: v for k, v in change.items()})
    with pytest.raises(InputError) as caught:
        bio.read_file(file, 0.2)
    assert str(caught.value).startswith(f"{file}: {says}")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[]", "no entry in it"),
        ("{}", "the whole is {}, expected a list of objects"),
        ('{"a": [], "b": []}', "the whole is {'a': [], 'b': []}, expected a list of objects"),
        ("[7]", "the whole is [7], expected a list of objects"),
        ("[", "bad JSON at line 1, column 2"),
        (
            '[{"eval": "Rouge"}, {"eval": "Accuracy"}]',
            "eval has metrics ['exact_match', 'rouge_l'], expected one",
        ),
    ],
)
def test_a_strange_file_of_bio_is_named(text, says, tmp_path):
    """Without it a list in a list, or a file of two metrics, is a task with the wrong one."""
    file = tmp_path / "a.json"
    file.write_text(text)
    with pytest.raises(InputError) as caught:
        bio.read_file(file, 0.2)
    assert str(caught.value).startswith(f"{file}: {says}")


def test_what_the_commands_refuse(tmp_path):
    """Without it bad input is a traceback, or a folder that fails much later."""
    (tmp_path / "source").mkdir()
    none = "error: source: no file {} in it, expected a checkout of the benchmark"
    assert refused("bbh", cwd=tmp_path) == none.format("bbh/*.json")
    assert refused("bio", cwd=tmp_path) == none.format("Bio-Benchmark/*/*.json")
    missing = "error: source/grade_school_math/data/train.jsonl: No such file or directory"
    assert refused("gsm8k", cwd=tmp_path) == missing
    file = write_bbh(tmp_path / "source")
    too_few = "2 questions, {} for training and {} for testing at --test {}, expected at least one of each"
    whole = json.loads(file.read_text())
    file.write_text(json.dumps({"examples": whole["examples"][:2]}))
    assert refused("bbh", "--test", "0.01", cwd=tmp_path).endswith(too_few.format(2, 0, 0.01))
    assert refused("bbh", "--test", "0.99", cwd=tmp_path).endswith(too_few.format(0, 2, 0.99))
    assert refused("bbh", "--test", "1", cwd=tmp_path).endswith(
        "--test is 1, expected a number from 0.01 to 0.99"
    )
    file.write_text(json.dumps({"examples": [*whole["examples"], {"input": "a"}]}))
    end = f"parity.json: examples[{QUESTIONS}]: target is None, expected a text"
    assert refused("bbh", cwd=tmp_path).endswith(end)
    file.write_text(json.dumps({"canary": ""}))
    assert refused("bbh", cwd=tmp_path).endswith("parity.json: examples is None, expected a list of objects")
    data = write_gsm8k(tmp_path / "source")
    (data / "test.jsonl").write_text(json.dumps({"question": "q", "answer": "so it is 72"}) + "\n")
    end = "test.jsonl: question 1: answer ends in 'so it is 72', expected #### and a number"
    assert refused("gsm8k", cwd=tmp_path).endswith(end)
    (data / "test.jsonl").write_text("\n")
    assert refused("gsm8k", cwd=tmp_path).endswith("test.jsonl: no question in it")


def test_as_a_module(tmp_path):
    """Without it `python -m tasks.bbh`, which the pages show, may not be a command."""
    write_bbh(tmp_path / "source")
    line = [sys.executable, "-m", "tasks.bbh", tmp_path / "source", "--out", tmp_path / "out"]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    rows = read_jsonl(tmp_path / "out" / "parity" / "test.jsonl", ("prompt", "response"))
    assert (done.returncode, done.stdout) == (0, "")
    train = QUESTIONS - len(rows)
    says = f"wrote {tmp_path / 'out' / 'parity'}: {train} train, {len(rows)} test, metric exact_match\n"
    assert done.stderr == says
