"""Cases that damage a pool: pool.json, gates, retriever, router, baselines, samples, names.

No other program reads these files. What may come of a damage follows from what docs/formats.md
binds to what: of numbers within their bounds and of finite weights that are others any answer is
right, of all else only the undamaged one.
"""

import json
import unicodedata

from fuzz.files import damage_bytes, damage_json_file, damage_jsonl_file, replace_file
from fuzz.plan import ANY, EVAL, LIST, MUST, POOL, SAME, Plan, kind
from fuzz.tensors import damage_header, damage_metadata, damage_tensor
from fuzz.values import FOLDER_NAMES, HOSTILE, dump, json_value

GATES = ["meteora_top1", "meteora_top2", "soft", "smear", "loraflow", "moe_top3", "drlora"]
# Metadata of which another text, within bounds, makes another part that is as good.
FREE = {"gates": {"k"}, "retriever": {"depth", "max_length", "names", "hashes"}}
FREE["router"] = {"divisor", "scaled", "prior"}
# Damages of a pool.json after which it says something else, rightly: all defaults.
OTHER_POOL = ("whole", "JSON object", "missing", "link")


@kind("pool.json", "small", "pool")
def pool_json(rng, folder):
    file = folder / "pool" / "pool.json"
    before = template_of(file)
    done = damage_json_file(rng, file)
    free = template_of(file) != before or any(word in done for word in OTHER_POOL)
    return Plan([*POOL, "--method", "meteora_top2"], done, ANY if free else SAME)


def template_of(file):
    """The template of a pool.json, to which nothing is bound; None where the file can't be read."""
    if not file.is_file():  # a pipe would be waited for
        return None
    try:
        return json.loads(file.read_bytes())["template"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


@kind("gates", "small", "pool")
def gates(rng, folder):
    method = rng.choice(GATES)
    return part(rng, folder / "pool" / "gates" / f"{method}.safetensors", method, FREE["gates"])


@kind("retriever", "small", "pool")
def retriever(rng, folder):
    method = rng.choice(["selection", "mixture", "fusion", "ramole"])
    return part(rng, folder / "pool" / "retriever.safetensors", method, FREE["retriever"])


@kind("router", "small", "pool")
def router(rng, folder):
    return part(rng, folder / "pool" / "router.safetensors", "ramole", FREE["router"])


def part(rng, file, method, free_keys):
    """Damage of a safetensors file of the pool, whose metadata may have other `free_keys`."""
    argv = [*POOL, "--method", method]
    draw = rng.random()
    if draw < 0.35:
        done, key = damage_metadata(rng, file)
        free = key in free_keys
    elif draw < 0.85:
        done, free = rng.choice([damage_header, damage_tensor])(rng, file)
    elif draw < 0.93:
        done = replace_file(rng, file)
        # A retriever that isn't there, or a link to nothing, is done without, with a warning.
        optional = file.stem == "retriever" and ("missing" in done or "link" in done)
        return Plan(argv, done, ANY if optional else MUST)
    else:
        done, free = damage_bytes(rng, file, rng.choice([8, 300, None])), True
    return Plan(argv, f"{file.name}: {done}", ANY if free else SAME)


@kind("lorahub.json", "small", "pool")
def lorahub(rng, folder):
    file = folder / "pool" / "baselines" / "lorahub.json"
    if rng.random() < 0.5:
        return Plan([*POOL, "--method", "lorahub:fox"], damage_json_file(rng, file), ANY)
    raw = json.loads(file.read_text())
    weights = raw["weights"]["fox"]
    name, new = rng.choice([*weights, "gnu", "\x1b[31m"]), json_value(rng)
    weights[name] = new
    file.write_text(dump(raw))
    return Plan([*POOL, "--method", "lorahub:fox"], f"weight of {name!r} is {str(new)[:80]!r}", ANY)


@kind("baselines", "small", "pool")
def baselines(rng, folder):
    adapter = folder / "pool" / "baselines" / "lora_f"
    argv = [*POOL, "--method", "lora_f"]
    if rng.random() < 0.5:
        return Plan(argv, damage_json_file(rng, adapter / "adapter_config.json"), SAME)
    return part_of_adapter(rng, argv, adapter)


@kind("samora's experts", "small", "pool")
def samora(rng, folder):
    home = folder / "pool" / "baselines" / "samora"
    argv = [*POOL, "--method", "samora"]
    draw = rng.random()
    if draw < 0.5:
        return part(rng, home / "gates" / "samora.safetensors", "samora", FREE["gates"])
    if draw < 0.75:
        return Plan(argv, damage_json_file(rng, home / "adapters" / "expert_3" / "adapter_config.json"), SAME)
    return part_of_adapter(rng, argv, home / "adapters" / "expert_2")


@kind("adapters of a pool", "small", "pool")
def pool_adapters(rng, folder):
    adapter = folder / "pool" / "adapters" / rng.choice(["ant", "bee", "cat"])
    methods = ["meteora_top2", "ramole", "mixture", "average_ba", "ties_ba", "arrow", "logo", "adapter:bee"]
    argv = [*POOL, "--method", rng.choice(methods)]
    if rng.random() < 0.5:
        return Plan(argv, damage_json_file(rng, adapter / "adapter_config.json"), SAME)
    return part_of_adapter(rng, argv, adapter)


def part_of_adapter(rng, argv, adapter):
    """Damage of the tensors of one of this project's adapters."""
    file = adapter / "adapter_model.safetensors"
    if rng.random() < 0.3:
        done, free = damage_metadata(rng, file)[0], False
    else:
        done, free = rng.choice([damage_header, damage_tensor])(rng, file)
    return Plan(argv, f"{adapter.name}: {done}", ANY if free else SAME)


@kind("samples.jsonl", "small", "pool")
def samples(rng, folder):
    file = folder / "pool" / "adapters" / "ant" / "samples.jsonl"
    argv = rng.choice([[*POOL, "--method", "selection"], LIST])
    return Plan(argv, damage_jsonl_file(rng, file), ANY)


@kind("printed texts", "small", "pool")
def printed(rng, folder):
    """Texts that --list, legends and pictures show: samples, and fields of adapters' configs."""
    adapter = folder / "pool" / "adapters" / "bee"
    said = rng.choice(HOSTILE)
    (adapter / "samples.jsonl").write_text(json.dumps({"prompt": said}) + "\n")
    config = json.loads((adapter / "adapter_config.json").read_text())
    name = rng.choice(["base_model_name_or_path", "task_type", said, "revision"])
    (adapter / "adapter_config.json").write_text(json.dumps(config | {name: said}))
    shown = [*POOL[:-1], "--routing", "--svg", "a.svg", "--html", "a.html"]
    argv = rng.choice([LIST, shown])
    return Plan(argv, f"sample and {name!r} are {said!r}", ANY, colours=argv is shown)


@kind("names of adapters", "small", "pool")
def names(rng, folder):
    """PEFT folders of any name, beside those of a pool without pool.json."""
    name = rng.choice(FOLDER_NAMES)
    pool = folder / "peft"
    pool.mkdir()
    (folder / "pool" / "adapters" / "ant").rename(pool / "ant")
    (folder / "pool" / "adapters" / "bee").rename(pool / name)
    argv = ["generate.py", "--model", "small", "--pool", "peft"]
    shown = [*argv, "--prompt", "the fox", "--method", f"adapter:{name}", *POOL[-5:-1], "--routing"]
    ways = [[*argv, "--list"], [*argv, "--prompt", "hi", "--method", "adapter:gnu"], shown]
    ways += [[*shown[:-1], "--json"], [*shown, "--svg", "a.svg", "--html", "a.html"]]
    argv = rng.choice(ways)
    hidden = any(unicodedata.category(character) == "Cc" for character in name)
    expect = MUST if hidden else ANY
    return Plan(argv, f"an adapter's folder is {name!r}", expect, colours="--routing" in argv)


@kind("other files of a pool", "small", "pool", "questions")
def other(rng, folder):
    """Any file of the pool replaced, whatever reads it."""
    files = sorted(file for file in (folder / "pool").rglob("*") if file.is_file())
    done = replace_file(rng, rng.choice(files))
    methods = ["meteora_top2", "ramole", "selection", "lora_b", "lorahub:fox", "mixture", "smear", "loraflow"]
    scored = [*EVAL, "--tasks", "questions", "--out", "out"]
    return Plan(rng.choice([[*POOL, "--method", rng.choice(methods)], scored]), done, ANY)
