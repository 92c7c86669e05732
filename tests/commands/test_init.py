"""`generate.py --init`: PEFT folders become a pool whose default needs no training."""

import json

import pytest

from common.files import read_json, read_jsonl, write_jsonl
from common.tensors import read_metadata
from decoding.init_pool import around_prompt, write_samples
from generate import load
from helpers_commands import assert_refused, command
from helpers_models import write_adapters
from helpers_training import prompts, write_tasks
from methods.batch import default_method
from model import load_llama
from pool.adapters import load_adapter
from pool.folder import read_pool
from pool.retriever import LlamaEncoder, Retriever

NAMES = ("animals", "plurals", "elm")
MINE = "Q: {prompt}\nA:"


@pytest.fixture
def folders(small_model, tmp_path):
    """PEFT folders in one folder."""
    return write_adapters(tmp_path / "peft", load_llama(small_model), NAMES, size=0.1)


def init(model, pool, *more):
    return command("generate.py", "--init", "--model", model, "--pool", pool, *more)


def test_the_road_from_folders_to_the_default(small_model, tmp_path, folders):
    """Who has adapters and nothing else gets nonsense from an even mixture, and doesn't learn why."""
    pool = tmp_path / "peft"
    assert default_method(load(small_model, pool), 2)[0] == "logo_top1"
    said = prompts("plurals", 3)
    (tmp_path / "some.txt").write_text("".join(f"{line}\n\n" for line in said))
    write_jsonl(tmp_path / "more.jsonl", [{"prompt": "the fox\njumps"}, {"prompt": "over"}])
    tasks = write_tasks(tmp_path / "tasks")
    given = ["--samples", f"plurals={tmp_path}/some.txt", "--samples", f"elm={tmp_path}/more.jsonl"]
    done = init(small_model, pool, "--template", MINE, "--tasks", tasks, *given)
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == sorted(NAMES)
    assert "warning" not in done.stderr
    known = read_pool(pool)
    assert known.template == MINE and known.adapters == folders
    assert known.fingerprint == load_llama(small_model).fingerprint()
    samples = {name: load_adapter(folder).samples for name, folder in folders.items()}
    assert samples["plurals"] == said and samples["elm"] == ["the fox\njumps", "over"]
    trained = [row["prompt"] for row in read_jsonl(tasks / "animals" / "train.jsonl", ["prompt"])]
    assert sorted(samples["animals"]) == sorted(trained)
    mole = load(small_model, pool)
    assert default_method(mole, 2)[0] == "selection"
    metadata = read_metadata(pool / "retriever.safetensors")
    fresh = Retriever(LlamaEncoder(mole.model, mole.tokenizer))
    fresh.keep(samples)
    assert (
        dict(zip(metadata["names"].split("\n"), metadata["hashes"].split("\n"), strict=True)) == fresh.digests
    )
    asked = ["--model", small_model, "--pool", pool, "--max_new_tokens", 3]
    done = command("generate.py", *asked, "--prompt", said[0], "--json")
    assert done.returncode == 0 and "method: selection (3 adapters, no gates" in done.stderr
    (found,) = fresh([said[0]], 3)
    retrieved = json.loads(done.stdout)["retrieved"]
    assert [name for name, _ in retrieved] == [name for name, _ in found]


def test_adapters_from_elsewhere_are_copied(small_model, tmp_path, folders):
    """A pool that points elsewhere breaks when a download folder is cleaned up, and --init on a
    folder of PEFT folders must not hide those that lie in it."""
    elm = folders["elm"].rename(tmp_path / "elm")
    named = ["--adapter", f"elm={elm}"]
    for pool, inside in (
        (tmp_path / "peft", tmp_path / "peft"),
        (tmp_path / "new", tmp_path / "new/adapters"),
    ):
        done = init(small_model, pool, *named, "--raw")
        assert done.returncode == 0, done.stderr
        known = read_pool(pool)
        assert known.adapters["elm"] == inside / "elm"
        assert load_adapter(inside / "elm").hash == load_adapter(elm).hash
    assert read_pool(tmp_path / "peft").adapters.keys() == set(NAMES)
    assert read_json(tmp_path / "new" / "pool.json")["adapters"] == ["elm"]
    assert not (tmp_path / "new" / "retriever.safetensors").exists(), "there is nothing to find it by"


def test_written_samples_are_the_models_own(small_model, tmp_path, folders):
    """For want of prompts the model writes some; the same seed gives the same, each adapter its own,
    and none holds what follows a prompt in the template."""
    mole = load(small_model, tmp_path / "peft", template=MINE)
    assert around_prompt(mole.tokenizer, MINE) == ("Q: ", "\nA:")
    written = write_samples(mole, "elm", 5, seed=3)
    assert written == write_samples(mole, "elm", 5, seed=3) != write_samples(mole, "animals", 5, seed=3)
    assert 0 < len(written) <= 5 and all(text.strip() == text and "A:" not in text for text in written)
    done = init(small_model, tmp_path / "peft", "--template", MINE, "--write_samples", 5, "--seed", 3)
    assert done.returncode == 0, done.stderr
    assert load_adapter(folders["elm"]).samples == written


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--samples", "elm"], ["--samples", "'elm'", "NAME=FILE"]),
        (["--samples", "elk=README.md"], ["no adapter 'elk'", "did you mean elm"]),
        (["--samples", "elm=nowhere.txt"], ["nowhere.txt", "No such file"]),
        (["--tasks", "nowhere"], ["nowhere", "no such"]),
    ],
)
def test_wrong_samples_are_refused_before_anything_is_written(small_model, tmp_path, folders, more, words):
    """A half-made pool looks like a pool."""
    assert_refused(init(small_model, tmp_path / "peft", *more), *words)
    assert not (tmp_path / "peft" / "pool.json").exists()


def test_options_of_init_need_it(small_model, tmp_path, folders):
    """Samples that are read by nothing would be lost in silence."""
    asked = ["--model", small_model, "--pool", tmp_path / "peft", "--prompt", "x"]
    assert_refused(command("generate.py", *asked, "--write_samples", 3), "--write_samples is for --init")
    assert_refused(command("generate.py", "--init", "--model", small_model), "--init", "--pool")


@pytest.mark.parametrize("name", ["../out", "org/elm", ".elm"])
def test_a_name_that_is_a_path(small_model, tmp_path, folders, name):
    """Without it an adapter's files are copied out of the pool. Where nothing is written, such a name
    will do: a hub name has a slash."""
    named = ["--adapter", f"{name}={folders['elm']}"]
    assert_refused(init(small_model, tmp_path / "new", *named), f"adapter name is '{name}'", "no slashes")
    assert not (tmp_path / "new").exists() and not (tmp_path / "out").exists()
    asked = ["--prompt", "the fox", "--method", f"adapter:{name}", "--max_new_tokens", "2"]
    done = command("generate.py", "--model", small_model, *named, *asked)
    assert done.returncode == 0, done.stderr
