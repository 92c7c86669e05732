"""A wrong option is refused before any weights are read: here model.safetensors can't be opened, so
whatever reads it first says that instead."""

import json
import shutil
import sys
from importlib import import_module
from pathlib import Path

import pytest

from common.files import InputError
from common.template import TEMPLATE
from helpers_models import write_adapters
from helpers_training import write_tasks
from model import load_llama
from pool.folder import PoolFolder, write_pool

ADAPTERS = ("animals", "plurals")
THIS = Path(__file__)


@pytest.fixture(scope="module")
def home(small_model, tmp_path_factory):
    """model/ without weights, pool/, gone/ (a pool whose pool.json names an adapter that isn't there),
    tasks/."""
    home = tmp_path_factory.mktemp("home")
    shutil.copytree(small_model, home / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    (home / "model" / "model.safetensors").mkdir()
    base = load_llama(small_model)
    for name in ("pool", "gone"):
        adapters = write_adapters(home / name / "adapters", base, ADAPTERS)
        write_pool(PoolFolder(home / name, adapters, base.fingerprint(), TEMPLATE))
    shutil.rmtree(home / "gone" / "adapters" / "plurals")
    write_tasks(home / "tasks", ADAPTERS)
    (home / "text").write_text("the fox\n")
    (home / "prompts.jsonl").write_text(json.dumps({"prompt": "x", "method": "meteorra"}) + "\n")
    return home


def refusal(monkeypatch, home, line):
    """The line with which a command refuses its options; {home} in them is the folder."""
    script, *args = [part.format(home=home) for part in line.split()]
    if "--model" not in args:
        args += ["--model", f"{home}/model"]
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *args])
    with pytest.raises(InputError) as refused:
        import_module(script).main()
    return str(refused.value)


ASK = "generate --prompt x --pool {home}/pool"
SCORE = "eval --pool {home}/pool --tasks {home}/tasks --out {home}/out"
TRAIN = "--pool {home}/pool --tasks {home}/tasks"
GENERATE = {
    "generate --prompt x --pool {home}/nowhere": "nowhere: no such pool folder",
    "generate --prompt x --pool {home}/tasks": "tasks: not a pool",
    "generate --prompt x --pool {home}/gone": "plurals: no such adapter folder",
    f"{ASK} --adapter a={{home}}/nowhere": "nowhere: no such adapter folder",
    f"{ASK} --adapter a={{home}}/tasks": "tasks: holds no adapter_config.json",
    f"{ASK} --adapter plurals={{home}}/pool/adapters/plurals": "'plurals' twice",
    f"{ASK} --adapter a": "expected NAME=DIR",
    f"{ASK} --exclude plural": "did you mean plurals",
    "generate --prompt x --exclude plural": "there are no adapters",
    f"{ASK} --encoder {{home}}/nowhere": "nowhere: no such folder",
    f"{ASK} --prompts {{home}}/nowhere": "nowhere: No such file",
    f"{ASK} --prompts {{home}}/prompts.jsonl": "no method 'meteorra'",
    f"{ASK} --html {{home}}/pool": "pool: is a directory",
    f"{ASK} --html {THIS}/page.html": "there is no folder",
    f"{ASK} --svg {{home}}/pool": "pool: is a directory",
    f"{ASK} --svg {{home}}/p --html {{home}}/../{{home.name}}/p": "p, expected two files",
    f"{ASK} --method meteorra": "did you mean meteora",
    f"{ASK} --method meteora": "meteora_top2.safetensors: python train.py gates",
    f"{ASK} --method adapter:plural": "did you mean plurals",
    f"{ASK} --method oracle": "adapter:NAME",
    f"{ASK} --method lorahub:x": "lorahub.json: python train.py lorahub",
    f"{ASK} --mix plurals": "NAME=WEIGHT",
    f"{ASK} --mix plural=1": "did you mean plurals",
    "generate --prompt x --method uniform": "there are none",
    f"{ASK} --temperature -1": "--temperature",
    f"{ASK} --top_k 0": "--top_k",
    f"{ASK} --retrieve 0": "--retrieve",
    f"{ASK} --resident -1": "--resident",
    f"{ASK} --device toaster": "toaster",
}
EVAL = {
    "eval --pool {home}/nowhere --out {home}/out": "nowhere: no such pool folder",
    "eval --pool {home}/gone --out {home}/out": "plurals: no such adapter folder",
    f"{SCORE} --tasks {{home}}/nowhere": "nowhere: no such folder of tasks",
    f"{SCORE} --tasks {{home}}/pool": "pool: no task folders",
    f"{SCORE} --only plural": "did you mean plurals",
    f"{SCORE} --out {THIS}": "test_before_weights.py",
    f"{SCORE} --encoder {{home}}/nowhere": "nowhere: no such folder",
    f"{SCORE} --methods bse": "no method 'bse'",
    f"{SCORE} --methods base,meteora": "python train.py gates",
    f"{SCORE} --methods adapter:plural": "did you mean plurals",
    f"{SCORE} --methods mix:plurals": "NAME=WEIGHT",
    f"{SCORE} --methods adapter:plurals --ood": "no adapter of a task",
    f"{SCORE} --methods base --unseen": "neither router.safetensors nor retriever",
    f"{SCORE} --methods base --composite 3": "there are 2",
    f"{SCORE} --methods base --composite x": "--composite",
    f"{SCORE} --batch_size 0": "--batch_size",
    f"{SCORE} --device toaster --methods base": "toaster",
    f"{SCORE} --dtype int4 --methods base": "int4",
}
TRAINERS = {
    "train base --model {home}/new --text {home}/nowhere": "nowhere: No such file",
    "train base --model {home}/model --text {home}/text": "name another --model",
    "train base --model {home}/new --text {home}/text --num_attention_heads 7": "--num_attention_heads",
    f"train adapters {TRAIN} --only plural": "did you mean plurals",
    f"train adapters {TRAIN} --target w_proj": "--target w_proj",
    f"train adapters {TRAIN} --r 0": "--r is 0",
    f"train adapters {TRAIN} --pool {THIS}/pool": "test_before_weights.py",
    "train adapters --tasks {home}/tasks --pool {home}/pool/adapters": "outside of adapters",
    f"train gates {TRAIN} --kind meteora --top_k 3": "--top_k is 3",
    f"train gates {TRAIN} --share 0": "--share is 0",
    f"train gates {TRAIN} --adapters_too {{home}}/pool": "the pool itself",
    f"train gates {TRAIN} --composite 1.5": "--composite",
    f"train retriever {TRAIN} --depth 4": "--depth is 4, expected at most 3",
    f"train retriever {TRAIN} --prompts 1": "--prompts is 1",
    f"train router {TRAIN} --retrieve 1": "--retrieve is 1",
    f"train router {TRAIN} --drop 1": "--drop is 1",
    f"train drlora {TRAIN}": "pool: has adapter animals",
    f"train drlora {TRAIN} --top_k 3": "--top_k is 3",
    f"train drlora {TRAIN} --grow_every 300": "--grow_every is 300",
    f"train lorahub {TRAIN} --only plural": "did you mean plurals",
    f"train lorahub {TRAIN} --shots 0": "--shots is 0",
}
for command in ("adapters", "gates", "retriever", "router", "lorahub"):
    TRAINERS[f"train {command} --tasks {{home}}/tasks"] = "--pool is missing"
    TRAINERS[f"train {command} --pool {{home}}/pool"] = "--tasks is missing"
    TRAINERS[f"train {command} {TRAIN} --tasks {{home}}/nowhere"] = "nowhere: no such folder of tasks"
    TRAINERS[f"train {command} {TRAIN} --device toaster"] = "toaster"
for command in ("gates", "router", "lorahub"):
    TRAINERS[f"train {command} {TRAIN} --pool {{home}}/nowhere"] = "nowhere: no such pool folder"
    TRAINERS[f"train {command} {TRAIN} --pool {{home}}/gone"] = "plurals: no such adapter folder"


@pytest.mark.parametrize("line", [*GENERATE, *EVAL, *TRAINERS])
def test_a_wrong_option_is_refused_before_weights_are_read(monkeypatch, home, line):
    """Without it a typing mistake shows after minutes of loading, or after hours of answers."""
    message = refusal(monkeypatch, home, line)
    expected = (GENERATE | EVAL | TRAINERS)[line]
    assert expected in message and "model.safetensors" not in message, message


@pytest.mark.parametrize(
    "line",
    [f"{ASK} --method base", f"{SCORE} --methods base,oracle"]
    + [f"train {command} {TRAIN}" for command in ("adapters", "gates", "retriever", "router", "lorahub")],
)
def test_right_options_get_as_far_as_the_weights(monkeypatch, home, line):
    """Without it the test above passes for commands that refuse everything."""
    assert "model.safetensors: Is a directory" in refusal(monkeypatch, home, line)
