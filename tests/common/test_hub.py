"""Models and adapters named as on the hub, fetched from a small hub on this machine: which files,
from which revision, from the cache, and what is said where that fails."""

import json
import re
import shutil
import sys

import pytest
from safetensors.torch import load_file, save_file

from common.files import InputError
from common.hub import INDEX, READ, WHOLE, base_name, find_folder
from helpers_commands import ROOT, assert_refused, command
from helpers_hub import MAIN, OLD, Hub
from helpers_models import random_adapter, tokenizer_bytes, write_llama
from helpers_training import write_tasks
from model import load_llama
from pool.adapters import linear_shapes, load_adapter, save_adapter

TEMPLATE = "{% for m in messages %}<s>{{ m.content }} fox{% endfor %}"
MODEL = ["config.json", "generation_config.json", "tokenizer.model", "tokenizer_config.json"]
MODEL += ["special_tokens_map.json", "added_tokens.json", "chat_template.jinja"]
MODEL += ["additional_chat_templates/tool_use.jinja"]
UNREAD = ["README.md", "pytorch_model.bin", "original/consolidated.safetensors", "consolidated.safetensors"]
UNREAD += ["original/config.json", "optimizer.pt", "onnx/model.onnx"]
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
ADAPTER = ["adapter_config.json", "adapter_model.safetensors", "samples.jsonl"]


def write_model(folder, seed):
    """A model folder with every file that is read of one, and with others."""
    write_llama(folder, seed)
    (folder / "tokenizer.model").write_bytes(tokenizer_bytes())
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text(f"tools {TEMPLATE}")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "special_tokens_map.json").write_text('{"eos_token": "</s>"}')
    (folder / "added_tokens.json").write_text('{"<new>": 330}')
    (folder / "generation_config.json").write_text('{"eos_token_id": 2}')
    (folder / "tokenizer_config.json").write_text("{}")
    return write_unread(folder)


def write_unread(folder):
    for name in UNREAD:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"\x80\x04 nobody reads this")
    return folder


def write_sharded(folder, whole):
    """The same model in two shards, `whole` beside them; and a third that the index doesn't name."""
    tensors = load_file(whole / WHOLE)
    shutil.copytree(whole, folder)
    (folder / WHOLE).unlink()
    shard_of = {name: SHARDS[j % 2] for j, name in enumerate(sorted(tensors))}
    for shard in SHARDS:
        save_file({name: tensors[name] for name in tensors if shard_of[name] == shard}, folder / shard)
    (folder / INDEX).write_text(json.dumps({"weight_map": shard_of}))
    (folder / "model-00003-of-00003.safetensors").write_bytes(b"of an earlier upload")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """The repositories: ROOT/ORG/NAME/COMMIT. Don't write into it."""
    root = tmp_path_factory.mktemp("hub")
    model = write_model(root / "acme" / "small" / MAIN, seed=0)
    write_model(root / "acme" / "small" / OLD, seed=1)
    write_sharded(root / "acme" / "sharded" / MAIN, model)
    both = root / "acme" / "both" / MAIN
    write_sharded(both, model)
    shutil.copy(model / WHOLE, both / WHOLE)
    adapter = random_adapter("ant", linear_shapes(load_llama(model)), seed=3)
    adapter.samples = ["what is the plural"]
    save_adapter(adapter, root / "acme" / "ant" / MAIN)
    write_unread(root / "acme" / "ant" / MAIN)
    shutil.copytree(model, root / "acme" / "pickles" / MAIN)
    (root / "acme" / "pickles" / MAIN / WHOLE).unlink()
    shutil.copytree(model, root / "acme" / "mixtral" / MAIN)
    (root / "acme" / "mixtral" / MAIN / "config.json").write_text('{"model_type": "mixtral"}')
    return root


@pytest.fixture
def hub(root):
    served = Hub(root)
    yield served
    served.close()


def generate(environment, model, *more):
    options = ["--prompt", "the quick fox", "--max_new_tokens", 7, "--raw"]
    return command("generate.py", "--model", model, *options, *more, environment=environment)


def answer(environment, model, *more):
    done = generate(environment, model, *more)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    return done.stdout


def test_a_model_and_an_adapter_answer_as_from_their_folders(hub, root, tmp_path):
    """Without it a file that is read (a chat template, an added token) is missing from the hub's
    models alone, or gigabytes and pickles that nobody reads are fetched."""
    environment = hub.environment(tmp_path)
    model = root / "acme" / "small" / MAIN
    adapter = root / "acme" / "ant" / MAIN
    alone = answer({}, model)
    expected = answer({}, model, "--adapter", f"ant={adapter}", "--method", "adapter:ant")
    asked = ["--adapter", "ant=acme/ant", "--method", "adapter:ant"]
    done = generate(environment, "acme/small", *asked)
    assert done.stdout == expected != alone
    assert "%|" not in done.stderr and done.stderr.count("\n") < 7, "progress bars flood a log"
    wanted = [f"acme/small/{file}" for file in (*MODEL, WHOLE)]
    assert sorted(hub.fetched) == sorted([*wanted, *(f"acme/ant/{file}" for file in ADAPTER)])
    hub.fetched.clear()
    assert answer(environment, "acme/small", *asked) == expected
    assert hub.fetched == []


@pytest.mark.parametrize("name, weights", [("sharded", SHARDS), ("both", [WHOLE])])
def test_of_the_weights_only_those_that_are_read_are_fetched(hub, root, tmp_path, name, weights):
    """Llama 3's repositories hold their weights twice: fetching all takes twice the time and disk."""
    expected = answer({}, root / "acme" / name / MAIN)
    assert expected == answer({}, root / "acme" / "small" / MAIN)
    assert answer(hub.environment(tmp_path), f"acme/{name}") == expected
    wanted = [f"acme/{name}/{file}" for file in (*MODEL, INDEX, *weights)]
    assert sorted(hub.fetched) == sorted(wanted)


def test_a_revision_is_another_model(hub, root, tmp_path):
    """Without it a result can't be made again once the repository has changed."""
    environment = hub.environment(tmp_path)
    expected = answer({}, root / "acme" / "small" / OLD)
    assert answer(environment, "acme/small@v1") == answer(environment, f"acme/small@{OLD}") == expected
    assert answer(environment, "acme/small") == answer({}, root / "acme" / "small" / MAIN) != expected


def test_what_the_cache_holds_works_without_the_hub(hub, tmp_path):
    """In a train, on a cluster's node, or while the hub is down a cached model must go on working."""
    environment = hub.environment(tmp_path)
    offline = environment | {"HF_HUB_OFFLINE": "1"}
    asked = ["--adapter", "ant=acme/ant", "--method", "adapter:ant"]
    expected = answer(environment, "acme/small", *asked)
    count = hub.asked
    done = generate(offline, "acme/small", *asked)
    assert done.stdout == expected and "warning" not in done.stderr, done.stderr
    assert hub.asked == count
    assert_refused(generate(offline, "acme/small@v1"), "acme/small@v1", "HF_HUB_OFFLINE")
    hub.close()
    done = generate(environment, "acme/small", *asked)
    assert done.stdout == expected
    warned = [line for line in done.stderr.splitlines() if line.startswith("warning: ")]
    assert len(warned) == 2 and all("taken from the cache" in line for line in warned)


def test_without_hub_and_cache_one_line(hub, tmp_path):
    """Without it a laptop without network gets fifty lines of traceback, or a minute of retries."""
    environment = hub.environment(tmp_path)
    hub.close()
    both = "no such model folder"
    assert_refused(generate(environment, "acme/small"), "acme/small", both, hub.url, "refused")
    assert_refused(generate(environment, f"acme/small@{MAIN}"), both, hub.url, "refused")
    offline = environment | {"HF_HUB_OFFLINE": "1"}
    assert_refused(generate(offline, "acme/small"), "acme/small", both, "HF_HUB_OFFLINE")
    assert hub.asked == 0


def test_a_wrong_name_is_read_both_ways(hub, tmp_path):
    """runs/pool may be a folder that isn't there as well as a name on the hub: a line about only one
    of them sends the user to the wrong place."""
    environment = hub.environment(tmp_path)
    done = generate(environment, "runs/pool")
    assert_refused(done, "runs/pool: no such model folder", hub.url, "no repository of that name")
    done = generate(environment, "acme/small", "--adapter", "x=runs/pool")
    assert_refused(done, "runs/pool: no such adapter folder", hub.url, "no repository of that name")
    assert_refused(generate(environment, "acme/small@v3"), "acme/small has no revision 'v3'", hub.url)
    assert_refused(generate(environment, "acme/sm--all"), "acme/sm--all", "no such model folder")
    assert hub.fetched == []


@pytest.mark.parametrize(
    "name", ["none", "/no/small", "a/b/c", "./no/small", "no/small@", "no/small@a b", "no/", "no/smäll"]
)
def test_other_names_are_folders_alone(name):
    """Without it a path of yours is sent to the hub, or refused with a word on networks."""
    with pytest.raises(InputError, match="no such model folder, nor a name on the Hugging Face hub"):
        find_folder(name, "model")


@pytest.mark.parametrize(
    "where, refusal, words",
    [
        ("hidden", (401, "RepoNotFound"), ["no repository of that name, or a private one", "hf auth login"]),
        ("hidden", (401, None), ["access denied (status 401)", "hf auth login"]),
        ("hidden", (403, None), ["access denied (status 403)", "HF_TOKEN"]),
        ("hidden", (503, None), ["503"]),
        ("refused", (401, "GatedRepo"), ["accepted its terms", "/acme/small", "hf auth login"]),
        ("refused", (403, "GatedRepo"), ["accepted its terms", "/acme/small", "hf auth login"]),
        ("refused", (403, None), ["access denied (status 403)"]),
    ],
)
def test_no_access_says_how_to_get_it(hub, tmp_path, where, refusal, words):
    """Most Llamas are gated: without it the first run ends in a traceback that names a URL."""
    getattr(hub, where)["acme/small"] = refusal
    done = generate(hub.environment(tmp_path), "acme/small")
    assert_refused(done_without_progress(done), "acme/small: no such model folder", hub.url, *words)
    assert hub.fetched == []


def done_without_progress(done):
    """`done` without the lines that say what is being fetched."""
    done.stderr = re.sub(r"(?m)^\S+: fetching .*\n", "", done.stderr)
    return done


def test_a_repository_that_is_no_llama_is_refused_before_its_weights_are_fetched(hub, tmp_path):
    """Without it ninety gigabytes of another architecture are fetched, and then refused."""
    environment = hub.environment(tmp_path)
    done = generate(environment, "acme/mixtral")
    assert_refused(done_without_progress(done), "model_type is 'mixtral', expected 'llama'")
    assert f"acme/mixtral/{WHOLE}" not in hub.fetched
    hub.fetched.clear()
    assert_refused(generate(environment, "acme/pickles"), "acme/pickles: no model on the hub", WHOLE, INDEX)
    assert_refused(generate(environment, "acme/ant"), "acme/ant: no model on the hub", "config.json")
    done = generate(environment, "acme/ant", "--adapter", "x=acme/small")
    assert_refused(done, "acme/small: no adapter on the hub", "adapter_config.json")
    assert hub.fetched == []


def test_without_the_package_the_line_names_it(monkeypatch):
    """Optional packages are missing at most users': they get a line, not a ModuleNotFoundError."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "huggingface_hub"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(InputError, match="no such model folder; .*: pip install huggingface_hub$"):
        find_folder("acme/small", "model")


def test_every_file_that_is_read_is_fetched():
    """Without it a file that the tokenizer comes to read is found in folders, never on the hub."""
    named = set()
    for file in ("tokenizer", "added_tokens", "llama_folder"):
        text = (ROOT / "common" / f"{file}.py").read_text()
        named |= set(re.findall(r'"([a-z_.]+\.(?:json|jinja|model|safetensors))"', text))
    assert {"tokenizer.json", "chat_template.jinja", INDEX} < named
    assert named <= {*READ["model"], WHOLE}


def test_an_existing_folder_comes_before_the_hub(hub, root, tmp_path):
    """Without it a folder of your own is replaced by what a stranger has put on the hub."""
    (tmp_path / "acme").mkdir()
    (tmp_path / "acme" / "small").symlink_to(root / "acme" / "small" / OLD)
    done = command(
        *("generate.py", "--model", "acme/small", "--prompt", "the quick fox", "--max_new_tokens", 7),
        *("--raw",), cwd=tmp_path, environment=hub.environment(tmp_path),
    )  # fmt: skip
    assert done.stdout == answer({}, root / "acme" / "small" / OLD)
    assert hub.asked == 0


def test_trained_adapters_name_the_hubs_base(hub, root, tmp_path):
    """Without it an adapter's base is a commit's hash, PEFT doesn't find it, and each later run warns
    of another base."""
    environment = hub.environment(tmp_path / "home")
    tasks = write_tasks(tmp_path / "tasks")
    pool = tmp_path / "pool"
    run = ["--tasks", tasks, "--pool", pool, "--steps", 2, "--batch_size", 2, "--r", 3]
    done = command("train.py", "adapters", "--model", "acme/small@v1", *run, environment=environment)
    assert done.returncode == 0, done.stderr
    config = load_adapter(pool / "adapters" / "plurals").config
    assert config["base_model_name_or_path"] == "acme/small" == base_name("acme/small@v1")
    for model in ("acme/small@v1", root / "acme" / "small"):
        assert "trained on base" not in generate(environment, model, "--pool", pool).stderr
    done = generate(environment, "acme/sharded", "--pool", pool)
    assert "trained on base 'acme/small', not 'acme/sharded'" in done.stderr
    again = [*run, "--resume", "--steps", 2]
    done = command("train.py", "adapters", "--model", "acme/small@v1", *again, environment=environment)
    assert "finished already" in done.stderr, done.stderr


def test_base_names(tmp_path):
    """The name of a folder is its own, also through a link or as `.`; a hub's has no revision."""
    (tmp_path / "llama").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "llama")
    assert base_name(tmp_path / "link") == base_name(tmp_path / "llama" / ".") == "llama"
    assert base_name("acme/small") == base_name(f"acme/small@{OLD}") == "acme/small"
